from __future__ import annotations

import pytest

from pyaccel.recipes.folder import open_run, read_config, resume_from

CONFIG = {"preset": "smoke", "lr": 1e-5, "data": None, "seeds": (0, 1), "mean": [0.5]}


def test_config_is_written_as_yaml_and_read_back(tmp_path):
    out = open_run(tmp_path / "a" / "run", CONFIG)
    assert read_config(out) == {**CONFIG, "seeds": [0, 1]}
    assert (out / "config.yaml").read_text().splitlines()[0] == 'preset: "smoke"'
    assert [file.name for file in out.iterdir()] == ["config.yaml"]


def test_the_same_configuration_may_continue_and_another_may_not(tmp_path):
    open_run(tmp_path, CONFIG)
    open_run(tmp_path, {**CONFIG, "seeds": [0, 1, 2]}, free=("seeds",))
    assert read_config(tmp_path)["seeds"] == [0, 1, 2]
    with pytest.raises(ValueError, match=r"another configuration \(lr was 1e-05, is now 0.1\); choose another --out"):
        open_run(tmp_path, {**CONFIG, "lr": 0.1}, free=("seeds",))
    with pytest.raises(ValueError, match=r"seeds was \[0, 1, 2\], is now \[0\]"):
        open_run(tmp_path, {**CONFIG, "seeds": [0]})
    assert read_config(tmp_path)["lr"] == 1e-5


def test_never_refuses_a_folder_in_use(tmp_path):
    open_run(tmp_path / "run", CONFIG, resume="never")
    with pytest.raises(ValueError, match="holds an earlier run; choose another --out"):
        open_run(tmp_path / "run", CONFIG, resume="never")


def test_other_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run to resume there"):
        open_run(tmp_path / "new", CONFIG, resume=str(tmp_path / "gone"))
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="expected a folder to write the run to, it is a file"):
        open_run(tmp_path / "file", CONFIG)
    (tmp_path / "config.yaml").write_text("lr: [1\n")
    with pytest.raises(ValueError, match="config.yaml: line 1 is not as it was written"):
        open_run(tmp_path, CONFIG)


def test_each_part_resumes_from_its_own_checkpoints_before_those_of_another_run(tmp_path):
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    (theirs / "a" / "checkpoints" / "step-00000001").mkdir(parents=True)
    assert resume_from(mine, "a", "auto") == "auto"
    assert resume_from(mine, "a", str(theirs)) == str(theirs / "a")
    assert resume_from(mine, "b", str(theirs)) == "auto"
    (mine / "a" / "checkpoints" / "step-00000002").mkdir(parents=True)
    assert resume_from(mine, "a", str(theirs)) == "auto"
