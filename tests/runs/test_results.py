"""eval.json as typed objects: accuracies against NumPy, what is written and read again, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.made_runs import write
from ltat_fast.attacks.results import Result, pack, unpack
from ltat_fast.errors import UserError
from ltat_fast.runs.json_object import JsonObject
from ltat_fast.runs.results import CheckpointResults, EvalFile, percentages

GROUPS = {"head": [0, 1], "medium": [2], "tail": [3], "nobody": [4]}


def result(images: int, chosen=None) -> tuple[Result, np.ndarray, np.ndarray]:
    """A random result, with the correctness and the labels that it was computed from."""
    rng = np.random.RandomState(0)
    labels = rng.randint(0, 4, images)
    correct = rng.rand(images) < 0.6
    made = Result.from_correct(torch.from_numpy(correct), torch.from_numpy(labels), GROUPS, 5, chosen)
    return made, correct, labels


def test_accuracies_by_group_and_class():
    made, correct, labels = result(57)

    def percent(classes):
        hits = [c for c, label in zip(correct, labels, strict=True) if label in classes]
        return 100 * sum(hits) / len(hits)

    assert made.all == pytest.approx(100 * correct.sum() / 57)
    for group in ("head", "medium", "tail"):
        assert made.groups[group] == pytest.approx(percent(GROUPS[group])), group
    assert made.groups["nobody"] is None
    assert made.per_class == (*(pytest.approx(percent([c])) for c in range(4)), None)
    assert made.images == 57
    assert np.array_equal(unpack(made.correct, 57), correct)
    assert made.chosen is None
    assert made.attacked(57).all()


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([0, 0, 0, 0, 1, 1], (100 * 3 / 4 + 50) / 2),
        ([0, 0, 0, 0, 0, 3], (60 + 100) / 2),  # the others have no image
        ([0, 0, 0, 1, 1, 1], None),
        ([0, 0, 1, 1, 2, 3], None),
        ([1, 1, 1, 1, 1, 1], None),
    ],
)
def test_balanced_accuracy_is_the_mean_of_the_classes_where_they_differ_in_size(labels, expected):
    correct = torch.tensor([True, True, True, False, False, True])
    made = Result.from_correct(correct, torch.tensor(labels), GROUPS, 5)
    assert made.percent("balanced") == (None if expected is None else pytest.approx(expected))
    assert ("balanced" in made.to_json()) == (expected is not None)
    content = made.to_json() | {"weights": "a", "eps": "0.1", "test_set": "b"}
    again = EvalFile.from_json(JsonObject(Path("eval.json"), {"last": {"clean": content}}))
    assert again.result("last", "clean").percent("balanced") == made.percent("balanced")


def test_balanced_accuracy_of_equal_classes_would_be_the_accuracy():
    labels = torch.arange(60) % 4
    correct = torch.rand(60, generator=torch.Generator().manual_seed(0)) < 0.6
    made = Result.from_correct(correct, labels, {}, 4)
    assert "balanced" not in made.groups
    assert np.mean(made.per_class) == pytest.approx(made.all)


@pytest.mark.parametrize("count", [0, 1, 8, 15, 1000])
def test_which_images_were_correct_fits_in_hexadecimal(count):
    bits = np.random.RandomState(0).rand(count) < 0.4
    text = pack(bits)
    assert len(text) == 2 * ((count + 7) // 8)
    assert np.array_equal(unpack(text, count), bits)
    assert pack(np.array([True, False, True, True, False, False, False, True, True])) == "b180"
    with pytest.raises(ValueError, match="do not hold"):
        unpack(text + "ff", count)


def test_the_names_in_the_file_stand_in_their_order():
    """Scripts of other people read the file."""
    names = ["all", "head", "medium", "tail", "nobody", "balanced", "per_class", "images", "correct"]
    made, *_ = result(20)
    assert list(made.to_json()) == names
    limited, *_ = result(20, chosen=np.arange(30) < 20)
    assert list(limited.to_json()) == [*names, "chosen"]


CHECKS = [{"name": "range", "passed": True, "value": 0.5, "detail": "fine", "weights": "w"}]
OLD = {"all": 50, "tail": None, "images": 40, "weights": "w", "eps": "0.1"}  # as written before "correct"
KNOWN = OLD | {"per_class": [50, None], "correct": "0f" * 5, "test_set": "t"}


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"last": {}},
        {"best": {"clean": {"all": 12.5}}},
        {"best": {"clean": OLD, "pgd20": KNOWN}, "last": {"clean": OLD}},
        {"best": {"clean": KNOWN, "checks": CHECKS, "worst": {"attacks": ["clean", "cw20"]} | KNOWN}},
        {"best": {"checks": CHECKS, "clean": KNOWN | {"chosen": "00" + "ff" * 5}}},
        {"best": {"clean": OLD | {"tail10": 3.5, "note": "of a later version", "more": {"a": [1]}}}},
    ],
)
def test_what_is_read_is_written_again(tmp_path, content):
    write(tmp_path / "eval.json", content)
    EvalFile.load(tmp_path / "eval.json").save(tmp_path / "again.json")
    again = json.loads((tmp_path / "again.json").read_text())
    assert again == content
    assert {which: list(part) for which, part in again.items()} == {
        which: list(part) for which, part in content.items()
    }


def test_a_number_of_an_unknown_name_is_a_group_of_classes(tmp_path):
    write(tmp_path / "eval.json", {"best": {"clean": OLD | {"tail10": 3.5, "note": "x"}}})
    read = EvalFile.load(tmp_path / "eval.json").result("best", "clean")
    assert (read.groups, read.other) == ({"tail": None, "tail10": 3.5}, {"note": "x"})
    assert [read.percent(group) for group in ("all", "tail", "tail10", "head")] == [50, None, 3.5, None]


def test_percentages_of_the_files_that_have_them():
    with_tail, without = Result(50.0, {"tail": 20.0}), Result(60.0, {"tail": None})
    files = [EvalFile({"best": CheckpointResults({"clean": each})}) for each in (with_tail, without)] + [EvalFile()]
    assert percentages(files, "best", "clean", "all") == [50, 60]
    assert percentages(files, "best", "clean", "tail") == [20]
    assert percentages(files, "last", "clean", "all") == percentages(files, "best", "fgsm", "all") == []


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (3, " is not a JSON object"),
        ({"checks": [3]}, ", checks is not a list of JSON objects"),
        ({"checks": {"name": "range"}}, ", checks is not a list of JSON objects"),
        ({"clean": 3}, ", clean is not a JSON object"),
        ({"clean": {"images": "5"}}, ", clean, images is "),
        ({"clean": {"images": True}}, ", clean, images is true"),
        ({"clean": {"images": -1}}, ", clean, images is -1"),
        ({"clean": {"all": "x"}}, ", clean, all is "),
        ({"pgd20": {"all": 50.0, "tail": [1]}}, r", pgd20, tail is \[1\]"),
        ({"pgd20": {"all": float("nan")}}, ", pgd20, all is NaN"),
        ({"pgd20": {"all": 10**400}}, ", pgd20, all is 1000"),
        ({"pgd20": {"per_class": 3}}, ", pgd20, per_class is 3"),
        ({"pgd20": {"per_class": [3, "x"]}}, ", pgd20, per_class is "),
        ({"worst": {"attacks": 7}}, ", worst, attacks is 7"),
        ({"clean": {"chosen": 3}}, ", clean, chosen is 3"),
        ({"clean": {"tail": 5}}, ", clean, all is missing"),
        ({"clean": {"all": 5, "tail10": 101}}, ", clean, tail10 is 101"),
        ({"clean": {"all": 5, "images": 40, "correct": "ff"}}, ", clean, correct is "),
        ({"clean": {"all": 5, "images": 40, "correct": "zz" * 5}}, ", clean, correct is "),
        ({"clean": {"all": 5, "images": 9, "chosen": "ff00"}}, ", clean, chosen is "),
        ({"clean": {"all": 5, "weights": 3}}, ", clean, weights is 3"),
        ({"clean": {"all": 5, "eps": 0.1}}, ", clean, eps is 0.1"),
        ({"clean": {"all": 5, "per_class": [1]}, "fgsm": {"all": 5, "per_class": [1, 2]}}, None),
        ({"checks": [{"name": "range", "passed": 1, "value": 0.5, "detail": ""}]}, ", checks, passed is 1"),
        ({"checks": [{"name": "range", "passed": True, "value": "x", "detail": ""}]}, ", checks, value is "),
        ({"checks": [{"name": "range"}]}, ", checks, passed is missing"),
        ({"pgd\x01": {"all": 5}}, ", 'pgd.x01' is not the name of an attack"),
    ],
)
def test_a_result_of_another_type_is_named(tmp_path, entry, said):
    write(tmp_path / "eval.json", {"last": {}, "best": entry})
    said = ": per_class has 1 and 2 numbers" if said is None else f": best{said}"
    with pytest.raises(UserError, match=rf"eval\.json is damaged{said}"):
        EvalFile.load(tmp_path / "eval.json")
