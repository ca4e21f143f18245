"""What the terminal shows: messages, and the progress of everything that takes long.

:func:`progress` is for any loop. On a terminal it shows bars, which a thread redraws four times a second, so that they
move by time and not with the loop. Elsewhere, for example in the log of a Slurm job, it prints a line every 30 seconds.
"""

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ltat_fast.errors import printable

console = Console(highlight=False, soft_wrap=True, emoji=False)
clock = time.monotonic
REDRAWS_PER_SECOND = 4
SECONDS_PER_LINE = 30
NARROWEST_BAR = 4  # a bar that would have fewer characters is left out


def say(text: str) -> None:
    """Print ``text``. Square brackets are no markup, and control characters other than line ends are escaped."""
    console.print("\n".join(map(printable, text.split("\n"))), markup=False)


def quiet() -> None:
    """Print no more messages and progress bars from this process; warnings and errors on stderr are still printed."""
    console.quiet = True


class Bar:
    """The progress of one loop, made by :func:`progress`.

    It only counts. Nothing here reads a tensor, so the loop never waits for the device.
    """

    def __init__(self, description: str, total: float, unit: str, done: float, images_per_unit: int | None):
        self.description, self.total, self.unit, self.images_per_unit = description, total, unit, images_per_unit
        self.shown: dict[str, str | float] = {}
        self.go_to(done)

    def go_to(self, done: float) -> None:
        """Set what is done, and measure the pace from here: after a return to an earlier state."""
        self.done = self._first = done
        self._began = self._last = clock()

    def advance(self, count: float = 1, **shown: str | float) -> None:
        """Say that ``count`` more units are done. shown: the newest numbers, by the name to show them with."""
        self.done = min(self.done + count, self.total)
        self._last = clock()
        self.shown |= shown
        _display.bar_moved()

    @property
    def pace(self) -> float | None:
        """Units per second since the start; None before the first one is done."""
        seconds = self._last - self._began
        return (self.done - self._first) / seconds if self.done > self._first and seconds > 0 else None

    @property
    def time_left(self) -> str:
        """The time left at this pace, as "0:01:10 left"; empty if there is no pace yet."""
        if not self.pace:
            return ""
        seconds = round(max((self.total - self.done) / self.pace - (clock() - self._last), 0))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"

    def __str__(self) -> str:
        """For example "120 of 390 steps, loss 2.01, 350 images/s, 0:01:10 left"."""
        parts = [f"{self.done:,.0f} of {self.total:,.0f} {self.unit}"]
        parts += [f"{name} {value if isinstance(value, str) else f'{value:.4g}'}" for name, value in self.shown.items()]
        if self.images_per_unit and self.pace:
            parts.append(f"{self.pace * self.images_per_unit:,.0f} images/s")
        return ", ".join([*parts, self.time_left] if self.time_left else parts)


class _Display:
    """The bars that are open, the outermost first."""

    def __init__(self):
        self.bars: list[Bar] = []
        self.live: Live | None = None
        self.last_line = 0.0

    def open(self, bar: Bar) -> None:
        if not self.bars:
            self.last_line = clock()
            # With FORCE_COLOR, which many CI systems set, rich takes a file for a terminal.
            if console.is_interactive and console.file.isatty():
                redraw = {"refresh_per_second": REDRAWS_PER_SECOND, "transient": True}
                self.live = Live(get_renderable=self.table, console=console, **redraw)
        self.bars.append(bar)
        if self.live and len(self.bars) == 1:
            self.live.start()

    def close(self, bar: Bar) -> None:
        self.bars.remove(bar)
        if self.live and not self.bars:
            self.live.stop()
            self.live = None

    def bar_moved(self) -> None:
        """Print a line if one is due."""
        if self.bars and self.live is None and clock() - self.last_line >= SECONDS_PER_LINE:
            self.last_line = clock()
            say(self.line())

    def line(self) -> str:
        """For example "student epoch 3/40: 120 of 390 steps, loss 2.01, 0:01:10 left; student 0:52:00 left"."""
        *outer, inner = self.bars
        name = " ".join(bar.description for bar in self.bars)
        rest = [f"{bar.description} {bar.time_left}" for bar in outer if bar.time_left]
        return "; ".join([f"{name}: {inner}", *rest])

    def table(self) -> Table:
        """One line per bar: description, bar, text."""
        bars = list(self.bars)  # the thread that draws is not the one that opens and closes
        texts = [str(bar) for bar in bars]
        used = max((len(bar.description) for bar in bars), default=0) + max(map(len, texts), default=0) + 2
        table = Table.grid(padding=(0, 1, 0, 0))
        for bar, text in zip(bars, texts, strict=True):
            drawn = ProgressBar(max(bar.total, 1), bar.done, width=console.width - used)
            name, text = (Text(words, no_wrap=True, overflow="ellipsis") for words in (bar.description, text))
            table.add_row(*([name, drawn, text] if console.width - used >= NARROWEST_BAR else [name, text]))
        return table


_display = _Display()


@contextlib.contextmanager
def progress(
    description: str, total: float, unit: str = "images", *, done: float = 0, images_per_unit: int | None = None
) -> Iterator[Bar]:
    """Show the progress of the loop in the ``with`` block; the loop calls :meth:`Bar.advance`.

    description: what is going on, for example "pgd20". total: number of ``unit`` in the loop, of which ``done`` were
    done before. images_per_unit: also show images per second. Loops in a loop have a bar each, drawn in this order; the
    line that replaces bars outside of a terminal is about the innermost loop and ends with the time left of the others.
    """
    bar = Bar(description, total, unit, done, images_per_unit)
    if console.quiet:
        yield bar
        return
    _display.open(bar)
    try:
        yield bar
    finally:
        _display.close(bar)
