"""Finished runs read from their folders: what is read, and that damaged files are named."""

import pytest

from helpers.made_runs import read, write, write_known_run
from ltat_fast.errors import UserError
from ltat_fast.runs.finished import Environment, FinishedRun, load_runs


def test_a_run_named_twice_counts_once(tmp_path, monkeypatch):
    run = write_known_run(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    (loaded,) = load_runs([run, run, tmp_path / "a" / ".." / "a", type(run)("a")])
    assert loaded.evaluation.result("best", "clean").all == 50


def test_names_are_as_short_as_they_can_be(tmp_path):
    methods = {"a/x": "ltat", "b/x": "at-bsl", "b/y": "trades"}
    runs = [write_known_run(tmp_path / path, method=method) for path, method in methods.items()]
    assert [run.name for run in load_runs(runs)] == ["a/x", "b/x", "y"]


def test_a_run_of_another_version_is_read(tmp_path):
    """It may have fewer or more settings than this version, and names that this version does not know."""
    run = write_known_run(tmp_path / "a")
    needed = ("dataset", "method", "arch", "imbalance_ratio", "select_on", "seed", "eps")
    settings = {name: read(run / "config.json")[name] for name in needed} | {"method": "new", "novelty": [1, {"a": 2}]}
    write(run / "config.json", settings)
    loaded = FinishedRun.load(run)
    assert (loaded.config.method, loaded.config.step_size, loaded.config.method_options) == ("new", None, {})
    assert loaded.config.settings == settings
    assert loaded.environment == Environment()


def damage(run, file, **fields):
    path = run / file
    write(path, (read(path) if path.exists() else {}) | fields)


@pytest.mark.parametrize(
    "field",
    [
        {"dataset": 3},
        {"method": None},
        {"arch": {}},
        {"imbalance_ratio": "10"},
        {"imbalance_ratio": 10**400},
        {"select_on": []},
        {"seed": []},
        {"seed": True},
        {"seed": 0.5},
        {"eps": 0.1},
        {"eps": "1/0"},
        {"eps": "2"},
        {"eps": "0"},
        {"eps": "1e-999999999"},
        {"step_size": "far"},
        {"attack_steps": "ten"},
        {"eval_attacks": 1},
        {"teacher": 4},
        {"data_dir": ["/data"]},
    ],
)
def test_a_setting_of_another_type_is_named(tmp_path, field):
    run = write_known_run(tmp_path / "a")
    damage(run, "config.json", **field)
    with pytest.raises(UserError, match=rf"a/config\.json is damaged: {next(iter(field))} is "):
        FinishedRun.load(run)


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ({"packages": 3}, "packages is not a JSON object"),
        ({"packages": {"torch": 2}}, "packages, torch is 2"),
        ({"class_counts": "many"}, "class_counts is "),
        ({"class_counts": [3, -1]}, r"class_counts is \[3, -1\]"),
        ({"class_counts": [3, 2.5]}, "class_counts is "),
        ({"git": 5}, "git is 5"),
        ({"python": []}, r"python is \[\]"),
        ({"index_hash": {}}, "index_hash is {}"),
        ({"command": False}, "command is false"),
    ],
)
def test_an_environment_of_another_type_is_named(tmp_path, field, said):
    run = write_known_run(tmp_path / "a")
    damage(run, "env.json", **field)
    with pytest.raises(UserError, match=rf"a/env\.json is damaged: {said}"):
        FinishedRun.load(run)


def test_both_files_must_have_the_same_number_of_classes(tmp_path):
    run = write_known_run(tmp_path / "a")
    damage(run, "env.json", class_counts=[5, 4, 3])
    FinishedRun.load(run)  # these results have no accuracies by class
    results = read(run / "eval.json")
    results["last"]["clean"]["per_class"] = [50.0, None]
    write(run / "eval.json", results)
    with pytest.raises(UserError, match=r"a/env\.json is damaged: class_counts has 3 classes, eval\.json has 2"):
        FinishedRun.load(run)


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("config.json", {"method": "ltat"}, "it lacks arch, dataset, eps"),
        ("config.json", [], "it is not a JSON object"),
        ("env.json", 3, "it is not a JSON object"),
        ("eval.json", {"best": [1]}, "best is not a JSON object"),
    ],
)
def test_a_file_of_another_shape_is_named(tmp_path, file, content, said):
    run = write_known_run(tmp_path / "a")
    write(run / file, content)
    with pytest.raises(UserError, match=rf"{file} is damaged: {said}"):
        FinishedRun.load(run)


@pytest.mark.parametrize("file", ["config.json", "env.json", "eval.json"])
@pytest.mark.parametrize("content", ["{", "", "[1]", "\x00\xff", "[" * 100_000, '{"a": "\\ud800"}'])
def test_a_damaged_file_is_named(tmp_path, file, content):
    run = write_known_run(tmp_path / "a")
    (run / file).write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=rf"{file} is damaged"):
        FinishedRun.load(run)


def test_a_run_without_results_is_named(tmp_path):
    run = write_known_run(tmp_path / "a")
    (run / "eval.json").unlink()
    with pytest.raises(UserError, match=r"a has no results: eval\.json does not exist"):
        FinishedRun.load(run)
    with pytest.raises(UserError, match=r"config\.json does not exist"):
        FinishedRun.load(tmp_path / "nowhere")
