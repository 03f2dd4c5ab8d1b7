"""Every recipe's smoke preset by two processes of torchrun: one report, and the same figures a second time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pyaccel
from pyaccel.recipes import RECIPES

pytestmark = pytest.mark.slow


def launch(recipe: str, out: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(pyaccel.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    settings = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = ["-m", "pyaccel", "run", recipe, "--preset", "smoke", "--seeds", "[0]", "--out", str(out)]
    command = [sys.executable, *launcher, *run]
    return subprocess.run(command, env=settings, capture_output=True, text=True, timeout=400, check=False)


def results(out: Path) -> dict[str, float]:
    """Every figure of the report but times."""
    report = json.loads((out / "report.json").read_text())
    return {row["name"]: row["value"] for row in report["results"] if row["unit"] != "s"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe(recipe, tmp_path):
    done = launch(recipe, tmp_path / "run")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("The whole report:") == 1
    found = results(tmp_path / "run")
    assert found and not list((tmp_path / "run").rglob("*.tmp"))
    again = launch(recipe, tmp_path / "run")  # the networks are there: none is trained again
    assert again.returncode == 0, again.stderr[-3000:]
    assert results(tmp_path / "run") == found
