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


class FiveImages:
    """A data set of five random 4x4 images, of three classes."""

    classes, shape = ["a", "b", "c"], (1, 4, 4)

    def __len__(self):
        return 5

    def batch(self, ids):
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (5, 1, 4, 4), generator=generator, dtype=torch.uint8)
        return images[ids], torch.tensor([0, 1, 2, 0, 1])[ids]


@pytest.fixture
def five_images():
    return FiveImages()
