"""``python -m ltat_fast.evaluate`` and ``report``: what is measured, what is kept, what is refused."""

import json
import os
import shutil

import numpy as np
import pyautoattack
import pytest
import runs
import torch
from quick_autoattack import QuickAutoAttack
from sklearn.datasets import load_digits

from ltat_fast.data import load_dataset
from ltat_fast.engine import checkpoint, pipeline
from ltat_fast.models import build_model


@pytest.fixture
def run(digits_run, tmp_path):
    return shutil.copytree(digits_run, tmp_path / "a run")


def evaluate(run, *flags: str) -> dict:
    assert runs.status_of("evaluate", str(run), *flags) == 0
    return json.loads((run / "eval.json").read_text())


@pytest.fixture
def attacked(monkeypatch):
    """The attacks that are run, in order."""
    names, original = [], pipeline.evaluate

    def recording(model, images, labels, attacks, *args, **kwargs):
        names.extend(attacks)
        return original(model, images, labels, attacks, *args, **kwargs)

    monkeypatch.setattr(pipeline, "evaluate", recording)
    return names


# -- what is measured -----------------------------------------------------------------------------------------------


def test_the_format(digits_run):
    """What other people's scripts read."""
    results = json.loads((digits_run / "eval.json").read_text())
    assert list(results) == ["best", "last"]
    for by_attack in results.values():
        assert list(by_attack) == ["clean", "pgd20"]
        for scores in by_attack.values():
            assert set(scores) == {"all", "head", "medium", "tail", "per_class", "images", "weights", "eps"}
            assert len(scores["per_class"]) == 10
            assert all(0 <= x <= 100 for x in [*scores["per_class"], *(scores[g] for g in ("all", "head", "tail"))])
            assert (scores["images"], scores["eps"], len(scores["weights"])) == (100, "0.1", 64)
        assert by_attack["clean"]["weights"] == by_attack["pgd20"]["weights"]
        assert by_attack["pgd20"]["all"] < by_attack["clean"]["all"]
    files = {which: checkpoint.read(digits_run / "checkpoints" / f"{which}.safetensors") for which in results}
    assert files["best"][1]["epoch"] == files["last"][1]["epoch"] or (
        results["best"]["clean"]["weights"] != results["last"]["clean"]["weights"]
    )


def test_clean_accuracy_is_what_the_exported_weights_do(run):
    """Measured again from the files alone: scikit-learn's digits, the network, nothing of the engine."""
    scores = evaluate(run, "--attacks", "clean", "--checkpoint", "last")["last"]["clean"]
    model = build_model("smallresnet", 10, in_channels=1).eval()
    model.load_state_dict(checkpoint.read(run / "checkpoints" / "last.safetensors")[0])
    test = load_dataset("digits-lt").test
    sources = {image.tobytes(): label for image, label in zip(load_digits().images, load_digits().target, strict=True)}
    y = np.array([sources[(image[0] * (16 / 255)).round().astype(float).tobytes()] for image in test.images])
    assert np.bincount(y).tolist() == [60] * 10
    with torch.no_grad():
        correct = model(torch.from_numpy(test.images).float() / 255).argmax(1).numpy() == y
    assert scores["images"] == 600
    assert scores["all"] == pytest.approx(100 * correct.mean())
    assert scores["per_class"] == pytest.approx([100 * correct[y == c].mean() for c in range(10)])
    assert scores["tail"] == pytest.approx(100 * correct[y == 9].mean())
    assert scores["head"] == pytest.approx(100 * correct[y < 3].mean())
    assert scores["medium"] == pytest.approx(100 * correct[(y >= 3) & (y < 9)].mean())


def test_more_attacks_join_those_that_are_there(run, digits_run):
    before = json.loads((digits_run / "eval.json").read_text())
    results = evaluate(run, "--attacks", "fgsm,cw20", "--checkpoint", "best", "--limit-eval", "50")
    assert list(results["best"]) == ["clean", "pgd20", "fgsm", "cw20"]
    assert results["best"]["fgsm"]["images"] == 50
    assert {k: results["best"][k] for k in before["best"]} == before["best"]
    assert results["last"] == before["last"]


def test_autoattack_has_its_place(run, monkeypatch):
    monkeypatch.setattr(pyautoattack, "AutoAttack", QuickAutoAttack)
    results = evaluate(run, "--attacks", "clean,autoattack", "--checkpoint", "last", "--limit-eval", "20", "--again")
    assert results["last"]["autoattack"]["images"] == 20
    assert results["last"]["autoattack"]["all"] < results["last"]["clean"]["all"]


# -- what is kept and what is run again -----------------------------------------------------------------------------


def test_what_is_there_is_not_run_again(run, attacked, digits_run):
    results = evaluate(run, "--attacks", "clean,pgd20", "--limit-eval", "100")
    assert attacked == []
    assert results == json.loads((digits_run / "eval.json").read_text())


def test_a_smaller_evaluation_does_not_replace_a_larger_one(run, attacked):
    assert evaluate(run, "--attacks", "clean", "--limit-eval", "20")["best"]["clean"]["images"] == 100
    assert attacked == []


def test_a_larger_one_does(run, attacked):
    results = evaluate(run, "--attacks", "clean", "--limit-eval", "200")
    assert results["last"]["clean"]["images"] == 200
    assert results["last"]["pgd20"]["images"] == 100
    assert set(attacked) == {"clean"}


def test_again_means_again(run, attacked, digits_run):
    results = evaluate(run, "--attacks", "pgd20", "--limit-eval", "100", "--again", "--checkpoint", "last")
    assert attacked == ["pgd20"]
    assert results == json.loads((digits_run / "eval.json").read_text())


def test_other_weights_are_evaluated_afresh(run, attacked):
    file = run / "checkpoints" / "last.safetensors"
    tensors, card = checkpoint.read(file)
    tensors["fc.bias"][9] += 1000.0
    checkpoint.write(file, tensors, card)
    scores = evaluate(run, "--attacks", "clean", "--limit-eval", "100", "--checkpoint", "last")["last"]["clean"]
    assert attacked == ["clean"]
    assert (scores["all"], scores["tail"], scores["head"]) == (10.0, 100.0, 0.0)


def test_best_that_is_last_is_attacked_once(run, attacked):
    shutil.copy(run / "checkpoints" / "last.safetensors", run / "checkpoints" / "best.safetensors")
    (run / "eval.json").unlink()
    results = evaluate(run, "--attacks", "clean,pgd5", "--limit-eval", "20")
    assert attacked == ["clean", "pgd5"]
    assert results["best"] == results["last"]


def test_an_interrupted_evaluation_goes_on(run, monkeypatch, capfd):
    (run / "eval.json").unlink()
    original, done = pipeline.evaluate, []

    def second_is_interrupted(model, images, labels, attacks, *args, **kwargs):
        if done:
            raise KeyboardInterrupt
        done.extend(attacks)
        return original(model, images, labels, attacks, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "evaluate", second_is_interrupted)
        flags = ("--attacks", "clean,pgd5,fgsm", "--limit-eval", "20", "--checkpoint", "last")
        assert runs.status_of("evaluate", str(run), *flags) == 130
    assert capfd.readouterr().err == "ltat_fast: interrupted; what is finished is kept\n"
    kept = json.loads((run / "eval.json").read_text())["last"]
    assert list(kept) == ["clean"]
    results = evaluate(run, "--attacks", "clean,pgd5,fgsm", "--limit-eval", "20", "--checkpoint", "last")["last"]
    assert list(results) == ["clean", "pgd5", "fgsm"]
    assert results["clean"] == kept["clean"]


def test_images_that_have_moved(tmp_path, image_tree, folder_run, attacked, capfd):
    moved_run = shutil.copytree(folder_run, tmp_path / "run")
    config = json.loads((moved_run / "config.json").read_text())
    (moved_run / "config.json").write_text(json.dumps(config | {"data_dir": str(tmp_path / "gone")}))
    assert runs.status_of("evaluate", str(moved_run), "--attacks", "fgsm") == 2
    assert "gone" in capfd.readouterr().err
    images = shutil.copytree(image_tree, tmp_path / "elsewhere")
    results = evaluate(moved_run, "--attacks", "clean", "--again", "--data-dir", str(images))
    assert attacked == ["clean", "clean"]
    assert results["last"]["clean"] == json.loads((folder_run / "eval.json").read_text())["last"]["clean"]


# -- what is refused ------------------------------------------------------------------------------------------------


def refused(capfd, *flags: str) -> str:
    capfd.readouterr()
    assert runs.status_of("evaluate", *flags) == 2
    message = capfd.readouterr().err
    assert message.startswith("ltat_fast: error: ")
    assert message.count("\n") == 1
    return message


def test_refusals(tmp_path, run, capfd):
    before = (run / "eval.json").read_text()
    assert "is not a run: it has no config.json" in refused(capfd, str(tmp_path / "nowhere"))
    assert "is not a run: it has no config.json" in refused(capfd, str(run / "eval.json"))
    assert "unknown attack 'apgd': choose from clean, fgsm" in refused(capfd, str(run), "--attacks", "clean,apgd")
    assert "--limit-eval must be 1 or more, not 0" in refused(capfd, str(run), "--limit-eval", "0")
    if not torch.cuda.is_available():
        assert "no CUDA device" in refused(capfd, str(run), "--device", "cuda")
    assert (run / "eval.json").read_text() == before


@pytest.mark.parametrize("content", ["", '{"best": {"clean"', "[]"])
def test_a_damaged_eval_json_is_left_as_it_is(run, capfd, content):
    (run / "eval.json").write_text(content)
    assert "eval.json is damaged" in refused(capfd, str(run), "--attacks", "clean")
    assert (run / "eval.json").read_text() == content


def test_damaged_or_missing_weights(run, capfd):
    file = run / "checkpoints" / "best.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 16
    file.write_bytes(content)
    assert "best.safetensors is damaged" in refused(capfd, str(run), "--attacks", "fgsm", "--checkpoint", "best")
    os.truncate(file, 1000)
    assert "best.safetensors is damaged" in refused(capfd, str(run), "--attacks", "fgsm", "--checkpoint", "best")
    file.unlink()
    assert "has no finished weights" in refused(capfd, str(run), "--attacks", "fgsm", "--checkpoint", "best")
    assert list(json.loads((run / "eval.json").read_text())["best"]) == ["clean", "pgd20"]


def test_images_of_other_classes(tmp_path, folder_run, capfd):
    run = shutil.copytree(folder_run, tmp_path / "run")
    others = runs.write_images(tmp_path / "others", names=("ant", "bee", "dog"))
    message = refused(capfd, str(run), "--attacks", "fgsm", "--data-dir", str(others))
    assert "knows other classes than the data: 'cow' where the data has 'dog'" in message


# -- the report -----------------------------------------------------------------------------------------------------


def test_report(digits_run, folder_run, capfd):
    capfd.readouterr()
    assert runs.status_of("report", str(digits_run), str(folder_run), str(digits_run) + "/") == 0
    text = capfd.readouterr().out
    scores = json.loads((digits_run / "eval.json").read_text())
    for which in ("best", "last"):
        (row,) = [line for line in text.splitlines() if "digits-lt" in line and which in line]
        cells = [cell.strip() for cell in row.strip("│").split("│")]
        clean, pgd = scores[which]["clean"], scores[which]["pgd20"]
        numbers = [f"{x:.2f}" for x in (clean["all"], pgd["all"], clean["tail"], pgd["tail"])]
        run = ["ltat alpha=10.0", "digits-lt", "10", "smallresnet", which, "1"]
        assert cells == [*run, *numbers[:2], "-", *numbers[2:]]
    assert sum("imagefolder-lt" in line and "as found" in line for line in text.splitlines()) == 2
    assert "Percent of 15 or 100 test images" in text


def test_report_refuses(tmp_path, capfd):
    assert runs.status_of("report") == 2
    assert "name at least one run folder" in capfd.readouterr().err
    assert runs.status_of("report", str(tmp_path)) == 2
    assert "has no results: config.json is not there" in capfd.readouterr().err
