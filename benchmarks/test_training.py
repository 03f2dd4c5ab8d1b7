"""What training costs beside its arithmetic: other processes, checkpoints, batches, and the decoding of images.

Two processes against one with two threads, at the same global batch (goal: 0.9 of its throughput); the time that
training waits for a checkpoint (goal: 1 % of the default interval of 10 minutes); a step with its batch made anew
against one with a batch that is there (goal: 5 % more); images/s that a core decodes for ImageNet training. The
network is the spiking VGG9 of the desk preset of recipe `bntt`. Processes take turns; on a shared machine read the
CPU time beside the wall time.

Decoding needs `imagenet_samples.zip` in the folder that PYACCEL_TEST_DATA names, or in ../shared/data beside the
checkout.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import subprocess
import sys
import tarfile
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest
import torch
from training_rank import AUGMENT, BATCH, images, network

from pyaccel import models, recipes
from pyaccel.cli import parse_run
from pyaccel.data import Augment, Batches, open_images
from pyaccel.data.images import decoding_threads
from pyaccel.recipes import planning
from pyaccel.recipes.bntt import logits
from pyaccel.recipes.classifier import cross_entropy
from pyaccel.training.checkpoint import load_checkpoint, snapshot, write_checkpoint

pytestmark = pytest.mark.benchmark
HERE = Path(__file__).parent
INTERVAL = 600.0  # seconds between checkpoints, as the trainer has it without other wishes


# ----------------------------------------------------------------------------------------------------------- the plan


@pytest.mark.parametrize(("recipe", "fields"), [
    ("bntt", ["--norms", "[bntt]"]),
    ("bntt", ["--norms", "[shared]"]),
    ("hybrid_snn", []),
    ("net2net", []),
], ids=["bntt", "bntt, one BatchNorm", "hybrid_snn", "net2net"])  # fmt: skip
def test_plan(recipe, fields, table, quick, device):
    """What `pyaccel plan` of half a preset's batch says of the whole one, against that one; in processes of their own."""
    arguments = [recipe, "--preset", "smoke" if quick else "desk", *fields, "--device", str(device)]
    config, _, _ = parse_run(recipe, arguments[1:])
    batch = config.batch_size
    half = replace(config, batch_size=batch // 2)
    for plan in planning.plan(recipe, recipes.find(recipe).load(), half, arguments, None):
        if plan.batch != batch // 2:
            continue  # a network with a batch of its own
        found = planning.measure_apart([*arguments, "--at", str(batch), "--network", plan.network])
        memory, time = plan.memory.at(batch), plan.time.at(batch)
        table.append(
            {
                "recipe, network": f"{recipe}, {plan.network}",
                "images a batch": batch,
                "planned MiB": memory / 2**20,
                "measured MiB": found["bytes"] / 2**20,
                "planned / measured (goal 0.85 to 1.15)": memory / found["bytes"],
                "planned s": time,
                "measured s": found["seconds"],
                "planned / measured time": time / found["seconds"],
                "counted tensors of the planned batch, MiB": plan.counted.peak / 2**20,
            }
        )


# -------------------------------------------------------------------------------------------------------- two processes


def run_ranks(out: Path, processes: int, steps: int, norms: str) -> list[dict]:
    """What each rank of `training_rank.py` measured."""
    path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    settings = {**os.environ, "PYTHONPATH": path, "OMP_WAIT_POLICY": "passive"}
    launcher = []
    if processes > 1:
        settings["OMP_NUM_THREADS"] = "1"
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *launcher, str(HERE / "training_rank.py"), str(out), str(steps), norms]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_two_processes(tmp_path, table, quick, device):
    if device.type != "cpu":
        pytest.skip("compares processes on the cores of a CPU")
    kinds = {"one process, two threads": (1, "own"), "two processes": (2, "own"),
             "two processes, synchronised BNTT": (2, "sync")}  # fmt: skip
    found: dict[str, list[list[dict]]] = {name: [] for name in kinds}
    rounds, steps = (1, 4) if quick else (3, 9)
    for number in range(rounds):
        for name, (processes, norms) in kinds.items() if number % 2 == 0 else reversed(kinds.items()):
            found[name].append(run_ranks(tmp_path / f"{name} {number}", processes, steps, norms))

    def first_loss(name: str) -> float:
        ranks = found[name][0]
        return sum(rank["losses"][0] for rank in ranks) / len(ranks)

    alone, together = first_loss("one process, two threads"), first_loss("two processes, synchronised BNTT")
    assert abs(alone - together) < 1e-2 * alone  # sums in another order flip some spikes

    def of_all(name: str) -> tuple[float, float, float]:
        """Of a step: median and least wall seconds, CPU seconds of all processes; the first step is left out."""
        wall = [seconds for ranks in found[name] for seconds in ranks[0]["wall"][1:]]
        cpu = [sum(parts) for ranks in found[name] for parts in zip(*(rank["cpu"][1:] for rank in ranks), strict=True)]
        return median(wall), min(wall), median(cpu)

    base = of_all("one process, two threads")
    for name in kinds:
        wall, least, cpu = of_all(name)
        table.append({
            "run": name, "step, s": wall, "least, s": least, "CPU s": cpu, "images/s": BATCH / wall,
            "throughput": base[0] / wall, "of the least": base[1] / least, "of the CPU time": base[2] / cpu,
            "goal": 0.9,
        })  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("name", ["vgg9 at desk width", "vgg9", "resnet34, ImageNet", "vgg16, ImageNet"])
def test_checkpoint_pause(name, tmp_path, table, quick, device):
    """The training thread waits for the snapshot; files are written beside it."""
    if name.startswith("vgg9"):
        model = network(0.25 if "desk" in name else 1.0)
    else:
        model = models.build(name.split(",")[0], classes=1000, input_shape=(3, 224, 224), spiking=True, steps=4)
    model.to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # momentum to save
    pauses, writes = [], []
    for number in range(2 if quick else 5):
        start = time.perf_counter()
        taken = snapshot(model=model, optimizer=optimizer, position={"step": number})
        pauses.append(time.perf_counter() - start)
        start = time.perf_counter()
        written = write_checkpoint(tmp_path, taken)
        writes.append(time.perf_counter() - start)
    read = load_checkpoint(written).tensors
    assert all(torch.equal(read[key], value.cpu()) for key, value in model.state_dict().items())
    size = sum(file.stat().st_size for file in written.iterdir())
    pause = max(pauses)
    table.append({"network": name, "checkpoint, MB": size / 1e6, "longest pause, ms": 1e3 * pause,
                  "written in, s": median(writes),
                  "share of 10 minutes, %": 100 * pause / INTERVAL, "goal, %": 1})  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- batches


def test_batches(table, quick, device):
    """Blocks of steps take turns: with the batches of an epoch, and with one batch again and again."""
    model = network().to(device)
    loss_fn, optimizer = cross_entropy(logits), torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    source = Batches(images(), BATCH, shuffle=True, drop_last=True, augment=AUGMENT)

    def step(batch) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss_fn(model, batch)[0].backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def on_device(batch):
        return type(batch)(*(tensor.to(device, non_blocking=True) for tensor in batch))

    epoch = source.epoch(0)
    fixed = on_device(next(epoch))
    again = next(source.epoch(0))
    assert torch.equal(fixed.images.cpu(), again.images) and torch.equal(fixed.sample_ids.cpu(), again.sample_ids)
    steps, rounds = (2, 2) if quick else (8, 6)
    found: dict[str, list[tuple[float, float]]] = {"made": [], "reused": []}
    for _ in range(2):
        step(fixed)
    for number in range(rounds):
        for kind in ("made", "reused") if number % 2 == 0 else ("reused", "made"):
            wall, cpu = time.perf_counter(), time.process_time()
            for batch in itertools.islice(epoch, steps) if kind == "made" else itertools.repeat(fixed, steps):
                step(on_device(batch))
            found[kind].append(((time.perf_counter() - wall) / steps, (time.process_time() - cpu) / steps))
    epoch.close()
    walls, cpus = ({kind: median(f[i] for f in seen) for kind, seen in found.items()} for i in (0, 1))
    start = time.process_time()
    count = sum(1 for _ in itertools.islice(source.epoch(1), 20))
    alone = (time.process_time() - start) / count
    table.append({
        "step with a batch reused, s": walls["reused"], "with batches made, s": walls["made"],
        "overhead, %": 100 * (walls["made"] / walls["reused"] - 1),
        "overhead in CPU time, %": 100 * (cpus["made"] / cpus["reused"] - 1),
        "a batch made alone, CPU ms": 1e3 * alone, "of a step's CPU time, %": 100 * alone / cpus["reused"],
        "goal, %": 5,
    })  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- decoding


def samples() -> dict[str, bytes]:
    """JPEG files of ImageNet by their name in the archive; skips where they are absent."""
    home = Path(os.environ.get("PYACCEL_TEST_DATA") or HERE.parents[1] / "shared" / "data")
    archive = home / "imagenet_samples.zip"
    if not archive.exists():
        pytest.skip(f"no imagenet_samples.zip at {home}; set PYACCEL_TEST_DATA")
    with zipfile.ZipFile(archive) as file:
        return {name: file.read(name) for name in sorted(file.namelist()) if name.endswith(".JPEG")}


def write_layouts(home: Path, files: dict[str, bytes], copies: int) -> None:
    """The same images, each so often, as an image folder and as tar shards of 100 images."""
    classes = sorted({Path(name).parent.name for name in files})
    (home / "shards").mkdir(parents=True)
    (home / "shards" / "classes.txt").write_text("\n".join(classes) + "\n")
    many = [(copy, name) for copy in range(copies) for name in files]
    for number in range(0, len(many), 100):
        with tarfile.open(home / "shards" / f"set-train-{number // 100:06d}.tar", "w") as archive:
            for copy, name in many[number : number + 100]:
                label = Path(name).parent.name
                folder = home / "folder" / "train" / label
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{copy:03d}_{Path(name).name}").write_bytes(files[name])
                key = f"{label}_{copy:03d}_{Path(name).stem}"
                for suffix, content in ((".jpg", files[name]), (".cls", str(classes.index(label)).encode())):
                    entry = tarfile.TarInfo(key + suffix)
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))


def test_decoding(tmp_path, table, quick, device, monkeypatch):
    """Training batches at 224x224: random resized crop, flip; and the middle of the whole image, as for tests."""
    if device.type != "cpu":
        pytest.skip("images are decoded on the CPU")
    from PIL import Image

    files = samples()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_layouts(tmp_path, files, 2 if quick else 8)
    pixels = median(w * h for w, h in (Image.open(io.BytesIO(content)).size for content in files.values()))
    sets = {name: open_images(tmp_path / name, "train", size=224, resize=256) for name in ("folder", "shards")}
    assert len(sets["folder"]) == len(sets["shards"]) and sets["folder"].shape == (3, 224, 224)
    first = {(int(label), int(image.sum())) for image, label in sets["folder"]}
    assert first == {(int(label), int(image.sum())) for image, label in sets["shards"]}  # the same images in both
    normal = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    forms = {"random part, flip": (Augment(flip=True, resized_crop=(0.08, 1.0), **normal), True),
             "middle": (Augment(**normal), False)}  # fmt: skip
    for form, (augment, shuffle) in forms.items():
        for name, found in sets.items():
            batches = Batches(found, 50, shuffle=shuffle, drop_last=True, augment=augment)
            rates = []
            for epoch in range(2 if quick else 4):
                cpu, wall = time.process_time(), time.perf_counter()
                count = sum(len(batch.labels) for batch in batches.epoch(epoch))
                rates.append((count / (time.process_time() - cpu), count / (time.perf_counter() - wall)))
            a_core, here = (max(rate[i] for rate in rates[1:]) for i in (0, 1))
            table.append({
                "images": form, "from": name, "images/s a core": a_core, "images/s here": here,
                "threads": decoding_threads(),
                "median pixels": int(pixels), **{f"cores at {n} images/s": n / a_core for n in (250, 1000, 3000)},
            })  # fmt: skip
