"""The command line: `pyaccel run | plan | list | doctor | bench | report | check-data`, also `python -m pyaccel ...`."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyaccel import recipes
from pyaccel.version import __version__

USER_ERRORS = (ValueError, OSError, ImportError, FloatingPointError)
ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ("bench_", "test_")  # bench_FAMILY.py, bench_FAMILY_more.py in benchmarks/


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 where `doctor` or `check-data` found a fault, 2 for a mistake in the call.

    A mistake is told in one line; with PYACCEL_TRACEBACK=1 the traceback comes as well. SIGTERM: exit code 143.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if arguments[:1] in (["run"], ["plan"]):  # whose options are the recipe's fields, unknown to argparse
            return (_run if arguments[0] == "run" else _plan)(arguments[1:])
        options = _parser().parse_args(arguments)
        return options.command(options)
    except USER_ERRORS as error:
        if os.environ.get("PYACCEL_TRACEBACK") == "1":
            raise
        return _fail(str(error) or type(error).__name__)


def _fail(text: str) -> int:
    rank = os.environ.get("RANK", "0")  # of the processes that torchrun started
    print(f"pyaccel: error: {text}" if rank == "0" else f"pyaccel, rank {rank}: error: {text}", file=sys.stderr)
    return 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        sys.exit(_fail(f"{message}; `{self.prog} --help` tells more"))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="pyaccel", description="Neural networks trained on the hardware they will run on.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    commands.add_parser("run", help="train what a recipe describes, and write a report")  # see main

    commands.add_parser("plan", help="memory and time of a recipe's training step, and the largest batch that fits")

    listing = commands.add_parser("list", help="the recipes")
    listing.set_defaults(command=lambda options: _list())

    doctor = commands.add_parser("doctor", help="versions, kernels, threads and devices, and whether they are sound")
    doctor.set_defaults(command=lambda options: _doctor())

    bench = commands.add_parser("bench", help="the benchmarks of a checkout")
    bench.add_argument("family", nargs="?", metavar="FAMILY", help="neuron, ...; all without it")
    bench.set_defaults(command=lambda options: _bench(options.family))

    report = commands.add_parser("report", help="print the report of a run")
    report.add_argument("folder", metavar="RUN_FOLDER")
    report.set_defaults(command=lambda options: _report(options.folder))

    check = commands.add_parser("check-data", help="read a whole data set before a long run")
    check.add_argument("path", metavar="PATH", help="a data set of images, or a packaged one")
    check.add_argument("--splits", nargs="+", default=["train", "test"], metavar="SPLIT", help="default: train test")
    check.add_argument("--sample", type=int, metavar="N", help="read so many images of a split instead of all")
    check.add_argument("--size", type=int, metavar="PIXELS", help="resize images decoded from files, as training does")
    check.set_defaults(command=_check_data)
    return parser


# ------------------------------------------------------------------------------------------------------------------ run


def _run(arguments: list[str]) -> int:
    usage = "pyaccel run RECIPE [--preset smoke|desk|paper] [--data PATH] [--out FOLDER] [--resume auto|never|PATH] ..."
    if not arguments or arguments[0].startswith("-"):
        if arguments and arguments[0] in ("-h", "--help"):
            print(f"usage: {usage}\n\n`pyaccel list` names the recipes, `pyaccel run RECIPE --help` all its fields.")
            return 0
        raise ValueError(f"run: expected the name of a recipe first: {usage}")
    name, rest = arguments[0], arguments[1:]
    module = recipes.find(name).load()
    config, out, resume = parse_run(name, rest)

    from pyaccel.memory import recycle_memory
    from pyaccel.recipes.report import MARKDOWN, section_text
    from pyaccel.training import distributed

    recycle_memory()
    # Outside training, where the trainer notes the signal and saves, SIGTERM ends the run with the same code.
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        with distributed.process_group():
            report, first = module.run(config, out=out, resume=resume), distributed.rank() == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    if not first:
        return 0
    headline = dataclasses.replace(module.describe(report)[0], plots=())
    print(f"{section_text(headline)}\n\nThe whole report: {Path(out) / MARKDOWN}")
    return 0


def _plan(arguments: list[str]) -> int:
    usage = (
        "pyaccel plan RECIPE [the fields of `pyaccel run RECIPE`] [--memory GIB] [--count-only]\n\n"
        "--memory GIB   the memory to fit the batch into; default: the device's\n"
        "--count-only   measure nothing: the tensors of a step are counted without computing it, in seconds"
    )
    if not arguments or arguments[0].startswith("-"):
        if arguments and arguments[0] in ("-h", "--help"):
            print(f"usage: {usage}")
            return 0
        raise ValueError(f"plan: expected the name of a recipe first: {usage.splitlines()[0]}")
    own = _Parser(prog="pyaccel plan", add_help=False)
    own.add_argument("--memory", type=float)
    own.add_argument("--count-only", action="store_true")
    own.add_argument("--at", type=int)  # measure this batch size here, for the process that plans
    own.add_argument("--network")
    options, rest = own.parse_known_args(arguments[1:])
    name, module = arguments[0], recipes.find(arguments[0]).load()
    config, _, _ = parse_run(name, rest)

    from pyaccel.memory import recycle_memory
    from pyaccel.recipes import planning
    from pyaccel.recipes.report import table_text

    if options.at is not None:
        recycle_memory()
        print(planning.measure(name, module, config, options.network, options.at))
        return 0
    limit = None if options.memory is None else int(options.memory * 2**30)
    plans = planning.plan(name, module, config, None if options.count_only else [name, *rest], limit)
    print(table_text(planning.table(plans)))
    return 0


def run_parser(name: str, preset: str = "desk", data: str | None = None) -> Any:
    """The parser of `pyaccel run NAME`: a flag for every field of the recipe's configuration, defaults by preset."""
    try:
        import jsonargparse
    except ImportError as error:
        raise ImportError('`pyaccel run` needs jsonargparse: pip install "pyaccel[cli]"') from error
    module = recipes.find(name).load()
    parser = jsonargparse.ArgumentParser(
        prog=f"pyaccel run {name}", exit_on_error=False, description=module.__doc__, default_env=False
    )
    parser.add_argument("--config", action="config", help="a YAML file of such fields; flags after it win")
    parser.add_argument("--out", type=str, default=None, help=f"the run folder (default: runs/{name}-PRESET)")
    parser.add_argument(
        "--resume", type=str, default="auto", help="auto: continue in the run folder; never: refuse one that is in "
        "use; "
        "or the folder of the run to continue from"
    )  # fmt: skip
    parser.add_class_arguments(module.Config)
    parser.set_defaults(dataclasses.asdict(module.preset(preset, data)))
    return parser


def parse_run(name: str, arguments: Sequence[str]) -> tuple[Any, str, str]:
    """(configuration, run folder, resume) of the arguments after the recipe's name. ValueError for any mistake.

    What wins: the preset, then the file of --config, then the flags.
    """
    arguments = [_underscored(argument) for argument in arguments]
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for flag in ("--preset", "--data", "--config"):
        first.add_argument(flag)
    try:
        known, _ = first.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ValueError(f"run {name}: {error}") from None
    from_file = _read_yaml(known.config) if known.config else {}
    preset = known.preset or from_file.get("preset", "desk")
    parser = run_parser(name, preset, known.data or from_file.get("data"))
    import jsonargparse

    flags = [flag for action in parser._actions for flag in action.option_strings]
    for argument in arguments:
        flag = argument.split("=")[0]
        if flag.startswith("--") and flag not in flags:
            near = difflib.get_close_matches(flag, flags, n=1)
            hint = f"did you mean {near[0]}?" if near else f"`pyaccel run {name} --help` lists them"
            raise ValueError(f"run {name}: no option {flag}; {hint}")
    try:
        options = vars(parser.parse_args(arguments).clone())
    except (argparse.ArgumentError, jsonargparse.ArgumentError) as error:
        raise ValueError(f"run {name}: {_plain(error)}") from None
    out, resume = options.pop("out") or f"runs/{name}-{preset}", options.pop("resume")
    options.pop("config")
    return recipes.find(name).load().Config(**options), out, resume


def _underscored(argument: str) -> str:
    """`--train-images=5` as `--train_images=5`: both spellings are taken."""
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + value


def _read_yaml(path: str) -> dict:
    if not Path(path).is_file():
        raise FileNotFoundError(f"--config {path}: no such file")
    try:
        import yaml
    except ImportError as error:
        raise ImportError('--config needs PyYAML: pip install "pyaccel[cli]"') from error
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path}: not YAML ({_one_line(error)})") from None
    if not isinstance(content, dict):
        raise ValueError(f"--config {path}: expected lines `field: value`, got {type(content).__name__}")
    return content


def _plain(error: Exception) -> str:
    """jsonargparse's `Parser key "lr": Expected a <class 'float'>. Got value: x` as `--lr: expected float, got x`."""
    text = re.sub(r'^Parser key "(\w+)":', r"--\1:", _one_line(error))
    text = re.sub(r"Expected an? <class '(\w+)'>\. Got value: ", r"expected \1, got ", text)
    return text


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


# --------------------------------------------------------------------------------------------------- the other commands


def _list() -> int:
    width = max(map(len, recipes.RECIPES))
    for name, recipe in sorted(recipes.RECIPES.items()):
        print(f"{name.ljust(width)}  {recipe.paper}  {recipe.summary}")
    return 0


def _doctor() -> int:
    from pyaccel.doctor import examine, print_checks

    return print_checks(examine())


def _bench(family: str | None) -> int:
    files = sorted(file for file in (ROOT / "benchmarks").glob("*.py") if file.name.startswith(BENCHMARKS))
    families = {file.stem.split("_", 1)[1]: file for file in files}
    if not families or not (ROOT / "pyproject.toml").exists():
        raise FileNotFoundError(
            f"bench: no benchmarks beside {Path(__file__).parent}; they are part of the repository, not of the "
            "installed package: run `python -m pyaccel bench` in a checkout"
        )
    chosen = {name: file for name, file in families.items() if family is None or name.split("_")[0] == family}
    if not chosen:
        known = sorted({name.split("_")[0] for name in families})
        raise ValueError(f"bench: no benchmarks of {family!r}; known are {', '.join(known)}")
    try:
        import pytest_benchmark  # noqa: F401
    except ImportError as error:
        raise ImportError('bench needs pytest and pytest-benchmark: pip install "pyaccel[test]"') from error
    # Without the ordinary options, which leave benchmarks out and hide the modules beside them.
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q"]
    return subprocess.run([*command, *map(str, chosen.values())], cwd=ROOT, check=False).returncode


def _check_data(options: argparse.Namespace) -> int:
    from pyaccel.data.check import check_images
    from pyaccel.data.source import open_images

    faults = 0
    for split in options.splits:
        finding = check_images(open_images(options.path, split, size=options.size), sample=options.sample)
        print("\n".join(finding.lines()), flush=True)
        faults += len(finding.faults)
    return 1 if faults else 0


def _report(folder: str) -> int:
    from pyaccel.recipes.report import MARKDOWN, read, write_markdown

    if not Path(folder).is_dir():
        raise FileNotFoundError(f"report: {folder}: no such folder")
    file = Path(folder) / MARKDOWN
    if not file.exists():
        report = read(folder)
        file = write_markdown(report, recipes.find(report.recipe).load().describe(report), folder)
    print(file.read_text(encoding="utf-8"), end="")
    return 0
