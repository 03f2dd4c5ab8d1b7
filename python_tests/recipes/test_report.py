from __future__ import annotations

import json

import pytest

from pyaccel.recipes import report as reports
from pyaccel.recipes.report import Report, Section, summarise


@pytest.fixture
def report():
    results = [
        summarise("a/accuracy", [90.0, 92.0], "%", published=91.5, published_source="table 2"),
        summarise("b/accuracy", [80.0], "%", published_source="another data set"),
    ]
    return Report("a", "smoke", {"lr": 0.1, "seeds": [0, 1]}, {"torch": "2.13"}, results)


def test_summary():
    result = summarise("x", [1.0, 3.0], "s", published_source="none known")
    assert (result.value, result.std, result.n, result.unit) == (2.0, pytest.approx(2**0.5), 2, "s")
    assert result.text(1) == "2.0 ± 1.4"
    single = summarise("x", [1.0], "s", published_source="none known")
    assert single.std is None and single.text() == "1.00"


def test_a_figure_must_say_where_the_published_one_is_from_or_why_there_is_none():
    with pytest.raises(ValueError, match="x: say where the published figure was read, or why there is none"):
        summarise("x", [1.0], "s", published_source="")


@pytest.mark.parametrize("values", [[], [float("nan")], [1.0, float("inf")]])
def test_no_figure_without_finite_values(values):
    with pytest.raises(ValueError, match="expected one finite value a seed"):
        summarise("x", values, "s", published_source="-")


def test_schema_and_round_trip(report, tmp_path):
    reports.write(report, [Section("Title", ["text"])], tmp_path)
    written = json.loads((tmp_path / "report.json").read_text())
    assert list(written) == ["recipe", "preset", "config", "environment", "results"]
    assert list(written["results"][0]) == ["name", "value", "std", "n", "unit", "published", "published_source"]
    assert written["results"][1]["std"] is None and written["results"][1]["published"] is None
    assert reports.read(tmp_path) == report
    assert report["b/accuracy"] is report.results[1]
    with pytest.raises(KeyError, match="no result 'c'"):
        report["c"]


def test_markdown_table_is_aligned_and_plots_are_listed_only_if_there(report, tmp_path):
    rows = [("name", "value"), ("long name", "1"), ("b", "100.25")]
    (tmp_path / "here.png").write_bytes(b"")
    section = Section("Figures", ["A paragraph."], rows, [("here.png", "seen"), ("gone.png", "not seen")])
    text = reports.write(report, [section], tmp_path).read_text()
    table = [line for line in text.split("## Configuration")[0].splitlines() if line.startswith("|")]
    assert table == [
        "| name      |  value |",
        "| :-------- | -----: |",
        "| long name |      1 |",
        "| b         | 100.25 |",
    ]
    assert "![seen](here.png)" in text and "gone.png" not in text
    assert text.startswith("# a, preset smoke\n") and "| seeds |" in text


def test_errors_of_reading(tmp_path):
    with pytest.raises(FileNotFoundError, match="no report.json in it. A run writes it at its end"):
        reports.read(tmp_path)
    (tmp_path / "report.json").write_text('{"recipe": "a"}')
    with pytest.raises(ValueError, match="not a report as pyaccel writes it"):
        reports.read(tmp_path)
