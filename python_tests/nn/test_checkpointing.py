"""Activation checkpointing repeats a forward pass inside the backward pass: what the first one left behind stays as it is."""

from __future__ import annotations

import pytest
import torch
from torch import nn as torch_nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from pyaccel import nn
from pyaccel.ops.running import recomputing

X = 0.3 + torch.randn(6, 4, 3, 5, generator=torch.Generator().manual_seed(0))
Sequential = torch_nn.Sequential


class Checkpointed(torch_nn.Module):
    def __init__(self, block: torch_nn.Module, reentrant: bool):
        super().__init__()
        self.block, self.reentrant = block, reentrant

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=self.reentrant)


def pair() -> torch_nn.Module:
    return Sequential(nn.BNTTLIF(3, 6), nn.LIF())


BLOCKS = {
    "one": lambda wrap: wrap(nn.BNTTLIF(3, 6)),
    "two": lambda wrap: wrap(pair()),
    "in a row": lambda wrap: Sequential(wrap(pair()), wrap(pair())),
    "sequential in sequential": lambda wrap: wrap(Sequential(Sequential(pair(), pair()), pair())),
    "block in block": lambda wrap: wrap(Sequential(wrap(pair()), wrap(pair()), pair())),
}


def run(model: torch_nn.Module, passes: int = 2) -> list[torch.Tensor]:
    x = X.clone().requires_grad_()
    for _ in range(passes):
        (model(x) * X).sum().backward()
    return [x.grad, *(p.grad for p in model.parameters()), *model.buffers()]


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", BLOCKS)
def test_statistics_are_those_of_a_pass_that_is_kept(name, reentrant, early):
    torch.manual_seed(0)
    with set_checkpoint_early_stop(early):
        found = run(BLOCKS[name](lambda block: Checkpointed(block, reentrant)))
    wanted = run(BLOCKS[name](lambda block: block))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert found[-1] == 2 and found[0].any()


def test_several_passes_before_one_backward():
    model, wanted = Checkpointed(pair(), False), pair()
    for module in (model, wanted):
        x = X.clone().requires_grad_()
        (module(x).sum() + module(2 * x).sum()).backward()
    for a, b in zip(model.buffers(), wanted.buffers(), strict=True):
        assert torch.equal(a, b)


def test_the_pass_is_repeated_inside_backward_and_only_there():
    """Negative control: the block does run twice, and without the question the statistics would move twice."""
    seen = []

    class Probe(torch_nn.Module):
        def forward(self, x):
            seen.append(recomputing())
            return x.tanh()

    checkpoint(Sequential(nn.BNTTLIF(3, 6), Probe()), X.clone().requires_grad_(), use_reentrant=False).sum().backward()
    assert seen == [False, True] and not recomputing()


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_compiled_block_moves_its_statistics_once(reentrant):
    torch._dynamo.reset()
    block = pair()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    found, wanted = run(Checkpointed(compiled, reentrant)), run(pair())
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert block[0].num_batches_tracked == 2


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("make", [
    lambda: nn.LIF(stateful=True), lambda: nn.BNTTLIF(3, 12, stateful=True), lambda: nn.STDBLIF(stateful=True),
])  # fmt: skip
def test_a_stateful_module_is_refused_not_repeated_from_another_state(make, reentrant):
    module, x = make(), X.clone().requires_grad_()
    spikes = checkpoint(module, x, use_reentrant=reentrant)
    with pytest.raises(RuntimeError, match=f"{type(module).__name__}: a checkpointed block cannot repeat this layer: its state"):
        spikes.sum().backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_an_encoder_is_refused_not_drawn_anew(reentrant):
    block, image = Sequential(nn.PoissonEncoder(6), nn.LIF()), torch.rand(4, 3, 5, requires_grad=True)
    spikes = checkpoint(block, image, use_reentrant=reentrant)
    with pytest.raises(RuntimeError, match="PoissonEncoder: a checkpointed block cannot repeat this layer: the pass draws anew"):
        spikes.sum().backward()
    assert block[0].passes == 1
    block.eval()  # draws the same at every call
    checkpoint(block, image, use_reentrant=reentrant).sum().backward()


def test_opcheck_of_running_statistics():
    track = torch.ops.pyaccel.track_statistics_.default
    given = (torch.zeros(6, 3), torch.ones(6, 3), torch.zeros((), dtype=torch.int64), torch.randn(2, 3), torch.rand(2, 3))
    torch.library.opcheck(track, (*given, 0, 0.1))
    torch.library.opcheck(track, (*given, 4, 0.1))
