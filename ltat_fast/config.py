"""The typed configuration of a run: what the flags are, the presets of each dataset, and what is refused.

Flags are generated from :class:`Config` and from the fields of the chosen method; a preset per dataset carries the
paper's settings; a flag wins over the preset; on ``--resume`` the run's own settings take the preset's place.
"""

import contextlib
import dataclasses
import io
import json
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ltat_fast.errors import UserError
from ltat_fast.field_types import check_types
from ltat_fast.methods import METHODS, Method


@dataclass(frozen=True)
class Config:
    """One run: a dataset, a method, and how it is trained and evaluated. Lengths of training are in epochs."""

    dataset: str = "digits-lt"
    """digits-lt, cifar10-lt, cifar100-lt, svhn-lt, tinyimagenet-lt or imagefolder-lt"""
    method: str = "ltat"
    """training method of the student"""
    arch: str = "smallresnet"
    """network of teacher and student"""
    imbalance_ratio: float | None = 10.0
    """largest class over smallest class; 1 is the balanced set; None takes a folder as it is"""
    data_dir: Path | None = None
    """where the images are (and where a download goes); not needed for digits-lt"""
    image_size: int | None = None
    """imagefolder-lt: resize and centre-crop every image to this many pixels"""
    out: Path | None = None
    """run folder; runs/<dataset>-<method>-<arch>-seed<seed> if not given"""

    epochs: int = 40
    """epochs of the student"""
    teacher_epochs: int = 20
    """epochs of the balanced self-teacher"""
    batch_size: int = 64
    """images a step, over all processes"""
    teacher_batch_size: int = 32
    """the same for the teacher"""
    lr: float = 0.1
    """initial (step) or highest (onecycle) learning rate of SGD"""
    momentum: float = 0.9
    """momentum of SGD"""
    weight_decay: float = 5e-4
    """weight decay of SGD, on every parameter"""
    lr_schedule: str = "step"
    """step: a tenth from 75 %, 90 % and the last epoch on (AT-BSL); igdm: after 50 % and 75 %; rslad: after 72 %, 87 %
    and 95 %; onecycle: linear up, linear down; or the shares of the epochs after which it is a tenth, as 0.5,0.8"""
    gamma: float | None = None
    """images a class in the teacher's balanced set, in units of the smallest class; the paper's IR / 2, at least 1, if
    not given"""
    teacher: str | None = None
    """use this teacher instead of training one: a finished run (its student; its teacher is RUN/teacher), a
    .safetensors file, torchvision:NAME[@FILE], timm:NAME[@FILE] or module:PACKAGE.MODULE:NAME (docs/teachers.md)"""

    eps: str = "8/255"
    """radius of the L_inf ball, a fraction or a decimal, pixels in [0, 1]"""
    step_size: str = "2/255"
    """step of the attack"""
    attack_steps: int = 10
    """steps of the attack in training"""
    augment: Literal["none", "randaugment", "autoaugment"] = "none"
    """on top of crop and flip"""

    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 where the hardware has it; evaluation is always fp32"""
    attack_precision: Literal["auto", "same", "fp32"] = "auto"
    """of the attack of training. same: as --precision; auto: the same, but fp32 for TRADES, whose attack starts where
    bf16 cannot tell its gradient's sign"""
    compile: Literal["auto", "none", "step", "graph"] = "auto"
    """how the step runs: eager (none), torch.compile (step) or one CUDA graph; auto: graph on a GPU, else eager"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one"""
    seed: int = 0
    """seed of weights, order, augmentation and attack noise; the long-tailed selection is always drawn with seed 0"""
    deterministic: bool = False
    """CUDA: deterministic kernels, so that a resumed run is bit-equal; CPU runs are anyway"""

    eval_every: int = 5
    """evaluate (clean, PGD-20) every so many epochs before the first learning-rate drop, and every epoch after it"""
    select_on: Literal["test", "heldout"] = "test"
    """what picks the best checkpoint: PGD-20 on the test set, as all published tables do, or on images held out"""
    heldout: float = 0.1
    """share of each training class held out when --select-on heldout"""
    eval_attacks: str = "clean,pgd20,autoattack"
    """attacks of the final evaluation, on best and last"""
    eval_batch_size: int = 256
    """images at a time in evaluation"""
    limit_eval: int | None = None
    """evaluate on this many test images only, spread evenly over the classes"""
    limit_autoattack: int | None = None
    """the same for AutoAttack alone, which takes far longer than the rest"""

    max_steps: int | None = None
    """stop each stage after this many steps: for trying things out"""
    save_minutes: float = 10.0
    """also save in the middle of an epoch, this often"""
    on_nan: Literal["stop", "rollback"] = "stop"
    """a loss or weight that is not finite: stop, or go on once from the last good state without the batch it was in"""
    resume: bool = False
    """go on with the run in --out, from its last checkpoint"""

    @property
    def run_dir(self) -> Path:
        return self.out or Path("runs") / f"{self.dataset}-{self.method}-{self.arch}-seed{self.seed}"


# What the paper sets for each dataset (Cho et al. 2025, section 5.1); what it leaves open is said in docs/ltat.md.
_PAPER = {"epochs": 100, "teacher_epochs": 30, "batch_size": 128, "teacher_batch_size": 32, "arch": "resnet18"}
PRESETS: dict[str, dict] = {
    "digits-lt": {"eps": "0.1", "step_size": "0.025", "lr_schedule": "onecycle", "precision": "fp32"},
    "cifar10-lt": {**_PAPER, "imbalance_ratio": 50.0},
    "cifar100-lt": {**_PAPER, "imbalance_ratio": 10.0},
    "svhn-lt": {**_PAPER, "imbalance_ratio": 50.0},
    "tinyimagenet-lt": {**_PAPER, "imbalance_ratio": 10.0, "arch": "preactresnet18"},
    "imagefolder-lt": {**_PAPER, "imbalance_ratio": None},
}
# Options of a method by (dataset or network, method); those of the dataset, then those of the network.
METHOD_PRESETS: dict[tuple[str, str], dict] = {
    ("digits-lt", "ltat"): {"alpha": 5.0},  # one of 1, 3, 5, 10, 30: README, "Demo"
    ("digits-lt", "rslad"): {"loss_scale": 1.0},  # a tenth is slow: PGD-20 of 59 after 25 epochs, and of 69 with 1
    ("wrn-34-10", "mart"): {"beta": 6.0},
    ("cifar100-lt", "robal"): {"robal_dataset": "cifar100"},
}
# What may differ between a run and its resumption: where and how it runs, not what is trained. Another device or
# evaluation batch moves results by rounding, and AutoAttack's random parts, which it seeds batch by batch.
FREE_ON_RESUME = {"resume", "out", "data_dir", "device", "save_minutes", "eval_batch_size", "on_nan"}


def ratio(text: str, name: str = "value") -> float:
    """A positive number from "8/255" or "0.031". Raises UserError otherwise."""
    numerator, slash, denominator = text.partition("/")
    try:
        value = float(numerator) / float(denominator if slash else 1)
    except (ValueError, ZeroDivisionError):
        raise UserError(f"--{name} takes a fraction such as 8/255 or a decimal such as 0.031, not {text!r}") from None
    if not 0 < value <= 1:
        raise UserError(f"--{name} must be above 0 and at most 1 (pixels are in [0, 1]), not {text}")
    return value


def choose(kind: str, value: str, options: Iterable[str]) -> None:
    """Refuse a ``value`` that is not among the ``options``, naming them."""
    if value not in options:
        raise UserError(f"unknown {kind} {value!r}: choose one of {', '.join(sorted(options))}")


def validate(config: Config, method: Method) -> None:
    """Refuse, with one sentence, what cannot work. Cheap: nothing is loaded."""
    from ltat_fast.attacks.by_name import parse_attacks
    from ltat_fast.models import ARCHS
    from ltat_fast.schedule import parse_schedule

    check_types(config)
    check_types(method)
    choose("dataset", config.dataset, PRESETS)
    choose("method", config.method, METHODS)
    choose("arch", config.arch, ARCHS)
    ratio(config.eps, "eps")
    ratio(config.step_size, "step-size")
    parse_attacks(config.eval_attacks)
    parse_schedule(config.lr_schedule)
    if config.imbalance_ratio is None:
        if config.dataset != "imagefolder-lt":
            raise UserError(f"--imbalance-ratio None is for imagefolder-lt; {config.dataset} needs a number, 1 or more")
    elif not (math.isfinite(config.imbalance_ratio) and config.imbalance_ratio >= 1):
        raise UserError(f"--imbalance-ratio must be 1 (balanced) or more, not {config.imbalance_ratio:g}")
    at_least_one = ("epochs", "teacher_epochs", "batch_size", "teacher_batch_size", "attack_steps", "eval_every")
    optional = ("eval_batch_size", "image_size", "limit_eval", "limit_autoattack", "max_steps")
    for name in at_least_one + optional:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be 1 or more, not {value}")
    for name in ("lr", "save_minutes", "gamma"):
        value = getattr(config, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UserError(f"--{name.replace('_', '-')} must be a positive number, not {value}")
    if not 0 <= config.momentum < 1:
        raise UserError(f"--momentum must be at least 0 and below 1, not {config.momentum:g}")
    if not 0 <= config.weight_decay < math.inf:
        raise UserError(f"--weight-decay must be 0 or more, not {config.weight_decay:g}")
    if not 0 < config.heldout < 1:
        raise UserError(f"--heldout is a share between 0 and 1, not {config.heldout:g}")
    if config.image_size and config.dataset != "imagefolder-lt":
        raise UserError(f"--image-size is for imagefolder-lt; {config.dataset} has images of one size")
    if config.compile == "graph" and config.device == "cpu":
        raise UserError("--compile graph is a CUDA graph and needs a GPU; use step or none with --device cpu")
    if config.teacher is not None and METHODS[config.method].teacher == "none":
        raise UserError(f"--teacher is not used by --method {config.method}")
    method.check()


def to_json(config: Config, method: Method) -> dict:
    """The content of RUN/config.json."""
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items()}
    return settings | {"method_options": dataclasses.asdict(method)}


def from_json(settings: dict) -> tuple[Config, Method]:
    """The inverse of :func:`to_json`, validated; fields this version does not know are refused."""
    settings = {**settings}
    options = settings.pop("method_options", {})
    unknown = set(settings) - {field.name for field in dataclasses.fields(Config)}
    if unknown:
        raise UserError(f"it has settings this version does not know: {', '.join(sorted(unknown))}")
    for name in ("data_dir", "out"):
        if settings.get(name) is not None:
            settings[name] = Path(settings[name])
    config = Config(**settings)
    choose("method", config.method, METHODS)
    method = METHODS[config.method](**options)
    validate(config, method)
    return config, method


def load(run_dir: Path) -> tuple[Config, Method]:
    """The configuration of an existing run."""
    path = run_dir / "config.json"
    try:
        return from_json(json.loads(path.read_text()))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{run_dir} is not a run: it has no config.json") from None
    except (UserError, OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as a run's configuration: {error}") from None


def differences(old: Config, old_method: Method, new: Config, new_method: Method) -> list[str]:
    """The settings in which two configurations differ, of those that matter on resume: "lr (0.1 -> 0.2)"."""
    a = dataclasses.asdict(old) | dataclasses.asdict(old_method)
    b = dataclasses.asdict(new) | dataclasses.asdict(new_method)
    return [f"{k} ({a.get(k)} -> {b.get(k)})" for k in b if k not in FREE_ON_RESUME and a.get(k) != b[k]]


def parse_args(argv: list[str] | None = None) -> tuple[Config, Method]:
    """Flags to a validated configuration: preset (or, on --resume, the run's own settings), then flags."""
    import argparse

    import tyro

    argv = sys.argv[1:] if argv is None else argv
    # A first look, because the presets and the method's own flags depend on these.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--dataset", default=Config.dataset)
    first.add_argument("--method")
    first.add_argument("--arch")
    first.add_argument("--out", type=Path)
    first.add_argument("--resume", action="store_true")
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # what is wrong is for tyro to say, below
            seen, _ = first.parse_known_args(argv)
    except SystemExit:
        seen = argparse.Namespace(dataset=Config.dataset, method=None, arch=None, out=None, resume=False)

    default = None
    if seen.resume and seen.out and (seen.out / "config.json").exists():
        default, method = load(seen.out)
        default = dataclasses.replace(default, out=seen.out)
        if seen.method not in (None, method.name):
            choose("method", seen.method, METHODS)
            method = METHODS[seen.method]()
    if default is None:
        choose("dataset", seen.dataset, PRESETS)
        name = seen.method or Config.method
        choose("method", name, METHODS)
        default = Config(dataset=seen.dataset, **PRESETS[seen.dataset])
        presets = (METHOD_PRESETS.get((key, name), {}) for key in (seen.dataset, seen.arch or default.arch))
        method = METHODS[name](**{option: value for preset in presets for option, value in preset.items()})

    options = dataclasses.field(default_factory=lambda: method)
    arguments = dataclasses.make_dataclass(
        "Arguments", [("config", Config, dataclasses.field(default=default)), ("options", type(method), options)]
    )
    parsed = tyro.cli(
        tyro.conf.OmitArgPrefixes[arguments],
        prog="python -m ltat_fast.train",
        description="Long-tailed adversarial training: balanced self-teacher, then student.",
        args=argv,
    )
    validate(parsed.config, parsed.options)
    return parsed.config, parsed.options
