"""The typed configuration of a run: every setting, the presets of each dataset, and the validation of both.

The command line is generated from the groups of settings below (:mod:`ltat_fast.flags`). Precedence: a flag wins over
the preset of the dataset; with ``--resume`` the settings of the run take the place of the preset.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ltat_fast.attacks import AttackConfig
from ltat_fast.attacks.by_name import parse_attacks
from ltat_fast.data import DATASETS
from ltat_fast.errors import UserError
from ltat_fast.field_types import check_types
from ltat_fast.methods import METHODS, Method
from ltat_fast.methods.igdm import WithIgdm
from ltat_fast.methods.modifiers.awp import gamma_of
from ltat_fast.models import ARCHS
from ltat_fast.models.libraries import is_foreign
from ltat_fast.schedule import parse_schedule

ARCH_CHOICES = (*ARCHS, "timm:NAME", "torchvision:NAME", "module:PACKAGE.MODULE:NAME")


def _choices(names: Iterable[str]):
    """Show the allowed values of a string flag in the help. They are checked by :func:`validate`."""
    return tyro.conf.arg(metavar="{" + ",".join(names) + "}")


@dataclass(frozen=True)
class DataSettings:
    """Images, classes and augmentation."""

    dataset: Annotated[str, _choices(DATASETS)] = "digits-lt"
    """dataset; digits-lt is embedded, imagefolder-lt is any folder with train/<class>/* and test/<class>/* or
    val/<class>/*, imagelist-lt any folder with train.txt and test.txt or val.txt, parquet-lt any folder of the Hugging
    Face hub (docs/data.md)"""
    imbalance_ratio: float | None = 10.0
    """size of the largest class divided by the size of the smallest class; 1 gives the balanced set, None keeps an
    image folder or list as it is"""
    data_dir: Path | None = None
    """folder of the images, and target of a download; digits-lt needs none"""
    image_size: int | None = None
    """resize and centre-crop every image of a folder or list to this height and width in pixels"""
    store_size: int | None = None
    """store the images of a folder or list at this height and width, not smaller than --image-size: training crops
    them at random to --image-size, and evaluation uses the centre"""
    crop: Literal["pad", "resized"] = "pad"
    """random crop in training; pad: of the image with 4 black pixels on each side, or without them if --store-size is
    given; resized: a random part of 8 to 100 percent of the image, resized"""
    data_placement: Literal["auto", "device", "stream"] = "auto"
    """where the images stay; device: in the memory of the device; stream: in a file, or in the memory of the host, from
    which they are read during training, so that they can be larger than the memory; auto: device if they fill at most
    half of its free memory"""
    bad_images: Literal["stop", "skip"] = "stop"
    """image files that cannot be read or decoded; stop: name them and end; skip: train without them and list them"""
    augment: Literal["none", "randaugment", "autoaugment"] = "none"
    """augmentation in addition to crop and flip"""


@dataclass(frozen=True)
class NetworkSettings:
    """Network of teacher and student."""

    arch: Annotated[str, _choices(ARCH_CHOICES)] = "smallresnet"
    """network of teacher and student (docs/networks.md)"""
    init: str = "none"
    """initial weights of both; none: random; published: those of timm or torchvision; or a .safetensors file. A last
    layer of another size stays random"""
    activation: Literal["relu", "silu"] = "relu"
    """activation function of that network"""
    teacher: str | None = None
    """use this teacher instead of training one: a finished run (RUN is its student, RUN/teacher its teacher), a
    .safetensors file, torchvision:NAME[@FILE], timm:NAME[@FILE] or module:PACKAGE.MODULE:NAME (docs/teachers.md)"""


@dataclass(frozen=True)
class TrainingSettings:
    """Method, length, optimizer and precision of training."""

    method: Annotated[str, _choices(METHODS)] = "ltat"
    """training method of the student"""
    settings: Literal["paper", "authors"] = "paper"
    """origin of the preset of epochs, batch size, learning rate and weight decay; paper: the LTAT paper; authors: the
    authors of the method, in their own code (known for some methods and datasets, docs/ltat.md)"""
    epochs: int = 40
    """number of epochs of the student"""
    teacher_epochs: int = 20
    """number of epochs of the balanced self-teacher"""
    batch_size: int = 64
    """images per step of the student, summed over all processes"""
    teacher_batch_size: int = 32
    """images per step of the teacher, summed over all processes"""
    accumulate: int = 1
    """split each batch into N equal micro-batches, one after the other, and update once; less memory, the same result
    up to rounding, but batch norm takes its statistics from a micro-batch (docs/memory.md)"""
    gamma: float | None = None
    """images per class in the teacher's balanced set, divided by the size of the smallest class; half the imbalance
    ratio if not given, as in the paper, but at least 1"""
    lr: float = 0.1
    """learning rate of SGD: the initial rate of a step schedule, the highest rate of onecycle"""
    lr_schedule: str = "step"
    """step: divide by 10 after 75 % and 90 % of the epochs and in the last epoch (AT-BSL); igdm: after 50 % and 75 %;
    rslad: after 72 %, 87 % and 95 %; onecycle: linear increase, then linear decrease; or a list of shares of the
    epochs, such as 0.5,0.8, after which the rate is divided by 10"""
    momentum: float = 0.9
    """momentum of SGD"""
    weight_decay: float = 5e-4
    """weight decay of SGD, applied to every parameter"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """precision of the training step and of the scores that select the best epoch; auto: bf16 on a GPU that supports
    it, the faster of both on a CPU. Final results always use fp32"""
    compile: Literal["auto", "none", "step", "graph"] = "auto"
    """how the training step runs; none: eager, step: torch.compile, graph: one CUDA graph; auto: graph on a GPU, eager
    on a CPU"""


@dataclass(frozen=True)
class ModifierSettings:
    """Additions to any method."""

    label_smoothing: float = 0.0
    """share of each label that the loss spreads evenly over all classes; the attack keeps hard labels"""
    awp: float | None = None
    """adversarial weight perturbation: its size gamma relative to the weights; 0 switches it off; None: 0.01 for
    --method awp, else 0"""
    awp_from: int = 1
    """first epoch, counted from 1, with a weight perturbation; earlier steps take as long, but do not perturb"""
    ema: float = 0.0
    """evaluate and save an exponential moving average of the weights with this decay per step, for example 0.995; 0: no
    average"""
    eps_balance: float = 0.0
    """RobustLT: give the training attack a larger eps for rarer classes; a share a of eps depends on the class, and 0
    gives every class the same eps"""
    eps_warmup: float = 0.0
    """RobustLT: share b of the epochs in which the eps of --eps-balance grows linearly from 0"""
    modify_teacher: bool = False
    """train the teacher of the run with these additions too"""


@dataclass(frozen=True)
class AttackSettings:
    """Threat model and training attack."""

    eps: str = "8/255"
    """radius of the L_inf ball, a fraction or a decimal number, for pixels in [0, 1]"""
    attack: Literal["pgd", "n-fgsm"] = "pgd"
    """training attack of the student; pgd: several steps; n-fgsm: one step from noise of twice the radius, which is
    much cheaper. The self-teacher is always trained with pgd"""
    step_size: str = "2/255"
    """step size of the training attack, in the units of eps; n-fgsm does not use it"""
    attack_steps: int = 10
    """number of steps of the training attack; n-fgsm does not use it"""
    attack_precision: Literal["auto", "same", "fp32"] = "auto"
    """precision of the training attack; same: the precision of the training step; auto: same, but fp32 for TRADES,
    whose attack starts where bf16 cannot represent the sign of the gradient"""


@dataclass(frozen=True)
class EvaluationSettings:
    """Evaluation during and after training."""

    eval_every: int = 5
    """evaluate (clean, PGD-20) every N epochs before the first drop of the learning rate, and every epoch after it"""
    select_on: Literal["auto", "test", "heldout", "val"] = "auto"
    """images on which PGD-20 selects the best checkpoint; test: the test set, as all published tables do; heldout:
    training images held out for this purpose; val: the validation split that some datasets have beside their test
    split; auto: val if there is one, else test"""
    heldout: float = 0.1
    """share of each training class that --select-on heldout holds out"""
    eval_attacks: str = "clean,pgd20,autoattack"
    """attacks of the final evaluation, which measures the best and the last checkpoint"""
    eval_batch_size: int = 256
    """images per batch in evaluation"""
    limit_eval: int | None = None
    """evaluate on this many test images only, spread evenly over the classes"""
    limit_autoattack: int | None = None
    """run AutoAttack, and its parts, on this many test images only; it takes far longer than the other attacks"""


@dataclass(frozen=True)
class RunSettings:
    """Run folder, seed, device and recovery."""

    out: Path | None = None
    """run folder; runs/<dataset>-<method>-<arch>-seed<seed> if not given"""
    seed: int = 0
    """seed of the weights, the order of the images, the augmentation and the attack noise; the long-tailed selection
    of images always uses seed 0"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """device; auto: cuda if a GPU is present"""
    deterministic: bool = False
    """use deterministic CUDA kernels, so that a resumed run is bit-equal; runs on a CPU always are"""
    resume: bool = False
    """continue the run in --out from its last saved state"""
    max_steps: int | None = None
    """stop each stage after this many steps, for a quick test"""
    log_every: int = 50
    """record losses, images per second and memory every N steps, in steps.jsonl and TensorBoard; the loss is checked as
    often. It is the only time within an epoch that training waits for the device, apart from saving"""
    save_minutes: float = 10.0
    """save the training state at least every N minutes, also in the middle of an epoch"""
    on_nan: Literal["stop", "rollback"] = "stop"
    """what to do if a loss or a weight is not finite; stop: end the run; rollback: continue once from the last good
    state and skip the batch that caused it"""
    on_collapse: Literal["warn", "stop"] = "warn"
    """what to do if a one-step training attack collapses: at the end of an epoch the network resists this attack, but
    not PGD-10; warn: say so and continue; stop: end the run"""


GROUPS: dict[str, type] = {
    "data": DataSettings,
    "network": NetworkSettings,
    "training": TrainingSettings,
    "modifiers": ModifierSettings,
    "attack": AttackSettings,
    "evaluation": EvaluationSettings,
    "run": RunSettings,
}


# dataclasses collects the fields of the base classes from the last base to the first.
@dataclass(frozen=True)
class Config(
    RunSettings, EvaluationSettings, AttackSettings, ModifierSettings, TrainingSettings, NetworkSettings, DataSettings
):
    """All settings of one run, except the options of its method."""

    @property
    def run_dir(self) -> Path:
        """The run folder: ``out``, or a name made of dataset, method, network and seed."""
        arch = self.arch.replace(":", "-").replace("/", "-")
        return self.out or Path("runs") / f"{self.dataset}-{self.method}-{arch}-seed{self.seed}"

    @functools.cached_property
    def attack_config(self) -> AttackConfig:
        """``eps``, ``step_size`` and ``attack_steps`` as numbers. Raises UserError for text that is no such number."""
        eps, step_size = parse_fraction(self.eps, "eps"), parse_fraction(self.step_size, "step-size")
        return AttackConfig(eps, step_size, self.attack_steps)


# The paper's settings for each dataset (Cho et al. 2025, section 5.1). docs/ltat.md lists what the paper leaves open.
_PAPER = {"epochs": 100, "teacher_epochs": 30, "batch_size": 128, "teacher_batch_size": 32, "arch": "resnet18"}
PRESETS: dict[str, dict] = {
    "digits-lt": {"eps": "0.1", "step_size": "0.025", "lr_schedule": "onecycle", "precision": "fp32"},
    "cifar10-lt": {**_PAPER, "imbalance_ratio": 50.0},
    "cifar100-lt": {**_PAPER, "imbalance_ratio": 10.0},
    "svhn-lt": {**_PAPER, "imbalance_ratio": 50.0},
    "tinyimagenet-lt": {**_PAPER, "imbalance_ratio": 10.0, "arch": "preactresnet18"},
    "imagefolder-lt": {**_PAPER, "imbalance_ratio": None},
    "imagelist-lt": {**_PAPER, "imbalance_ratio": None},
    "parquet-lt": {**_PAPER, "imbalance_ratio": None},
    "imagenet-lt": {
        **_PAPER,
        "arch": "timm:resnet50",
        "imbalance_ratio": None,
        "image_size": 224,
        "store_size": 256,
        "crop": "resized",
        "eps": "4/255",
        "step_size": "1/255",
    },
}
AS_FOUND = ("imagefolder-lt", "imagelist-lt", "parquet-lt", "imagenet-lt")
"""datasets of any images, which have their own class sizes and can be resized"""
# What the authors of a method trained with in their own code, where that differs from the LTAT paper, by (dataset,
# method). Network and threat model stay those of the dataset.
_CIFAR = ("cifar10-lt", "cifar100-lt")
_STEPS_80 = {"epochs": 80, "lr": 0.1, "lr_schedule": "0.75,0.9375"}  # drops after 60 and 75 epochs
AUTHORS_PRESETS: dict[tuple[str, str], dict] = {
    **{(dataset, "robal"): {**_STEPS_80, "batch_size": 64, "weight_decay": 2e-4} for dataset in _CIFAR},
    **{(dataset, "reat"): {**_STEPS_80, "batch_size": 128, "weight_decay": 5e-4} for dataset in _CIFAR},
}
# Options of a method, by (dataset, method) and by (network, method). The preset of the network wins.
METHOD_PRESETS: dict[tuple[str, str], dict] = {
    ("digits-lt", "ltat"): {"alpha": 5.0},  # chosen among 1, 3, 5, 10, 30: README, "Demo"
    ("digits-lt", "rslad"): {"loss_scale": 1.0},  # PGD-20 after 25 epochs: 69 with 1.0, 59 with the default of 0.1
    ("wrn-34-10", "mart"): {"beta": 6.0},
    ("cifar100-lt", "robal"): {"robal_dataset": "cifar100"},
}
# Settings that --resume may change: they say where and how a run computes, not what it trains. Another device, backend
# or evaluation batch size changes rounding errors.
FREE_ON_RESUME = {"resume", "out", "data_dir", "data_placement", "device", "compile", "save_minutes", "eval_batch_size"}
FREE_ON_RESUME |= {"on_nan", "on_collapse", "log_every"}


def parse_fraction(text: str, name: str = "value") -> float:
    """Return "8/255" or "0.031" as a number. Raise UserError, naming the flag ``name``, unless it is in (0, 1]."""
    numerator, slash, denominator = text.partition("/")
    try:
        value = float(numerator) / float(denominator if slash else 1)
    except (ValueError, ZeroDivisionError):
        raise UserError(f"--{name} takes a fraction such as 8/255 or a decimal such as 0.031, not {text!r}") from None
    if not 0 < value <= 1:
        raise UserError(f"--{name} must be above 0 and at most 1 (pixels are in [0, 1]), not {text}")
    return value


def choose(kind: str, value: str, options: Iterable[str]) -> None:
    """Raise UserError, listing the ``options``, if ``value`` is not one of them."""
    if value not in options:
        raise UserError(f"unknown {kind} {value!r}: choose one of {', '.join(sorted(options))}")


def preset(settings: str, dataset: str, method: str) -> dict:
    """Return the settings that the preset of ``dataset`` sets, by name.

    settings: "paper", or "authors" for those of the authors of ``method``. Raises UserError if these are not known.
    """
    if settings != "authors":
        return PRESETS[dataset]
    if (dataset, method) not in AUTHORS_PRESETS:
        known = ", ".join(f"{m} on {d}" for d, m in sorted(AUTHORS_PRESETS))
        raise UserError(f"--settings authors: those for {method} on {dataset} are not known, only those for {known}")
    return PRESETS[dataset] | AUTHORS_PRESETS[dataset, method]


def validate(config: Config, method: Method) -> None:
    """Raise UserError, in one sentence, for settings that cannot work. Nothing is loaded."""
    check_types(config)
    check_types(method)
    choose("dataset", config.dataset, PRESETS)
    choose("method", config.method, METHODS)
    _validate_network(config)
    preset(config.settings, config.dataset, config.method)
    _ = config.attack_config
    parse_attacks(config.eval_attacks)
    parse_schedule(config.lr_schedule)
    if config.imbalance_ratio is None:
        if config.dataset not in AS_FOUND:
            raise UserError(
                f"--imbalance-ratio None is for {' and '.join(AS_FOUND)}; {config.dataset} needs a number, 1 or more"
            )
    elif not (math.isfinite(config.imbalance_ratio) and config.imbalance_ratio >= 1):
        raise UserError(f"--imbalance-ratio must be 1 (balanced) or more, not {config.imbalance_ratio:g}")
    at_least_one = (
        "epochs",
        "teacher_epochs",
        "batch_size",
        "teacher_batch_size",
        "accumulate",
        "attack_steps",
        "awp_from",
        "eval_every",
        "log_every",
    )
    optional = ("eval_batch_size", "image_size", "store_size", "limit_eval", "limit_autoattack", "max_steps")
    for name in (*at_least_one, *optional):
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
    if not 0 <= config.label_smoothing < 1:
        raise UserError(f"--label-smoothing must be at least 0 and below 1, not {config.label_smoothing:g}")
    if config.label_smoothing > 0 and not method.smooths_labels:
        raise UserError(f"--label-smoothing: the loss of --method {method.name} with these options has no label term")
    if not 0 < config.heldout < 1:
        raise UserError(f"--heldout must be a share between 0 and 1, not {config.heldout:g}")
    for name in ("image_size", "store_size"):
        if getattr(config, name) and config.dataset not in AS_FOUND:
            only = f"--{name.replace('_', '-')} is for {' and '.join(AS_FOUND)}"
            raise UserError(f"{only}; all images of {config.dataset} have the same size")
    if config.store_size and config.store_size < (config.image_size or math.inf):
        what = f"smaller than --image-size {config.image_size}" if config.image_size else "without --image-size"
        raise UserError(f"--store-size {config.store_size} {what}: it is the size from which training takes its crops")
    if config.bad_images != "stop" and config.dataset not in (*AS_FOUND, "tinyimagenet-lt"):
        raise UserError(f"--bad-images is for datasets of image files; {config.dataset} has none")
    if config.attack == "n-fgsm" and not method.uses_attack:
        raise UserError(f"--attack is not used by --method {config.method}, which trains without an attack")
    if config.attack == "n-fgsm" and method.noise != type(method).noise:
        raise UserError("--noise has no effect with --attack n-fgsm, which has noise of its own")
    if config.compile == "graph" and config.device == "cpu":
        raise UserError("--compile graph is a CUDA graph and needs a GPU; use step or none with --device cpu")
    if config.teacher is not None and method.teacher == "none":
        unless = " without --igdm-alpha" if isinstance(method, WithIgdm) else ""
        raise UserError(f"--teacher is not used by --method {config.method}{unless}")
    validate_batches(config, method)
    _validate_modifiers(config, method)
    method.check()


def validate_batches(config: Config, method: Method, processes: int = 1) -> None:
    """Raise UserError if a share of a batch, one of ``processes``, does not split evenly into micro-batches."""
    if config.accumulate == 1:
        return
    trains_teacher = method.teacher != "none" and config.teacher is None
    for name in ("batch_size", "teacher_batch_size") if trains_teacher else ("batch_size",):
        size, parts = getattr(config, name), config.accumulate
        if size % (parts * processes):
            over = f"{processes} processes with " if processes > 1 else ""
            raise UserError(
                f"--{name.replace('_', '-')} {size} does not split evenly over {over}--accumulate {parts}: choose a "
                f"multiple of {parts * processes}"
            )
    if method.couples_images and method.needs_double_backward:
        raise UserError(f"--accumulate is not possible with --method {config.method}, which needs the whole batch")


def _validate_network(config: Config) -> None:
    """Raise UserError, in one sentence, for a network or initial weights that cannot be. Imports no library."""
    if is_foreign(config.arch):
        if config.activation != "relu":
            raise UserError(f"--activation is for the built-in networks; {config.arch} has activations of its own")
    else:
        choose("arch", config.arch, ARCH_CHOICES)
    if config.init == "published" and config.arch.partition(":")[0] not in ("timm", "torchvision"):
        others = "use none, a .safetensors file, or a network of timm or torchvision"
        raise UserError(f"--init published: there are no published weights of {config.arch}; {others}")
    if config.init not in ("none", "published") and not config.init.endswith(".safetensors"):
        raise UserError(f"--init takes none, published or the path of a .safetensors file, not {config.init!r}")


def _validate_modifiers(config: Config, method: Method) -> None:
    """Raise UserError, in one sentence, for modifiers that cannot work."""
    if config.awp is not None and not 0 <= config.awp < math.inf:
        raise UserError(f"--awp must be 0 or more and finite, not {config.awp:g}")
    for name in ("ema", "eps_balance"):
        value = getattr(config, name)
        if not 0 <= value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 0 and below 1, not {value:g}")
    if not 0 <= config.eps_warmup <= 1:
        raise UserError(f"--eps-warmup must be a share of the epochs between 0 and 1, not {config.eps_warmup:g}")
    if config.awp_from > 1 and not gamma_of(method, config.awp):
        raise UserError("--awp-from has no effect without a weight perturbation: add --awp")
    if config.awp_from > config.epochs:
        raise UserError(f"--awp-from {config.awp_from} is after the last epoch, {config.epochs}")
    if config.eps_warmup and not config.eps_balance:
        raise UserError("--eps-warmup has no effect without --eps-balance")
    if config.eps_balance and not method.uses_attack:
        raise UserError(f"--eps-balance is for the training attack, and --method {config.method} has none")
    if config.modify_teacher:
        if method.teacher == "none" or config.teacher is not None:
            raise UserError("--modify-teacher is for a run that trains a teacher of its own, and this run does not")
        # In a balanced set every class has the same eps, which only a warm-up changes. A natural teacher has no attack.
        has_budget = method.teacher == "robust" or (method.teacher == "balanced" and config.eps_warmup)
        if not (config.awp or config.ema or config.label_smoothing or (config.eps_balance and has_budget)):
            raise UserError("--modify-teacher has no effect with these modifiers: add one, for example --ema 0.995")


def changed_modifiers(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the ``settings`` of a run that belong to :class:`ModifierSettings` and are not defaults."""
    fields = dataclasses.fields(ModifierSettings)
    return {f.name: settings[f.name] for f in fields if settings.get(f.name, f.default) != f.default}


def to_json(config: Config, method: Method) -> dict:
    """Return the content of RUN/config.json."""
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items()}
    return settings | {"method_options": dataclasses.asdict(method)}


def from_json(settings: dict) -> tuple[Config, Method]:
    """Read a result of :func:`to_json`, and validate it. Raise UserError for unknown settings."""
    settings = {**settings}
    options = settings.pop("method_options", {})
    unknown = set(settings) - {field.name for field in dataclasses.fields(Config)}
    if unknown:
        raise UserError(f"this version does not know its settings {', '.join(sorted(unknown))}")
    for name in ("data_dir", "out"):
        if settings.get(name) is not None:
            settings[name] = Path(settings[name])
    config = Config(**settings)
    choose("method", config.method, METHODS)
    method = method_of(config.method, options)
    validate(config, method)
    return config, method


def method_of(name: str, options: dict) -> Method:
    """Return the method ``name`` with the ``options`` in a file. Raise UserError for options that it does not have."""
    unknown = set(options) - {field.name for field in dataclasses.fields(METHODS[name])}
    if unknown:
        raise UserError(f"this version has no options {', '.join(sorted(unknown))} of --method {name}")
    return METHODS[name](**options)


def load(run_dir: Path) -> tuple[Config, Method]:
    """Read the configuration of an existing run. Raise UserError if there is none or it is damaged."""
    path = run_dir / "config.json"
    try:
        return from_json(json.loads(path.read_text()))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{run_dir} is not a run: it has no config.json") from None
    except (UserError, OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as a run's configuration: {error}") from None


def differences(old: Config, old_method: Method, new: Config, new_method: Method) -> list[str]:
    """List the settings in which a resumed run would differ from the run on disk, as "lr (0.1 -> 0.2)".

    The options of two different methods are not compared. A new ``select_on`` of "auto" is what the run on disk chose.
    """
    if new.select_on == "auto" and old.select_on != "heldout":
        new = dataclasses.replace(new, select_on=old.select_on)
    a, b = dataclasses.asdict(old), dataclasses.asdict(new)
    if old.method == new.method:
        a, b = a | dataclasses.asdict(old_method), b | dataclasses.asdict(new_method)
    return [f"{k} ({a.get(k)} -> {b.get(k)})" for k in b if k not in FREE_ON_RESUME and a.get(k) != b[k]]
