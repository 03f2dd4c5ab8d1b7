"""Weights in torchvision's layout: the same function as a network written in its form."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pyaccel import models


class Block(nn.Module):
    def __init__(self, inputs, width, stride, bottleneck):
        super().__init__()
        outputs = 4 * width if bottleneck else width
        # The stride is in the 3x3 convolution, torchvision's "v1.5".
        kinds = (
            [(inputs, width, 1, 1), (width, width, 3, stride), (width, outputs, 1, 1)]
            if bottleneck
            else [(inputs, width, 3, stride), (width, width, 3, 1)]
        )
        for i, (a, b, k, s) in enumerate(kinds, 1):
            setattr(self, f"conv{i}", nn.Conv2d(a, b, k, s, k // 2, bias=False))
            setattr(self, f"bn{i}", nn.BatchNorm2d(b))
        self.count = len(kinds)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = x
        for i in range(1, self.count + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            y = y.relu() if i < self.count else y
        return (y + (x if self.downsample is None else self.downsample(x))).relu()


class Torchvision(nn.Module):
    """torchvision.models.ResNet, from its published source: names, order of operations."""

    def __init__(self, blocks, bottleneck, classes=7):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        inputs = 64
        for stage, count in enumerate(blocks):
            width, made = 64 * 2**stage, []
            for i in range(count):
                made.append(Block(inputs, width, 2 if stage and not i else 1, bottleneck))
                inputs = 4 * width if bottleneck else width
            setattr(self, f"layer{stage + 1}", nn.Sequential(*made))
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x):
        x = nn.functional.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, 2, 1)
        for stage in range(1, 5):
            x = getattr(self, f"layer{stage}")(x)
        return self.fc(x.mean((2, 3)))


def theirs(blocks=(2, 2, 2, 2), bottleneck=False):
    torch.manual_seed(0)
    net = Torchvision(blocks, bottleneck)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, 0, 0.1)
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return net.eval()


@pytest.mark.parametrize(
    "name, blocks, bottleneck", [("resnet18", (2, 2, 2, 2), False), ("resnet50", (3, 4, 6, 3), True)]
)
def test_the_same_logits(name, blocks, bottleneck):
    net = theirs(blocks, bottleneck)
    model = models.build(name, classes=7, input_shape=(3, 72, 72)).eval()
    models.load_torchvision(model, net.state_dict())
    images = torch.randn(1, 3, 72, 72)
    with torch.no_grad():
        torch.testing.assert_close(model(images), net(images), rtol=1e-4, atol=1e-4)


def test_files_with_and_without_read_out(tmp_path):
    net = theirs()
    state = {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}  # as old files
    save_file(state, tmp_path / "w.safetensors")
    torch.save(state, tmp_path / "w.pth")
    torch.save({"state_dict": state}, tmp_path / "wrapped.pth")
    for file in ("w.safetensors", "w.pth", "wrapped.pth"):
        model = models.build("resnet18", classes=3, input_shape=(3, 72, 72))
        before = model.readout.weight.detach().clone()
        models.load_torchvision(model, tmp_path / file, readout=False)
        assert torch.equal(model.features[0].weight, net.conv1.weight) and torch.equal(model.readout.weight, before)


def test_what_does_not_fit_is_listed_and_nothing_is_changed(tmp_path):
    state = theirs().state_dict()
    model = models.build("resnet18", classes=3, input_shape=(3, 72, 72))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"other shapes: fc\.weight \(file \[7, 512\], model \[3, 512\]\), fc\.bias"):
        models.load_torchvision(model, state)
    short = {k: v for k, v in state.items() if k != "layer2.0.downsample.0.weight"} | {"extra": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"missing: layer2\.0\.downsample\.0\.weight; left over: extra"):
        models.load_torchvision(model, short, readout=False)
    with pytest.raises(ValueError, match=r"left over: x0, x1, .*x7 and 4 more"):
        models.load_torchvision(model, state | {f"x{i}": torch.zeros(1) for i in range(12)}, readout=False)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(ValueError, match="fits a ResidualNet, got VggNet"):
        models.load_torchvision(models.build("vgg5", classes=3), state)
    with pytest.raises(FileNotFoundError, match="no such file of weights"):
        models.load_torchvision(model, tmp_path / "absent.safetensors")
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        models.load_torchvision(model, tmp_path / "absent.pth")
    (tmp_path / "bad.safetensors").write_bytes(b"12345678")
    with pytest.raises(ValueError, match="not a sound safetensors file"):
        models.load_torchvision(model, tmp_path / "bad.safetensors")
