"""Prints the tables that the benchmarks collect, with the machine and the command that repeats them."""

from __future__ import annotations

import json
import platform
import sys
from datetime import date
from pathlib import Path

import pytest
import torch

from pyaccel import extension

TABLES: dict[str, list[dict]] = {}


def pytest_addoption(parser):
    parser.addoption("--results", metavar="FOLDER", help="also write the tables as JSON and Markdown into this folder")
    parser.addoption("--quick", action="store_true", help="few rounds and no torch.compile: to see that it runs")
    parser.addoption("--bench-device", default="cpu", help="cpu or cuda")


@pytest.fixture
def table(request):
    """A list of rows (dicts) that is printed under the name of the test."""
    return TABLES.setdefault(request.node.originalname, [])


@pytest.fixture
def quick(request) -> bool:
    return request.config.getoption("--quick")


@pytest.fixture
def device(request) -> torch.device:
    return torch.device(request.config.getoption("--bench-device"))


def machine() -> dict:
    info = extension._C.build_info() if extension._C else {}
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.machine())
    return {
        "date": date.today().isoformat(),
        "processor": cpu,
        "threads": torch.get_num_threads(),
        "isa": info.get("isa"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "pyaccel": info.get("version"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "command": "pytest " + " ".join(sys.argv[1:]),
    }


def markdown(rows: list[dict]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))

    def cell(value) -> str:
        return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)

    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(cell(row.get(c)) for c in columns) + " |" for row in rows])


def pytest_terminal_summary(terminalreporter, config):
    if not TABLES:
        return
    facts = machine()
    terminalreporter.section("pyaccel benchmarks")
    terminalreporter.write_line(", ".join(f"{k} {v}" for k, v in facts.items() if v is not None))
    for name, rows in TABLES.items():
        terminalreporter.write_line(f"\n{name}\n{markdown(rows)}")
    folder = config.getoption("--results")
    if folder:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"{facts['date']}_{'cuda' if facts['gpu'] else 'cpu'}_" + "_".join(sorted(TABLES))[:80]
        (folder / f"{stem}.json").write_text(json.dumps({"machine": facts, "tables": TABLES}, indent=1))
        text = "\n\n".join(f"## {name}\n\n{markdown(rows)}" for name, rows in TABLES.items())
        head = "\n".join(f"- {k}: {v}" for k, v in facts.items() if v is not None)
        (folder / f"{stem}.md").write_text(f"# Benchmark record\n\n{head}\n\n{text}\n")
