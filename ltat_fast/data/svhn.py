"""Read SVHN's cropped digits from their MATLAB files."""

from pathlib import Path

import numpy as np

from ltat_fast.errors import UserError


def read_svhn(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read the images uint8 (N, 3, 32, 32) and labels int64 (N,) of one split. The file's label 10 is the digit 0.

    Args:
        path: a file with a verified checksum, because SciPy's reader can crash the process on a damaged one

    Raises:
        UserError: the file is not a MATLAB file, or its arrays are not those of SVHN.
    """
    from scipy.io import loadmat

    try:
        content = loadmat(path, variable_names=["X", "y"])
        images, labels = content["X"], content["y"].ravel()
    except Exception as error:  # a damaged file can raise any exception
        raise UserError(f"{path} is not an SVHN file: {error or type(error).__name__}") from error
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[:3] != (32, 32, 3):
        raise UserError(f"{path}: X is {images.dtype} {images.shape}, expected uint8 (32, 32, 3, N)")
    if not np.issubdtype(labels.dtype, np.integer) or len(labels) != images.shape[3]:
        raise UserError(f"{path}: y does not hold one integer for each of the {images.shape[3]:,} images")
    if wrong := sorted(set(labels.tolist()) - set(range(1, 11))):
        raise UserError(f"{path} has the label {wrong[0]}, but SVHN's labels are 1 to 10")
    return np.ascontiguousarray(images.transpose(3, 2, 0, 1)), labels.astype(np.int64) % 10
