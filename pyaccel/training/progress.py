"""Progress of an epoch on standard error: a bar where a person looks on, now and then a line where none does."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

BAR_SECONDS, LINE_SECONDS = 1.0, 30.0


class Progress:
    """Counts to `total`, from `done` on: a tqdm bar if tqdm is installed and stderr is a terminal, else lines."""

    def __init__(self, total: int, done: int, label: str, *, visible: bool = True):
        self._total, self._done, self._label, self._visible = total, done, label, visible
        self._bar = _bar(total, done, label) if visible else None
        self._shown = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, text: Callable[[], str]) -> None:
        """One more is done. `text` is called only when it is shown: it may wait for a GPU."""
        self._done += 1
        if self._bar is not None:
            self._bar.update()
        if self._visible and time.monotonic() - self._shown >= (LINE_SECONDS if self._bar is None else BAR_SECONDS):
            self._shown = time.monotonic()
            if self._bar is not None:
                self._bar.set_postfix_str(text())
            else:
                print(f"{self._label}  {self._done}/{self._total}  {text()}", file=sys.stderr, flush=True)


def _bar(total: int, done: int, label: str):
    if not sys.stderr.isatty():
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(total=total, initial=done, desc=label, leave=False)
