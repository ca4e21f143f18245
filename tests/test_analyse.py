"""``python -m ltat_fast.analyse``: measuring, keeping parts, and refusals."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from helpers import train_runs
from ltat_fast.analysis import runner
from ltat_fast.data import load_dataset
from ltat_fast.models import build_model
from ltat_fast.runs.metrics import spread
from ltat_fast.runs.weights import read_weights, write_weights

PARTS = ["alignment", "linearity", "inequality", "corruptions", "classwise"]
FEW = ("--limit", "60")


@pytest.fixture
def run(digits_run, tmp_path):
    return shutil.copytree(digits_run, tmp_path / "a run")


def analysis(*runs_and_flags) -> dict:
    assert train_runs.status_of("analyse", *map(str, runs_and_flags)) == 0
    return json.loads((runs_and_flags[0] / "analysis.json").read_text())


@pytest.fixture(scope="module")
def analysed(digits_run, tmp_path_factory):
    """A run with all parts of the analysis of its best weights on 60 images."""
    run = shutil.copytree(digits_run, tmp_path_factory.mktemp("analysed") / "run")
    analysis(run, *FEW)
    return run


@pytest.fixture
def measured(monkeypatch):
    """The pairs of run and part that are measured, in order."""
    done, keep = [], runner.Analysed.keep

    def recording(self, part, numbers):
        done.append((self.run.name, part))
        keep(self, part, numbers)

    monkeypatch.setattr(runner.Analysed, "keep", recording)
    return done


def network(file):
    model = build_model("smallresnet", 10, in_channels=1)
    model.load_state_dict(read_weights(file)[0])
    return model.double().eval()


def images_of(limit):
    test = load_dataset("digits-lt").test
    chosen = spread(test.labels, limit)
    return torch.from_numpy(test.images[chosen]).double() / 255, torch.from_numpy(test.labels[chosen])


def test_the_format(analysed):
    results = json.loads((analysed / "analysis.json").read_text())
    digest = json.loads((analysed / "eval.json").read_text())["best"]["clean"]["weights"]
    assert list(results) == ["best"]
    assert list(results["best"]) == PARTS
    for part in results["best"].values():
        assert (part["images"], part["weights"], part["eps"]) == (60, digest, "0.1")
    best = results["best"]
    for number in (
        best["alignment"]["adv"]["gc"]["projection"],
        best["linearity"]["distance"]["adv"]["logits"],
        best["inequality"]["regional"]["block-sum"],
        best["corruptions"]["ina2"]["0.2"],
        best["corruptions"]["occlusion"]["black"],
        best["corruptions"]["impulse"]["5"],
        best["corruptions"]["rn"]["mean"],
    ):
        assert set(number) == {"all", "head", "medium", "tail"}
    assert best["inequality"]["blocks"] == {"pooled": 2, "block-sum": 2}
    assert best["corruptions"]["constants"] == "CIFAR-10-C"


def test_the_numbers_are_those_of_the_exported_weights(analysed):
    """Measured again in float64 from the files alone, one image at a time."""
    best = json.loads((analysed / "analysis.json").read_text())["best"]
    student = network(analysed / "checkpoints" / "best.safetensors")
    teacher = network(analysed / "teacher" / "checkpoints" / "last.safetensors")
    x, y = images_of(60)
    gradients = {}
    for name, net in (("student", student), ("teacher", teacher)):
        rows = []
        for image, label in zip(x, y, strict=True):
            point = image[None].requires_grad_()
            (gradient,) = torch.autograd.grad(F.cross_entropy(net(point), label[None]), point)
            rows.append(gradient.flatten())
        gradients[name] = torch.stack(rows)
    s, t = gradients["student"], gradients["teacher"]
    distance, cosine = (s - t).norm(dim=1), (s * t).sum(1) / s.norm(dim=1) / t.norm(dim=1)
    for kind, values in (("gd", distance), ("gc", cosine)):
        numbers = best["alignment"]["clean"][kind]["ce"]
        assert numbers["all"] == pytest.approx(values.mean().item(), rel=1e-3)
        assert numbers["tail"] == pytest.approx(values[y == 9].mean().item(), rel=1e-3)
        assert numbers["head"] == pytest.approx(values[y < 3].mean().item(), rel=1e-3)

    point = x.clone().requires_grad_()
    student(point).gather(1, y[:, None]).sum().backward()
    magnitude = point.grad.abs().flatten(1).numpy()
    gini = np.abs(magnitude[:, :, None] - magnitude[:, None, :]).mean((1, 2)) / (2 * magnitude.mean(1))
    assert best["inequality"]["global"]["all"] == pytest.approx(gini.mean(), rel=1e-3)
    assert best["inequality"]["global"]["tail"] == pytest.approx(gini[y.numpy() == 9].mean(), rel=1e-3)

    correct = student(x).argmax(1) == y
    assert best["corruptions"]["common_images"] == correct.sum()


def test_stronger_noise_and_attacks_cost_more(analysed):
    best = json.loads((analysed / "analysis.json").read_text())["best"]
    distance = best["linearity"]["distance"]
    assert distance["adv"]["probabilities"]["all"] > distance["uniform"]["probabilities"]["all"]
    assert best["linearity"]["remainder"]["logits"]["all"] < 0.2
    errors = best["corruptions"]
    for name in ("ina1", "ina2"):
        assert errors[name]["mean"]["all"] > errors["rn"]["mean"]["all"], "pixels the network relies on cost more"
        strengths = [v["all"] for t, v in errors[name].items() if t != "mean"]
        assert errors[name]["mean"]["all"] == pytest.approx(np.mean(strengths))
        assert strengths[-1] > strengths[0]
    assert errors["gaussian"]["5"]["all"] <= errors["ina2"]["0.2"]["all"]
    assert errors["occlusion"]["grey"]["all"] > 0


def test_accuracy_by_frequency_is_that_of_eval_json(analysed):
    """With ten classes each group is one class; the classes of the digits are in order of frequency."""
    classwise = json.loads((analysed / "analysis.json").read_text())["best"]["classwise"]
    scores = json.loads((analysed / "eval.json").read_text())["best"]
    assert classwise["classes"] == [[c] for c in range(10)]
    for attack in ("clean", "pgd20"):
        assert classwise[attack]["accuracy"] == pytest.approx(scores[attack]["per_class"])
        assert classwise[attack]["images"] == scores[attack]["images"] == 100


def test_accuracy_that_is_not_in_eval_json_is_measured(run):
    results = analysis(run, "--parts", "classwise", "--limit", "200")["best"]["classwise"]
    assert results["pgd20"]["images"] == 200
    flags = ("--attacks", "clean,pgd20", "--limit-eval", "200", "--checkpoint", "best")
    assert train_runs.status_of("evaluate", str(run), *flags) == 0
    scores = json.loads((run / "eval.json").read_text())["best"]
    assert results["pgd20"]["accuracy"] == pytest.approx(scores["pgd20"]["per_class"])


def test_parts_in_the_file_are_kept(analysed, measured, tmp_path):
    run = shutil.copytree(analysed, tmp_path / "run")
    before = (run / "analysis.json").read_text()
    analysis(run, *FEW)
    analysis(run, "--limit", "30")
    assert measured == []
    assert (run / "analysis.json").read_text() == before

    results = analysis(run, "--limit", "70", "--parts", "inequality")
    assert measured == [("run", "inequality")]
    assert results["best"]["inequality"]["images"] == 70
    assert results["best"]["alignment"]["images"] == 60

    analysis(run, *FEW, "--parts", "alignment,inequality", "--again")
    assert measured[1:] == [("run", "alignment"), ("run", "inequality")]
    assert (run / "analysis.json").read_text() == before, "the same numbers again"

    analysis(run, *FEW, "--parts", "inequality", "--checkpoint", "last")
    results = json.loads((run / "analysis.json").read_text())
    assert results["best"] == json.loads(before)["best"]
    assert list(results["last"]) == ["inequality"]


def test_other_weights_or_another_teacher_are_measured_again(analysed, measured, tmp_path):
    run = shutil.copytree(analysed, tmp_path / "run")
    before = json.loads((run / "analysis.json").read_text())["best"]
    student = run / "checkpoints" / "best.safetensors"
    results = analysis(run, *FEW, "--teacher", student)["best"]
    assert measured == [("run", "alignment"), ("run", "linearity")]
    assert results["alignment"]["clean"]["gc"]["ce"]["all"] == pytest.approx(1, abs=1e-6), "its own teacher"
    assert results["alignment"]["adv"]["gd"]["ce"]["all"] == 0
    assert results["linearity"]["distance"]["adv"]["logits"]["all"] < 1e-4
    assert results["linearity"]["remainder"] == before["linearity"]["remainder"]

    tensors, card = read_weights(student)
    tensors["fc.bias"][9] += 1000.0
    write_weights(student, tensors, card)
    results = analysis(run, *FEW)["best"]
    assert measured[2:] == [("run", part) for part in PARTS]
    assert results["corruptions"]["common_images"] == 6
    assert results["classwise"]["clean"]["accuracy"] == [0.0] * 9 + [100.0]


def test_a_run_without_teacher(run, capfd):
    shutil.rmtree(run / "teacher")
    results = analysis(run, *FEW, "--parts", "alignment,linearity")["best"]
    assert list(results) == ["linearity"]
    assert "remainder" in results["linearity"]
    assert "distance" not in results["linearity"]
    assert "no alignment, because it has no teacher" in capfd.readouterr().out


def test_a_missing_teacher_matters_only_to_the_parts_that_need_it(run, capfd):
    shutil.rmtree(run / "teacher" / "checkpoints")
    assert list(analysis(run, *FEW, "--parts", "inequality")["best"]) == ["inequality"]
    assert train_runs.status_of("analyse", str(run), *FEW, "--parts", "linearity") == 2
    assert "has no finished weights" in capfd.readouterr().err


def test_corruptions_use_images_that_all_runs_classify_correctly(run, tmp_path, measured):
    other = shutil.copytree(run, tmp_path / "other")
    file = other / "checkpoints" / "best.safetensors"
    tensors, card = read_weights(file)
    tensors["fc.bias"][:3] -= 1000.0  # classes 0, 1 and 2 are never predicted
    write_weights(file, tensors, card)
    flags = (*FEW, "--parts", "corruptions")
    alone = analysis(run, *flags)["best"]["corruptions"]
    together = analysis(run, other, *flags)["best"]["corruptions"]
    of_other = json.loads((other / "analysis.json").read_text())["best"]["corruptions"]
    assert measured == [("a run", "corruptions"), ("a run", "corruptions"), ("other", "corruptions")]
    x, y = images_of(60)
    right = [network(folder / "checkpoints" / "best.safetensors")(x).argmax(1) == y for folder in (run, other)]
    assert alone["common_images"] == right[0].sum()
    assert together["common_images"] == of_other["common_images"] == (right[0] & right[1]).sum()
    assert together["ina1"]["mean"]["head"] is None
    assert together["compared"] == of_other["compared"] == sorted({together["weights"], of_other["weights"]})
    # The corrupted images of one run do not depend on the other: only the selection does.
    assert together["gaussian"]["5"]["tail"] == alone["gaussian"]["5"]["tail"]


def test_an_interrupted_analysis_is_resumed(run, monkeypatch, measured):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setitem(runner.FUNCTIONS, "inequality", interrupt)
        assert train_runs.status_of("analyse", str(run), *FEW, "--parts", "linearity,inequality") == 130
    assert list(json.loads((run / "analysis.json").read_text())["best"]) == ["linearity"]
    analysis(run, *FEW, "--parts", "linearity,inequality")
    assert measured == [("a run", "linearity"), ("a run", "inequality")]


def test_other_test_images_are_measured_again(folder_run, tmp_path, measured):
    run = shutil.copytree(folder_run, tmp_path / "run")
    flags = ("--parts", "inequality", "--checkpoint", "last")
    first = analysis(run, *flags)["last"]["inequality"]
    others = train_runs.write_images(tmp_path / "others", seed=1)
    second = analysis(run, *flags, "--data-dir", others)["last"]["inequality"]
    assert measured == [("run", "inequality")] * 2
    assert first["test_set"] != second["test_set"]
    assert first["global"] != second["global"]


def test_the_table(analysed, run, capfd):
    capfd.readouterr()
    assert train_runs.status_of("analyse", str(analysed), str(run), *FEW, "--parts", "inequality") == 0
    text = capfd.readouterr().out
    best = json.loads((analysed / "analysis.json").read_text())["best"]
    (line,) = [line for line in text.splitlines() if "Gini, global" in line]
    gini = best["inequality"]["global"]
    assert [cell.strip() for cell in line.strip("│").split("│")][1:] == [f"{gini['all']:.3g} ({gini['tail']:.3g})"] * 2
    (line,) = [line for line in text.splitlines() if "GC, cross-entropy  " in line]
    assert line.strip("│").split("│")[2].strip() == "-", "the second run has no alignment yet"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--parts", "alignment,colour"), "unknown part 'colour': choose one of alignment, classwise"),
        (("--parts", ","), "no part named"),
        (("--limit", "0"), "--limit must be 1 or more, not 0"),
        (("--teacher", "nowhere"), "nowhere has no finished weights"),
    ],
)
def test_refusals(run, capfd, flags, message):
    assert train_runs.status_of("analyse", str(run), *flags) == 2
    assert message in capfd.readouterr().err
    assert not (run / "analysis.json").exists()


def test_runs_that_cannot_be_analysed(run, folder_run, tmp_path, capfd):
    assert train_runs.status_of("analyse") == 2
    assert "name at least one run folder" in capfd.readouterr().err
    assert train_runs.status_of("analyse", str(tmp_path / "nowhere")) == 2
    assert "has no finished weights" in capfd.readouterr().err
    folder = shutil.copytree(folder_run, tmp_path / "folder")
    assert train_runs.status_of("analyse", str(run), str(folder), "--parts", "corruptions") == 2
    assert "corruptions compare runs on the same images, but" in capfd.readouterr().err
    (run / "analysis.json").write_text("[")
    assert train_runs.status_of("analyse", str(run), "--parts", "inequality") == 2
    assert "analysis.json is damaged" in capfd.readouterr().err
    assert (run / "analysis.json").read_text() == "["


def test_a_read_only_run_is_refused_before_anything_is_measured(analysed, run, tmp_path, monkeypatch, measured, capfd):
    full = shutil.copytree(analysed, tmp_path / "full")
    analysis(run, *FEW, "--parts", "linearity")
    read_only = {full, run}
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path not in read_only and access(path, mode))
    names = ("linearity", "inequality", "classwise")
    for part in names:
        monkeypatch.setitem(runner.FUNCTIONS, part, lambda a: pytest.fail(f"{a.run} was measured"))
    measured.clear()
    analysis(full, *FEW)
    analysis(run, *FEW, "--parts", "linearity")
    for flags in (
        (full, *FEW, "--parts", "inequality", "--again"),
        (full, "--limit", "70"),
        (run, *FEW, "--parts", "linearity,inequality"),
        (full, run, *FEW, "--parts", "linearity,classwise"),
    ):
        capfd.readouterr()
        assert train_runs.status_of("analyse", *map(str, flags)) == 2, flags
        error = capfd.readouterr().err
        assert "cannot write into the run folder" in error
        assert error.endswith("it is read-only for this user\n")
    assert measured == []


@pytest.mark.parametrize(
    "content",
    [
        {"best": 3},
        {"last": [], "best": {}},
        {"best": {"inequality": 3}},
        {"best": {"inequality": {"images": "5"}}},
        {"best": {"inequality": {"images": 60, "global": 0.5}}},
        {"best": {"alignment": {"images": 60, "clean": 3}}},
        {"best": {"linearity": {"images": 60, "remainder": {"logits": {"all": "x"}}}}},
        {"best": {"classwise": {"images": 60, "pgd20": {"accuracy": ["x"]}}}},
    ],
)
def test_a_damaged_analysis_is_not_overwritten(run, capfd, content):
    (run / "analysis.json").write_text(json.dumps(content))
    capfd.readouterr()
    assert train_runs.status_of("analyse", str(run), *FEW, "--parts", "inequality") == 2
    error = capfd.readouterr().err
    assert "analysis.json is damaged" in error
    assert error.count("\n") == 1
    assert json.loads((run / "analysis.json").read_text()) == content


@pytest.mark.parametrize("broken", [{"per_class": 3}, {"per_class": [1.0]}, {"chosen": "zz"}])
def test_accuracy_by_frequency_of_a_damaged_eval_json(run, capfd, broken):
    results = json.loads((run / "eval.json").read_text())
    results["best"]["pgd20"] |= broken
    (run / "eval.json").write_text(json.dumps(results))
    assert train_runs.status_of("analyse", str(run), *FEW, "--parts", "classwise") == 2
    assert "eval.json is damaged" in capfd.readouterr().err


def test_colour_images_of_other_sizes(folder_run, tmp_path):
    run = shutil.copytree(folder_run, tmp_path / "run")
    results = analysis(run, "--checkpoint", "last")["last"]
    assert list(results) == PARTS
    assert results["alignment"]["images"] == 15
