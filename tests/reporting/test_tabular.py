"""CSV and Markdown: each number of eval.json once, with all digits."""

import csv
import io

from helpers import made_runs
from ltat_fast.reporting import tabular
from ltat_fast.runs import tables
from ltat_fast.runs.experiments import experiments


def test_csv_has_every_number_of_eval_json(tmp_path):
    runs = [made_runs.write_run(tmp_path / f"s{s}", seed=s, counts=(9, 4, 2)) for s in range(2)]
    runs.append(
        made_runs.write_run(tmp_path / "other", method="trades", attacks=("clean", "cw20"), counts=range(50, 30, -1))
    )
    lines = list(csv.DictReader(io.StringIO(tabular.as_csv(experiments(runs)))))
    found = {
        (line["run"], line["checkpoint"], line["attack"], line["group"], line["class"]): float(line["accuracy"])
        for line in lines
    }
    assert len(found) == len(lines)
    expected = {}
    for run in runs:
        for which, attacks in made_runs.read(run / "eval.json").items():
            for attack, entry in attacks.items():
                for group in ("all", "head", "medium", "tail"):
                    expected[run.name, which, attack, group, ""] = entry[group]
                for c, accuracy in enumerate(entry["per_class"]):
                    expected[run.name, which, attack, "class", str(c)] = accuracy
    assert found == expected
    last = lines[-1]
    assert (last["class"], last["train_images"], last["test_images"]) == ("19", "31", "600")
    assert (last["method"], last["seed"], last["imbalance_ratio"]) == ("trades", "0", "10.0")


def test_worst_cases_over_different_attacks_are_in_no_file(tmp_path):
    runs = []
    for seed, attacks in enumerate((["clean", "autoattack"], ["clean", "pgd20", "autoattack"])):
        extra = {"worst": {"all": 12.25, "tail": 3.5, "images": 600, "attacks": attacks}}
        runs.append(made_runs.write_run(tmp_path / str(seed), seed=seed, extra=extra))
    for write, name in ((tabular.as_csv, "worst"), (tabular.as_markdown, "Worst")):
        assert name not in write(experiments(runs))
        assert name in write(experiments(runs[:1]))


def test_csv_of_a_group_without_images_and_of_names_with_commas(tmp_path):
    run = made_runs.write_run(tmp_path / 'a, "b"', which=("last",), attacks=(), counts=(9, 4))
    entry = {"all": 12.5, "tail": None, "per_class": [None, 12.5], "images": 8, "correct": "80", "eps": "0.1"}
    check = {"name": "x", "passed": True, "value": 0.5, "detail": ""}
    made_runs.write(run / "eval.json", {"last": {"clean": entry, "checks": [check]}})
    lines = list(csv.DictReader(io.StringIO(tabular.as_csv(experiments([run])))))
    assert {line["run"] for line in lines} == {'a, "b"'}
    told = {(line["group"], line["class"]): line["accuracy"] for line in lines}
    assert told == {("all", ""): "12.5", ("tail", ""): ""} | {
        ("class", "0"): "",
        ("class", "1"): "12.5",
    }


def test_markdown_is_the_table_of_the_terminal(tmp_path):
    runs = [made_runs.write_run(tmp_path / f"s{s}", seed=s) for s in range(3)]
    title, _, head, rule, *lines, _, about_tail, note = tabular.as_markdown(experiments(runs)).rstrip().split("\n")
    assert rule.count("---:") == 5
    printed = " ".join(tables.render(runs).split())
    for line in lines:
        for cell in line.strip("| ").split(" | "):
            assert cell in printed
    assert head.split(" | ")[3:] == ["Clean", "PGD", "AA", "T-Clean", "T-PGD |"]
    assert all(text.strip("* ") in printed for text in (title, about_tail, note))


def test_a_bar_in_a_name_does_not_end_a_cell(tmp_path):
    run = made_runs.write_run(tmp_path / "a")
    config = made_runs.read(run / "config.json")
    config["method_options"]["ramp"] = "a|b"
    made_runs.write(run / "config.json", config)
    assert "ramp=a\\|b" in tabular.as_markdown(experiments([run]))
