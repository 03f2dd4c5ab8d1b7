from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    """The run folder of `pyaccel run bntt --preset smoke`, run once for all tests."""
    pytest.importorskip("sklearn")
    pytest.importorskip("jsonargparse")
    from pyaccel.cli import main

    out = tmp_path_factory.mktemp("smoke") / "run"
    assert main(["run", "bntt", "--preset", "smoke", "--out", str(out)]) == 0
    return out
