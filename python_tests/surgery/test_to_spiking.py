"""surgery.to_spiking: the same weights on spiking neurons; what cannot spike is named."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyaccel import models, surgery
from pyaccel.models.dropout import HeldDropout
from pyaccel.nn import LIF, STDBLIF, SpikeAvgPool2d, SpikeConv2d, SpikeLinear
from pyaccel.surgery.converted import Sum
from pyaccel.surgery.thresholds import set_threshold


def lively(ann: nn.Module, seed: int = 0) -> nn.Module:
    """Weights large enough for spikes to reach the end in few steps."""
    torch.manual_seed(seed)
    for layer in ann.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return ann


def pair(name: str, neuron: str, steps: int = 20, threshold: float = 0.3):
    """The converted network, and the network that `models.build` makes of the same description, with equal weights."""
    ann = lively(models.build(name, classes=10, spiking=False, width=0.125))
    gain = 0.9 if name.startswith("resnet") else 1.0
    options = dict(steps=steps, neuron=neuron, threshold=threshold, leak=0.99, gain=gain)
    converted = surgery.to_spiking(ann, mean_readout=name == "vgg5_robust", **options)
    built = models.build(name, classes=10, spiking=True, width=0.125, **options)
    for mine, theirs in zip(built.parameters(), ann.parameters(), strict=True):
        mine.data.copy_(theirs.data)
    for a, b in zip(*([m for m in n.modules() if isinstance(m, HeldDropout)] for n in (converted, built)), strict=True):
        b.stream = a.stream
    if name.startswith("resnet"):  # the paper's blocks add spikes as they are, and have a threshold of 1
        for network in (converted, built):
            for neuron in [m for m in network.modules() if isinstance(m, (LIF, STDBLIF))][3:]:
                set_threshold(network, neuron, 1.0)
    return ann, converted, built


@pytest.mark.parametrize("neuron", ["stdb", "delayed"])
@pytest.mark.parametrize("name", ["vgg5_hybrid", "vgg5_robust", "resnet12"])
def test_converted_networks_are_those_that_the_library_builds(name, neuron):
    """Spikes, logits and gradients alike, dropout included."""
    _, converted, built = pair(name, neuron)
    images, ids = torch.rand(2, 3, 32, 32) * 2 - 1, torch.tensor([5, 3])
    for training in (False, True):
        converted.train(training), built.train(training)
        got, expected = converted.step_logits(images, ids), built.step_logits(images, ids)
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    F.cross_entropy(converted(images, ids), torch.tensor([1, 2])).backward()
    F.cross_entropy(built(images, ids), torch.tensor([1, 2])).backward()
    for mine, theirs in zip(built.parameters(), converted.parameters(), strict=True):
        assert (theirs.grad - mine.grad).norm() <= 1e-4 * mine.grad.norm()
    assert all(p.grad.abs().max() > 0 for p in converted.parameters())


@pytest.mark.parametrize("name, layers", [
    ("vgg5_hybrid", 5), ("vgg9_hybrid", 9), ("vgg11_hybrid", 11), ("vgg16_hybrid", 15), ("vgg5_robust", 5),
    ("resnet12", 11), ("resnet20", 19), ("resnet34_cifar", 33),
])  # fmt: skip
@pytest.mark.parametrize("side", [32, 64])
def test_every_network_of_the_kind_converts(name, layers, side):
    ann = models.build(name, classes=10, spiking=False, width=0.05, input_shape=(3, side, side))
    network = surgery.to_spiking(ann, steps=2)
    assert len(network.neurons) == layers and network(torch.rand(1, 3, side, side)).shape == (1, 10)


def test_layers_keep_bits_of_their_spikes():
    kinds = {m.kind for m in pair("vgg5_hybrid", "stdb")[1].modules() if isinstance(m, (SpikeConv2d, SpikeLinear))}
    assert kinds == {"signed", "binary", "pooled"}


def test_the_artificial_network_is_untouched_and_shares_nothing():
    ann, converted, _ = pair("vgg5_hybrid", "stdb", steps=8)
    before = {name: value.clone() for name, value in ann.state_dict().items()}
    converted.train()
    F.cross_entropy(converted(torch.rand(2, 3, 32, 32)), torch.tensor([1, 2])).backward()
    torch.optim.SGD(converted.parameters(), 10.0).step()
    assert all(torch.equal(value, before[name]) for name, value in ann.state_dict().items())
    assert not {p.data_ptr() for p in ann.parameters()} & {p.data_ptr() for p in converted.parameters()}


def test_parameters_keep_their_names_and_a_saved_network_is_whole():
    ann, converted, _ = pair("resnet12", "delayed")
    assert {f"body.{name}" for name, _ in ann.named_parameters()} == {name for name, _ in converted.named_parameters()}
    for neuron in converted.neurons.values():
        set_threshold(converted, neuron, 0.7)
    other = surgery.to_spiking(ann, steps=20, neuron="delayed", leak=0.99, gain=0.9)
    other.load_state_dict(converted.state_dict())
    assert set(surgery.thresholds(other).values()) == {0.7}
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(other.eval()(images), converted.eval()(images))


class Functions(nn.Module):
    """The layers of `modules()` as functions and methods."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc, self.out = (
            nn.Conv2d(2, 4, 3, bias=False),
            nn.Linear(36, 8, bias=False),
            nn.Linear(8, 3, bias=False),
        )

    def forward(self, x):
        x = F.avg_pool2d(F.relu(self.conv(x)), 2)
        x = F.dropout(x, 0.25, self.training).view(x.size(0), -1)
        return self.out(self.fc(x).relu())


def modules(functions: Functions) -> nn.Sequential:
    return nn.Sequential(
        functions.conv,
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Dropout(0.25),
        nn.Flatten(),
        functions.fc,
        nn.ReLU(),
        nn.Identity(),
        functions.out,
    )


def test_functions_and_methods_convert_as_modules_do():
    model = lively(Functions())
    x = torch.rand(3, 2, 8, 8)
    both = [surgery.to_spiking(m.eval(), steps=12, threshold=0.3) for m in (model, modules(model))]
    for network in both:
        assert [type(m) for m in network.modules() if isinstance(m, SpikeAvgPool2d)] == [SpikeAvgPool2d]
        assert [m.p for m in network.modules() if isinstance(m, HeldDropout)] == [0.25]
    found = [network(x) for network in both]
    assert torch.equal(*found) and found[0].abs().max() > 0


def test_one_relu_used_twice_becomes_two_layers_of_neurons():
    class Reused(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.relu = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False), nn.ReLU()

        def forward(self, x):
            return self.b(self.relu(self.a(self.relu(self.a(x)))))

    network = surgery.to_spiking(Reused(), steps=4)
    assert list(network.neurons) == ["body.relu", "body.relu_2"] and len({id(n) for n in network.neurons.values()}) == 2


# ---- what one spike stands for


def relative_error(ann: nn.Module, snn: nn.Module, x: torch.Tensor, steps: int, unit: float) -> float:
    """Of logits per step, in units of the artificial network."""
    with torch.no_grad():
        expected = ann(x)
        found = surgery.stream_logits(snn, x, steps=steps, chunk=200) / steps * unit
    return float((found - expected).norm() / expected.norm())


def unit_of_readout(snn) -> float:
    """Product of the thresholds of a chain, over the gain."""
    return float(torch.tensor(list(surgery.thresholds(snn).values())).prod()) / snn.encoder.gain


def chain(**options) -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(32, 48, **options),
        nn.ReLU(),
        nn.Linear(48, 48, **options),
        nn.ReLU(),
        nn.Linear(48, 5, **options),
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rates_approach_activations_as_steps_grow(seed):
    ann, x = lively(chain(bias=False), seed).eval(), torch.rand(16, 2, 4, 4)
    snn = surgery.balance_thresholds(surgery.to_spiking(ann, steps=10), [x], steps=200)
    errors = [relative_error(ann, snn, x, steps, unit_of_readout(snn)) for steps in (20, 100, 4000)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.06, errors


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_biases_stay_in_proportion_when_thresholds_are_balanced(seed):
    ann, x = lively(chain(), seed).eval(), torch.rand(16, 2, 4, 4)
    for layer in ann:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.bias, 0, 1)
    snn = surgery.balance_thresholds(surgery.to_spiking(ann, steps=10, keep_biases=True), [x], steps=200)
    assert max(surgery.thresholds(snn).values()) > 1.5
    assert relative_error(ann, snn, x, 4000, unit_of_readout(snn)) < 0.06
    for name, buffer in snn.named_buffers():  # the control: biases that do not follow the thresholds
        if name.endswith("unit"):
            buffer.fill_(1.0)
    assert relative_error(ann, snn, x, 4000, unit_of_readout(snn)) > 0.2


@pytest.mark.parametrize("seed", [0, 1])
def test_folded_batch_normalisation_computes_what_it_did(seed):
    torch.manual_seed(seed)
    ann = lively(nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(24, 16, bias=False), nn.BatchNorm1d(16, affine=False), nn.ReLU(), nn.Linear(16, 4, bias=False),
    ), seed)  # fmt: skip
    x = torch.rand(32, 2, 4, 4)
    for _ in range(20):
        ann.train()(x)
    ann.eval()
    snn = surgery.balance_thresholds(surgery.to_spiking(ann, steps=10, fold_batchnorm=True), [x], steps=200)
    assert relative_error(ann, snn, x, 4000, unit_of_readout(snn)) < 0.08


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.body, self.out = (
            nn.Linear(16, 24, bias=False),
            nn.Linear(24, 24, bias=False),
            nn.Linear(24, 4, bias=False),
        )

    def forward(self, x):
        x = F.relu(self.first(x))
        x = F.relu(self.body(F.relu(self.body(x))) + x)
        return self.out(x)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_residual_addition_adds_what_the_two_branches_stand_for(seed):
    ann, x = lively(Residual(), seed).eval(), torch.rand(16, 16)
    snn = surgery.balance_thresholds(surgery.to_spiking(ann, steps=10), [x], steps=200)
    first, inner, *_, last = snn.neurons.values()
    unit = float(first.threshold) * float(inner.threshold) * float(last.threshold)
    (joined,) = (m for m in snn.modules() if isinstance(m, Sum))
    assert float(joined.ratio) == pytest.approx(1 / float(inner.threshold))
    # The body leads, so the sum and the neuron behind it count in the body's unit.
    assert relative_error(ann, snn, x, 4000, unit) < 0.06
    joined.ratio.fill_(1.0)
    assert relative_error(ann, snn, x, 4000, unit) > 0.1


# ---- refusals


class Branch(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Two(nn.Module):
    def forward(self, x, y):
        return F.relu(x) + y


class Method(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.fc, self.function = nn.Linear(4, 4, bias=False), function

    def forward(self, x):
        return self.function(F.relu(self.fc(x)))


WRONG = {
    "maximum": (nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)), "'1': MaxPool2d.*average pooling"),
    "bias": (nn.Sequential(nn.ReLU(), nn.Linear(3, 2)), "'1': it has a bias.*keep_biases=True"),
    "norm": (
        nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1), nn.ReLU()),
        "'1': BatchNorm2d.*fold_batchnorm=True",
    ),
    "activation": (nn.Sequential(nn.Linear(3, 2, bias=False), nn.Sigmoid()), "'1': Sigmoid has no spiking form"),
    "nested": (nn.Sequential(nn.Sequential(nn.ReLU(), nn.GELU())), r"'0\.1': GELU"),
    "convolution": (nn.Sequential(nn.ReLU(), nn.Conv1d(1, 1, 1, bias=False)), "'1': Conv1d"),
    "padding": (
        nn.Sequential(nn.ReLU(), nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect", bias=False)),
        "padding_mode='reflect'",
    ),
    "flatten": (nn.Sequential(nn.ReLU(), nn.Flatten(2)), "does not flatten everything"),
    "dropout": (nn.Sequential(nn.ReLU(), nn.Dropout2d(0.1)), "'1': Dropout2d"),
    "product": (Method(lambda x: x * x), r"mul \(mul\): an operation without spiking form"),
    "constant": (Method(lambda x: x + 1.0), "an addition of something other than two activations"),
    "shape": (Method(lambda x: x.view(-1, 2)), "view"),
    "mean": (Method(lambda x: x.mean(1)), "a mean over 1"),
    "no relu": (nn.Sequential(nn.Linear(3, 2, bias=False)), "no ReLU"),
    "branch": (Branch(), "cannot trace Branch"),
    "inputs": (Two(), "'y' is a second one"),
    "spiking": (nn.Sequential(nn.ReLU(), SpikeLinear(3, 2, bias=False)), "'1': SpikeLinear"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_spike_is_named(case):
    model, text = WRONG[case]
    with pytest.raises(ValueError, match=text):
        surgery.to_spiking(model, steps=4)


def test_a_norm_that_nothing_folds_into():
    lone = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3))
    with pytest.raises(ValueError, match="only be folded into the one layer right before it"):
        surgery.to_spiking(lone, steps=4, fold_batchnorm=True)


def test_library_networks_that_have_no_spiking_form_say_why():
    with pytest.raises(ValueError, match="MaxPool2d"):
        surgery.to_spiking(models.build("vgg16", classes=10, norm="none"), steps=4, keep_biases=True)
    with pytest.raises(ValueError, match="neuron must be one of"):
        surgery.to_spiking(models.build("vgg5_hybrid", classes=10, spiking=False, width=0.1), steps=4, neuron="bntt")
