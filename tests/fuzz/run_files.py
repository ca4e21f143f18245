"""Fuzz the commands with run folders in which one file lies: its content is changed, its checksum fits again.

``python run_files.py RUN SEED SECONDS ITERATIONS`` copies the finished run RUN, changes one value of one file, runs one
command in this process, and prints one JSON line at the end. A command may do its work or refuse with one sentence. A
traceback, a hang, another exit status or more than one sentence is a finding. The change is a function of (seed,
iteration).
"""

import contextlib
import copy
import io
import json
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1]))
from helpers import train_runs
from ltat_fast import trust
from ltat_fast.runs.weights import read_weights, write_weights

MEMORY = 3 * 2**30  # bytes in addition to the imports
HANG = 60  # seconds per command
STATUSES = {0, 1, 2, 3}
VALUES = (None, True, False, 0, 1, -1, 2, 7, 0.5, -0.0, 1e308, float("nan"), float("inf"), 10**8, 2**31, 2**63, 10**400)
VALUES += (
    "",
    "x",
    "0",
    "1/0",
    "0/1",
    "\n",
    "\x1b[2J",
    "\ufffe",
    "\ud800",
    "../..",
    "/",
    "a" * 70000,
    "=1+1",
    "<b>",
    "|",
)
VALUES += (
    [],
    [[]],
    [None],
    ["1", "2"],
    [0] * 10,
    [1.5] * 10,
    [10**9] * 10,
    {},
    {"x": {}},
    {"": []},
    "a,b",
    "module:os:abort",
)
DTYPES = (torch.float8_e4m3fn, torch.float16, torch.float64, torch.int64, torch.bool, torch.complex64, torch.uint8)
JSON = ("config.json", "env.json", "eval.json", "teacher/eval.json", "analysis.json")
LINES = ("metrics.jsonl", "steps.jsonl", "teacher/metrics.jsonl")
WEIGHTS = ("best", "last", "resume", "resume.previous", "teacher")
COMMANDS = {
    "report": lambda run: ("report", str(run)),
    "page": lambda run: (
        "report",
        str(run),
        "--html",
        str(run.parent / "page.html"),
        "--csv",
        str(run.parent / "t.csv"),
    ),
    "evaluate": lambda run: ("evaluate", str(run), "--attacks", "clean", "--limit-eval", "20"),
    "again": lambda run: ("evaluate", str(run), "--attacks", "clean", "--limit-eval", "20", "--again"),
    "analyse": lambda run: (
        "analyse",
        str(run),
        "--limit",
        "10",
        "--parts",
        "alignment,linearity,inequality,classwise",
    ),
    "train": lambda run: ("train", "--out", str(run), "--resume"),
    "export": lambda run: ("export", str(run)),
}
# A command is chosen as often as it stands here; the export takes seconds.
OFTEN = ("report",) * 6 + ("page", *("evaluate", "again") * 3, *("analyse", "train") * 3)


class Hang(BaseException):
    """The time of a command is over."""


def change(content, rng: random.Random) -> object:
    """Return ``content``, which is JSON, with one value replaced, removed, added or repeated."""
    places = list(_places(content))
    if not places or rng.random() < 0.03:
        return rng.choice(VALUES)
    holder, key = rng.choice(places)
    kind = rng.random()
    if kind < 0.6:
        holder[key] = copy.deepcopy(rng.choice(VALUES))
    elif kind < 0.7:
        del holder[key]
    elif kind < 0.8:
        holder[key] = _scaled(holder[key], rng)
    elif kind < 0.9:
        holder[key] = copy.deepcopy(rng.choice(places)[0])
    elif isinstance(holder, dict):
        holder[rng.choice([v for v in VALUES if isinstance(v, str)])] = copy.deepcopy(rng.choice(VALUES))
    else:
        holder.append(copy.deepcopy(rng.choice(VALUES)))
    return content


def _places(content):
    pairs = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in pairs:
        yield content, key
        yield from _places(value)


def _scaled(value, rng: random.Random):
    if isinstance(value, bool) or not isinstance(value, int | float | list):
        return [value]
    if isinstance(value, list):
        return value * 2 if rng.random() < 0.5 else value[:-1]
    return value * rng.choice((-1, 0.1, 10, 1000, 10**6))


def change_tensors(tensors: dict, rng: random.Random) -> None:
    name = rng.choice(sorted(tensors))
    tensor, kind = tensors[name], rng.randrange(7)
    if kind == 0:
        tensors[name] = tensor.to(torch.float32).to(rng.choice(DTYPES))
    elif kind == 1:
        tensors[name] = tensor.flatten()[:-1]
    elif kind == 2:
        tensors[name] = tensor[None]
    elif kind == 3:
        tensors[name] = torch.full_like(
            tensor, float(rng.choice(("nan", "inf", "1e30", "-1"))) if tensor.is_floating_point() else -1
        )
    elif kind == 4:
        del tensors[name]
    elif kind == 5:
        tensors[rng.choice(("x", "", "\x1b[2J", "model.x", "a" * 5000))] = tensors.pop(name)
    else:
        tensors[name] = torch.zeros(0)


def weights_file(run: Path, which: str) -> Path:
    return run / ("teacher/checkpoints/last" if which == "teacher" else f"checkpoints/{which}")


def damage(run: Path, rng: random.Random) -> str:
    """Change one file of ``run``, and return its name."""
    kind = rng.random()
    if kind < 0.5:
        name = rng.choice([name for name in JSON if (run / name).exists()])
        content = change(json.loads((run / name).read_text()), rng)
        (run / name).write_text(json.dumps(content))
    elif kind < 0.6:
        name = rng.choice([name for name in LINES if (run / name).exists()])
        lines = (run / name).read_text().splitlines()
        place = rng.randrange(len(lines))
        lines[place] = json.dumps(change(json.loads(lines[place]), rng))
        (run / name).write_text("\n".join(lines) + "\n")
    else:
        which = rng.choice(WEIGHTS)
        file = weights_file(run, which)
        file = file.with_name(file.name + ".safetensors")
        name = str(file.relative_to(run))
        tensors, card = read_weights(file)
        if rng.random() < 0.6:
            card = change(card, rng)
        else:
            change_tensors(tensors, rng)
        write_weights(file, tensors, card)
    return name


def attempt(original: Path, seed: int, iteration: int, folder: Path) -> tuple[str, str | None]:
    """Return the command and how it ended: "0", "2", ... or a finding."""
    rng = random.Random(f"{seed} {iteration}")
    run = folder / "run"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(original, run)
    name = damage(run, rng)
    command = "export" if rng.random() < 0.02 else rng.choice(OFTEN)
    if command == "train" and rng.random() < 0.7:  # so that the states are read and the last epoch is trained again
        finished = run / "checkpoints" / "resume.safetensors"
        previous = finished.with_name("resume.previous.safetensors")
        if "resume." not in name:
            previous.replace(finished)
        elif "previous" in name:
            finished.unlink()
        (run / "eval.json").unlink(missing_ok=True)
    what = f"iteration {iteration}: {command} after a change of {name}"
    trust.reset()
    out, err = io.StringIO(), io.StringIO()
    signal.alarm(HANG)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            status = train_runs.status_of(*COMMANDS[command](run))
    except Hang:
        stack = traceback.format_exc()
        busy = "training/fit.py" in stack or "/attacks/" in stack  # a run may be asked to train for years
        return command, "busy" if busy else f"{what}: hang\n{stack[-3000:]}"
    except BaseException:
        return command, f"{what}\n{traceback.format_exc()[-3000:]}"
    finally:
        signal.alarm(0)
    said = err.getvalue()
    if status not in STATUSES:
        return command, f"{what}: status {status!r}\n{said[-2000:]}"
    sentences = [line for line in said.splitlines() if line.startswith("ltat_fast: error")]
    if status == 2 and (len(sentences) != 1 or not said.endswith(f"{sentences[0]}\n")):
        return command, f"{what}: not one sentence\n{said[-2000:]!r}"
    if any(not character.isprintable() and character not in "\n\r" for character in said + out.getvalue()):
        return command, f"{what}: control characters\n{(said + out.getvalue())[-2000:]!r}"
    return command, str(status)


def main() -> None:
    original, seed, seconds, iterations = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
    only = [int(number) for number in sys.argv[5:]]
    torch.set_num_threads(1)
    with contextlib.suppress(ValueError):
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    signal.signal(signal.SIGALRM, _hang)
    ends, findings, tried = {}, {}, 0
    deadline = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        for iteration in only or range(iterations):
            if time.monotonic() > deadline:
                break
            command, how = attempt(original, seed, iteration, Path(folder) / "copy")
            tried += 1
            if "\n" in how:
                where = how.strip().splitlines()[-1]
                if where not in findings:
                    findings[where] = how
                    print(how, file=sys.stderr, flush=True)
                how = "finding"
            ends.setdefault(command, {}).setdefault(how, 0)
            ends[command][how] += 1
    print(json.dumps({"tried": tried, "ends": ends, "findings": list(findings.values())}))


def _hang(*_) -> None:
    raise Hang


if __name__ == "__main__":
    main()
