from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

# Fresh interpreters import the pyaccel that these tests import: never the source folder of the current directory.
os.environ["PYTHONSAFEPATH"] = "1"


@pytest.fixture(autouse=True)
def one_thread():
    """One thread unless a test asks for more: results may not depend on it, and test machines are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def run_python():
    """Runs a script in a fresh interpreter and returns the completed process (text)."""

    def run(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
        settings = {k: v for k, v in os.environ.items() if not k.startswith("PYACCEL_")}
        return subprocess.run(
            [sys.executable, "-c", script], env=settings | environment, capture_output=True, text=True, timeout=300
        )

    return run
