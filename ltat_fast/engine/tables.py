"""Runs as the paper's table: Clean, PGD, AA, T-Clean, T-PGD for best and last, mean and std over seeds."""

import dataclasses
import io
import json
from pathlib import Path
from statistics import mean, stdev

from rich.console import Console
from rich.table import Table

from ltat_fast.errors import UserError
from ltat_fast.methods import METHODS

# heading, attack, group of classes
COLUMNS = [
    ("Clean", "clean", "all"),
    ("PGD", "pgd20", "all"),
    ("AA", "autoattack", "all"),
    ("T-Clean", "clean", "tail"),
    ("T-PGD", "pgd20", "tail"),
]
# Runs that differ in nothing but these are repetitions of one experiment, if all trained their own teacher or none did.
NOT_THE_EXPERIMENT = {"seed", "out", "data_dir", "teacher", "device", "resume", "eval_batch_size", "save_minutes"}


def load_results(run_dir: Path) -> tuple[dict, dict]:
    """config.json and eval.json of a run. Raises UserError if it has none yet."""
    return read_json(run_dir / "config.json"), read_json(run_dir / "eval.json")


def read_json(path: Path) -> dict:
    """The object in a JSON file of a run. Raises UserError if it is not there or damaged."""
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path.parent} has no results: {path.name} is not there") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged and cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it does not hold a JSON object")
    return content


def rows(run_dirs: list[Path]) -> list[dict]:
    """One dict an experiment and checkpoint: its config, "checkpoint", "seeds", and a list of values a column."""
    experiments: dict[str, list[tuple[dict, dict]]] = {}
    for run_dir in dict.fromkeys(path.resolve() for path in run_dirs):  # a run named twice counts once
        config, results = load_results(run_dir)
        settings = {k: v for k, v in config.items() if k not in NOT_THE_EXPERIMENT}
        key = json.dumps(settings | {"given_teacher": config.get("teacher") is not None}, sort_keys=True)
        experiments.setdefault(key, []).append((config, results))
    table = []
    for runs in experiments.values():
        for which in ("best", "last"):
            scores = [results[which] for _, results in runs if which in results]
            values = {
                heading: [s[attack][group] for s in scores if s.get(attack, {}).get(group) is not None]
                for heading, attack, group in COLUMNS
            }
            images = {s[attack]["images"] for s in scores for attack in ("clean", "autoattack") if attack in s}
            config = runs[0][0]
            table.append(
                {"config": config, "checkpoint": which, "seeds": len(runs), "images": images, "values": values}
            )
    return table


def cell(values: list[float], seeds: int) -> str:
    """ "38.85", over several seeds "38.85 ± 0.21", measured on some of them "38.85 (1 of 3)", on none "-"."""
    if not values:
        return "-"
    spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return f"{mean(values):.2f}{spread}" + (f" ({len(values)} of {seeds})" if len(values) < seeds else "")


def label(config: dict) -> str:
    """The method, and those of its options that are not its defaults: "ard igdm_alpha=20.0"."""
    known = METHODS.get(config["method"])
    defaults = dataclasses.asdict(known()) if known else {}
    options = config.get("method_options", {})
    changed = [f"{name}={value}" for name, value in options.items() if defaults.get(name) != value]
    return " ".join([config["method"], *changed])


def render(run_dirs: list[Path]) -> str:
    """The table as text."""
    table = Table(title=None)
    for heading in ("method", "dataset", "IR", "arch", "checkpoint", "seeds", *(c[0] for c in COLUMNS)):
        table.add_column(heading, justify="right" if heading in [c[0] for c in COLUMNS] else "left", no_wrap=True)
    entries = rows(run_dirs)
    for row in entries:
        c = row["config"]
        ir = "as found" if c["imbalance_ratio"] is None else f"{c['imbalance_ratio']:g}"
        name = [label(c), c["dataset"], ir, c["arch"], row["checkpoint"], str(row["seeds"])]
        table.add_row(*name, *(cell(row["values"][heading], row["seeds"]) for heading, _, _ in COLUMNS))
    out = io.StringIO()
    Console(file=out, width=250).print(table)  # more than it needs: a narrow console would cut the numbers short
    images = sorted(set().union(*(row["images"] for row in entries)))
    return (
        out.getvalue()
        + f"Percent of {' or '.join(map(str, images))} test images; tail: see eval.json. "
        + _note(entries)
    )


def _note(entries: list[dict]) -> str:
    on = {row["config"]["select_on"] for row in entries}
    if on == {"heldout"}:
        return "Best epoch by PGD-20 on held-out training images."
    return "Best epoch by PGD-20 on the test set, as in the published tables: optimistic; compare last too."
