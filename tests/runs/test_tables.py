"""The paper's table: the right numbers in the right columns, and every digit is shown in 80 columns."""

import json

from helpers.made_runs import write_known_run
from ltat_fast.runs import tables
from ltat_fast.runs.experiments import experiments


def rows(runs):
    (table,) = tables.build(experiments(runs))
    return table.rows


def words(runs) -> str:
    """What the terminal shows, in one line."""
    return " ".join(tables.render(runs).split())


def values(row):
    return {name: [round(v, 6) for v in cells] for name, cells in row.values.items()}


def test_columns_are_those_of_the_paper(tmp_path):
    best, last = rows([write_known_run(tmp_path / "a")])
    assert values(best) == {"Clean": [50], "PGD": [30], "AA": [25], "T-Clean": [45], "T-PGD": [25]}
    assert values(last) == {"Clean": [49], "PGD": [29], "AA": [24], "T-Clean": [45], "T-PGD": [25]}
    assert (best.checkpoint, last.checkpoint, best.seeds) == ("best", "last", 1)


def test_mean_and_sample_deviation_over_seeds(tmp_path):
    runs = [write_known_run(tmp_path / str(s), clean, seed=s) for s, clean in enumerate((50.0, 53.0, 56.0))]
    best, _ = rows(runs)
    assert best.seeds == 3
    assert tables.cell(best.values["Clean"], 3) == "53.00 ± 3.00"
    assert tables.cell([38.849], 1) == "38.85"
    assert tables.cell([], 3) == "-"
    assert {experiment.label for experiment in experiments(runs)} == {"ltat"}


def test_a_mean_over_some_of_the_seeds_says_so(tmp_path):
    write_known_run(tmp_path / "0", 50.0, seed=0)
    write_known_run(tmp_path / "1", 60.0, seed=1, attacks=("clean", "pgd20"))
    write_known_run(tmp_path / "2", 70.0, seed=2, which=("last",))
    best, last = rows([tmp_path / s for s in "012"])
    assert tables.cell(best.values["Clean"], best.seeds) == "55.00 ± 7.07 (2 of 3)"
    assert tables.cell(best.values["AA"], best.seeds) == "25.00 (1 of 3)"
    assert tables.cell(last.values["Clean"], last.seeds) == "59.00 ± 10.00"


def test_no_number_is_cut_off(tmp_path):
    """The widest possible table: the longest names, and mean and deviation in every cell."""
    runs = [
        write_known_run(tmp_path / str(s), clean, seed=s, dataset="tinyimagenet-lt", arch="preactresnet18")
        for s, clean in enumerate((38.44, 39.12, 37.9))
    ]
    long = write_known_run(
        tmp_path / "long", dataset="tinyimagenet-lt", arch="preactresnet18", eval_attacks="clean," * 60
    )
    text = tables.render([*runs, long])
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    for expected in (
        "tinyimagenet-lt",
        "preactresnet18",
        "38.49 ± 0.61",
        "18.49 ± 0.61",
        "13.49 ± 0.61",
        "33.49 ± 0.61",
    ):
        assert expected in text
    assert "percent of 600 test images" in text
    assert "on the test set" in text


def test_the_note_says_how_best_was_selected(tmp_path):
    held = write_known_run(tmp_path / "a", select_on="heldout")
    assert "held-out" in words([held])
    val = write_known_run(tmp_path / "v", select_on="val")
    assert words([val]).endswith("Best epoch by PGD-20 on the validation split.")
    assert words([val, held]).endswith("on held-out training images or the validation split.")
    assert "optimistic" in words([held, write_known_run(tmp_path / "b")])


def test_only_attacks_that_were_run_have_columns(tmp_path):
    clean = write_known_run(tmp_path / "a", attacks=("clean",))
    assert tables.render([clean]).splitlines()[2:4] == ["        Clean  T-Clean", "ltat"]
    both = [clean, write_known_run(tmp_path / "b", attacks=("clean", "pgd20"), method="trades")]
    ours, _, theirs, _ = rows(both)
    assert (ours.cells, theirs.cells) == (["50.00", "-", "45.00", "-"], ["50.00", "30.00", "45.00", "25.00"])


def add_result(run, attack, entry, which=("best", "last")):
    results = json.loads((run / "eval.json").read_text())
    for name in which:
        results[name][attack] = entry
    (run / "eval.json").write_text(json.dumps(results))


def test_every_attack_that_was_asked_for_has_columns(tmp_path):
    run = write_known_run(tmp_path / "a")
    for attack, percent in (("cw20", 31.25), ("pgd20x5", 32.5), ("apgd-ce", 33.75), ("square", 34.0)):
        add_result(run, attack, {"all": percent, "tail": percent - 20, "images": 600})
    (table,) = tables.build(experiments([run]))
    all_classes = ["Clean", "PGD", "AA", "cw20", "pgd20x5", "apgd-ce", "square"]
    assert table.headings == [*all_classes, "T-Clean", "T-PGD", "T-cw20", "T-pgd20x5", "T-apgd-ce", "T-square"]
    assert table.rows[0].cells[3:7] == ["31.25", "32.50", "33.75", "34.00"]
    text = tables.render([run])
    assert max(map(len, text.splitlines())) <= 80
    first, second = (text.splitlines()[i].split() for i in (2, 7))
    assert first + second == table.headings, "the columns of the tail do not fit beside the others"
    assert text.splitlines()[9].split() == ["best", "45.00", "25.00", "11.25", "12.50", "13.75", "14.00"]


def test_numbers_of_different_images_are_marked(tmp_path):
    """Also a mean over runs that used different numbers of images."""
    runs = [write_known_run(tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    for run in runs:
        add_result(run, "autoattack", {"all": 20.0, "tail": 10.0, "images": 100})
    add_result(runs[0], "pgd20", {"all": 30.0, "tail": 25.0, "images": 600}, which=["last"])
    add_result(runs[1], "pgd20", {"all": 32.0, "tail": 25.0, "images": 100}, which=["last"])
    (table,) = tables.build(experiments(runs))
    assert table.title == "digits-lt, imbalance ratio 10, smallresnet: percent of 600 test images"
    best, last = table.rows
    assert best.cells[1:3] == ["30.00 ± 0.00", "20.00 ± 0.00 [1]"]
    assert last.cells[1:3] == ["31.00 ± 1.41 [2]", "20.00 ± 0.00 [1]"]
    assert last.cells[4] == "25.00 ± 0.00 [2]", "the tail of the same images"
    assert table.notes[:2] == ["[1] 100 test images.", "[2] 100 or 600 test images."]
    assert all(note in words(runs) for note in table.notes)


def test_there_is_one_table_per_dataset_and_network(tmp_path):
    runs = [
        write_known_run(tmp_path / "a"),
        write_known_run(tmp_path / "b", arch="resnet18"),
        write_known_run(tmp_path / "c", method="trades"),
        write_known_run(tmp_path / "d", dataset="cifar10-lt", imbalance_ratio=50.0),
    ]
    found = tables.build(experiments(runs))
    assert [table.title.split(":")[0] for table in found] == [
        "digits-lt, imbalance ratio 10, smallresnet",
        "digits-lt, imbalance ratio 10, resnet18",
        "cifar10-lt, imbalance ratio 50, smallresnet",
    ]
    assert [len(table.rows) for table in found] == [4, 2, 2]


def test_the_worst_case_has_columns_only_if_it_covers_all_images(tmp_path):
    runs = [write_known_run(tmp_path / "a"), write_known_run(tmp_path / "b", method="at-bsl")]
    assert "Worst" not in tables.render(runs)
    results = json.loads((runs[1] / "eval.json").read_text())
    images = results["best"]["clean"]["images"]
    for number, shown in ((images - 1, False), (images, True)):
        results["best"]["worst"] = {
            "all": 12.25,
            "tail": 3.5,
            "images": number,
            "attacks": ["clean", "pgd20", "autoattack"],
        }  # of "best" only
        (runs[1] / "eval.json").write_text(json.dumps(results))
        assert ("Worst" in tables.render(runs)) is shown
    table = rows(runs)
    assert [(row.values["Worst"], row.values["T-Worst"]) for row in table] == [
        ([], []),
        ([], []),
        ([12.25], [3.5]),
        ([], []),
    ]
    assert "12.25" in tables.render(runs)
    assert "Worst: correct under each of clean, pgd20, autoattack, over 600 test images." in words(runs)


def test_the_balanced_accuracy_has_columns_only_if_a_run_has_it(tmp_path):
    runs = [write_known_run(tmp_path / "a"), write_known_run(tmp_path / "b", method="at-bsl")]
    assert "B-Clean" not in tables.render(runs)
    results = json.loads((runs[1] / "eval.json").read_text())
    for attack, percent in (("clean", 61.25), ("pgd20", 33.5)):
        results["last"][attack]["balanced"] = percent
    (runs[1] / "eval.json").write_text(json.dumps(results))
    *_, last = rows(runs)
    assert (last.values["B-Clean"], last.values["B-PGD"]) == ([61.25], [33.5])
    (table,) = tables.build(experiments(runs))
    assert table.headings[-2:] == ["B-Clean", "B-PGD"]
    assert [row.cells[-2:] for row in table.rows] == [["-", "-"]] * 3 + [["61.25", "33.50"]]
    assert "B-: mean of the accuracies of the classes." in tables.render(runs)
    assert "B-:" not in tables.render(runs[:1])


def add_worst(run, attacks, which=("best", "last"), **entry):
    results = json.loads((run / "eval.json").read_text())
    for name in which:
        results[name]["worst"] = {"all": 12.25, "tail": 3.5, "images": 600, "attacks": attacks} | entry
    (run / "eval.json").write_text(json.dumps(results))
    return run


def test_worst_cases_over_different_attacks_are_not_compared(tmp_path):
    weak, strong = ["clean", "autoattack"], ["clean", "fgsm", "autoattack"]
    runs = [add_worst(write_known_run(tmp_path / str(s), seed=s), attacks) for s, attacks in enumerate((weak, strong))]
    other = add_worst(write_known_run(tmp_path / "other", method="trades"), strong[::-1])
    (seeds,) = experiments(runs)
    assert (seeds.values("best", "worst", "all"), seeds.values("best", "clean", "all")) == ([], [50, 50])
    assert "Worst" not in tables.render(runs), "seeds of one experiment"
    assert "Worst" not in tables.render([runs[0], other]), "experiments of one table"
    assert "12.25" in tables.render([runs[1], other])
    add_worst(runs[1], weak, which=["best"])
    assert seeds.values("last", "worst", "all") == []
    (seeds,) = experiments(runs)
    assert (seeds.values("best", "worst", "all"), seeds.values("last", "worst", "all")) == ([12.25] * 2, [])
    add_worst(runs[1], weak)
    assert "12.25 ± 0.00" in tables.render(runs)
    for run in runs:
        add_worst(run, ["clean", "pgd20"])
    assert "Worst" not in tables.render(runs), "AutoAttack was run, on fewer images, and is not in it"
