"""The state of an interrupted AutoAttack: kept, refused if it belongs to another evaluation, removed."""

import dataclasses

import pytest
import torch

from ltat_fast.runs.results import Identity
from ltat_fast.runs.unfinished import Unfinished

IDENTITY = Identity("0123456789abcdef", "8/255", "fedcba")
PLACES = torch.arange(10)
TENSORS = {
    "robust": torch.tensor([True, False]),
    "state.x": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
}


def store(folder, identity=IDENTITY, attack="autoattack", places=PLACES, part=(0, 1), batch_size=256):
    return Unfinished(folder, identity).of(attack, places, part, batch_size)


def test_a_state_is_read_back_by_the_same_evaluation_and_removed(tmp_path):
    assert store(tmp_path).load() is None
    for step in (3, 4):
        store(tmp_path).save(TENSORS, {"step": step})
    tensors, position = store(tmp_path).load()
    assert position == {"step": 4}
    assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())
    store(tmp_path, attack="square").save(TENSORS, {})
    Unfinished(tmp_path, IDENTITY).remove("autoattack")
    assert store(tmp_path).load() is None
    assert store(tmp_path, attack="square").load() is not None


@pytest.mark.parametrize(
    "other",
    [
        {"identity": dataclasses.replace(IDENTITY, weights="0123456789abXXXX")},
        {"identity": dataclasses.replace(IDENTITY, eps="2/255")},
        {"identity": dataclasses.replace(IDENTITY, test_set="abc")},
        {"places": torch.arange(1, 11)},
        {"batch_size": 128},
        {"part": (0, 2)},
        {"part": (1, 2)},
        {"attack": "square"},
    ],
    ids=str,
)
def test_a_state_of_another_evaluation_is_not_used(tmp_path, other):
    store(tmp_path).save(TENSORS, {"step": 3})
    assert store(tmp_path, **other).load() is None
    assert store(tmp_path).load() is not None


def test_a_damaged_state_is_not_used(tmp_path, capfd):
    store(tmp_path).save(TENSORS, {"step": 3})
    (file,) = tmp_path.iterdir()
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    assert store(tmp_path).load() is None
    assert "does not match its checksum; the attack starts again" in capfd.readouterr().out
