"""What a run is made of: its folder, its balanced set, its weights files."""

import numpy as np
import pytest
import torch

from ltat_fast.config import Config
from ltat_fast.data import class_counts, class_groups
from ltat_fast.errors import UserError
from ltat_fast.files import lock_run_dir
from ltat_fast.methods.ltat import Ltat
from ltat_fast.models import build_model
from ltat_fast.runs.splits import DeviceImages, Splits, balanced_indices
from ltat_fast.runs.weights import load_model, new_model, weights_card, weights_file, write_weights

CPU = torch.device("cpu")


def data_of(counts: list[int], names: tuple[str, ...] | None = None) -> Splits:
    """A run's data with these training images a class, all of them black."""
    labels = torch.from_numpy(np.repeat(np.arange(len(counts)), counts))
    train = DeviceImages(torch.zeros(len(labels), 3, 1, 1, dtype=torch.uint8), labels)
    names = names or tuple(f"class {c}" for c in range(len(counts)))
    return Splits(train, train, train, counts, class_groups(counts), names, "hash", pad=1, flip=True)


# -- the folder -----------------------------------------------------------------------------------------------------


def test_a_folder_is_claimed_by_one(tmp_path):
    with lock_run_dir(tmp_path):
        with pytest.raises(UserError, match="is being trained by another process"), lock_run_dir(tmp_path):
            pytest.fail("claimed twice")
        with pytest.raises(UserError, match="is being trained by another process"), lock_run_dir(tmp_path):
            pytest.fail("a refusal has freed it")
    with lock_run_dir(tmp_path):
        pass


def test_what_goes_wrong_inside_frees_it(tmp_path):
    with pytest.raises(KeyboardInterrupt), lock_run_dir(tmp_path):
        raise KeyboardInterrupt
    with lock_run_dir(tmp_path):
        pass


def test_without_locks_nothing_is_claimed(tmp_path, monkeypatch):
    def no_locks(*args):
        raise OSError("this file system has none")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with lock_run_dir(tmp_path), lock_run_dir(tmp_path):
        pass


# -- the balanced set of the teacher --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_max", "classes", "imbalance_ratio", "per_class"),
    [
        (5000, 10, 50, 2500),
        (5000, 10, 10, 2500),
        (500, 100, 10, 250),
        (500, 100, 50, 250),
        (500, 200, 10, 250),
        (100, 10, 1, 100),  # a balanced set stays as it is
    ],
)
def test_gamma_is_half_the_imbalance_ratio(n_max, classes, imbalance_ratio, per_class):
    data = data_of(class_counts(n_max, classes, imbalance_ratio))
    indices = balanced_indices(Config(imbalance_ratio=imbalance_ratio), data)
    assert np.bincount(data.train.labels.numpy()[indices]).tolist() == [per_class] * classes


@pytest.mark.parametrize(("gamma", "per_class"), [(1.0, 11), (2.5, 28), (0.01, 1)])
def test_a_given_gamma_is_in_units_of_the_smallest_class(gamma, per_class):
    data = data_of([114, 40, 11])
    assert len(balanced_indices(Config(gamma=gamma), data)) == 3 * per_class


# -- weights --------------------------------------------------------------------------------------------------------


def test_weights_are_a_function_of_the_seed_alone():
    data, state = data_of([5, 4]), torch.get_rng_state()
    first, again, other = (new_model("smallresnet", data, CPU, seed, Ltat()).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


def write_model(path, data, network="smallresnet", **changes):
    model = build_model(network, data.num_classes)
    card = weights_card(Config(arch=network), data, Ltat(), epoch=1) | changes
    write_weights(path, model.state_dict(), card)
    return model.state_dict()


def test_a_weights_file_knows_its_network(tmp_path):
    data = data_of([5, 4, 3])
    expected = write_model(tmp_path / "m.safetensors", data, network="mobilenetv2")
    loaded = load_model(tmp_path / "m.safetensors", CPU, "smallresnet", data).state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[k], expected[k]) for k in expected)


@pytest.mark.parametrize(
    ("card", "argument", "computes"),
    [
        ({"arch": "smallresnet", "activation": "silu"}, "relu", "silu"),
        ({"arch": "smallresnet", "activation": "relu"}, "silu", "relu"),
        ({"arch": "smallresnet"}, "silu", "relu"),  # of a version that had only ReLU
        ({}, "silu", "silu"),  # of another program
    ],
    ids=str,
)
def test_a_weights_file_knows_its_activation(card, argument, computes, tmp_path):
    data, x = data_of([5, 4, 3]), torch.rand(2, 3, 8, 8)
    model = build_model("smallresnet", 3, activation=computes).eval()
    write_weights(tmp_path / "m.safetensors", model.state_dict(), card)
    loaded = load_model(tmp_path / "m.safetensors", CPU, "smallresnet", data, activation=argument).eval()
    torch.testing.assert_close(loaded(x), model(x))


def test_the_card_of_a_run_names_the_activation():
    data = data_of([5, 4, 3])
    for activation in ("relu", "silu"):
        assert weights_card(Config(activation=activation), data, Ltat(), epoch=1)["activation"] == activation


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_classes": 4, "class_names": list("abcd"), "class_counts": [1] * 4}, "has 4 classes, the data has 3"),
        ({"in_channels": 1}, "takes 1 channels, the images have 3"),
        ({"class_names": ["class 0", "class 2", "class 1"]}, "'class 2' where the data has 'class 1'"),
        ({"arch": "resnet18"}, "does not fit resnet18"),
        ({"arch": "vgg"}, "unknown architecture 'vgg'"),
        ({"activation": "gelu"}, "unknown activation 'gelu'"),
        ({"method": "of-tomorrow"}, "of the method 'of-tomorrow', which this version does not know"),
        ({"method_options": {"omega": 1}}, "of the method 'ltat', which this version does not know"),
    ],
)
def test_a_weights_file_that_does_not_fit(tmp_path, changes, words):
    data = data_of([5, 4, 3])
    write_model(tmp_path / "m.safetensors", data, **changes)
    with pytest.raises(UserError, match=words) as error:
        load_model(tmp_path / "m.safetensors", CPU, "smallresnet", data)
    assert "\n" not in str(error.value)


def test_where_weights_are(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    with pytest.raises(UserError, match="has no finished weights"):
        weights_file(tmp_path / "run")
    (folder / "last.safetensors").write_text("")
    assert weights_file(tmp_path / "run") == folder / "last.safetensors"
    assert weights_file(folder / "last.safetensors") == folder / "last.safetensors"
    with pytest.raises(UserError, match="has no finished weights"):
        weights_file(tmp_path / "run", "best")
