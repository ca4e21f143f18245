"""Images that stay on the host: the same batches as on the device, whatever the file, the size and the order."""

import contextlib
import itertools
import threading

import numpy as np
import pytest
import torch

from helpers.cuda_batches import assert_same_without_synchronisation
from ltat_fast.data import DeviceLoader, HostImages, host
from ltat_fast.data.host import centre


@pytest.fixture
def array(tmp_path):
    """Return a memory map of 60 images of 3 x 16 x 16 pixels, and the same array in memory."""
    pixels = np.random.RandomState(0).randint(0, 256, (60, 3, 16, 16), np.uint8)
    np.save(tmp_path / "x.npy", pixels)
    return np.load(tmp_path / "x.npy", mmap_mode="r"), pixels


@pytest.mark.parametrize("larger_than_memory", [False, True])
def test_an_index_gives_the_rows(array, monkeypatch, larger_than_memory):
    monkeypatch.setattr(host, "free_memory", lambda: 0 if larger_than_memory else 2**40)
    mapped, pixels = array
    rows = np.random.RandomState(1).permutation(60)[:40]
    images = HostImages(mapped, rows)
    assert images._larger_than_memory == larger_than_memory
    assert images.shape == (40, 3, 16, 16)
    assert len(images) == 40
    assert images.nbytes == 40 * 3 * 256
    index = torch.tensor([7, 7, 0, 39])
    assert np.array_equal(images[index].numpy(), pixels[rows[index]])
    assert np.array_equal(images.select(np.array([3, 1]))[torch.arange(2)].numpy(), pixels[rows[[3, 1]]])
    assert np.array_equal(images.to_device().numpy(), pixels[rows])
    assert images[torch.arange(0)].shape == (0, 3, 16, 16)
    with pytest.raises(IndexError):
        images[torch.tensor([40])]


@pytest.mark.parametrize("size", [16, 15, 10, 1])
def test_the_centre_is_that_of_torchvision(array, size):
    from ltat_fast._torchvision import torchvision

    expected = torchvision.transforms.functional.center_crop(torch.from_numpy(array[1]), [size, size])
    images = HostImages(array[0], size=size)
    assert images.shape == (60, 3, size, size)
    assert torch.equal(images[torch.arange(60)], expected)
    assert torch.equal(images.to_device(), expected)
    assert torch.equal(centre(torch.from_numpy(array[1]), size, size), expected)


def test_all_images_are_read_in_blocks_and_a_whole_array_is_shared(array, monkeypatch):
    monkeypatch.setattr(host, "BLOCK_BYTES", 7 * 3 * 256)
    images = HostImages(array[0])
    assert [len(block) for block in images.blocks()] == [7] * 8 + [4]
    assert np.array_equal(images.to_device().numpy(), array[1])
    assert HostImages(array[1]).to_device().data_ptr() == array[1].ctypes.data
    assert HostImages(array[1], np.arange(59)).to_device().data_ptr() != array[1].ctypes.data


def test_batches_are_gathered_ahead_in_order_and_an_error_is_raised(array, monkeypatch):
    indices = [np.random.RandomState(i).permutation(60)[: i % 5 + 1] for i in range(50)]
    images = HostImages(array[0])
    for index, batch in zip(indices, images.batches(iter(indices)), strict=True):
        assert np.array_equal(batch.numpy(), array[1][index])
    gathered = []
    real = images.gather
    monkeypatch.setattr(images, "gather", lambda index: gathered.append(len(index)) or real(index))
    batches = images.batches(iter(indices))
    next(batches)
    batches.close()
    assert len(gathered) <= host.AHEAD + 1
    assert not any(thread.name.startswith("gather") for thread in threading.enumerate())
    with pytest.raises(IndexError):
        list(images.batches([np.array([0]), np.array([60]), np.array([1])]))


@pytest.mark.parametrize("augment", ["none", "randaugment"])
@pytest.mark.parametrize(("crop", "size"), [("pad", None), ("pad", 12), ("resized", 16), ("resized", 10)])
def test_streamed_batches_equal_resident_ones(array, augment, crop, size):
    rows = np.random.RandomState(1).permutation(60)[:50]
    options = {
        "batch_size": 8,
        "seed": 3,
        "pad": 0 if size else 2,
        "flip": True,
        "device": "cpu",
        "channels_last": True,
    }
    options |= {"augment": augment, "crop": crop, "size": size, "world_size": 2, "rank": 1}
    options["indices"] = np.arange(50).repeat(2)
    streamed = DeviceLoader(HostImages(array[0], rows), np.arange(50), **options)
    resident = DeviceLoader(array[1][rows], np.arange(50), **options)
    assert len(streamed) == len(resident) == 12
    for epoch, start in itertools.product((0, 1), (0, 7, 12)):
        pairs = list(zip(streamed.batches(epoch, start), resident.batches(epoch, start), strict=True))
        assert len(pairs) == 12 - start
        for (x, y), (expected_x, expected_y) in pairs:
            assert torch.equal(x, expected_x)
            assert torch.equal(y, expected_y)
            assert x.shape == (4, 3, size or 16, size or 16)
            assert x.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gets_the_same_batches_without_synchronisation(array):
    rows = np.random.RandomState(1).permutation(60)
    options = {"batch_size": 8, "seed": 3, "pad": 2, "flip": True, "augment": "randaugment"}
    expected = list(DeviceLoader(array[1][rows], np.arange(60), device="cpu", **options).batches(1))
    on_device = DeviceLoader(HostImages(array[0], rows, device="cuda"), np.arange(60), device="cuda", **options)
    assert_same_without_synchronisation(on_device, expected)
    images = HostImages(array[0], rows, device="cuda")
    assert torch.equal(images.to_device().cpu(), torch.from_numpy(array[1][rows]))
    assert torch.equal(images[torch.arange(5, device="cuda")].cpu(), torch.from_numpy(array[1][rows[:5]]))


def test_the_threads_end_with_an_epoch_that_nobody_finishes(array):
    loader = DeviceLoader(HostImages(array[0]), np.arange(60), batch_size=2, seed=0, pad=0, flip=False, device="cpu")
    with contextlib.closing(loader.batches(0)) as batches:
        next(batches)
    assert not any(thread.name.startswith("gather") for thread in threading.enumerate())
