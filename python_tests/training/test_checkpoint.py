from __future__ import annotations

import json
import os
import resource
import shutil
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn

from pyaccel.training import (CheckpointError, best_checkpoint, capture_rng, checkpoint, list_checkpoints,
                              load_checkpoint, restore, save_checkpoint)

FILES = ("model.safetensors", "state.pt", "meta.json")


def net(value=0.0, width=3):
    model = nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width))
    nn.init.constant_(model[0].weight, value)
    return model


def save(folder, step, *, value=None, **options):
    model = net(float(step) if value is None else value)
    return save_checkpoint(folder, model=model, position={"step": step}, **options)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def sign(folder, meta):
    """Write meta.json with hashes that fit, as somebody who knows the format would."""
    for name, entry in meta["files"].items():
        entry.update(bytes=(folder / name).stat().st_size, sha256=checkpoint._sha256(folder / name))
    meta["sha256"] = checkpoint._meta_digest(meta)
    (folder / "meta.json").write_text(json.dumps(meta))


@contextmanager
def file_size_limit(size):
    """No file can grow beyond `size` bytes: what a full disk looks like, with the operating system's own error."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def trained(optimizer_class, **options):
    torch.manual_seed(0)
    model = net()
    optimizer = optimizer_class(model.parameters(), **options)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 3], 0.5)
    return model, optimizer, scheduler


def steps(model, optimizer, scheduler, count):
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.randn(8, 2)).pow(2).sum().backward()
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(("kind", "options"), [(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
                                               (torch.optim.Adam, {"lr": 0.01, "amsgrad": True}),
                                               (torch.optim.AdamW, {"lr": 0.01, "foreach": True})])
def test_everything_comes_back(tmp_path, kind, options):
    first = trained(kind, **options)
    steps(*first, 2)
    generator = np.random.default_rng(5)
    position = {"step": 2, "epoch": 1, "best": np.float64(0.5), "sum": torch.tensor(1 / 3, dtype=torch.float64)}
    save_checkpoint(tmp_path, model=first[0], optimizer=first[1], scheduler=first[2], position=position,
                    config={"lr": 0.1, "sizes": (1, 2)}, rng=[capture_rng(generator)])
    expected = generator.random(3)
    steps(*first, 3)

    second = trained(kind, **options)
    loaded = load_checkpoint(tmp_path)
    for _ in range(2):  # Restoring must leave the loaded checkpoint as it was.
        np.testing.assert_array_equal(generator.random(3) == expected, False)
        position = restore(loaded, *second, generator=generator)
        np.testing.assert_array_equal(generator.random(3), expected)
        assert position == {"step": 2, "epoch": 1, "best": 0.5, "sum": torch.tensor(1 / 3, dtype=torch.float64)}
        steps(*second, 3)
        for name, tensor in first[0].state_dict().items():
            assert torch.equal(tensor, second[0].state_dict()[name]), name
        assert first[2].state_dict() == second[2].state_dict()
        torch.testing.assert_close(first[1].state_dict(), second[1].state_dict(), rtol=0, atol=0)
    assert loaded.step == 2 and loaded.config == {"lr": 0.1, "sizes": [1, 2]}
    assert loaded.meta["versions"]["torch"] == torch.__version__


def test_state_loads_without_running_code(tmp_path):
    model, optimizer, scheduler = trained(torch.optim.Adam)
    steps(model, optimizer, scheduler, 1)
    folder = save_checkpoint(tmp_path, model=model, optimizer=optimizer, scheduler=scheduler, position={"step": 1})
    state = torch.load(folder / "state.pt", weights_only=True)
    assert state["optimizer"]["state"].keys() == optimizer.state_dict()["state"].keys()
    assert names(folder) == sorted(FILES)


def test_scaler_state(tmp_path):
    class Scaler:  # torch's own needs a GPU to be enabled.
        scale = 1.0

        def state_dict(self):
            return {"scale": self.scale}

        def load_state_dict(self, state):
            self.scale = state["scale"]

    scaler = Scaler()
    scaler.scale = 4.0
    save_checkpoint(tmp_path, model=net(), scaler=scaler, position={"step": 1})
    fresh = Scaler()
    restore(load_checkpoint(tmp_path), net(), scaler=fresh)
    assert fresh.scale == 4.0


def test_keep_counts_the_newest_and_the_best(tmp_path):
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step, keep=2, best=step in (1, 2))
    assert names(tmp_path) == ["step-00000002", "step-00000004", "step-00000005"]
    assert best_checkpoint(tmp_path).name == "step-00000002"
    save(tmp_path, 6, keep=1, best=True)
    assert names(tmp_path) == ["step-00000006"]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000006"]


def test_keep_is_at_least_one(tmp_path):
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        save(tmp_path, 1, keep=0)


def test_a_save_never_removes_what_it_has_just_written(tmp_path):
    save(tmp_path, 9)
    save(tmp_path, 5, keep=1)
    assert names(tmp_path) == ["step-00000005", "step-00000009"]


def test_leftovers_are_removed_by_the_next_save(tmp_path):
    (tmp_path / "step-00000007.tmp").mkdir(parents=True)
    (tmp_path / "step-00000007.tmp" / "state.pt").write_bytes(b"half")
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load_checkpoint(tmp_path)
    save(tmp_path, 8)
    assert names(tmp_path) == ["step-00000008"]


def test_more_than_eight_digits_sort_as_numbers(tmp_path):
    for step in (99_999_999, 100_000_000):
        save(tmp_path, step)
    assert load_checkpoint(tmp_path).step == 100_000_000


def truncate(file):
    file.write_bytes(file.read_bytes()[:-20])
    return "damaged" if file.name == "meta.json" else "truncated"


def flip(file):
    content = bytearray(file.read_bytes())
    content[content.index(b"step") if file.name == "meta.json" else len(content) // 2] ^= 1
    file.write_bytes(content)
    return "damaged|hash differs"


def remove(file):
    file.unlink()
    return "missing"


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [truncate, flip, remove])
def test_damage_is_named_and_the_older_checkpoint_used(tmp_path, name, damage):
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    problem = damage(newest / name)
    with pytest.raises(CheckpointError, match=rf"step 2 in .*step-00000002: {name}: .*({problem})"):
        load_checkpoint(newest)
    with pytest.warns(UserWarning, match=rf"falling back to the checkpoint of step 1: .*step 2 .*{name}") as caught:
        loaded = load_checkpoint(tmp_path)
    assert len(caught) == 1
    assert loaded.step == 1 and loaded.tensors["0.weight"].unique().item() == 1.0
    damage(tmp_path / "step-00000001" / name)
    with pytest.raises(CheckpointError, match=r"no sound checkpoint: .*step 2.*step 1"):
        load_checkpoint(tmp_path)


def test_no_bit_of_meta_can_change_its_meaning(tmp_path):
    folder = save(tmp_path, 3, config={"lr": 1e-5, "name": "a b", "on": True, "ü": None})
    file = folder / "meta.json"
    content = file.read_bytes()
    truth = checkpoint._read_meta(folder)
    refused = 0
    bits = range(0, 8 * len(content), 3)
    for bit in bits:
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        file.write_bytes(changed)
        try:
            assert checkpoint._read_meta(folder) == truth
        except CheckpointError:
            refused += 1
    assert refused > 0.98 * len(bits)  # What is left: 1e-05 or 1E-05, upper or lower case after \u.


def test_unknown_format_version(tmp_path):
    folder = save(tmp_path, 1)
    meta = json.loads((folder / "meta.json").read_text())
    sign(folder, meta | {"format": 7})
    with pytest.raises(CheckpointError, match="meta.json: unknown format version 7, this pyaccel reads 1"):
        load_checkpoint(folder)


def test_renamed_step_folder(tmp_path):
    save(tmp_path, 1).rename(tmp_path / "step-00000002")
    with pytest.raises(CheckpointError, match="says step 1, the folder's name another"):
        load_checkpoint(tmp_path / "step-00000002")
    (tmp_path / "step-00000002").rename(tmp_path / "chosen")  # Any other name is the user's own affair.
    assert load_checkpoint(tmp_path / "chosen").step == 1


def test_a_file_in_place_of_a_folder(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "step-00000002").write_text("")
    with pytest.raises(CheckpointError, match="not a folder"):
        load_checkpoint(tmp_path / "step-00000002")
    with pytest.warns(UserWarning, match="not a folder"):
        assert load_checkpoint(tmp_path).step == 1


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load_checkpoint(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "step-00000001")


class Hostile:
    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return os.mkdir, (self.file,)


def test_hostile_pickle_is_refused_although_its_hash_fits(tmp_path):
    folder = save(tmp_path / "run", 1)
    meta = json.loads((folder / "meta.json").read_text())
    torch.save({"optimizer": Hostile(tmp_path / "pwned")}, folder / "state.pt")
    sign(folder, meta)
    with pytest.raises(CheckpointError, match=r"state.pt: refused, it holds pickled objects or code"):
        load_checkpoint(folder)
    assert not (tmp_path / "pwned").exists()
    torch.load(folder / "state.pt", weights_only=False)  # Control: the attack works where it is let in.
    assert (tmp_path / "pwned").exists()


def test_full_disk_leaves_the_earlier_checkpoints(tmp_path):
    save(tmp_path, 1)
    big = nn.Linear(200, 200)
    optimizer = torch.optim.SGD(big.parameters(), 0.1, momentum=0.9)
    big(torch.ones(1, 200)).sum().backward()
    optimizer.step()
    for limit, model in ((100_000, big), (20_000, nn.Linear(2, 2))):  # The weights do not fit; the rest does not fit.
        with file_size_limit(limit), pytest.raises(OSError, match=(
                r"checkpoint of step 2 could not be written in .*File too large; earlier checkpoints are untouched")):
            save_checkpoint(tmp_path, model=model, optimizer=optimizer, position={"step": 2}, keep=1)
        assert names(tmp_path) == ["step-00000001"]
    assert load_checkpoint(tmp_path).step == 1
    save_checkpoint(tmp_path, model=big, optimizer=optimizer, position={"step": 2}, keep=1)
    assert load_checkpoint(tmp_path).step == 2


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("step", [1, 2])
def test_death_at_any_point_of_a_save(tmp_path, step):
    """The process ends before its i-th action on the disk, for every i; step 1 replaces the checkpoint there is."""
    for action in range(100):
        folder = tmp_path / str(action)
        save(folder, 1, keep=1)
        child = os.fork()
        if child == 0:
            try:
                count, delete = iter(range(100)), shutil.rmtree

                def before(function):
                    def call(*args, **options):
                        if next(count) == action:
                            if function is delete and (rest := sorted(args[0].glob("*"))):
                                rest[0].unlink()  # Death in the middle of a deletion.
                            os._exit(9)
                        return function(*args, **options)
                    return call

                os.rename, os.fsync = before(os.rename), before(os.fsync)
                os.mkdir, shutil.rmtree = before(os.mkdir), before(delete)
                save(folder, step, value=5.0, keep=1)
                os._exit(0)
            finally:
                os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, 9)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded = load_checkpoint(folder)
        for path in list_checkpoints(folder):  # Half deleted ones are no longer among them.
            load_checkpoint(path)
        value = loaded.tensors["0.weight"].unique().item()
        assert (loaded.step, value) in ((1, 1.0), (step, 5.0))
        if status == 0:
            break
        save(folder, 3, keep=1)
        assert names(folder) == ["step-00000003"]
    assert action > 6 and (loaded.step, value) == (step, 5.0) and names(folder) == [f"step-{step:08d}"]


def test_the_checkpoint_between_two_renames_is_found_and_replaced(tmp_path):
    save(tmp_path, 4).rename(tmp_path / "step-00000004.old")
    assert load_checkpoint(tmp_path).step == 4
    save(tmp_path, 4, value=7.0)
    assert names(tmp_path) == ["step-00000004"]
    assert load_checkpoint(tmp_path).tensors["0.weight"].unique().item() == 7.0


def test_undeletable_old_checkpoint_does_not_end_the_run(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def refuse(path):
        raise PermissionError(f"not allowed: {path}")

    monkeypatch.setattr(checkpoint, "_remove", refuse)
    with pytest.warns(UserWarning, match="step-00000001 could not be removed: not allowed"):
        save(tmp_path, 2, keep=1)
    assert load_checkpoint(tmp_path).step == 2


def test_later_checkpoints_are_set_aside(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, keep=9)
    (tmp_path / "step-00000003.aside").mkdir()
    checkpoint.set_aside_after(tmp_path, 1)
    assert names(tmp_path) == ["step-00000001", "step-00000002.aside", "step-00000003.aside"]
    assert load_checkpoint(tmp_path).step == 1


def test_what_does_not_fit_is_named_before_anything_changes(tmp_path):
    model, optimizer, _ = trained(torch.optim.SGD, lr=0.1)
    save_checkpoint(tmp_path, model=model, optimizer=optimizer, position={"step": 1})
    loaded = load_checkpoint(tmp_path)
    other = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(1, 1, bias=False))
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(ValueError) as error:
        restore(loaded, other)
    text = str(error.value)
    assert "step 1" in text and "does not fit Sequential" in text
    assert "not in the file: 2.weight" in text and "not in the model: 1.bias, 1.weight" in text
    assert "0.weight (file float32 [3, 2], model float32 [4, 2])" in text
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
    with pytest.raises(ValueError, match="expected the state of optimizer Adam, the checkpoint holds SGD"):
        restore(loaded, model, torch.optim.Adam(model.parameters()))
    with pytest.raises(ValueError, match="expected the state of scheduler StepLR, the checkpoint holds none"):
        restore(loaded, model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1))


def test_what_cannot_be_saved_is_named_and_nothing_is_written(tmp_path):
    with pytest.raises(TypeError, match=r"position.list\[1\]: a checkpoint holds .*, got object"):
        save_checkpoint(tmp_path, model=net(), position={"step": 1, "list": [0, object()]})
    with pytest.raises(TypeError, match="config: expected .*PosixPath"):
        save_checkpoint(tmp_path, model=net(), position={"step": 1}, config={"path": tmp_path})
    with pytest.raises(ValueError, match=r"position must hold the number of finished steps as 'step', got \['epoch'\]"):
        save_checkpoint(tmp_path, model=net(), position={"epoch": 1})
    assert names(tmp_path) == []
