"""Networks that are not ours, by specification. ``--arch`` and ``--teacher`` share it; docs/networks.md is the page.

torchvision:NAME            a classifier of torchvision
timm:NAME                   a network of timm, if it is installed
module:PACKAGE.MODULE:NAME  the return value of NAME() of that module: any network from images in [0, 1] to logits
"""

import copy
import difflib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ltat_fast import trust
from ltat_fast.errors import UserError

from .classifier import has_hooks
from .foreign import ForeignClassifier

T = TypeVar("T")
DEFAULT_SIZE = (224, 224)  # what published networks expect


class Shape(NamedTuple):
    """What a network must fit: number of classes, channels of the images, their height and width."""

    num_classes: int
    in_channels: int
    image_size: tuple[int, int]


class Network:
    """A network of other code. Subclasses are one kind of specification each.

    Args:
        rest: the specification after its first colon
        flag: begins every error message: "--arch" or "--teacher"
    """

    kind: str

    def __init__(self, rest: str, flag: str):
        self.rest, self.flag = rest, flag

    @property
    def spec(self) -> str:
        return f"{self.kind}:{self.rest}"

    def arguments(self, shape: Shape) -> dict[str, Any]:
        """Return the keyword arguments with which the library builds a network for ``shape``."""
        raise NotImplementedError

    def create(self, shape: Shape) -> nn.Module:
        """Return the network with the random weights that its own code draws."""
        raise NotImplementedError

    def published_classes(self) -> int:
        """Return the number of classes of the published weights. Raises UserError if there are no such weights."""
        raise self.error("only networks of timm and torchvision have published weights; the function can load its own")

    def published(self, shape: Shape | None = None) -> nn.Module:
        """Return the network with its published weights and head; this may download them.

        shape: the images that it must take; None: those of the publication. Raises UserError if there are no weights.
        """
        raise NotImplementedError

    def normalisation(self) -> tuple[Sequence[float], Sequence[float]] | None:
        """Return mean and standard deviation of the pixels of the published weights, or None if there are none."""
        return None

    def adapt(self, tensors: dict[str, Tensor], net: nn.Module) -> dict[str, Tensor]:
        """Return published weights in the form that ``net`` needs, for example for another image size."""
        return tensors

    def error(self, text: str) -> UserError:
        return UserError(f"{self.flag} {self.spec}: {text}")


class Torchvision(Network):
    kind = "torchvision"

    def __init__(self, rest: str, flag: str):
        from ltat_fast._torchvision import torchvision

        super().__init__(rest, flag)
        self.models: Any = torchvision.models
        names = self.models.list_models(module=self.models)
        if rest not in names:
            raise self.error(f"torchvision has no classifier called {rest!r}{suggestion(rest, names)}")

    def arguments(self, shape):
        if shape.in_channels != 3:
            raise self.error(f"networks of torchvision take 3 channels, the images have {shape.in_channels}")
        return {"num_classes": shape.num_classes} | self._size(shape)

    def _size(self, shape: Shape | None) -> dict[str, int]:
        return {"image_size": shape.image_size[0]} if shape and self.rest.startswith("vit_") else {}

    def create(self, shape):
        return self.models.get_model(self.rest, **self.arguments(shape))

    def normalisation(self):
        preset = self.models.get_model_weights(self.rest).DEFAULT.transforms()
        return preset.mean, preset.std

    def published_classes(self):
        return len(self.models.get_model_weights(self.rest).DEFAULT.meta["categories"])

    def published(self, shape=None):
        return self.models.get_model(self.rest, weights="DEFAULT")

    def adapt(self, tensors, net):
        name, wanted = "encoder.pos_embedding", dict(net.named_parameters()).get("encoder.pos_embedding")
        if wanted is None or name not in tensors or tensors[name].shape == wanted.shape:
            return tensors
        interpolate: Any = importlib.import_module("torchvision.models.vision_transformer").interpolate_embeddings
        size, patch = getattr(net, "image_size", None), getattr(net, "patch_size", None)
        return dict(interpolate(size, patch, dict(tensors)))


class Timm(Network):
    kind = "timm"

    def __init__(self, rest: str, flag: str):
        super().__init__(rest, flag)
        try:
            import ltat_fast._torchvision  # noqa: F401  (timm imports torchvision)

            self.timm: Any = importlib.import_module("timm")
        except ImportError as error:
            needs = f"{flag} {self.spec} needs the package timm ({error})"
            raise UserError(f"{needs}; pip install timm") from None
        if not self.timm.is_model(rest):
            raise self.error(f"timm has no network called {rest!r}{suggestion(rest, self.timm.list_models())}")

    def arguments(self, shape):
        return {"num_classes": shape.num_classes, "in_chans": shape.in_channels} | self._size(shape)

    def _size(self, shape: Shape | None) -> dict[str, tuple[int, int]]:
        fixed = getattr(self.timm.get_pretrained_cfg(self.rest), "fixed_input_size", False)
        return {"img_size": shape.image_size} if shape and fixed else {}

    def create(self, shape):
        return self.timm.create_model(self.rest, **self.arguments(shape))

    def normalisation(self):
        card = self.timm.get_pretrained_cfg(self.rest)
        return None if card is None else (card.mean, card.std)

    def published_classes(self):
        card = self.timm.get_pretrained_cfg(self.rest)
        if card is None:
            raise self.error(f"timm has no weights for it; use your own with {self.spec}@FILE")
        return card.num_classes

    def published(self, shape=None):
        return self.timm.create_model(self.rest, pretrained=True, **self._size(shape))

    def adapt(self, tensors, net):
        change = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)
        return tensors if change is None else dict(change(dict(tensors), net))


class Module(Network):
    kind = "module"

    def __init__(self, rest: str, flag: str):
        super().__init__(rest, flag)
        module, _, self.name = rest.partition(":")
        if not module or not self.name:
            raise UserError(f"{flag} module:{rest} is incomplete: write module:PACKAGE.MODULE:NAME")
        trust.refuse_code(self.spec, flag)
        imported = user_error_on_failure(f"{flag} {self.spec}", lambda: importlib.import_module(module))
        self.factory = getattr(imported, self.name, None)
        if not callable(self.factory):
            raise self.error(f"{module} has no function called {self.name!r}")

    def arguments(self, shape):
        """Those of num_classes, in_channels and image_size that the function names as its parameters."""
        try:
            taken = inspect.signature(self._function()).parameters
        except (TypeError, ValueError):  # a callable without a signature
            return {}
        return {name: value for name, value in shape._asdict().items() if name in taken}

    def _function(self) -> Callable[..., Any]:
        assert callable(self.factory)  # checked by __init__
        return self.factory

    def create(self, shape):
        net = self._function()(**self.arguments(shape))
        if not isinstance(net, nn.Module):
            raise self.error(f"{self.name}() returns a {type(net).__name__}, not a torch.nn.Module")
        return copy.deepcopy(net)  # the function may return the same object twice


KINDS: dict[str, type[Network]] = {kind.kind: kind for kind in (Torchvision, Timm, Module)}


def is_foreign(arch: str) -> bool:
    """Whether ``arch`` is a specification of this file, and not the name of one of our own networks."""
    kind, colon, _ = arch.partition(":")
    return bool(colon) and kind in KINDS


def find(spec: str, flag: str = "--arch") -> Network:
    """Return the network ``spec``. Raises UserError for one that does not exist; nothing is built or downloaded."""
    kind, _, rest = spec.partition(":")
    return KINDS[kind](rest, flag)


def build(spec: str, shape: Shape, flag: str = "--arch") -> ForeignClassifier:
    """Build the network ``spec`` for ``shape``, with weights from torch's global generator.

    Pixels of three channels are normalised as those of the published weights were, whatever the weights are. Raises
    UserError if it does not exist or does not return logits (N, num_classes) for such images.
    """
    network = find(spec, flag)
    name = f"{flag} {spec}"
    net = user_error_on_failure(name, lambda: network.create(shape))
    numbers = network.normalisation() if shape.in_channels == 3 else None
    images = torch.rand(2, shape.in_channels, *shape.image_size, generator=torch.Generator().manual_seed(0))

    before = torch.get_rng_state()
    trial = copy.deepcopy(net).train()
    logits = user_error_on_failure(name, lambda: trial(images))
    require_logits(f"{name} in train mode", logits, 2, shape.num_classes)
    user_error_on_failure(name, lambda: logits.sum().backward())
    draws = not torch.equal(before, torch.get_rng_state())
    head = user_error_on_failure(name, lambda: find_head(net, images, shape.num_classes, name))
    model = ForeignClassifier(net.train(), shape.num_classes, head, *(numbers or ()))
    model.draws_in_training = draws
    model.unused = next((name for name, weight in trial.named_parameters() if weight.grad is None), None)
    return model


@torch.no_grad()
def find_head(net: nn.Module, images: Tensor, num_classes: int, name: str) -> str | None:
    """Return the name of the linear layer whose output is that of ``net``, or None if it has no such layer.

    A layer is tried: without it, the network must compute its input. Raises UserError, which begins with ``name``, if
    ``net`` does not return logits ``(N, num_classes)``.
    """
    net.eval()
    logits = net(images)
    require_logits(name, logits, len(images), num_classes)
    linear = [(path, m) for path, m in net.named_modules() if isinstance(m, nn.Linear) and not has_hooks(m)]
    for path, layer in reversed(linear):
        if not path or layer.out_features != num_classes:
            continue
        net.set_submodule(path, nn.Identity())
        try:
            features = net(images)
            if features.shape == (len(images), layer.in_features) and torch.allclose(layer(features), logits):
                return path
        except Exception:  # the network's own code may need the layer
            continue
        finally:
            net.set_submodule(path, layer)
    return None


def require_logits(name: str, logits: object, number: int, num_classes: int | None) -> int:
    """Return the number of classes of ``logits``, the outputs for ``number`` images.

    Raises UserError, which begins with ``name``, unless they are a float32 tensor ``(number, num_classes)``.
    num_classes: None allows any number.
    """
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else ()
    if not isinstance(logits, Tensor) or len(shape) != 2 or shape != (number, num_classes or shape[1]):
        returned = f"shape {shape}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        number_of = {1: "one image", 2: "two images"}.get(number, f"{number} images")
        wanted = f"logits of {num_classes} classes each" if num_classes else "logits (images, classes)"
        raise UserError(f"{name} returns {returned} for {number_of}, not {wanted}")
    if logits.dtype != torch.float32:
        dtype = str(logits.dtype).removeprefix("torch.")
        raise UserError(f"{name} returns logits in {dtype}, not in float32: let it end with logits.float()")
    return shape[1]


def user_error_on_failure(name: str, action: Callable[[], T]) -> T:
    """Return ``action()``. Turn any exception, for example from the network's own code, into a UserError."""
    try:
        return action()
    except UserError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or ["no reason given"]
        raise UserError(f"{name} cannot be used: {type(error).__name__}: {lines[0]}") from error


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean ...?" with the names most like ``name``, or "" if none is like it."""
    close = difflib.get_close_matches(name, list(known), n=3)
    return f"; did you mean {', '.join(close)}?" if close else ""


def split_file(rest: str) -> tuple[str, Path | None]:
    """Split SPEC[@FILE] into both parts."""
    name, at, file = rest.partition("@")
    return name, Path(file) if at else None
