"""Attacks: inside the ball, inside [0, 1], against their definitions; no attack may pass for robustness."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from pyaccel import attacks, surgery
from pyaccel.hardware import SramConfig

BANK = SramConfig(8, n8t=4, p6=0.05)


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Four classes of 6x6 images, each a bright quarter with noise: learnable in a moment."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, 4, (200,), generator=generator)
    x = 0.3 * torch.rand(200, 1, 6, 6, generator=generator)
    for n, c in enumerate(y.tolist()):
        x[n, 0, c // 2 * 3 :, c % 2 * 3 :][:3, :3] += 0.5
    return x.clamp(0, 1), y


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    torch.manual_seed(0)
    x, y = digits()
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 16), nn.ReLU(), nn.Linear(16, 4))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.eval()
    assert attacks.confidence(model, x, y)[0] > 0.95
    optimizer.zero_grad()
    return model


@pytest.fixture(scope="module")
def noisy(trained):
    return surgery.with_noisy_memory(trained, {"0/weight": BANK, "1/activation": BANK}, calibration=[digits()[0]])


def test_fgsm_by_its_definition(trained):
    x, y = digits()
    leaf = x.clone().requires_grad_()
    F.cross_entropy(trained(leaf), y).backward()
    expected = (x + 0.1 * leaf.grad.sign()).clamp(0, 1)
    trained.zero_grad(set_to_none=True)
    got = attacks.fgsm(trained, x, y, 0.1)
    assert torch.equal(got, expected)
    assert all(p.grad is None for p in trained.parameters())
    assert torch.equal(attacks.pgd(trained, x, y, 0.1, 0.1, 1, random_start=False), got)


def test_pgd_by_its_definition(trained):
    x, y = digits()
    at = x
    for _ in range(3):
        leaf = at.clone().requires_grad_()
        F.cross_entropy(trained(leaf), y).backward()
        at = torch.minimum(torch.maximum(at + 0.03 * leaf.grad.sign(), x - 0.05), x + 0.05).clamp(0, 1)
    assert torch.equal(attacks.pgd(trained, x, y, 0.05, 0.03, 3, random_start=False), at)


@settings(max_examples=15, deadline=None)
@given(eps=st.floats(0, 0.5), step=st.floats(0, 0.3), steps=st.integers(0, 3), start=st.booleans(), gradient=st.sampled_from(attacks.GRADIENTS))
def test_inside_the_ball_and_inside_the_image(eps, step, steps, start, gradient):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 4)).eval()
    x, y = (t[:9] for t in digits())
    samples = 2 if gradient == "averaged" else 1
    got = attacks.pgd(model, x, y, eps, step, steps, random_start=start, gradient=gradient, samples=samples)
    assert got.min() >= 0 and got.max() <= 1
    assert (got - x).abs().max() <= eps + 1e-6
    if eps == 0:
        assert torch.equal(got, x)


def test_attacks_hurt_and_more_steps_hurt_more(trained):
    x, y = digits()
    clean = attacks.confidence(trained, x, y)[0]
    fgsm = attacks.confidence(trained, attacks.fgsm(trained, x, y, 0.25), y)[0]
    pgd = attacks.confidence(trained, attacks.pgd(trained, x, y, 0.25, 0.05, 10), y)[0]
    once = attacks.pgd(trained, x, y, 0.25, 0.05, 10, variant="single_gradient", random_start=False)
    assert pgd <= fgsm < clean
    leaf = x.clone().requires_grad_()
    F.cross_entropy(trained(leaf), y).backward()
    assert torch.allclose(once, (x + 0.25 * leaf.grad.sign()).clamp(0, 1), atol=1e-6)  # it is FGSM in disguise


def test_the_choice_of_gradient(trained, noisy):
    x, y = digits()
    one, two = attacks.fgsm(noisy, x, y, 0.1), attacks.fgsm(noisy, x, y, 0.1)
    assert not torch.equal(one, two)  # each attack sees its own draw
    clean = [attacks.fgsm(noisy, x, y, 0.1, gradient="clean") for _ in range(2)]
    assert torch.equal(*clean)
    many = [attacks.fgsm(noisy, x, y, 0.1, gradient="averaged", samples=20) for _ in range(2)]
    agree = lambda a, b: float((a == b).double().mean())  # noqa: E731
    assert agree(*many) > agree(one, two)


def test_one_gradient_serves_every_eps(trained, noisy):
    x, y = digits()
    slope = attacks.input_gradient(trained, x, y)
    leaf = x.clone().requires_grad_()
    F.cross_entropy(trained(leaf), y).backward()
    assert torch.equal(slope, leaf.grad)
    trained.zero_grad(set_to_none=True)
    for eps in (0.02, 0.2):
        assert torch.equal((x + eps * slope.sign()).clamp(0, 1), attacks.fgsm(trained, x, y, eps))
    two = attacks.input_gradient(noisy, x, y, gradient="averaged", samples=2)
    assert two.shape == x.shape and not torch.equal(two, slope)
    with pytest.raises(ValueError, match="samples must be >= 2"):
        attacks.input_gradient(noisy, x, y, gradient="averaged")


def test_an_attack_without_gradient_is_an_error(trained):
    x, y = digits()
    saturated = nn.Sequential(trained, nn.Threshold(1e9, 0.0)).eval()
    for attack in (lambda m: attacks.fgsm(m, x, y, 0.1), lambda m: attacks.pgd(m, x, y, 0.1, 0.1, 2)):
        with pytest.raises(attacks.NoGradientError, match="gradient of the whole batch is exactly zero"):
            attack(saturated)
    with pytest.raises(ValueError, match="does not depend differentiably"):
        attacks.fgsm(lambda x: torch.zeros(len(x), 4), x, y, 0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(eps=-0.1), "eps must be >= 0"),
        (dict(steps=-1), "steps must be >= 0"),
        (dict(gradient="fast"), "gradient must be one of noisy, clean, averaged"),
        (dict(gradient="averaged"), "samples must be >= 2"),
        (dict(samples=3), "samples must be >= 2 with gradient=.averaged. and 1 otherwise"),
        (dict(variant="x"), "variant must be"),
        (dict(x=torch.full((200, 1, 6, 6), 2.0)), r"x must lie in \[0, 1\], got 2..2"),
        (dict(y=torch.zeros(3, dtype=torch.int64)), "one class an image, got 3 for 200 images"),
    ],
)
def test_wrong_attacks(trained, arguments, message):
    x, y = digits()
    call = dict(x=x, y=y, eps=0.1, step=0.1, steps=1) | arguments
    with pytest.raises(ValueError, match=message):
        attacks.pgd(trained, **call)


def test_training_mode_is_refused(trained):
    x, y = digits()
    trained.train()
    try:
        with pytest.raises(ValueError, match="training mode"):
            attacks.fgsm(trained, x, y, 0.1)
        with pytest.raises(ValueError, match="training mode"):
            attacks.flip_parameters(trained, (x, y), BANK)
    finally:
        trained.eval()


def test_foolbox_agrees(trained):
    foolbox = pytest.importorskip("foolbox")
    x, y = digits()
    oracle = foolbox.attacks.LinfFastGradientAttack(random_start=False)
    _, expected, _ = oracle(foolbox.PyTorchModel(trained, bounds=(0, 1)), x, y, epsilons=0.1)
    assert torch.allclose(attacks.fgsm(trained, x, y, 0.1), expected, atol=1e-6)
    oracle = foolbox.attacks.LinfPGD(abs_stepsize=0.03, steps=5, random_start=False)
    _, expected, _ = oracle(foolbox.PyTorchModel(trained, bounds=(0, 1)), x, y, epsilons=0.1)
    assert torch.allclose(attacks.pgd(trained, x, y, 0.1, 0.03, 5, random_start=False), expected, atol=1e-6)


# ---- parameters


def quantised(layer: nn.Module, top: int = 127) -> tuple[torch.Tensor, float]:
    scale = float(layer.weight.detach().abs().max()) / top
    return torch.round(layer.weight.detach() / scale).to(torch.int64), scale


def codes(model: nn.Module, original: nn.Module, name: str) -> torch.Tensor:
    _, scale = quantised(original.get_submodule(name))
    return torch.round(model.get_submodule(name).weight.detach() / scale).to(torch.int64)


def test_surgical_flips_stay_in_6t_bits_and_raise_the_loss(trained):
    x, y = digits()
    result = attacks.flip_parameters(trained, (x[:64], y[:64]), SramConfig(8, n8t=3), rounds=2)
    assert result.losses[-1] > result.losses[0]
    total = 0
    for name in ("0", "3", "5"):
        before, after = quantised(trained.get_submodule(name))[0], codes(result.model, trained, name)
        changed = (before ^ after) & 255
        assert not (changed & 0b11100000).any() and (after - before).abs().max() <= 31
        total += sum(int(((changed >> b) & 1).sum()) for b in range(8))
    assert result.total_flips == total > 0
    control = attacks.flip_parameters(trained, (x, y), SramConfig(8, n8t=3), rounds=0)
    assert control.total_flips == 0 and len(control.losses) == 1


def test_one_surgical_round_by_its_definition(trained):
    x, y = digits()
    control = attacks.flip_parameters(trained, (x, y), SramConfig(8, n8t=4), rounds=0).model
    F.cross_entropy(control(x), y).backward()
    attacked = attacks.flip_parameters(trained, (x, y), SramConfig(8, n8t=4)).model
    for name in ("0", "3", "5"):
        before, after = quantised(trained.get_submodule(name))[0], codes(attacked, trained, name)
        g = control.get_submodule(name).weight.grad
        expected = torch.where(g > 0, before | 15, torch.where(g < 0, before & ~15, before))
        assert torch.equal(after, expected)


def test_a_sign_bit_in_6t_cells_counts_downwards(trained):
    x, y = digits()
    result = attacks.flip_parameters(trained, (x, y), SramConfig(8, n8t=0))
    for name in ("0", "3", "5"):
        assert set(codes(result.model, trained, name).unique().tolist()) <= {-128, 127} | set(
            quantised(trained.get_submodule(name))[0].unique().tolist()
        )


def test_a_budget_keeps_the_most_harmful_flips(trained):
    x, y = digits()
    bank = SramConfig(8, n8t=1)
    result = attacks.flip_parameters(trained, (x, y), bank, budget=20)
    assert result.total_flips == 20
    random = attacks.flip_parameters(trained, (x, y), bank, attacker="voltage", budget=3, p=1e-2)
    assert result.losses[-1] > random.losses[-1] or random.total_flips <= 20


def test_surgical_drives_to_chance_and_random_flips_do_not(trained):
    x, y = digits()
    bank = SramConfig(8, n8t=1)
    surgical = attacks.flip_parameters(trained, (x, y), bank, rounds=3)
    accuracy, _, _ = attacks.confidence(surgical.model, x, y)
    bits = sum(m.weight.numel() * 7 for m in trained.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
    p = surgical.total_flips / bits
    random = [attacks.flip_parameters(trained, (x, y), bank, attacker="voltage", budget=3, p=p, seed=s) for s in range(3)]
    survived = [attacks.confidence(r.model, x, y)[0] for r in random]
    assert all(abs(r.total_flips - surgical.total_flips) < 6 * (bits * p) ** 0.5 for r in random)
    assert accuracy <= 0.3 and min(survived) > accuracy + 0.2


def test_failing_high_bits_hurt_much_more_than_failing_low_ones(trained):
    """At p = 1 % in the weights of all layers: the error of the codes grows sixteenfold, that of the logits with it."""
    x, y = digits()
    logits, accuracy = {}, {}
    for n8t in (0, 4):
        quiet = attacks.flip_parameters(trained, (x, y), SramConfig(8, n8t=n8t), rounds=0).model(x)
        chips = [
            attacks.flip_parameters(
                trained, (x, y), SramConfig(8, n8t=n8t), attacker="voltage", budget=3, p=1e-2, seed=s
            ).model
            for s in range(5)
        ]
        logits[n8t] = sum(float((chip(x) - quiet).detach().square().mean()) for chip in chips) ** 0.5
        accuracy[n8t] = sum(attacks.confidence(chip, x, y)[0] for chip in chips) / 5
    assert logits[0] > 5 * logits[4]
    assert accuracy[4] > 0.95 and accuracy[0] <= accuracy[4]


def test_voltage_picks_the_most_harmful_banks(trained):
    x, y = digits()
    control = attacks.flip_parameters(trained, (x, y), BANK, rounds=0)
    F.cross_entropy(control.model(x), y).backward()
    harm = {}
    for name in ("0", "3", "5"):
        _, scale = quantised(trained.get_submodule(name))
        harm[name] = float((control.model.get_submodule(name).weight.grad * scale).square().sum())
    result = attacks.flip_parameters(trained, (x, y), BANK, attacker="voltage", budget=1, p=0.5)
    hit = [name for name, flips in result.flips.items() if flips]
    assert hit == [max(harm, key=harm.get)]


def test_progressive_search_flips_one_bit_a_round_and_raises_the_loss(trained):
    x, y = digits()
    bank = SramConfig(8, n8t=0)
    result = attacks.flip_parameters(trained, (x[:64], y[:64]), bank, attacker="progressive", rounds=4)
    assert 4 <= result.total_flips <= 8
    assert all(a < b for a, b in zip(result.losses, result.losses[1:], strict=False))


def test_wrong_parameter_attacks(trained):
    batch = digits()
    with pytest.raises(ValueError, match="attacker must be voltage, surgical or progressive"):
        attacks.flip_parameters(trained, batch, BANK, attacker="x")
    with pytest.raises(ValueError, match="no Conv2d or Linear layer '9'; there are 0, 3, 5"):
        attacks.flip_parameters(trained, batch, {"9": BANK})
    with pytest.raises(ValueError, match="word_bits of 0 must be 4, 8 or 16, got 2"):
        attacks.flip_parameters(trained, batch, {"0": SramConfig(2, n8t=1)})
    with pytest.raises(ValueError, match="no layer to attack"):
        attacks.flip_parameters(nn.Sequential(nn.ReLU()).eval(), batch, BANK)
    with pytest.raises(attacks.NoGradientError, match="every gradient is exactly zero"):
        attacks.flip_parameters(nn.Sequential(trained, nn.Threshold(1e9, 0.0)).eval(), batch, BANK)
