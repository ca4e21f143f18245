"""The content of weights files and saved states is checked before any of it is used."""

import pytest
import torch

from ltat_fast.errors import UserError
from ltat_fast.runs.weights import build_from_card, read_weights, write_weights


@pytest.fixture
def weights(digits_run):
    return read_weights(digits_run / "checkpoints" / "last.safetensors")


@pytest.mark.parametrize(
    ("entry", "value", "words"),
    [
        ("num_classes", 10**8, "num_classes is 100000000"),
        ("num_classes", 9, "class_names has 10 classes, num_classes is 9"),
        ("class_counts", ["1"] * 10, "class_counts is "),
        ("class_counts", [1], "class_counts has 1 classes, num_classes is 10"),
        ("image_size", [8], "image_size is "),
        ("in_channels", 10**30, "in_channels is 1000000"),
        ("in_channels", True, "in_channels is true"),
        ("method_options", [], "method_options is "),
        ("method_options", {"alpha": "1"}, "takes float"),
        ("epoch", -1, "epoch is -1"),
    ],
)
def test_a_card_that_lies_is_refused(weights, tmp_path, entry, value, words):
    tensors, card = weights
    with pytest.raises(UserError, match=words):
        build_from_card(tmp_path / "x.safetensors", tensors, card | {entry: value})


@pytest.mark.parametrize("card", [[], None, 1, "x"])
def test_a_card_that_is_no_object_is_refused(weights, tmp_path, card):
    write_weights(tmp_path / "x.safetensors", weights[0], card)
    with pytest.raises(UserError, match="its card is not a JSON object"):
        read_weights(tmp_path / "x.safetensors")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64, torch.int64])
def test_numbers_of_another_kind_are_refused(weights, tmp_path, dtype):
    tensors, card = weights
    name = next(name for name, tensor in tensors.items() if tensor.is_floating_point())
    with pytest.raises(UserError, match=f"{name} holds numbers of type {str(dtype).removeprefix('torch.')}"):
        build_from_card(tmp_path / "x.safetensors", tensors | {name: tensors[name].to(dtype)}, card)
