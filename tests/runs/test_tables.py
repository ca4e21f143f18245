"""The paper's table: what is averaged with what, and that every digit is there."""

import json

import pytest

from ltat_fast.config import Config, to_json
from ltat_fast.errors import UserError
from ltat_fast.methods import METHODS
from ltat_fast.runs import tables


def write_run(
    folder, clean=50.0, *, method="ltat", attacks=("clean", "pgd20", "autoattack"), which=("best", "last"), **config
):
    """A finished run, all of its accuracies a known offset from ``clean``."""
    folder.mkdir(parents=True)
    config = Config(method=method, out=folder, **config)
    (folder / "config.json").write_text(json.dumps(to_json(config, METHODS[method]())))
    offsets = {"clean": 0.0, "pgd20": 20.0, "autoattack": 25.0}
    results = {
        w: {
            a: {"all": clean - offsets[a] - (w == "last"), "tail": clean - offsets[a] - 5, "images": 600}
            for a in attacks
        }
        for w in which
    }
    (folder / "eval.json").write_text(json.dumps(results))
    return folder


def rows(runs):
    return tables.rows(tables.experiments(runs))


def values(row):
    return {name: [round(v, 6) for v in cells] for name, cells in row["values"].items()}


def test_columns_are_the_papers(tmp_path):
    best, last = rows([write_run(tmp_path / "a")])
    assert values(best) == {"Clean": [50], "PGD": [30], "AA": [25], "T-Clean": [45], "T-PGD": [25]}
    assert values(last) == {"Clean": [49], "PGD": [29], "AA": [24], "T-Clean": [45], "T-PGD": [25]}
    assert (best["checkpoint"], last["checkpoint"], best["seeds"]) == ("best", "last", 1)


def test_mean_and_sample_deviation_over_seeds(tmp_path):
    runs = [write_run(tmp_path / str(s), clean, seed=s) for s, clean in enumerate((50.0, 53.0, 56.0))]
    best, _ = rows(runs)
    assert best["seeds"] == 3
    assert tables.cell(best["values"]["Clean"], 3) == "53.00 ± 3.00"
    assert tables.cell([38.849], 1) == "38.85"
    assert tables.cell([], 3) == "-"
    assert {experiment.label for experiment in tables.experiments(runs)} == {"ltat"}


def test_a_run_named_twice_counts_once(tmp_path, monkeypatch):
    run = write_run(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    best, _ = rows([run, run, tmp_path / "a" / ".." / "a", type(run)("a")])
    assert best["seeds"] == 1
    assert values(best)["Clean"] == [50]


def test_a_mean_over_some_of_the_seeds_says_so(tmp_path):
    write_run(tmp_path / "0", 50.0, seed=0)
    write_run(tmp_path / "1", 60.0, seed=1, attacks=("clean", "pgd20"))
    write_run(tmp_path / "2", 70.0, seed=2, which=("last",))
    best, last = rows([tmp_path / s for s in "012"])
    assert tables.cell(best["values"]["Clean"], best["seeds"]) == "55.00 ± 7.07 (2 of 3)"
    assert tables.cell(best["values"]["AA"], best["seeds"]) == "25.00 (1 of 3)"
    assert tables.cell(last["values"]["Clean"], last["seeds"]) == "59.00 ± 10.00"


@pytest.mark.parametrize(
    "other", [{"imbalance_ratio": 50.0}, {"method": "at-bsl"}, {"epochs": 7}, {"eps": "0.2"}, {"teacher": "runs/t"}]
)
def test_other_experiments_are_other_rows(tmp_path, other):
    runs = [write_run(tmp_path / "a", 50.0), write_run(tmp_path / "b", 60.0, seed=1, **other)]
    table = rows(runs)
    assert [(row["checkpoint"], values(row)["Clean"]) for row in table] == [
        ("best", [50]),
        ("last", [49]),
        ("best", [60]),
        ("last", [59]),
    ]


def labels(*runs):
    return [experiment.label for experiment in tables.experiments(list(runs))]


def test_settings_tell_experiments_apart_where_their_labels_coincide(tmp_path):
    two = write_run(tmp_path / "2", epochs=2, gamma=2.5)
    four = write_run(tmp_path / "4", epochs=4, data_dir="x", device="cpu", seed=3)
    assert labels(two) == labels(four) == ["ltat"]
    assert labels(two, four) == ["ltat epochs=2 gamma=2.5", "ltat epochs=4"]
    assert "epochs=4" in tables.render([two, four])
    elsewhere = write_run(tmp_path / "100", epochs=100, dataset="cifar10-lt")
    assert labels(two, four, elsewhere)[2] == "ltat"
    given = write_run(tmp_path / "given", epochs=4, teacher="runs/t")
    assert labels(four, given) == ["ltat teacher=own", "ltat teacher=given"]
    config = json.loads((four / "config.json").read_text())
    older = write_run(tmp_path / "older", epochs=4)
    del config["augment"], config["method_options"]["tau"]
    (older / "config.json").write_text(json.dumps(config))
    assert labels(four, older) == ["ltat augment=none tau=1.0", "ltat"]


def test_where_and_how_a_run_ran_is_not_another_experiment(tmp_path):
    runs = [
        write_run(tmp_path / "a", data_dir="x", device="cpu", save_minutes=1.0, teacher="runs/t0"),
        write_run(tmp_path / "b", seed=4, resume=True, teacher="runs/t1"),
    ]
    assert [row["seeds"] for row in rows(runs)] == [2, 2]


def test_no_number_is_cut_short(tmp_path):
    """The widest table there is: longest names, mean and deviation in every cell."""
    runs = [
        write_run(tmp_path / str(s), clean, seed=s, dataset="tinyimagenet-lt", arch="preactresnet18")
        for s, clean in enumerate((38.44, 39.12, 37.9))
    ]
    long = write_run(tmp_path / "long", dataset="tinyimagenet-lt", arch="preactresnet18", eval_attacks="clean," * 60)
    text = tables.render([*runs, long])
    assert "…" not in text
    for expected in (
        "tinyimagenet-lt",
        "preactresnet18",
        "38.49 ± 0.61",
        "18.49 ± 0.61",
        "13.49 ± 0.61",
        "33.49 ± 0.61",
    ):
        assert expected in text
    assert "Percent of 600 test images" in text
    assert "on the test set" in text


def test_the_note_tells_how_best_was_picked(tmp_path):
    held = write_run(tmp_path / "a", select_on="heldout")
    assert "held-out" in tables.render([held])
    assert "optimistic" in tables.render([held, write_run(tmp_path / "b")])


def test_an_attack_that_was_not_run_is_a_dash(tmp_path):
    text = tables.render([write_run(tmp_path / "a", attacks=("clean",))])
    assert "50.00" in text
    assert " - " in text


def test_one_seed_does_not_count_as_two(tmp_path):
    runs = [write_run(tmp_path / name / "run", seed=seed) for name, seed in (("a", 0), ("b", 1), ("c", 1))]
    with pytest.raises(UserError, match="b/run and c/run are one experiment with one seed, 1, and would count as two"):
        rows(runs)
    assert rows(runs[:2])[0]["seeds"] == 2


def test_given_teachers_are_told_apart_where_a_seed_comes_twice(tmp_path):
    runs = [write_run(tmp_path / f"{t}{s}", seed=s, teacher=f"runs/[{t}]") for t in "ab" for s in (0, 1)]
    assert [(row["label"], row["seeds"]) for row in rows(runs)[::2]] == [
        ("ltat teacher=[a]", 2),
        ("ltat teacher=[b]", 2),
    ]
    assert "teacher=[b]" in tables.render(runs)  # square brackets are markup to rich
    with pytest.raises(UserError, match="c0 are one experiment"):
        rows([*runs, write_run(tmp_path / "c0", teacher="runs/[a]")])


def test_other_training_images_are_another_experiment(tmp_path):
    runs = [write_run(tmp_path / str(s), seed=s) for s in range(3)]
    for run, images in zip(runs, ("one", "other", "one"), strict=True):
        (run / "env.json").write_text(json.dumps({"index_hash": images}))
    assert [row["seeds"] for row in rows(runs)[::2]] == [2, 1]


def test_the_worst_case_has_columns_where_it_is_of_all_images(tmp_path):
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", method="at-bsl")]
    assert "Worst" not in tables.render(runs)
    results = json.loads((runs[1] / "eval.json").read_text())
    images = results["best"]["clean"]["images"]
    for number, shown in ((images - 1, False), (images, True)):
        results["best"]["worst"] = {
            "all": 12.25,
            "tail": 3.5,
            "images": number,
            "attacks": ["clean", "pgd20", "autoattack"],
        }
        (runs[1] / "eval.json").write_text(json.dumps(results))
        assert ("Worst" in tables.render(runs)) is shown
    table = rows(runs)
    assert [(row["values"]["Worst"], row["values"]["T-Worst"]) for row in table] == [
        ([], []),
        ([], []),
        ([12.25], [3.5]),
        ([], []),
    ]
    assert "12.25" in tables.render(runs)


def add_worst(run, attacks, which=("best", "last"), **entry):
    results = json.loads((run / "eval.json").read_text())
    for name in which:
        results[name]["worst"] = {"all": 12.25, "tail": 3.5, "images": 600, "attacks": attacks} | entry
    (run / "eval.json").write_text(json.dumps(results))
    return run


def test_the_worst_of_other_attacks_is_not_compared(tmp_path):
    weak, strong = ["clean", "autoattack"], ["clean", "fgsm", "autoattack"]
    runs = [add_worst(write_run(tmp_path / str(s), seed=s), attacks) for s, attacks in enumerate((weak, strong))]
    other = add_worst(write_run(tmp_path / "other", method="trades"), strong[::-1])
    (seeds,) = tables.experiments(runs)
    assert (seeds.values("best", "worst", "all"), seeds.values("best", "clean", "all")) == ([], [50, 50])
    assert "Worst" not in tables.render(runs), "seeds of one experiment"
    assert "Worst" not in tables.render([runs[0], other]), "experiments of one table"
    assert "12.25" in tables.render([runs[1], other])
    add_worst(runs[1], weak, which=["best"])
    assert seeds.values("last", "worst", "all") == []
    (seeds,) = tables.experiments(runs)
    assert (seeds.values("best", "worst", "all"), seeds.values("last", "worst", "all")) == ([12.25] * 2, [])
    add_worst(runs[1], weak)
    assert "12.25 ± 0.00" in tables.render(runs)
    for run in runs:
        add_worst(run, ["clean", "pgd20"])
    assert "Worst" not in tables.render(runs), "AutoAttack was run, on fewer images, and is not in it"


def test_names_are_as_short_as_they_can_be(tmp_path):
    runs = [write_run(tmp_path / path, method=m) for path, m in (("a/x", "ltat"), ("b/x", "at-bsl"), ("b/y", "trades"))]
    assert [run.name for run in tables.load_runs(runs)] == ["a/x", "b/x", "y"]


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("config.json", {"method": "ltat"}, "it does not say arch, dataset, eps"),
        ("eval.json", {"best": [1]}, "best is not a JSON object"),
    ],
)
def test_a_file_of_another_shape_is_named(tmp_path, file, content, said):
    run = write_run(tmp_path / "a")
    (run / file).write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"{file} is damaged: {said}"):
        rows([run])


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
    ],
)
def test_a_result_of_another_type_is_named(tmp_path, entry, said):
    run = write_run(tmp_path / "a")
    (run / "eval.json").write_text(json.dumps({"last": {}, "best": entry}))
    with pytest.raises(UserError, match=rf"eval\.json is damaged: best{said}"):
        rows([run])


@pytest.mark.parametrize("content", ["{", "", "[1]", "\x00\xff", "[" * 100_000])
def test_a_damaged_result_is_named(tmp_path, content):
    run = write_run(tmp_path / "a")
    (run / "eval.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"eval\.json is damaged"):
        rows([run])


def test_a_run_without_results_is_named(tmp_path):
    run = write_run(tmp_path / "a")
    (run / "eval.json").unlink()
    with pytest.raises(UserError, match=r"a has no results: eval\.json is not there"):
        rows([run])
    with pytest.raises(UserError, match=r"config\.json is not there"):
        rows([tmp_path / "nowhere"])
