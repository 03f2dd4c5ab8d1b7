"""The factorised convolution: penalties, pruning by energy, growth, both deployed forms, prefixes that stay
bit-equal."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pyaccel.nn import FactorizedConv2d, grown_spare, hoyer, kept_by_energy, orthogonality

# (columns, outputs, full rank) of the five layers of the published network.
LAYERS = [(3, 64, 3, 18), (64, 64, 3, 57), (64, 128, 3, 104), (128, 128, 3, 115), (128, 256, 2, 170)]


def taught(*ranks, inputs=3, outputs=8, seed=0, **options):
    """A layer whose finished tasks kept so many ranks each, and some slots."""
    torch.manual_seed(seed)
    layer = FactorizedConv2d(inputs, outputs, 3, **options)
    for rank in ranks:
        layer.renew(rank)
        layer.finish_task(0.0)
    layer.renew(4)
    return layer


@pytest.mark.parametrize("inputs, outputs, kernel, rank", LAYERS)
def test_full_rank_is_the_published_one_and_takes_no_more_memory_than_the_dense_weight(inputs, outputs, kernel, rank):
    layer = FactorizedConv2d(inputs, outputs, kernel)
    assert layer.full_rank == layer.spare == rank
    dense = inputs * kernel**2 * outputs
    stored = layer.left.numel() + layer.right.numel()
    assert stored <= dense < stored + outputs + inputs * kernel**2


def test_hoyer_and_its_gradient():
    for n in (1, 2, 7, 129):
        assert hoyer(torch.eye(n)[0] * -3) == pytest.approx(0, abs=1e-6)
        assert hoyer(torch.full((n,), -0.3)) == pytest.approx(math.sqrt(n) - 1, rel=1e-5)
    assert hoyer(torch.empty(0)) == 0
    zero = torch.zeros(5, requires_grad=True)
    assert hoyer(zero) == 0
    hoyer(zero).backward()
    assert torch.equal(zero.grad, torch.zeros(5))
    v = torch.randn(11, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (gradient,) = torch.autograd.grad(hoyer(v), v)
    norm = v.norm()
    torch.testing.assert_close(gradient, v.sign() / norm - v * v.abs().sum() / norm**3)
    assert torch.autograd.gradcheck(hoyer, v)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=40), st.floats(1e-2, 1e2))
def test_hoyer_is_bounded_and_ignores_scale_and_sign(values, scale):
    v = torch.tensor(values, dtype=torch.float64)
    h = float(hoyer(v))
    assert -1e-9 <= h <= math.sqrt(len(values)) - 1 + 1e-9
    if v.abs().max() > 1e-100:
        assert float(hoyer(-scale * v)) == pytest.approx(h, abs=1e-9)


def test_orthogonality():
    q = torch.linalg.qr(torch.randn(12, 5, dtype=torch.float64)).Q
    assert orthogonality(q) < 1e-20 and orthogonality(q.T) < 1e-20
    a = torch.randn(3, 7, dtype=torch.float64)
    expected = ((a @ a.T - torch.eye(3)) ** 2).sum() / 9
    torch.testing.assert_close(orthogonality(a), expected)
    torch.testing.assert_close(orthogonality(a.T), expected)
    torch.testing.assert_close(orthogonality(2 * q), torch.tensor(9 * 5 / 25, dtype=torch.float64))
    assert orthogonality(torch.empty(4, 0)) == 0
    assert torch.autograd.gradcheck(orthogonality, torch.randn(3, 4, dtype=torch.float64, requires_grad=True))
    with pytest.raises(ValueError, match=r"a matrix \[rows, columns\], got shape \[2, 2, 2\]"):
        orthogonality(torch.zeros(2, 2, 2))


def test_energy_rule_of_the_specification():
    assert kept_by_energy(torch.tensor([3.0, 4.0, 0.001])).tolist() == [True, True, False]  # 4e-8 < 3e-5
    assert kept_by_energy(torch.tensor([3.0, 4.0, 0.05])).tolist() == [True, True, True]  # 1e-4 > 3e-5
    assert kept_by_energy(torch.tensor([0.001, -4.0, 3.0])).tolist() == [False, True, True]  # sign and order
    assert kept_by_energy(torch.zeros(3)).tolist() == [False] * 3 and not len(kept_by_energy(torch.empty(0)))
    assert kept_by_energy(torch.ones(5), 0.0).all() and kept_by_energy(torch.ones(5), 0.5).all()  # ties stay together
    with pytest.raises(ValueError, match="0 <= tolerance < 1, got 1"):
        kept_by_energy(torch.ones(2), 1.0)


@settings(max_examples=120, deadline=None)
@given(st.lists(st.integers(-1000, 1000), min_size=1, max_size=30), st.sampled_from([0.0, 3e-5, 1e-3, 0.1, 0.5]))
def test_energy_rule_keeps_the_fewest_that_are_enough(values, tolerance):
    sigma = torch.tensor(values, dtype=torch.float64)
    kept = kept_by_energy(sigma, tolerance)
    total = sum(v * v for v in values)
    found = sum(v * v for v, k in zip(values, kept.tolist(), strict=True) if k)
    assert total - found <= tolerance * total
    if total:
        smallest = int(sigma[kept].abs().min())
        assert all(abs(v) < smallest for v, k in zip(values, kept.tolist(), strict=True) if not k)
        without = sum(v * v for v in values if abs(v) > smallest)
        assert total - without > tolerance * total  # one level less would not be enough


def test_growth():
    assert grown_spare(3, [], 10) == 3  # the first task leaves what it leaves
    assert grown_spare(3, [4, 7], 10) == 5 and grown_spare(6, [4, 7], 10) == 6
    assert grown_spare(3, [40, 70], 10) == 10
    assert grown_spare(3, [4], 10, "full") == 10 and grown_spare(3, [4], 10, "none") == 3
    with pytest.raises(ValueError, match="growth must be mean, full or none, got 'more'"):
        grown_spare(1, [1], 1, "more")


@pytest.mark.parametrize(
    "options", [{}, {"stride": 2, "padding": 1}, {"padding": "same"}, {"dilation": 2, "padding": (0, 2)}]
)
@pytest.mark.parametrize("seed", range(3))
def test_merged_two_convolutions_and_factors_are_one_function(options, seed):
    layer = taught(3, 5, inputs=4, outputs=6, seed=seed, **options)
    images = torch.randn(2, 4, 9, 11)
    for task in (0, 1, None):
        layer.task = task
        left, sigma, right = layer.factors(task)
        weight = torch.einsum("or,r,rc->oc", left, sigma.abs(), right).view(6, 4, 3, 3)
        expected = F.conv2d(images, weight, **options)
        for form in (layer, layer.dense(task), layer.two_convolutions(task)):
            assert (form(images) - expected).abs().max() < 1e-5 * expected.abs().max().clamp_min(1)
    assert (taught(3)(torch.zeros(0, 3, 5, 5))).shape == (0, 8, 3, 3)


def test_gradients_of_the_slots_and_none_elsewhere():
    layer = taught(3).double()
    assert {name for name, _ in layer.named_parameters()} == {"left", "sigma", "right"}
    images = torch.randn(1, 3, 4, 4, dtype=torch.float64)

    def through(left, sigma, right):
        return torch.func.functional_call(layer, {"left": left, "sigma": sigma, "right": right}, (images,))

    values = [p.detach().clone().requires_grad_() for p in (layer.left, layer.sigma, layer.right)]
    assert torch.autograd.gradcheck(through, values)
    layer.sigma.data.zero_()  # the root of |sigma| that the published code takes has no gradient here
    layer(images).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())


def test_a_finished_task_keeps_its_order_drops_the_pruned_and_reads_a_prefix():
    layer = FactorizedConv2d(2, 5, 3, rank=4)
    layer.sigma.data = torch.tensor([0.5, 1e-4, -2.0, 1.0])
    left, right = layer.left.detach().clone(), layer.right.detach().clone()
    assert layer.finish_task() == 3 and layer.ranks == (3,) and layer.spare == 0
    assert torch.equal(layer.shared_sigma, torch.tensor([0.5, -2.0, 1.0]))
    assert torch.equal(layer.shared_left, left[:, [0, 2, 3]]) and torch.equal(layer.shared_right, right[[0, 2, 3]])
    layer.renew(2)
    assert layer.finish_task(0.0) == 5 and layer.ranks == (3, 5)
    assert torch.equal(layer.factors(0)[0], left[:, [0, 2, 3]])
    with pytest.raises(IndexError, match="task 2 is not among the 2 finished tasks"):
        layer.merged_weight(2)
    with pytest.raises(IndexError):
        layer.merged_weight(-1)
    with pytest.raises(ValueError, match="rank must not be negative, got -1"):
        FactorizedConv2d(2, 5, 3, rank=-1)


@pytest.mark.parametrize("optimizer", [
    lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.1), lambda p: torch.optim.SGD(p, 0.1, 0.9, weight_decay=0.1),
])  # fmt: skip
def test_no_optimizer_moves_a_finished_task(optimizer):
    layer, images = taught(3, 6), torch.randn(4, 3, 8, 8)

    def asked(task):
        layer.task = task
        found = layer(images).detach()
        layer.task = None
        return found

    before = [asked(0), asked(1)]
    used = optimizer(layer.parameters())
    for _ in range(3):
        used.zero_grad()
        (layer(images).square().mean() + sum(layer.penalties())).backward()
        used.step()
    layer.finish_task()
    layer.renew(7)
    assert torch.equal(asked(0), before[0]) and torch.equal(asked(1), before[1])
    assert not torch.equal(asked(2), before[1])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(1, 5), st.integers(1, 9), st.integers(0, 99))
def test_prefixes_of_any_history_stay_bit_equal(ranks, inputs, outputs, seed):
    torch.manual_seed(seed)
    layer, images, kept = FactorizedConv2d(inputs, outputs, 3, rank=0), torch.randn(2, inputs, 5, 5), []
    for task, rank in enumerate(ranks):
        layer.renew(rank)
        layer.finish_task(0.1)
        layer.task = task
        kept.append(layer(images))
    for task, expected in enumerate(kept):
        layer.task = task
        assert torch.equal(layer(images), expected)
    assert list(layer.ranks) == sorted(layer.ranks) and layer.ranks[-1] <= sum(ranks)


def test_fresh_slots_have_the_published_variances_and_follow_their_generator():
    layer = FactorizedConv2d(64, 128, 3)
    layer.renew(400, torch.Generator().manual_seed(1))
    assert float(layer.sigma.detach().std()) == pytest.approx(1, rel=0.15)
    assert float(layer.left.detach().std()) == pytest.approx(math.sqrt(2 / 400), rel=0.03)
    assert float(layer.right.detach().std()) == pytest.approx(math.sqrt(2 / 576), rel=0.03)
    first = layer.left.detach().clone()
    layer.renew(400, torch.Generator().manual_seed(1))
    assert torch.equal(layer.left, first)


def test_state_dict_takes_over_ranks_and_refuses_other_layers():
    layer, other = taught(3, 5), FactorizedConv2d(3, 8, 3)
    other.load_state_dict(layer.state_dict())
    images = torch.randn(1, 3, 6, 6)
    layer.task = other.task = 1
    assert other.ranks == (3, 8) and torch.equal(other(images), layer(images))
    assert isinstance(other.left, torch.nn.Parameter) and other.spare == 4
    with pytest.raises(RuntimeError, match="size mismatch for shared_left"):
        FactorizedConv2d(3, 9, 3).load_state_dict(layer.state_dict())
    moved = copy.deepcopy(layer).to(torch.bfloat16)
    assert moved.prefixes.dtype == torch.int64 and moved.left.dtype == torch.bfloat16
    assert moved(images.bfloat16()).dtype == torch.bfloat16
    assert "shared=8, spare=4, tasks=2" in repr(layer)
