from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from pyaccel import cli, recipes
from pyaccel.cli import main, parse_run, run_parser
from pyaccel.recipes import bntt
from pyaccel.recipes.folder import open_run


@pytest.fixture(autouse=True)
def no_data(monkeypatch, request):
    monkeypatch.delenv("PYACCEL_DATA", raising=False)
    monkeypatch.delenv("PYACCEL_TRACEBACK", raising=False)


def error_of(capsys, *arguments):
    """The one line that a wrong call prints."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("pyaccel: error: ") and err.count("\n") == 1, err
    return err.strip().removeprefix("pyaccel: error: ")


# -------------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize("recipe", recipes.RECIPES)
def test_every_field_of_a_recipe_is_a_flag(recipe):
    pytest.importorskip("jsonargparse")
    parser = run_parser(recipe, "smoke")
    found = {flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")}
    fields = {f"--{field.name}" for field in dataclasses.fields(recipes.find(recipe).load().Config)}
    assert found == fields | {"--config", "--help", "--out", "--print_config", "--resume"}
    undocumented = [action.dest for action in parser._actions if f"--{action.dest}" in fields and not (action.help or "").strip()]
    assert undocumented == []


def test_every_field_is_documented(capsys):
    pytest.importorskip("jsonargparse")
    with pytest.raises(SystemExit) as ended:
        main(["run", "bntt", "--help"])
    assert ended.value.code == 0
    help_text = " ".join(capsys.readouterr().out.split())
    for phrase in (
        "time steps T",
        "divided by 10 after the epochs",
        "tau of the early exit",
        "a YAML file of such fields",
    ):
        assert phrase in help_text


def test_preset_then_file_then_flags(tmp_path):
    pytest.importorskip("jsonargparse")
    file = tmp_path / "mine.yaml"
    file.write_text("preset: smoke\nepochs: 9\nlr: 1e-2\n")
    config, out, resume = parse_run("bntt", ["--config", str(file), "--epochs", "7", "--train-images=50"])
    assert (config.model, config.lr, config.epochs, config.train_images) == ("mlp", 0.01, 7, 50)
    assert (out, resume) == ("runs/bntt-smoke", "auto")
    config, out, _ = parse_run(
        "bntt", ["--preset", "desk", "--data", "digits", "--seeds", "[3,4]", "--mean", "[0.1]", "--out", "x"]
    )
    assert (config.model, config.data, config.seeds, config.mean, out) == ("vgg5", "digits", (3, 4), (0.1,), "x")


@pytest.mark.parametrize("config", [bntt.SMOKE, bntt.PAPER, bntt.preset("desk", "digits")])
def test_the_config_yaml_of_a_run_gives_the_same_configuration(config, tmp_path):
    pytest.importorskip("jsonargparse")
    open_run(tmp_path, vars(config))
    assert parse_run("bntt", ["--config", str(tmp_path / "config.yaml")])[0] == config


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "run: expected the name of a recipe first: pyaccel run RECIPE"),
        (["run", "--preset", "smoke"], "run: expected the name of a recipe first"),
        (["run", "bnt"], "unknown recipe 'bnt'; known are bntt"),
        (["run", "bnt"], "; did you mean bntt?"),
        (["run", "bntt"], "was given no data: download the binary version"),
        (["run", "bntt", "--data", "/no/where"], "/no/where: no such file or folder"),
        (["run", "bntt", "--preset", "huge"], "unknown preset 'huge'; known are smoke, desk, paper"),
        (["run", "bntt", "--epoch", "3"], "run bntt: no option --epoch; did you mean --epochs?"),
        (["run", "bntt", "--zzz=3"], "run bntt: no option --zzz; `pyaccel run bntt --help` lists them"),
        (["run", "bntt", "--lr", "abc"], "run bntt: --lr: expected float, got abc"),
        (["run", "bntt", "--seeds", "[a]"], "run bntt: --seeds: expected int, got a"),
        (["run", "bntt", "--data"], "run bntt: argument --data: expected one argument"),
        (["run", "bntt", "--config", "/no/file.yaml"], "--config /no/file.yaml: no such file"),
        (["report", "/no/where"], "report: /no/where: no such folder"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, message, capsys):
    if arguments[0] == "run":
        pytest.importorskip("jsonargparse")
    assert message in error_of(capsys, *arguments)


def test_wrong_files(tmp_path, capsys):
    pytest.importorskip("jsonargparse")
    (tmp_path / "a.yaml").write_text("- 1\n")
    assert "expected lines `field: value`, got list" in error_of(
        capsys, "run", "bntt", "--config", str(tmp_path / "a.yaml")
    )
    (tmp_path / "b.yaml").write_text("preset: smoke\nlearning_rate: 1\n")
    assert "learning_rate" in error_of(capsys, "run", "bntt", "--config", str(tmp_path / "b.yaml"))
    (tmp_path / "c.yaml").write_text("a: [1\n")
    assert "c.yaml: not YAML" in error_of(capsys, "run", "bntt", "--config", str(tmp_path / "c.yaml"))


def test_unknown_command_and_missing_one(capsys):
    for arguments in (["foo"], []):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
        err = capsys.readouterr().err
        assert err.startswith("pyaccel: error: ") and err.count("\n") == 1


def test_traceback_on_request(monkeypatch):
    monkeypatch.setenv("PYACCEL_TRACEBACK", "1")
    with pytest.raises(ValueError, match="unknown recipe"):
        main(["run", "bnt"])


def test_a_fault_of_the_program_is_not_taken_for_a_mistake_of_the_user(monkeypatch):
    def broken():
        raise TypeError("a bug")

    monkeypatch.setattr(cli, "_list", broken)
    with pytest.raises(TypeError, match="a bug"):
        main(["list"])


def test_without_jsonargparse_the_error_names_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    assert error_of(capsys, "run", "bntt") == '`pyaccel run` needs jsonargparse: pip install "pyaccel[cli]"'


# ------------------------------------------------------------------------------------------------------- other commands


def test_list_names_recipe_paper_and_summary(capsys):
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(recipes.RECIPES)
    assert any(line.split()[0] == "bntt" and "2010.01729" in line for line in lines)


def test_listing_imports_no_recipe_and_no_plotting():
    heavy = "('matplotlib', 'jsonargparse', 'pyaccel.recipes.bntt')"
    code = f"import sys, pyaccel.cli as c; c.main(['list']); print([m for m in sys.modules if m in {heavy}])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "ROOT", tmp_path)
    return tmp_path


def test_bench_needs_a_checkout(checkout, capsys):
    assert "they are part of the repository, not of the installed package" in error_of(capsys, "bench", "neuron")


def test_bench_runs_one_family(checkout, capsys):
    pytest.importorskip("pytest_benchmark")
    (checkout / "pyproject.toml").write_text(
        "[tool.pytest.ini_options]\naddopts = '-m \"not benchmark\"'\nmarkers = ['benchmark: x']\n"
    )
    (checkout / "benchmarks").mkdir()
    (checkout / "benchmarks" / "beside.py").write_text("")
    for name, body in (("neuron_toy", "benchmark(abs, 1)"), ("sram", "assert False")):
        text = (
            f"import beside\nimport pytest\npytestmark = pytest.mark.benchmark\ndef test_it(benchmark):\n    {body}\n"
        )
        (checkout / "benchmarks" / f"bench_{name}.py").write_text(text)
    assert main(["bench", "neuron"]) == 0
    assert main(["bench", "sram"]) == 1
    capsys.readouterr()
    assert "bench: no benchmarks of 'sra'; known are neuron, sram" in error_of(capsys, "bench", "sra")


def test_run_as_a_module():
    found = subprocess.run([sys.executable, "-m", "pyaccel", "run", "nothing"], capture_output=True, text=True)
    assert found.returncode == 2 and "unknown recipe" in found.stderr and "Traceback" not in found.stderr
