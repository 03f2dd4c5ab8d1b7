"""A spiking network whose parameters are sharded by FSDP2 trains like the plain one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyaccel

SCRIPT = Path(__file__).with_name("fsdp_run.py")


def test_two_shards_train_like_the_whole(tmp_path):
    path = os.pathsep.join([str(Path(pyaccel.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    runner = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *runner, str(SCRIPT), str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, timeout=120,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for seen in ranks:
        assert seen["difference"] <= 1e-10 and seen["statistics"] <= 1e-10
        assert seen["moved"] > 1e-3  # it trained
        assert seen["apart"] > 1e-6  # statistics of half a batch each are another network
        assert seen["held"] < 0.6 * seen["whole"]
    assert sum(seen["held"] for seen in ranks) == ranks[0]["whole"]
