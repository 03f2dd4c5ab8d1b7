"""The report of a run: `report.json` (figures), `report.md` (tables and plots made from them)."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pyaccel.training import distributed

JSON, MARKDOWN = "report.json", "report.md"


@dataclass(frozen=True)
class Result:
    """One figure: mean and sample standard deviation (None for n = 1) over n seeds.

    published: the paper's figure, only where network, data set, split and preset are the paper's. published_source:
    where it was read or, without one, why there is none; never empty.
    """

    name: str
    value: float
    std: float | None
    n: int
    unit: str
    published: float | None
    published_source: str

    def __post_init__(self):
        if not self.published_source:
            raise ValueError(f"{self.name}: say where the published figure was read, or why there is none")

    def text(self, digits: int = 2) -> str:
        """`97.10 ± 0.30`, without the spread of a single seed."""
        spread = "" if self.std is None else f" ± {self.std:.{digits}f}"
        return f"{self.value:.{digits}f}{spread}"


def summarise(
    name: str, values: Sequence[float], unit: str, *, published: float | None = None, published_source: str
) -> Result:
    """The `Result` of one value a seed. ValueError for no value, or one that is not finite."""
    values = [float(v) for v in values]
    if not values or not all(map(math.isfinite, values)):
        raise ValueError(f"{name}: expected one finite value a seed, got {values}")
    std = statistics.stdev(values) if len(values) > 1 else None
    return Result(name, statistics.fmean(values), std, len(values), unit, published, published_source)


@dataclass(frozen=True)
class Report:
    recipe: str
    preset: str
    config: dict[str, Any]
    environment: dict[str, Any]
    results: list[Result]

    def __getitem__(self, name: str) -> Result:
        for result in self.results:
            if result.name == name:
                return result
        raise KeyError(f"the report has no result {name!r}")


@dataclass(frozen=True)
class Section:
    """A part of report.md: title, paragraphs, a table (its first row the header), plots as (file, caption)."""

    title: str
    text: Sequence[str] = ()
    table: Sequence[Sequence[str]] = ()
    plots: Sequence[tuple[str, str]] = ()


def write(report: Report, sections: Sequence[Section], folder: str | os.PathLike) -> Path:
    """Write both files; returns the path of report.md."""
    folder = Path(folder)
    _replace(folder / JSON, json.dumps(asdict(report), indent=1, allow_nan=False) + "\n")
    return write_markdown(report, sections, folder)


def write_markdown(report: Report, sections: Sequence[Section], folder: str | os.PathLike) -> Path:
    """Write report.md alone, with those plots that are in the folder."""
    sections = [replace(s, plots=[p for p in s.plots if (Path(folder) / p[0]).exists()]) for s in sections]
    return _replace(Path(folder) / MARKDOWN, markdown(report, sections))


def read(folder: str | os.PathLike) -> Report:
    """The report in a run folder. FileNotFoundError where there is none, ValueError where it is damaged."""
    file = Path(folder) / JSON
    if not file.exists():
        raise FileNotFoundError(
            f"{folder}: no {JSON} in it. A run writes it at its end; the same `pyaccel run ...` command finishes a run "
            "that was stopped"
        )
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        return Report(**{**fields, "results": [Result(**result) for result in fields["results"]]})
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file}: not a report as pyaccel writes it ({error})") from error


def markdown(report: Report, sections: Sequence[Section]) -> str:
    """report.md: the sections, then configuration and environment."""
    parts = [f"# {report.recipe}, preset {report.preset}"]
    parts += [section_text(section) for section in sections]
    rows = [("field", "value")] + [(name, json.dumps(value)) for name, value in report.config.items()]
    parts.append(section_text(Section("Configuration", table=rows)))
    rows = [("", "")] + [(name, str(value)) for name, value in report.environment.items()]
    parts.append(section_text(Section("Environment", table=rows)))
    return "\n\n".join(parts) + "\n"


def section_text(section: Section) -> str:
    """A section in Markdown that is also readable as it stands."""
    parts = [f"## {section.title}"]
    if section.table:
        parts.append(table_text(section.table))
    parts += section.text
    parts += [f"![{caption}]({file})\n\n{caption}" for file, caption in section.plots]
    return "\n\n".join(parts)


def table_text(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns: the first one to the left, the others to the right."""
    widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        return f"| {' | '.join(cells)} |"

    rule = [":" + "-" * (w - 1) if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([line(rows[0]), line(rule), *map(line, rows[1:])])


def _replace(file: Path, text: str) -> Path:
    if distributed.rank() != 0:
        return file
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)
    return file
