"""Several processes that are one run: the same numbers, kills of any of them, another number of them."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import pyaccel
from pyaccel.training import list_checkpoints

SCRIPT = Path(__file__).with_name("ranks_run.py")


def launch(out, processes, restarts=0, **options):
    """Run the script under torchrun (alone: by itself); its exit code and its error output."""
    path = os.pathsep.join([str(Path(pyaccel.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    runner = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
              "--max-restarts", str(restarts)]  # fmt: skip
    command = [sys.executable, *(runner if processes > 1 else []), str(SCRIPT), str(out), json.dumps(options)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, timeout=120,
                          capture_output=True, text=True, check=False)  # fmt: skip
    return done.returncode, done.stderr


def weights(out):
    return load_file(list_checkpoints(out / "checkpoints")[0] / "model.safetensors")


def seen(out):
    """What every rank saw at the end."""
    return json.loads((out / "seen.json").read_text())


def largest_difference(ours, theirs):
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Folders of undisturbed runs of 1, 2 and 4 processes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for processes in (1, 2, 4):
        code, error = launch(folder / str(processes), processes)
        assert code == 0, error
    return folder


def test_any_number_of_processes_trains_the_same_network(undisturbed):
    alone = weights(undisturbed / "1")
    rows = [row | {"processes": n} for n in (1, 2, 4) for row in seen(undisturbed / str(n))[0]["rows"]]
    for processes in (2, 4):
        assert largest_difference(weights(undisturbed / str(processes)), alone) < 1e-10
        ranks = seen(undisturbed / str(processes))
        assert len(ranks) == processes and all(rank == ranks[0] for rank in ranks)  # also the weights, to the bit
    for epoch in (1, 2):
        ours = [row for row in rows if row["epoch"] == epoch]
        assert [row["eval_n"] for row in ours] == [7, 7, 7]  # 4 ranks: each image counts once, some ranks have none
        assert len({row["eval_accuracy"] for row in ours}) == len({row["train_accuracy"] for row in ours}) == 1
        for name, most in (("train_loss", 1e-10), ("eval_loss", 1e-6)):  # the latter is taken in float32
            assert max(row[name] for row in ours) - min(row[name] for row in ours) < most


def test_parts_of_a_batch_add_up(undisturbed, tmp_path):
    for processes, accumulate in ((1, 3), (2, 2)):
        out = tmp_path / str(processes)
        assert launch(out, processes, accumulate=accumulate)[0] == 0
        assert largest_difference(weights(out), weights(undisturbed / "1")) < 1e-10


def test_a_killed_rank_is_restarted_to_the_same_bits(tmp_path):
    """Dropout draws from torch's generator, whose state of each rank must come back."""
    assert launch(tmp_path / "whole", 4, dropout=0.3)[0] == 0
    step, rank = random.SystemRandom().randint(3, 12), random.SystemRandom().randrange(4)
    code, error = launch(tmp_path / "killed", 4, restarts=1, dropout=0.3, die=[step, rank, signal.SIGKILL])
    assert code == 0 and (tmp_path / "killed" / "died").exists(), error
    assert largest_difference(weights(tmp_path / "killed"), weights(tmp_path / "whole")) == 0.0, (step, rank)
    first, second = json.loads((tmp_path / "killed" / "seen.json").read_text())[:2]
    assert first["weights"] == second["weights"]


def test_a_signal_to_one_rank_stops_all_and_another_world_goes_on(undisturbed, tmp_path):
    code, error = launch(tmp_path, 2, die=[5, 1, signal.SIGTERM])
    assert code != 0 and "143" in error, error
    assert list_checkpoints(tmp_path / "checkpoints")[0].name == "step-00000005"
    assert launch(tmp_path, 1)[0] == 0
    assert largest_difference(weights(tmp_path), weights(undisturbed / "1")) < 1e-10
    (text,) = seen(tmp_path)[0]["warned"]
    assert text.startswith("the run was saved by 2 processes and goes on with 1: batches hold the same images")


