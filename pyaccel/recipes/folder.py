"""A run folder: the configuration it was started with, and whether a new run may continue in it."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from pyaccel.training import distributed

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"


def open_run(
    out: str | os.PathLike, config: dict[str, Any], *, resume: str = "auto", free: Collection[str] = ()
) -> Path:
    """Make or reopen the folder `out` and write `config.yaml` into it.

    resume: "auto" continues what is there if it has the same configuration, except for the fields in `free`, which
    change no training; "never" refuses a folder that holds a run; else the folder of the run to continue from.
    ValueError for another configuration (the text names the fields) or a folder that is taken; FileNotFoundError for a
    run to resume that is not there.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: expected a folder to write the run to, it is a file; choose another --out")
    if resume not in ("auto", "never") and not (Path(resume) / CONFIG).exists():
        raise FileNotFoundError(
            f"{resume}: no run to resume there (no {CONFIG}); give the folder of a run, auto or never"
        )
    config = json.loads(json.dumps(config))
    if (out / CONFIG).exists():
        if resume == "never":
            raise ValueError(f"{out} holds an earlier run; choose another --out, remove it, or use --resume auto")
        earlier = read_config(out)
        changed = [
            f"{name} was {json.dumps(earlier.get(name))}, is now {json.dumps(config.get(name))}"
            for name in sorted(earlier.keys() | config.keys())
            if name not in free and earlier.get(name) != config.get(name)
        ]
        if changed:
            raise ValueError(
                f"{out} holds a run with another configuration ({'; '.join(changed)}); choose another --out"
            )
    distributed.barrier()  # Every rank has found the folder as it was, and refused it or not.
    if distributed.rank() == 0:
        write_config(out, config)
    distributed.barrier()
    return out


def write_config(out: Path, config: dict[str, Any]) -> None:
    """Write `config.yaml` into a folder, which is made if it is not there."""
    out.mkdir(parents=True, exist_ok=True)
    # JSON values are YAML values: no YAML library is needed to write or read this file.
    lines = "".join(f"{name}: {json.dumps(value)}\n" for name, value in config.items())
    temporary = out / (CONFIG + ".tmp")
    temporary.write_text(lines, encoding="utf-8")
    os.replace(temporary, out / CONFIG)


def read_config(folder: str | os.PathLike) -> dict[str, Any]:
    """The fields in `config.yaml` as `open_run` wrote it. ValueError names a line that is none of its own."""
    file, config = Path(folder) / CONFIG, {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        name, _, value = line.partition(": ")
        try:
            config[name] = json.loads(value)
        except ValueError as error:
            raise ValueError(f"{file}: line {number} is not as it was written ({line!r}); restore it") from error
    return config


def resume_from(out: Path, part: str, resume: str) -> str:
    """What `Trainer.fit` shall resume from for one part of a run, such as "bntt/seed-0"."""
    if resume in ("auto", "never"):
        return resume
    theirs = Path(resume) / part
    has_own = any((out / part / CHECKPOINTS).glob("step-*"))
    return "auto" if has_own or not any((theirs / CHECKPOINTS).glob("step-*")) else str(theirs)
