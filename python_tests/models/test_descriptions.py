"""What the specifications say of the networks: weights, multiply-accumulates, spiking neurons, shapes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pyaccel import models
from pyaccel.nn import BNTTLIF, LIF, STDBLIF


def meta(name: str, classes: int = 10, **options) -> nn.Module:
    with torch.device("meta"):
        return models.build(name, classes=classes, **options)


def weights(model: nn.Module, kind=(nn.Conv2d, nn.Linear)) -> int:
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, kind))


def macs(model: nn.Module, *shape: int, kind=(nn.Conv2d, nn.Linear)) -> list[int]:
    """Of each layer, for one image."""
    found = []

    def count(module, arguments, output):
        pixels = output[0, 0].numel() if isinstance(module, nn.Conv2d) else 1
        found.append(module.weight.numel() * pixels)

    handles = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, kind)]
    out = model.eval()(torch.empty(2, *shape, device="meta"))
    for handle in handles:
        handle.remove()
    assert out.dim() == 2
    return found


def spiking_neurons(model: nn.Module, *shape: int) -> tuple[int, int]:
    """Spiking layers, and neurons of all of them."""
    found = []
    for m in model.modules():
        if isinstance(m, (BNTTLIF, LIF, STDBLIF)):
            m.register_forward_hook(lambda m, a, s: found.append(s[0, 0].numel()))
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model.eval().requires_grad_(False).to_empty(device="cpu")(torch.empty(2, *shape), steps=1)
    return len(found), sum(found)


# name, classes, weights, MACs, spiking layers, spiking neurons: papers/bntt.md 2, hybrid_snn.md 4, snn_robustness.md 2.
TABLE = [
    ("vgg9_bntt", 10, 5_938_880, 194.7, 8, 246_784),
    ("vgg11_bntt", 100, 11_724_480, 155.3, 9, 155_648),
    ("vgg5_hybrid", 10, 50.60, 108.8, 5, 139_264),
    ("vgg9_hybrid", 10, 32.07, 281.8, 9, 231_424),
    ("vgg11_hybrid", 100, 21.12, 709.7, 11, 346_112),
    ("vgg16_hybrid", 10, 39.92, 338.4, 15, 284_672),
    ("vgg5_robust", 10, 9_670_336, 67.8, 5, 133_120),
]


@pytest.mark.parametrize("name, classes, count, millions, layers, neurons", TABLE, ids=[row[0] for row in TABLE])
def test_networks_have_the_published_sizes(name, classes, count, millions, layers, neurons):
    artificial, spiking = meta(name, classes, spiking=False), meta(name, classes, spiking=True, neuron="lif")
    for model in (artificial, spiking):
        found = weights(model)
        assert found == count if isinstance(count, int) else round(found / 1e6, 2) == count
    assert round(sum(macs(artificial, 3, 32, 32)) / 1e6, 1) == millions
    assert spiking_neurons(spiking, 3, 32, 32) == (layers, neurons)


def test_macs_of_each_layer_of_the_bntt_network():
    found = [round(n / 1e6, 2) for n in macs(meta("vgg9_bntt", spiking=False), 3, 32, 32)]
    assert found == [1.77, 37.75, 18.87, 37.75, 18.87, 37.75, 37.75, 4.19, 0.01]


def test_bntt_has_one_gain_a_channel_and_step():
    for name, classes, gains in (("vgg9_bntt", 10, 2_176), ("vgg11_bntt", 100, 6_848)):
        model = meta(name, classes, steps=7)
        assert sum(p.numel() for p in model.parameters()) - weights(model) == 7 * gains


@pytest.mark.parametrize(
    "name, small, middle",
    [
        ("vgg11", 152_764_416, 611_057_664),
        ("vgg13", 228_261_888, 913_047_552),
        ("vgg16", 313_196_544, 1_252_786_176),
        ("vgg19", 398_131_200, 1_592_524_800),
    ],
)
def test_plain_vggs_have_the_published_macs(name, small, middle):
    for side, expected in ((32, small), (64, middle)):
        model = meta(name, spiking=False, input_shape=(3, side, side))
        assert sum(macs(model, 3, side, side, kind=nn.Conv2d)) == expected


def test_plain_vggs_have_the_published_weights():
    vgg16, vgg19 = meta("vgg16", spiking=False), meta("vgg19", spiking=False)
    assert (weights(vgg16, nn.Conv2d), weights(vgg19, nn.Conv2d)) == (14_710_464, 20_018_880)
    assert [m.in_features for m in vgg16 if isinstance(m, nn.Linear)] == [512]
    middle = meta("vgg16", spiking=False, input_shape=(3, 64, 64))
    assert [m.in_features for m in middle if isinstance(m, nn.Linear)] == [2048]


def test_large_images_get_the_imagenet_classifier():
    model = meta("vgg16", 1000, spiking=False, input_shape=(3, 224, 224))
    assert sum(macs(model, 3, 224, 224, kind=nn.Conv2d)) == 15_346_630_656
    assert [m.in_features for m in model if isinstance(m, nn.Linear)] == [25_088, 4096, 4096]
    assert [m.p for m in model if isinstance(m, nn.Dropout)] == [0.5, 0.5]


# Parameters of the networks everybody uses (1000 classes, 224x224), and of ResNet18 in its usual form for CIFAR.
@pytest.mark.parametrize(
    "name, expected",
    [("resnet18", 11_689_512), ("resnet34", 21_797_672), ("resnet50", 25_557_032), ("resnet101", 44_549_160)],
)
def test_imagenet_resnets_have_the_usual_size(name, expected):
    model = meta(name, 1000, spiking=False, input_shape=(3, 224, 224))
    assert sum(p.numel() for p in model.parameters()) == expected
    assert model(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 1000)
    assert model.features(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, model.readout.in_features)


def test_resnet18_for_small_images_has_the_usual_size():
    model = meta("resnet18", spiking=False)
    assert sum(p.numel() for p in model.parameters()) == 11_173_962


@pytest.mark.parametrize("name, layers", [("resnet12", 12), ("resnet20", 20), ("resnet34_cifar", 34)])
def test_hybrid_resnets_have_the_layers_of_their_name(name, layers):
    for spiking in (False, True):
        model = meta(name, spiking=spiking)
        kernels = [m.kernel_size[0] for m in model.modules() if isinstance(m, nn.Conv2d)]
        assert kernels.count(3) + 1 == layers and kernels.count(1) == 3
        assert model.readout.in_features == 2048
        assert not any(p.dim() == 1 for p in model.parameters())  # neither bias nor normalisation
    count, _ = spiking_neurons(meta(name, spiking=True, neuron="lif"), 3, 32, 32)
    assert count == layers - 1


def test_cacl_net_has_the_published_layers():
    for side, features in ((32, 1024), (84, 16_384)):
        model = meta("cacl_net", 5, input_shape=(3, side, side))
        assert weights(model, nn.Conv2d) == 390_848
        assert model.readout.in_features == features and model.readout.bias is not None
        assert model(torch.empty(2, 3, side, side, device="meta")).shape == (2, 5)


def test_crossbar_network_is_neurosims():
    model = meta("vgg8_crossbar", spiking=False)
    assert [m.out_channels for m in model if isinstance(m, nn.Conv2d)] == [128, 128, 256, 256, 512, 512]
    assert [m.in_features for m in model if isinstance(m, nn.Linear)] == [8192, 1024]
    assert sum(isinstance(m, nn.MaxPool2d) for m in model) == 3
    assert all(p.dim() > 1 for p in model.parameters())


def test_the_larger_crossbar_network_ends_in_512_256():
    for side, features in ((32, 512), (64, 2048)):
        model = meta("vgg16_crossbar", spiking=False, input_shape=(3, side, side))
        assert [m.in_features for m in model if isinstance(m, nn.Linear)] == [features, 512, 256]
        assert sum(isinstance(m, nn.Conv2d) for m in model) == sum(isinstance(m, nn.BatchNorm2d) for m in model) == 13
        assert sum(isinstance(m, nn.Dropout) for m in model) == 2


@pytest.mark.parametrize("name", models.list_models())
def test_every_network_builds_for_imagenet_without_memory(name):
    for spiking in (False, True):
        if spiking and name == "cacl_net":
            continue
        model = meta(name, 1000, spiking=spiking, input_shape=(3, 224, 224))
        assert all(p.is_meta for p in model.parameters())
        if spiking:
            assert math.prod(model.readout.weight.shape) % 1000 == 0


def test_spiking_imagenet_network_runs_without_memory():
    layers, neurons = spiking_neurons(meta("resnet50", 1000, spiking=True, input_shape=(3, 224, 224)), 3, 224, 224)
    assert layers == 49 and neurons > 5e6


def test_dropout_lies_where_the_hybrid_paper_has_it():
    model = meta("vgg9_hybrid", spiking=False, dropout=(0.2, 0.4))
    # after convolutions that no pooling follows (128, 256, 512 after its pool is the last), and after 4096, 4096
    assert [m.p for m in model if isinstance(m, nn.Dropout)] == [0.2, 0.2, 0.2, 0.4, 0.4]
    spiking = meta("vgg9_hybrid", spiking=True, dropout=(0.2, 0.4))
    at = [n for n, m in spiking.named_modules() if isinstance(m, models.SpikingLayer) and m.dropout is not None]
    assert at == ["features.1", "features.3", "features.6", "classifier.0", "classifier.1"]
    without = meta("vgg9_hybrid", spiking=True, dropout=(0, 0))
    assert all(m.dropout is None for m in without.modules() if isinstance(m, models.SpikingLayer))


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match="unknown model 'vgg7'; known are cacl_net, mlp, resnet101"):
        models.build("vgg7", classes=10)
    with pytest.raises(ValueError, match="images of 8x8 are too small for this network: nothing .* after 10 layers"):
        models.build("vgg16", classes=10, input_shape=(3, 8, 8), spiking=False)
    with pytest.raises(ValueError, match="images of 1x1 are too small .* after 3 layers"):
        models.build("resnet12", classes=10, input_shape=(3, 1, 1), spiking=True)
    with pytest.raises(ValueError, match="images of 23x40 are too small .* 24x24"):
        models.build("cacl_net", classes=10, input_shape=(3, 23, 40))
    smallest = models.build("cacl_net", classes=3, input_shape=(3, 24, 24), width=0.1)
    assert smallest(torch.zeros(1, 3, 24, 24)).shape == (1, 3)
    with pytest.raises(ValueError, match="cacl_net has no spiking form"):
        models.build("cacl_net", classes=10, spiking=True)
    with pytest.raises(ValueError, match="norm of a spiking network must be one of bntt, shared, none, got 'batch'"):
        models.build("vgg5", classes=10, spiking=True, norm="batch")
    with pytest.raises(ValueError, match="neuron of a spiking network must be one of .*, stdb, got 'LIF'"):
        models.build("vgg5", classes=10, spiking=True, neuron="LIF")
    with pytest.raises(ValueError, match="'bntt' are one kernel, got norm='bntt' with neuron='stdb'"):
        models.build("vgg5", classes=10, spiking=True, neuron="stdb", norm="bntt")
    with pytest.raises(ValueError, match="norm of an artificial network must be batch or none, got 'bntt'"):
        models.build("resnet18", classes=10, spiking=False, norm="bntt")
    with pytest.raises(ValueError, match="pool of an artificial network must be average or max, got 'min'"):
        models.build("vgg5", classes=10, spiking=False, pool="min")
    with pytest.raises(ValueError, match=r"dropout must be two probabilities in \[0, 1\).* got \(1.0, 0.5\)"):
        models.build("vgg5_hybrid", classes=10, spiking=True, dropout=(1.0, 0.5))
    with pytest.raises(ValueError, match="width must be positive, got 0"):
        models.build("vgg5", classes=10, width=0)
    with pytest.raises(ValueError, match=r"input_shape must be \(channels, height, width\), got \(32, 32\)"):
        models.build("vgg5", classes=10, input_shape=(32, 32))
    with pytest.raises(ValueError, match="holds its threshold in a buffer"):
        models.build("vgg5", classes=10, spiking=True, neuron="delayed", learn_threshold=True)
