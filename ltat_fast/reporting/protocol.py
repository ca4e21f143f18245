"""The evaluation protocol of a study in words and exact fractions: threat model, attacks, images and selection."""

import re
import shlex
from collections.abc import Iterable
from fractions import Fraction
from importlib import metadata

from ltat_fast.attacks.by_name import AUTOATTACK, OWN_PARTS
from ltat_fast.reporting.study import Study, attack_name
from ltat_fast.runs.finished import FinishedRun, RunConfig, exact_fraction
from ltat_fast.runs.results import BALANCED, CHECKPOINTS

OBJECTIVES = {
    "pgd": "cross-entropy",
    "scaled-pgd": "cross-entropy of rescaled logits",
    "cw": "margin of the logits (Carlini-Wagner)",
}
NOT_SHOWN = {"out", "data_dir", "seed", "resume", "teacher"}


def exactly(value: Fraction) -> str:
    """Format "8/255 (0.03137)" or "1/10 (0.1)"."""
    return f"{value} ({float(value):.4g})"


def attacks(study: Study) -> list[dict[str, str]]:
    """One entry per attack: its objective, number and size of steps, start, and number of images."""
    eps = exact_fraction(study.config.eps)
    return [
        _attack(name, eps) | {"name": attack_name(name), "images": _images(study, name)} for name in study.attacks()
    ]


def _attack(name: str, eps: Fraction) -> dict[str, str]:
    if name == "clean":
        return {"objective": "none", "steps": "-", "step": "-", "start": "the image itself"}
    if name == "fgsm":
        return {"objective": "cross-entropy", "steps": "1", "step": exactly(eps), "start": "the image itself"}
    if match := re.fullmatch(r"(\D+)(\d+)(?:x(\d+))?", name):
        start = f"the worst of {match[3]}, uniform in the ball" if match[3] else "1, uniform in the ball"
        objective = OBJECTIVES.get(match[1], match[1])
        return {"objective": objective, "steps": match[2], "step": exactly(eps / 4), "start": start}
    if name in AUTOATTACK:
        version = AUTOATTACK[name]
        parts = "APGD-CE, targeted APGD-DLR, targeted FAB, Square" if version == "standard" else "as in the package"
        return {"objective": parts, "steps": f"{version} version", "step": "adaptive", "start": "as in the original"}
    if name in OWN_PARTS:
        steps = "5000 queries" if name == "square" else "100"
        return {"objective": "a part of AutoAttack", "steps": steps, "step": "adaptive", "start": "as in the original"}
    if name == "worst":
        return {"objective": "an image must survive every attack", "steps": "-", "step": "-", "start": "-"}
    return {"objective": "see the code of this version", "steps": "-", "step": "-", "start": "-"}


def _images(study: Study, attack: str) -> str:
    numbers = set().union(*(e.images(which, attack) for e in study.experiments for which in CHECKPOINTS))
    return " or ".join(map(str, sorted(numbers))) or "not recorded"


def images_and_selection(study: Study) -> str:
    """A note to the main table: "Percent of 600 test images; AutoAttack: of 100. Tail: 9. Best epoch: ..."."""
    of = {name: _images(study, name) for name in study.attacks()}
    usual = of.get("clean", "the")
    others = "".join(f"; {attack_name(name)}: of {number}" for name, number in of.items() if number != usual)
    tail = ", ".join(study.class_names()[c] for c in study.groups["tail"]) if study.groups else "not recorded"
    return (
        f"Percent of {usual} test images{others}. Tail (T-), the rarest tenth of the classes: {tail}. "
        f"{_balanced(study)}Best epoch: {_selection(study)}."
    )


def _balanced(study: Study) -> str:
    has_it = any(run.evaluation.has_group(BALANCED) for run in study.runs)
    said = "Balanced (B-): mean of the accuracies of the classes, which have different numbers of test images. "
    return said if has_it else ""


def facts(study: Study, test_counts: dict[str, int]) -> list[tuple[str, str]]:
    """Name and text of every fact that does not belong to a single attack. test_counts: images by group, if known."""
    eps = exact_fraction(study.config.eps)
    told = [
        ("Threat model", f"L∞ ball of radius ε = {exactly(eps)} around the image, pixels in [0, 1], clipped to [0, 1]"),
        ("Test images", _test_images(test_counts)),
        ("Random numbers", "the start noise is a function of seed 0, the attack and the index of the image"),
        ("Arithmetic", "float32 without TF32, eval mode, batch norm folded into the convolutions"),
        ("AutoAttack", _autoattack(study.runs)),
        ("Best checkpoint", _selection(study)),
        ("Plots and headline", f"show the {study.checkpoint} checkpoint"),
        ("Attack in training", _training_attack(study)),
        ("Tail", _tail(study)),
    ]
    return [(name, text) for name, text in told if name != "AutoAttack" or AUTOATTACK.keys() & study.attacks()]


def _test_images(counts: dict[str, int]) -> str:
    subset = "an attack on fewer images takes them evenly spaced from the test set sorted by class, not at random"
    if not counts:
        return f"from the test set of the dataset, their numbers are in the table below; {subset}"
    of = ", ".join(f"{number} {name}" for name, number in counts.items() if name != "all")
    return f"the test set has {counts['all']} ({of}); {subset}"


def _autoattack(runs: Iterable[FinishedRun]) -> str:
    package = f"the package pyautoattack of its authors, {_autoattack_version(runs)}"
    return (
        "the standard version of ltat-fast, with the budgets of the original; every success is confirmed in float32. "
        f"Results of earlier versions of ltat-fast, and its attacks of other names, are from {package}"
    )


def _autoattack_version(runs: Iterable[FinishedRun]) -> str:
    recorded = {run.environment.packages.get("pyautoattack") for run in runs} - {None}
    if recorded:
        return f"version {', '.join(sorted(recorded))}"
    try:
        return f"version not recorded in env.json; this page was made with {metadata.version('pyautoattack')} installed"
    except metadata.PackageNotFoundError:
        return "version not recorded in env.json"


def _selection(study: Study) -> str:
    kinds = {e.config.select_on for e in study.experiments}
    said = {
        "test": "highest PGD-20 accuracy on the test set, as in the published tables (optimistic: compare last too)",
        "heldout": "highest PGD-20 accuracy on held-out training images",
        "val": "highest PGD-20 accuracy on the validation split",
    }
    return "; or ".join(said.get(kind, kind) for kind in sorted(kinds, reverse=True))


def _training_attack(study: Study) -> str:
    return "; or ".join(sorted(filter(None, {_attack_in_words(e.config) for e in study.experiments})))


def _attack_in_words(config: RunConfig) -> str:
    """The training attack of the student; empty if the run did not record it."""
    if config.settings.get("attack") == "n-fgsm":
        words = "N-FGSM, one step of eps from noise of radius 2 eps"
    elif config.step_size and config.attack_steps:
        words = f"{config.attack_steps} steps of {exactly(exact_fraction(config.step_size))}"
    else:
        return ""
    return f"{words}, with an eps for each class" if config.settings.get("eps_balance") else words


def _tail(study: Study) -> str:
    if not study.groups:
        return "the tenth of the classes with the fewest training images; the runs did not record which (no env.json)"
    names, counts = study.class_names(), study.counts
    tail = ", ".join(f"{names[c]} ({counts[c]})" for c in study.groups["tail"])
    return f"the tenth of the classes with the fewest training images: {tail}"


def settings(study: Study) -> list[tuple[str, list[str]]]:
    """Every setting with its value in each experiment, the options of the methods last."""
    configs = [e.config for e in study.experiments]
    keys = dict.fromkeys(key for c in configs for key in c.settings if key not in NOT_SHOWN)
    table = [(key, [_plain(c.settings.get(key)) for c in configs]) for key in keys]
    table.append(("teacher", [_plain(c.teacher and without_folders(c.teacher)) for c in configs]))
    options = dict.fromkeys(key for c in configs for key in c.method_options)
    return table + [(key, [_plain(c.method_options.get(key)) for c in configs]) for key in options]


def _plain(value: object) -> str:
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def environments(study: Study) -> list[dict[str, str]]:
    """One entry per run: hardware, versions and command. Absolute paths are shortened to their last name."""
    told = []
    for run in study.runs:
        env = run.environment
        packages = ", ".join(f"{name} {version}" for name, version in env.packages.items() if version)
        where = ", ".join(part for part in (env.gpu or env.machine, env.precision) if part)
        told.append(
            {
                "run": run.name,
                "seed": str(run.config.seed),
                "images": env.index_hash or "-",
                "packages": f"Python {env.python}, {packages}" if env.python else "-",
                "hardware": where or "-",
                "git": env.git or "-",
                "command": command(env.command or "") or "-",
            }
        )
    return told


def command(line: str) -> str:
    """A recorded command line as it is typed, with absolute paths shortened to their last name."""
    try:
        words = shlex.split(line)
    except ValueError:
        return ""
    if words and (module := re.search(r"ltat_fast/(\w+)\.py$", words[0])):
        words[:1] = ["python", "-m", f"ltat_fast.{module[1]}"]
    return shlex.join(map(without_folders, words))


def without_folders(word: str) -> str:
    """Shorten "--out=/home/me/run" to "--out=run"; a relative path stays as it is."""
    return re.sub(r"(?:^|(?<=[=@]))/.*?([^/]*)/?$", r"\1", word)
