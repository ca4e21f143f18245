"""What a run is made of: its images, its network, its folder. Shared by train, evaluate and report."""

import contextlib
import dataclasses
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ltat_fast import __version__
from ltat_fast.config import Config
from ltat_fast.data import load_dataset, longtail, resident
from ltat_fast.engine import checkpoint, log
from ltat_fast.engine.device import Hardware
from ltat_fast.errors import UserError
from ltat_fast.methods import METHODS, Method
from ltat_fast.models import build_model
from ltat_fast.ops import backend_info

LOCK = ".lock"
PACKAGES = ("ltat-fast", "torch", "torchvision", "triton", "numpy", "pyautoattack")  # whose versions move numbers


@dataclass
class Images:
    """uint8 images ``(N, C, H, W)`` and int64 labels ``(N,)`` on the training device."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass
class RunData:
    """The images of a run. counts: training images a class, after holding out. select: what picks the best epoch."""

    train: Images
    test: Images
    select: Images
    counts: list[int]
    groups: dict[str, list[int]]
    class_names: tuple[str, ...]
    index_hash: str
    pad: int
    flip: bool

    @property
    def num_classes(self) -> int:
        return len(self.counts)

    @property
    def in_channels(self) -> int:
        return self.train.images.shape[1]


@contextlib.contextmanager
def claim(run_dir: Path) -> Iterator[None]:
    """Keep other processes from training into ``run_dir``; the system lets go of it however this one ends.

    Raises UserError if another has it. Where there are no file locks it claims nothing.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            file = stack.enter_context((run_dir / LOCK).open("a"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{run_dir} is being trained by another process") from None
        yield


def load_data(config: Config, device: torch.device) -> RunData:
    """Read, cut to the long tail, put on the device, and say what was found."""
    dataset = load_dataset(config.dataset, config.data_dir, image_size=config.image_size, report=log.say)
    tailed = longtail.make_long_tailed(dataset, config.imbalance_ratio)
    test = Images(resident(dataset.test.images, device), resident(dataset.test.labels, device))
    images, labels, indices = tailed.images, tailed.labels, tailed.indices
    select = test
    if config.select_on == "heldout":
        kept, held = longtail.holdout_split(labels, np.arange(len(labels)), config.heldout)
        if len(held) == 0:
            raise UserError(f"--select-on heldout: {config.heldout:g} of each class holds out no image at all")
        select = Images(resident(images[held], device), resident(labels[held], device))
        images, labels, indices = images[kept], labels[kept], indices[kept]
    counts = np.bincount(labels, minlength=len(tailed.class_names)).tolist()
    index_hash = longtail.index_hash(indices)
    log.say(
        f"{config.dataset}: {len(labels):,} training images in {len(counts)} classes "
        f"({max(counts)} to {min(counts)} a class), index hash {index_hash}; {len(test):,} test images"
        + (f"; {len(select):,} held out to select on" if select is not test else "")
    )
    return RunData(
        Images(resident(images, device), resident(labels, device)),
        test,
        select,
        counts,
        tailed.groups,
        tailed.class_names,
        index_hash,
        dataset.pad,
        dataset.flip,
    )


def balanced_indices(config: Config, data: RunData) -> np.ndarray:
    """The teacher's class-balanced re-sampling of the training images: gamma * (smallest class) images a class."""
    largest, smallest = max(data.counts), min(data.counts)
    gamma = config.gamma or max(1.0, largest / smallest / 2)
    per_class = max(1, round(gamma * smallest))
    log.say(f"teacher's balanced set: {per_class} images a class, {per_class * data.num_classes:,} in all")
    return longtail.balanced_indices(data.train.labels.cpu().numpy(), per_class)


def new_model(arch: str, data: RunData, device: torch.device, seed: int, method: Method) -> nn.Module:
    """A network in NHWC with weights that are a function of ``seed`` alone; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(arch, data.num_classes, in_channels=data.in_channels)
        model = method.wrap_model(model, torch.tensor(data.counts))
    return model.to(device, memory_format=torch.channels_last)


def model_card(config: Config, data: RunData, method: Method, epoch: int) -> dict:
    """What a weights file says of itself."""
    return {
        "arch": config.arch,
        "num_classes": data.num_classes,
        "in_channels": data.in_channels,
        "image_size": list(data.train.images.shape[-2:]),
        "class_names": list(data.class_names),
        "dataset": config.dataset,
        "imbalance_ratio": config.imbalance_ratio,
        "method": method.name,
        "method_options": dataclasses.asdict(method),
        "class_counts": data.counts,
        "eps": config.eps,
        "epoch": epoch,
        "version": __version__,
    }


def load_model(path: Path, device: torch.device, arch: str, data: RunData, foreign: bool = False) -> nn.Module:
    """The network in a weights file, for ``data``.

    foreign: the file may be somebody else's state dict; ``arch`` is what it is of, where it does not say so itself.
    """
    tensors, card = checkpoint.read(path, foreign)
    card = {"arch": arch, "num_classes": data.num_classes, "in_channels": data.in_channels} | card
    if card["num_classes"] != data.num_classes:
        raise UserError(f"{path} knows {card['num_classes']} classes, the data has {data.num_classes}")
    if card["in_channels"] != data.in_channels:
        raise UserError(f"{path} takes {card['in_channels']} channels, the images have {data.in_channels}")
    names = list(zip(card.get("class_names", data.class_names), data.class_names, strict=True))
    if other := [pair for pair in names if pair[0] != pair[1]]:
        raise UserError(f"{path} knows other classes than the data: {other[0][0]!r} where the data has {other[0][1]!r}")
    return restore(path, tensors, card).to(device, memory_format=torch.channels_last)


def restore(path: Path, tensors: dict[str, Tensor], card: dict) -> nn.Module:
    """The network that the ``card`` of a weights file describes, with its ``tensors``."""
    model = build_model(card["arch"], card["num_classes"], in_channels=card["in_channels"])
    if "method" in card:
        try:
            method = METHODS[card["method"]](**card["method_options"])
        except (KeyError, TypeError):
            raise UserError(f"{path} is of a method this version does not know, {card['method']!r}") from None
        model = method.wrap_model(model, torch.tensor(card["class_counts"]))
    checkpoint.load_weights(model, tensors, path, card["arch"])
    return model


def weights_in(path: Path, which: str = "last") -> Path:
    """The weights file meant by ``path``, a run folder or a file."""
    file = path / "checkpoints" / f"{which}.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{path} has no finished weights: {file} does not exist")
    return file


def weights_digest(path: Path) -> str:
    """The checksum a weights file carries, to tell whether a result belongs to it."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("sha256", "")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged and cannot be read ({error})") from None


def counts_tensor(data: RunData, device: torch.device) -> Tensor:
    return torch.tensor(data.counts, dtype=torch.int64, device=device)


def environment(hardware: Hardware, data: RunData) -> dict:
    """The content of RUN/env.json: what it would take to see the same numbers again."""
    gpu = torch.cuda.get_device_name() if hardware.device.type == "cuda" else None
    return {
        "command": shlex.join(sys.argv),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "gpu": gpu,
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "precision": str(hardware.dtype).removeprefix("torch."),
        "ops": {op: backends[hardware.device.type] for op, backends in backend_info().items()},
        "git": git_revision(),
        "index_hash": data.index_hash,
        "class_counts": data.counts,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git_revision() -> str | None:
    """The commit of the code that is running, with "+" if it was changed since; None outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True)
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True)
    except OSError:
        return None
    return commit.stdout.strip() + ("+" if changed.stdout.strip() else "") if commit.returncode == 0 else None
