"""The one place torchvision is imported: ``from ltat_fast._torchvision import torchvision``.

PyPI's torchvision wheel is built for a CUDA torch. Beside a CPU-only torch its compiled part does not load, and
``import torchvision`` stops at "operator torchvision::nms does not exist", because its Python side attaches fake
kernels and autograd to operators that were never declared. Declaring those two is enough for its datasets and
transforms, which are pure Python; the detection operators themselves stay missing, and nothing here uses them.
Where torchvision imports by itself this changes nothing.
"""

import sys

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

try:
    import torchvision
except RuntimeError as error:
    if "torchvision::nms does not exist" not in str(error):
        raise
    # The failed import leaves half of the package behind; a second one must start afresh.
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    _library = torch.library.Library("torchvision", "FRAGMENT")  # lives as long as this module: so do the schemas
    for _schema in _SCHEMAS:
        _library.define(_schema)
    import torchvision

__all__ = ["torchvision"]
