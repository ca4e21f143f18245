"""A sweep over one option of LTAT: the runs, which are kept when finished, and their means and deviations."""

import csv
import json
import statistics
from pathlib import Path

import pytest

from helpers import small_disks
from helpers.train_runs import status_of
from ltat_fast import sensitivity
from ltat_fast.analysis.sensitivity import collect, draw, plan

QUICK = ("--epochs", "1", "--teacher-epochs", "1", "--max-steps", "1", "--attack-steps", "1", "--precision", "fp32")
QUICK += ("--limit-eval", "50")


def test_the_runs():
    values = (10.0, 0.5, 0.5 + 1e-9)
    jobs = plan("gamma", values, (3, 4, 3), Path("out"), dataset="digits-lt", extra=("--epochs", "7"))
    assert list(jobs) == [0.5, 10.0]
    assert [job.run_dir for job in jobs[0.5]] == [Path("out/gamma0.5-seed3"), Path("out/gamma0.5-seed4")]
    flags = jobs[10.0][1].flags
    given = dict(zip(flags[::2], flags[1::2], strict=True))
    assert given == {
        "--dataset": "digits-lt",
        "--method": "ltat",
        "--select-on": "test",
        "--eval-attacks": "clean,pgd20",
        "--gamma": "10",
        "--seed": "4",
        "--epochs": "7",
    }


def written(folder, scores):
    """Write the files of a finished run. scores: clean, clean tail, PGD-20, PGD-20 tail."""
    folder.mkdir(parents=True)
    clean, tail_clean, pgd, tail_pgd = scores
    result = {"clean": {"all": clean, "tail": tail_clean}, "pgd20": {"all": pgd, "tail": tail_pgd}}
    config = {"dataset": "digits-lt", "method": "ltat", "arch": "smallresnet", "imbalance_ratio": 10}
    config |= {"select_on": "test", "seed": 0, "eps": "0.1"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "eval.json").write_text(json.dumps({"best": result, "last": {"clean": {"all": 1.0, "tail": None}}}))


def test_means_and_deviations(tmp_path):
    jobs = plan("alpha", (1.0, 3.0, 9.0), (0, 1, 2), tmp_path, dataset="digits-lt")
    scores = [(90, 80, 50, 20), (92, 81, 53, 22), (91, 88, 55, 30)]
    for job, of_seed in zip(jobs[1.0], scores, strict=True):
        written(job.run_dir, of_seed)
    written(jobs[3.0][0].run_dir, (70, 60, 40, 10))
    entries = collect("alpha", jobs, "test")
    found = {(e.value, e.checkpoint, e.attack, e.group): e for e in entries}
    assert len(found) == len(entries) == 2 * (4 + 1), (
        "nothing for 9, which has not run, and no tail where there is none"
    )
    for column, key in enumerate((("clean", "all"), ("clean", "tail"), ("pgd20", "all"), ("pgd20", "tail"))):
        entry, values = found[(1.0, "best", *key)], [of_seed[column] for of_seed in scores]
        assert entry.mean == pytest.approx(sum(values) / 3)
        assert entry.std == pytest.approx(statistics.stdev(values))
        assert (entry.option, entry.seeds) == ("alpha", 3)
    single = found[3.0, "best", "pgd20", "tail"]
    assert (single.mean, single.std, single.seeds) == (10, 0, 1)

    everything, tail = draw("alpha", "digits-lt", entries).axes
    assert "tail" in tail.get_title()
    curves = {c.get_label(): c.lines[0].get_xydata().tolist() for c in tail.containers}
    assert curves["PGD-20, best"] == [[1, 24], [3, 10]]
    assert curves["clean, last"] == []
    curves = {c.get_label(): c.lines[0].get_xydata().tolist() for c in everything.containers}
    assert curves["clean, best"] == [[1, 91], [3, 70]]
    assert curves["clean, last"] == [[1, 1], [3, 1]]


def test_finished_runs_are_kept(tmp_path, capsys):
    out = tmp_path / "over alpha"
    sweep = ("--option", "alpha", "--values", "0", "10", "--out", str(out))
    assert status_of("sensitivity", *sweep, "--", *QUICK) == 0
    assert "2 runs, 2 to do" in capsys.readouterr().out
    first = (out / "sensitivity.csv").read_text()
    assert status_of("sensitivity", *sweep, "--", *QUICK) == 0
    assert "2 runs, 0 to do" in capsys.readouterr().out
    assert (out / "sensitivity.csv").read_text() == first

    # Runs with a flag that is changed, left out or unknown are refused; flags that do not change results are not.
    others = {
        "epochs (1 -> 2)": (*QUICK, "--epochs", "2"),
        "limit_eval (50 -> None)": QUICK[:-2],
        "eval_attacks (clean,pgd20 -> clean)": (*QUICK, "--eval-attacks", "clean"),
        "train does not take": (*QUICK, "--epoch", "2"),
    }
    for reason, flags in others.items():
        assert status_of("sensitivity", *sweep, "--", *flags) == 1
        said = capsys.readouterr().out
        assert "2 runs, 0 to do" in said
        for name in ("alpha0-seed0", "alpha10-seed0"):
            (line,) = [line for line in said.splitlines() if line.startswith(name)]
            assert reason in line
        assert "±" not in said, "numbers of other settings are not its numbers"
        assert (out / "sensitivity.csv").read_text() == first
    assert status_of("sensitivity", *sweep, "--", *QUICK, "--eval-batch-size", "25", "--device", "cpu") == 0
    damaged = out / "alpha0-seed0" / "config.json"
    whole = damaged.read_text()
    damaged.write_text(whole[:-9])
    capsys.readouterr()
    assert status_of("sensitivity", *sweep, "--", *QUICK) == 1
    said = capsys.readouterr().out
    assert "alpha0-seed0 is kept as it is" in said
    assert f"{damaged} cannot be read" in said
    assert [line for line in said.splitlines() if "±" in line] != []
    assert "alpha 0," not in said
    damaged.write_text(whole)
    assert status_of("sensitivity", *sweep, "--", *QUICK) == 0
    assert (out / "sensitivity.png").stat().st_size > 5000
    lines = list(csv.DictReader(first.splitlines()))
    assert len(lines) == 2 * 2 * 2 * 2
    for value in ("0.0", "10.0"):
        folder = out / f"alpha{float(value):g}-seed0"
        assert json.loads((folder / "config.json").read_text())["method_options"]["alpha"] == float(value)
        results = json.loads((folder / "eval.json").read_text())
        for line in lines:
            if line["value"] == value:
                score = results[line["checkpoint"]][line["attack"]][line["group"]]
                assert float(line["mean"]) == pytest.approx(score)


def test_a_full_disk(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sensitivity, "outstanding", lambda jobs: ([], []))
    with small_disks.file_system(tmp_path / "disk", "32k") as disk:
        written(disk / "alpha1-seed0", (90, 80, 50, 20))
        (disk / "sensitivity.png").write_text("the old one")
        assert status_of("sensitivity", "--values", "1", "--out", str(disk)) == 2
        said = capsys.readouterr()
        assert f"cannot write {disk / 'sensitivity.png'}: No space left on device" in said.err
        assert "alpha 1, best, pgd20, tail: 20.00" in said.out
        assert {path.name for path in disk.iterdir()} == {"alpha1-seed0", "sensitivity.csv", "sensitivity.png"}
        assert (disk / "sensitivity.png").read_text() == "the old one"


def test_accuracy_on_held_out_images(tmp_path):
    """Uses the accuracies on the held-out images of the best and the last epoch, and never the test images."""
    flags = ("--option", "kl_weight", "--values", "0.5", "--images", "heldout", "--out", str(tmp_path))
    assert status_of("sensitivity", *flags, "--", *QUICK, "--epochs", "3", "--eval-every", "1") == 0
    folder = tmp_path / "kl_weight0.5-seed0"
    config = json.loads((folder / "config.json").read_text())
    assert (config["select_on"], config["method_options"]["kl_weight"]) == ("heldout", 0.5)

    scores = [{"pgd20": p, "clean": 80 + p, "tail_pgd20": p / 2, "tail_clean": p / 4} for p in (10.0, 30.0, 30.0, 20.0)]
    records = [{f"heldout_{k}": v for k, v in entry.items()} | {"epoch": i + 1} for i, entry in enumerate(scores)]
    records[2]["heldout_clean"] = 0.0
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert status_of("sensitivity", *flags, "--", *QUICK, "--epochs", "3", "--eval-every", "1") == 0
    lines = list(csv.DictReader((tmp_path / "sensitivity.csv").read_text().splitlines()))
    found = {(line["checkpoint"], line["attack"], line["group"]): float(line["mean"]) for line in lines}
    assert found == {
        ("best", "clean", "all"): 110,
        ("best", "clean", "tail"): 7.5,
        ("best", "pgd20", "all"): 30,
        ("best", "pgd20", "tail"): 15,
        ("last", "clean", "all"): 100,
        ("last", "clean", "tail"): 5,
        ("last", "pgd20", "all"): 20,
        ("last", "pgd20", "tail"): 10,
    }


@pytest.mark.parametrize(
    ("flags", "message"),
    [(("--dataset", "mnist"), "unknown dataset 'mnist'"), (("--seeds",), "need at least one number each")],
)
def test_refusals(flags, message, capfd):
    assert status_of("sensitivity", "--values", "1", *flags) == 2
    assert message in capfd.readouterr().err
