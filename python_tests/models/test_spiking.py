"""Spiking networks: layer-major against time-major, the facts of 2005.01807, dropout held over time."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
import time_major
from torch import nn

from pyaccel import models, reference
from pyaccel.models.dropout import HeldDropout
from pyaccel.nn import BNTTLIF, LIF, STDBLIF
from pyaccel.reference.philox import DROPOUT, philox

SIDE = 16


def lively(name: str, *, threshold: float = 1.0, **options) -> models.SpikingNetwork:
    """A narrow float64 network whose every layer spikes."""
    torch.manual_seed(0)
    options = dict(width=0.05, classes=5, input_shape=(3, SIDE, SIDE), spiking=True, gain=1.0) | options
    model = models.build(name, **options).double()
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(module.weight, gain=3)
        if isinstance(module, BNTTLIF):
            nn.init.uniform_(module.weight, 0.8, 1.6)
        if isinstance(module, (STDBLIF, LIF)) and isinstance(module.threshold, torch.Tensor):
            module.threshold.fill_(threshold)
    return model


def images(count: int = 3) -> torch.Tensor:
    return torch.rand(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1


CASES = {
    "vgg, bntt": ("vgg9_bntt", dict(steps=5)),
    "vgg, bntt, hard reset": ("vgg5", dict(steps=5, reset="hard", surrogate="atan")),
    "vgg, lif": ("vgg5", dict(steps=5, neuron="lif", leak=0.9)),
    "vgg, stdb": ("vgg5_hybrid", dict(steps=12, threshold=0.4, leak=0.95)),
    "vgg, delayed": ("vgg9_hybrid", dict(steps=16, neuron="delayed", threshold=0.3)),
    "vgg, divided by T": ("vgg5_robust", dict(steps=12, threshold=0.4)),
    "plain vgg": ("vgg11", dict(steps=4, input_shape=(3, 32, 32), dropout=(0.0, 0.0))),
    "resnet, stdb": ("resnet12", dict(steps=16, threshold=0.4)),
    "resnet, delayed": ("resnet20", dict(steps=16, neuron="delayed", threshold=0.4, leak=0.99)),
    "resnet, bntt": ("resnet18", dict(steps=4)),
    "bottlenecks, bntt": ("resnet50", dict(steps=3, width=0.03)),
    "resnet, large images": ("resnet18", dict(steps=4, input_shape=(3, 65, 65), width=0.03)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("training", [True, False])
def test_layer_major_equals_time_major(case, training):
    name, options = CASES[case]
    model = lively(name, **options).train(training)
    side = options.get("input_shape", (3, SIDE, SIDE))[1]
    x = F.interpolate(images(), (side, side))
    labels = torch.tensor([0, 3, 1])
    masks = time_major.masks_of(model, x) if training else {}
    assert bool(masks) == (training and "dropout" in str(model))

    encoded = []
    model.encoder.register_forward_hook(lambda m, a, out: encoded.append(out.detach()))
    logits = model(x)
    F.cross_entropy(logits, labels).backward()
    found = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    expected = time_major.run(model, encoded[0], masks)
    F.cross_entropy(expected, labels).backward()

    assert logits.std() > 1e-3, "nothing reached the read-out: the comparison would be empty"
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)
    for n, p in model.named_parameters():
        scale = p.grad.abs().max()
        assert (found[n] - p.grad).abs().max() <= 1e-12 * max(1.0, float(scale)), n
    assert sum(float(g.abs().max()) > 0 for g in found.values()) > len(found) // 2


def test_time_major_comparison_sees_weights_and_masks():
    model = lively("resnet12", steps=16, threshold=0.4).eval()
    encoded = []
    model.encoder.register_forward_hook(lambda m, a, out: encoded.append(out.detach()))
    logits = model(images())
    torch.testing.assert_close(time_major.run(model, encoded[0], {}), logits, rtol=1e-12, atol=1e-12)
    model.features[4].shortcut.weight.data.mul_(0.5)
    assert (time_major.run(model, encoded[0], {}) - logits).abs().max() > 1e-3


    model = lively("vgg5_hybrid", steps=12, threshold=0.4)
    masks = time_major.masks_of(model, images())
    inputs = torch.ones(12, 3, 3, SIDE, SIDE, dtype=torch.float64)
    other = {name: mask.roll(1, 0) for name, mask in masks.items()}
    assert (time_major.run(model, inputs, masks) - time_major.run(model, inputs, other)).abs().max() > 1e-3


# Fewest spiking layers from image to read-out; a residual block's shortcut leads straight to its second neuron.
@pytest.mark.parametrize(
    "name, depth", [("vgg5_hybrid", 5), ("vgg9_hybrid", 9), ("resnet12", 3 + 4), ("resnet20", 3 + 8)]
)
@pytest.mark.parametrize("neuron", ["stdb", "delayed"])
def test_delayed_networks_are_silent_for_as_many_steps_as_layers(name, depth, neuron):
    model = lively(name, steps=depth + 4, neuron=neuron, threshold=0.02).eval()
    out = model.step_logits(images())
    assert (out[:depth] == 0).all()
    assert (out[depth] != 0).any()

    short = lively(name, steps=depth, neuron=neuron, threshold=0.02)
    loss = F.cross_entropy(short(images()), torch.tensor([0, 3, 1]))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(5), abs=1e-12)
    assert all((p.grad == 0).all() for p in short.parameters())


def test_prompt_networks_speak_at_the_first_step():
    assert (lively("vgg5_hybrid", neuron="lif", threshold=0.02, steps=2).eval().step_logits(images())[0] != 0).any()


def test_logits_are_the_sum_over_time_in_the_hybrid_form_and_the_mean_elsewhere():
    forms = {"vgg5_hybrid": False, "resnet12": False, "vgg5_robust": True, "vgg5": True, "resnet18": True}
    for name, mean in forms.items():
        model = lively(name, steps=12).eval()
        assert model.mean_readout == mean
        spikes = model.spikes(images())
        total = model.readout(spikes.sum(0))
        expected = total / 12 if mean else total
        torch.testing.assert_close(model(images()), expected, rtol=1e-12, atol=1e-12)
        steps = model.step_logits(images())
        torch.testing.assert_close(steps[-1], expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(steps[6], model(images(), steps=7), rtol=1e-12, atol=1e-12)


def test_defaults_are_the_papers():
    def facts(model):
        neuron = model.features[0].neuron
        return type(neuron), model.steps, neuron.leak, model.encoder.gain, model.mean_readout

    tiny = dict(classes=2, width=0.05, spiking=True)
    assert facts(models.build("vgg9_bntt", **tiny)) == (BNTTLIF, 25, 0.95, 0.5, True)
    assert facts(models.build("vgg5_hybrid", **tiny)) == (STDBLIF, 100, 1.0, 1.0, False)
    assert facts(models.build("resnet20", **tiny)) == (STDBLIF, 100, 1.0, 0.9, False)
    robust = models.build("vgg5_robust", **tiny)
    assert facts(robust) == (models.spiking.BalancedLIF, 175, 0.99, 1.0, True)
    assert robust.features[0].neuron.neuron["delay"] and robust.features[0].neuron.neuron["surrogate"] == "triangle"


def test_hybrid_networks_start_from_their_papers_weights():
    torch.manual_seed(0)
    for spiking in (True, False):
        model = models.build("vgg5_hybrid", classes=10, spiking=spiking, width=0.5)
        convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
        assert convolutions[2].weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)
        linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
        assert [m.weight.std().item() for m in linear] == pytest.approx([0.01] * 3, rel=0.05)


def test_threshold_of_each_layer_is_a_buffer_and_scales_with_the_weights():
    for neuron in ("stdb", "delayed"):
        model = lively("vgg5_hybrid", steps=12, neuron=neuron, threshold=0.5).eval()
        thresholds = [n for n, _ in model.named_buffers() if n.endswith("neuron.threshold")]
        assert len(thresholds) == 5 and set(thresholds) <= set(model.state_dict())
        before = model.spikes(images())
        with torch.no_grad():
            layer = model.features[0]
            layer.synapse.weight.mul_(4.0)
            layer.neuron.threshold.mul_(4.0)
        assert torch.equal(model.spikes(images()), before)
        layer.neuron.threshold.mul_(4.0)
        assert not torch.equal(model.spikes(images()), before)


def test_dropout_is_held_over_time_and_counted_by_pass_and_sample():
    drop = HeldDropout(0.3, seed=5, stream=77)
    ones = torch.ones(6, 4, 3, 5, 7, dtype=torch.float64)
    first = drop(ones)
    assert set(first.unique().tolist()) == {0.0, 1.0}
    assert (first == first[:1]).all()  # one mask for all steps
    second = drop(ones)
    assert not torch.equal(first, second) and int(drop.passes) == 2
    drop.set_step(0)
    assert torch.equal(drop(ones[:2]), first[:2])  # neither T nor its chunks matter
    ids = torch.tensor([2, 0])
    drop.set_step(0)
    assert torch.equal(drop(ones[:, :2], ids), first[:, ids])  # nor the batch
    assert not torch.equal(HeldDropout(0.3, seed=6, stream=77)(ones), first)
    assert not torch.equal(HeldDropout(0.3, seed=5, stream=78)(ones), first)
    assert drop.eval()(ones) is ones


def test_dropout_follows_the_table_of_draws():
    drop = HeldDropout(0.3, seed=123456789012345, stream=2**32 - 1)
    drop.set_step(3)
    kept = drop.kept((2, 3, 1, 2), torch.tensor([9, 4_000_000_000]))
    for row, sample in enumerate((9, 4_000_000_000)):
        for unit in range(6):
            word = philox(123456789012345, unit // 4, sample, 2, DROPOUT)[unit % 4]  # stream + pass wraps at 2^32
            assert bool(kept[row].flatten()[unit]) == (int(word) >= int(0.3 * 2**32))


def test_dropout_keeps_the_mean():
    kept = HeldDropout(0.3, seed=1).kept((64, 4096))
    share = kept.double().mean().item()
    assert abs(share - 0.7) < 5 * (0.21 / kept.numel()) ** 0.5


def test_masks_differ_between_layers_and_do_not_depend_on_the_batch():
    model = lively("vgg5_hybrid", steps=12, threshold=0.3, seed=4)
    streams = [m.stream for m in model.modules() if isinstance(m, HeldDropout)]
    assert len(streams) == 3 and len(set(streams)) == 3
    x, ids = images(4), torch.tensor([7, 8, 9, 10])
    whole = model(x, ids)
    for module in model.modules():
        if hasattr(module, "set_step"):
            module.set_step(0)
    parts = []
    for half in (slice(0, 2), slice(2, 4)):
        for module in model.modules():
            if hasattr(module, "set_step"):
                module.set_step(0)
        parts.append(model(x[half], ids[half]))
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=1e-12)
    assert not torch.equal(model(x, ids), whole)  # another pass, other draws


def test_residual_current_joins_the_second_neuron_at_the_same_step():
    model = lively("resnet12", steps=8, threshold=0.1).eval()
    block = model.features[3]
    assert isinstance(block, models.SpikingBlock) and block.shortcut is None
    entered = (torch.rand(8, 2, block.layers[0].synapse.in_channels, 6, 6, dtype=torch.float64) > 0.5).double()
    for layer in block.layers:
        nn.init.zeros_(layer.synapse.weight)
    with torch.no_grad():
        out = block(entered)
    threshold = float(block.layers[1].neuron.threshold)
    expected, _, _ = reference.stdb_lif(entered, threshold=threshold)  # the shortcut alone, through one neuron
    assert torch.equal(out, expected) and out[0].abs().sum() == 0 and out[1].sum() > 0


@pytest.mark.parametrize("name", [n for n in models.list_models() if n != "cacl_net"])
def test_every_spiking_network_trains_at_small_widths(name):
    torch.manual_seed(0)
    model = models.build(
        name, classes=4, spiking=True, width=0.02, input_shape=(3, 32, 32), steps=2
    )
    out = model(torch.rand(2, 3, 32, 32))
    assert out.shape == (2, 4) and out.dtype == torch.float32
    out.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", models.list_models())
def test_every_artificial_network_trains_at_small_widths(name):
    torch.manual_seed(0)
    model = models.build(name, classes=4, spiking=False, width=0.05)
    out = model(torch.rand(2, 3, 32, 32))
    assert out.shape == (2, 4) and out.std() > 0
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    norms = [m for m in model.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
    description = models.DESCRIPTIONS[name]
    assert bool(norms) == (getattr(description, "form", None) is not None and description.form.norm == "batch")
