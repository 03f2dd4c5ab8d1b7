"""`torch.compile` of whole spiking networks: one graph, made once, with the numbers of the plain network."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._dynamo.utils import counters

from pyaccel import models

SMALL_RESNET = models.ResNet((1, 1, 0, 0), "for tests", widths=(4, 6, 8, 8))
# Delayed neurons fire a step later in each layer: networks of them need more steps than they have layers.
KINDS = {
    "bntt": dict(name="vgg5", steps=3),
    "stdb": dict(name="vgg5_hybrid", steps=12, threshold=0.3, dropout=(0.0, 0.0)),
    "delayed": dict(name="vgg5_robust", steps=12, threshold=0.2, dropout=(0.0, 0.0)),
    "one BatchNorm": dict(name="vgg5", steps=3, norm="shared"),
    "residual": dict(steps=3),
    "stdb with dropout": dict(name="vgg5_hybrid", steps=12, threshold=0.3, dropout=(0.3, 0.3)),
    "residual stdb": dict(name="resnet20", steps=32, threshold=0.2),
}
QUICK = ("bntt", "stdb", "delayed", "residual")
SHAPE = (2, 16, 16)


def build(kind: str) -> models.SpikingNetwork:
    torch.manual_seed(0)
    options = dict(KINDS[kind])
    if "name" not in options:
        return models.SpikingResNet(SMALL_RESNET, input_shape=SHAPE, classes=4, seed=5, **options).train()
    return models.build(
        options.pop("name"), classes=4, input_shape=SHAPE, width=0.1, spiking=True, seed=5, **options
    ).train()


def train(model, forward, steps: int) -> list[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Logits and gradients of each step of SGD, on images that change."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    generator, found = torch.Generator().manual_seed(1), []
    for _ in range(steps):
        optimizer.zero_grad()
        logits = forward(torch.rand(3, *SHAPE, generator=generator), torch.tensor([4, 9, 2]))
        (logits * torch.arange(12.0).reshape(3, 4)).sum().backward()
        found.append((logits.detach().clone(), {name: p.grad.clone() for name, p in model.named_parameters()}))
        optimizer.step()
    return found


def compare(kind: str, backend: str, steps: int = 3) -> None:
    plain = build(kind)
    compiled = copy.deepcopy(plain)
    wanted = train(plain, plain, steps)
    torch._dynamo.reset()
    counters.clear()
    found = train(compiled, torch.compile(compiled, fullgraph=True, backend=backend), steps)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"] and not counters["recompiles"]
    assert len({tuple(logits.flatten().tolist()) for logits, _ in wanted}) == steps  # each step draws its own spikes
    for (logits, gradients), (theirs, their_gradients) in zip(found, wanted, strict=True):
        torch.testing.assert_close(logits, theirs, rtol=1e-5, atol=1e-5)
        for name, gradient in their_gradients.items():
            largest = float(gradient.abs().max())
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5 * largest, msg=name)
    assert all(float(g.abs().max()) > 0 for g in wanted[0][1].values())
    for (name, ours), theirs in zip(compiled.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


@pytest.mark.parametrize("kind", QUICK)
def test_a_network_is_one_graph_made_once(kind):
    compare(kind, "aot_eager" if kind == "bntt" else "eager")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_network_through_autograd_too(kind):
    compare(kind, "aot_eager")


@pytest.mark.slow
def test_a_network_through_inductor():
    try:
        compare("bntt", "inductor")
    except torch._inductor.exc.InductorError as error:  # no working C++ compiler beside torch
        pytest.skip(f"inductor cannot compile here: {str(error)[:100]}")


def test_a_break_would_be_seen():
    """Negative control."""

    class Breaks(torch.nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, images, sample_ids):
            logits = self.network(images, sample_ids)
            torch._dynamo.graph_break()
            return logits * 2

    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(Breaks(build("bntt")), fullgraph=True, backend="eager")(torch.rand(3, *SHAPE), torch.arange(3))
