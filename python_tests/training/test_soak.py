"""A long run: its memory stays flat, its log has no gap, and it can be resumed at its end.

PYACCEL_SOAK_MINUTES says how long (60 without it); `-m slow` selects the long one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import pyaccel
from pyaccel.training import list_checkpoints, load_checkpoint

SCRIPT = Path(__file__).with_name("soak_run.py")
STEPS_AN_EPOCH = 16


def resident(pid: int) -> int:
    """Bytes of memory that a process holds now."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def counts(pid: int) -> tuple[int, int]:
    """Open files and threads of a process."""
    return len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task"))


def soak(out: Path, seconds: float, every: float) -> list[tuple[float, int, int, int]]:
    """Run the script; (seconds, bytes, files, threads) as they were while it ran."""
    path = os.pathsep.join([str(Path(pyaccel.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    started, seen = time.monotonic(), []
    with open(out / "errors.txt", "w") as errors:
        process = subprocess.Popen([sys.executable, str(SCRIPT), str(out / "run"), str(seconds)], stderr=errors,
                                   stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": path})  # fmt: skip
        try:
            while process.poll() is None:
                time.sleep(every)
                try:
                    held = resident(process.pid), *counts(process.pid)
                except (FileNotFoundError, ProcessLookupError):
                    break  # it has just ended
                if held[0]:  # nothing is left of one that has ended and was not waited for
                    seen.append((time.monotonic() - started, *held))
            code = process.wait(120)
        finally:
            process.kill()
    assert code == 0, (out / "errors.txt").read_text()[-2000:]
    return seen


def check_log(run: Path) -> tuple[int, int]:
    """Every step that should be logged is, once and in order, as is every epoch; (steps, epochs)."""
    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    steps = [e["step"] for e in events if e["event"] == "step"]
    assert steps == list(range(10, 10 * len(steps) + 1, 10))
    epochs = [line.split(",")[0] for line in (run / "metrics.csv").read_text().splitlines()[1:]]
    assert [int(e) for e in epochs] == list(range(1, len(epochs) + 1))
    assert STEPS_AN_EPOCH * len(epochs) - 10 < steps[-1] <= STEPS_AN_EPOCH * len(epochs)
    return STEPS_AN_EPOCH * len(epochs), len(epochs)


def report(seen, steps: int, epochs: int) -> str:
    lines = [f"{steps} steps, {epochs} epochs, {seen[-1][0]:.0f} s"]
    lines += [f"  {t:7.0f} s  {size / 2**20:8.1f} MiB  {files} files  {threads} threads"
              for t, size, files, threads in seen[:: max(1, len(seen) // 12)]]  # fmt: skip
    return "\n".join(lines)


def finish(out: Path, seen) -> None:
    steps, epochs = check_log(out / "run")
    print(report(seen, steps, epochs))
    assert load_checkpoint(list_checkpoints(out / "run" / "checkpoints")[0]).step == steps
    leftovers = {path.name for path in (out / "run" / "checkpoints").iterdir()}
    assert len(leftovers) <= 3 and not any(name.endswith((".tmp", ".old")) for name in leftovers)


def test_the_watch_itself(tmp_path):
    """Seconds instead of an hour: that the script runs, and what is looked at is there."""
    seen = soak(tmp_path, 1.0, 0.3)
    finish(tmp_path, seen)
    assert all(size > 2**20 and files > 2 and threads >= 1 for _, size, files, threads in seen)


@pytest.mark.slow
def test_memory_is_flat_and_the_log_continuous(tmp_path):
    """After a sixth of the time the process holds no more memory, files or threads: 2 % and 8 MiB are allowed."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("no /proc here")
    minutes = float(os.environ.get("PYACCEL_SOAK_MINUTES", "60"))
    seen = soak(tmp_path, 60 * minutes, min(5.0, 60 * minutes / 60))
    finish(tmp_path, seen)
    start = max(1, len(seen) // 6)
    early, late = seen[: 2 * start][start:], seen[-start:]
    most_early, most_late = max(size for _, size, *_ in early), max(size for _, size, *_ in late)
    assert most_late <= 1.02 * most_early + 8 * 2**20, report(seen, 0, 0)
    assert max(files for *_, files, _ in late) <= max(files for *_, files, _ in early) + 1
    assert max(threads for *_, threads in late) <= max(threads for *_, threads in early) + 1
