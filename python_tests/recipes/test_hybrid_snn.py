"""The recipes on converted networks: what they refuse, what they count, and their smoke runs (slow)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from pyaccel import surgery
from pyaccel.cli import main
from pyaccel.models.vgg import VggNet
from pyaccel.recipes import hybrid_snn, report, snn_robustness
from pyaccel.recipes.converted_activity import activity_of
from pyaccel.recipes.hybrid_training import MLP, drops, read_or_make, scaled
from pyaccel.recipes.snn_robustness_measure import Bench

RECIPES = {"hybrid_snn": hybrid_snn, "snn_robustness": snn_robustness}


def test_learning_rates_drop_at_60_80_and_90_percent():
    assert drops(300) == [180, 240, 270] and drops(20) == [12, 16, 18] and drops(1) == [1, 1, 1]


@pytest.mark.parametrize("recipe", RECIPES)
def test_presets(recipe):
    module = RECIPES[recipe]
    paper = module.preset("paper")
    assert (paper.epochs, paper.lr, paper.momentum, paper.weight_decay, paper.batch_size) == (300, 1e-2, 0.9, 5e-4, 64)
    assert (paper.balance_images, paper.balance_steps, paper.scale, paper.mean) == (512, 1000, 0.7, (0.5, 0.5, 0.5))
    assert module.preset("desk", "digits").mean is None and module.preset("desk", "x").mean is not None
    with pytest.raises(ValueError, match="unknown preset 'big'"):
        module.preset("big")
    for name in ("smoke", "desk", "paper"):
        module.check(module.preset(name))


@pytest.mark.parametrize("recipe, change, text", [
    ("hybrid_snn", dict(curve=(5, 3)), "curve must be increasing"), ("hybrid_snn", dict(curve=(3,)),
    "must hold the steps of the comparison, 5"),
    ("hybrid_snn", dict(surrogates=("x",)), "surrogates: expected some of stdb, linear"), ("hybrid_snn",
    dict(scale=0.0), "scale must be positive"),
    ("hybrid_snn", dict(percentile=0.0), "percentile must be"), ("hybrid_snn", dict(tune_epochs=-1),
    "must not be negative"),
    ("hybrid_snn", dict(steps=0), "steps must be at least 1"),
    ("snn_robustness", dict(networks=("x",)), "networks: expected some of"), ("snn_robustness", dict(draws=1),
    "draws must be at least 2"),
    ("snn_robustness", dict(networks=("ann",)), "sweeps tune SNN-BP"), ("snn_robustness", dict(eps=(0.0,)),
    "must be positive"),
    ("snn_robustness", dict(conv_steps=0), "conv_steps must be"),
])  # fmt: skip
def test_wrong_configurations_are_refused_before_anything_is_written(recipe, change, text, tmp_path):
    module = RECIPES[recipe]
    with pytest.raises(ValueError, match=text):
        module.run(replace(module.preset("smoke"), **change), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_network_that_does_not_convert_and_missing_data_are_refused(recipe, tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    module = RECIPES[recipe]
    with pytest.raises(ValueError, match="to_spiking: cannot convert .*BatchNorm"):
        module.run(replace(module.preset("smoke"), model="vgg5"), out=tmp_path / "run")
    monkeypatch.delenv("PYACCEL_DATA", raising=False)
    with pytest.raises(ValueError, match=f"the preset desk of {recipe} trains on CIFAR-10 and was given no data"):
        module.run(module.preset("desk"), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_is_made_once_is_kept(tmp_path):
    calls = []
    for _ in range(2):
        assert read_or_make(tmp_path / "a" / "x.json", lambda: calls.append(1) or {"v": 1.5}) == {"v": 1.5}
    assert calls == [1]


def converted(steps: int = 12, threshold: float = 0.4, **options):
    torch.manual_seed(0)
    ann = VggNet(MLP.scaled(0.1), input_shape=(1, 4, 4), classes=3, dropout=(0.0, 0.0), **options)
    return ann, surgery.to_spiking(ann, steps=steps, threshold=threshold).eval()


def test_scaled_thresholds():
    _, snn = converted(threshold=2.0)
    assert set(surgery.thresholds(scaled(snn, 0.7)).values()) == {1.4} and set(surgery.thresholds(snn).values()) == {
        2.0
    }


def test_activity_counts_events_spikes_and_products():
    _, snn = converted()
    x, ids = torch.rand(6, 1, 4, 4), torch.arange(6)
    seen = {}
    for name, module in snn.named_modules():
        if isinstance(module, (nn.Linear, type(next(iter(snn.neurons.values()))))):
            module.register_forward_hook(lambda m, a, o, name=name: seen.__setitem__(name, (a[0], o)))
    with torch.no_grad():
        snn.step_logits(x, ids, 12)
    inputs = [v[0] for k, v in seen.items() if isinstance(snn.get_submodule(k), nn.Linear)]
    spikes = [v[1] for k, v in seen.items() if k in snn.neurons]
    layers = activity_of(snn, [(x[:4], ids[:4]), (x[4:], ids[4:])], 12)
    assert [layer.macs for layer in layers] == [16 * 10, 10 * 10, 10 * 3] and [layer.inputs for layer in layers] == [
        16,
        10,
        10,
    ]
    assert [layer.neurons for layer in layers] == [10, 10, 0]
    assert [layer.events * 6 for layer in layers] == pytest.approx([float(i.count_nonzero()) for i in inputs])
    assert [layer.spikes * 6 for layer in layers] == pytest.approx([*(float(s.sum()) for s in spikes), 0.0]) and layers[
        0
    ].spikes > 0
    with pytest.raises(ValueError, match="no images"):
        activity_of(snn, [], 12)


def test_neurons_of_a_residual_sum_belong_to_the_layer_before_it():
    from pyaccel import models

    ann = models.build("resnet12", classes=10, spiking=False, width=0.0625)
    snn = surgery.to_spiking(ann, steps=4, threshold=0.1).eval()
    layers = {layer.name: layer for layer in activity_of(snn, [(torch.rand(1, 3, 32, 32), None)], 4)}
    assert (
        sum(layer.neurons for layer in layers.values()) == sum(neurons_of(snn))
        and layers["features.10.body.3"].neurons > 0
    )
    assert layers["features.11.shortcut.0"].neurons == 0 < layers["features.11.body.3"].neurons


def neurons_of(snn) -> list[int]:
    found = []
    hooks = [n.register_forward_hook(lambda m, a, s: found.append(s[0, 0].numel())) for n in snn.neurons.values()]
    snn(torch.rand(1, 3, 32, 32))
    for hook in hooks:
        hook.remove()
    return found


def test_noise_is_of_the_attack_s_size_and_judges_are_not_the_attackers_draw(five_images):
    config = replace(snn_robustness.preset("smoke"), batch_size=2, steps_at_once=5)
    bench, (ann, snn) = Bench(config, five_images), converted()
    ann.eval()
    clean, noisy = bench.made(None), bench.made(bench.noise(0.1))
    assert [len(b.images) for b in clean] == [2, 2, 1]
    for a, b in zip(clean, noisy, strict=True):
        moved = (a.images - b.images).abs()
        assert moved.max() <= 0.1 + 1e-6 and (moved > 0.09).double().mean() > 0.5  # the rest is clipped
    first, again = (bench.right(snn, clean) for _ in range(2))
    assert torch.equal(first, again) and first.dtype == torch.bool and len(first) == 5
    for network in (ann, snn):
        for attack in (bench.fgsm(network, 0.1), bench.pgd(network, 0.1)):
            made = bench.made(attack)
            moved = max(float((a.images - b.images).abs().max()) for a, b in zip(made, clean, strict=True))
            assert 0 < moved <= 0.1 + 1e-6


# ---- the smoke runs


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """Run folders of both recipes' smoke presets."""
    pytest.importorskip("sklearn")
    pytest.importorskip("jsonargparse")
    folders = {}

    def run(recipe: str):
        if recipe not in folders:
            out = tmp_path_factory.mktemp(recipe) / "run"
            assert main(["run", recipe, "--preset", "smoke", "--out", str(out)]) == 0
            folders[recipe] = out
        return folders[recipe]

    return run


@pytest.mark.slow
def test_hybrid_smoke_run(smoke):
    out = smoke("hybrid_snn")
    found, config = report.read(out), hybrid_snn.preset("smoke")
    assert {r.n for r in found.results} == {3} and {r.published for r in found.results} == {None}
    text = (out / "report.md").read_text()
    assert "REMEMBERED" in text and "hybrid, STDB minus converted" in text and "accuracy.png" in text
    # Signs that the specification calls safe: more steps help a conversion; tuning beats conversion at equal steps, by
    # far.
    full = [found[f"converted_scale_1/accuracy_after_step_{t}"].value for t in config.curve]
    assert full[0] <= 15 < 60 < full[3] < full[-1] and full[-1] > 95
    assert full[-1] > found["ann/accuracy"].value - 2
    for surrogate in config.surrogates:
        gap = found[f"{surrogate}_minus_converted/accuracy"]
        assert gap.value - 2 * gap.std > 10
    # Two spiking layers: nothing comes out before the third step.
    assert found["linear/accuracy_after_step_2"].value == pytest.approx(found["converted/accuracy_after_step_2"].value)


@pytest.mark.slow
def test_a_finished_run_is_read_not_made_again(smoke):
    for recipe in RECIPES:
        out = smoke(recipe)
        before = {file: file.stat().st_mtime_ns for file in out.rglob("*.safetensors")}
        first = report.read(out).results
        assert main(["run", recipe, "--preset", "smoke", "--out", str(out)]) == 0
        assert before and {file: file.stat().st_mtime_ns for file in out.rglob("*.safetensors")} == before
        assert [r for r in report.read(out).results if "time" not in r.name] == [
            r for r in first if "time" not in r.name
        ]


@pytest.mark.slow
def test_robustness_smoke_run(smoke):
    out = smoke("snn_robustness")
    found, config = report.read(out), snn_robustness.preset("smoke")
    text = (out / "report.md").read_text()
    assert "Is it masking?" in text and "withstands every attack" in text
    eps = f"{config.eps[0]:g}"
    for kind in config.networks:
        # Safe by the specification: crafted gradients beat noise of equal size by far, in spiking networks too.
        assert found[f"{kind}/clean"].value > 90 and found[f"{kind}/noise/{eps}"].value > 85
        assert found[f"{kind}/white/fgsm/{eps}"].value < found[f"{kind}/noise/{eps}"].value - 20
        assert found[f"{kind}/white/pgd/{eps}"].value < found[f"{kind}/noise/{eps}"].value - 20
        for source in config.sources:
            assert found[f"{kind}/black/{source}/pgd/{eps}"].value >= found[f"{kind}/white/pgd/{eps}"].value - 15
    for kind in ("bp", "bntt"):
        ways = [r.value for r in found.results if r.name.startswith(f"{kind}/control/")]
        assert ways[-1] == min(ways), "no way is better than all of them together"
    few, many = (found[f"agreement/{t}/cosine"].value for t in config.agree_steps)
    assert many > few > 0.4 and found[f"agreement/{config.agree_steps[-1]}/draws"].value > 0.95
