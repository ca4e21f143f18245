"""Valid and invalid MATLAB files of SVHN."""

import numpy as np
import pytest
from scipy.io import savemat

from ltat_fast.data.svhn import read_svhn
from ltat_fast.errors import UserError

PIXELS = np.random.RandomState(0).randint(0, 256, (32, 32, 3, 10)).astype(np.uint8)
LABELS = np.arange(1, 11)[:, None]


def test_pixels_and_labels(tmp_path):
    savemat(tmp_path / "a.mat", {"X": PIXELS, "y": LABELS.astype(np.uint8)}, do_compression=True)
    images, labels = read_svhn(tmp_path / "a.mat")
    assert labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    assert labels.dtype == np.int64
    assert images.flags.c_contiguous
    assert all(images[n, c, i, j] == PIXELS[i, j, c, n] for n, c, i, j in [(0, 0, 0, 0), (3, 1, 5, 30), (9, 2, 31, 0)])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"X": PIXELS, "y": LABELS - 1}, "has the label 0, but SVHN's labels are 1 to 10"),
        ({"X": PIXELS, "y": LABELS + 1}, "has the label 11, but"),
        ({"X": PIXELS, "y": LABELS[:-1]}, "does not hold one integer for each of the 10 images"),
        ({"X": PIXELS, "y": LABELS + 0.5}, "does not hold one integer"),
        ({"X": PIXELS.astype(float), "y": LABELS}, r"X is float64 \(32, 32, 3, 10\), expected uint8"),
        ({"X": PIXELS[:31], "y": LABELS}, r"X is uint8 \(31, 32, 3, 10\), expected"),
        ({"X": PIXELS[..., 0], "y": LABELS}, r"X is uint8 \(32, 32, 3\), expected"),
        ({"X": PIXELS}, "is not an SVHN file: 'y'"),
        ({"X": "text", "y": LABELS}, "X is "),
    ],
)
def test_arrays_that_are_not_svhn_are_refused(tmp_path, content, message):
    savemat(tmp_path / "a.mat", content)
    with pytest.raises(UserError, match=rf"a.mat.*{message}"):
        read_svhn(tmp_path / "a.mat")


def test_damaged_files_are_refused(tmp_path):
    savemat(tmp_path / "a.mat", {"X": PIXELS, "y": LABELS}, do_compression=True)
    content = (tmp_path / "a.mat").read_bytes()
    for length in (0, 100, 200, len(content) // 2, len(content) - 1):
        (tmp_path / "a.mat").write_bytes(content[:length])
        with pytest.raises(UserError, match=r"a.mat is not an SVHN file"):
            read_svhn(tmp_path / "a.mat")
