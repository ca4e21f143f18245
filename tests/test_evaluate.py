"""``python -m ltat_fast.evaluate`` and ``report``: measuring, keeping results, and refusals."""

import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from helpers import small_disks, train_runs
from helpers.quick_autoattack import quick_searches
from ltat_fast import evaluate as command
from ltat_fast.attacks import autoattack
from ltat_fast.data import load_dataset
from ltat_fast.models import build_model
from ltat_fast.runs.weights import read_weights, write_weights
from ltat_fast.training import evaluation


@pytest.fixture
def run(digits_run, tmp_path):
    return shutil.copytree(digits_run, tmp_path / "a run")


def evaluate(run, *flags: str) -> dict:
    assert train_runs.status_of("evaluate", str(run), *flags) == 0
    return json.loads((run / "eval.json").read_text())


@pytest.fixture
def attacked(monkeypatch):
    """The attacks that are run, in order."""
    names, original = [], evaluation.evaluate

    def recording(model, images, labels, attacks, *args, **kwargs):
        names.extend(attacks)
        return original(model, images, labels, attacks, *args, **kwargs)

    monkeypatch.setattr(evaluation, "evaluate", recording)
    return names


# -- measuring ------------------------------------------------------------------------------------------------------


def test_the_format(digits_run):
    """Scripts of other people read these fields."""
    results = json.loads((digits_run / "eval.json").read_text())
    assert list(results) == ["best", "last"]
    for by_attack in results.values():
        assert list(by_attack) == ["clean", "pgd20", "worst"]
        for attack, scores in by_attack.items():
            own = {"attacks"} if attack == "worst" else {"correct", "chosen"}
            accuracies = {"all", "head", "medium", "tail", "per_class", "images"}
            assert set(scores) == accuracies | {"weights", "eps", "test_set"} | own
            assert len(scores["per_class"]) == 10
            assert all(0 <= x <= 100 for x in [*scores["per_class"], *(scores[g] for g in ("all", "head", "tail"))])
            assert (scores["images"], scores["eps"], len(scores["weights"])) == (100, "0.1", 64)
        assert by_attack["clean"]["weights"] == by_attack["pgd20"]["weights"]
        assert by_attack["pgd20"]["all"] < by_attack["clean"]["all"]
        assert by_attack["worst"]["attacks"] == ["clean", "pgd20"]
        assert by_attack["worst"]["all"] <= by_attack["pgd20"]["all"]
    files = {which: read_weights(digits_run / "checkpoints" / f"{which}.safetensors") for which in results}
    assert files["best"][1]["epoch"] == files["last"][1]["epoch"] or (
        results["best"]["clean"]["weights"] != results["last"]["clean"]["weights"]
    )


def test_clean_accuracy_is_what_the_exported_weights_do(run):
    """Measured again from the files alone, with the digits of scikit-learn and the network."""
    scores = evaluate(run, "--attacks", "clean", "--checkpoint", "last")["last"]["clean"]
    model = build_model("smallresnet", 10, in_channels=1).eval()
    model.load_state_dict(read_weights(run / "checkpoints" / "last.safetensors")[0])
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


def test_new_attacks_are_added_to_the_file(run, digits_run):
    """The worst case includes them if they are on as many images."""
    before = json.loads((digits_run / "eval.json").read_text())
    few = evaluate(run, "--attacks", "fgsm,cw5x2", "--checkpoint", "best", "--limit-eval", "20")
    attacks = ["clean", "pgd20", "fgsm", "cw5x2"]
    assert list(few["best"]) == [*attacks, "worst"]
    assert few["best"]["fgsm"]["images"] == 20
    assert {k: few["best"][k] for k in ("clean", "pgd20", "worst")} == before["best"]
    assert few["last"] == before["last"]
    results = evaluate(run, "--attacks", "fgsm,scaled-pgd5", "--checkpoint", "best", "--limit-eval", "100")
    worst = results["best"]["worst"]
    assert worst["attacks"] == ["clean", "pgd20", "fgsm", "scaled-pgd5"]
    assert worst["images"] == 100
    assert worst["all"] <= min(results["best"][name]["all"] for name in worst["attacks"])


@pytest.fixture
def quick_autoattack(monkeypatch):
    monkeypatch.setattr(autoattack, "searches", quick_searches)


def test_autoattack_runs_after_the_checks(run, quick_autoattack, capfd):
    flags = ("--attacks", "clean,pgd20,autoattack", "--checkpoint", "last", "--limit-eval", "20", "--again")
    results = evaluate(run, *flags)
    assert results["last"]["autoattack"]["images"] == 20
    assert results["last"]["autoattack"]["all"] < results["last"]["clean"]["all"]
    assert "checks: 7 of 7 passed" in capfd.readouterr().out
    checks = results["last"]["checks"]
    assert [check["name"] for check in checks][:3] == ["range", "invariance", "logits"]
    assert all(check["passed"] for check in checks)
    assert "checks" not in results["best"]
    assert results["last"]["worst"]["attacks"] == ["clean", "pgd20", "autoattack"]


def test_the_checks_run_once_for_the_same_weights(run, quick_autoattack, capfd):
    flags = ("--attacks", "autoattack", "--checkpoint", "last", "--limit-eval")
    evaluate(run, *flags, "4")
    assert "checks:" in capfd.readouterr().out
    evaluate(run, *flags, "6")
    assert "checks:" not in capfd.readouterr().out
    change_weights(run / "checkpoints" / "last.safetensors", lambda t: t["fc.weight"].mul_(1e5))
    results = evaluate(run, *flags, "4")
    assert "FLAG gradients: " in capfd.readouterr().out
    assert [check["name"] for check in results["last"]["checks"] if not check["passed"]] == ["gradients"]
    change_weights(run / "checkpoints" / "last.safetensors", lambda t: t["fc.weight"].mul_(2))
    assert "checks" not in evaluate(run, "--attacks", "clean", "--checkpoint", "last")["last"]


def test_autoattack_takes_as_many_images_as_in_the_run(run, quick_autoattack, monkeypatch):
    monkeypatch.setattr(evaluation, "check", lambda *args: [])
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"limit_autoattack": 6}))

    def images(*flags: str) -> int:
        return evaluate(run, "--attacks", "autoattack", "--checkpoint", "last", *flags)["last"]["autoattack"]["images"]

    assert images() == 6
    assert images("--limit-autoattack", "8") == 8
    assert images("--limit-autoattack", "none", "--limit-eval", "10") == 10
    assert images("--limit-eval", "4", "--again") == 4


KILLED = """
import functools, sys
from helpers.quick_autoattack import quick_searches
from ltat_fast import evaluate
from ltat_fast.attacks import autoattack
autoattack.SAVE_SECONDS = 0
autoattack.searches = functools.partial(quick_searches, steps=30, queries=300)
sys.exit(evaluate.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_autoattack_that_was_killed_ends_with_the_same_verdicts(run):
    """SIGKILL five times, at random moments after the state was saved."""
    flags = ("--attacks", "autoattack", "--checkpoint", "last", "--limit-eval", "60", "--again")
    command = [sys.executable, "-c", KILLED, str(run), *flags]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    whole = json.loads((run / "eval.json").read_text())["last"]["autoattack"]
    assert 0 < whole["all"] < 100
    (run / "eval.json").unlink()
    for saves in random.Random(0).choices(range(1, 60), k=5):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        seen = set()
        while len(seen) < saves:
            assert process.poll() is None, "it ended before it was killed"
            seen |= {(file.name, file.stat().st_mtime_ns) for file in run.glob(".unfinished-*.safetensors")}
        process.kill()
        process.wait()
        assert not (run / "eval.json").exists() or "autoattack" not in (run / "eval.json").read_text()
    result = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    assert "autoattack: continues where it was interrupted" in result.stdout
    assert json.loads((run / "eval.json").read_text())["last"]["autoattack"] == whole
    assert not list(run.glob(".unfinished-*"))


# -- keeping results ------------------------------------------------------------------------------------------------


def test_attacks_in_the_file_are_not_run_again(run, attacked, digits_run):
    results = evaluate(run, "--attacks", "clean,pgd20", "--limit-eval", "100")
    assert attacked == []
    assert results == json.loads((digits_run / "eval.json").read_text())


def test_a_smaller_evaluation_does_not_replace_a_larger_one(run, attacked):
    assert evaluate(run, "--attacks", "clean", "--limit-eval", "20")["best"]["clean"]["images"] == 100
    assert attacked == []


def test_a_larger_evaluation_replaces_a_smaller_one(run, attacked):
    results = evaluate(run, "--attacks", "clean", "--limit-eval", "200")
    assert results["last"]["clean"]["images"] == 200
    assert results["last"]["pgd20"]["images"] == 100
    assert set(attacked) == {"clean"}


def test_again_runs_an_attack_a_second_time(run, attacked, digits_run):
    results = evaluate(run, "--attacks", "pgd20", "--limit-eval", "100", "--again", "--checkpoint", "last")
    assert attacked == ["pgd20"]
    assert results == json.loads((digits_run / "eval.json").read_text())


def change_weights(file, change) -> None:
    tensors, card = read_weights(file)
    change(tensors)
    write_weights(file, tensors, card)


def test_other_weights_are_evaluated_again(run, attacked):
    change_weights(run / "checkpoints" / "last.safetensors", lambda tensors: tensors["fc.bias"][9].add_(1000))
    scores = evaluate(run, "--attacks", "clean", "--limit-eval", "100", "--checkpoint", "last")["last"]
    assert attacked == ["clean"]
    assert (scores["clean"]["all"], scores["clean"]["tail"], scores["clean"]["head"]) == (10.0, 100.0, 0.0)
    assert "worst" not in scores  # pgd20 belongs to the old weights


def test_other_images_are_refused_before_they_are_attacked(run, attacked, monkeypatch, capfd):
    before = (run / "eval.json").read_bytes()
    load = command.load_splits

    def changed(*args):
        data = load(*args)
        data.test.labels = data.test.labels.flip(0)
        return data

    with monkeypatch.context() as patched:
        patched.setattr(command, "load_splits", changed)
        assert train_runs.status_of("evaluate", str(run), "--attacks", "clean", "--again") == 2
    assert attacked == []
    assert "eval.json has results on other test images: restore these, or move the file" in capfd.readouterr().err
    assert (run / "eval.json").read_bytes() == before


def test_results_of_an_earlier_version_are_read_but_measured_again(run, attacked, capfd):
    results = json.loads((run / "eval.json").read_text())
    for entry in results.values():
        del entry["worst"]
        for scores in entry.values():
            for key in ("correct", "chosen", "test_set"):
                scores.pop(key, None)
    (run / "eval.json").write_text(json.dumps(results))
    assert train_runs.status_of("report", str(run)) == 0
    again = evaluate(run, "--attacks", "pgd20", "--limit-eval", "100", "--checkpoint", "last")["last"]
    assert attacked == ["pgd20"]
    assert again["clean"] == results["last"]["clean"]
    assert again["pgd20"]["all"] == results["last"]["pgd20"]["all"]


def test_equal_best_and_last_weights_are_attacked_once(run, attacked, capfd):
    shutil.copy(run / "checkpoints" / "last.safetensors", run / "checkpoints" / "best.safetensors")
    (run / "eval.json").unlink()
    flags = ("--attacks", "clean,pgd5", "--limit-eval", "20")
    results = evaluate(run, *flags)
    assert attacked == ["clean", "pgd5"]
    assert results["best"] == results["last"]
    assert "best and last, on the test set:" in capfd.readouterr().out
    assert evaluate(run, *flags, "--again") == results
    assert attacked == ["clean", "pgd5", "clean", "pgd5"]


def test_results_of_another_process_are_kept(run, monkeypatch):
    original = evaluation.evaluate

    def meanwhile(model, images, labels, attacks, *args, **kwargs):
        results = json.loads((run / "eval.json").read_text())
        results["last"]["fgsm"] = {"all": 12.5}
        (run / "eval.json").write_text(json.dumps(results))
        return original(model, images, labels, attacks, *args, **kwargs)

    monkeypatch.setattr(evaluation, "evaluate", meanwhile)
    results = evaluate(run, "--attacks", "pgd3", "--limit-eval", "20", "--checkpoint", "last")["last"]
    assert results["fgsm"] == {"all": 12.5}
    assert {"clean", "pgd20", "pgd3", "worst"} < set(results)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_evaluation_is_resumed(run, number):
    """A real signal during an attack that would take hours."""
    (run / "eval.json").unlink()
    flags = ("--limit-eval", "20", "--checkpoint", "last", "--device", "cpu")
    command = [sys.executable, "-m", "ltat_fast.evaluate", str(run), *flags, "--again"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "--attacks", "clean,pgd5,pgd9999999"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 600
    while not (run / "eval.json").exists() or '"pgd5"' not in (run / "eval.json").read_text():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(number)
    out, err = process.communicate(timeout=600)
    assert (process.returncode, err) == (75, "")
    name = signal.Signals(number).name
    expected = f"stopped by {name}; finished work is kept; resume with: python -m ltat_fast.evaluate {run} "
    (said,) = [line for line in out.replace(f"'{run}'", str(run)).splitlines() if "stopped" in line]
    assert said == expected + shlex.join([*flags, "--attacks", "clean,pgd5,pgd9999999"])
    assert not list(run.glob(".*partial"))
    kept = json.loads((run / "eval.json").read_text())["last"]
    assert list(kept) == ["clean", "pgd5", "worst"]
    results = evaluate(run, *flags, "--attacks", "clean,pgd5,fgsm")["last"]
    assert list(results) == ["clean", "pgd5", "fgsm", "worst"]
    assert (results["clean"], results["pgd5"]) == (kept["clean"], kept["pgd5"])
    assert results["worst"]["attacks"] == ["clean", "pgd5", "fgsm"]


def test_moved_images_are_found_with_data_dir(tmp_path, image_tree, folder_run, attacked, capfd):
    moved_run = shutil.copytree(folder_run, tmp_path / "run")
    config = json.loads((moved_run / "config.json").read_text())
    (moved_run / "config.json").write_text(json.dumps(config | {"data_dir": str(tmp_path / "gone")}))
    assert train_runs.status_of("evaluate", str(moved_run), "--attacks", "fgsm") == 2
    assert "gone" in capfd.readouterr().err
    images = shutil.copytree(image_tree, tmp_path / "elsewhere")
    results = evaluate(moved_run, "--attacks", "clean", "--again", "--data-dir", str(images))
    assert attacked == ["clean"]  # best and last are the same weights
    assert results["last"]["clean"] == json.loads((folder_run / "eval.json").read_text())["last"]["clean"]


# -- refusals -------------------------------------------------------------------------------------------------------


def refused(capfd, *flags: str) -> str:
    capfd.readouterr()
    assert train_runs.status_of("evaluate", *flags) == 2
    message = capfd.readouterr().err
    assert message.startswith("ltat_fast: error: ")
    assert message.count("\n") == 1
    return message


def test_refusals(tmp_path, run, capfd):
    before = (run / "eval.json").read_text()
    assert "is not a run: it has no config.json" in refused(capfd, str(tmp_path / "nowhere"))
    assert "is not a run: it has no config.json" in refused(capfd, str(run / "eval.json"))
    assert "unknown attack 'apgd': choose from clean, fgsm, pgd<k>, cw<k>" in refused(
        capfd, str(run), "--attacks", "clean,apgd"
    )
    assert "--limit-eval must be 1 or more, not 0" in refused(capfd, str(run), "--limit-eval", "0")
    if not torch.cuda.is_available():
        assert "no CUDA device" in refused(capfd, str(run), "--device", "cuda")
    assert (run / "eval.json").read_text() == before


@pytest.fixture
def read_only(digits_run, tmp_path):
    """A run on a file system that is read-only even for root."""
    with small_disks.file_system(tmp_path / "disk", "64m") as disk:
        run = shutil.copytree(digits_run, disk / "run", ignore=shutil.ignore_patterns("tb"))
        small_disks.remount(disk, "ro")
        yield run


def test_a_read_only_run_is_refused_before_anything_is_measured(read_only, digits_run, attacked, monkeypatch, capfd):
    said = f"cannot write into the run folder {read_only}: it is read-only for this user"
    assert evaluate(read_only, "--attacks", "clean,pgd20", "--limit-eval", "100") == json.loads(
        (digits_run / "eval.json").read_text()
    )
    assert said in refused(capfd, str(read_only), "--attacks", "clean,pgd20", "--limit-eval", "101")
    with monkeypatch.context() as patched:
        patched.setattr(evaluation, "check", lambda *_: pytest.fail("the checks were run"))
        patched.setattr(command, "load_splits", lambda *_: pytest.fail("the images were read"))
        for flags in (("clean,fgsm",), ("clean", "--again"), ("autoattack",)):
            assert said in refused(capfd, str(read_only), "--attacks", *flags)
    assert attacked == []


@pytest.mark.parametrize("content", ["", '{"best": {"clean"', "[]"])
def test_a_damaged_eval_json_is_not_overwritten(run, capfd, content):
    (run / "eval.json").write_text(content)
    assert "eval.json is damaged" in refused(capfd, str(run), "--attacks", "clean")
    assert (run / "eval.json").read_text() == content


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("checks", [3]),
        ("checks", {"name": "range"}),
        ("clean", {"images": "5"}),
        ("clean", {"all": "x"}),
        ("pgd20", {"tail": "x"}),
        ("pgd20", {"per_class": 3}),
        ("pgd20", {"chosen": "zz"}),
    ],
)
def test_a_result_of_another_type_is_not_overwritten(run, capfd, name, broken):
    results = json.loads((run / "eval.json").read_text())
    for entry in results.values():
        entry[name] = entry[name] | broken if name in entry else broken
    (run / "eval.json").write_text(json.dumps(results))
    message = refused(capfd, str(run), "--attacks", "clean,pgd1", "--limit-eval", "100")
    assert "eval.json is damaged" in message
    assert json.loads((run / "eval.json").read_text()) == results


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
    assert list(json.loads((run / "eval.json").read_text())["best"]) == ["clean", "pgd20", "worst"]


@pytest.mark.parametrize("measured", [True, False], ids=["all measured", "nothing measured"])
def test_a_damaged_checkpoint_is_refused_even_if_the_other_has_the_same_weights(run, capfd, measured):
    """Both files have the same checksum in their header, so that one of them would be enough to measure both."""
    best, last = (run / "checkpoints" / f"{which}.safetensors" for which in ("best", "last"))
    shutil.copyfile(best, last)
    if measured:
        evaluate(run, "--attacks", "clean")
    before = (run / "eval.json").read_bytes()
    content = bytearray(last.read_bytes())
    content[-9] ^= 4
    last.write_bytes(content)
    message = refused(capfd, str(run), "--attacks", "clean" if measured else "fgsm")
    assert "last.safetensors is damaged: its content does not match its checksum" in message
    assert (run / "eval.json").read_bytes() == before


def test_images_of_other_classes(tmp_path, folder_run, capfd):
    run = shutil.copytree(folder_run, tmp_path / "run")
    others = train_runs.write_images(tmp_path / "others", names=("ant", "bee", "dog"))
    message = refused(capfd, str(run), "--attacks", "fgsm", "--data-dir", str(others))
    assert "has other classes than the data: 'cow' where the data has 'dog'" in message


# -- the report -----------------------------------------------------------------------------------------------------


def test_report(digits_run, folder_run, capfd):
    capfd.readouterr()
    assert train_runs.status_of("report", str(digits_run), str(folder_run), str(digits_run) + "/") == 0
    digits, folder = capfd.readouterr().out.split("imagefolder-lt")
    title, _, headings, name, *rows = digits.splitlines()[:6]
    assert title == "digits-lt, imbalance ratio 10, smallresnet: percent of 100 test images"
    assert headings.split() == ["Clean", "PGD", "T-Clean", "T-PGD", "Worst", "T-Worst"]
    assert name == "ltat alpha=10.0"
    scores = json.loads((digits_run / "eval.json").read_text())
    for which, row in zip(("best", "last"), rows, strict=True):
        of = scores[which]
        numbers = [of[attack][group] for group in ("all", "tail") for attack in ("clean", "pgd20")]
        numbers += [of["worst"][group] for group in ("all", "tail")]
        assert row.split() == [which, *(f"{number:.2f}" for number in numbers)]
    assert folder.startswith(", imbalance ratio as found, smallresnet: percent of 15 test images\n")


def test_report_refuses(tmp_path, capfd):
    assert train_runs.status_of("report") == 2
    assert "name at least one run folder" in capfd.readouterr().err
    assert train_runs.status_of("report", str(tmp_path)) == 2
    assert "has no results: config.json does not exist" in capfd.readouterr().err
