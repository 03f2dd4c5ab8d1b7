"""The smoke preset from the command line to the report: widths, files, energies, kill and resume."""

from __future__ import annotations

import copy
import csv
import json
import os
import signal
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import pyaccel
from pyaccel import hardware
from pyaccel.cli import main
from pyaccel.data import digits8
from pyaccel.nn import load_packed_state
from pyaccel.recipes import quanos, report
from pyaccel.recipes.quanos_ans import assign_bits, weight_layers
from pyaccel.training import load_checkpoint, load_weights
from pyaccel.training.log import TIME_COLUMNS

pytest.importorskip("sklearn")
pytest.importorskip("jsonargparse")
SEEDS = (0, 1)
NETWORKS = ("float32", "inverse", "iso_inverse", "inverse+fgsm")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The run folder of the smoke preset with some of its networks and seeds, run once for all tests."""
    out = tmp_path_factory.mktemp("quanos") / "run"
    assert (
        main(
            [
                "run",
                "quanos",
                "--preset",
                "smoke",
                "--seeds",
                "[0,1]",
                "--networks",
                f"[{','.join(NETWORKS)}]",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    return out


def rows(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return [{name: text for name, text in row.items() if name not in TIME_COLUMNS} for row in csv.DictReader(file)]


def bits_of(folder):
    with safe_open(folder / "packed.safetensors", "pt") as file:
        return json.loads(file.metadata()["bits"])


def trained(folder, bits):
    """The network as its last checkpoint has it."""
    config = quanos.preset("smoke")
    model = quanos.build(config, digits8("test"), 0, bits)
    load_weights(model, load_checkpoint(folder / "checkpoints").folder / "model.safetensors")
    return model.eval()


def test_the_folder_holds_what_a_run_promises(run):
    assert {file.name for file in run.iterdir()} == {
        "config.yaml",
        "report.json",
        "report.md",
        "ans.png",
        "bits.png",
        "energy.png",
        "epsilon.png",
        "initial",
        *NETWORKS,
    }
    results = report.read(run).results
    assert {r.n for r in results} == {2} and {r.published for r in results} == {None}
    text = (run / "report.md").read_text()
    assert "this library's definitions: the paper's text was not at hand" in text
    assert "Energies are a model, not a measurement (SP: physical, subword_parallel, alpha=0.1" in text


def test_widths_follow_the_rule_and_the_recorded_sensitivity(run):
    for seed in SEEDS:
        (first,) = rows(run / f"initial/seed-{seed}")
        sensitivity = {k.removeprefix("ans_32/"): float(v) for k, v in first.items() if k.startswith("ans_32/")}
        names = list(sensitivity)
        inner = {n: sensitivity[n] for n in names[1:-1]}
        for network in ("inverse", "inverse+fgsm"):
            bits = bits_of(run / f"{network}/seed-{seed}")
            assert bits == {**assign_bits(inner, "inverse"), names[0]: 16, names[-1]: 16}
        weights = {
            n: m.weight.numel() for n, m in weight_layers(quanos.build(quanos.SMOKE, digits8("test"), 0)).items()
        }
        memory = {
            n: sum(weights[k] * b for k, b in bits_of(run / f"{n}/seed-{seed}").items())
            for n in ("inverse", "iso_inverse")
        }
        assert 0 <= memory["inverse"] - memory["iso_inverse"] < max(weights.values())
        assert bits_of(run / f"float32/seed-{seed}") is None


@pytest.mark.parametrize("network", NETWORKS[1:])
def test_packed_weights_on_disk_are_the_network_and_as_small_as_reported(run, network):
    found = report.read(run)
    ratios = []
    for seed in SEEDS:
        folder = run / f"{network}/seed-{seed}"
        bits = bits_of(folder)
        model, images = trained(folder, bits), digits8("test").images.float() / 255
        other = quanos.build(quanos.SMOKE, digits8("test"), 9, bits).eval()
        load_packed_state(other, load_file(folder / "packed.safetensors"))
        with torch.no_grad():
            assert torch.equal(other(images).argmax(1), model(images).argmax(1))
        with open(folder / "packed.safetensors", "rb") as file:  # what the bytes of the file say, not the library
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        spans = [v["data_offsets"] for k, v in header.items() if k.endswith("weight_words")]
        weights = sum(m.weight.numel() for m in weight_layers(model).values())
        ratios.append(4 * weights / sum(stop - start for start, stop in spans))
        costs = hardware.layer_costs(model, images[:1])
        assert ratios[-1] == pytest.approx(hardware.compression(costs, stored=True), rel=0.05)  # rows padded to words
        assert ratios[-1] <= hardware.compression(costs, stored=True) <= hardware.compression(costs)
    assert found[f"{network}/stored_compression_32"].value == pytest.approx(sum(ratios) / 2, rel=1e-9)


@pytest.mark.parametrize("network", NETWORKS[1:])
def test_integer_inference_equals_the_fake_quantised_graph_of_the_trained_network(run, network):
    """Each layer on the input it gets in inference; a code behind it may flip where a sum falls on a border."""
    for seed in SEEDS:
        folder = run / f"{network}/seed-{seed}"
        model, seen = trained(folder, bits_of(folder)), {}
        for layer in weight_layers(model).values():
            layer.register_forward_hook(lambda m, i, o: seen.__setitem__(m, (i[0], o)))
        images = digits8("test").images.float() / 255
        with torch.no_grad():
            integers = model(images)
        assert len(seen) == 5
        for layer, (x, y) in list(seen.items()):
            wanted = copy.deepcopy(layer).double()
            wanted._forward_hooks.clear()
            wanted = wanted(x.double().requires_grad_()).detach()
            assert (y - wanted).abs().max() <= 1e-6 * wanted.abs().max()
        fake = model(images.requires_grad_())
        assert (fake.argmax(1) == integers.argmax(1)).float().mean() > 0.99


def test_energies_and_compression_are_those_of_the_widths(run):
    found = report.read(run)
    for mode in ("subword_parallel", "data_gating"):
        against = [found[f"inverse/efficiency_{mode}_{baseline}"].value for baseline in (16, 8)]
        assert against[0] > 1 and against[0] / against[1] == pytest.approx(1 / hardware.MacEnergy(mode=mode).energy(8))
    assert found["float32/compression_32"].value == 1
    layers = [r.name.rpartition("/")[2] for r in found.results if r.name.startswith("inverse/bits/")]
    mean = sum(bits_of(run / "inverse/seed-0").values()) + sum(bits_of(run / "inverse/seed-1").values())
    assert sum(found[f"inverse/bits/{name}"].value for name in layers) == pytest.approx(mean / 2)


def test_what_shows_at_this_scale(run):
    """Training works at every width, attacks bite, adversarial training helps; whether a rule helps is not asserted."""
    found = report.read(run)
    for network in NETWORKS:
        assert found[f"{network}/accuracy"].value > 85
        assert found[f"{network}/worst_32"].value < found[f"{network}/noise_32"].value - 20
        for attack in ("fgsm_32", "pgd_32", *(() if network == "float32" else ("unclipped_32", "transfer_32"))):
            assert found[f"{network}/worst_32"].value <= found[f"{network}/{attack}"].value + 1e-9
    assert found["inverse+fgsm/worst_32"].value > found["inverse/worst_32"].value + 10
    assert found["iso_inverse/ans_32_rank_correlation"].value > 0.5


def test_killed_and_run_again_is_undisturbed(run, tmp_path):
    """Killed in a network with widths: the same command finds them again and ends with the same figures."""
    arguments = [
        "run",
        "quanos",
        "--preset",
        "smoke",
        "--seeds",
        "[0]",
        "--networks",
        "[float32,inverse]",
        "--out",
        str(tmp_path),
    ]
    path = os.pathsep.join([str(Path(pyaccel.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-m", "pyaccel", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    with process:
        for line in process.stderr:
            if line.startswith("inverse, seed 0: epoch 1/"):
                process.send_signal(signal.SIGTERM)
                break
        assert process.wait(60) == 143
    assert not (tmp_path / "report.json").exists()
    assert main(arguments) == 0
    for part in ("initial/seed-0", "float32/seed-0", "inverse/seed-0"):
        assert rows(tmp_path / part) == rows(run / part), part
    events = [json.loads(line)["event"] for line in (tmp_path / "inverse/seed-0/log.jsonl").read_text().splitlines()]
    assert events.count("start") == 1 and "resume" in events and events.count("metrics") == 2


@pytest.mark.parametrize("model", ["resnet18", pytest.param("vgg19", marks=pytest.mark.slow)])
def test_networks_of_the_paper_with_two_rounds_on_the_layout_of_cifar10(tmp_path, model):
    data = tmp_path / "cifar"
    data.mkdir()
    noise = np.random.default_rng(0)
    for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
        records = noise.integers(0, 256, (12, 3073), dtype=np.uint8)
        records[:, 0] %= 10
        records.tofile(data / name)
    arguments = [
        "run",
        "quanos",
        "--data",
        str(data),
        "--model",
        model,
        "--width",
        "0.125",
        "--epochs",
        "3",
        "--rounds",
        "2",
        "--batch_size",
        "20",
        "--networks",
        "[float32,inverse+pgd]",
        "--seeds",
        "[0]",
        "--ans_images",
        "20",
        "--attack_images",
        "8",
        "--pgd_steps",
        "2",
        "--train_steps",
        "2",
        "--lr",
        "0.01",
        "--io_bits",
        "null",
        "--out",
        str(tmp_path / "run"),
    ]
    assert main(arguments) == 0
    found = report.read(tmp_path / "run")
    first, second = (bits_of_row(tmp_path / "run", part) for part in ("initial", "inverse+pgd/round-1"))
    bits = bits_of(tmp_path / "run/inverse+pgd/seed-0")
    assert bits == assign_bits(second, "inverse", initial=assign_bits(first, "inverse"))
    assert len(bits) == {"resnet18": 21, "vgg19": 17}[model] and min(bits.values()) == 2
    assert found["inverse+pgd/compression_32"].value > 2
    text = (tmp_path / "run/report.md").read_text()
    assert "2 rounds" in text and "The rule assigns every layer." in text and "One seed: no spread is known" in text


def bits_of_row(folder, part):
    last = rows(folder / part / "seed-0")[-1]
    return {k.removeprefix("ans_8/"): float(v) for k, v in last.items() if k.startswith("ans_8/")}


def test_wrong_configurations_are_named_before_anything_is_written(tmp_path):
    smoke = quanos.preset("smoke")
    for change, text in [
        (dict(networks=("bits8",)), "float32 must be among them"),
        (dict(networks=("float32", "bits17")), r"expected float32, bitsN \(1..16\), .* got 'bits17'"),
        (dict(networks=("float32", "inverse+cw")), "got 'inverse\\+cw'"),
        (dict(epochs=1), "leaves nothing of 1 epochs"),
        (dict(least_bits=9, initial_bits=8), "expected 1 <= least_bits <= initial_bits <= 16, got 9 and 8"),
        (dict(mean=(0.5,)), r"takes pixels in \[0, 1\]; leave both at None"),
        (dict(ans_eps=(0.0,)), "ans_eps must be positive"),
        (dict(pgd_steps=0), "pgd_steps must be at least 1"),
        (dict(quantizer="ternary"), "quantizer"),
        (dict(io_bits=17), "io_bits"),
        (dict(ans_ratio="mean"), "ans_ratio"),
        (dict(quantizer="signed_zero", least_bits=1), "signed_zero"),
    ]:
        with pytest.raises(ValueError, match=text):
            quanos.run(replace(smoke, **change), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="unknown preset 'tiny'"):
        quanos.preset("tiny")
    assert quanos.preset("desk", "digits").model == "vgg5" and quanos.preset("desk").model == "vgg11"
    assert quanos.preset("paper").model == "vgg19"
