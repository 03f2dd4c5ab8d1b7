"""Real processes, really killed."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import pyaccel
from pyaccel.training import list_checkpoints
from pyaccel.training.log import TIME_COLUMNS, RunLog

SCRIPT = Path(__file__).with_name("tiny_run.py")


def outcome(out):
    """SHA-256 of the final weights, and the metrics."""
    weights = list_checkpoints(out / "checkpoints")[0] / "model.safetensors"
    with RunLog(out) as log:
        rows = [{name: value for name, value in row.items() if name not in TIME_COLUMNS} for row in log.rows]
    return hashlib.sha256(weights.read_bytes()).hexdigest(), rows


def start_and_signal(out, step, number):
    """Run the script, send the signal while it is inside the given step, return its exit code."""
    path = os.pathsep.join([str(Path(pyaccel.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen([sys.executable, str(SCRIPT), str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               text=True, env={**os.environ, "PYTHONPATH": path})
    with process:
        for begun in range(1, step + 1):
            assert process.stdout.readline() == "step\n"
            if begun == step:
                os.kill(process.pid, number)
            if begun < step or number != signal.SIGKILL:
                process.stdin.write("\n")
                process.stdin.flush()
        return process.wait(60)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
def test_killed_and_resumed_is_undisturbed(tiny, tmp_path, number, code):
    step = random.SystemRandom().randint(2, 14)
    assert start_and_signal(tmp_path / "killed", step, number) == code, f"step {step}"
    saved = [int(path.name.removeprefix("step-")) for path in list_checkpoints(tmp_path / "killed" / "checkpoints")]
    if number == signal.SIGTERM:
        assert saved[0] == step
    else:
        # A checkpoint every 3 steps; the last one may have been on its way to the disk.
        assert step - 6 <= max(saved, default=0) < step, f"step {step}"
    tiny.trainer(tmp_path / "killed").fit()
    tiny.trainer(tmp_path / "whole").fit()
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole"), f"step {step}"
