"""Every block of Python in the documentation runs, and every link inside it leads somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(DOCS.glob("*.md"))
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#]+?)(?:#[^)]*)?\)")
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def blocks(text: str) -> list[tuple[int, str]]:
    """(line, code) of every block marked as Python that does not start with `# not run`."""
    found = [(text.count("\n", 0, m.start(1)) + 1, m[1]) for m in BLOCK.finditer(text)]
    return [(line, code) for line, code in found if not code.startswith("# not run")]


def links(page: Path) -> list[str]:
    """Targets within the documentation, outside blocks of code."""
    return [t for t in LINK.findall(FENCED.sub("", page.read_text(encoding="utf-8"))) if "://" not in t]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_run(page, tmp_path, monkeypatch):
    """In the order of the page, in an empty folder, what a block defines left for the next one."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {"__name__": "__docs__"}
    for line, code in blocks(page.read_text(encoding="utf-8")):
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), names)  # a traceback shows the line of the page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_figures_exist(page):
    for target in links(page):
        assert (page.parent / target).exists(), target


def test_there_is_something_to_run():
    assert sum(len(blocks(page.read_text(encoding="utf-8"))) for page in PAGES) >= 8


def test_blocks_are_found_and_marked_ones_left_out():
    text = "a\n```python\nx = 1\n```\nb\n```python\n# not run: later\ny\n```\n```\nno\n```\n```python\nz\n```\n"
    assert blocks(text) == [(3, "x = 1\n"), (14, "z\n")]


def test_figures_are_made_by_their_script(tmp_path, monkeypatch):
    """The script draws each figure that the pages show."""
    pytest.importorskip("matplotlib")
    script = DOCS / "figures" / "make.py"
    names = {"__name__": "figures", "__file__": str(script)}
    exec(compile(script.read_text(encoding="utf-8"), str(script), "exec"), names)
    names["FOLDER"] = tmp_path
    names["surrogates"]()
    shown = {Path(t).name for page in PAGES for t in links(page) if t.startswith("figures/")}
    assert "surrogates.png" in shown and (tmp_path / "surrogates.png").stat().st_size > 10_000
