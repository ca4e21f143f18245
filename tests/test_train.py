"""``python -m ltat_fast.train``: a whole run, interrupted and resumed, and everything it must refuse."""

import json
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import train_runs
from helpers.train_runs import assert_same
from ltat_fast.models import build_model
from ltat_fast.runs.records import StageLog, read_metrics
from ltat_fast.runs.weights import read_weights, write_weights
from ltat_fast.training import evaluation, pipeline

# -- a whole run ----------------------------------------------------------------------------------------------------


def test_a_run_writes_the_documented_files(digits_run):
    for name in (
        "config.json",
        "env.json",
        "metrics.jsonl",
        "eval.json",
        "tb",
        "checkpoints/best.safetensors",
        "checkpoints/last.safetensors",
        "teacher/metrics.jsonl",
        "teacher/eval.json",
        "teacher/checkpoints/last.safetensors",
    ):
        assert (digits_run / name).exists(), name
    assert not list(digits_run.rglob("*.partial"))
    assert not [p for p in digits_run.rglob("*") if p.suffix in (".pt", ".pth", ".pkl", ".ckpt")]
    metrics = read_metrics(digits_run / "metrics.jsonl")
    assert [r["epoch"] for r in metrics] == [1, 2, 3]
    assert [r["steps"] for r in metrics] == [461 // 64] * 3
    assert ["test_pgd20" in r for r in metrics] == [False, True, True]
    assert {"loss", "bsl", "igdm", "lr"} <= metrics[0].keys()
    environment = json.loads((digits_run / "env.json").read_text())
    assert environment["class_counts"] == [114, 88, 68, 52, 40, 31, 24, 19, 14, 11]
    assert environment["packages"]["torch"] == torch.__version__


def test_weights_carry_a_card_of_their_network(digits_run):
    tensors, card = read_weights(digits_run / "checkpoints" / "last.safetensors")
    assert card.items() >= {"arch": "smallresnet", "num_classes": 10, "in_channels": 1, "epoch": 3}.items()
    build_model("smallresnet", 10, in_channels=1).load_state_dict(tensors)


def test_best_is_the_epoch_with_the_highest_pgd20(digits_run):
    evaluated = [r for r in read_metrics(digits_run / "metrics.jsonl") if "test_pgd20" in r]
    best = max(evaluated, key=lambda r: r["test_pgd20"])
    assert read_weights(digits_run / "checkpoints" / "best.safetensors")[1]["epoch"] == best["epoch"]
    scores = json.loads((digits_run / "eval.json").read_text())["best"]
    assert (scores["clean"]["all"], scores["pgd20"]["all"]) == (best["test_clean"], best["test_pgd20"])
    assert scores["pgd20"]["tail"] == best["test_tail_pgd20"]


def test_a_run_on_an_image_folder_with_spaces_in_its_name(folder_run, image_tree):
    assert json.loads((folder_run / "env.json").read_text())["class_counts"] == [24, 12, 8]
    assert json.loads((folder_run / "eval.json").read_text())["last"]["clean"]["images"] == 15
    assert sum(r["steps"] for r in read_metrics(folder_run / "metrics.jsonl")) == 3


@pytest.mark.parametrize("method", ["pgd-at", "at-bsl"])
def test_methods_without_a_teacher_train_none(tmp_path, image_tree, method):
    flags = ("--method", method, "--data-dir", str(image_tree), "--out", str(tmp_path / "run"))
    assert train_runs.train(*train_runs.FOLDER, *flags) == 0
    assert not (tmp_path / "run" / "teacher").exists()
    assert {"best", "last"} == json.loads((tmp_path / "run" / "eval.json").read_text()).keys()


def test_the_best_epoch_can_be_selected_on_held_out_images(tmp_path, image_tree):
    flags = ("--method", "pgd-at", "--select-on", "heldout", "--heldout", "0.25")
    out = ("--data-dir", str(image_tree), "--out", str(tmp_path / "run"))
    assert train_runs.train(*train_runs.FOLDER, *flags, *out) == 0
    assert json.loads((tmp_path / "run" / "env.json").read_text())["class_counts"] == [18, 9, 6]
    (record,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert "heldout_pgd20" in record
    assert "test_pgd20" not in record


@pytest.mark.parametrize("path", ["teacher", "teacher/checkpoints/last.safetensors"])
def test_a_given_teacher_is_used_and_none_is_trained(tmp_path, image_tree, folder_run, path, capfd):
    flags = ("--data-dir", str(image_tree), "--out", str(tmp_path / "run"), "--teacher", str(folder_run / path))
    assert train_runs.train(*train_runs.FOLDER, *flags) == 0
    assert not (tmp_path / "run" / "teacher").exists()
    # The same teacher as the run that trained it, so the same student.
    ours, theirs = (read_weights(r / "checkpoints/last.safetensors")[0] for r in (tmp_path / "run", folder_run))
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


# -- interrupted and resumed ----------------------------------------------------------------------------------------


def test_a_run_stopped_by_sigterm_saves_exits_with_75_and_resumes(tmp_path, digits_run):
    out = tmp_path / "run"
    stop = {"LTAT_SIGNAL": "SIGSTOP 2 write metrics.jsonl"}  # at the end of the second epoch of the student
    process = train_runs.start_signalled("--out", str(out), *train_runs.QUICK, **stop)
    with train_runs.killed_at_the_end(process):
        train_runs.wait_until_stopped(process)
        other = train_runs.train("--out", str(out), "--resume")
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGCONT)
        said, _ = train_runs.finish(process, status=75)
    assert other == 2, "the folder is in use"
    assert f"python -m ltat_fast.train --out {out} --resume" in said
    assert (out / "interrupted").exists()
    state = read_weights(out / "checkpoints" / "resume.safetensors")[1]
    assert (state["epoch"], state["step"], state["finished"]) == (2, 0, False)
    # Other settings for the saves are allowed: this resumed run saves after each step.
    assert train_runs.train("--out", str(out), "--resume", "--save-minutes", "1e-9") == 0
    assert not (out / "interrupted").exists()
    assert_same(out, digits_run)


def test_a_run_with_all_modifiers_resumes_and_says_what_they_are(tmp_path, image_tree, monkeypatch):
    """Teacher and student save their averaged weights. The signal comes after the second epoch of the student."""
    modified = "--awp 0.01 --awp-from 2 --ema 0.5 --eps-balance 0.3 --eps-warmup 0.5 --modify-teacher --epochs 3"
    flags = (*train_runs.FOLDER, *modified.split(), "--data-dir", str(image_tree), "--max-steps", "12")
    flags += ("--teacher-epochs", "2", "--lr", "0.03")
    assert train_runs.train(*flags, "--out", str(tmp_path / "whole")) == 0
    write = StageLog.epoch

    def signalled(self, entry):
        write(self, entry)
        if entry["epoch"] == 2 and "bsl" in entry:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(StageLog, "epoch", signalled)
        assert train_runs.train(*flags, "--out", str(tmp_path / "parts")) == 75
    assert train_runs.train("--out", str(tmp_path / "parts"), "--resume") == 0
    assert_same(tmp_path / "parts", tmp_path / "whole")

    for folder in (tmp_path / "whole", tmp_path / "whole" / "teacher"):
        last, card = read_weights(folder / "checkpoints" / "last.safetensors")
        state, _ = read_weights(folder / "checkpoints" / "resume.safetensors")
        averages = {name: t for name, t in state.items() if name.startswith("average.")}
        assert all(torch.equal(last[name.removeprefix("average.")], t) for name, t in averages.items())
        assert not torch.equal(last["fc.weight"], state["model.fc.weight"])
        assert card["modifiers"].items() >= {"awp": 0.01, "ema": 0.5, "modify_teacher": True}.items()
    export = tmp_path / "export"
    assert train_runs.status_of("export", str(tmp_path / "whole"), "--out", str(export)) == 0
    last, _ = read_weights(tmp_path / "whole" / "checkpoints" / "last.safetensors")
    assert torch.equal(load_file(export / "model.safetensors")["fc.weight"], last["fc.weight"])
    assert json.loads((export / "config.json").read_text())["training"]["modifiers"]["ema"] == 0.5


def test_sigterm_while_evaluating_stops_at_once(tmp_path, digits_run, monkeypatch):
    """The finished attacks are kept. The resumed run takes the remaining ones, which could be hours of AutoAttack."""
    copy = shutil.copytree(digits_run, tmp_path / "copy")
    (copy / "eval.json").unlink()
    evaluate, attacks = evaluation.evaluate, []

    def signalled(model, images, labels, names, *args, **kwargs):
        attacks.extend(names)
        if names == ["pgd20"]:
            os.kill(os.getpid(), signal.SIGUSR1)
        return evaluate(model, images, labels, names, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(evaluation, "evaluate", signalled)
        assert train_runs.train("--out", str(copy), "--resume") == 75
    assert attacks == ["clean", "pgd20"]
    assert (copy / "interrupted").exists()
    assert list(json.loads((copy / "eval.json").read_text())["best"]) == ["clean"]
    assert train_runs.train("--out", str(copy), "--resume") == 0
    assert not (copy / "interrupted").exists()
    assert_same(copy, digits_run)


def test_a_signal_before_the_run_has_begun_leaves_the_folder_free(tmp_path, monkeypatch):
    def load_data(*args):
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "load_splits", load_data)
        assert train_runs.train("--out", str(tmp_path / "run")) == 75
    assert_free(tmp_path / "run")


def test_a_finished_run_resumes_to_itself(tmp_path, digits_run):
    copy = shutil.copytree(digits_run, tmp_path / "copy")
    assert train_runs.train("--out", str(copy), "--resume") == 0
    assert_same(copy, digits_run)


# -- numbers that are not finite ------------------------------------------------------------------------------------


def test_divergence_exits_with_3_and_can_be_replayed(tmp_path, image_tree, capfd):
    flags = ("--method", "pgd-at", "--lr", "1e30", "--data-dir", str(image_tree), "--out", str(tmp_path / "run"))
    assert train_runs.train(*train_runs.FOLDER, *flags) == 3
    message = capfd.readouterr().err
    assert "loss not finite at epoch 1, step 2" in message
    assert message.count("\n") == 1
    (dump,) = (tmp_path / "run" / "nan").iterdir()
    assert str(dump) in message
    assert train_runs.status_of("replay", str(dump)) == 0
    assert "first: attack: network: output of net.conv1" in capfd.readouterr().out
    # The resumed run diverges again: skipping a batch does not fix a learning rate.
    assert train_runs.train("--out", str(tmp_path / "run"), "--resume", "--on-nan", "rollback") == 3
    assert "epoch 1, step 3" in capfd.readouterr().err
    assert len(list((tmp_path / "run" / "nan").iterdir())) == 2


# -- what is refused ------------------------------------------------------------------------------------------------


def refused(capfd, *flags: str) -> str:
    """Assert that a start ends with exit status 2. Return its error message, one sentence."""
    capfd.readouterr()
    assert train_runs.train(*flags) == 2
    message = capfd.readouterr().err
    assert message.startswith("ltat_fast: error: ")
    assert message.count("\n") == 1
    return message


def assert_free(out) -> None:
    """Assert that the next start can use the folder ``out``."""
    assert not out.exists() or {path.name for path in out.iterdir()} <= {".lock"}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--dataset mnist-lt", "unknown dataset 'mnist-lt': choose one of"),
        ("--method tardes", "unknown method 'tardes': choose one of"),
        ("--arch vgg", "unknown arch 'vgg': choose one of"),
        ("--imbalance-ratio 0.9", "--imbalance-ratio must be 1 (balanced) or more, not 0.9"),
        ("--imbalance-ratio 1000", "leaves no image in the last class"),
        ("--eps 8/0", "--eps takes a fraction such as 8/255 or a decimal such as 0.031, not '8/0'"),
        ("--eps abc", "not 'abc'"),
        ("--eps -1", "--eps must be above 0"),
        ("--eps nan", "--eps must be above 0"),
        ("--limit-eval 0", "--limit-eval must be 1 or more, not 0"),
        ("--batch-size 462", "461 images do not fill one batch of 462"),
        ("--teacher-batch-size 1000", "570 images do not fill one batch of 1000"),
        ("--teacher nowhere", "nowhere has no finished weights: nowhere does not exist"),
        ("--dataset imagefolder-lt", "--data-dir"),
        ("--dataset imagefolder-lt --data-dir nowhere", "nowhere"),
        ("--select-on heldout --heldout 0.0001", "holds out no image"),
    ],
)
def test_wrong_flags_are_refused_before_any_work(tmp_path, capfd, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    assert words in refused(capfd, "--out", "run", *flags.split())
    assert_free(tmp_path / "run")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_gpu_is_refused(tmp_path, capfd):
    message = refused(capfd, "--out", str(tmp_path / "run"), "--device", "cuda")
    assert "--device cuda: no CUDA device" in message
    assert not (tmp_path / "run").exists()


def test_unknown_flags_exit_with_2(tmp_path, capfd):
    assert train_runs.train("--out", str(tmp_path / "run"), "--bogus") == 2
    assert "--bogus" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_exit_statuses_reach_the_shell():
    process = train_runs.start("--eps", "8/0")
    out, err = train_runs.finish(process, status=2)
    assert out == ""
    assert err.startswith("ltat_fast: error: --eps takes a fraction")


def test_a_folder_that_is_not_empty_is_refused(tmp_path, capfd):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert "is not empty: add --resume" in refused(capfd, "--out", str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_is_refused_as_run_folder(tmp_path, capfd):
    file = tmp_path / "file"
    file.write_text("mine")
    assert "is a file, not a folder" in refused(capfd, "--out", str(file))
    assert "cannot create the run folder" in refused(capfd, "--out", str(file / "run"))
    assert file.read_text() == "mine"


def test_resuming_without_a_run_is_refused(tmp_path, capfd):
    assert "nothing to resume" in refused(capfd, "--out", str(tmp_path / "run"), "--resume")
    assert not (tmp_path / "run").exists()


def test_resuming_with_other_settings_is_refused_and_names_them(tmp_path, capfd, digits_run):
    copy = shutil.copytree(digits_run, tmp_path / "copy")
    message = refused(capfd, "--out", str(copy), "--resume", "--lr", "0.2", "--seed", "5", "--alpha", "1")
    assert "started with other settings: lr (0.1 -> 0.2), seed (0 -> 5), alpha (10.0 -> 1.0)" in message
    assert_same(copy, digits_run)


@pytest.mark.parametrize("content", ["", '{"dataset": "digits-lt"', "[]"])
def test_resuming_with_a_damaged_config_is_refused(tmp_path, capfd, content):
    (tmp_path / "config.json").write_text(content)
    assert "config.json cannot be read" in refused(capfd, "--out", str(tmp_path), "--resume")
    assert (tmp_path / "config.json").read_text() == content


@pytest.mark.parametrize("left", [0, 1])
def test_resuming_from_damaged_states(tmp_path, capfd, digits_run, left):
    """The run resumes from the previous state. If that is damaged too, the run is refused and the files are kept."""
    copy = shutil.copytree(digits_run, tmp_path / "copy")
    for name in ("resume.safetensors", "resume.previous.safetensors")[: 2 - left]:
        os.truncate(copy / "checkpoints" / name, 10_000)
    if left:
        assert train_runs.train("--out", str(copy), "--resume") == 0
        assert "resume.safetensors is damaged" in capfd.readouterr().out
        assert_same(copy, digits_run)
    else:
        assert "resume.safetensors is damaged" in refused(capfd, "--out", str(copy), "--resume")
        assert (copy / "checkpoints" / "resume.safetensors").exists()


@pytest.mark.parametrize(
    ("which", "entry_point", "flags"),
    [("best", "train", "--resume --out"), ("best", "evaluate", ""), ("last", "evaluate", "--checkpoint last")],
)
def test_damaged_weights_are_not_evaluated(tmp_path, capfd, digits_run, which, entry_point, flags):
    copy = shutil.copytree(digits_run, tmp_path / "copy")
    weights = copy / "checkpoints" / f"{which}.safetensors"
    content = bytearray(weights.read_bytes())
    content[-9] ^= 4
    weights.write_bytes(content)
    (copy / "eval.json").unlink()
    capfd.readouterr()
    assert train_runs.status_of(entry_point, *flags.split(), str(copy)) == 2
    message = capfd.readouterr().err
    assert f"{which}.safetensors is damaged: its content does not match its checksum" in message
    assert message.count("\n") == 1


def test_a_refused_start_does_not_block_the_next(tmp_path, image_tree, folder_run, capfd):
    """The folder is claimed and the data read before the wrong teacher is found."""
    out = ("--data-dir", str(image_tree), "--out", str(tmp_path / "run"))
    wrong = tmp_path / "wrong.safetensors"
    save_file(build_model("resnet18", 3).state_dict(), wrong)
    message = refused(capfd, *train_runs.FOLDER, *out, "--teacher", str(wrong))
    assert f"{wrong} does not fit smallresnet: " in message
    assert_free(tmp_path / "run")
    assert train_runs.train(*train_runs.FOLDER, *out, "--teacher", str(folder_run / "teacher")) == 0


def test_teachers_that_do_not_fit_are_refused(tmp_path, image_tree, folder_run, digits_run, capfd):
    out = ("--data-dir", str(image_tree), "--out", str(tmp_path / "run"))

    def message(teacher):
        text = refused(capfd, *train_runs.FOLDER, *out, "--teacher", str(teacher))
        assert_free(tmp_path / "run")
        return text

    assert "has 10 classes, the data has 3" in message(digits_run / "teacher")

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    pickled = tmp_path / "teacher.pt"
    torch.save({"fc.weight": Bomb()}, pickled)
    assert "is not a .safetensors file" in message(pickled)
    assert not (tmp_path / "executed").exists()

    damaged = tmp_path / "damaged.safetensors"
    content = bytearray((folder_run / "teacher" / "checkpoints" / "last.safetensors").read_bytes())
    content[-9] ^= 4
    damaged.write_bytes(content)
    assert "is damaged: its content does not match its checksum" in message(damaged)

    tensors, card = read_weights(folder_run / "teacher" / "checkpoints" / "last.safetensors")
    other = tmp_path / "other.safetensors"
    write_weights(other, tensors, card | {"class_names": ["ant", "bee", "dog"]})
    assert "has other classes than the data: 'dog' where the data has 'cow'" in message(other)

    assert "has no finished weights" in message(tmp_path)
