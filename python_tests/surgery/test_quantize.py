"""surgery.quantize: every layer at its width, the given model untouched."""

import pytest
import torch
from torch import nn

from pyaccel import surgery
from pyaccel.nn import QuantConv2d, QuantLinear


def network():
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 2))


def test_widths_in_a_list_and_the_model_untouched():
    model = network()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    made = surgery.quantize(model, [16, 5, 2], quantizer="affine", momentum=0.5)
    assert [type(m).__name__ for m in made if hasattr(m, "weight_bits")] == ["QuantConv2d", "QuantLinear", "QuantLinear"]
    assert [(m.weight_bits, m.activation_bits, m.quantizer) for m in made if hasattr(m, "weight_bits")] == [
        (16, 16, "affine"), (5, 5, "affine"), (2, 2, "affine"),
    ]  # fmt: skip
    made(torch.rand(4, 3, 4, 4)).sum().backward()
    torch.optim.SGD(made.parameters(), 1.0).step()
    assert type(model[0]) is nn.Conv2d and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_high_width_changes_little():
    model = network().eval()
    made = surgery.quantize(model, 16)
    x = torch.rand(8, 3, 4, 4)
    made.train()(x)
    made.eval()
    with torch.no_grad():
        # batch statistics moved in the training pass: compare with the float model that saw the same batch
        model.train()(x)
        assert torch.allclose(made(x), model.eval()(x), atol=2e-3)


def test_a_mapping_and_skip_and_a_single_width():
    assert isinstance(surgery.quantize(nn.Linear(3, 2), 4), QuantLinear)
    made = surgery.quantize(network(), {"4": 3})
    assert type(made[0]) is nn.Conv2d and made[4].weight_bits == 3
    made = surgery.quantize(network(), [4, 4], skip=["6"])
    assert isinstance(made[0], QuantConv2d) and type(made[6]) is nn.Linear


def test_nested_and_shared_modules():
    block = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    made = surgery.quantize(nn.ModuleDict({"a": block, "b": nn.Linear(4, 2)}), 4)
    assert isinstance(made["a"][0], QuantLinear)


def test_requantising_starts_from_the_full_weight_and_keeps_the_range():
    model = surgery.quantize(network(), 2)
    model(torch.rand(4, 3, 4, 4))
    again = surgery.quantize(model, 8)
    assert torch.equal(again[0].weight, model[0].weight) and again[0].weight_bits == 8
    assert torch.equal(again[0].activation_max, model[0].activation_max) and again[0].activation_max > 0


def test_errors():
    with pytest.raises(ValueError, match=r"quantize: 2 widths for 3 layers \(0, 4, 6\); give one each"):
        surgery.quantize(network(), [8, 8])
    with pytest.raises(ValueError, match="the width of 4 must be a whole number in 1..16, got 17"):
        surgery.quantize(network(), [8, 17, 8])
    with pytest.raises(ValueError, match="the model has no layer 'head'; its layers are 0, 4, 6"):
        surgery.quantize(network(), {"head": 8})
    with pytest.raises(ValueError, match="'1' is no convolution or linear layer"):
        surgery.quantize(network(), {"1": 8})
    recurrent = nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4))
    with pytest.raises(TypeError, match=r"cannot quantise 1 \(LSTM\); leave it alone with skip=\['1'\]"):
        surgery.quantize(recurrent, 8)
    assert isinstance(surgery.quantize(recurrent, 8, skip=["1"])[0], QuantLinear)
