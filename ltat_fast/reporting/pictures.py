"""Pictures of a study: adversarial examples, saliency maps and input gradients of each network on the same images."""

import base64
import dataclasses
import io
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ltat_fast import config as configuration
from ltat_fast import seeding
from ltat_fast.analysis.gradients import input_gradient
from ltat_fast.analysis.inequality import saliency
from ltat_fast.attacks import AttackConfig, pgd
from ltat_fast.attacks.objectives import cross_entropy
from ltat_fast.config import parse_fraction
from ltat_fast.data import longtail
from ltat_fast.errors import UserError
from ltat_fast.models.frozen import FrozenTwin
from ltat_fast.models.precision import without_tf32
from ltat_fast.pixels import to_unit
from ltat_fast.reporting.headline import names
from ltat_fast.reporting.study import Study
from ltat_fast.runs.experiments import Experiment
from ltat_fast.runs.metrics import spread
from ltat_fast.runs.splits import DeviceImages, Splits, host_images, read_dataset
from ltat_fast.runs.weights import load_model, weights_file

ROWS = 6
GRADIENT_IMAGES = 100
STEPS = 20


@dataclass(frozen=True)
class Picture:
    """An image as a data URI. note: the predicted class. correct: whether it is right; None without a prediction."""

    source: str
    alt: str
    note: str = ""
    correct: bool | None = None


@dataclass(frozen=True)
class Row:
    """One test image. cells: the pictures of each method."""

    name: str
    training_images: int
    original: Picture
    cells: list[list[Picture]]


@dataclass
class Gallery:
    """All pictures of a study.

    methods: indices of the experiments whose weights exist. missing: a sentence for everything that could not be
    loaded. gradients: absolute input gradients by group of classes, one array per method. zeros: percentage of
    gradients that are exactly zero, per method. test_counts: number of test images in all and per group; empty if the
    images could not be loaded.
    """

    methods: list[int] = field(default_factory=list)
    adversarial: list[Row] = field(default_factory=list)
    saliency: list[Row] = field(default_factory=list)
    gradients: dict[str, list[np.ndarray]] = field(default_factory=dict)
    zeros: list[float] = field(default_factory=list)
    test_counts: dict[str, int] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)


def gallery(study: Study, device: torch.device, data_dir: Path | None = None) -> Gallery:
    """The pictures of the first run of each experiment. What cannot be loaded is named in ``missing``, not raised.

    data_dir: folder of the images; None for the one that the runs used.
    """
    shown = Gallery()
    try:
        data = _data(study, device, data_dir)
    except (UserError, OSError) as error:
        shown.missing.append(f"The images could not be loaded: {_without_paths(error, study, data_dir)}.")
        return shown
    groups = {name: np.isin(data.test.labels.cpu().numpy(), classes) for name, classes in data.groups.items()}
    shown.test_counts = {"all": len(data.test)} | {name: int(chosen.sum()) for name, chosen in groups.items()}
    models = {}
    for place, (experiment, name) in enumerate(zip(study.experiments, names(study.experiments), strict=True)):
        try:
            models[place] = _model(experiment, study, data, device)
        except (UserError, OSError) as error:
            shown.missing.append(f"{name} has no pictures: {_without_paths(error, study, data_dir)}.")
    if models:
        shown.methods = list(models)
        with without_tf32():
            _examples(shown, study, data, list(models.values()))
            _gradients(shown, data, list(models.values()))
    return shown


def _data(study: Study, device: torch.device, data_dir: Path | None) -> Splits:
    """Load the test images. Unlike :func:`ltat_fast.runs.splits.load_splits` it downloads nothing."""
    config, _ = configuration.load(study.runs[0].path)
    where = data_dir or config.data_dir
    dataset = read_dataset(dataclasses.replace(config, data_dir=where), download=False)
    tailed = longtail.make_long_tailed(dataset, config.imbalance_ratio)
    counts = study.counts or tailed.counts
    if len(counts) != len(tailed.counts):
        raise UserError(f"the runs have {len(counts)} classes, the images {len(tailed.counts)}")
    test = host_images(dataset.test, device, config)  # the pixels stay on the host
    return Splits(
        test,
        test,
        test,
        counts,
        study.groups or tailed.groups,
        tailed.class_names,
        tailed.index_hash,
        dataset.pad,
        dataset.flip,
    )


def _model(experiment: Experiment, study: Study, data: Splits, device: torch.device) -> nn.Module:
    weights = weights_file(experiment.runs[0].path, study.checkpoint)
    return FrozenTwin(load_model(weights, device, experiment.config.arch, data), fold_bn=True)


def _without_paths(error: Exception, study: Study, data_dir: Path | None) -> str:
    """The message with the names of folders instead of their paths, because the page may be shown to others."""
    text = str(error)
    for run_ in study.runs:
        text = text.replace(str(run_.path), run_.name)
    for folder in (data_dir, study.config.data_dir, Path.cwd(), Path.home()):
        if folder is not None:
            text = text.replace(str(folder), Path(folder).name)
    return text


def _examples(shown: Gallery, study: Study, data: Splits, models: list[nn.Module]) -> None:
    """Add one test image for each of :data:`ROWS` classes, spaced evenly from the most frequent to the rarest."""
    order = study.by_frequency() if study.counts else sorted(range(data.num_classes), key=lambda c: -data.counts[c])
    places = np.unique(np.linspace(0, len(order) - 1, min(ROWS, len(order))).round().astype(int))
    labels = data.test.labels.cpu()
    firsts = [int((labels == order[p]).nonzero()[0]) for p in places if (labels == order[p]).any()]
    x = to_unit(data.test.images[torch.tensor(firsts)])
    y = data.test.labels[firsts]
    eps = parse_fraction(study.config.eps)
    attack = AttackConfig(eps, eps / 4, STEPS)
    predictions, attacked, maps = [], [], []
    for model in models:
        x_adv = pgd(model, x, cross_entropy(y), attack, seeding.stream(x.device, 0, "report"))
        with torch.no_grad():
            predictions.append((model(x).argmax(1).tolist(), model(x_adv).argmax(1).tolist()))
        attacked.append(x_adv)
        maps.append(saliency(model, x, y))
    who = [names(study.experiments)[place] for place in shown.methods]
    for i, (index, label) in enumerate(zip(firsts, y.tolist(), strict=True)):
        name = data.class_names[label]
        original = Picture(_image(x[i]), f"test image {index}, class {name}")
        adversarial, salient = [], []
        for method, (clean, robust), x_adv, gradient in zip(who, predictions, attacked, maps, strict=True):
            taken = data.class_names[robust[i]]
            about = f"{original.alt}, attacked against {method}"
            adversarial.append(
                [
                    Picture(_image(x_adv[i]), f"{about}: classified as {taken}", taken, robust[i] == label),
                    Picture(_image((x_adv[i] - x[i]) / (2 * eps) + 0.5), f"the perturbation of {about}, amplified"),
                ]
            )
            taken = data.class_names[clean[i]]
            about = f"saliency of {method} on {original.alt}, classified as {taken}"
            salient.append([Picture(_signed(gradient[i]), about, taken, clean[i] == label)])
        shown.adversarial.append(Row(name, data.counts[label], original, adversarial))
        shown.saliency.append(Row(name, data.counts[label], original, salient))


def _gradients(shown: Gallery, data: Splits, models: list[nn.Module]) -> None:
    """Add absolute gradients of the cross-entropy, on images spread evenly over the classes of each group."""
    labels = data.test.labels.cpu().numpy()
    for group in ("head", "medium", "tail"):
        members = np.flatnonzero(np.isin(labels, data.groups[group]))
        if len(members):
            index = members[spread(labels[members], GRADIENT_IMAGES)]
            shown.gradients[group.capitalize()] = [_gradient_sizes(model, data.test, index) for model in models]
    of_methods = zip(*shown.gradients.values(), strict=True)
    shown.zeros = [100 * float((np.concatenate(sizes) == 0).mean()) for sizes in of_methods]


def _gradient_sizes(model: nn.Module, test: DeviceImages, index: np.ndarray, batch: int = 50) -> np.ndarray:
    sizes = []
    for part in torch.from_numpy(index).split(batch):
        y = test.labels[part.to(test.labels.device)]
        x = to_unit(test.images[part])
        gradient = input_gradient(model, x, lambda logits, y=y: F.cross_entropy(logits, y, reduction="none"))
        sizes.append(gradient.abs().flatten().cpu().numpy())
    return np.concatenate(sizes)


def _image(x: Tensor) -> str:
    """``(C, H, W)`` in [0, 1] as the data URI of a PNG."""
    pixels = (x.detach().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return _png(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def _signed(gradient: Tensor) -> str:
    """``(C, H, W)`` summed over channels as the data URI of a PNG: red for positive values, blue for negative ones."""
    values = gradient.detach().cpu().sum(0)
    scaled = 0.5 + 0.5 * values / values.abs().max().clamp_min(torch.finfo(values.dtype).tiny)
    return _png(matplotlib.colormaps["RdBu_r"](scaled.numpy(), bytes=True)[..., :3])


def _png(pixels: np.ndarray) -> str:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
