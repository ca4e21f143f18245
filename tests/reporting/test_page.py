"""The page shows the numbers of eval.json, escapes names, loads nothing, and names what is missing."""

import json
import re
import shutil
from statistics import mean, stdev

import pytest
import torch
from markupsafe import Markup

from helpers import made_runs
from ltat_fast.reporting import charts, page
from ltat_fast.runs.experiments import experiments
from ltat_fast.runs.weights import read_weights, write_weights

CPU = torch.device("cpu")
COLUMNS = [("clean", "all"), ("pgd20", "all"), ("autoattack", "all"), ("clean", "tail"), ("pgd20", "tail")]


@pytest.fixture
def undrawn(monkeypatch):
    """Replace the plots, which take most of the time and are not tested here."""
    monkeypatch.setattr(charts, "to_svg", lambda ax, description: Markup('<svg aria-hidden="true"></svg>'))


numbers = pytest.mark.usefixtures("undrawn")


def page_of(*runs):
    text = page.render(experiments(list(runs)), CPU)
    return text, made_runs.parse(text)


def accuracy_table(tree):
    """{(checkpoint, method): the texts of its line} of the one main table."""
    (table,) = tree.find("table", "accuracy")
    lines = {}
    for body in table.find("tbody"):
        for row in made_runs.rows(body)[1:]:
            lines[body.attributes["data-checkpoint"], row[0].split()[0]] = row
    return lines


@numbers
def test_a_single_run_is_shown_with_the_numbers_of_its_eval_json(tmp_path):
    run = made_runs.write_run(tmp_path / "a")
    _, tree = page_of(run)
    results, lines = made_runs.read(run / "eval.json"), accuracy_table(tree)
    assert set(lines) == {("best", "LTAT"), ("last", "LTAT")}
    for which in ("best", "last"):
        assert lines[which, "LTAT"][1:] == ["1", *(f"{results[which][a][group]:.2f}" for a, group in COLUMNS)]
    tail = results["last"]["autoattack"]["tail"]
    assert tree.find("h1")[0].text == f"LTAT classifies {tail:.1f} % of tail-class images correctly under AutoAttack."


@numbers
def test_mean_and_standard_deviation_over_seeds(tmp_path):
    runs = [made_runs.write_run(tmp_path / f"{m}{s}", method=m, seed=s) for m in ("ltat", "at-bsl") for s in range(3)]
    _, tree = page_of(*runs)
    lines = accuracy_table(tree)
    for i, method in enumerate(("LTAT", "AT-BSL")):
        scores = [made_runs.read(run / "eval.json")["last"] for run in runs[3 * i : 3 * i + 3]]
        for text, (attack, group) in zip(lines["last", method][2:], COLUMNS, strict=True):
            values = [score[attack][group] for score in scores]
            assert text == f"{mean(values):.2f} ± {stdev(values):.2f}"


@numbers
def test_bold_is_the_highest_mean_of_a_checkpoint(tmp_path):
    runs = [made_runs.write_run(tmp_path / m, method=m) for m in ("ltat", "at-bsl", "trades")]
    _, tree = page_of(*runs)
    for body in tree.find("table", "accuracy")[0].find("tbody"):
        scores = [made_runs.read(run / "eval.json")[body.attributes["data-checkpoint"]] for run in runs]
        best = [f"{max(score[a][g] for score in scores):.2f}" for a, g in COLUMNS]
        assert sorted(b.text for b in body.find("b")) == sorted(best)


@numbers
def test_every_attack_and_group_is_shown(tmp_path):
    run = made_runs.write_run(tmp_path / "a", attacks=("clean", "fgsm", "pgd20x5", "cw20"))
    _, tree = page_of(run)
    head, *lines = made_runs.rows(tree.find("table", "numbers")[0])
    results = made_runs.read(run / "eval.json")
    names = {"no attack": "clean", "FGSM": "fgsm", "PGD-20 from 5 starts": "pgd20x5", "CW-20": "cw20"}
    assert {(line[1], names[line[2]]) for line in lines} == {(w, a) for w in results for a in results[w]}
    assert head[3:] == ["all", "head", "medium", "tail", "test images"]
    for _, which, attack, *cells in lines:
        entry = results[which][names[attack]]
        assert cells == [f"{entry[g]:.2f}" for g in head[3:-1]] + ["600"]


@numbers
def test_classes_are_sorted_by_frequency_with_their_counts(tmp_path):
    _, tree = page_of(made_runs.write_run(tmp_path / "a", counts=(5, 90, 40)))
    assert made_runs.rows(tree.find("table", "classes")[0])[1:] == [
        ["1", "90", "head"],
        ["2", "40", "medium"],
        ["0", "5", "tail"],
    ]


ATTACK = '"><img src=x onerror=alert(1)><script>alert(2)</script>{{ 7 * 7 }}$\\frac{'


@pytest.fixture
def hostile(digits_run, tmp_path):
    """A finished run whose folder, classes, options, checks and analyses have names that try to inject HTML."""

    run = tmp_path / ATTACK.replace("/", "")
    shutil.copytree(digits_run, run)
    for which in ("best", "last"):
        tensors, card = read_weights(run / f"checkpoints/{which}.safetensors")
        card["class_names"] = [f"{c}{ATTACK}" for c in range(10)]
        write_weights(run / f"checkpoints/{which}.safetensors", tensors, card)
    results = made_runs.read(run / "eval.json")
    check = {"name": ATTACK, "passed": False, "value": 1.0, "detail": ATTACK}
    for which in results:
        results[which] |= {"checks": [check], ATTACK: results[which]["pgd20"]}
    made_runs.write(run / "eval.json", results)
    made_runs.write(run / "analysis.json", {"last": {ATTACK: {ATTACK: ATTACK}}})
    config, env = made_runs.read(run / "config.json"), made_runs.read(run / "env.json")
    made_runs.write(run / "config.json", config | {"method_options": config["method_options"] | {"ramp": ATTACK}})
    env |= {"git": ATTACK, "machine": ATTACK, "packages": {ATTACK: ATTACK}, "index_hash": ATTACK, "command": "x <b>"}
    made_runs.write(run / "env.json", env)
    return run


def test_hostile_names_are_escaped(hostile):
    text, tree = page_of(hostile)
    assert not tree.find("script")
    for element in tree:
        assert not [name for name in element.attributes if name.startswith("on")]
        assert element.tag != "img" or element.attributes["src"].startswith("data:image/png;base64,")
    assert "<script" not in text
    # the names are shown
    classes = [row[0] for row in made_runs.rows(tree.find("table", "classes")[0])[1:]]
    assert classes == [f"{c}{ATTACK}" for c in range(10)]
    assert hostile.name in tree.find("table", "environments")[0].text
    assert ATTACK in tree.find("table", "checks")[0].text


@pytest.fixture(scope="module")
def everything(tmp_path_factory, digits_run):
    """A page with every possible section, as text and as a tree."""
    worst = made_runs.accuracies(made_runs.np.random.default_rng(0), [1] * 10) | {"attacks": ["clean", "pgd20"]}
    extra = {"worst": worst, "checks": [{"name": "steps", "passed": True, "value": 0.5, "detail": "fine"}]}
    other = made_runs.write_run(tmp_path_factory.mktemp("runs") / "other", method="trades", extra=extra)
    made_runs.write(other / "analysis.json", {"last": {"inequality": {"global": {"all": 0.5, "tail": 0.625}}}})
    return page_of(digits_run, other)


def test_the_page_loads_nothing_from_the_network(everything):
    text, tree = everything
    assert len(tree.find("img")) >= 24
    assert not [e.tag for e in tree if e.tag in ("script", "iframe", "object", "embed", "base", "form")]
    for element in tree:
        for name, value in element.attributes.items():
            if name in ("src", "href", "srcset", "xlink:href", "action", "poster", "data"):
                assert re.match(r"#|data:", value), (element.tag, name, value)
            for target in re.findall(r"url\(([^)]*)\)", value or ""):
                assert target.startswith("#")
    (style,) = tree.find("style")
    assert "url(" not in style.text
    assert "@import" not in style.text
    assert "http" not in re.sub(r'<meta http-equiv="[^"]*" content="[^"]*">', "", text)


def test_names_of_elements_are_unique_and_links_lead_somewhere(everything):
    _, tree = everything
    ids = [e.attributes["id"] for e in tree if "id" in e.attributes]
    assert len(ids) == len(set(ids))
    links = [e.attributes["href"] for e in tree if (e.attributes.get("href") or "").startswith("#")]
    clips = [m for e in tree for m in re.findall(r"url\((#[^)]*)\)", e.attributes.get("clip-path") or "")]
    assert {link[1:] for link in links + clips} <= set(ids)


def test_every_picture_and_plot_has_a_description(everything):
    _, tree = everything
    for image in tree.find("img"):
        assert len(image.attributes["alt"]) > 10
    for plot in tree.find("svg"):
        assert plot.attributes.get("aria-hidden") == "true" or len(plot.attributes["aria-label"]) > 20


@numbers
def test_worst_case_and_checks_are_shown_if_there_are_any(tmp_path):
    plain = made_runs.write_run(tmp_path / "plain")
    _, tree = page_of(plain)
    assert "Worst" not in made_runs.rows(tree.find("table", "accuracy")[0])[0]
    worst = {
        "all": 12.25,
        "tail": 3.5,
        "images": 600,
        "attacks": ["clean", "pgd20", "autoattack"],
        "per_class": [1.0] * 10,
    }
    checks = [
        {"name": "steps", "passed": True, "value": 0.5, "detail": "more steps"},
        {"name": "unbounded", "passed": False, "value": 7.0, "detail": "must be 0"},
    ]
    _, tree = page_of(made_runs.write_run(tmp_path / "a", extra={"worst": worst, "checks": checks}))
    head = made_runs.rows(tree.find("table", "accuracy")[0])[0]
    line = dict(zip(head, accuracy_table(tree)["last", "LTAT"], strict=True))
    assert (line["Worst"], line["T-Worst"], line["checks"]) == ("12.25", "3.50", "⚑ 1 of 2 failed")
    found = made_runs.rows(tree.find("table", "checks")[0])[1:]
    assert ["a", "last", "unbounded", "⚑ failed", "7: must be 0"] in found
    assert ["a", "last", "steps", "✓ passed", "0.5: more steps"] in found
    assert "all attacks together" in tree.find("h1")[0].text  # the strongest on as many images


@numbers
def test_worst_cases_over_different_attacks_are_not_on_the_page(tmp_path):
    runs = []
    for seed, attacks in enumerate((["clean", "autoattack"], ["clean", "pgd20", "autoattack"])):
        worst = {"all": 12.25, "tail": 3.5, "images": 600, "attacks": attacks, "per_class": [1.0] * 10}
        runs.append(made_runs.write_run(tmp_path / str(seed), seed=seed, extra={"worst": worst}))
    _, tree = page_of(*runs)
    assert "Worst" not in made_runs.rows(tree.find("table", "accuracy")[0])[0]
    assert not [row for row in made_runs.rows(tree.find("table", "numbers")[0]) if row[2] == "all attacks together"]
    assert "AutoAttack" in tree.find("h1")[0].text


@numbers
def test_missing_parts_are_named_and_the_rest_is_shown(tmp_path):
    run = made_runs.write_run(tmp_path / "a", attacks=("clean",), which=("last",))
    for name in ("env.json", "metrics.jsonl"):
        (run / name).unlink()
    (run / "analysis.json").write_text("{")
    _, tree = page_of(run)
    assert accuracy_table(tree).keys() == {("last", "LTAT")}
    paragraphs = " ".join(p.text for p in tree.find("p"))
    assert "no training curves" in paragraphs
    assert "analysis.json of a is damaged" in paragraphs
    assert "LTAT has no pictures: a has no finished weights" in paragraphs
    assert str(tmp_path) not in paragraphs
    assert "AutoAttack" not in tree.find("dl")[0].text


@numbers
def test_missing_images_are_named(tmp_path):
    run = made_runs.write_run(tmp_path / "a", dataset="imagefolder-lt", data_dir=tmp_path / "gone", counts=(9, 4, 2))
    text, tree = page_of(run)
    assert "The images could not be loaded" in " ".join(p.text for p in tree.find("p"))
    assert not tree.find("img")
    assert str(tmp_path) not in text


@numbers
def test_datasets_with_different_numbers_of_classes_are_separate_articles(tmp_path):
    small = made_runs.write_run(tmp_path / "small", dataset="imagefolder-lt", counts=(9, 4, 2))
    large = [
        made_runs.write_run(tmp_path / f"large{s}", dataset="cifar100-lt", counts=range(500, 300, -2), seed=s)
        for s in (0, 1)
    ]
    _, tree = page_of(small, *large)
    articles = tree.find("article")
    assert [len(made_runs.rows(a.find("table", "classes")[0])) - 1 for a in articles] == [3, 100]
    assert ["imagefolder-lt" in a.text and "cifar100-lt" not in a.find("p")[0].text for a in articles] == [True, False]
    assert all(len(a.find("table", "accuracy")) == 1 for a in articles)


@numbers
def test_no_folder_of_this_machine_is_on_the_page(digits_run):
    text, tree = page_of(digits_run)
    assert str(digits_run) not in text
    assert str(digits_run.parent) not in text
    (command,) = (e.text for e in tree.find("table", "commands")[0].find("code"))
    assert command.startswith(f"python -m ltat_fast.train --out {digits_run.name} ")


@numbers
def test_analyses_are_averaged_over_seeds(tmp_path):
    runs = [made_runs.write_run(tmp_path / str(s), seed=s) for s in range(2)]
    for run, value in zip(runs, (0.25, 0.75), strict=True):
        part = {"global": {"all": value, "tail": 0.5}, "kind": "pooled", "curve": [value] * 20, "weights": "secret"}
        part |= {"once": 3} if value == 0.75 else {}
        made_runs.write(run / "analysis.json", {"best": {"inequality": part}})
    _, tree = page_of(*runs)
    lines = dict(made_runs.rows(tree.find("table", "analysis")[0])[1:])
    assert lines == {
        "global": "0.5 ± 0.35 tail 0.5 ± 0",
        "kind": "pooled",
        "once": "3 (1 of 2)",
        "curve, mean": "0.5 ± 0.35",
        "curve, min": "0.5 ± 0.35",
        "curve, max": "0.5 ± 0.35",
    }


@numbers
def test_the_order_of_classes_is_explained_once(tmp_path):
    run = made_runs.write_run(tmp_path / "a")
    part = {"classes": [[c] for c in range(10)], "pgd20": {"accuracy": [50.0] * 10, "images": 600}, "images": 600}
    made_runs.write(run / "analysis.json", {"best": {"classwise": part}})
    text, tree = page_of(run)
    names = [row[0] for row in made_runs.rows(tree.find("table", "analysis")[0])[1:]]
    assert names == [*(f"pgd20, accuracy, {i}" for i in range(10)), "pgd20, images", "images"]
    assert text.count("0 are the most frequent in training") == 1


@numbers
def test_settings_are_those_of_config_json(tmp_path):
    runs = [made_runs.write_run(tmp_path / "a", epochs=3), made_runs.write_run(tmp_path / "b", method="at-bsl")]
    _, tree = page_of(*runs)
    lines = {row[0]: row[1:] for row in made_runs.rows(tree.find("table", "settings")[0])[1:]}
    configs = [json.loads((run / "config.json").read_text()) for run in runs]
    assert lines["batch_size"] == [str(c["batch_size"]) for c in configs]
    assert lines["alpha"] == [f"{configs[0]['method_options']['alpha']:g}", "-"]
