"""Weights files, and the networks built from them.

A weights file is a safetensors file with a checksum and a card, which is JSON metadata that describes the network.
``best.safetensors`` and ``last.safetensors`` hold the ``state_dict`` of a model under its own names, so any program can
load them. Nothing here uses pickle.
"""

import dataclasses
import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor, nn

from ltat_fast import __version__, files, trust
from ltat_fast.config import Config, changed_modifiers
from ltat_fast.errors import UserError
from ltat_fast.field_types import check_types
from ltat_fast.methods import METHODS, Method
from ltat_fast.models import ForeignClassifier, ImageClassifier, build_model
from ltat_fast.models.libraries import DEFAULT_SIZE, Shape, find, user_error_on_failure
from ltat_fast.runs import log
from ltat_fast.runs.schema import check_card
from ltat_fast.runs.splits import Splits

DTYPES = frozenset(
    (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool)
)
"""types of the numbers in a weights file"""


def _digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    digest.update(json.dumps(metadata, sort_keys=True).encode())
    return digest.hexdigest()


def state_digest(model: nn.Module) -> str:
    """Return 16 hexadecimal digits that identify the weights of ``model``."""
    return _digest({name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}, {})[:16]


def write_weights(path: Path, tensors: dict[str, Tensor], metadata: dict, previous: Path | None = None) -> None:
    """Write ``tensors`` and JSON-able ``metadata`` to ``path`` with :func:`files.atomic_write`.

    previous: the name under which the old file is kept. Raises UserError if the disk is full or read-only.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    card = {"ltat_fast": json.dumps(metadata)}
    card["sha256"] = _digest(tensors, metadata)
    for leftover in path.parent.glob(f".{path.name}.*.partial"):  # of a process that was killed while it wrote
        with files.oserror_as_user_error(path):
            leftover.unlink(missing_ok=True)
    with files.atomic_write(path, previous) as file:
        file.write(serialise(tensors, metadata=card))


def read_weights(path: Path, foreign: bool = False) -> tuple[dict[str, Tensor], dict]:
    """Read the tensors and the metadata of a file written by :func:`write_weights`.

    foreign: also accept a safetensors file of another program. It has no checksum, so damage can go unnoticed, and its
        metadata is returned as {}.

    Raises UserError if the file is missing, is not safetensors, or is cut short or changed since it was written.
    """
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}")
    if path.suffix != ".safetensors":
        raise UserError(f"{path} is not a .safetensors file; other formats can run code when loaded and are refused")
    try:
        with safe_open(path, framework="pt") as file:
            card = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        metadata = json.loads(card.get("ltat_fast", "{}"))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged and cannot be read ({error})") from None
    written_here = "sha256" in card or "ltat_fast" in card  # a damaged file may have lost one of the two names
    if not (written_here or foreign):
        raise UserError(f"{path} is damaged, or not written by ltat_fast: it has no checksum")
    if written_here and card.get("sha256") != _digest(tensors, metadata):
        raise UserError(f"{path} is damaged: its content does not match its checksum")
    if not isinstance(metadata, dict):
        raise UserError(f"{path} is damaged: its card is not a JSON object")
    return tensors, metadata


def load_weights(model: nn.Module, tensors: dict[str, Tensor], source: Path, arch: str) -> None:
    """Load ``tensors``, read from the file ``source``, into ``model``, a network ``arch``.

    Raises UserError if a tensor is missing, unknown, of another shape or not finite. ``model`` is unchanged then.
    """
    expected = model.state_dict()
    missing = [name for name in expected if name not in tensors]
    unknown = [name for name in tensors if name not in expected]
    misshapen = [name for name in expected if name in tensors and tensors[name].shape != expected[name].shape]
    problems = []
    if missing:
        problems.append(f"lacks {missing[0]} ({len(missing)} missing)")
    if unknown:
        problems.append(f"has the unknown tensor {unknown[0]} ({len(unknown)} unknown)")
    if misshapen:
        name = misshapen[0]
        problems.append(f"{name} is {tuple(tensors[name].shape)}, not {tuple(expected[name].shape)}")
    if problems:
        raise UserError(f"{source} does not fit {arch}: " + "; ".join(problems))
    for name, wanted in expected.items():
        if tensors[name].is_floating_point() != wanted.is_floating_point() or tensors[name].dtype not in DTYPES:
            kind = str(tensors[name].dtype).removeprefix("torch.")
            raise UserError(f"{source} does not fit {arch}: {name} holds numbers of type {kind}")
    if broken := [name for name in expected if not tensors[name].isfinite().all()]:
        raise UserError(f"{source} holds numbers that are not finite, in {broken[0]} ({len(broken)} such tensors)")
    model.load_state_dict(tensors)


def new_model(
    arch: str,
    splits: Splits,
    device: torch.device,
    seed: int,
    method: Method,
    activation: str = "relu",
    init: str = "none",
) -> nn.Module:
    """Return a new network in NHWC. Its weights depend only on ``seed``; the global generator is left unchanged.

    init: what replaces these weights: a value of ``--init``. Raises UserError if that is not possible.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        size = splits.image_size
        model = build_model(
            arch, splits.num_classes, in_channels=splits.in_channels, activation=activation, image_size=size
        )
        if init != "none":
            initialise(model, arch, init, Shape(splits.num_classes, splits.in_channels, size))
        model = _wrapped(method, model, splits.counts, arch)
    return model.to(device, memory_format=torch.channels_last)


def _wrapped(method: Method, model: ImageClassifier, counts: list[int], arch: str) -> nn.Module:
    """Return :meth:`Method.wrap_model` of ``model``. Raises UserError if it needs a last linear layer that is not."""
    needs_head = type(method).wrap_model is not Method.wrap_model
    if needs_head and isinstance(model, ForeignClassifier) and model.head is None:
        needs = f"--method {method.name} needs the features before the last linear layer"
        raise UserError(f"{needs}, and {arch} does not end with one")
    return method.wrap_model(model, torch.tensor(counts))


def initialise(model: ImageClassifier, arch: str, init: str, shape: Shape) -> None:
    """Load published weights (``init`` "published") or those of a file into ``model``, a plain network ``arch``.

    The last layer keeps its random weights if it has another size there. Raises UserError for weights of another
    network.
    """
    if init == "published":
        network = find(arch)
        network.published_classes()
        if shape.in_channels != 3:
            raise UserError(f"--init published: its weights take 3 channels, the images have {shape.in_channels}")
        source = Path(f"published weights of {arch}")
        tensors = user_error_on_failure(f"--init published, {arch}", lambda: network.published(shape).state_dict())
    else:
        source = Path(init)
        tensors, _ = read_weights(source, foreign=True)
    expected = model.state_dict()
    if isinstance(model, ForeignClassifier) and not any(name.startswith("net.") for name in tensors):
        names, net = tensors, model.net
        names = user_error_on_failure(f"--init {init}, {arch}", lambda: find(arch).adapt(names, net))
        tensors = {model.own_name(name): tensor for name, tensor in names.items()}
        # The pixels are normalised in the network, and published files do not say how.
        tensors |= {name: tensor for name, tensor in expected.items() if name.startswith("normalize.")}
    replaced = _other_head(tensors, expected, shape.num_classes)
    if replaced:
        tensors = {name: tensor for name, tensor in tensors.items() if name not in replaced}
        tensors |= {name: tensor for name, tensor in expected.items() if name in replaced}
    load_weights(model, tensors, source, arch)
    new_head = f"; new last layer of {shape.num_classes} classes ({', '.join(replaced)})" if replaced else ""
    log.say(f"initial weights: {source}{new_head}")


def _other_head(tensors: dict[str, Tensor], expected: dict[str, Tensor], num_classes: int) -> list[str]:
    """Return the names of the last layer if ``tensors`` have it in another size or form, else []."""
    if "fc.weight" in expected and "fc.weight" in tensors:
        ours, theirs = ({n: t.shape for n, t in group.items() if n.startswith("fc.")} for group in (expected, tensors))
        return [] if ours == theirs else sorted(ours | theirs)
    return [
        name
        for name, tensor in expected.items()
        if name in tensors
        and tensor.dim()
        and tensor.shape[0] == num_classes != tensors[name].shape[0]
        and tensor.shape[1:] == tensors[name].shape[1:]
    ]


def weights_card(config: Config, splits: Splits, method: Method, epoch: int, modified: bool = True) -> dict:
    """Return the card of a weights file: its network, data, method and epoch.

    modified: whether the stage has the modifiers of ``config``; the card names them, if there are any.
    """
    changed = changed_modifiers(dataclasses.asdict(config)) if modified else {}
    return {
        "arch": config.arch,
        "activation": config.activation,
        "num_classes": splits.num_classes,
        "in_channels": splits.in_channels,
        "image_size": list(splits.image_size),
        "class_names": list(splits.class_names),
        "dataset": config.dataset,
        "imbalance_ratio": config.imbalance_ratio,
        "method": method.name,
        "method_options": dataclasses.asdict(method),
        "class_counts": splits.counts,
        "eps": config.eps,
        "epoch": epoch,
        "version": __version__,
    } | ({"modifiers": changed} if changed else {})


def load_model(
    path: Path,
    device: torch.device,
    arch: str,
    splits: Splits,
    foreign: bool = False,
    activation: str = "relu",
) -> nn.Module:
    """Return the network in a weights file, in NHWC.

    arch, activation: the network, for a file whose card does not name it. splits: data that the network must fit.
    foreign: also accept a safetensors file of another program. Raises UserError if the file or its network does not
    fit.
    """
    tensors, card = read_weights(path, foreign)
    check_card(path, card)
    if "arch" not in card:
        card = {"arch": arch, "activation": activation} | card
    of_data = {"num_classes": splits.num_classes, "in_channels": splits.in_channels}
    card = of_data | {"image_size": list(splits.image_size)} | card
    if card["num_classes"] != splits.num_classes:
        raise UserError(f"{path} has {card['num_classes']} classes, the data has {splits.num_classes}")
    if card["in_channels"] != splits.in_channels:
        raise UserError(f"{path} takes {card['in_channels']} channels, the images have {splits.in_channels}")
    for name, expected in zip(card.get("class_names") or splits.class_names, splits.class_names, strict=True):
        if name != expected:
            raise UserError(f"{path} has other classes than the data: {name!r} where the data has {expected!r}")
    return build_from_card(path, tensors, card).to(device, memory_format=torch.channels_last)


def build_from_card(path: Path, tensors: dict[str, Tensor], card: dict) -> nn.Module:
    """Return the network that ``card`` describes, with the weights ``tensors``, both read from ``path``.

    A card without an activation is of an earlier version, which had only ReLU.
    """
    check_card(path, card)
    activation = card.get("activation", "relu")
    size = card.get("image_size", DEFAULT_SIZE)
    channels, flag = card["in_channels"], f"{path}: network"
    trust.refuse_code(card["arch"], str(path), from_card=True)
    model = build_model(
        card["arch"], card["num_classes"], in_channels=channels, activation=activation, image_size=size, flag=flag
    )
    if "method" in card:
        try:
            method = METHODS[card["method"]](**card["method_options"])
            check_types(method)
            method.check()
        except (KeyError, TypeError):
            unknown = f"{path} is of the method {card['method']!r}, which this version does not know"
            raise UserError(f"{unknown}, or not with the same options") from None
        model = _wrapped(method, model, card["class_counts"], card["arch"])
    load_weights(model, tensors, path, card["arch"])
    return model


def weights_file(path: Path, which: str = "last") -> Path:
    """Return the weights file of ``path``: checkpoint ``which`` of a run folder, or ``path`` itself if it is a file.

    Raises UserError if it does not exist.
    """
    file = path / "checkpoints" / f"{which}.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{path} has no finished weights: {file} does not exist")
    return file


def weights_digest(path: Path) -> str:
    """Return the checksum of a weights file, which shows whether a result belongs to it.

    "" for a file of another program, which has none. Raises UserError if the content does not match the checksum.
    """
    read_weights(path, foreign=True)
    with safe_open(path, framework="pt") as file:
        return (file.metadata() or {}).get("sha256", "")
