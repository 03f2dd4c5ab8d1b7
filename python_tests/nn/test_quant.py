"""QuantLinear and QuantConv2d: integer inference equals the fake-quantised graph; ranges; packing on disk."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pyaccel import hardware, ops, surgery
from pyaccel.nn import QuantConv2d, QuantLinear, load_packed_state, packed_state

WIDTHS = [(1, 1), (2, 2), (2, 8), (3, 3), (4, 4), (4, 8), (5, 2), (8, 8), (8, 16), (12, 12), (16, 16)]
CASES = [(w, a, q) for w, a in WIDTHS for q in ("symmetric", "signed_zero", "affine") if not (w == 1 and q == "signed_zero")]


def calibrated(layer, *shape):
    for _ in range(3):
        layer(torch.rand(shape))
    return layer.eval()


def float64_twin(layer, x):
    """The fake-quantised layer with every sum in float64."""
    return copy.deepcopy(layer).double()(x.double().requires_grad_()).detach()


@pytest.mark.parametrize("weight_bits,activation_bits,quantizer", CASES)
def test_linear_equals_the_fake_quantised_layer(weight_bits, activation_bits, quantizer):
    layer = calibrated(QuantLinear(37, 11, weight_bits=weight_bits, activation_bits=activation_bits, quantizer=quantizer), 6, 37)
    for x in (torch.rand(5, 37), torch.rand(2, 3, 37) - 0.2, torch.rand(37), torch.zeros(0, 37), torch.rand(20, 37) * 3):
        with torch.no_grad():
            y = layer(x)
        wanted = float64_twin(layer, x)
        assert y.shape == wanted.shape and not y.requires_grad
        if y.numel():
            assert (y - wanted).abs().max() <= 1e-6 * wanted.abs().max()


@pytest.mark.parametrize("weight_bits,activation_bits,quantizer", CASES)
def test_conv_equals_the_fake_quantised_layer(weight_bits, activation_bits, quantizer):
    layer = QuantConv2d(6, 8, 3, stride=(1, 2), padding=1, groups=2, weight_bits=weight_bits, activation_bits=activation_bits,
                        quantizer=quantizer)  # fmt: skip
    calibrated(layer, 4, 6, 9, 8)
    x = torch.rand(3, 6, 9, 8)
    for given in (x, x.to(memory_format=torch.channels_last), x[::2]):
        with torch.no_grad():
            y = layer(given)
        wanted = float64_twin(layer, given)
        assert (y - wanted).abs().max() <= 1e-6 * wanted.abs().max()


def test_integer_inference_equals_the_fake_graph_on_a_trained_network():
    """Codes behind a layer may flip where a sum falls on a boundary, so each layer is compared on its own input."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1),
        nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 16, 10),
    )  # fmt: skip
    model = surgery.quantize(model, [8, 3, 4])
    labels = torch.randint(0, 10, (256,))
    images = torch.rand(256, 1, 8, 8) * 0.3
    for i, label in enumerate(labels):  # ten patterns to learn
        images[i, 0, label % 8, : 4 + label // 8 * 4] += 0.7
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for _ in range(40):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
    model.eval()
    seen = {}
    hooks = [m.register_forward_hook(lambda m, i, o: seen.update({m: (i[0], o)})) for m in model if hasattr(m, "weight_bits")]
    with torch.no_grad():
        right = (model(images).argmax(1) == labels).float().mean()
    for hook in hooks:
        hook.remove()
    assert right > 0.9 and len(seen) == 3
    for layer, (x, y) in seen.items():
        wanted = float64_twin(layer, x)
        assert (y - wanted).abs().max() <= 1e-6 * wanted.abs().max()
    with torch.enable_grad():  # the form that attacks see agrees on the classes
        fake = model(images.clone().requires_grad_())
    with torch.no_grad():
        assert (fake.argmax(1) == model(images).argmax(1)).float().mean() > 0.99


def test_gradients_flow_in_training_and_to_the_input_of_an_attack():
    layer = QuantLinear(20, 5, weight_bits=3, activation_bits=3)
    x = torch.rand(8, 20, requires_grad=True)
    layer(x).sum().backward()
    assert (layer.weight.grad != 0).any() and (x.grad != 0).any()
    layer.eval()
    x.grad = None
    layer(x).square().sum().backward()
    assert (x.grad != 0).any()
    layer(torch.full((1, 20), 100.0, requires_grad=True)).sum()  # far outside the range: no gradient
    outside = torch.full((1, 20), 100.0, requires_grad=True)
    layer(outside).sum().backward()
    assert (outside.grad == 0).all()


def test_the_activation_range_is_an_average_in_training_and_frozen_in_evaluation():
    layer = QuantLinear(4, 2, momentum=0.9)
    layer(torch.full((1, 4), 2.0))
    assert layer.activation_max == 2
    layer(torch.full((1, 4), 3.0))
    assert torch.isclose(layer.activation_max, torch.tensor(2.1))
    layer.eval()
    with torch.no_grad():
        layer(torch.full((1, 4), 9.0))
    assert torch.isclose(layer.activation_max, torch.tensor(2.1))


def test_weights_are_packed_once_and_again_when_they_change(monkeypatch):
    layer = calibrated(QuantLinear(8, 4), 2, 8)
    packed = []
    original = ops.pack_codes
    monkeypatch.setattr(ops, "pack_codes", lambda codes, bits: (packed.append(codes.shape), original(codes, bits))[1])
    x = torch.rand(3, 8)
    with torch.no_grad():
        first = layer(x)
        layer(x)
        assert packed.count((4, 8)) == 1
        layer.weight.mul_(2)
        assert torch.allclose(layer(x) - layer.bias, 2 * (first - layer.bias), atol=1e-5)
        assert packed.count((4, 8)) == 2
    copy.deepcopy(layer), layer.train()
    assert layer._packed is None


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
def test_packed_state_in_safetensors(tmp_path, bits):
    """Stored compression is what the file shows; loading gives the same integers."""
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 36, 100, bias=False))
    model = surgery.quantize(model, bits)
    model(torch.rand(4, 3, 8, 8))
    model.eval()
    x = torch.rand(5, 3, 8, 8)
    with torch.no_grad():
        wanted = model(x)
    save_file(packed_state(model), tmp_path / "model.safetensors")
    save_file({k: v.float() for k, v in model.state_dict().items()}, tmp_path / "float.safetensors")
    other = surgery.quantize(nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 36, 100, bias=False)), bits).eval()
    load_packed_state(other, load_file(tmp_path / "model.safetensors"))
    with torch.no_grad():
        found = other(x)
    assert torch.equal(other[0].weight_codes(), model[0].weight_codes())
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
    ratio = (tmp_path / "float.safetensors").stat().st_size / (tmp_path / "model.safetensors").stat().st_size
    costs = hardware.layer_costs(model, x)
    stored = hardware.compression(costs, stored=True)
    assert abs(ratio / stored - 1) < 0.03  # the rest: headers, bias, padding of rows to words
    assert hardware.compression(costs) == pytest.approx(32 / bits)
    assert stored == pytest.approx(32 / {3: 4}.get(bits, bits))


def test_errors():
    layer = QuantLinear(4, 2).eval()
    with torch.no_grad(), pytest.raises(ValueError, match="QuantLinear: no activation range yet; run some batches in training mode"):
        layer(torch.rand(1, 4))
    with pytest.raises(ValueError, match="weight_bits must be in 1..16, got 0"):
        QuantLinear(4, 2, weight_bits=0)
    with pytest.raises(ValueError, match="weight_bits must be in 2..16, got 1"):
        QuantLinear(4, 2, weight_bits=1, quantizer="signed_zero")
    with pytest.raises(ValueError, match="quantizer must be one of symmetric, signed_zero, affine"):
        QuantConv2d(1, 1, 3, quantizer="ternary")
    with pytest.raises(ValueError, match="padding must be numbers and zeros, got padding='same'"):
        QuantConv2d(1, 1, 3, padding="same")
    with pytest.raises(ValueError, match=r"load_packed_state: weight_words is missing"):
        load_packed_state(layer, layer.state_dict())
    wrong = packed_state(QuantLinear(4, 3))
    with pytest.raises(ValueError, match="weight_words has 3 rows, the layer 2"):
        load_packed_state(layer, wrong)
    with pytest.raises(ValueError, match="weight_words does not fit 8 bits"):
        load_packed_state(layer, packed_state(QuantLinear(4, 2, weight_bits=16)))
