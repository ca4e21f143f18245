"""Signals that ask a run to stop, heard between steps."""

import signal
import threading


class StopOnSignal:
    """While open, SIGTERM, SIGINT and SIGUSR1 set ``asked`` instead of killing: the step in hand is finished first."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __enter__(self) -> "StopOnSignal":
        self.asked: str | None = None
        # Python lets no other thread handle signals: from one, training runs and cannot be stopped like this.
        signals = self.SIGNALS if threading.current_thread() is threading.main_thread() else ()
        self._before = {s: signal.signal(s, self._note) for s in signals}
        return self

    def _note(self, number: int, frame) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C does not want to wait
        self.asked = signal.Signals(number).name

    def __exit__(self, *exc) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
