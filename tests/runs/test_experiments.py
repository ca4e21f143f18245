"""Which runs are repetitions of one experiment, and how experiments are labelled."""

import json

import pytest

from helpers.made_runs import write_known_run
from ltat_fast.errors import UserError
from ltat_fast.runs import tables
from ltat_fast.runs.experiments import experiments


@pytest.mark.parametrize(
    "other", [{"imbalance_ratio": 50.0}, {"method": "at-bsl"}, {"epochs": 7}, {"eps": "0.2"}, {"teacher": "runs/t"}]
)
def test_runs_with_other_settings_are_another_experiment(tmp_path, other):
    runs = [write_known_run(tmp_path / "a", 50.0), write_known_run(tmp_path / "b", 60.0, seed=1, **other)]
    found = experiments(runs)
    assert [[e.values(which, "clean", "all") for which in ("best", "last")] for e in found] == [
        [[50], [49]],
        [[60], [59]],
    ]


def seeds(runs):
    return [len(experiment.runs) for experiment in experiments(runs)]


def labels(*runs):
    return [experiment.label for experiment in experiments(list(runs))]


def test_equal_labels_get_the_settings_that_differ(tmp_path):
    two = write_known_run(tmp_path / "2", epochs=2, gamma=2.5)
    four = write_known_run(tmp_path / "4", epochs=4, data_dir="x", device="cpu", seed=3)
    assert labels(two) == labels(four) == ["ltat"]
    assert labels(two, four) == ["ltat epochs=2 gamma=2.5", "ltat epochs=4"]
    assert "epochs=4" in tables.render([two, four])
    elsewhere = write_known_run(tmp_path / "100", epochs=100, dataset="cifar10-lt")
    assert labels(two, four, elsewhere)[2] == "ltat"
    given = write_known_run(tmp_path / "given", epochs=4, teacher="runs/t")
    assert labels(four, given) == ["ltat teacher=own", "ltat teacher=given"]


def test_a_run_of_an_earlier_version_has_the_defaults_of_later_settings(tmp_path):
    now = write_known_run(tmp_path / "now")
    older = write_known_run(tmp_path / "older", seed=1)
    config = json.loads((older / "config.json").read_text())
    del config["settings"], config["method_options"]["kl_prior"]
    (older / "config.json").write_text(json.dumps(config))
    assert labels(now, older) == ["ltat"]
    other = write_known_run(tmp_path / "other", augment="randaugment")
    assert labels(other, older) == ["ltat augment=randaugment", "ltat augment=none"]


def test_the_settings_of_the_authors_are_in_the_label(tmp_path):
    known = {"method": "reat", "dataset": "cifar10-lt"}
    runs = [write_known_run(tmp_path / s, settings=s, **known) for s in ("paper", "authors")]
    assert labels(*runs) == ["reat", "reat settings=authors"]
    assert "reat settings=authors" in tables.render(runs[1:])


def test_modifiers_are_part_of_the_label(tmp_path):
    plain = write_known_run(tmp_path / "plain")
    modified = write_known_run(tmp_path / "modified", awp=0.005, ema=0.995, modify_teacher=True)
    assert labels(plain, modified) == ["ltat", "ltat + awp 0.005 + ema 0.995 + modify-teacher"]
    assert "ltat + awp 0.005 + ema 0.995 + modify-teacher" in tables.render([plain, modified])
    longer = write_known_run(tmp_path / "longer", ema=0.995, epochs=9)
    shorter = write_known_run(tmp_path / "shorter", ema=0.995, epochs=8)
    assert labels(longer, shorter) == ["ltat + ema 0.995 epochs=9", "ltat + ema 0.995 epochs=8"]


def test_where_and_how_a_run_was_executed_makes_no_difference(tmp_path):
    runs = [
        write_known_run(tmp_path / "a", data_dir="x", device="cpu", save_minutes=1.0, teacher="runs/t0"),
        write_known_run(tmp_path / "b", seed=4, resume=True, teacher="runs/t1"),
    ]
    assert seeds(runs) == [2]


def test_the_same_seed_twice_is_refused(tmp_path):
    runs = [write_known_run(tmp_path / name / "run", seed=seed) for name, seed in (("a", 0), ("b", 1), ("c", 1))]
    with pytest.raises(UserError, match="b/run and c/run are the same experiment with the same seed, 1: name only one"):
        experiments(runs)
    assert seeds(runs[:2]) == [2]


def test_given_teachers_make_experiments_if_a_seed_occurs_twice(tmp_path):
    runs = [write_known_run(tmp_path / f"{t}{s}", seed=s, teacher=f"runs/[{t}]") for t in "ab" for s in (0, 1)]
    assert labels(*runs) == ["ltat teacher=[a]", "ltat teacher=[b]"]
    assert seeds(runs) == [2, 2]
    assert "teacher=[b]" in tables.render(runs)  # square brackets are markup to rich
    with pytest.raises(UserError, match="c0 are the same experiment"):
        experiments([*runs, write_known_run(tmp_path / "c0", teacher="runs/[a]")])


def test_other_training_images_are_another_experiment(tmp_path):
    runs = [write_known_run(tmp_path / str(s), seed=s) for s in range(3)]
    for run, images in zip(runs, ("one", "other", "one"), strict=True):
        (run / "env.json").write_text(json.dumps({"index_hash": images}))
    assert seeds(runs) == [2, 1]
