"""A network of another library, or of the user, with the interface of our own networks.

An export copies the code of this file, so it imports only torch and :mod:`~ltat_fast.models.classifier`.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from .classifier import FullPrecisionLinear, ImageClassifier, Normalize, with_float32_head


class ForeignClassifier(ImageClassifier):
    """Images (N, C, H, W) in [0, 1] to logits (N, num_classes), by ``net`` of other code.

    The last linear layer moves from ``net`` to :attr:`fc`, so that ``net`` computes the features (N, feature_dim).

    Args:
        net: a network that returns logits (N, num_classes); changed in place
        head: name of its last linear layer; None: it has none, so there are no features and no ``fc``
        mean, std: the pixels are normalised by them first, one number per channel; None: they are not
    """

    unused: str | None = None
    """name of a weight that gets no gradient, because it is frozen or not used"""

    def __init__(
        self,
        net: nn.Module,
        num_classes: int,
        head: str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ):
        linear = net.get_submodule(head) if head else None
        super().__init__(linear.in_features if isinstance(linear, nn.Linear) else 1, num_classes)
        self.head = head
        self.normalize = nn.Identity() if mean is None or std is None else Normalize(mean, std)
        if head and isinstance(linear, nn.Linear):
            self.fc = FullPrecisionLinear(linear.in_features, num_classes, bias=linear.bias is not None, device="meta")
            self.fc.weight, self.fc.bias = linear.weight, linear.bias
            net.set_submodule(head, nn.Identity())
        else:
            del self.fc
            net = with_float32_head(net, num_classes)
        self.net = net

    def features(self, x: Tensor) -> Tensor:
        """Return the input (N, feature_dim) of the last linear layer. Only for a network that has one."""
        return self.net(self.normalize(x))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return super().forward(x) if self.head else self.net(self.normalize(x))

    def own_name(self, name: str) -> str:
        """Return the name, in this module, of the tensor that is called ``name`` in ``net`` before its head moved."""
        path, _, last = name.rpartition(".")
        return f"fc.{last}" if path == self.head else f"net.{name}"
