"""`ops.poisson_encode`: every bit against its twin, and bits that do not depend on where, when or with whom they are drawn."""

from __future__ import annotations

import pytest
import torch
from neuron_cases import DTYPES, arrange, label, leaf, pairwise

from pyaccel import ops, reference

CASES = pairwise(
    shape=[(0, 3, 4, 4), (1,), (7,), (3, 1), (2, 129), (2, 3, 5, 7), (1, 3, 1, 1), (5, 2, 16, 17), (2, 3, 0, 2), (3, 2, 2, 2, 3)],
    dtype=DTYPES,
    layout=["contiguous", "channels_last", "sliced", "offset", "expanded"],
    steps=[0, 1, 2, 25],
    gain=[1.0, 0.5, 3.7],
    seed=[0, 12345, (1 << 64) - 3, -(1 << 63)],
    stream=[0, 7, 0xFFFFFFFF],
    ids=["none", "given", "strided"],
    first_step=[0, 1000, 65_536 - 25],
)


@pytest.mark.parametrize("case", CASES, ids=label)
def test_the_encoder_is_its_twin(case):
    torch.manual_seed(0)
    shape, layout = case["shape"], case["layout"]
    image = torch.randn(shape).to(case["dtype"])
    if layout == "channels_last":
        image = image.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else image
    else:
        image = arrange(image, layout)
    ids = None
    if case["ids"] != "none":
        ids = torch.randint(0, 1 << 32, (shape[0] * 2,))
        ids = ids[::2] if case["ids"] == "strided" else ids[: shape[0]]
    keywords = dict(gain=case["gain"], seed=case["seed"], stream=case["stream"], sample_ids=ids, first_step=case["first_step"])
    got, wanted = (f(image, case["steps"], **keywords) for f in (ops.poisson_encode, reference.poisson_encode))
    assert torch.equal(got, wanted) and got.dtype == image.dtype and got.shape == (case["steps"], *shape)


def image(*shape):
    torch.manual_seed(1)
    return torch.randn(*shape)


def test_a_split_of_the_batch_draws_the_same_bits():
    x = image(6, 3, 5, 7)
    whole = ops.poisson_encode(x, 4, seed=3)
    ids = torch.arange(6)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    assert torch.equal(torch.cat([ops.poisson_encode(a, 4, seed=3, sample_ids=i) for a, i in zip(x.split(2), ids.split(2), strict=True)], 1), whole)
    assert torch.equal(ops.poisson_encode(x[order], 4, seed=3, sample_ids=order), whole[:, order])
    assert not torch.equal(ops.poisson_encode(x[order], 4, seed=3), whole[:, order])


@pytest.mark.parametrize("cuts", [(1, 9), (5, 5), (3, 3, 4)])
def test_a_split_of_time_draws_the_same_bits(cuts):
    x = image(3, 40)
    whole, first, parts = ops.poisson_encode(x, 10, seed=3, first_step=50), 50, []
    for steps in cuts:
        parts.append(ops.poisson_encode(x, steps, seed=3, first_step=first))
        first += steps
    assert torch.equal(torch.cat(parts), whole)


def test_memory_order_does_not_matter():
    x = image(3, 5, 6, 7)
    y = x.contiguous(memory_format=torch.channels_last)
    a, b = (ops.poisson_encode(t, 9, seed=4) for t in (x, y))
    assert torch.equal(a, b)
    assert a.is_contiguous() and b.stride()[1:] == y.stride()
    flat = ops.poisson_encode(x.flatten(1), 9, seed=4)
    assert torch.equal(flat, a.flatten(2))


def test_seed_stream_step_sample_and_pixel_all_matter():
    x = torch.full((2, 64), 0.5)
    base = ops.poisson_encode(x, 2, seed=5, stream=6)
    others = [
        ops.poisson_encode(x, 2, seed=4, stream=6),
        ops.poisson_encode(x, 2, seed=5 + (1 << 32), stream=6),
        ops.poisson_encode(x, 2, seed=5, stream=7),
        ops.poisson_encode(x, 2, seed=5, stream=6, first_step=2),
        ops.poisson_encode(x, 2, seed=5, stream=6, sample_ids=torch.tensor([2, 3])),
        base.flip(0),
        base.flip(1),
        base.roll(1, 2),
    ]
    for other in others:
        assert 0.3 < (other != base).float().mean() < 0.7


def test_a_key_tensor_is_the_same_draw():
    x = image(2, 30)
    key = torch.tensor([-3, 9, 1000])
    assert torch.equal(
        ops.poisson_encode(x, 3, seed=key), ops.poisson_encode(x, 3, seed=(1 << 64) - 3, stream=9, first_step=1000)
    )


@pytest.mark.parametrize("gain", [1.0, 0.5])
def test_frequencies(gain):
    """The mean of many draws is the clipped value; each pixel within 4.5 deviations (one in 10^5 each)."""
    x = torch.linspace(-2.5, 2.5, 41)[None]
    n = 8000
    spikes = ops.poisson_encode(x, n, seed=11, gain=gain)
    assert spikes.unique().tolist() == [-1, 0, 1]
    p = (gain * x[0]).clamp(-1, 1)
    error = (spikes.mean((0, 1)) - p).abs()
    assert (error <= 4.5 * (p.abs() * (1 - p.abs()) / n).sqrt() + 1e-6).all()
    assert (spikes * x.sign() >= 0).all() and (spikes[:, 0, 20] == 0).all()
    sure = p.abs() == 1
    assert sure.any() and (spikes[:, 0, sure] == p[sure]).all()


def test_draws_of_neighbours_are_uncorrelated():
    spikes = ops.poisson_encode(torch.full((8, 512), 0.5), 64, seed=2) - 0.5
    for other in (spikes.roll(1, 0), spikes.roll(1, 1), spikes.roll(1, 2), spikes.roll(4, 2), spikes.flip(2)):
        assert abs(float((spikes * other).mean())) < 4.5 * 0.25 / spikes.numel() ** 0.5


@pytest.mark.parametrize("dtype", DTYPES)
def test_odd_values(dtype):
    x = torch.tensor([[float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0, -1.0]], dtype=dtype)
    spikes = ops.poisson_encode(x, 300, seed=1)
    assert torch.equal(spikes, torch.tensor([0, 1, -1, 0, 0, 1, -1], dtype=dtype).expand(300, 1, 7))


def test_the_gradient_is_gain_summed_over_steps():
    x = leaf(image(2, 3, 4, 4))
    spikes = ops.poisson_encode(x, 5, gain=0.4, seed=0)
    grad = torch.randn_like(spikes)
    (g,) = torch.autograd.grad(spikes, x, grad)
    torch.testing.assert_close(g, 0.4 * grad.sum(0), rtol=1e-6, atol=1e-7)
    assert not ops.poisson_encode(image(2, 3), 2, seed=0).requires_grad


def test_nothing_is_kept_for_the_gradient():
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        ops.poisson_encode(leaf(image(2, 300)), 5, seed=0)
    assert sum(t.numel() for t in saved) == 0


def test_no_steps_have_a_gradient_of_zero():
    x = leaf(image(2, 3))
    ops.poisson_encode(x, 0, seed=0).sum().backward()
    assert torch.equal(x.grad, torch.zeros(2, 3))
