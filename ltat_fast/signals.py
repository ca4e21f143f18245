"""Signals that stop a run: training finishes its step first, any other work stops at once."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn

from ltat_fast.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@contextlib.contextmanager
def handle_signals(handler: Callable) -> Iterator[None]:
    """Call ``handler(number, frame)`` for :data:`SIGNALS` inside a ``with`` block.

    Does nothing outside of the main thread, because Python allows signal handlers only there.
    """
    signals = SIGNALS if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, handler) for number in signals}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def stop_at_once() -> contextlib.AbstractContextManager[None]:
    """Raise :class:`Interrupted` when a signal arrives inside a ``with`` block. For work that saves its own results."""

    def stop(number: int, frame) -> None:
        raise Interrupted(f"stopped by {signal.Signals(number).name}; finished work is kept")

    return handle_signals(stop)


def leave(status: int | None) -> NoReturn:
    """Exit with ``status``. Further signals are ignored, so that they cannot change it while the interpreter exits."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    raise SystemExit(status)


class StopOnSignal:
    """Record signals inside a ``with`` block, so that the current step can finish first.

    signal_name: name of the last signal, None before the first one.
    """

    def __enter__(self) -> "StopOnSignal":
        self.signal_name: str | None = None
        self._handlers = handle_signals(self._record)
        self._handlers.__enter__()
        return self

    def _record(self, number: int, frame) -> None:
        if self.signal_name and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C stops without finishing the step
        self.signal_name = signal.Signals(number).name

    def __exit__(self, *exc) -> None:
        self._handlers.__exit__(*exc)
