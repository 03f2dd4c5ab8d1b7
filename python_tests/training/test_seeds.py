from __future__ import annotations

import io
import random

import numpy as np
import pytest
import torch

from pyaccel.training import capture_rng, deterministic, restore_rng, seed_everything


def draws():
    return [random.random(), float(np.random.rand()), float(np.random.randn()), torch.rand(2).tolist(),
            torch.randn(3).tolist()]


def test_seed_everything():
    seed_everything(2**40 + 3)
    first = draws()
    seed_everything(2**40 + 3)
    assert draws() == first
    seed_everything(4)
    assert all(a != b for a, b in zip(draws(), first, strict=True))
    seed_everything(-1)
    with pytest.raises(ValueError, match="seed must fit in 64 bits"):
        seed_everything(2**63)


@pytest.mark.parametrize("bits", [np.random.PCG64, np.random.MT19937, np.random.Philox, np.random.SFC64])
def test_states_return_through_a_file_without_code(bits):
    generator = np.random.Generator(bits(1))
    draws(), generator.random()
    file = io.BytesIO()
    torch.save(capture_rng(generator), file)
    expected = draws(), generator.random(5).tolist()
    assert expected != (draws(), generator.random(5).tolist())
    file.seek(0)
    restore_rng(torch.load(file, weights_only=True), generator)
    assert expected == (draws(), generator.random(5).tolist())


def test_generator_without_a_captured_state():
    with pytest.raises(ValueError, match="none was captured"):
        restore_rng(capture_rng(), np.random.default_rng())


def test_capture_does_not_start_cuda():
    before = torch.cuda.is_initialized()
    assert (capture_rng()["cuda"] is None) == (not before)
    assert torch.cuda.is_initialized() == before


def test_deterministic_is_a_switch_and_a_context(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    assert not torch.are_deterministic_algorithms_enabled()
    with deterministic():
        assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
        with deterministic(False):
            assert not torch.are_deterministic_algorithms_enabled()
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.benchmark
    deterministic(True)
    assert torch.are_deterministic_algorithms_enabled()
    deterministic(False)
    assert not torch.are_deterministic_algorithms_enabled()
