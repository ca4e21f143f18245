"""Adding to RUN/eval.json: which results are known, which are combined, and that two writers lose nothing."""

import dataclasses
import json
import os
import threading

import numpy as np
import pytest
import torch

from ltat_fast.attacks.checks import Check
from ltat_fast.attacks.results import Identity, Result, pack
from ltat_fast.errors import UserError
from ltat_fast.runs.scores import Scores, fingerprint
from ltat_fast.runs.splits import DeviceImages

LABELS = torch.arange(40) % 4
TEST = DeviceImages(torch.zeros(40, 1, 2, 2, dtype=torch.uint8), LABELS)
GROUPS = {"tail": [3]}
IDENTITY = {"weights": "w", "eps": "0.1", "test_set": "t"}
CHECK = Check("range", True, 0.0, "fine")


def scores(folder, checkpoints=("best",), **identity) -> Scores:
    return Scores(folder / "eval.json", Identity(**IDENTITY | identity), list(checkpoints), TEST, GROUPS, 4)


def result(share: float, seed: int = 0, images: int = 40) -> Result:
    correct = torch.from_numpy(np.random.RandomState(seed).rand(images) < share)
    chosen = np.arange(40) < images if images < 40 else None
    return Result.from_correct(correct, LABELS[:images], GROUPS, 4, chosen)


def content(folder) -> dict:
    return json.loads((folder / "eval.json").read_text())


def worst(folder) -> dict:
    return content(folder)["best"]["worst"]


def test_the_worst_case_is_updated_after_each_attack(tmp_path):
    mine = scores(tmp_path)
    mine.add("clean", result(0.9))
    assert list(content(tmp_path)["best"]) == ["clean"]
    for attack, seed in (("pgd20", 1), ("cw20", 2)):
        mine.add(attack, result(0.7, seed))
        entry = content(tmp_path)["best"]
        *attacks, last = entry
        assert last == "worst"
        bits = [bin(int("1" + entry[name]["correct"], 16))[3:] for name in attacks]
        survivors = sum(all(b[i] == "1" for b in bits) for i in range(40))
        assert entry["worst"]["attacks"] == attacks
        assert entry["worst"]["all"] == pytest.approx(100 * survivors / 40)
        assert entry["worst"].items() >= IDENTITY.items()
    mine.add("cw20", result(0.0))
    assert worst(tmp_path)["all"] == 0
    assert worst(tmp_path)["attacks"] == ["clean", "pgd20", "cw20"]


def test_an_attack_on_a_few_images_keeps_the_worst_case_of_many(tmp_path):
    mine = scores(tmp_path)
    for attack, images in (("clean", 40), ("pgd20", 40)):
        mine.add(attack, result(0.7, seed=images, images=images))
    before = worst(tmp_path)
    for attack in ("pgd4", "cw20"):
        mine.add(attack, result(0.0, images=5))
    assert worst(tmp_path) == before
    assert (before["attacks"], before["images"]) == (["clean", "pgd20"], 40)
    mine.add("cw20", result(0.0))
    assert worst(tmp_path)["attacks"] == ["clean", "pgd20", "cw20"]
    assert worst(tmp_path)["all"] == 0


def test_a_single_attack_on_more_images_does_not_change_the_worst_case(tmp_path):
    mine = scores(tmp_path)
    for attack, images in (("clean", 40), ("pgd20", 12), ("cw20", 12), ("fgsm", 5)):
        mine.add(attack, result(0.7, images=images))
    assert (worst(tmp_path)["attacks"], worst(tmp_path)["images"]) == (["clean", "pgd20", "cw20"], 12)


def test_equal_numbers_of_images_do_not_make_results_comparable(tmp_path):
    others = dataclasses.replace(result(0.7, images=20), chosen=pack(np.arange(40) >= 20))
    mine = scores(tmp_path)
    mine.add("pgd20", result(0.7, images=20))
    mine.add("cw20", others)
    assert "worst" not in content(tmp_path)["best"]
    mine.add("fgsm", others)
    assert worst(tmp_path)["attacks"] == ["cw20", "fgsm"]


def test_results_for_other_weights_or_images_are_not_combined(tmp_path):
    scores(tmp_path, weights="older").add("clean", result(0.5))
    scores(tmp_path, weights="older").add_checks([dataclasses.replace(CHECK, passed=False)])
    scores(tmp_path, test_set="other").add("fgsm", result(0.1))
    scores(tmp_path).add("pgd20", result(0.7))
    assert list(content(tmp_path)["best"]) == ["clean", "fgsm", "pgd20"]
    scores(tmp_path).add("cw20", result(0.6))
    assert worst(tmp_path)["attacks"] == ["pgd20", "cw20"]
    scores(tmp_path, weights="newer").add("clean", result(0.5))
    assert "worst" not in content(tmp_path)["best"]


def test_results_of_an_earlier_version_are_kept_but_not_known(tmp_path):
    old = {"best": {"pgd20": {"all": 50.0, "images": 40, "weights": "w", "eps": "0.1"}}}
    (tmp_path / "eval.json").write_text(json.dumps(old))
    mine = scores(tmp_path)
    assert mine.known("pgd20", 40) is None
    mine.add("clean", result(0.9))
    mine.add("fgsm", result(0.8))
    assert content(tmp_path)["best"]["pgd20"] == old["best"]["pgd20"]
    assert worst(tmp_path)["attacks"] == ["clean", "fgsm"]


def test_what_counts_as_known(tmp_path):
    scores(tmp_path).add("pgd20", result(0.7, images=12))
    scores(tmp_path, ["last"]).add("pgd20", result(0.7, images=30))
    mine = scores(tmp_path, ["best", "last"])
    assert mine.known("pgd20", 5).images == mine.known("pgd20", 30).images == 30
    assert mine.known("pgd20", 31) is None
    assert mine.known("cw20", 5) is None
    for other in ({"weights": "v"}, {"eps": "8/255"}, {"test_set": "s"}):
        assert scores(tmp_path, **other).known("pgd20", 5) is None, other


def test_a_read_only_folder_is_refused_before_measuring(tmp_path, monkeypatch):
    mine = scores(tmp_path)
    mine.add("pgd20", result(0.7, images=12))
    mine.add_checks([CHECK])
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    assert mine.known("pgd20", 12).images == 12
    assert mine.known_checks()
    for ask in (
        lambda: mine.known("pgd20", 13),
        lambda: mine.known("cw20", 5),
        scores(tmp_path, weights="v").known_checks,
    ):
        with pytest.raises(UserError, match=r"cannot write into the run folder .*: it is read-only for this user"):
            ask()


def test_checks_belong_to_weights(tmp_path):
    mine = scores(tmp_path)
    assert mine.known_checks() is None
    mine.add_checks([CHECK])
    mine.add("clean", result(0.9))
    mine.add("pgd20", result(0.9))
    assert worst(tmp_path)["attacks"] == ["clean", "pgd20"]
    (known,) = scores(tmp_path, ["last"]).known_checks()
    assert dataclasses.asdict(known) == dataclasses.asdict(CHECK) | {"weights": "w"}
    assert content(tmp_path)["best"]["checks"] == [dataclasses.asdict(known)]
    assert scores(tmp_path, weights="v").known_checks() is None


def test_two_writers_at_once_lose_nothing(tmp_path):
    def work(which: str) -> None:
        for k in range(1, 13):
            scores(tmp_path, [which]).add(f"pgd{k}", result(0.9, seed=k))

    workers = [threading.Thread(target=work, args=(which,)) for which in ("best", "last")]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for which in ("best", "last"):
        assert content(tmp_path)[which]["worst"]["attacks"] == [f"pgd{k}" for k in range(1, 13)]


def test_without_a_change_nothing_is_written(tmp_path):
    scores(tmp_path).add("clean", result(0.9))
    before = (tmp_path / "eval.json").stat().st_mtime_ns
    scores(tmp_path).add("clean", scores(tmp_path).known("clean", 40))
    assert (tmp_path / "eval.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("broken", [{"correct": "zz"}, {"correct": "ff"}, {"images": None}, {"chosen": 3}])
def test_a_damaged_result_is_refused(tmp_path, broken):
    scores(tmp_path).add("clean", result(0.9))
    entries = content(tmp_path)
    entries["best"]["clean"] |= broken
    (tmp_path / "eval.json").write_text(json.dumps(entries))
    with pytest.raises(UserError, match=r"eval\.json is damaged"):
        scores(tmp_path).add("pgd20", result(0.9))
    assert content(tmp_path) == entries


def test_a_fingerprint_depends_on_images_and_labels():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (9, 1, 4, 4), generator=generator, dtype=torch.uint8)
    y = torch.arange(9)
    first = fingerprint(DeviceImages(images, y))
    assert first == fingerprint(DeviceImages(images.clone(memory_format=torch.channels_last), y.clone()))
    changed = images.clone()
    changed[4, 0, 1, 1] += 1
    others = [(changed, y), (images, y.flip(0)), (images.view(9, 1, 2, 8), y), (images.flip(0), y)]
    assert len({first, *(fingerprint(DeviceImages(*other)) for other in others)}) == 5
