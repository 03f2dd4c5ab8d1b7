"""Recomputed activations: the same gradients, draws and statistics, in less memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pyaccel import models
from pyaccel.hardware import SramConfig
from pyaccel.models.dropout import HeldDropout
from pyaccel.nn import NoisyMemory

KINDS = {
    "bntt": dict(name="vgg5", steps=7),
    "shared": dict(name="vgg5", steps=7, norm="shared"),
    "stdb with dropout": dict(name="vgg5_hybrid", steps=9, dropout=(0.3, 0.3), threshold=0.5),
    "delayed with dropout": dict(name="vgg5_robust", steps=7, dropout=(0.3, 0.0), threshold=0.2),
    "residual": dict(name="resnet20", steps=5, neuron="bntt"),
}


def one_step(kind, **recompute):
    """Loss, gradients, and buffers after a training step, and what the next step draws."""
    options = dict(KINDS[kind])
    torch.manual_seed(0)
    model = models.build(options.pop("name"), classes=4, input_shape=(2, 8, 8) if "resnet" not in kind else (2, 16, 16),
                         width=0.1, spiking=True, seed=5, **options, **recompute).train()  # fmt: skip
    if kind == "residual":
        model = model.double()
    kinds = next(model.parameters()).dtype
    shape = (2, 16, 16) if kind == "residual" else (2, 8, 8)
    images = torch.rand(3, *shape, generator=torch.Generator().manual_seed(1)).to(kinds)
    logits = model(images, torch.tensor([4, 9, 2]))
    (logits * torch.arange(12.0).reshape(3, 4).to(kinds)).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert all(m.stateful is False and m.membrane is None
               for m in model.modules() if hasattr(m, "stateful"))  # fmt: skip
    second = model(images, torch.tensor([4, 9, 2])).detach()
    return logits.detach(), gradients, dict(model.named_buffers()), second


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recompute", [
    dict(recompute_layers=True), dict(recompute_steps=3), dict(recompute_steps=100),
], ids=str)  # fmt: skip
def test_gradients_draws_and_statistics_are_those_of_the_plain_pass(kind, recompute):
    if kind == "shared" and "recompute_steps" in recompute:
        with pytest.raises(ValueError, match=r"features\.0\.norm takes its statistics over all time steps"):
            one_step(kind, **recompute)
        return
    plain, again = one_step(kind), one_step(kind, **recompute)
    assert any(float(g.abs().max()) > 0 for g in plain[1].values())
    for ours, theirs in zip(again[:1] + again[3:], plain[:1] + plain[3:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for name, gradient in plain[1].items():
        torch.testing.assert_close(again[1][name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))
    for name, buffer in plain[2].items():
        torch.testing.assert_close(again[2][name], buffer, msg=name)


def kept_bytes(**recompute):
    """Bytes that a forward pass keeps for the backward pass, parameters aside."""
    model = models.build("vgg5", classes=4, width=0.25, spiking=True, steps=24, **recompute).train()
    own = {p.data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def keep(tensor):
        if tensor.data_ptr() not in own:
            seen[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    images = torch.rand(4, 3, 32, 32)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        total = model(images).sum()
    assert total.requires_grad
    return sum(seen.values())


def test_memory_shrinks():
    plain = kept_bytes()
    assert kept_bytes(recompute_layers=True) < 0.55 * plain  # spikes in float32 instead of currents and bits
    assert kept_bytes(recompute_steps=8) < 0.2 * plain  # three membranes instead of 24 currents


def test_nothing_is_recomputed_without_gradients_and_wrong_sizes_are_refused():
    model = models.build("vgg5", classes=4, width=0.1, spiking=True, steps=3, recompute_steps=1)
    plain = models.build("vgg5", classes=4, width=0.1, spiking=True, steps=3)
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model.eval()(torch.ones(1, 3, 32, 32)), plain.eval()(torch.ones(1, 3, 32, 32)))
    with pytest.raises(ValueError, match="recompute_layers and recompute_steps were both given; choose one"):
        models.build("vgg5", classes=4, spiking=True, recompute_steps=2, recompute_layers=True)
    with pytest.raises(ValueError, match="recompute_steps must be at least 1, got 0"):
        models.build("vgg5", classes=4, spiking=True, recompute_steps=0)
    assert isinstance(model.readout, nn.Linear)


def test_layers_that_draw_anew_refuse_a_plain_checkpoint():
    """A second pass through them would draw other numbers: wrong gradients, in silence."""
    dropout = HeldDropout(0.5)
    memory = NoisyMemory(SramConfig(8, n8t=0, p6=0.1), scale=0.1, signed=True, redraw=True)
    x = torch.rand(2, 3, 4, requires_grad=True)
    for layer in (dropout, memory):
        out = checkpoint(layer, x, use_reentrant=False)
        with pytest.raises(RuntimeError, match=f"{type(layer).__name__}: a checkpointed block cannot repeat this layer"):
            out.sum().backward()
