"""Seeds, states of random number generators, and the deterministic mode of CUDA."""

from __future__ import annotations

import os
import random

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed Python's `random`, numpy's legacy global generator and torch on every device.

    numpy takes 32 bits: it gets seed modulo 2^32. `np.random.default_rng` generators are the caller's own: seed them
    where they are made. The kernels of pyaccel draw by counters from their own seeds and are not touched.
    """
    if not -2**63 <= seed < 2**63:
        raise ValueError(f"seed must fit in 64 bits, got {seed}")
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class deterministic:
    """Make torch choose algorithms that give the same bits each run: `deterministic(True)`, or `with deterministic():`.

    Without `with` it stays switched. It matters on CUDA; an operation that has no such algorithm raises RuntimeError.
    cuBLAS reads its workspace setting when it is first used: switch before the first CUDA product.
    """

    def __init__(self, on: bool = True):
        self._benchmark = torch.backends.cudnn.benchmark
        self._mode = torch.get_deterministic_debug_mode()
        if on:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.backends.cudnn.benchmark = False  # It times algorithms and may choose another one each run.
        torch.use_deterministic_algorithms(on)

    def __enter__(self) -> deterministic:
        return self

    def __exit__(self, *_) -> None:
        torch.backends.cudnn.benchmark = self._benchmark
        torch.set_deterministic_debug_mode(self._mode)


def capture_rng(generator: np.random.Generator | None = None) -> dict:
    """The states of Python's, numpy's legacy and torch's generators, and of `generator`, as plain values and tensors.

    CUDA states are included once the process has used CUDA. The result loads with `torch.load(weights_only=True)`.
    """
    return {"python": random.getstate(),
            "numpy": _plain(np.random.get_state(legacy=False)),
            "generator": None if generator is None else _plain(generator.bit_generator.state),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None}


def restore_rng(state: dict, generator: np.random.Generator | None = None) -> None:
    """Set every generator to what `capture_rng` saw.

    States of CUDA devices that are not visible here are left out. ValueError if `generator` is given but none was
    captured.
    """
    if generator is not None:
        if state["generator"] is None:
            raise ValueError("restore_rng: a numpy generator is given, but none was captured")
        generator.bit_generator.state = state["generator"]
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    for device in range(min(len(state["cuda"] or ()), torch.cuda.device_count())):
        torch.cuda.set_rng_state(state["cuda"][device], device)


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value
