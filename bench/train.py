"""Where the wall time of a whole run goes: a phase a row.

    python -m bench.train RUN                                   # training time of a run that is there
    python -m bench.train --dataset digits-lt --epochs 3 ...    # makes a run with these flags of ltat_fast.train

A run that is there has only recorded its epochs. One made here is timed from outside: phases within others (a
checkpoint in the midst of the student's epochs) are taken out of those. Rows are appended to
bench/results/train-DEVICE.csv.
"""

import contextlib
import functools
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table

from bench import common
from ltat_fast import train
from ltat_fast.runs import checkpoint, log
from ltat_fast.training import evaluation, fit, pipeline

# What is timed: where the function is looked up, its name, and its arguments to the name of the phase.
PHASES: list[tuple[object, str, Callable[..., str]]] = [
    (pipeline, "load_splits", lambda *_: "data"),
    (fit, "choose_backend", lambda *_: "compilation and check of the step"),
    (pipeline, "fit", lambda stage, *_: f"{stage.name} epochs"),
    (checkpoint, "write_weights", lambda *_: "checkpoints"),
    (fit, "write_weights", lambda *_: "checkpoints"),
    (evaluation, "correct_under", lambda name, *_: f"evaluation, {name}"),
]


class Clock:
    """Seconds spent in each phase, without the phases inside it."""

    def __init__(self):
        self.seconds: Counter[str] = Counter()
        self._open = ["other"]
        self._since = time.perf_counter()

    def lap(self) -> None:
        """Give the time since the last call to the innermost open phase."""
        now = time.perf_counter()
        self.seconds[self._open[-1]] += now - self._since
        self._since = now

    def timing(self, function: Callable, phase: Callable[..., str]) -> Callable:
        @functools.wraps(function)
        def timed(*args, **kwargs):
            self.lap()
            self._open.append(phase(*args))
            try:
                return function(*args, **kwargs)
            finally:
                self.lap()
                self._open.pop()

        return timed


def timed_run(flags: list[str]) -> dict[str, float]:
    """Seconds by phase of ``python -m ltat_fast.train`` with these flags."""
    with contextlib.ExitStack() as patches:
        clock = Clock()
        for module, name, phase in PHASES:
            timed = clock.timing(getattr(module, name), phase)
            patches.enter_context(mock.patch.object(module, name, timed))
        if status := train.main(flags):
            raise SystemExit(status)
        clock.lap()
    return dict(clock.seconds)


def recorded(folder: Path) -> dict[str, float]:
    """Seconds by phase that a run has written down."""
    stages = {"teacher epochs": folder / "teacher", "student epochs": folder}
    metrics = {name: log.read_metrics(path / "metrics.jsonl") for name, path in stages.items()}
    if not any(metrics.values()):
        raise SystemExit(f"{folder} is not a run: it has no metrics.jsonl")
    return {name: sum(epoch["seconds"] for epoch in epochs) for name, epochs in metrics.items() if epochs}


def main(argv: list[str] | None = None) -> None:
    flags = sys.argv[1:] if argv is None else argv
    if not flags or flags[0] in ("-h", "--help"):
        raise SystemExit(__doc__)
    is_folder = len(flags) == 1 and not flags[0].startswith("-")
    seconds = recorded(Path(flags[0])) if is_folder else timed_run(flags)
    total = sum(seconds.values())

    table = Table("phase", title=" ".join(flags))
    table.add_column("seconds", justify="right")
    table.add_column("share", justify="right")
    for name, value in seconds.items():
        table.add_row(name, f"{value:.1f}", f"{value / total:.1%}")
    table.add_row("all", f"{total:.1f}", "100.0%")
    Console().print(table)
    if not is_folder:
        device = torch.device("cuda" if torch.cuda.is_initialized() else "cpu")
        source = common.provenance(device) | {"flags": " ".join(flags)}
        out = Path(__file__).parent / "results" / f"train-{device.type}.csv"
        common.append_csv(out, [source | {"phase": name, "seconds": f"{value:.2f}"} for name, value in seconds.items()])
        print(out)


if __name__ == "__main__":
    main()
