"""PGD-7 on the spiking VGG5 of 2003.10399 (T = 175, batch 8) beside an eager implementation of the same attack, and the
memory of threshold balancing.

Eager, restated from the official code (`python_tests/eager_attack.py`): a loop over `unbind(0)`, plain-torch neurons
with the same surrogate, the same convolutions, dL/du_1 summed over time, one input-gradient convolution. Two columns:
as published (every weight gets a gradient, which is thrown away), and with frozen weights, which is what the goal
compares with. Both see the same Poisson draws as pyaccel.

A PGD step is one gradient, so `--quick` takes 2 steps in place of 7 and leaves the published column out; ratios are the
same. Memory is what the operators of one gradient allocate beyond what lay there before: the peak of torch's CPU
allocator in the profiler's record.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from statistics import median

import pytest
import torch
import torch.nn.functional as F
from timing import _once
from torch import nn
from torch.profiler import ProfilerActivity, profile

from pyaccel import models, ops, surgery
from pyaccel.spiking_attacks import DRAWS, SpikingTarget, pgd
from pyaccel.training.plan import LiveBytes

sys.path.insert(0, str(Path(__file__).parent.parent / "python_tests"))
from eager_attack import Fire, hook_gradient  # noqa: E402

pytestmark = pytest.mark.benchmark
THREADS, STEPS, BATCH, LEAK = 2, 175, 8, 0.99
EPS, STEP, PGD_STEPS = 8 / 255, 2 / 255, 7


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


def peak(job) -> int:
    """Bytes allocated at most at one time during `job`, beyond what lay there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        job()
    events = recorded.profiler.kineto_results.events()
    now = most = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def network(seed: int = 0):
    """VGG5 at full width; thresholds measured on random images, so that every layer spikes as a converted one does."""
    torch.manual_seed(seed)
    ann = models.build("vgg5_robust", classes=10, spiking=False)
    snn = surgery.to_spiking(ann, steps=STEPS, neuron="delayed", leak=LEAK, mean_readout=True).eval()
    images, labels = torch.rand(BATCH, 3, 32, 32), torch.randint(0, 10, (BATCH,))
    snn = surgery.balance_thresholds(snn, [2 * images[:2] - 1], steps=40, scale=0.4)
    return snn.to(memory_format=torch.channels_last), images, labels


class Eager:
    """The same network in a loop."""

    def __init__(self, snn, frozen: bool):
        self.thresholds = list(surgery.thresholds(snn).values())
        self.layers, convolutions = [], 0
        for layer in (m for m in snn.body.modules() if isinstance(m, (nn.Conv2d, nn.Linear))):
            made = nn.Conv2d(layer.in_channels, layer.out_channels, 3, padding=1, bias=False) if isinstance(
                layer, nn.Conv2d) else nn.Linear(layer.in_features, layer.out_features, bias=False)  # fmt: skip
            made.weight = nn.Parameter(layer.weight.detach(), requires_grad=not frozen)
            self.layers.append(made)
            if isinstance(layer, nn.Conv2d):
                convolutions += 1
                self.layers += {1: [nn.AvgPool2d(2)], 3: [nn.AvgPool2d(2), nn.Flatten()]}.get(convolutions, [])
        self.frozen = frozen

    def gradient(self, images, labels, stream: int):
        spikes = ops.poisson_encode(2 * images - 1, STEPS, seed=0, stream=stream).contiguous()
        if not self.frozen:
            summed, loss = hook_gradient(self.layers, self.thresholds, LEAK, spikes, labels)
        else:  # the first layer's current is where the gradient starts: one leaf for all steps
            shift = torch.zeros(len(images), *self.layers[0](spikes[0]).shape[1:], requires_grad=True)
            first = Shifted(self.layers[0], shift)
            loss = F.cross_entropy(loop_from(first, self.layers[1:], self.thresholds, spikes), labels)
            (summed,) = torch.autograd.grad(loss, shift)
        return loss.detach(), 2 * F.conv_transpose2d(summed, self.layers[0].weight.detach(), padding=1)

    def pgd(self, images, labels, steps: int):
        attacked = images
        for k in range(steps):
            _, gradient = self.gradient(attacked, labels, DRAWS + k)
            attacked = torch.clamp(attacked + STEP * gradient.sign(), min=images - EPS, max=images + EPS).clamp(0, 1)
        return attacked


class Shifted(nn.Module):
    """The first convolution of spikes without a graph, plus a leaf whose gradient is the sum over time."""

    def __init__(self, layer: nn.Conv2d, shift: torch.Tensor):
        super().__init__()
        self.layer, self.shift = layer, shift

    def forward(self, x):
        return self.layer(x) + self.shift


def loop_from(first: Shifted, rest: list[nn.Module], thresholds: list[float], spikes):
    """`eager_attack.loop`, its first weights replaced by `first`."""
    u, total, membranes = torch.zeros_like(first.shift), 0.0, {}
    for x in spikes.unbind(0):
        a = u / thresholds[0] - 1
        out = Fire.apply(a)
        u = LEAK * u + first(x) - thresholds[0] * (a > 0).to(a.dtype)
        x, number = out, 1
        for layer in rest[:-1]:
            if not isinstance(layer, (nn.Conv2d, nn.Linear)):
                x = layer(x)
                continue
            current = layer(x)
            v = membranes.get(number, torch.zeros_like(current))
            a = v / thresholds[number] - 1
            x = Fire.apply(a)
            membranes[number] = LEAK * v + current - thresholds[number] * (a > 0).to(a.dtype)
            number += 1
        total = total + rest[-1](x)
    return total / len(spikes)


def test_pgd_on_a_spiking_network(table, quick):
    snn, images, labels = network()
    rates = spike_rates(snn, images)
    frozen, published = Eager(snn, True), Eager(snn, False)
    check(snn, (frozen, published), images, labels)

    def ours(at_once, steps_at_once=None):
        def attack(steps: int):
            target = SpikingTarget(snn, (0.5,) * 3, (0.5,) * 3, images_at_once=at_once, steps_at_once=steps_at_once)
            return pgd(target, images, labels, EPS, STEP, steps, random_start=False)

        return attack

    steps, base = 2 if quick else PGD_STEPS, "eager loop, frozen weights"
    jobs = {
        "pyaccel, 1 image at once": ours(1),
        "pyaccel, 2 images at once": ours(2),
        "pyaccel, whole batch, 25 steps at once": ours(None, 25),
        base: lambda steps: frozen.pgd(images, labels, steps),
    }
    if not quick:
        jobs["eager loop, as published"] = lambda steps: published.pgd(images, labels, steps)
    memory = {name: peak(lambda job=job: job(1)) for name, job in jobs.items()}  # also warms up
    times = {name: [] for name in jobs}
    for round_ in range(1 if quick else 3):
        for name in list(jobs) if round_ % 2 == 0 else reversed(list(jobs)):
            times[name].append(_once(lambda name=name: jobs[name](steps), torch.device("cpu")))
    cpu = {name: median(t.cpu for t in found) for name, found in times.items()}
    for name, found in times.items():
        table.append({
            "what": f"{name}, PGD-{steps}", "s wall": median(t.wall for t in found), "s CPU": cpu[name],
            "times as fast (CPU)": cpu[base] / cpu[name], "peak memory, MB": memory[name] / 1e6,
            "share of eager's memory": memory[name] / memory[base],
            "goal": "2x, 0.25" if name.startswith("pyaccel") else None,
        })  # fmt: skip
    table.append({"what": f"spikes a neuron and step by layer: {', '.join(f'{r:.3f}' for r in rates)}"})


def check(snn, eagers, images, labels) -> None:
    """The answer first: one gradient, the same draw, float64; then float32 attacks against the loop's."""
    few = images[:2]
    for eager in eagers:
        double = Eager(snn, eager.frozen)
        double.layers = [copy.deepcopy(layer).double() for layer in eager.layers]
        target = SpikingTarget(copy.deepcopy(snn).double(), (0.5,) * 3, (0.5,) * 3)
        loss, gradient = target.loss_and_gradient(few.double(), labels[:2])
        torch.set_default_dtype(torch.float64)
        expected_loss, expected = double.gradient(few.double(), labels[:2], DRAWS)
        torch.set_default_dtype(torch.float32)
        assert expected.abs().max() > 0
        torch.testing.assert_close(loss, expected_loss)
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-9 * float(expected.abs().max()))


def spike_rates(snn, images) -> list[float]:
    found = []
    hooks = [n.register_forward_hook(lambda m, a, s: found.append(float(s.mean()))) for n in snn.neurons.values()]
    with torch.no_grad():
        snn(2 * images[:2] - 1)
    for hook in hooks:
        hook.remove()
    return found


def test_balancing_memory(table, quick):
    """Thresholds of VGG16 (15 spiking layers) on one image, searched over more and more steps."""
    torch.manual_seed(0)
    ann = models.build("vgg16_hybrid", classes=10, spiking=False)
    for layer in ann.modules():
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    snn = surgery.to_spiking(ann, steps=100, neuron="stdb").eval()
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    weights = 2 * sum(p.numel() * 4 for p in snn.parameters())  # of the network and of the balanced copy
    most = {}
    for steps in (100, 200) if quick else (100, 1000):
        with LiveBytes() as live:  # torch's profiler loses events of so long a run
            balanced = surgery.balance_thresholds(snn, [images], steps=steps)
        most[steps] = live.peak
        values = list(surgery.thresholds(balanced).values())
        assert len(values) == 15 and min(values) > 0
        table.append({
            "steps": steps, "peak memory beyond the weights, MB": (most[steps] - weights) / 1e6,
            "one pass of all layers at once would hold spikes, MB": 284_672 * 4 * steps / 1e6,
        })  # fmt: skip
    few, many = most.values()
    assert abs(many - few) <= 0.02 * (few - weights), most
