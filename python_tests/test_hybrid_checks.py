"""The exact checks of the two specifications (2005.01807 section 9, 2003.10399 section 8) on the operators, over
seeds.
"""

import math

import pytest
import torch

from pyaccel import ops
from pyaccel.models.dropout import HeldDropout
from pyaccel.nn import PoissonEncoder

SEEDS = range(4)


def delayed(current, membrane=None, **options):
    return ops.lif(current, membrane, delay=True, **options)


def stdb(current, membrane=None, **options):
    return ops.stdb_lif(current, membrane, **options)[:2]


NEURONS = {"delayed": delayed, "stdb": stdb}


def currents(seed: int, steps: int = 200, neurons: int = 50, mean: float = 0.3):
    generator = torch.Generator().manual_seed(seed)
    return mean + torch.randn(steps, neurons, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("neuron", NEURONS)
def test_soft_reset_conserves_charge(neuron, seed):
    """u[T-1] = sum x - V * spikes without leak."""
    x = currents(seed)
    spikes, u = NEURONS[neuron](x, threshold=0.7)
    assert spikes.sum() > 1000
    assert (u - (x.sum(0) - 0.7 * spikes.sum(0))).abs().max() < 1e-11
    spikes, u = NEURONS[neuron](x, threshold=0.7, leak=0.95)  # the control: a leak loses charge
    assert (u - (x.sum(0) - 0.7 * spikes.sum(0))).abs().max() > 1


def test_a_hard_reset_does_not():
    x = currents(0)
    spikes, u = delayed(x, threshold=0.7, reset="hard")
    assert (u - (x.sum(0) - 0.7 * spikes.sum(0))).abs().max() > 1


@pytest.mark.parametrize("threshold", [0.3, 1.3])
@pytest.mark.parametrize("neuron", NEURONS)
def test_a_constant_current_becomes_its_rate(neuron, threshold):
    """0 <= x T / V - spikes < 2 for this order, so the rate tends to x / V; above V it is clipped at 1."""
    for steps in (50, 300, 2000):
        x = torch.linspace(0.01, 0.99, 60, dtype=torch.float64) * threshold
        missing = x * steps / threshold - NEURONS[neuron](x.expand(steps, 60), threshold=threshold)[0].sum(0)
        assert (missing >= -1e-9).all() and (missing < 2).all()
    above = NEURONS[neuron](torch.full((100, 1), 3 * threshold, dtype=torch.float64), threshold=threshold)[0]
    assert above.sum() == 99, "every step but the first"
    below = NEURONS[neuron](torch.full((100, 1), -threshold, dtype=torch.float64), threshold=threshold)[0]
    assert below.sum() == 0


@pytest.mark.parametrize("leak", [0.99, 0.95, 0.9, 0.7])
@pytest.mark.parametrize("neuron", NEURONS)
def test_a_leaky_neuron_has_a_dead_zone(neuron, leak):
    """Below V (1 - leak) it never fires; above, its first spike comes after ln(1 - V (1 - leak) / I) / ln(leak)
    steps.
    """
    V = 1.3
    edge = V * (1 - leak)
    dead = torch.tensor([0.1, 0.5, 0.9, 0.999], dtype=torch.float64) * edge
    assert NEURONS[neuron](dead.expand(3000, 4), leak=leak, threshold=V)[0].sum() == 0
    assert (NEURONS[neuron](dead.expand(3000, 4), leak=1.0, threshold=V)[0].sum(0) > 0)[1:].all(), (
        "the control: without leak"
    )
    alive = torch.tensor([1.01, 1.3, 2.5], dtype=torch.float64) * edge
    spikes = NEURONS[neuron](alive.expand(3000, 3), leak=leak, threshold=V)[0]
    for n in range(3):
        steps = math.log(1 - edge / float(alive[n])) / math.log(leak)  # inputs that bring the membrane to V
        first = int(spikes[:, n].nonzero()[0])
        assert first == math.floor(steps) + 1 or abs(steps - round(steps)) < 1e-6, (first, steps)


def recursion(slopes, grad, leak):
    """delta[T-1] = 0; delta[t-1] = g[t] phi[t] + leak delta[t]."""
    delta, found = torch.zeros_like(grad[0]), []
    for g, phi in zip(reversed(grad), reversed(slopes), strict=True):
        found.append(delta)
        delta = g * phi + leak * delta
    return torch.stack(found[::-1])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("form", ["exact", "fp32_underflow"])
def test_the_gradient_of_stdb_follows_from_spike_times_alone(form, seed):
    leak, V, x, grad = 0.97, 0.8, currents(seed, 160, 40, mean=0.02), currents(seed + 100, 160, 40)
    x[:, :8] = torch.where(x[:, :8] > 2, x[:, :8], -0.02)  # some fire rarely
    leaf = x.clone().requires_grad_()
    spikes = ops.stdb_lif(leaf, leak=leak, threshold=V, form=form)[0]
    (found,) = torch.autograd.grad(spikes, leaf, grad)
    last, slopes = torch.full((40,), -1000.0, dtype=torch.float64), []
    for t, s in enumerate(spikes.detach()):
        since = (t - 1) - last  # before this step's update
        assert (since >= 0).all()
        if form == "exact":
            phi = 0.3 * torch.exp(-0.01 * since)
        else:
            phi = 0.3 * torch.exp(-since.float()).double() ** 0.01
            phi[since >= 104] = 0.0
        slopes.append(phi / V)
        last[s > 0] = t - 1
    # The official code's step of a spike is t - 1, so dt is at least 1 for whoever fired before.
    expected = recursion(slopes, grad, leak)
    assert (found[-1] == 0).all(), "the last input never fires"
    assert spikes.sum() > 500
    torch.testing.assert_close(found, expected, rtol=1e-5 if form != "exact" else 1e-12, atol=1e-12)
    if form != "exact":  # a first spike has no gradient: neurons that never fired before get none
        silent = torch.cumsum(spikes.detach(), 0) == 0
        assert torch.stack(slopes)[silent].max() < 0.3 / V
        assert (torch.stack(slopes)[0] == 0).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_the_gradient_of_the_linear_surrogate_is_the_recursion(seed):
    leak, V, x, grad = 0.97, 0.8, currents(seed, 60, 40), currents(seed + 100, 60, 40)
    leaf = x.clone().requires_grad_()
    spikes = delayed(leaf, leak=leak, threshold=V)[0]
    (found,) = torch.autograd.grad(spikes, leaf, grad)
    u, slopes = torch.zeros(40, dtype=torch.float64), []
    for current in x:
        a = u / V - 1
        slopes.append(0.3 * (1 - a.abs()).clamp_min(0) / V)
        u = leak * u + current - V * (a > 0).double()
    assert (found[-1] == 0).all()
    torch.testing.assert_close(found, recursion(slopes, grad, leak), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("seed", SEEDS)
def test_dropout_is_held_over_time_and_has_mean_one(seed):
    drop = HeldDropout(0.3, seed=seed)
    made = drop(torch.ones(7, 4, 5_000)) / 0.7
    assert (made == made[0]).all() and set(made.unique().tolist()) == {0.0, torch.tensor(1 / 0.7).item()}
    assert abs(float(made.mean()) - 1) < 0.02
    assert not torch.equal(drop(torch.ones(1, 4, 5_000)), drop(torch.ones(1, 4, 5_000))), "a new mask each pass"
    assert (drop.eval()(torch.ones(7, 4, 9)) == 1).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_the_mean_of_the_code_is_the_image(seed):
    x = torch.linspace(-1, 1, 41)[None]
    spikes = PoissonEncoder(4000, 1.0, seed=seed)(x)
    assert set(spikes.unique().tolist()) <= {-1.0, 0.0, 1.0}
    assert ((spikes.mean(0) - x).abs() <= 4.5 * ((x.abs() * (1 - x.abs())) / 4000).sqrt() + 1e-6).all()
