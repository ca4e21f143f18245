"""Import torchvision. All other files use ``from ltat_fast._torchvision import torchvision``.

The torchvision wheel of PyPI is built for a CUDA torch. With a CPU-only torch its compiled part does not load, and
``import torchvision`` fails with "operator torchvision::nms does not exist": its Python code attaches fake kernels and
autograd to operators that are not declared. Declaring these two operators is enough for the datasets and transforms,
which are pure Python. The detection operators still do not work, and nothing here uses them. If torchvision can be
imported without this, nothing is declared.
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
    # Remove the modules that the failed import left behind, or the second import would not run them again.
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    _library = torch.library.Library("torchvision", "FRAGMENT")  # deleting it would delete the schemas
    for _schema in _SCHEMAS:
        _library.define(_schema)
    import torchvision

__all__ = ["torchvision"]
