"""The records of a training stage: metrics.jsonl (one object per epoch), steps.jsonl (one per --log-every steps), tb/.

A damaged record never stops a run or a reader: its line is skipped, and its number is printed.
"""

import contextlib
import json
import os
from pathlib import Path

from ltat_fast import files
from ltat_fast.runs import log
from ltat_fast.runs.json_object import is_integer

EPOCHS, STEPS = "metrics.jsonl", "steps.jsonl"
NAMED_LINES = 10  # number of damaged lines that a warning names; the others are counted
LARGEST = 2**53  # a number of an epoch or of a step above it is damage


class StageLog:
    """Append records to ``folder/metrics.jsonl``, ``folder/steps.jsonl`` and ``folder/tb``.

    epochs_done, steps_done: up to where the records belong to the state of the stage. Later records are dropped; a run
    that was killed after writing them left them there. A file with damaged lines is kept beside, as
    "metrics.jsonl.damaged".
    """

    def __init__(self, folder: Path, epochs_done: int, steps_done: int = 0):
        self.folder = folder
        self._open(epochs_done, steps_done)

    def _open(self, epochs_done: int, steps_done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        _drop_after(self.folder / EPOCHS, "epoch", epochs_done)
        _drop_after(self.folder / STEPS, "step", steps_done)
        tb = self.folder / "tb"
        with files.oserror_as_user_error(tb):
            # Two writers, because one counts epochs, the other steps.
            self.epochs = SummaryWriter(str(tb), purge_step=epochs_done + 1)
            self.steps = SummaryWriter(str(tb / "steps"), purge_step=steps_done + 1)

    def go_back(self, epochs_done: int, steps_done: int) -> None:
        """Drop the records after this position, to which the stage has returned."""
        self.close()
        self._open(epochs_done, steps_done)

    def epoch(self, record: dict) -> None:
        """Append the record of an epoch, whose number from 1 is in "epoch"."""
        self._append(EPOCHS, record, self.epochs, record["epoch"])
        with files.oserror_as_user_error(self.folder / "tb"):
            self.epochs.flush()
            self.steps.flush()

    def step(self, record: dict) -> None:
        """Append a record whose "step" is the number of steps that the stage has done."""
        self._append(STEPS, record, self.steps, record["step"])

    def _append(self, name: str, record: dict, tensorboard, position: int) -> None:
        files.append(self.folder / name, json.dumps(record) + "\n")
        with files.oserror_as_user_error(self.folder / "tb"):
            for key, value in record.items():
                if isinstance(value, int | float) and key not in ("epoch", "step"):
                    tensorboard.add_scalar(key, value, position)

    def sync(self) -> None:
        """Wait until all records are on the disk. A state saved after it never claims what these files lack."""
        for path in (self.folder / EPOCHS, self.folder / STEPS):
            if path.exists():  # someone may have removed it; that is no reason to stop
                files.sync(path)

    def close(self) -> None:
        for writer in (self.epochs, self.steps):
            with contextlib.suppress(OSError):  # a full disk, which was reported before
                writer.close()


class NoLog:
    """Stand-in for :class:`StageLog` in all processes except the main one."""

    def go_back(self, epochs_done: int, steps_done: int) -> None:
        pass

    def epoch(self, record: dict) -> None:
        pass

    def step(self, record: dict) -> None:
        pass

    def sync(self) -> None:
        pass

    def close(self) -> None:
        pass


def read_metrics(path: Path) -> list[dict]:
    """Return the records of a metrics.jsonl; none if there is no such file. Damaged lines are skipped and reported."""
    return _read_and_report(path, "epoch")


def read_steps(path: Path) -> list[dict]:
    """Return the records of a steps.jsonl like :func:`read_metrics`."""
    return _read_and_report(path, "step")


def _read_and_report(path: Path, key: str) -> list[dict]:
    records, damage, _ = _read(path, key)
    if damage:
        log.say(f"WARNING: {path}: {damage}")
    return records


def _read(path: Path, key: str) -> tuple[list[dict], str, bytes | None]:
    """Return the good records, what is wrong with the rest (empty if nothing), and the content, None if unreadable."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return [], "", b""
    except OSError as error:
        return [], f"it cannot be read ({error.strerror or error})", None
    # Only b"\n" ends a record. Text has more line ends, for example U+001E, which a damaged record may contain.
    lines = content.removesuffix(b"\n").split(b"\n") if content else []
    read = [_record(line, key) for line in lines]
    bad = [str(number) for number, record in enumerate(read, 1) if record is None]
    named = ", ".join(bad[:NAMED_LINES]) + (f" and {len(bad) - NAMED_LINES} more" if len(bad) > NAMED_LINES else "")
    damage = f"damaged and skipped: line{'s' * (len(bad) > 1)} {named}" if bad else ""
    return [record for record in read if record is not None], damage, content


def _record(line: bytes, key: str) -> dict | None:
    """Return the record in ``line``, or None if it is damaged."""
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    position = record.get(key) if isinstance(record, dict) else None
    return record if is_integer(position) and 1 <= position < LARGEST else None


def _drop_after(path: Path, key: str, last: int) -> None:
    """Keep the records of ``path`` up to ``last``. If it has damaged lines, keep the whole file under another name."""
    records, damage, content = _read(path, key)
    if damage:
        aside = path.with_name(f"{path.name}.damaged")
        log.say(f"WARNING: {path}: {damage}; the damaged file is kept as {aside.name}")
        if content is None:
            with files.oserror_as_user_error(path):
                os.replace(path, aside)
        else:
            with files.atomic_write(aside) as file:
                file.write(content)
    with files.atomic_write(path) as file:
        file.write("".join(json.dumps(record) + "\n" for record in records if record[key] <= last).encode())
