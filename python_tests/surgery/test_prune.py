"""Pruning and shrinking: one trajectory, masked or shrunk; nothing comes back; criteria pick what they should."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_nets import RandomNet, images, live, optimizer_of, train
from torch import nn

from pyaccel import models
from pyaccel.surgery import (
    activation_means, hold_pruned, like_tensors, prune_filters, pruned_filters, shrink, unwatch_activations,
    watch_activations,
)  # fmt: skip


def small(width: float = 0.15, name: str = "vgg11") -> nn.Module:
    torch.manual_seed(3)
    return live(models.build(name, classes=4, input_shape=(3, 32, 32), width=width))


def conv_net() -> nn.Module:
    torch.manual_seed(0)
    return live(nn.Sequential(
        nn.Conv2d(3, 10, 3, padding=1, bias=False), nn.BatchNorm2d(10), nn.ReLU(), nn.Conv2d(10, 10, 3, padding=1,
                                                                                             bias=False),
        nn.BatchNorm2d(10), nn.ReLU(), nn.MaxPool2d(3), nn.Flatten(), nn.Linear(90, 4),
    ))  # fmt: skip


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    return {name: optimizer.state[p] for name, p in model.named_parameters()}


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.sampled_from([0.3, 0.6, 0.9]), st.sampled_from(["l1", "random"]),
       st.sampled_from(["leave", "joint"]),
       st.sampled_from(["sgd", "adamw"]))  # fmt: skip
def test_masked_and_shrunk_networks_are_one(seed, rate, criterion, coupled, kind):
    """Same logits; after further training the same surviving weights, statistics and optimizer state (float64)."""
    model = RandomNet(seed).double()
    before = copy.deepcopy(model.state_dict())
    optimizer = optimizer_of(model, kind)
    train(model, optimizer, 2)
    trained = copy.deepcopy(model.state_dict())
    try:
        masked, mask_optimizer = prune_filters(model, rate, criterion, coupled=coupled, optimizer=optimizer, seed=seed)
    except ValueError as error:
        assert "no convolution left" in str(error) and coupled == "leave"
        return
    shrunk, shrunk_optimizer = shrink(masked, mask_optimizer)
    x = images(5)[0].double()
    assert (masked.eval()(x) - shrunk.eval()(x)).abs().max() < 1e-10
    train(masked, mask_optimizer, 3)
    train(shrunk, shrunk_optimizer, 3)
    again, again_optimizer = shrink(masked, mask_optimizer)
    assert again.state_dict().keys() == shrunk.state_dict().keys()
    for name, value in shrunk.state_dict().items():
        assert value.shape == again.state_dict()[name].shape, name
        torch.testing.assert_close(value, again.state_dict()[name], rtol=1e-9, atol=1e-9)
    ours, theirs = state_of(shrunk, shrunk_optimizer), state_of(again, again_optimizer)
    for name in ours:
        for key, value in ours[name].items():
            torch.testing.assert_close(value, theirs[name][key], rtol=1e-8, atol=1e-9)
    # A second pruning takes the same filters out of both.
    widths = {name: len(dict(model.named_modules())[name].weight) for name in pruned_filters(model)}
    twice = [
        prune_filters(m, max(rate, 0.8), criterion, coupled=coupled, widths=widths, seed=seed + 1)
        for m in (masked, shrunk)
    ]
    for a, b in zip(shrink(twice[0]).parameters(), shrink(twice[1]).parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert before.keys() == model.state_dict().keys()  # and the first model is as it was when it was pruned
    assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())


def test_specification_tolerances_in_float32():
    """max |logit difference| < 1e-4; after one step surviving weights equal to 1e-5; 80 % of the filters."""
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)

    def step(model, optimizer):
        model.train()
        optimizer.zero_grad()
        x = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        nn.functional.cross_entropy(model(x), torch.arange(16) % 4).backward()
        optimizer.step()

    step(model, optimizer)
    masked, mask_optimizer = prune_filters(model, 0.8, optimizer=optimizer)
    shrunk, shrunk_optimizer = shrink(masked, mask_optimizer)
    x = torch.randn(32, 3, 32, 32)
    assert (masked.eval()(x) - shrunk.eval()(x)).abs().max() < 1e-4
    step(masked, mask_optimizer)
    step(shrunk, shrunk_optimizer)
    for a, b in zip(shrink(masked).parameters(), shrunk.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_momentum_never_revives_a_filter(kind):
    model = conv_net()
    optimizer = optimizer_of(model, kind)
    train(model, optimizer, 3)
    masked, held = prune_filters(model, 0.5, optimizer=optimizer)
    dead = pruned_filters(masked)
    for tensor in held.state[masked[0].weight].values():  # cleared at once, not only held from the next step on
        assert tensor.dim() == 0 or tensor[dead["0"]].abs().max() == 0 < tensor[~dead["0"]].abs().max()
    for steps in range(3):
        train(masked, held, 1, seed=10 + steps)
        for name in ("0", "3"):
            conv, norm = masked.get_submodule(name), masked.get_submodule(str(int(name) + 1))
            assert dead[name].sum() == 5 and conv.weight[dead[name]].abs().max() == 0
            assert norm.weight[dead[name]].abs().max() == 0 == norm.bias[dead[name]].abs().max()
        assert masked[3].weight[:, dead["0"]].abs().max() == 0
        columns = dead["3"].repeat_interleave(9)
        assert masked[8].weight[:, columns].abs().max() == 0 and masked[8].weight[:, ~columns].abs().min() > 0


def test_negative_control_state_that_is_not_cleared_revives():
    """The same pruning of parameters alone, under the old momentum: rows move again."""
    model = conv_net()
    optimizer = optimizer_of(model, "sgd")
    train(model, optimizer, 3)
    pruned = prune_filters(model, 0.5)
    dead = pruned_filters(pruned)["0"]
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), pruned.parameters(), strict=True):
            mine.copy_(theirs)
    train(model, optimizer, 3, seed=20)
    assert model[0].weight[dead].abs().max() > 1e-4


def test_negative_control_a_shift_that_is_not_zeroed_leaks():
    """Convolution rows alone set to zero: relu(beta) is a constant channel, and removing it changes the function."""
    model = conv_net().eval()
    dead = pruned_filters(prune_filters(model, 0.5))
    leaky = copy.deepcopy(model)
    for name in ("0", "3"):
        leaky.get_submodule(name).weight.data[dead[name]] = 0
    x = images()[0]
    assert (leaky(x) - shrink(prune_filters(model, 0.5))(x)).abs().max() > 1e-2
    assert sum(p.numel() for p in shrink(leaky).parameters()) == sum(p.numel() for p in model.parameters())


def test_hold_pruned_keeps_a_new_optimizer_in_check():
    """Where gradients of a pruned filter are not zero: sigmoid(0) is not 0, so its readers' columns want to move."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(6 * 49, 4))
    pruned = prune_filters(model, 0.5)
    dead = pruned_filters(pruned)["0"]
    free = copy.deepcopy(pruned)
    train(free, optimizer_of(free, "sgd"), 2)
    held = optimizer_of(pruned, "sgd")
    hold_pruned(pruned, held)
    train(pruned, held, 2)
    assert torch.equal(pruned_filters(pruned)["0"], dead) and not pruned_filters(free)["0"].any()
    masked, returned = prune_filters(model, 0.5, optimizer=optimizer_of(model, "sgd"))
    train(masked, returned, 2)  # the optimizer that pruning returns holds them by itself
    assert torch.equal(pruned_filters(masked)["0"], dead)


def test_l1_removes_the_known_filter():
    layer = nn.Conv2d(1, 4, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([3.0, -0.5, 1.0, -2.0]).view(4, 1, 1, 1))
        layer.bias.copy_(torch.tensor([0.0, 100.0, 0.0, 0.0]))  # no part of the criterion
    model = nn.Sequential(layer, nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    for rate, gone in ((0.25, [1]), (0.5, [1, 2]), (0.75, [1, 2, 3]), (1.0, [1, 2, 3])):
        assert pruned_filters(prune_filters(model, rate))["0"].nonzero()[:, 0].tolist() == gone
    assert pruned_filters(prune_filters(model, 1.0, min_keep=2))["0"].sum() == 2


def test_a_second_pruning_counts_the_first_and_never_revives():
    model, seen = conv_net(), torch.zeros(10, dtype=torch.bool)
    for rate in (0.1, 0.3, 0.3, 0.8, 0.5):
        model = prune_filters(model, rate, "random", seed=int(100 * rate))
        now = pruned_filters(model)["0"]
        assert (now | ~seen).all() and now.sum() == max(seen.sum(), round(10 * rate))
        seen = now


def test_random_is_stable_by_seed_and_differs_between_layers():
    model = conv_net()
    first, again, other = (pruned_filters(prune_filters(model, 0.5, "random", seed=s)) for s in (1, 1, 2))
    assert all(torch.equal(first[n], again[n]) for n in first) and any(
        not torch.equal(first[n], other[n]) for n in first
    )
    assert not torch.equal(first["0"], first["3"])


def test_activation_counts_what_training_saw():
    model = conv_net()
    with torch.no_grad():
        model[1].weight[4], model[1].bias[4] = 0.0, -1.0  # says -1 before the ReLU, whatever comes
    names = set(model.state_dict())
    watch_activations(model)
    with pytest.raises(ValueError, match="nothing was collected for 0"):
        activation_means(model)
    said = []
    model[2].register_forward_hook(lambda m, i, o: said.append(o.detach().mean((0, 2, 3), dtype=torch.float64)))
    train(model, optimizer_of(model, "sgd"), 2)
    model.eval()(images(9)[0])  # an evaluation does not count
    means = activation_means(model)
    torch.testing.assert_close(means["0"], (said[0] + said[1]) / 2, rtol=1e-12, atol=1e-12)
    model[1].weight.data[4], model[1].bias.data[4] = 0.0, -1.0
    lowest = pruned_filters(prune_filters(model, 0.1, "activation", activations=means))
    assert lowest["0"].nonzero()[:, 0].tolist() == [int(means["0"].argmin())]
    unwatch_activations(model)
    assert set(model.state_dict()) == names and not model[1]._forward_hooks


def test_a_channel_that_says_nothing_goes_first():
    model = conv_net()
    watch_activations(model)
    with torch.no_grad():
        model[1].weight[4], model[1].bias[4] = 0.0, -1.0
    model.train()(images()[0])
    means = activation_means(model)
    assert means["0"][4] == 0 and (means["0"] > 0).sum() == 9
    assert pruned_filters(prune_filters(model, 0.1, "activation", activations=means))["0"].nonzero().tolist() == [[4]]


def test_residual_networks_prune_inner_layers_or_the_whole_sum():
    model = small(name="resnet18").eval()
    inner = prune_filters(model, 0.5)
    joint = prune_filters(model, 0.5, coupled="joint")
    assert not pruned_filters(inner)["features.0"].any()
    sums = [
        name for name, gone in pruned_filters(joint).items() if gone.any() and not pruned_filters(inner)[name].any()
    ]
    assert "features.0" in sums and "features.3.body.3" in sums
    first = pruned_filters(joint)
    assert torch.equal(first["features.0"], first["features.3.body.3"]) and first["features.0"].sum() == 5
    x = torch.randn(4, 3, 32, 32)
    sizes = []
    for pruned in (inner, joint):
        shrunk = shrink(pruned)
        torch.testing.assert_close(pruned(x), shrunk(x), rtol=1e-5, atol=1e-5)
        sizes.append(sum(p.numel() for p in shrunk.parameters()))
    assert sizes[1] < sizes[0] < sum(p.numel() for p in model.parameters())
    with pytest.raises(ValueError, match='features.0 .*enter an addition; coupled="joint"'):
        prune_filters(model, {"features.0": 0.5})
    with pytest.raises(ValueError, match="must be pruned together with features.3.body.3"):
        prune_filters(model, {"features.0": 0.5}, coupled="joint")


def test_memory_format_mode_and_frozen_parameters_survive():
    model = small().to(memory_format=torch.channels_last).eval()
    model[4].weight.requires_grad_(False)
    smaller = shrink(prune_filters(model, 0.5))
    assert smaller[4].weight.is_contiguous(memory_format=torch.channels_last) and not smaller.training
    assert not smaller[4].weight.requires_grad and smaller[0].weight.requires_grad
    assert smaller[0].out_channels == smaller[1].num_features == 5 and smaller[4].in_channels == 5


def test_sizes_are_made_anew_from_a_state_dict():
    model = small(name="resnet18").eval()
    shrunk = shrink(prune_filters(model, 0.6, coupled="joint")).eval()
    made = like_tensors(model, shrunk.state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(made(x), shrunk(x)) and repr(made) == repr(shrunk)
    with pytest.raises(ValueError, match="expected the names of the model"):
        like_tensors(small(), shrunk.state_dict())


def test_rate_zero_changes_nothing():
    model = conv_net()
    optimizer = optimizer_of(model, "sgd")
    train(model, optimizer, 2)
    same, same_optimizer = prune_filters(model, 0.0, optimizer=optimizer)
    train(model, optimizer, 2, seed=7)
    train(same, same_optimizer, 2, seed=7)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), same.state_dict().values(), strict=True))


class Unknown(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.norm = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.GroupNorm(2, 8)
        self.head = nn.Linear(8 * 25, 4)

    def forward(self, x):
        return self.head(torch.flatten(self.second(self.norm(self.first(x))), 1))


def test_what_cannot_be_pruned_is_named():
    with pytest.raises(
        ValueError, match=r"cannot prune first \(its channels are fixed: they pass through norm \(GroupNorm\)"
    ):
        prune_filters(Unknown(), 0.5)
    assert pruned_filters(prune_filters(Unknown(), 0.5, skip=["first"]))["second"].sum() == 4
    grouped = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4), nn.Flatten(), nn.Linear(8 * 25, 4)
    )
    with pytest.raises(ValueError, match="0 .*read by 2, a grouped convolution.*; 2 .*grouped convolution"):
        prune_filters(grouped, 0.5)
    tied = nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 3), nn.Flatten(), nn.Linear(75, 2))
    tied[2].weight = tied[0].weight
    with pytest.raises(ValueError, match="shares a parameter with"):
        prune_filters(tied, 0.5)

    class Decides(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match="torch.fx cannot trace Decides"):
        prune_filters(Decides(), 0.5)


class ReadsPast(nn.Module):
    """Autoencoder-like: the weight of a layer is used once more, transposed, by the forward itself."""

    def __init__(self):
        super().__init__()
        self.stem, self.first, self.head = nn.Conv2d(3, 4, 9), nn.Linear(4, 6), nn.Linear(4, 2)

    def forward(self, x):
        x = torch.flatten(self.stem(x), 1)
        return self.head(nn.functional.linear(self.first(x), self.first.weight.t()))


def test_weights_that_are_read_past_their_layer_or_computed_are_left_whole():
    with pytest.raises(ValueError, match="stem .*first has its first.weight read past it"):
        prune_filters(ReadsPast(), 0.5)
    computed = nn.Sequential(
        nn.utils.spectral_norm(nn.Conv2d(3, 4, 3)), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(100, 2)
    )
    assert list(pruned_filters(prune_filters(computed.eval(), 0.5))) == ["2", "4"]


def test_optimizers_with_names_and_groups_keep_them_and_odd_state_is_refused():
    model = conv_net()
    named = torch.optim.SGD([{"params": [(n, p) for n, p in model.named_parameters() if p.dim() > 1], "lr": 0.1},
                             {"params": [(n, p) for n, p in model.named_parameters() if p.dim() == 1],
                              "weight_decay": 0.0}],
                            0.01, momentum=0.9, weight_decay=0.1)  # fmt: skip
    train(model, named, 1)
    smaller, carried = shrink(*prune_filters(model, 0.5, optimizer=named))
    assert [g["param_names"] for g in carried.param_groups] == [g["param_names"] for g in named.param_groups]
    assert [(g["lr"], g["weight_decay"]) for g in carried.param_groups] == [(0.1, 0.1), (0.01, 0.0)]
    train(smaller, carried, 1)
    factored = torch.optim.Adafactor(model.parameters(), 1e-2)
    train(model, factored, 1)
    masked, factored = prune_filters(model, 0.5, optimizer=factored)
    with pytest.raises(ValueError, match="state of Adafactor for 0.weight, .* cannot follow the channels"):
        shrink(masked, factored)


def test_a_layer_that_is_used_twice_is_pruned_in_both_places():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.shared, self.norm = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
            self.head = nn.Linear(6, 4)

        def forward(self, x):
            x = torch.relu(self.stem(x))
            for _ in range(2):
                x = torch.relu(self.norm(self.shared(x)))
            return self.head(x.mean((2, 3)))

    torch.manual_seed(0)
    model = live(Twice()).eval()
    pruned = prune_filters(model, 0.5)
    smaller = shrink(pruned)
    assert smaller.shared.weight.shape[:2] == (3, 3) and len(smaller.stem.weight) == 3
    torch.testing.assert_close(pruned(images()[0]), smaller(images()[0]), rtol=1e-5, atol=1e-6)


def test_wrong_arguments():
    model = conv_net()
    for options, message in (
        ({"rate": 1.5}, "share of the filters, 0..1, got 1.5"),
        ({"rate": 0.5, "criterion": "l2"}, "criterion must be one of l1, activation, random"),
        ({"rate": 0.5, "criterion": "activation"}, "needs activations=activation_means"),
        ({"rate": {"5": 0.5}}, "uses no convolution or linear layer '5'; it has 0, 3, 8"),
        ({"rate": 0.5, "coupled": "no"}, "coupled must be leave or joint"),
        ({"rate": {"8": 0.5}}, r"cannot prune 8 \(its channels are fixed: they are the output of the model\)"),
        ({"rate": 0.5, "skip": ["0", "3"]}, "no convolution left to prune"),
    ):
        with pytest.raises(ValueError, match=message):
            prune_filters(model, **options)
    stranger = torch.optim.SGD(conv_net().parameters(), 0.1)
    with pytest.raises(ValueError, match="holds 8 parameters that this model does not have"):
        prune_filters(model, 0.5, optimizer=stranger)
