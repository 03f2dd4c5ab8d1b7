"""Gradients crafted from spiking networks: equal to the published way and to straight-through autograd, at less
memory.
"""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyaccel import attacks, models, ops, spiking_attacks, surgery
from pyaccel.models.spiking import SpikingVgg
from pyaccel.models.vgg import Vgg
from pyaccel.spiking_attacks import DRAWS, SpikingTarget, first_synapse, with_surrogate

sys.path.insert(0, str(Path(__file__).parent))
from eager_attack import hook_gradient, loop  # noqa: E402

MEAN, STD = (0.4, 0.5, 0.6), (0.3, 0.2, 0.25)


def lively(network: nn.Module, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return network.double().eval()


def build(kind: str, seed: int = 0, steps: int = 12, **options):
    """A spiking network in float64, and images and classes for it."""
    torch.manual_seed(seed)
    shape = (3, 16, 16)
    if kind == "bntt":
        network = lively(
            models.build("vgg5", classes=4, spiking=True, width=0.1, steps=steps, input_shape=shape, gain=1.0), seed
        )
    elif kind == "mlp":
        network = lively(
            SpikingVgg(Vgg((), (12,), "a test"), input_shape=shape, classes=4, steps=steps, neuron="lif", gain=0.8),
            seed,
        )
    else:
        name = {"resnet": "resnet12"}.get(kind, "vgg5_robust")
        ann = lively(models.build(name, classes=4, spiking=False, width=0.1, input_shape=shape), seed)
        options = dict(threshold=0.4, leak=0.99, mean_readout=True) | options
        network = (
            surgery.to_spiking(ann, steps=steps, neuron="stdb" if kind == "stdb" else "delayed", **options)
            .double()
            .eval()
        )
    images = torch.rand(3, *shape, dtype=torch.float64)
    return network, images, torch.tensor([0, 3, 1])


def straight_through(network, images, labels, draw: int = 0):
    """Autograd through the whole network, the encoder's slope `gain`."""
    mean, std = (torch.tensor(v, dtype=images.dtype).view(-1, 1, 1) for v in (MEAN, STD))
    leaf = images.clone().requires_grad_()
    network.encoder.key[1] = DRAWS + draw
    logits = network((leaf - mean) / std)
    network.encoder.key[1] = 0
    loss = F.cross_entropy(logits if network.mean_readout else logits / network.steps, labels)
    return torch.autograd.grad(loss, leaf)[0], loss.detach()


KINDS = ["vgg", "stdb", "resnet", "bntt", "mlp"]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_one_convolution_of_the_sum_is_autograd_through_every_step(kind, seed):
    network, images, labels = build(kind, seed, 16 if kind == "resnet" else 12)
    expected, loss = straight_through(network, images, labels)
    value, found = SpikingTarget(network, MEAN, STD).loss_and_gradient(images, labels)
    assert expected.abs().max() > 1e-6
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12 * float(expected.abs().max()))
    torch.testing.assert_close(value, loss)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [dict(images_at_once=1), dict(images_at_once=2), dict(steps_at_once=5),
dict(steps_at_once=1),
                                     dict(steps_at_once=4, images_at_once=2)], ids=str)  # fmt: skip
def test_pieces_of_batch_and_time_change_nothing(kind, options):
    network, images, labels = build(kind, steps=14)
    value, expected = SpikingTarget(network, MEAN, STD).loss_and_gradient(images, labels)
    part, found = SpikingTarget(network, MEAN, STD, **options).loss_and_gradient(images, labels)
    assert expected.abs().max() > 1e-6
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(part, value)
    whole = SpikingTarget(network, MEAN, STD)(images)
    torch.testing.assert_close(SpikingTarget(network, MEAN, STD, **options)(images), whole)
    assert all(n.membrane is None and not n.stateful for n in spiking_attacks._neurons(network))


def eager(network):
    """Layers and thresholds of a converted VGG for the loop."""
    layers = [m for m in network.body.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    convolutions = [m for m in layers if isinstance(m, nn.Conv2d)]
    pooled = {convolutions[0]: nn.AvgPool2d(2), convolutions[-1]: nn.Sequential(nn.AvgPool2d(2), nn.Flatten())}
    listed = [part for layer in layers for part in (layer, pooled.get(layer)) if part is not None]
    return listed, list(surgery.thresholds(network).values())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_straight_through_equals_the_hooks_equals_the_rotated_kernel(seed):
    network, images, labels = build("vgg", seed)
    layers, thresholds = eager(network)
    spikes = ops.poisson_encode(images, network.steps, seed=0, stream=DRAWS)
    value, found = SpikingTarget(network).loss_and_gradient(images, labels)
    summed, loss = hook_gradient(layers, thresholds, 0.99, spikes, labels)
    weight = layers[0].weight.detach()
    rotated = F.conv2d(summed, weight.rot90(2, (2, 3)).transpose(0, 1), padding=1)
    transposed = F.conv_transpose2d(summed, weight, padding=1)
    largest = float(found.abs().max())
    torch.testing.assert_close(value, loss)
    torch.testing.assert_close(rotated, transposed, rtol=0, atol=1e-14 * max(1, largest))
    torch.testing.assert_close(found, transposed, rtol=1e-9, atol=1e-13 * largest)


def test_plain_autograd_finds_exactly_nothing():
    """Through mask * sign(x) the gradient is zero, not missing: an attack would do nothing, silently."""
    network, images, labels = build("vgg")
    layers, thresholds = eager(network)
    leaf = (images * 2 - 1).requires_grad_()
    spikes = torch.stack([leaf.sign() * (torch.rand_like(leaf) <= leaf.abs()) for _ in range(12)])
    (grad,) = torch.autograd.grad(F.cross_entropy(loop(layers, thresholds, 0.99, spikes), labels), leaf)
    assert grad is not None and not grad.any()


@pytest.mark.parametrize("kind", ["vgg", "bntt"])
def test_attacks_stay_in_their_ball_and_in_the_image(kind):
    network, images, labels = build(kind)
    target = SpikingTarget(network, MEAN, STD)
    for made in (spiking_attacks.pgd(target, images, labels, 0.1, 0.04, 3), spiking_attacks.fgsm(target, images,
    labels, 0.1),
                 spiking_attacks.pgd(target, images, labels, 0.1, 0.04, 2, samples=2)):  # fmt: skip
        assert (made - images).abs().max() <= 0.1 + 1e-12 and made.min() >= 0 and made.max() <= 1
        assert (made - images).abs().max() > 0.09
    assert torch.equal(spiking_attacks.pgd(target, images, labels, 0.0, 0.1, 3), images)


def test_one_large_step_is_fgsm_and_the_sign_knows_no_scale():
    network, images, labels = build("vgg")

    def attacked(attack, *arguments, **options):
        return attack(SpikingTarget(network, MEAN, STD, draw=3), images, labels, *arguments, **options)

    once = attacked(spiking_attacks.fgsm, 0.05)
    assert torch.equal(once, attacked(spiking_attacks.pgd, 0.05, 0.2, 1, random_start=False))
    assert torch.equal(
        once, attacked(spiking_attacks.fgsm, 0.05, loss=lambda logits, y: 7 * F.cross_entropy(logits, y))
    )
    _, gradient = SpikingTarget(network, MEAN, STD, draw=3).loss_and_gradient(images, labels)
    assert torch.equal(once, (images + 0.05 * gradient.sign()).clamp(0, 1))


def test_a_sum_read_out_is_attacked_as_its_mean():
    found = []
    for mean_readout in (True, False):
        network, images, labels = build("vgg", mean_readout=mean_readout)
        found.append(SpikingTarget(network).loss_and_gradient(images, labels))
        assert torch.allclose(SpikingTarget(network)(images) * (1 if mean_readout else network.steps),
                              network_at(network, images, DRAWS))  # fmt: skip
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def network_at(network, images, stream):
    network.encoder.key[1] = stream
    with torch.no_grad():
        logits = network(images)
    network.encoder.key[1] = 0
    return logits


def test_every_gradient_draws_anew_and_evaluation_is_left_alone():
    network, images, labels = build("vgg")
    before = network(images)
    target = SpikingTarget(network, MEAN, STD)
    first, second = (target.loss_and_gradient(images, labels)[1] for _ in range(2))
    assert target.draw == 2 and not torch.equal(first, second)
    assert torch.equal(SpikingTarget(network, MEAN, STD, draw=1).loss_and_gradient(images, labels)[1], second)
    assert torch.equal(network(images), before)
    averaged = attacks._input_gradient(
        lambda x: x,
        images,
        labels,
        2,
        "averaged",
        lambda x, y: spiking_attacks._Crafted.apply(x, y, SpikingTarget(network, MEAN, STD), F.cross_entropy),
    )
    torch.testing.assert_close(averaged, 2 * first)  # each call of the lambda starts at draw 0


def test_no_weight_has_a_gradient_and_all_want_one_again():
    network, images, labels = build("vgg")
    frozen = next(network.parameters())
    frozen.requires_grad_(False)
    SpikingTarget(network).loss_and_gradient(images, labels)
    assert all(p.grad is None for p in network.parameters()) and not frozen.requires_grad
    assert all(p.requires_grad for p in list(network.parameters())[1:])


def saved_bytes(job) -> int:
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        job()
    return sum(size for size, _ in kept.values())


def test_a_gradient_keeps_currents_and_no_spikes():
    """A neuron-step keeps its current, 8 bytes in float64, and next to nothing else; autograd for training keeps bits
    too.
    """
    network, images, labels = build("vgg", steps=20)
    neuron_steps = 20 * 3 * sum(s for s in sizes(network, images))
    weights = sum(p.numel() * 8 for p in network.parameters())
    found = saved_bytes(lambda: SpikingTarget(network).loss_and_gradient(images, labels))
    assert 8 * neuron_steps < found < 8.4 * neuron_steps + weights
    layers, thresholds = eager(network)
    spikes = ops.poisson_encode(images, 20, seed=0)
    assert saved_bytes(lambda: hook_gradient(layers, thresholds, 0.99, spikes, labels)) > 2 * found  # the control


def sizes(network, images):
    found = []
    hooks = [n.register_forward_hook(lambda m, a, s: found.append(s[0, 0].numel())) for n in network.neurons.values()]
    network(images[:1], steps=1)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_another_surrogate_fires_alike_and_differs_in_its_gradient(kind):
    network, images, labels = build(kind, steps=16)
    other = with_surrogate(network, "atan")
    assert torch.equal(other(images), network(images))
    (_, a), (_, b) = (SpikingTarget(n).loss_and_gradient(images, labels) for n in (network, other))
    assert not torch.allclose(a, b) and b.abs().max() > 0
    if kind != "stdb":  # the same one again: the spike-time surrogate became the delayed neuron's
        torch.testing.assert_close(
            SpikingTarget(with_surrogate(other, "triangle")).loss_and_gradient(images, labels)[1], a
        )


def test_several_readers_of_the_encoder_fall_back_to_straight_through():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(8, 8, bias=False) for _ in range(3))

        def forward(self, x):
            return self.c(F.relu(self.a(x) + self.b(x)))

    network = surgery.to_spiking(lively(Twice(), 0), steps=9, threshold=0.5).double().eval()
    images, labels = torch.rand(4, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    assert first_synapse(network) is None
    leaf = images.clone().requires_grad_()
    network.encoder.key[1] = DRAWS
    (expected,) = torch.autograd.grad(F.cross_entropy(network(leaf) / 9, labels), leaf)
    network.encoder.key[1] = 0
    assert expected.abs().max() > 0
    for options in ({}, dict(steps_at_once=4)):
        torch.testing.assert_close(SpikingTarget(network, **options).loss_and_gradient(images, labels)[1], expected)


def test_refusals():
    network, images, labels = build("vgg")
    with pytest.raises(TypeError, match="behind a Poisson encoder, got Linear"):
        SpikingTarget(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="mean and std, or neither"):
        SpikingTarget(network, MEAN)
    with pytest.raises(ValueError, match="steps_at_once must be at least 1"):
        SpikingTarget(network, steps_at_once=0)
    with pytest.raises(attacks.NoGradientError, match="gradient of the whole batch is exactly zero"):
        spiking_attacks.fgsm(
            SpikingTarget(network, steps=4), images, labels, 0.1
        )  # four layers: nothing arrives in time
    with pytest.raises(ValueError, match="must lie in"):
        spiking_attacks.fgsm(SpikingTarget(network), images * 2, labels, 0.1)
    with pytest.raises(ValueError, match="training mode"):
        spiking_attacks.fgsm(SpikingTarget(network.train()), images, labels, 0.1)
    with pytest.raises(ValueError, match="training mode"):
        SpikingTarget(network)(images)


def test_networks_that_checkpoint_their_activations_are_attacked_as_others():
    network, images, labels = build("bntt")
    expected = SpikingTarget(network).loss_and_gradient(images, labels)[1]
    for name, value in (("recompute_layers", True), ("recompute_steps", 4)):
        before = getattr(network, name)
        setattr(network, name, value)
        assert torch.equal(SpikingTarget(network).loss_and_gradient(images, labels)[1], expected)
        assert getattr(network, name) == value
        setattr(network, name, before)
