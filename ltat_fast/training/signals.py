"""Signals that ask a run to stop: between steps while it trains, at once while it does anything else."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Interrupted(BaseException):
    """A signal asked the run to stop; its state is saved.

    Like KeyboardInterrupt no Exception: code that tries a backend or a file and goes on without it must not catch it.
    """


@contextlib.contextmanager
def handled_by(handler: Callable) -> Iterator[None]:
    """``handler(number, frame)`` hears :data:`SIGNALS` while open.

    Python lets no other thread than the main one do this: there nothing changes, and a run cannot be stopped like this.
    """
    signals = SIGNALS if threading.current_thread() is threading.main_thread() else ()
    before = {s: signal.signal(s, handler) for s in signals}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def stop_at_once() -> contextlib.AbstractContextManager[None]:
    """While open, a signal raises :class:`Interrupted`: for work that keeps by itself what it has finished."""

    def stop(number: int, frame) -> None:
        raise Interrupted(f"stopped by {signal.Signals(number).name}; what is finished is kept")

    return handled_by(stop)


def leave(status: int | None) -> NoReturn:
    """End the program with ``status``: while the interpreter shuts down, no signal makes it another one."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    raise SystemExit(status)


class StopOnSignal:
    """While open, a signal sets ``asked`` instead: the step in hand is finished first."""

    def __enter__(self) -> "StopOnSignal":
        self.asked: str | None = None
        self._handlers = handled_by(self._note)
        self._handlers.__enter__()
        return self

    def _note(self, number: int, frame) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C does not want to wait
        self.asked = signal.Signals(number).name

    def __exit__(self, *exc) -> None:
        self._handlers.__exit__(*exc)
