"""Record a training stage: metrics.jsonl (one object per epoch), TensorBoard, and the messages on the terminal."""

import contextlib
import json
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ltat_fast import files
from ltat_fast.errors import UserError
from ltat_fast.runs.json_object import JsonObject, is_integer

console = Console(highlight=False, soft_wrap=True, emoji=False)


def say(text: str) -> None:
    """Print one line. Square brackets are printed as they are, not read as markup."""
    console.print(text, markup=False)


class StageLog:
    """Append the record of each epoch to ``folder/metrics.jsonl`` and ``folder/tb``.

    epochs_done: records of later epochs are dropped; a run that was killed after writing them left them there.
    """

    def __init__(self, folder: Path, epochs_done: int):
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / "metrics.jsonl"
        kept = [r for r in read_metrics(self.path) if r["epoch"] <= epochs_done]
        with files.atomic_write(self.path) as file:
            file.write("".join(json.dumps(record) + "\n" for record in kept).encode())
        with files.oserror_as_user_error(folder / "tb"):
            self.tensorboard = SummaryWriter(str(folder / "tb"), purge_step=epochs_done + 1)

    def epoch(self, record: dict) -> None:
        with files.oserror_as_user_error(self.path), open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")
        with files.oserror_as_user_error(self.path.with_name("tb")):
            for name, value in record.items():
                if isinstance(value, int | float) and name != "epoch":
                    self.tensorboard.add_scalar(name, value, record["epoch"])
            self.tensorboard.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # a full disk, which was reported before
            self.tensorboard.close()


class NoLog:
    """Stand-in for :class:`StageLog` in all processes except the main one."""

    def epoch(self, record: dict) -> None:
        pass

    def close(self) -> None:
        pass


def quiet() -> None:
    """Print no more messages and progress bars from this process; warnings and errors on stderr are still printed."""
    console.quiet = True


def read_metrics(path: Path) -> list[dict]:
    """Return the records of a metrics.jsonl, without a last line that a crash cut short.

    Raises UserError if the file cannot be read or a line is not an object with an epoch.
    """
    if not path.exists():
        return []
    try:
        lines = path.read_text().splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged and cannot be read ({error})") from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = JsonObject(path, json.loads(line), (f"line {number}",))
        except json.JSONDecodeError:
            break
        record.take("epoch", is_integer)
        records.append(record.content)
    return records


def progress_bar(description: str, total: int, done: int):
    """A rich progress bar. It shows nothing if the output is not a terminal."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=console.quiet or not console.is_terminal,
    )
    bar.add_task(description, total=total, completed=done, rate="")
    return bar
