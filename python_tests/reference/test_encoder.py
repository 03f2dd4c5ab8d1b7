"""The Poisson encoder's twin, bit for bit against a slow script of its own over Python integers and exact fractions."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from pyaccel import reference


def philox_words(seed: int, counter: tuple[int, int, int, int]) -> list[int]:
    key = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    c = list(counter)
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(b >> 32) ^ c[1] ^ key[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ key[1], a & 0xFFFFFFFF]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def encode(values: list[list[float]], steps, seed, stream=0, ids=None, first_step=0) -> list[list[list[int]]]:
    """design: word (pixel mod 4) of counter (pixel / 4, sample id, stream, 3 + (step << 8)); spike where word < floor(P * 2^32)."""
    out = []
    for t in range(first_step, first_step + steps):
        rows = []
        for b, row in enumerate(values):
            sample = b if ids is None else ids[b]
            spikes = []
            for p, x in enumerate(row):
                word = philox_words(seed, (p // 4, sample, stream, 3 + (t << 8)))[p % 4]
                limit = int(min(abs(Fraction(x)), Fraction(1)) * 2**32)
                spikes.append((1 if x > 0 else -1) if word < limit else 0)
            rows.append(spikes)
        out.append(rows)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed, stream, first_step", [(0, 0, 0), (1 << 63 | 12345, 0xFFFFFFFF, 65_533), (-7, 9, 300)])
def test_every_bit(dtype, seed, stream, first_step):
    torch.manual_seed(2)
    image = torch.randn(3, 10, dtype=dtype)
    image[0, :4] = torch.tensor([0.0, 1.0, -1.0, 2.0])
    for ids in (None, [7, 0, 0xFFFFFFFF]):
        got = reference.poisson_encode(
            image, 3, seed=seed, stream=stream, first_step=first_step, sample_ids=None if ids is None else torch.tensor(ids)
        )
        assert got.tolist() == encode(image.tolist(), 3, seed, stream, ids, first_step)


# Computed by `encode` above, written down so that both cannot change together.
GOLDEN = [[[1, 1, 1, -1, 0, 0, 0, -1]], [[0, 1, 1, -1, 1, 0, 1, -1]]]


def test_golden_vector():
    image = [[0.25, 0.5, 0.75, -0.25, 0.5, -0.5, 0.125, -1.0]]
    assert encode(image, 2, seed=2010_01729, stream=5) == GOLDEN
    assert reference.poisson_encode(torch.tensor(image), 2, seed=2010_01729, stream=5).tolist() == GOLDEN


def test_nan_never_spikes_and_infinity_always():
    image = torch.tensor([[float("nan"), float("inf"), -float("inf"), 0.0]])
    got = reference.poisson_encode(image, 200, seed=1)
    assert torch.equal(got, torch.tensor([0.0, 1.0, -1.0, 0.0]).expand(200, 1, 4))


def test_gradient_is_gain_summed_over_steps():
    image = torch.rand(2, 3, requires_grad=True)
    grad = torch.randn(4, 2, 3)
    reference.poisson_encode(image, 4, gain=0.5, seed=0).backward(grad)
    torch.testing.assert_close(image.grad, 0.5 * grad.sum(0))
