"""Checkpoint files: whole or not there, and nothing but tensors in them."""

import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from helpers.toy_networks import images, labels, small_net
from ltat_fast import files
from ltat_fast.errors import UserError
from ltat_fast.runs import checkpoint
from ltat_fast.runs.checkpoint import Progress
from ltat_fast.runs.weights import load_weights, read_weights, write_weights
from ltat_fast.training.step import make_optimizer

TENSORS = {
    "a": torch.arange(6.0).view(2, 3),
    "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "count": torch.tensor(7),
    "none": torch.empty(0, 3),
}
CARD = {"arch": "smallresnet", "epoch": 3, "share": 0.1, "names": ["é", "b"]}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "last.safetensors"
    write_weights(path, TENSORS, CARD)
    return path


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) and ours[k].dtype == theirs[k].dtype for k in ours)


def test_comes_back_as_it_was(file):
    tensors, card = read_weights(file)
    assert_same(tensors, TENSORS)
    assert card == CARD
    assert os.listdir(file.parent) == [file.name]


def test_channels_last_weights_come_back(tmp_path):
    weight = torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last)
    write_weights(tmp_path / "w.safetensors", {"w": weight}, {})
    assert torch.equal(read_weights(tmp_path / "w.safetensors")[0]["w"], weight)


@pytest.mark.parametrize("where", ["replace", "fsync"])
def test_a_crash_while_writing_leaves_the_old_file(file, monkeypatch, where):
    def crash(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, where, crash)
    with pytest.raises(KeyboardInterrupt):
        write_weights(file, {"a": torch.zeros(100)}, {})
    monkeypatch.undo()
    assert_same(read_weights(file)[0], TENSORS)
    assert os.listdir(file.parent) == [file.name]


def test_what_a_killed_writer_left_is_swept_up(file):
    leftover = file.with_name(".last.safetensors.123.partial")
    leftover.write_bytes(b"half")
    other = file.with_name(".best.safetensors.123.partial")
    other.write_bytes(b"half")
    write_weights(file, TENSORS, CARD)
    assert not leftover.exists()
    assert other.exists()


def test_every_truncation_is_refused(file):
    whole = file.read_bytes()
    for length in [*range(0, len(whole), 7), len(whole) - 1]:
        file.write_bytes(whole[:length])
        with pytest.raises(UserError, match="is damaged"):
            read_weights(file)


def test_no_flipped_bit_goes_unnoticed(file):
    """Wherever a bit flips, the file is refused, be it in the name of the checksum."""
    whole = file.read_bytes()
    complaints = set()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << (position % 8)
        file.write_bytes(damaged)
        with pytest.raises(UserError) as error:
            read_weights(file)
        complaints.add(str(error.value))
    assert all(c.startswith(f"{file} is damaged") and "\n" not in c for c in complaints)


def test_pickles_are_refused_unopened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    path = tmp_path / "model.pt"
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match=r"is not a \.safetensors file"):
        read_weights(path)
    disguised = tmp_path / "model.safetensors"
    disguised.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match="is damaged"):
        read_weights(disguised)
    assert not (tmp_path / "executed").exists()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"there is no checkpoint .*gone\.safetensors"):
        read_weights(tmp_path / "gone.safetensors")


def test_safetensors_of_others_are_welcome(tmp_path):
    save_file({"a": TENSORS["a"]}, tmp_path / "theirs.safetensors")
    tensors, card = read_weights(tmp_path / "theirs.safetensors", foreign=True)
    assert torch.equal(tensors["a"], TENSORS["a"])
    assert card == {}
    with pytest.raises(UserError, match="is damaged, or not written by ltat_fast: it has no checksum"):
        read_weights(tmp_path / "theirs.safetensors")


def test_a_file_of_ours_is_ours_though_both_its_names_are_damaged(file):
    """Found by the fuzzer: without either it passed for somebody else's, whatever else was wrong with it."""
    file.write_bytes(file.read_bytes().replace(b'"sha256"', b'"sh!256"').replace(b'"ltat_fast"', b'"ltat_bast"'))
    with pytest.raises(UserError, match="it has no checksum"):
        read_weights(file)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("1.bias"), r"f\.safetensors does not fit toy: lacks 1\.bias \(1 missing\)"),
        (lambda s: s.update({"head.w": torch.zeros(1)}), r"has the unknown tensor head\.w \(1 unknown\)"),
        (lambda s: s.update({"6.bias": torch.zeros(10)}), r"6\.bias is \(10,\), not \(3,\)"),
    ],
)
def test_weights_that_do_not_fit_are_told_apart(change, words, tmp_path):
    net, tensors = small_net(), small_net(seed=1).state_dict()
    change(tensors)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(UserError, match=words):
        load_weights(net, tensors, tmp_path / "f.safetensors", "toy")
    assert_same(net.state_dict(), before)


def test_state_of_training_comes_back(tmp_path):
    def train(net, optimizer):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(images()), labels()).backward()
        optimizer.step()

    net = small_net().to(memory_format=torch.channels_last)
    optimizer = make_optimizer(net, 0.1, 0.9, 5e-4)
    train(net, optimizer)
    progress = Progress(epoch=3, step=2, best={"pgd20": 1 / 3}, sums={"loss": 0.1 + 0.2, "steps": 2.0}, seconds=1.5)
    kept = {"ema": torch.tensor([1.0, 2.0])}
    checkpoint.save_state(tmp_path / "resume.safetensors", net, optimizer, progress, kept)
    train(net, optimizer)

    other = small_net(seed=9).to(memory_format=torch.channels_last)
    other_optimizer = make_optimizer(other, 0.1, 0.9, 5e-4)
    restored = {"ema": torch.zeros(2)}
    assert checkpoint.load_state(tmp_path / "resume.safetensors", other, other_optimizer, "toy", restored) == progress
    assert_same(restored, kept)
    train(other, other_optimizer)
    assert_same(other.state_dict(), net.state_dict())
    for ours, theirs in zip(other.parameters(), net.parameters(), strict=True):
        momenta = other_optimizer.state[ours]["momentum_buffer"], optimizer.state[theirs]["momentum_buffer"]
        assert torch.equal(*momenta)


def test_weights_are_not_a_state(tmp_path):
    net = small_net()
    path = tmp_path / "resume.safetensors"
    write_weights(path, {f"model.{k}": v for k, v in net.state_dict().items()}, {"arch": "toy"})
    with pytest.raises(UserError, match="is not the saved state of a run"):
        checkpoint.load_state(path, net, make_optimizer(net, 0.1, 0.9, 0.0), "toy", {})


def test_a_state_is_loaded_in_place(tmp_path):
    """A captured step reads and writes these very tensors."""
    net = small_net()
    optimizer = make_optimizer(net, 0.1, 0.9, 0.0)
    path = tmp_path / "resume.safetensors"
    checkpoint.save_state(path, net, optimizer, Progress(), {})
    tensors = [*net.state_dict().values(), *(state["momentum_buffer"] for state in optimizer.state.values())]
    addresses = [tensor.data_ptr() for tensor in tensors]
    checkpoint.load_state(path, net, optimizer, "toy", {})
    tensors = [*net.state_dict().values(), *(state["momentum_buffer"] for state in optimizer.state.values())]
    assert [tensor.data_ptr() for tensor in tensors] == addresses


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    net = small_net()
    tensors = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    tensors["3.weight"][0, 0, 0, 0] = value
    with pytest.raises(UserError, match=r"f\.safetensors holds numbers that are not finite, in 3\.weight \(1 such"):
        load_weights(net, tensors, tmp_path / "f.safetensors", "toy")
