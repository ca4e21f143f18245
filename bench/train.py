"""Split the wall time of a whole run into phases.

    python -m bench.train RUN                                   # print the training time that a finished run recorded
    python -m bench.train --dataset digits-lt --epochs 3 ...    # time a new run with these flags of ltat_fast.train

A finished run has recorded only the time of its epochs. A new run is timed from outside, and the time of an inner phase
(a checkpoint during the student's epochs) does not count for the outer one. The phases of a new run are appended as
rows to bench/results/train-DEVICE.csv.
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
from ltat_fast.runs import checkpoint
from ltat_fast.runs.records import read_metrics
from ltat_fast.training import evaluation, fit, pipeline

# The timed functions: the module that calls them, their name, and a function from their arguments to the phase.
PHASES: list[tuple[object, str, Callable[..., str]]] = [
    (pipeline, "load_splits", lambda *_: "data"),
    (fit, "choose_backend", lambda *_: "compilation and check of the step"),
    (pipeline, "fit", lambda stage, *_: f"{stage.name} epochs"),
    (checkpoint, "write_weights", lambda *_: "checkpoints"),
    (fit, "write_weights", lambda *_: "checkpoints"),
    (evaluation, "correct_under", lambda name, *_: f"evaluation, {name}"),
]


class Clock:
    """Measure the seconds spent in each phase, without the phases inside it."""

    def __init__(self):
        self.seconds: Counter[str] = Counter()
        self._open = ["other"]
        self._since = time.perf_counter()

    def lap(self) -> None:
        """Add the time since the last call to the innermost open phase."""
        now = time.perf_counter()
        self.seconds[self._open[-1]] += now - self._since
        self._since = now

    def timing(self, function: Callable, phase: Callable[..., str]) -> Callable:
        """Wrap ``function``: the time of a call counts for the phase ``phase(*args)``."""

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
    """Run ``python -m ltat_fast.train`` with ``flags`` and return the seconds by phase."""
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
    """Return the seconds by phase that the run in ``folder`` has recorded."""
    stages = {"teacher epochs": folder / "teacher", "student epochs": folder}
    metrics = {name: read_metrics(path / "metrics.jsonl") for name, path in stages.items()}
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
