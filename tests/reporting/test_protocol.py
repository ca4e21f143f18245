"""The protocol has exact numbers and no paths of the machine that a run was made on."""

from fractions import Fraction

import pytest

from helpers import made_runs
from ltat_fast.attacks.by_name import parse_attacks
from ltat_fast.reporting import protocol
from ltat_fast.reporting.study import studies
from ltat_fast.runs.experiments import experiments
from ltat_fast.runs.finished import exact_fraction


def study_of(*runs):
    (study,) = studies(experiments(list(runs)))
    return study


@pytest.mark.parametrize(
    ("text", "value", "told"),
    [
        ("8/255", Fraction(8, 255), "8/255 (0.03137)"),
        ("0.1", Fraction(1, 10), "1/10 (0.1)"),
        ("0.031", Fraction(31, 1000), "31/1000 (0.031)"),
        ("1", Fraction(1), "1 (1)"),
    ],
)
def test_eps_is_the_exact_fraction(text, value, told):
    assert exact_fraction(text) == value
    assert protocol.exactly(exact_fraction(text)) == told


def test_each_attack_is_described(tmp_path):
    names = ("clean", "fgsm", "pgd20", "pgd50x10", "scaled-pgd20", "cw20", "autoattack", "square", "worst")
    assert parse_attacks(",".join(names[:-1])) == list(names[:-1])  # they are attacks of this version
    run = made_runs.write_run(tmp_path / "a", attacks=names, eps="8/255")
    told = {a["name"]: a for a in protocol.attacks(study_of(run))}
    assert told["PGD-20"] == {
        "name": "PGD-20",
        "objective": "cross-entropy",
        "steps": "20",
        "step": "2/255 (0.007843)",
        "start": "1, uniform in the ball",
        "images": "600",
    }
    assert told["PGD-50 from 10 starts"]["start"] == "the worst of 10, uniform in the ball"
    assert told["FGSM"]["step"] == "8/255 (0.03137)"
    assert "margin" in told["CW-20"]["objective"]
    assert "rescaled" in told["SCALED-PGD-20"]["objective"]
    assert told["AutoAttack"]["steps"] == "standard version"
    assert told["Square Attack"]["steps"] == "5000 queries"
    assert list(told)[-1] == "all attacks together"


def test_facts_name_version_selection_and_tail(tmp_path):
    facts = dict(protocol.facts(study_of(made_runs.write_run(tmp_path / "a")), {"all": 600, "tail": 60}))
    assert "version 0.2.0" in facts["AutoAttack"]
    assert "on the test set" in facts["Best checkpoint"]
    assert facts["Tail"].endswith("training images: 9 (11)")
    assert "600 (60 tail)" in facts["Test images"]
    assert facts["Attack in training"] == "10 steps of 2/255 (0.007843)"
    held = dict(protocol.facts(study_of(made_runs.write_run(tmp_path / "b", select_on="heldout")), {}))
    assert held["Best checkpoint"] == "highest PGD-20 accuracy on held-out training images"
    val = dict(protocol.facts(study_of(made_runs.write_run(tmp_path / "c", select_on="val")), {}))
    assert val["Best checkpoint"] == "highest PGD-20 accuracy on the validation split"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/a/b/ltat_fast/train.py --out /c/run --eps 8/255", "python -m ltat_fast.train --out run --eps 8/255"),
        (
            "/a/b/ltat_fast/train.py --out=/c/run/ --data-dir runs/x",
            "python -m ltat_fast.train --out=run --data-dir runs/x",
        ),
        ("my.py --teacher timm:net@/home/me/net.safetensors", "my.py --teacher timm:net@net.safetensors"),
        ("x 'unfinished", ""),
        ("", ""),
    ],
)
def test_commands_are_shown_without_absolute_paths(line, told):
    assert protocol.command(line) == told


def test_the_note_explains_the_balanced_accuracy_where_it_is_shown(tmp_path):
    runs = [made_runs.write_run(tmp_path / name, method=method) for name, method in (("a", "ltat"), ("b", "pgd-at"))]
    assert "Balanced" not in protocol.images_and_selection(study_of(*runs))
    results = made_runs.read(runs[1] / "eval.json")
    results["last"]["clean"]["balanced"] = 61.25
    made_runs.write(runs[1] / "eval.json", results)
    note = protocol.images_and_selection(study_of(*runs))
    assert "Balanced (B-): mean of the accuracies of the classes, which have different numbers of test images." in note
