"""Checkpoints in the layouts of the official BNTT and hybrid-conversion code, written here as that code writes them."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyaccel import models
from pyaccel.models import load_official

STEPS = 3
SIDE = 32


def bntt_model(name: str = "vgg9_bntt", steps: int = STEPS) -> models.SpikingVgg:
    torch.manual_seed(0)
    return models.build(name, classes=10, width=0.1, steps=steps, gain=1.0)


def bntt_state(model: models.SpikingVgg, steps: int = STEPS) -> OrderedDict:
    """A state dict of the official network of these shapes, with random values."""
    generator = torch.Generator().manual_seed(5)

    def values(*shape):
        return torch.rand(shape, generator=generator) + 0.1

    state = OrderedDict()

    def norms(name, channels):
        for t in range(steps):
            state[f"{name}.{t}.weight"] = values(channels)
            state[f"{name}.{t}.running_mean"] = values(channels) - 0.6
            state[f"{name}.{t}.running_var"] = values(channels)
            state[f"{name}.{t}.num_batches_tracked"] = torch.tensor(41)

    for i, layer in enumerate(model.features, start=1):
        state[f"conv{i}.weight"] = values(*layer.synapse.weight.shape) - 0.6
        norms(f"bntt{i}", layer.synapse.out_channels)
    state["fc1.weight"] = values(*model.classifier[0].synapse.weight.shape) - 0.6
    norms("bntt_fc", model.classifier[0].synapse.out_features)
    state["fc2.weight"] = values(*model.readout.weight.shape) - 0.6
    return state


def official_bntt(state, spikes, pools, leak=0.95):
    """Logits of the official network in evaluation, from its own names (2010.01729), for encoded `spikes`."""
    convolutions = sum(name.startswith("conv") for name in state)
    membranes, total = [0.0] * (convolutions + 1), 0.0
    for t, x in enumerate(spikes):
        for i in range(1, convolutions + 2):
            hidden = i > convolutions
            norm = "bntt_fc" if hidden else f"bntt{i}"
            if hidden:
                x = F.linear(x.flatten(1), state["fc1.weight"])
            else:
                x = F.conv2d(x, state[f"conv{i}.weight"], padding=1)
            mean, var, weight = (state[f"{norm}.{t}.{part}"] for part in ("running_mean", "running_var", "weight"))
            x = F.batch_norm(x, mean, var, weight, eps=1e-4)
            u = leak * membranes[i - 1] + x
            x = (u > 1).to(u.dtype)
            membranes[i - 1] = u - x
            x = F.avg_pool2d(x, 2) if not hidden and pools[i - 1] else x
        total = total + F.linear(x, state["fc2.weight"])
    return total / len(spikes)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("name", ["vgg9_bntt", "vgg11_bntt"])
def test_bntt_layout(name, prefix, tmp_path):
    model = bntt_model(name)
    state = bntt_state(model)
    content = {
        "global_step": 10,
        "state_dict": OrderedDict((prefix + k, v) for k, v in state.items()),
        "accuracy": np.mean([90.5]),  # a numpy number, which torch refuses to load by itself
    }
    torch.save(content, tmp_path / "bestmodel.pth.tar")
    load_official(model, tmp_path / "bestmodel.pth.tar", "bntt")

    model.double().eval()
    encoded = []
    model.encoder.register_forward_hook(lambda m, a, out: encoded.append(out))
    logits = model(torch.rand(2, 3, SIDE, SIDE, dtype=torch.float64))
    pools = [layer.pool is not None for layer in model.features]
    expected = official_bntt({k: v.double() for k, v in state.items()}, encoded[0], pools)
    assert expected.std() > 1e-3
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)
    assert int(model.features[0].neuron.num_batches_tracked) == 41


def test_bntt_layout_names_what_does_not_fit():
    model = bntt_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = bntt_state(model)
    del state["conv3.weight"], state["bntt2.1.running_var"]
    state["conv9.weight"] = torch.zeros(1)
    state["fc2.weight"] = torch.zeros(10, 3)
    with pytest.raises(ValueError) as error:
        load_official(model, state, "bntt")
    text = str(error.value)
    assert "missing: conv3.weight, bntt2.1.running_var" in text or "missing: bntt2.1.running_var, conv3.weight" in text
    assert "left over: conv9.weight" in text
    assert f"other shapes: fc2.weight (file [10, 3], model [10, {model.readout.in_features}])" in text
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

    with pytest.raises(ValueError, match="the file has 5 time steps, the model 3; build it with steps=5"):
        load_official(model, bntt_state(model, steps=5), "bntt")
    with pytest.raises(ValueError, match="layout 'bntt' fits a spiking VGG with norm='bntt', got VggNet"):
        load_official(models.build("vgg5", classes=10, width=0.1), state, "bntt")
    with pytest.raises(ValueError, match="layout must be one of bntt, hybrid, got 'snn'"):
        load_official(model, state, "snn")


# Places of the weights among activations, pooling and dropout: three entries a layer.
FEATURES, CLASSIFIER = {"vgg5": (0, 3, 6), "vgg9": (0, 3, 6, 9, 12, 15, 18)}, (0, 3, 6)


def hybrid_model(name: str = "vgg5", spiking: bool = True, **options) -> nn.Module:
    torch.manual_seed(0)
    options = options | (dict(steps=12) if spiking else {})
    return models.build(f"{name}_hybrid", classes=10, width=0.1, input_shape=(3, 16, 16), spiking=spiking, **options)


def vgg_state(model: nn.Module, name: str = "vgg5") -> OrderedDict:
    generator = torch.Generator().manual_seed(6)
    shapes = [m.weight.shape for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    names = [f"features.{n}.weight" for n in FEATURES[name]] + [f"classifier.{n}.weight" for n in CLASSIFIER]
    return OrderedDict(
        (n, torch.randn(shape, generator=generator) * 2 / shape[1:].numel() ** 0.5)
        for n, shape in zip(names, shapes, strict=True)
    )


def snn_file(state, layers: int, **more) -> dict:
    """What snn.py saves."""
    return {
        "accuracy": 0.9113,
        "epoch": 3,
        "state_dict": OrderedDict((f"module.{k}", v) for k, v in state.items()),
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-4, "params": [0]}]},
        "thresholds": [0.5 + 0.01 * i for i in range(layers)],
        "timesteps": 20,
        "leak": 0.99,
        "activation": "Linear",
    } | more


def official_vgg(state, spikes, pools, thresholds, leak):
    """Logits of the official spiking VGG in evaluation, from its own names (2005.01807)."""
    membranes, total = [torch.zeros(())] * len(thresholds), 0.0
    names = list(state)
    for x in spikes:
        for i, name in enumerate(names[:-1]):
            w = state[name]
            current = F.conv2d(x, w, padding=1) if w.dim() == 4 else F.linear(x.flatten(1), w)
            fired = (membranes[i] / thresholds[i] - 1.0 > 0).to(current).expand_as(current)
            membranes[i] = leak * membranes[i] + current - thresholds[i] * fired
            x = F.avg_pool2d(fired, 2) if w.dim() == 4 and pools[i] else fired
        total = total + F.linear(x, state[names[-1]])
    return total


@pytest.mark.parametrize("neuron", ["stdb", "delayed"])
@pytest.mark.parametrize("name", ["vgg5", "vgg9"])
def test_hybrid_layout_of_a_spiking_network(name, neuron, tmp_path):
    model = hybrid_model(name, neuron=neuron)
    state = vgg_state(model, name)
    file = tmp_path / "snn_vgg5_cifar10_20.pth"
    content = snn_file(state, len(state) - 1)
    torch.save(content, file)
    load_official(model, file, "hybrid")
    assert model.steps == 20 and model.features[0].neuron.leak == 0.99

    model.double().eval()
    encoded = []
    model.encoder.register_forward_hook(lambda m, a, out: encoded.append(out))
    logits = model(torch.rand(2, 3, 16, 16, dtype=torch.float64))
    pools = [layer.pool is not None for layer in model.features]
    expected = official_vgg({k: v.double() for k, v in state.items()}, encoded[0], pools, content["thresholds"], 0.99)
    assert len(encoded[0]) == 20 and expected.std() > 1e-3
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)


def thresholds(model) -> list[float]:
    return [float(m.neuron.threshold) for m in model.modules() if isinstance(m, models.SpikingLayer)]


def test_hybrid_layouts_of_other_versions():
    state = vgg_state(hybrid_model())
    early = snn_file(state, 5, scaling_threshold=0.7, leak_mem=0.95)
    del early["leak"]
    model = hybrid_model()
    load_official(model, early, "hybrid")
    assert thresholds(model) == pytest.approx([0.7 * (0.5 + 0.01 * i) for i in range(5)], abs=1e-15)
    assert model.classifier[1].neuron.leak == 0.95

    # later code of the group: thresholds and leaks of each layer in the state dict, named by place
    places = (0, 3, 6, 9, 12)
    inside = {f"module.threshold.t{n}": torch.tensor(0.5 + n) for n in reversed(places)}
    inside |= {f"module.leak.l{n}": torch.tensor(0.5 + n / 64) for n in places}
    model = hybrid_model()
    load_official(model, {"state_dict": {f"module.{k}": v for k, v in state.items()} | inside}, "hybrid")
    assert thresholds(model) == [0.5 + n for n in places]
    assert [m.neuron.leak for m in (*model.features, *model.classifier)] == [0.5 + n / 64 for n in places]


def test_hybrid_layout_of_an_artificial_network():
    ann, snn = hybrid_model(spiking=False), hybrid_model()
    state = vgg_state(ann)
    file = {"accuracy": 0.92, "epoch": 100, "state_dict": {f"module.{k}": v for k, v in state.items()}}
    load_official(ann, file, "hybrid")
    x = torch.rand(2, 3, 16, 16)
    hidden = x
    pools = (True, False, True)
    for (n, w), pooled in zip(list(state.items())[:3], pools, strict=True):
        hidden = F.relu(F.conv2d(hidden, w, padding=1))
        hidden = F.avg_pool2d(hidden, 2) if pooled else hidden
    a, b, c = list(state.values())[3:]
    expected = F.relu(F.relu(hidden.flatten(1) @ a.t()) @ b.t()) @ c.t()
    torch.testing.assert_close(ann.eval()(x), expected, rtol=1e-4, atol=1e-5)

    load_official(snn, file, "hybrid")  # weights alone: thresholds are to be balanced
    assert torch.equal(snn.features[2].synapse.weight, state["features.6.weight"])
    assert thresholds(snn) == [1.0] * 5 and snn.steps == 12
    load_official(snn, file | {"thresholds": [10.0, 2.0, 3.0, 4.0, 5.0]}, "hybrid", threshold_scale=0.7)
    assert thresholds(snn) == pytest.approx([7.0, 1.4, 2.1, 2.8, 3.5], abs=1e-12)


@pytest.mark.parametrize("spiking", [True, False])
def test_hybrid_layout_of_residual_networks(spiking):
    options = dict(steps=10) if spiking else {}
    model = models.build("resnet20", classes=10, width=0.05, spiking=spiking, input_shape=(3, 16, 16), **options)
    state = OrderedDict()
    width = [3, 6, 13, 26]
    for n, inputs in ((0, 3), (3, 3), (6, 3)):
        state[f"pre_process.{n}.weight"] = torch.randn(width[0], inputs, 3, 3)
    inputs = width[0]
    for stage in range(4):
        for block in range(2):
            state[f"layer{stage + 1}.{block}.residual.0.weight"] = torch.randn(width[stage], inputs, 3, 3)
            state[f"layer{stage + 1}.{block}.residual.3.weight"] = torch.randn(width[stage], width[stage], 3, 3)
            if inputs != width[stage]:
                state[f"layer{stage + 1}.{block}.identity.0.weight"] = torch.randn(width[stage], inputs, 1, 1)
            inputs = width[stage]
    state["classifier.0.weight"] = torch.randn(10, 26)
    load_official(model, snn_file(state, 3 + 16), "hybrid")
    block = [m for m in model.features if isinstance(m, (models.SpikingBlock, models.resnet.ResidualBlock))][2]
    first = block.layers[0].synapse if spiking else block.body[0]
    shortcut = block.shortcut if spiking else block.shortcut[0]
    assert torch.equal(first.weight, state["layer2.0.residual.0.weight"])
    assert torch.equal(shortcut.weight, state["layer2.0.identity.0.weight"])
    if spiking:
        assert thresholds(model) == [0.5 + 0.01 * i for i in range(19)]
        ann_file = {"state_dict": state, "thresholds": [8.7, 4.9, 5.8]}  # the layers before the blocks alone
        other = models.build("resnet20", classes=10, width=0.05, spiking=True, input_shape=(3, 16, 16))
        load_official(other, ann_file, "hybrid", threshold_scale=0.5)
        assert thresholds(other) == [4.35, 2.45, 2.9] + [1.0] * 16
    del state["layer3.1.residual.3.weight"]
    with pytest.raises(ValueError, match="missing: layer3.1.residual.3.weight"):
        load_official(model, snn_file(state, 19), "hybrid")


def test_hybrid_layout_names_what_does_not_fit():
    model = hybrid_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = vgg_state(model)
    changed = state | {"features.9.weight": torch.zeros(13, 13, 3, 3), "features.0.bias": torch.zeros(6)}
    del changed["classifier.6.weight"]
    with pytest.raises(ValueError, match="missing: readout.weight; left over: features.9.weight, features.0.bias$"):
        load_official(model, {"state_dict": changed}, "hybrid")
    with pytest.raises(ValueError, match=r"other shapes: features.0.weight \(file \[7, 3, 3, 3\], model \[6"):
        load_official(model, snn_file(state | {"features.0.weight": torch.zeros(7, 3, 3, 3)}, 5), "hybrid")
    with pytest.raises(ValueError, match="expected 5 thresholds, one a spiking layer, got 4"):
        load_official(model, snn_file(state, 4), "hybrid")
    with pytest.raises(ValueError, match="without thresholds: its weights alone do not work"):
        load_official(model, snn_file(state, 5, thresholds=None), "hybrid")
    with pytest.raises(ValueError, match="'hybrid' has no BNTT"):
        load_official(hybrid_model(neuron="bntt"), snn_file(state, 5), "hybrid")
    with pytest.raises(ValueError, match="no tensors found"):
        load_official(model, {"epoch": 3}, "hybrid")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_files_execute_nothing(tmp_path):
    model = hybrid_model()
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        load_official(model, tmp_path / "none.pth", "hybrid")
    torch.save({"state_dict": vgg_state(model), "hook": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(ValueError, match="not a checkpoint that holds only tensors and plain values"):
        load_official(model, tmp_path / "trap.pth", "hybrid")
    assert not Trap.sprung
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="expected a dict of tensors, got list"):
        load_official(model, tmp_path / "list.pth", "hybrid")


class Trap:
    sprung = False

    def __setstate__(self, state):
        Trap.sprung = True

    def __getstate__(self):
        return {"x": 1}
