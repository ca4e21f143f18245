"""The measurements of this package over a whole test set, averaged over all images and per group of classes."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ltat_fast import seeding
from ltat_fast.analysis import corruptions
from ltat_fast.analysis.alignment import gradient_alignment
from ltat_fast.analysis.classwise import classwise, frequency_groups
from ltat_fast.analysis.inequality import default_block, global_gini, regional_gini, saliency
from ltat_fast.analysis.linearity import output_distance, remainder
from ltat_fast.attacks import AttackConfig, pgd
from ltat_fast.attacks.objectives import cross_entropy
from ltat_fast.attacks.results import Result
from ltat_fast.models.frozen import FrozenTwin
from ltat_fast.pixels import to_unit
from ltat_fast.runs.metrics import spread

Values = dict[str, "Values"] | Tensor  # the tensors hold one value per image
Stream = Callable[[str], torch.Generator]


@dataclass
class Subject:
    """A network and the images it is measured on.

    images: uint8 ``(N, C, H, W)`` and labels: int64 ``(N,)``, on the device of the networks. counts: training images
    per class. eps: radius of noise and attack, for pixels in [0, 1].
    """

    model: nn.Module
    images: Tensor
    labels: Tensor
    groups: dict[str, list[int]]
    counts: list[int]
    eps: float
    batch_size: int = 256
    teacher: nn.Module | None = None

    def batches(self) -> Iterator[tuple[Tensor, Tensor, Stream]]:
        """Yield images in [0, 1], labels, and a function from a name to a random stream of the batch."""
        for start in range(0, len(self.labels), self.batch_size):
            x, y = (t[start : start + self.batch_size] for t in (self.images, self.labels))
            yield to_unit(x), y, functools.partial(seeding.stream, x.device, "analysis", start)

    def attack(self, x: Tensor, y: Tensor, stream: Stream) -> Tensor:
        """PGD-20 on the cross-entropy of the network with steps of eps / 4, as in the evaluation."""
        return pgd(self.model, x, cross_entropy(y), AttackConfig(self.eps, self.eps / 4, 20), stream("pgd20"))

    def averages(self, values: Values, among: Tensor | None = None) -> dict:
        """Replace each tensor by its means over all images and per group. among: bool, the images to average over."""
        if isinstance(values, dict):
            return {name: self.averages(value, among) for name, value in values.items()}
        labels, values = self.labels.cpu().numpy(), values.double().cpu().numpy()
        chosen = np.ones(len(labels), dtype=bool) if among is None else among.cpu().numpy()
        masks = {"all": chosen} | {name: chosen & np.isin(labels, classes) for name, classes in self.groups.items()}
        return {name: float(values[mask].mean()) if mask.any() else None for name, mask in masks.items()}

    def measure(self, function: Callable[..., Values]) -> Values:
        """Call ``function(x, y, stream)`` on each batch and concatenate the values."""
        return _join([function(*batch) for batch in self.batches()])


def _join(pieces: list[Values]) -> Values:
    if isinstance(pieces[0], dict):
        return {name: _join([piece[name] for piece in pieces]) for name in pieces[0]}
    return torch.cat(pieces)


def alignment(subject: Subject) -> dict:
    """GD and GC between network and teacher for each scalar, at the clean and at the attacked images."""

    def of_batch(x, y, stream):
        classes = len(subject.counts)
        u = torch.randn(len(x), classes, generator=stream("directions"), device=x.device)
        points = {"clean": x, "adv": subject.attack(x, y, stream)}
        return {at: gradient_alignment(subject.model, subject.teacher, point, y, u) for at, point in points.items()}

    return subject.averages(subject.measure(of_batch))


def linearity(subject: Subject) -> dict:
    """The remainder under uniform noise and, with a teacher, the distance to the teacher under noise and attack."""

    def of_batch(x, y, stream):
        noise = (2 * torch.rand(x.shape, generator=stream("noise"), device=x.device) - 1) * subject.eps
        values = {"remainder": remainder(subject.model, x, noise)}
        if subject.teacher is not None:
            points = {"uniform": x + noise, "adv": subject.attack(x, y, stream)}
            distances = {at: output_distance(subject.model, subject.teacher, p) for at, p in points.items()}
            values["distance"] = distances
        return values

    return subject.averages(subject.measure(of_batch))


def inequality(subject: Subject) -> dict:
    """Gini values of the attribution, global and over blocks in both forms; "blocks" gives the sides of the blocks."""
    blocks = {form: default_block(min(subject.images.shape[2:]), form) for form in ("pooled", "block-sum")}

    def of_batch(x, y, stream):
        attribution = saliency(subject.model, x, y)
        regional = {form: regional_gini(attribution, block, form) for form, block in blocks.items()}
        return {"global": global_gini(attribution), "regional": regional}

    return subject.averages(subject.measure(of_batch)) | {"blocks": blocks}


def classified(subject: Subject) -> Tensor:
    """Which clean images the network classifies correctly: bool ``(N,)``."""
    model = FrozenTwin(subject.model, fold_bn=False)
    with torch.no_grad():
        return subject.measure(lambda x, y, stream: model(x).argmax(1) == y)


def corruption(subject: Subject, common: Tensor) -> dict:
    """Error rates in percent on the images ``common``, bool ``(N,)``. "mean" is the mean over strengths.

    Every network gets the same noise.
    """
    model = FrozenTwin(subject.model, fold_bn=False)
    size, entries = min(subject.images.shape[2:]), subject.images[0].numel()
    table = corruptions.constants_for(size)

    def normal(x, generator):
        return torch.randn(x.shape, generator=generator, device=x.device)

    @torch.no_grad()
    def wrong(x, y):
        return 100.0 * (model(x).argmax(1) != y)

    def of_batch(x, y, stream):
        attribution = saliency(model, x, y)
        values = {"ina1": {}, "ina2": {}, "rn": {}, "occlusion": {}}
        for t in corruptions.inductive_shares(entries):
            mask, noise = corruptions.top_mask(attribution, t), normal(x, stream(f"ina {t}"))
            values["ina1"][f"{t:g}"] = wrong(corruptions.add_noise(x, mask, noise), y)
            values["ina2"][f"{t:g}"] = wrong(corruptions.replace_by_noise(x, mask, noise), y)
        for t in corruptions.RANDOM_SHARES:
            mask, noise = corruptions.random_mask(x, t, stream(f"rn mask {t}")), normal(x, stream(f"rn {t}"))
            values["rn"][f"{t:g}"] = wrong(corruptions.add_noise(x, mask, noise), y)
        for name, colour in corruptions.COLOURS.items():
            kept = corruptions.correct_under_occlusion(model, x, y, attribution, colour)
            values["occlusion"][name] = 100.0 * ~kept
        for name, corrupt in corruptions.COMMON.items():
            values[name] = {
                str(severity): wrong(corrupt(x, strength, stream(f"{name} {severity}")), y)
                for severity, strength in enumerate(corruptions.CONSTANTS[table][name], 1)
            }
        return values

    values = subject.measure(of_batch)
    for name in values.keys() - {"occlusion"}:
        values[name]["mean"] = torch.stack(list(values[name].values())).mean(0)
    return subject.averages(values, common) | {"common_images": int(common.sum()), "constants": table}


def by_frequency(scores: dict[str, Result], test_labels: np.ndarray, counts: list[int]) -> dict:
    """Accuracy in percent by attack, in up to ten groups of classes from the most to the least frequent.

    scores: results by attack, as in RUN/eval.json. test_labels: of the whole test set. counts: training images per
    class. Raises ValueError or IndexError if a result does not fit the test set.
    """
    accuracies = {"classes": frequency_groups(counts)}
    for attack, result in scores.items():
        if result.per_class and result.images is not None:
            # Older versions of this package did not record "chosen"; they used evenly spread images.
            known = result.chosen is not None
            seen = result.attacked(len(test_labels)) if known else spread(test_labels, result.images)
            images = np.bincount(test_labels[seen], minlength=len(counts))
            means = classwise(result.per_class, images.tolist(), counts)
            accuracies[attack] = {"accuracy": means, "images": result.images}
    return accuracies
