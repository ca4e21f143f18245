"""Write a trained network as a folder of standard files.

The folder holds ``model.safetensors`` (weights), ``config.json`` (architecture, training, scores), ``model.py`` (the
network in plain torch, with ``load_model()``), ``README.md``, ``model.pt2`` (a ``torch.export`` program) and, if its
exporter is installed, ``model.onnx``. Each takes float32 images (N, C, H, W) in [0, 1] and returns logits. The
``model.py`` of a network of timm or torchvision imports that library. There is none for a network of a user's module.

The folder can be uploaded to the Hugging Face hub as it is: ``config.json`` and the class ``Model`` of ``model.py``
follow ``huggingface_hub.PyTorchModelHubMixin``, and ``README.md`` is a model card.
"""

import importlib.util
import inspect
import io
import json
import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import save
from torch import Tensor, nn

from ltat_fast import __version__, files
from ltat_fast import config as configuration
from ltat_fast.attacks.results import Result
from ltat_fast.errors import UserError
from ltat_fast.files import write_json
from ltat_fast.models import ARCHS, classifier, cosine, foreign, standalone
from ltat_fast.models.libraries import Shape, find, is_foreign
from ltat_fast.runs import log
from ltat_fast.runs.model_card import model_card
from ltat_fast.runs.results import EvalFile
from ltat_fast.runs.schema import check_card
from ltat_fast.runs.weights import build_from_card, read_weights, weights_file

FILES = (standalone.WEIGHTS, standalone.CONFIG, "model.py", "model.pt2", "model.onnx", "README.md")
TOLERANCE = 1e-4  # as a share of the largest logit; a compiler may sum in another order


def export(run_dir: Path, which: str, out: Path, image_size: int | None = None) -> list[Path]:
    """Write the weights ``which`` of ``run_dir`` to ``out`` in every format and return the paths.

    Each file is tested on random images. Raises UserError if there are no weights, if ``out`` holds other files, or if
    an exported file computes other logits than the network.
    """
    weights = weights_file(run_dir, which)
    tensors, origin = read_weights(weights, foreign=True)
    check_card(weights, origin)
    if "arch" not in origin:
        raise UserError(f"{weights} was not written by a run: it does not say which network it belongs to")
    size = size_of_images(weights, origin.get("image_size"), image_size)
    make_export_folder(out)
    model = build_from_card(weights, tensors, origin).eval()
    images = torch.rand(3, origin["in_channels"], *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(images)

    about = describe(run_dir, which, model, origin | {"image_size": size})
    with files.oserror_as_user_error(out), tempfile.TemporaryDirectory(prefix=".partial-", dir=out) as folder:
        written = write_all(Path(folder), model, about, images, expected)
        for path in written:  # all of them are tested by now
            path.replace(out / path.name)
        for name in set(FILES) - {path.name for path in written}:  # of an earlier export of another network
            (out / name).unlink(missing_ok=True)
    return [out / path.name for path in written]


def size_of_images(weights: Path, recorded: list[int] | None, given: int | None) -> list[int]:
    """Return height and width of the images: ``recorded`` by the run or, if None, ``given`` by the user."""
    if given is not None and given < 1:
        raise UserError(f"--image-size must be 1 or more, not {given}")
    if recorded is None and given is None:
        raise UserError(f"{weights} does not say how large its images are: give --image-size")
    if None not in (recorded, given) and recorded != [given, given]:
        height, width = recorded
        raise UserError(f"--image-size {given}: {weights} was trained on images of {height} x {width}; remove the flag")
    return recorded or [given, given]


def write_all(folder: Path, model: nn.Module, about: dict, images: Tensor, expected: Tensor) -> list[Path]:
    """Write ``model`` to ``folder`` in every format, test each on ``images`` and return the paths."""
    weights, config, module, program_file, onnx, readme = (folder / name for name in FILES)
    # Written as bytes, because torch and safetensors do not raise OSError when the disk is full.
    weights.write_bytes(save(model.state_dict()))
    write_json(config, about)
    written = [weights, config]
    arch = about["architecture"]["arch"]
    if arch.startswith("module:"):
        log.say(f"no {module.name}: {arch} is code of yours, and only you can pass it on")
    else:
        module.write_text(source_of(model, about["architecture"], tuple(images.shape[-2:])))
        with torch.no_grad():
            check(module.name, import_file(module).load_model()(images), expected)
        written.append(module)
    readme.write_text(model_card(about, has_module=module in written))
    written.append(readme)
    try:
        program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    except Exception as error:  # tracing runs the network's own code
        if not is_foreign(arch):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        log.say(f"no {program_file.name} and no {onnx.name}: torch.export cannot trace {arch} ({reason})")
        return written
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    program_file.write_bytes(buffer.getvalue())
    check(program_file.name, torch.export.load(program_file).module()(images), expected)
    written.append(program_file)
    if missing := [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]:
        log.say(f"no {onnx.name}: it needs {' and '.join(missing)} (pip install onnx onnxscript)")
    else:
        onnx.write_bytes(onnx_of(program))
        check_onnx(onnx, images, expected)
        written.append(onnx)
    return written


def make_export_folder(out: Path) -> None:
    """Make the folder ``out``. Raises UserError if it holds files that no export wrote."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        found = [path.name for path in out.iterdir() if not path.name.startswith(".partial-")]
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}") from None
    if found and not is_export(out):
        raise UserError(f"{out} is not empty, and not an export: choose another --out")


def is_export(folder: Path) -> bool:
    """Whether ``folder`` holds an export. A run and other projects have a config.json too, but with other content."""
    try:
        content = json.loads((folder / standalone.CONFIG).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and {"ltat_fast", "architecture"} <= content.keys()


def describe(run_dir: Path, which: str, model: nn.Module, origin: dict) -> dict:
    """The content of config.json: the network, its input and output, threat model, training and accuracies.

    origin: the card in the weights file.
    """
    config, _ = configuration.load(run_dir)
    results = EvalFile.load_or_empty(run_dir / "eval.json").of(which).results
    height, width = origin["image_size"]
    training = ("dataset", "imbalance_ratio", "class_counts", "method", "method_options", "modifiers", "epoch")
    return {
        "name": f"{run_dir.resolve().name}-{which}",
        "architecture": architecture(model, origin),
        "input": f"float32 (N, {origin['in_channels']}, {height}, {width}) in [0, 1]",
        "output": f"logits (N, {origin['num_classes']})",
        "class_names": origin["class_names"],
        "threat_model": {"norm": "Linf", "eps": config.eps},
        "training": {name: origin[name] for name in training if name in origin}
        | {"seed": config.seed, "extra_data": False},
        "best_selected_on": config.select_on,
        "accuracy": {attack: accuracy(result) for attack, result in results.items()},
        "ltat_fast": __version__,
    }


def accuracy(result: Result) -> dict:
    """The part of a result that config.json contains."""
    content = result.to_json()
    return {name: content[name] for name in ("all", "tail", "images") if name in content}


def architecture(model: nn.Module, origin: dict) -> dict:
    """What is needed, besides the weights, to build ``model`` again."""
    known = {name: origin[name] for name in ("arch", "num_classes", "in_channels")}
    known["activation"] = origin.get("activation", "relu")
    known["cosine"] = None
    if isinstance(head := getattr(model, "fc", None), cosine.CosineClassifier):
        known["cosine"] = {"norm_offset": head.norm_offset, "scale": head.scale}
    return known


def source_of(model: nn.Module, built: dict, image_size: tuple[int, int]) -> str:
    """Source code of model.py. built: :func:`architecture` of ``model``. image_size: height and width."""
    if not isinstance(model, foreign.ForeignClassifier):
        return source(model, ARCHS[built["arch"]])
    from ltat_fast import _torchvision  # not for a network of our own, because it imports torchvision

    library, _, name = built["arch"].partition(":")
    network = find(built["arch"])
    shape = Shape(built["num_classes"], built["in_channels"], image_size)
    create = {"timm": "timm.create_model", "torchvision": "torchvision.models.get_model"}[library]
    mean_and_std = network.normalisation() if shape.in_channels == 3 else None
    mean, std = (tuple(numbers) for numbers in mean_and_std) if mean_and_std else (None, None)
    arguments = "".join(f", {key}={value!r}" for key, value in network.arguments(shape).items())
    text = (
        "\n\ndef network(num_classes: int, in_channels: int) -> ImageClassifier:\n"
        f'    """{built["arch"]}; needs {library}, written with version {version(library)}."""\n'
        f"    import {library}\n\n"
        f"    net = {create}({name!r}{arguments})\n"
        f"    return ForeignClassifier(net, num_classes, {model.head!r}, {mean!r}, {std!r})\n"
    )
    # timm imports torchvision, whose wheel may need the repair of _torchvision.py
    modules = (_torchvision, classifier, foreign, cosine, standalone)
    return _module_text(modules, text, "network", type(model).__name__)


def source(model: nn.Module, network: Callable[..., nn.Module]) -> str:
    """Source code of model.py for ``model``, which ``network`` built. It needs only torch and safetensors."""
    modules = (classifier, cosine, sys.modules[network.__module__], standalone)
    return _module_text(modules, "", network.__name__, type(model).__name__)


def _module_text(modules: tuple[ModuleType, ...], more: str, network: str, base: str) -> str:
    """Join the code of ``modules`` and ``more``, and add the class ``Model`` and ``load_model()``.

    network: name of the function that builds the network. base: name of its class.
    """
    lines: dict[str, None] = {}
    code = []
    for module in modules:
        _, _, text = inspect.getsource(module).split('"""', 2)
        for line in text.splitlines():
            if line.startswith(("import ", "from ")):
                lines[line] = None
            elif not line.startswith("__all__"):
                code.append(line)
    imports = sorted(line for line in lines if not re.match(r"from (\.|ltat_fast)", line))
    body = re.sub(r"\n{3,}", "\n\n\n", "\n".join(code)).strip()
    return (
        '"""A network written by ltat-fast: images (N, C, H, W), float32 in [0, 1], to logits. See README.md."""\n\n'
        + "\n".join(imports)
        + f"\n\n{body}\n{more}\n\nclass Model(Exported, {base}):\n"
        + f"    network = staticmethod({network})\n\n\n"
        + "def load_model() -> Model:\n"
        + '    """The trained network beside this file, in eval mode."""\n'
        + "    return Model.load(Path(__file__).parent)\n"
    )


def import_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("exported_model", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def onnx_of(program: torch.export.ExportedProgram) -> bytes:
    """``program`` as an ONNX file for any batch size, without the progress messages of the exporter."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        names = {"input_names": ["images"], "output_names": ["logits"]}
        return torch.onnx.export(program, (), dynamo=True, **names).model_proto.SerializeToString()


def check_onnx(path: Path, images: Tensor, expected: Tensor) -> None:
    """Test an ONNX file with onnxruntime if it is installed."""
    if importlib.util.find_spec("onnxruntime") is None:
        log.say(f"{path.name} was not tested: onnxruntime is not installed")
        return
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": images.numpy()})
    check(path.name, torch.from_numpy(logits), expected)


def check(name: str, logits: Tensor, expected: Tensor) -> None:
    """Raise UserError if the logits of an exported file differ from those of the network."""
    difference = (logits - expected).abs().max() / expected.abs().max().clamp(min=1)
    if not difference <= TOLERANCE:
        raise UserError(f"{name} gives other logits than the network: they differ by {difference:.1e} of the largest")
