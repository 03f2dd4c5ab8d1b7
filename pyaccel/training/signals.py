"""A request to stop, sent as SIGTERM or SIGINT, noted until the step at hand is finished."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class StopRequest:
    """signal: the number of the signal that came, 0 before."""

    signal: int = 0


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Note SIGTERM and SIGINT instead of dying of them; a second SIGINT interrupts at once. Handlers return at the end.

    Python lets only the main thread install handlers: in any other, nothing is noted.
    """
    request, owner = StopRequest(), os.getpid()

    def handle(number: int, _frame) -> None:
        if os.getpid() != owner:  # A forked worker inherits the handler. SIGTERM ends it; on SIGINT its parent decides.
            if number == signal.SIGTERM:
                os._exit(128 + number)
        elif number == signal.SIGINT and request.signal:
            raise KeyboardInterrupt
        else:
            request.signal = number

    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
