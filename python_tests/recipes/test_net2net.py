"""The `net2net` recipe: nested subsets, growth that changes nothing, detectors by hand, accounting, kills survived."""

from __future__ import annotations

import csv
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from pyaccel import attacks, models
from pyaccel.cli import main
from pyaccel.data.images import ImageSet
from pyaccel.recipes import net2net as recipe
from pyaccel.recipes import net2net_detection as detection
from pyaccel.recipes import report
from pyaccel.recipes.net2net_growth import blocks_of, grown, nested, pruned_for_growth, widths_of
from pyaccel.training.log import TIME_COLUMNS

TINY = ["--epochs", "3", "--width", "0.15", "--seeds", "[0]", "--attack_images", "60", "--attack_steps", "3"]


def vgg(name: str, width: float = 0.08) -> nn.Module:
    torch.manual_seed(0)
    model = models.build(name, classes=4, input_shape=(3, 32, 32), width=width)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.2, 0.2)
    model.train()
    for _ in range(3):
        model(torch.randn(16, 3, 32, 32))
    return model.eval()


# ------------------------------------------------------------------------------------------------------- images, growth


def test_subsets_are_nested_and_balanced():
    labels = torch.arange(10).repeat(23).sort().values
    images = ImageSet(
        torch.arange(230, dtype=torch.uint8).view(230, 1, 1, 1).repeat(1, 1, 2, 2),
        labels,
        [str(i) for i in range(10)],
        "t",
    )
    parts = [nested(images, fraction) for fraction in (0.1, 0.25, 0.5, 1.0)]
    assert [len(part) for part in parts] == [23, 58, 115, 230]
    for small, large in zip(parts, parts[1:], strict=False):
        assert torch.equal(small.images, large.images[: len(small)])
    for part in parts:
        counts = part.labels.bincount(minlength=10)
        assert counts.max() - counts.min() <= 1
    assert not torch.equal(parts[-1].labels, labels)


def test_the_chain_of_depths_computes_the_same_at_every_stage():
    x = torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    model = vgg("vgg11").double()
    for name in ("vgg13", "vgg16", "vgg19"):
        target = models.DESCRIPTIONS[name].scaled(0.08)
        before, model = model, grown(model, target, x.double(), seed=1)
        assert [[len(model.get_submodule(n).weight) for n in block] for block in blocks_of(model)] == widths_of(target)
        for training in (False, True):
            a, b = before.train(training)(x.double()), model.train(training)(x.double())
            assert (a - b).abs().max() / a.abs().max() < (1e-6 if training else 1e-12)
        model, before = model.eval(), before.eval()
    assert len(sum(blocks_of(model), [])) == 16


def test_the_chain_of_widths_ends_in_the_description():
    model = vgg("vgg11", 0.04)
    target = models.DESCRIPTIONS["vgg11"].scaled(0.08)
    wider = grown(model, target, torch.randn(4, 3, 32, 32), seed=0)
    x = torch.randn(8, 3, 32, 32)
    assert (model(x) - wider(x)).abs().max() < 1e-5 * model(x).abs().max()
    fresh = models.VggNet(target, input_shape=(3, 32, 32), classes=4, norm="batch")
    assert {n: v.shape for n, v in wider.state_dict().items()} == {n: v.shape for n, v in fresh.state_dict().items()}


def test_layers_that_were_pruned_do_not_grow():
    model = vgg("vgg11", 0.15)
    smaller, kept = pruned_for_growth(model, 0.15)
    removed = sum(len(model.get_submodule(n).weight) - len(smaller.get_submodule(n).weight) for n in kept)
    assert removed == pytest.approx(0.15 * sum(len(model.get_submodule(n).weight) for n in kept), abs=len(kept))
    assert len(set(kept.values())) > 1
    limit = sorted(kept.values())[len(kept) // 2]
    larger = grown(
        smaller, models.DESCRIPTIONS["vgg13"].scaled(0.3), torch.randn(8, 3, 32, 32), seed=0, kept=kept, above=limit
    )
    for name, share in kept.items():
        grew = len(larger.get_submodule(name).weight) > len(smaller.get_submodule(name).weight)
        assert grew == (share > limit), name
    x = torch.randn(8, 3, 32, 32)
    assert (smaller.eval()(x) - larger.eval()(x)).abs().max() < 1e-5 * smaller(x).abs().max()


def test_stages_that_do_not_grow_into_each_other_are_refused():
    with pytest.raises(ValueError, match="cannot grow blocks of"):
        grown(vgg("vgg13"), models.DESCRIPTIONS["vgg11"].scaled(0.08), torch.randn(2, 3, 32, 32), seed=0)


# ------------------------------------------------------------------------------------------------------------ detectors


def test_jensen_shannon_by_hand():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4, 50, 7, generator=generator, dtype=torch.float64)
    p = logits.softmax(-1)
    mean = p.mean(0)
    by_hand = (p * (p / mean).log()).sum(-1).mean(0)
    torch.testing.assert_close(detection.jensen_shannon(logits), by_hand)
    assert detection.jensen_shannon(logits[:1].repeat(3, 1, 1)).abs().max() < 1e-15
    apart = 1e4 * torch.eye(3).view(3, 1, 3)
    assert detection.jensen_shannon(apart).item() == pytest.approx(math.log(3))
    apart = apart.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(detection.jensen_shannon(apart).sum(), apart)
    assert gradient.isfinite().all()


def test_votes_and_unsureness():
    logits = torch.eye(3)[torch.tensor([[0, 1], [0, 2], [1, 1], [0, 1]])]  # 4 networks, 2 images: votes 3-1 and 3-1
    assert detection.vote_disagreement(logits).tolist() == [0.25, 0.25]
    assert detection.vote_disagreement(logits[:1].repeat(4, 1, 1)).tolist() == [0, 0]
    assert detection.unsureness(torch.zeros(2, 1, 4)).item() == pytest.approx(0.75)


def test_area_and_threshold():
    clean, attacked = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.25, 0.3, 0.9])
    pairs = [(a > c) + 0.5 * (a == c) for a in attacked for c in clean]
    assert detection.auc(clean, attacked) == pytest.approx(float(sum(pairs)) / 12)
    assert detection.auc(clean, clean) == 0.5 and detection.auc(torch.zeros(5), torch.zeros(3)) == 0.5
    scores = torch.arange(100.0)
    limit = detection.threshold(scores)
    assert (
        detection.flagged(scores, limit) == pytest.approx(0.05) and detection.flagged(torch.full((4,), 5.0), limit) == 0
    )
    assert detection.flagged(torch.zeros(9), detection.threshold(torch.zeros(100))) == 0


def test_the_adaptive_attack_evades_better_than_the_one_on_the_last_network():
    """What it is for: less disagreement at no less loss of the ensemble."""
    torch.manual_seed(0)
    networks = [nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 5)) for _ in range(3)]
    together = detection.Together(networks).eval()
    x, y = torch.rand(40, 1, 8, 8), torch.randint(5, (40,))
    plain = attacks.pgd(networks[-1].eval(), x, y, 0.1, 0.02, 10)
    adaptive = attacks.pgd(together, x, y, 0.1, 0.02, 10, loss=detection.evading)
    with torch.no_grad():
        assert detection.evading(together(adaptive), y) > detection.evading(together(plain), y)


# ---------------------------------------------------------------------------------------------------------------- a run


def rows(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return [{name: text for name, text in row.items() if name not in TIME_COLUMNS} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    pytest.importorskip("sklearn")
    pytest.importorskip("jsonargparse")
    out = tmp_path_factory.mktemp("net2net") / "run"
    assert main(["run", "net2net", "--preset", "smoke", *TINY, "--out", str(out)]) == 0
    return out


def test_growth_keeps_accuracy_to_the_sample(smoke):
    found = report.read(smoke)
    for network in ("cumulative", "pruned"):
        for stage in (2, 3):
            name = f"{network}/stage_{stage}"
            assert found[f"{name}/grown"].value == found[f"{name}/before"].value
    assert found["cumulative/stage_2/before"].value == found["cumulative/stage_1/accuracy"].value
    assert {r.published for r in found.results} == {None}


def test_the_costs_add_up(smoke):
    found = report.read(smoke)
    spent = sum(
        found[f"cumulative/stage_{s}/images"].value
        * found[f"cumulative/stage_{s}/epochs"].value
        * found[f"cumulative/stage_{s}/macs"].value
        for s in (1, 2, 3)
    )
    whole = 1437 * 3 * found["scratch/stage_1/macs"].value
    assert found["cumulative/compute"].value == pytest.approx(spent / whole) and found["scratch/compute"].value == 1
    assert found["scratch_equal/stage_1/epochs"].value == max(1, round(3 * spent / whole))
    assert found["pruned/macs"].value < 1 == found["cumulative/macs"].value


def test_the_report_shows_every_control(smoke):
    text = (smoke / "report.md").read_text()
    for words in ("1 - max p, last network", "1 - max p, scratch of as many products", "adaptive",
                  "from scratch, as many products",
                  "measured here, not assumed", "noise 0.1"):  # fmt: skip
        assert words in text
    assert {"networks.png", "detection.png"} <= {file.name for file in smoke.iterdir()}
    found = report.read(smoke)
    for attack in ("fgsm", "pgd", "adaptive"):
        for score in ("js", "vote", "maxprob"):
            assert 0 <= found[f"detection/{attack}/{score}/auc"].value <= 1
            assert 0 <= found[f"detection/{attack}/{score}/rate"].value <= 100


def test_a_run_that_was_cut_short_goes_on_where_it_was(smoke, tmp_path, monkeypatch):
    """Stopped inside the third stage: earlier ones are read, grown again to the same network, not trained again."""
    from pyaccel.recipes import net2net_measure

    arguments = ["run", "net2net", "--preset", "smoke", *TINY, "--networks", "[cumulative]", "--out", str(tmp_path)]
    whole = recipe.Job.fit

    def stopping(self, model, images, name, epochs, lr):
        if name == "stage-3":
            raise KeyboardInterrupt
        return whole(self, model, images, name, epochs, lr)

    monkeypatch.setattr(recipe.Job, "fit", stopping)
    with pytest.raises(KeyboardInterrupt):
        main(arguments)
    monkeypatch.setattr(recipe.Job, "fit", whole)
    monkeypatch.setattr(recipe, "measure_detection", net2net_measure.measure_detection)
    assert main(arguments) == 0
    for stage in (1, 2, 3):
        part = f"cumulative/seed-0/stage-{stage}"
        assert rows(tmp_path / part) == rows(smoke / part)
    mine, theirs = report.read(tmp_path), report.read(smoke)
    for result in mine.results:
        if "time" not in result.name and "equal" not in result.name:
            assert result == theirs[result.name], result.name


def test_wrong_fields_are_named(tmp_path, capsys):
    for flags, message in (
        (["--fractions", "[0.5,1.0]"], "fractions: expected 3 shares"),
        (["--fractions", "[0.5,0.25,1.0]"], "fractions must grow to 1"),
        (["--networks", "[scratch,cumulative]"], "expected the order cumulative"),
        (["--networks", "[scratch_equal]"], "name both"),
        (["--earlier", "[resnet18,vgg5]"], "stages are VGG networks, got 'resnet18'"),
        (["--earlier_widths", "[1.0,0.5]"], "choose stages each at least as wide as before"),
        (["--earlier", "[vgg9_bntt,vgg5]"], "cannot grow blocks of"),
    ):
        assert main(["run", "net2net", "--preset", "smoke", *flags, "--out", str(tmp_path / "x")]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_presets_describe_the_chain():
    paper = recipe.preset("paper")
    assert [widths_of(recipe.description(paper, s))[0] for s in range(4)] == [[64], [64, 64], [64, 64], [64, 64]]
    recipe.check(paper)
    recipe.check(replace(recipe.preset("desk"), data="x"))
    assert recipe.preset("desk", "digits").model == "vgg5"
