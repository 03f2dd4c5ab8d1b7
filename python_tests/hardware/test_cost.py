"""Counts to the digit: the tables of both specifications, and layers whose counts are known by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pyaccel import models, surgery
from pyaccel.hardware import cost, count, layer_costs, training_compute


def meta(name: str, size: int = 32, **options) -> nn.Module:
    with torch.device("meta"):  # shapes are all that counts
        return models.build(name, classes=10, input_shape=(3, size, size), **options)


@pytest.mark.parametrize(
    "name, size, macs, weights, accesses, with_outputs",
    [
        ("vgg16", 32, 313_196_544, 14_710_464, 14_895_808, 15_172_288),
        ("vgg19", 32, 398_131_200, 20_018_880, 20_230_848, 20_533_952),
        ("vgg16", 224, 15_346_630_656, 14_710_464, 23_792_320, 37_339_840),
    ],
)
def test_dense_table(name, size, macs, weights, accesses, with_outputs):
    found = cost(meta(name, size), (3, size, size)).convolutions()
    assert (found.macs, found.weights) == (macs, weights)
    assert (found.accesses, found.accesses_with_outputs) == (accesses, with_outputs)


@pytest.mark.parametrize(
    "name, at_32, at_64, ratio",
    [
        ("vgg11", 152_764_416, 611_057_664, 0.3837),
        ("vgg13", 228_261_888, 913_047_552, 0.5733),
        ("vgg16", 313_196_544, 1_252_786_176, 0.7867),
        ("vgg19", 398_131_200, 1_592_524_800, 1.0),
    ],
)
def test_depths(name, at_32, at_64, ratio):
    assert cost(meta(name), (3, 32, 32)).convolutions().macs == at_32
    assert cost(meta(name, 64), (3, 64, 64)).convolutions().macs == at_64
    assert round(at_64 / 1_592_524_800, 4) == ratio


def test_uniform_widths():
    """Kept fractions of every convolution against the dense VGG16, to four decimals."""
    dense = cost(meta("vgg16"), (3, 32, 32)).convolutions()
    found = [cost(meta("vgg16", width=kept / 10), (3, 32, 32)).convolutions() for kept in range(8, 1, -1)]
    assert [round(c.macs / dense.macs, 4) for c in found] == [0.6401, 0.4919, 0.3609, 0.2514, 0.1617, 0.0909, 0.0411]
    ratios = [round(c.accesses / dense.accesses, 4) for c in found]
    assert ratios == [0.6431, 0.4918, 0.3629, 0.2532, 0.1633, 0.0932, 0.0419]
    wide = (
        cost(meta("vgg16", 224), (3, 224, 224)).convolutions(),
        cost(meta("vgg16", 224, width=0.5), (3, 224, 224)).convolutions(),
    )
    assert [round(getattr(wide[1], n) / getattr(wide[0], n), 4) for n in ("macs", "accesses")] == [0.2514, 0.3486]


def test_layers_by_hand():
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6, bias=False),
        nn.Flatten(), nn.Linear(6 * 2 * 1, 5),
    )  # fmt: skip
    model.train()
    found = cost(model, (4, 8, 5))
    assert [(c.name, c.kind, c.macs, c.weights, c.parameters, c.inputs, c.outputs) for c in found.layers] == [
        ("0", "convolution", 6 * 4 * 3 * 4 * 9, 216, 222, 160, 72),
        ("3", "convolution", 6 * 2 * 9, 54, 54, 72, 12),
        ("5", "linear", 60, 60, 65, 12, 5),
    ]
    assert found.parameters == 222 + 12 + 54 + 65 and model[1].training
    assert found.accesses == 216 + 160 + 54 + 72 + 60 + 12 and int(model[1].num_batches_tracked) == 0


def test_a_layer_used_twice_and_functional_products_count():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared, self.basis, self.mix = (
                nn.Linear(8, 8),
                nn.Parameter(torch.randn(3, 8)),
                nn.Parameter(torch.randn(2, 3)),
            )

        def forward(self, x):
            return F.linear(F.linear(self.shared(self.shared(x)), self.basis), self.mix)

    found = {c.name: c for c in count(Twice(), torch.rand(4, 8)).layers}
    assert (found["shared"].macs, found["shared"].weights) == (128, 64)
    assert (found[""].macs, found[""].weights) == (24 + 6, 24 + 6)


def test_quantised_layers_keep_their_counts_and_name_their_widths():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10))
    plain, quantised = (layer_costs(m, torch.rand(2, 3, 8, 8)) for m in (model, surgery.quantize(model, [5, 3])))
    assert [(c.name, c.macs, c.weights) for c in plain] == [(c.name, c.macs, c.weights) for c in quantised]
    assert [(c.weight_bits, c.activation_bits) for c in quantised] == [(5, 5), (3, 3)]


def test_spiking_layers_count_every_step():
    shape = (3, 16, 16)
    plain, spiking = (models.build("vgg5", classes=10, input_shape=shape, width=0.1, spiking=s) for s in (False, True))
    one, many = cost(plain, shape), cost(spiking, shape)
    steps = models.DESCRIPTIONS["vgg5"].form.steps
    # The read-out is linear and comes last: it is applied once, to the mean over steps.
    assert [c.macs * steps for c in one.layers[:-1]] == [c.macs for c in many.layers[:-1]]
    assert one.layers[-1].macs == many.layers[-1].macs


def test_training_compute_gives_the_published_order_of_schedules():
    """The four example schedules of net2net, section 5, in costs relative to the final network from scratch."""
    depth = [cost(meta(n, 64), (3, 64, 64)).convolutions().macs for n in ("vgg11", "vgg13", "vgg16", "vgg19")]
    widths = [cost(meta("vgg19", 64, width=w), (3, 64, 64)).convolutions().macs for w in (0.5, 0.75, 1.0)]
    images, epochs = 100_000, 120

    def relative(macs, data, share):
        stages = [(d * images * s * epochs, m) for m, d, s in zip(macs, data, share, strict=True)]
        return training_compute(stages) / training_compute([(images * epochs, macs[-1])])

    assert round(relative(widths, (0.25, 0.5, 1), (1 / 3,) * 3), 3) == 0.448
    assert round(relative(depth, (0.25, 0.5, 0.75, 1), (1 / 4,) * 4), 3) == 0.493
    assert round(relative(widths, (0.25, 0.5, 1), (0.25, 0.25, 0.5)), 3) == 0.586
    assert round(relative(widths, (1, 1, 1), (1 / 3,) * 3), 3) == 0.605
    assert training_compute([(2, 5)], backward=0) == 10 and training_compute([(2, 5)]) == 30
