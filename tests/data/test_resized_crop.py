"""Resized crops against torchvision: the distribution of the boxes and the pixels."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp

from ltat_fast._torchvision import torchvision
from ltat_fast.data.resized_crop import RATIO, SCALE, ResizedCrops, apply_resized_crops, draw_resized_crops


def boxes(n, height, width, flip=True, seed=0):
    return draw_resized_crops(n, height, width, flip, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("height", "width"), [(64, 64), (32, 50)])
def test_boxes_have_the_distribution_of_torchvision(height, width):
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    get = torchvision.transforms.RandomResizedCrop.get_params
    theirs = np.array([get(image, list(SCALE), list(RATIO)) for _ in range(3000)])
    ours = torch.stack(boxes(3000, height, width)[:4], 1).numpy()
    for column in range(4):
        assert ks_2samp(theirs[:, column], ours[:, column]).pvalue > 0.01
    assert ks_2samp(theirs[:, 2] * theirs[:, 3], ours[:, 2] * ours[:, 3]).pvalue > 0.01
    assert (ours[:, 0] + ours[:, 2] <= height).all()
    assert (ours[:, 1] + ours[:, 3] <= width).all()
    assert (ours >= [0, 0, 1, 1]).all()


def test_a_box_that_never_fits_becomes_the_largest_centred_one():
    """One row of pixels: no box of the allowed ratios and areas fits."""
    drawn = boxes(100, 1, 200)
    assert torch.stack(drawn[:4], 1).unique(dim=0).tolist() == [[0, 99, 1, 1]]
    get = torchvision.transforms.RandomResizedCrop.get_params
    assert get(torch.empty(3, 1, 200), list(SCALE), list(RATIO)) == (0, 99, 1, 1)


def test_flips_and_seeds():
    assert not boxes(100, 8, 8, flip=False).flipped.any()
    assert 350 < boxes(1000, 8, 8).flipped.sum() < 650
    assert all(map(torch.equal, boxes(50, 8, 8), boxes(50, 8, 8)))
    assert not torch.equal(boxes(50, 8, 8).top, boxes(50, 8, 8, seed=1).top)


@pytest.mark.parametrize(("height", "width", "size"), [(48, 48, 32), (40, 56, 16), (8, 8, 24)])
def test_pixels_equal_those_of_torchvision_and_pillow(height, width, size):
    """Smooth images with noise, enlarged and reduced. The last bit may differ, because Pillow rounds twice."""
    rng = np.random.RandomState(0)
    wave = np.sin(np.arange(height * width).reshape(height, width) / 9) * 100 + 128
    images = np.clip(wave + rng.randint(-28, 28, (64, 3, height, width)), 0, 255).astype(np.uint8)
    x = torch.from_numpy(images)
    crops = boxes(64, height, width)
    resized = apply_resized_crops(x, size, crops)
    assert resized.shape == (64, 3, size, size)
    assert resized.dtype == torch.uint8
    for i, (top, left, rows, columns, flipped) in enumerate(zip(*(draw.tolist() for draw in crops), strict=True)):
        box = x[i : i + 1, :, top : top + rows, left : left + columns]
        exact = torch.nn.functional.interpolate(box.double(), (size, size), mode="bilinear", antialias=True)[0]
        exact = exact.flip(2) if flipped else exact
        assert (resized[i].double() - exact).abs().max() < 0.501
        image = Image.fromarray(images[i].transpose(1, 2, 0))
        pillow = image.crop((left, top, left + columns, top + rows)).resize((size, size), Image.Resampling.BILINEAR)
        pillow = np.asarray(pillow).transpose(2, 0, 1)
        pillow = pillow[..., ::-1] if flipped else pillow
        assert np.abs(resized[i].numpy().astype(int) - pillow).max() <= 1


def test_the_whole_image_in_its_own_size_does_not_change():
    x = torch.randint(0, 256, (5, 3, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = torch.full((5,), 20)
    zero, flipped = torch.zeros(5, dtype=torch.int64), torch.tensor([False, True, False, True, False])
    resized = apply_resized_crops(x, 20, ResizedCrops(zero, zero, whole, whole, flipped))
    assert torch.equal(resized[::2], x[::2])
    assert torch.equal(resized[1::2], x[1::2].flip(3))
