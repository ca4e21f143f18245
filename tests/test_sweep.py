"""A table of the paper as runs: rows and flags, finished runs are skipped, our numbers beside those of the paper."""

import json
import os
from pathlib import Path
from shutil import copytree

import pytest

from helpers.train_runs import status_of
from ltat_fast.config import to_json
from ltat_fast.flags import parse_args
from ltat_fast.reporting.paper_table import load_tables, plan, render
from ltat_fast.reporting.recipes import recipes

TABLES = load_tables()
QUICK = ("--epochs", "1", "--teacher-epochs", "1", "--max-steps", "1", "--attack-steps", "1", "--precision", "fp32")
QUICK += ("--eval-attacks", "clean,pgd20", "--limit-eval", "50")


def test_tables_hold_the_papers_numbers():
    ours = TABLES["1"]["experiments"][0]["rows"][-1]
    assert ours["name"] == "Ours"
    assert ours["paper"]["last"] == {"Clean": 71.74, "PGD": 37.8, "AA": 33.74, "T-Clean": 74.7, "T-PGD": 36.2}
    pgd_at = TABLES["2"]["experiments"][0]["rows"][0]
    assert pgd_at["paper"]["best"]["T-PGD"] is None, "missing from the paper's text"
    assert sorted(TABLES, key=int) == [str(number) for number in range(1, 11)]
    teacher = TABLES["6"]["experiments"][0]["rows"][-1]
    assert teacher["paper"] == {"last": {"Clean": 35.71, "PGD": 14.94, "T-Clean": 34.6, "T-PGD": 14.1}}


def test_a_table_on_its_own_dataset():
    rows = list(plan(TABLES["1"], Path("out"), extra=("--data-dir", "images")))
    assert [row.title for row in rows] == ["PGD-AT", "TRADES", "MART", "AWP", "RoBal", "REAT", "AT-BSL", "Ours"]
    (job,) = rows[-1].jobs
    flags = dict(zip(job.flags[::2], job.flags[1::2], strict=True))
    assert flags["--dataset"] == "cifar10-lt"
    assert flags["--arch"] == "resnet18"
    assert flags["--imbalance-ratio"] == "50"
    assert flags["--method"] == "ltat"
    assert flags["--data-dir"] == "images"


def test_another_dataset_brings_its_own_preset():
    rows = list(plan(TABLES["1"], Path("out"), "digits-lt"))
    assert "--arch" not in rows[0].jobs[0].flags
    assert "--imbalance-ratio" not in rows[0].jobs[0].flags


def test_a_table_over_ratios_keeps_them():
    rows = list(plan(TABLES["5"], Path("out"), "digits-lt", (3, 4)))
    assert len(rows) == 16
    assert rows[0].title == "RoBal IR 50"
    assert "--imbalance-ratio" in rows[0].jobs[0].flags
    folders = [job.run_dir for row in rows for job in row.jobs]
    assert len(set(folders)) == 32


def test_recipes_are_ltat_with_each_modifier_and_with_all():
    rows = list(plan(recipes("digits-lt"), Path("out"), "digits-lt", (0,)))
    assert [row.title for row in rows][:3] == ["AT-BSL", "LTAT", "LTAT + AWP"]
    assert rows[2].jobs[0].run_dir == Path("out/ltat-awp-seed0")
    flags = {row.title: row.jobs[0].flags for row in rows}
    single = [title for title in flags if title.startswith("LTAT + ") and title != "LTAT + all"]
    assert len(single) == 4
    own = len(flags["LTAT"])
    assert len(flags["LTAT + all"]) - own == sum(len(flags[title]) - own for title in single)
    for row in rows:
        parse_args(["--out", "unused", *row.jobs[0].flags])  # train takes them


def test_recipes_are_measured_on_held_out_images(tmp_path):
    rows = list(plan(recipes("digits-lt"), tmp_path, "digits-lt", (0,), images="heldout"))
    (job,) = rows[1].jobs
    assert job.flags[-6:-4] == ("--select-on", "heldout")
    job.run_dir.mkdir()
    (job.run_dir / "eval.json").write_text(json.dumps({"last": {"clean": {"all": 99.0}}}))
    record = {"epoch": 1, "heldout_clean": 80.0, "heldout_pgd20": 40.0, "heldout_tail_pgd20": 12.5}
    record |= {"heldout_balanced_clean": 70.0, "heldout_balanced_pgd20": 30.0}
    (job.run_dir / "metrics.jsonl").write_text(json.dumps(record))
    lines = render(rows, []).splitlines()
    assert "| LTAT | best | 1 | 80.00 | 40.00 | - | - | 12.50 | 70.00 | 30.00 |" in lines


def test_a_self_teacher_has_no_numbers_of_held_out_images(tmp_path):
    row = next(
        row for row in plan(TABLES["6"], tmp_path, "digits-lt", (0,), images="heldout") if "teacher" in row.eval_file
    )
    (job,) = row.jobs
    (job.run_dir / "teacher").mkdir(parents=True)
    (job.run_dir / "teacher" / "eval.json").write_text(json.dumps({"last": {"clean": {"all": 99.0}}}))
    (job.run_dir / "metrics.jsonl").write_text(json.dumps({"epoch": 1, "heldout_clean": 80.0, "heldout_pgd20": 40.0}))
    assert row.results() == []


def test_run_skip_and_render(tmp_path, capsys):
    sweep = ("--table", "10", "--dataset", "digits-lt", "--seeds", "0", "--out", str(tmp_path / "a table"))
    assert status_of("sweep", *sweep, "--", *QUICK) == 0
    assert "1 runs, 1 to do" in capsys.readouterr().out
    assert status_of("sweep", *sweep, "--", *QUICK) == 0
    assert "1 runs, 0 to do" in capsys.readouterr().out
    table = (tmp_path / "a table" / "table.md").read_text()
    assert table.count("| Ours |") == 2
    assert "46.35" not in table, "another dataset is not compared with the paper's"

    assert status_of("sweep", *sweep, "--", *QUICK, "--epochs", "2") == 1
    assert "ours-seed0 was started with other settings: epochs (1 -> 2)" in capsys.readouterr().out
    assert (tmp_path / "a table" / "table.md").read_text() == table, "nothing of it is of two epochs"
    other = copytree(tmp_path / "a table" / "ours-seed0", tmp_path / "a table" / "ours-seed1") / "config.json"
    other.write_text(json.dumps(json.loads(other.read_text()) | {"seed": 1, "lr": 0.5}))
    assert status_of("sweep", *sweep, "--seeds", "0", "1", "1", "--", *QUICK) == 1
    said = capsys.readouterr().out
    assert "ours-seed1 was started with other settings: lr (0.5 -> 0.1)" in said
    assert "2 runs, 0 to do" in said, "one run a seed, however often it is named"
    assert "| Ours | last | 1 |" in said, "the run of another learning rate is not of this table"


def test_a_failed_row_does_not_stop_the_others(tmp_path, capsys):
    sweep = ("--table", "10", "--dataset", "digits-lt", "--seeds", "0", "1", "--out", str(tmp_path))
    (tmp_path / "ours-seed0").write_text("a file where the run should be")
    assert status_of("sweep", *sweep, "--", *QUICK) == 1
    assert (tmp_path / "ours-seed1" / "eval.json").exists()
    said = capsys.readouterr().out
    assert f"ours-seed0 ltat_fast: error: --out {tmp_path / 'ours-seed0'} is a file, not a folder" in said


def test_the_table_says_which_rows_have_the_settings_of_the_authors(tmp_path):
    rows = list(plan(TABLES["1"], tmp_path, authors=True))
    with_authors = [row.title for row in rows if "--settings" in row.jobs[0].flags]
    assert with_authors == ["RoBal", "REAT"]
    for row in rows:
        (job,) = row.jobs
        config, method = parse_args(["--out", str(job.run_dir), *job.flags])
        assert config.settings == ("authors" if row.title in with_authors else "paper")
        assert job.run_dir.name == row.title.lower() + ("-authors" if row.title in with_authors else "") + "-seed0"
        job.run_dir.mkdir()
        (job.run_dir / "config.json").write_text(json.dumps(to_json(config, method)))
        (job.run_dir / "eval.json").write_text("{}")
    text = render(rows, [])
    assert "| RoBal, authors' settings | last | 1 |" in text
    assert text.count("authors") == 4
    assert not any("--settings" in row.jobs[0].flags for row in plan(TABLES["1"], tmp_path, "digits-lt", authors=True))


def test_the_papers_numbers_are_shown_beside_ours():
    rows = list(plan(TABLES["1"], Path("nowhere")))
    text = render(rows, TABLES["1"]["notes"])
    assert "| Ours | last | 0 | - (71.74) | - (37.8) | - (33.74) | - (74.7) | - (36.2) |" in text


def test_the_balanced_accuracy_is_a_column_of_a_test_set_that_is_not_balanced(tmp_path):
    rows = list(plan(TABLES["10"], tmp_path, "svhn-lt", seeds=(0, 1)))
    for i, job in enumerate(rows[0].jobs):
        job.run_dir.mkdir(parents=True)
        (job.run_dir / "eval.json").write_text(json.dumps({"last": {"clean": {"all": 80.0, "balanced": 70.0 + i}}}))
    head, _, _, last, *_ = render(rows, []).splitlines()
    assert head.endswith("| T-Clean | T-PGD | B-Clean | B-PGD |")
    assert last == "| Ours | last | 2 | 80.00 ± 0.00 | - | - | - | - | 70.50 ± 0.71 | - |"


def test_longer_baselines_have_the_epochs_of_teacher_and_student():
    for dataset, epochs in ((None, "130"), ("digits-lt", "60")):
        *longer, ours = plan(TABLES["9"], Path("out"), dataset)
        assert [row.title for row in longer][-1] == "AT-BSL longer"
        for row in longer:
            assert row.jobs[0].flags[row.jobs[0].flags.index("--epochs") + 1] == epochs
        assert "--epochs" not in ours.jobs[0].flags


def test_the_self_teacher_is_a_row_of_its_own(tmp_path):
    """Table 6 compares it with students, so the row uses the results of the teacher, not of its run."""
    rows = list(plan(TABLES["6"], tmp_path, seeds=(0, 1)))
    for row, score in ((rows[0], 50.0), (rows[-1], 70.0)):
        for i, job in enumerate(row.jobs):
            for file, extra in (("eval.json", 0), ("teacher/eval.json", -20)):
                (job.run_dir / file).parent.mkdir(parents=True, exist_ok=True)
                entry = {"clean": {"all": score + extra + i, "tail": None}}
                (job.run_dir / file).write_text(json.dumps({"last": entry}))
    lines = render(rows, []).splitlines()
    assert "| RoBal on D | last | 2 | 50.50 ± 0.71 | - | - | - | - |" in lines
    assert "| PGD-AT on D_B | last | 2 | 50.50 ± 0.71 (35.71) | - (14.94) | - | - (34.6) | - (14.1) |" in lines
    assert not any(line.startswith("| PGD-AT on D_B | best") for line in lines)


SLURM = """#!/bin/sh
cat "$1" >> "{}"
echo Submitted batch job 4711
"""


def test_rows_as_slurm_jobs(tmp_path, monkeypatch, capsys):
    """Uses the real submitit, with an sbatch that records its input."""
    pytest.importorskip("submitit")
    scripts = tmp_path / "scripts"
    (tmp_path / "bin").mkdir()
    for name in ("sbatch", "srun"):
        (tmp_path / "bin" / name).write_text(SLURM.format(scripts))
        (tmp_path / "bin" / name).chmod(0o755)
    sweep = ("--table", "10", "--dataset", "digits-lt", "--seeds", "0", "3", "--out", str(tmp_path / "table"))
    sweep += ("--slurm-partition", "gpu-long", "--slurm-minutes", "90")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert status_of("sweep", *sweep) == 2
    assert "needs Slurm, but sbatch is not on the PATH" in capsys.readouterr().err

    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    assert status_of("sweep", *sweep, "--", "--epochs", "1") == 0
    assert "ours-seed3: Slurm job 4711" in capsys.readouterr().out
    text = scripts.read_text()
    for line in ("--partition=gpu-long", "--time=90", "--gpus-per-node=1", "--job-name=ours-seed0"):
        assert f"#SBATCH {line}\n" in text
    assert text.count("#SBATCH --job-name") == 2
    assert not (tmp_path / "table" / "ours-seed0").exists(), "nothing has run here"


@pytest.mark.parametrize("flag", ["--seed", "--out=here", "--resume"])
def test_flags_that_differ_between_runs_are_not_forwarded(flag, tmp_path, capsys):
    assert status_of("sweep", "--table", "10", "--out", str(tmp_path / "table"), "--", flag, "7") == 2
    assert f"{flag.partition('=')[0]} cannot stand after --, because each run gets its own" in capsys.readouterr().err
    assert not (tmp_path / "table").exists()


@pytest.mark.parametrize("flags", [("--table", "11"), ("--table", "1", "--dataset", "mnist")])
def test_unknown_names(flags, capsys):
    assert status_of("sweep", *flags) == 2
    assert "choose one of" in capsys.readouterr().err
