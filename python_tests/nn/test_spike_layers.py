"""`nn.SpikeConv2d`, `nn.SpikeLinear`, `nn.SpikeAvgPool2d`, `nn.every_step`: torch's layers over `[T, B, ...]`."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn as torch_nn

from pyaccel import nn

SPIKES = (torch.rand(3, 2, 4, 6, 6, generator=torch.Generator().manual_seed(0)) < 0.3).float()


def pairs():
    torch.manual_seed(0)
    return [
        (nn.SpikeConv2d(4, 6, 3, padding=1), torch_nn.Conv2d(4, 6, 3, padding=1), SPIKES),
        (
            nn.SpikeConv2d(4, 6, (3, 1), 2, (1, 0), 1, 2, False),
            torch_nn.Conv2d(4, 6, (3, 1), 2, (1, 0), 1, 2, False),
            SPIKES,
        ),
        (nn.SpikeLinear(6, 5), torch_nn.Linear(6, 5), SPIKES),
        (nn.SpikeLinear(6, 5, bias=False), torch_nn.Linear(6, 5, bias=False), SPIKES),
        (nn.SpikeAvgPool2d(2), torch_nn.AvgPool2d(2), SPIKES),
        (nn.SpikeAvgPool2d((3, 2)), torch_nn.AvgPool2d((3, 2)), SPIKES),
    ]


@pytest.mark.parametrize("k", range(6))
def test_a_layer_is_torchs_with_its_weights(k):
    ours, theirs, spikes = pairs()[k]
    ours.load_state_dict(theirs.state_dict())
    results = []
    for layer in (ours, lambda s: theirs(s) if isinstance(theirs, torch_nn.Linear) else nn.every_step(theirs, s)):
        s = spikes.clone().requires_grad_()
        out = layer(s)
        out.square().sum().backward()
        results.append((out.detach(), s.grad))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=1e-5)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("k", range(6))
def test_copies_double_and_pickle(k):
    ours, _, spikes = pairs()[k]
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert repr(other) == repr(ours) and torch.equal(other(spikes), ours(spikes))
    assert copy.deepcopy(ours).double()(spikes.double()).dtype == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ours(spikes).dtype == (torch.float32 if k >= 4 else torch.bfloat16)


def test_kinds_reach_the_operator():
    pooled = nn.SpikeAvgPool2d(2)(SPIKES)
    nn.SpikeConv2d(4, 6, 3, kind="pooled")(pooled).sum().backward()
    nn.SpikeLinear(3, 5, kind="pooled_signed")(-pooled).sum().backward()
    with pytest.raises(ValueError, match="spike_conv2d: the spikes hold values that kind='binary' cannot store"):
        nn.SpikeConv2d(4, 6, 3)(pooled)
    with pytest.raises(ValueError, match="spike_linear: the spikes hold values that kind='signed' cannot store"):
        nn.SpikeLinear(3, 5, kind="signed")(pooled)


def test_only_zero_padding_by_numbers():
    with pytest.raises(ValueError, match="SpikeConv2d: padding must be numbers of zeros, got 'same'"):
        nn.SpikeConv2d(4, 6, 3, padding="same")
    with pytest.raises(ValueError, match="SpikeConv2d: padding must be numbers of zeros, got .*'reflect'"):
        nn.SpikeConv2d(4, 6, 3, padding=1, padding_mode="reflect")


def test_repr():
    assert (
        repr(nn.SpikeConv2d(4, 6, 3, kind="pooled"))
        == "SpikeConv2d(4, 6, kernel_size=(3, 3), stride=(1, 1), kind=pooled)"
    )
    assert repr(nn.SpikeLinear(6, 5)) == "SpikeLinear(in_features=6, out_features=5, bias=True, kind=binary)"
    assert repr(nn.SpikeAvgPool2d(2)) == "SpikeAvgPool2d(kernel_size=2)"


@pytest.mark.parametrize(
    "layer, step", [(lambda: nn.SpikeConv2d(4, 6, 3), (4, 6, 6)), (lambda: nn.SpikeLinear(6, 5), (6,))]
)
def test_meta(layer, step):
    module = layer().to("meta").requires_grad_(False)
    assert module(torch.empty(3, 2, *step, device="meta")).shape[:2] == (3, 2)


def test_every_step_is_the_loop_over_steps():
    layer = torch_nn.Sequential(torch_nn.Conv2d(4, 6, 3), torch_nn.ReLU())
    torch.testing.assert_close(
        nn.every_step(layer, SPIKES), torch.stack([layer(s) for s in SPIKES]), rtol=1e-6, atol=1e-6
    )
    assert nn.every_step(layer, SPIKES[:, :0]).shape == (3, 0, 6, 4, 4)
    assert nn.every_step(layer, SPIKES[:0]).shape == (0, 2, 6, 4, 4)


def test_a_stack_compiles_without_breaks():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = torch_nn.Sequential(
        nn.PoissonEncoder(3), nn.SpikeConv2d(4, 6, 3, padding=1, kind="signed"), nn.BNTTLIF(6, 3), nn.SpikeAvgPool2d(2),
        nn.SpikeConv2d(6, 8, 3, kind="pooled"), nn.LIF(learn_leak=True),
    )  # fmt: skip
    other = copy.deepcopy(model)
    compiled, image = torch.compile(other, fullgraph=True, backend="aot_eager"), SPIKES[0] * 0.7
    for _ in range(2):
        out, again = model(image), compiled(image)
        torch.testing.assert_close(out, again)
        out.sum().backward(), again.sum().backward()
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4, msg=name)
