"""The interface of a training method: hyper-parameters, attack objective, training loss.

A method is a dataclass. Its fields are its hyper-parameters and become command-line flags; the string below a field is
the help text of its flag. :data:`ltat_fast.methods.METHODS` lists all methods. The trainer owns everything else: data,
attack loop, frozen twins, precision, compilation, checkpoints.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from ltat_fast.errors import UserError
from ltat_fast.models.classifier import ImageClassifier

Model = Callable[[Tensor], Tensor]
Parts = dict[str, Tensor]
Noise = Literal["uniform", "gaussian"]
TeacherKind = Literal["none", "balanced", "robust", "natural"]


@dataclass
class MethodContext:
    """The data that a run passes to its method, once, through :meth:`Method.setup`.

    class_counts: int64 ``(C,)`` on the training device, number of training images per class.
    teacher: frozen network from images to float32 logits; None if the method needs no teacher.
    label_smoothing: share s of the label that is spread evenly over all classes, in [0, 1) (Szegedy et al., "Rethinking
        the Inception Architecture for Computer Vision", CVPR 2016, section 7). The label term of :meth:`Method.loss`
        uses it. The attack does not: it ascends the same objective, with hard labels, for any s.
    """

    class_counts: Tensor
    teacher: Model | None = None
    label_smoothing: float = 0.0

    def teacher_logits(self, x: Tensor) -> Tensor:
        """Return the teacher's logits ``(B, K)`` at the images ``x``. Raises RuntimeError if there is no teacher."""
        if self.teacher is None:
            raise RuntimeError("the method needs a teacher, but its context has none: pass one to MethodContext")
        return self.teacher(x)


@dataclass
class Method:
    """Base class of all methods. By default the attack ascends cross-entropy with hard labels."""

    name: ClassVar[str]
    noise: ClassVar[Noise] = "uniform"
    """Start noise of the training attack: uniform in the eps-ball, or 0.001 N(0, 1)."""
    teacher: ClassVar[TeacherKind] = "none"
    """Kind of teacher that the run trains if ``--teacher`` names none. balanced: PGD-AT on the class-balanced
    re-sampling. robust: PGD-AT on all training images. natural: standard training on all training images."""
    needs_fp32_attack: ClassVar[bool] = False
    """True if the objective is nearly flat at the start of the attack. In bfloat16 many signs of such a gradient are
    wrong, so ``--attack-precision auto`` runs the attack in float32."""
    uses_attack: ClassVar[bool] = True
    """False: the run skips the attack, and ``x_adv`` is ``x``."""
    attack_begin: ClassVar[float] = 0.0
    """Share of the epochs that skip the attack: while progress <= attack_begin, ``x_adv`` is ``x``."""
    needs_double_backward: ClassVar[bool] = False
    """True if the loss contains an input gradient of the student. torch.compile and synchronised batch norm cannot
    differentiate that, so the student is not compiled, and the run needs a single process."""

    couples_images: ClassVar[bool] = False
    """True if the loss on a batch is not the mean of the losses on its parts, for example because it compares images.
    ``--accumulate`` then computes the outputs of the student on the whole batch first, and everything with gradients
    after it: one more forward pass (:mod:`ltat_fast.training.micro_batches`)."""

    default_awp: ClassVar[float] = 0.0
    """Size gamma of the weight perturbation (AWP) if ``--awp`` is not given."""
    smooths_labels: ClassVar[bool] = False
    """True if the loss has a label term, cross-entropy or balanced softmax, that uses ``context.label_smoothing``.
    False: the run refuses ``--label-smoothing``."""

    def check(self) -> None:
        """Raise UserError if a hyper-parameter is invalid. The base class refuses negative and non-finite numbers."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and not 0 <= value < math.inf:
                raise UserError(f"{_flag(field.name)} must be 0 or more and finite, not {value:g}")

    def _require_positive(self, name: str) -> None:
        """Raise UserError if the hyper-parameter ``name`` is 0. :meth:`check` has already refused negative values."""
        if getattr(self, name) == 0:
            raise UserError(f"{_flag(name)} must be above 0, not 0")

    def _require_share(self, *names: str) -> None:
        """Raise UserError if one of the hyper-parameters ``names`` is above 1."""
        for name in names:
            value = getattr(self, name)
            if value > 1:
                raise UserError(f"{_flag(name)} must be between 0 and 1, not {value:g}")

    def setup(self, context: MethodContext) -> None:
        """Keep ``context``. The trainer calls this once, before training starts."""
        self.context = context

    def wrap_model(self, model: ImageClassifier, class_counts: Tensor) -> ImageClassifier:
        """Return the network that this method trains and exports, made from the plain network ``model``.

        The trainer calls this before it trains or loads any weight. class_counts: int64 ``(C,)`` on the CPU.
        """
        return model

    def on_epoch_start(self, epoch: int) -> None:
        """Update what changes per epoch. ``epoch`` counts from 0.

        The trainer calls this before the first step of an epoch, and does not call it again when it resumes in the
        middle of an epoch.
        """

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that the method itself changes in training.

        The trainer saves them with the run. On resume it copies the saved values into them.
        """
        return {}

    def target(self, frozen: Model, x: Tensor, y: Tensor) -> Tensor:
        """Return the target of :meth:`objective`, computed once per batch: labels here, clean predictions in TRADES."""
        return y

    def objective(self, x_adv: Tensor, logits: Tensor, target: Tensor) -> Tensor:
        """Return the scalar that the attack ascends, summed over the batch.

        x_adv: ``(B, C, H, W)``. logits: ``(B, K)`` of the frozen student at ``x_adv``. target: from :meth:`target`.
        """
        return F.cross_entropy(logits, target, reduction="sum")

    def loss(self, model: Model, x: Tensor, x_adv: Tensor, y: Tensor, progress: Tensor) -> tuple[Tensor, Parts]:
        """Return the training loss, a scalar, and its named parts.

        model: the student in train mode. x, x_adv: ``(B, C, H, W)`` in [0, 1]. y: int64 ``(B,)``.
        progress: 0-dim tensor, number of the epoch / number of epochs; the first epoch has number 1.
        The parts are detached 0-dim tensors. The trainer averages them over the epoch and logs them.
        """
        raise NotImplementedError


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
