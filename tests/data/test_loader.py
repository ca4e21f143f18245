"""The images that an epoch visits do not depend on the starting step, the number of processes or the device."""

import itertools

import numpy as np
import pytest
import torch

from helpers.cuda_batches import assert_same_without_synchronisation
from ltat_fast.data import DeviceLoader, resident
from ltat_fast.errors import UserError
from ltat_fast.pixels import to_unit


def dataset(n=50, channels=3, size=8):
    """Return images and labels. All pixels of image i are i, so that a batch shows its images; its label is i % 7."""
    numbers = torch.arange(n, dtype=torch.uint8)
    return numbers[:, None, None, None].expand(n, channels, size, size).contiguous(), torch.arange(n) % 7


def loader(images, labels, **options):
    defaults = {"batch_size": 8, "seed": 3, "pad": 0, "flip": False, "device": "cpu"}
    return DeviceLoader(images, labels, **(defaults | options))


def visited(batches):
    return [(x[:, 0, 0, 0] * 255).round().long().tolist() for x, _ in batches]


@pytest.mark.parametrize(("batch_size", "steps"), [(10, 5), (8, 6)])
def test_an_epoch_visits_each_image_at_most_once(batch_size, steps):
    """All of the 50 images if the batches are full, otherwise all but the last 2."""
    epochs = loader(*dataset(), batch_size=batch_size)
    assert len(epochs) == steps
    for epoch in range(3):
        batches = list(epochs.batches(epoch))
        seen = visited(batches)
        assert [len(batch) for batch in seen] == [batch_size] * steps
        flat = list(itertools.chain(*seen))
        assert len(set(flat)) == batch_size * steps
        assert set(flat) <= set(range(50))
        for (x, y), numbers in zip(batches, seen, strict=True):
            assert x.dtype == torch.float32
            assert y.dtype == torch.int64
            assert y.tolist() == [number % 7 for number in numbers]


def test_epochs_and_seeds_differ_and_repeat():
    images, labels = dataset()
    one = loader(images, labels)
    assert visited(one.batches(0)) == visited(loader(images, labels).batches(0))
    assert visited(one.batches(0)) != visited(one.batches(1))
    assert visited(one.batches(0)) != visited(loader(images, labels, seed=4).batches(0))


def test_pixels_are_divided_by_255_and_nothing_else():
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    x = to_unit(images)
    assert torch.equal(x.flatten().double(), (torch.arange(256).float() / 255).double())
    assert (x.min(), x.max()) == (0, 1)


@pytest.mark.parametrize("augment", ["none", "randaugment", "autoaugment"])
def test_any_starting_step_gives_the_same_batches(augment):
    images = torch.randint(0, 256, (50, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    kept = images.clone()
    labels = torch.arange(50)
    options = {"pad": 4, "flip": True, "augment": augment}
    whole = list(loader(images, labels, **options).batches(5))
    for start in range(len(whole) + 1):
        later = list(loader(images, labels, **options).batches(5, start=start))
        assert len(later) == len(whole) - start
        for (x, y), (expected_x, expected_y) in zip(later, whole[start:], strict=True):
            assert torch.equal(x, expected_x)
            assert torch.equal(y, expected_y)
    assert torch.equal(images, kept)


@pytest.mark.parametrize("augment", ["none", "randaugment"])
def test_the_shares_of_all_processes_are_the_batch_of_one(augment):
    images = torch.randint(0, 256, (50, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    options = {"batch_size": 12, "pad": 2, "flip": True, "augment": augment}
    single = loader(images, torch.arange(50), **options)
    shards = [loader(images, torch.arange(50), rank=rank, world_size=4, **options) for rank in range(4)]
    assert {len(shard) for shard in shards} == {len(single)}
    for (x, y), *parts in zip(single.batches(2), *(shard.batches(2) for shard in shards), strict=True):
        assert [len(part[1]) for part in parts] == [3] * 4
        assert torch.equal(torch.cat([part[0] for part in parts]), x)
        assert torch.equal(torch.cat([part[1] for part in parts]), y)


def test_indices_select_and_repeat_images():
    images, labels = dataset()
    indices = np.array([3, 3, 3, 7, 9, 9, 11, 40])
    seen = visited(loader(images, labels, indices=indices, batch_size=4).batches(0))
    assert sorted(itertools.chain(*seen)) == indices.tolist()
    shared = loader(images, labels, indices=indices)
    assert shared.images.data_ptr() == images.data_ptr()


def test_the_global_generators_are_not_used():
    images, labels = dataset()
    torch.manual_seed(1)
    np.random.seed(1)
    expected = torch.rand(3), np.random.rand(3)
    torch.manual_seed(1)
    np.random.seed(1)
    list(loader(images, labels, pad=2, flip=True, augment="randaugment").batches(0))
    assert torch.equal(torch.rand(3), expected[0])
    assert np.array_equal(np.random.rand(3), expected[1])


def test_the_memory_format_changes_no_value():
    images = torch.randint(0, 256, (16, 3, 8, 8), dtype=torch.uint8)
    contiguous, channels_last = (
        next(iter(loader(images, torch.arange(16), pad=1, channels_last=last).batches(0)))[0] for last in (False, True)
    )
    assert torch.equal(contiguous, channels_last)
    assert contiguous.is_contiguous()
    assert channels_last.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.filterwarnings("error")
def test_a_read_only_memory_map_is_copied_without_a_warning(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(50, dtype=np.uint8)[:, None, None, None] * np.ones((1, 1, 4, 4), np.uint8))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert len(list(loader(mapped, np.arange(50)).batches(0))) == 6
    tensor = resident(mapped, "cpu")
    tensor[0] = 99
    assert mapped[0].max() == 0


def test_wrong_arguments_are_refused():
    images, labels = dataset()
    with pytest.raises(UserError, match="50 images do not fill one batch of 51"):
        loader(images, labels, batch_size=51)
    with pytest.raises(UserError, match="does not split evenly over 3 processes"):
        loader(images, labels, world_size=3)
    with pytest.raises(UserError, match="batch of 0 images"):
        loader(images, labels, batch_size=0)
    with pytest.raises(UserError, match="unknown augmentation 'mixup'; choose from none, randaugment, autoaugment"):
        loader(images, labels, augment="mixup")
    with pytest.raises(UserError, match="randaugment needs colour images"):
        loader(images[:, :1], labels, augment="randaugment")
    with pytest.raises(UserError, match="0 images do not fill"):
        loader(images[:0], labels[:0])
    for arguments in ((images.float(), labels), (images[0], labels), (images, labels[:-1])):
        with pytest.raises(ValueError, match="uint8"):
            loader(*arguments)
    with pytest.raises(ValueError, match=r"rank must be in 0\.\.1 for 2 processes, got 2"):
        loader(images, labels, rank=2, world_size=2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("augment", ["none", "randaugment", "autoaugment"])
def test_a_gpu_gives_the_same_batches_without_synchronisation(augment):
    images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)
    options = {"pad": 4, "flip": True, "augment": augment, "batch_size": 16}
    expected = list(loader(images, torch.arange(64), **options).batches(1))
    on_device = loader(images, torch.arange(64), device="cuda", **options)
    assert_same_without_synchronisation(on_device, expected)
