"""Work that training need not wait for: one job at a time on a thread of its own, its errors raised here."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Background:
    """Runs one job at a time; a new one waits for the last. Errors of a job are raised by the next call here."""

    def __init__(self, name: str):
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._job: Future | None = None

    def submit(self, job: Callable[[], object]) -> None:
        self.wait()
        self._job = self._pool.submit(job)

    def check(self) -> None:
        """Raise the error of a job that has failed already; does not wait."""
        if self._job is not None and self._job.done():
            self.wait()

    def wait(self) -> None:
        """Until the last job has ended; raises its error, once."""
        job, self._job = self._job, None
        if job is not None:
            job.result()

    def close(self) -> None:
        """Wait and end the thread; an error that nobody has seen yet stays unseen, call `wait` before."""
        self._pool.shutdown(wait=True)
