"""The results of a run on the training images that it held out (``--select-on heldout``)."""

from pathlib import Path

from ltat_fast.attacks.results import BALANCED, Result
from ltat_fast.runs.json_object import is_number
from ltat_fast.runs.records import read_metrics
from ltat_fast.runs.results import CheckpointResults, EvalFile

ATTACKS = ("clean", "pgd20")


def on_heldout_images(run_dir: Path) -> EvalFile:
    """Return the results of a finished run, from metrics.jsonl: for the best and for the last epoch.

    The best epoch is the one with the highest PGD-20 accuracy on these images. Empty if the run held out no images.
    """
    needed = [f"heldout_{attack}" for attack in ATTACKS]
    records = read_metrics(run_dir / "metrics.jsonl")
    records = [record for record in records if all(is_number(record.get(name)) for name in needed)]
    if not records:
        return EvalFile()
    best = max(records, key=lambda record: record["heldout_pgd20"])
    return EvalFile({"best": _results(best), "last": _results(records[-1])})


def _results(record: dict) -> CheckpointResults:
    """Return the held-out accuracies in a record of metrics.jsonl."""
    results = {}
    for attack in ATTACKS:
        groups = {group: record.get(f"heldout_{group}_{attack}") for group in ("tail", BALANCED)}
        if groups[BALANCED] is None:  # not recorded, because all classes hold out the same number of images
            del groups[BALANCED]
        results[attack] = Result(record[f"heldout_{attack}"], groups)
    return CheckpointResults(results)
