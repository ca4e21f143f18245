"""Configuration: what a preset says, what wins over it, what is refused, and what a resumed run may change."""

import dataclasses
import json
import math
import os
import subprocess
import sys

import pytest

from ltat_fast import config as configuration
from ltat_fast.config import METHOD_PRESETS, PRESETS, Config, differences, parse_fraction
from ltat_fast.errors import UserError
from ltat_fast.flags import parse_args
from ltat_fast.methods import METHODS
from ltat_fast.methods.at_bsl import AtBsl
from ltat_fast.methods.ltat import Ltat
from ltat_fast.schedule import learning_rate


def parse(*flags: str):
    return parse_args(list(flags))


# -- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [("8/255", 8 / 255), ("0.031", 0.031), ("1", 1.0), (" 2 / 255 ", 2 / 255), ("1e-3", 1e-3), ("0.5/255", 0.5 / 255)],
)
def test_fractions_and_decimals(text, value):
    assert parse_fraction(text) == value


@pytest.mark.parametrize("text", ["abc", "", "8/", "/255", "8/0", "8/255/2", "8:255", "0x8", "8//255", "8/255 px"])
def test_what_is_no_number(text):
    with pytest.raises(UserError, match=r"^--eps takes a fraction such as 8/255 or a decimal such as 0\.031, not "):
        parse_fraction(text, "eps")


@pytest.mark.parametrize("text", ["-1", "0", "0/255", "1.01", "256/255", "nan", "inf", "-inf", "1e400", "1e999999999"])
def test_numbers_out_of_range(text):
    with pytest.raises(UserError, match=r"^--eps must be above 0 and at most 1 \(pixels are in \[0, 1\]\), not "):
        parse_fraction(text, "eps")


# -- presets --------------------------------------------------------------------------------------------------------

PAPER = {
    "epochs": 100,
    "teacher_epochs": 30,
    "batch_size": 128,
    "teacher_batch_size": 32,
    "lr": 0.1,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "lr_schedule": "step",
    "gamma": None,
    "eps": "8/255",
    "step_size": "2/255",
    "attack_steps": 10,
    "augment": "none",
    "select_on": "auto",
}


@pytest.mark.parametrize(
    ("dataset", "arch", "imbalance_ratio"),
    [
        ("cifar10-lt", "resnet18", 50.0),
        ("cifar100-lt", "resnet18", 10.0),
        ("svhn-lt", "resnet18", 50.0),
        ("tinyimagenet-lt", "preactresnet18", 10.0),
        ("imagefolder-lt", "resnet18", None),
    ],
)
def test_presets_carry_the_papers_settings(dataset, arch, imbalance_ratio):
    config, method = parse("--dataset", dataset)
    assert dataclasses.asdict(config).items() >= (PAPER | {"arch": arch, "imbalance_ratio": imbalance_ratio}).items()
    assert method == Ltat(alpha=20.0, ramp="linear", kl_weight=0.0, temperature=1.0, tau=1.0)


def test_the_default_is_ltat_on_the_embedded_digits():
    config, method = parse()
    assert (config.dataset, config.method, config.arch) == ("digits-lt", "ltat", "smallresnet")
    assert (config.eps, config.step_size, config.lr_schedule) == ("0.1", "0.025", "onecycle")
    assert method == Ltat(**METHOD_PRESETS["digits-lt", "ltat"])


def test_every_dataset_has_a_preset():
    from ltat_fast.data import DATASETS

    assert set(PRESETS) == set(DATASETS)


def test_flags_win_over_the_preset():
    config, _ = parse("--dataset", "cifar10-lt", "--imbalance-ratio", "100", "--epochs", "7", "--eps", "0.031")
    assert (config.imbalance_ratio, config.epochs, config.eps) == (100.0, 7, "0.031")
    assert config.teacher_epochs == 30
    same, _ = parse("--eps=0.031", "--dataset=cifar10-lt", "--epochs=7", "--imbalance_ratio=100")
    assert same == config


@pytest.mark.parametrize(
    ("method", "dataset", "expected"),
    [
        ("robal", "cifar10-lt", (80, 64, 2e-4)),
        ("robal", "cifar100-lt", (80, 64, 2e-4)),
        ("reat", "cifar10-lt", (80, 128, 5e-4)),
        ("reat", "cifar100-lt", (80, 128, 5e-4)),
    ],
)
def test_the_settings_of_the_authors(method, dataset, expected):
    paper, _ = parse("--dataset", dataset, "--method", method)
    authors, options = parse("--dataset", dataset, "--method", method, "--settings", "authors")
    assert (authors.epochs, authors.batch_size, authors.weight_decay) == expected
    rates = [learning_rate(authors.lr_schedule, authors.lr, epoch, 0, 80, 1) for epoch in range(80)]
    assert rates == pytest.approx([0.1] * 60 + [0.01] * 15 + [0.001] * 5)
    changed = {"settings", "epochs", "batch_size", "weight_decay", "lr", "lr_schedule"}
    same = {name: value for name, value in dataclasses.asdict(paper).items() if name not in changed}
    assert dataclasses.asdict(authors).items() >= same.items(), "network, threat model and data are those of the paper"
    assert options == parse("--dataset", dataset, "--method", method)[1]


def test_a_flag_wins_over_the_settings_of_the_authors(tmp_path):
    flags = ("--settings", "authors", "--method", "robal", "--dataset", "cifar10-lt", "--epochs", "7", "--lr", "0.2")
    config, method = parse(*flags, "--out", str(tmp_path / "run"))
    assert (config.settings, config.epochs, config.lr, config.batch_size) == ("authors", 7, 0.2, 64)
    run = stored(tmp_path / "run", config, method)
    assert configuration.load(run) == (config, method)
    assert parse("--out", str(run), "--resume")[0] == dataclasses.replace(config, resume=True)


def test_method_flags():
    _, method = parse("--method", "ltat", "--alpha", "40", "--ramp", "constant", "--kl-weight", "0.5")
    assert method == Ltat(alpha=40.0, ramp="constant", kl_weight=0.5)
    _, method = parse("--tau", "1.5", "--method=at-bsl")
    assert method == AtBsl(tau=1.5)


def test_modifiers_of_any_method():
    flags = "--awp 0.005 --awp-from 10 --ema 0.995 --eps-balance 0.3 --eps-warmup 0.8 --modify-teacher"
    config, _ = parse(*flags.split())
    modifiers = {"awp": 0.005, "awp_from": 10, "ema": 0.995, "eps_balance": 0.3, "eps_warmup": 0.8}
    assert configuration.changed_modifiers(dataclasses.asdict(config)) == modifiers | {"modify_teacher": True}
    assert configuration.changed_modifiers(dataclasses.asdict(parse()[0])) == {}
    assert parse("--method", "awp", "--awp-from", "10")[0].awp is None


def test_run_folder():
    assert str(parse("--method", "at-bsl", "--seed", "3")[0].run_dir) == "runs/digits-lt-at-bsl-smallresnet-seed3"
    assert str(parse("--out", "some where/run")[0].run_dir) == "some where/run"


@pytest.mark.parametrize("name", METHODS)
def test_help_of_every_method(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse("--method", name, "--help")
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for field in [*dataclasses.fields(Config), *dataclasses.fields(METHODS[name])]:
        assert f"--{field.name.replace('_', '-')}" in text, field.name


# -- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--dataset mnist", "unknown dataset 'mnist': choose one of cifar10-lt, .*digits-lt"),
        ("--method trade", "unknown method 'trade': choose one of .*ltat"),
        ("--arch resnet19", "unknown arch 'resnet19': choose one of .*resnet18"),
        ("--imbalance-ratio 0.5", "--imbalance-ratio must be 1 .* not 0.5"),
        ("--imbalance-ratio -3", "--imbalance-ratio must be 1 .* not -3"),
        ("--imbalance-ratio nan", "--imbalance-ratio must be 1 .* not nan"),
        ("--imbalance-ratio inf", "--imbalance-ratio must be 1 .* not inf"),
        ("--imbalance-ratio None", "digits-lt needs a number"),
        ("--eps 8/0", "--eps takes a fraction"),
        ("--eps -1", "--eps must be above 0"),
        ("--step-size 0", "--step-size must be above 0"),
        ("--epochs 0", "--epochs must be 1 or more"),
        ("--teacher-epochs -1", "--teacher-epochs must be 1 or more"),
        ("--batch-size 0", "--batch-size must be 1 or more"),
        ("--attack-steps 0", "--attack-steps must be 1 or more"),
        ("--accumulate 0", "--accumulate must be 1 or more"),
        ("--batch-size 30 --accumulate 4", "--batch-size 30 does not split evenly over --accumulate 4: .* of 4$"),
        ("--teacher-batch-size 6 --accumulate 4", "--teacher-batch-size 6 does not split evenly over --accumulate 4"),
        ("--limit-eval 0", "--limit-eval must be 1 or more"),
        ("--limit-autoattack 0", "--limit-autoattack must be 1 or more"),
        ("--max-steps 0", "--max-steps must be 1 or more"),
        ("--eval-every 0", "--eval-every must be 1 or more"),
        ("--log-every 0", "--log-every must be 1 or more"),
        ("--lr 0", "--lr must be a positive number"),
        ("--lr nan", "--lr must be a positive number"),
        ("--gamma -1", "--gamma must be a positive number"),
        ("--save-minutes 0", "--save-minutes must be a positive number"),
        ("--momentum 1", "--momentum must be at least 0 and below 1"),
        ("--momentum nan", "--momentum must be at least 0 and below 1"),
        ("--label-smoothing 1", "--label-smoothing must be at least 0 and below 1, not 1"),
        ("--label-smoothing -0.1", "--label-smoothing must be at least 0 and below 1, not -0.1"),
        ("--label-smoothing nan", "--label-smoothing must be at least 0 and below 1, not nan"),
        ("--weight-decay -1", "--weight-decay must be 0 or more"),
        ("--select-on heldout --heldout 1", "--heldout must be a share between 0 and 1"),
        ("--image-size 32", "--image-size is for imagefolder-lt and imagelist-lt and parquet-lt and imagenet-lt"),
        ("--store-size 40", "--store-size is for imagefolder-lt and imagelist-lt and parquet-lt and imagenet-lt"),
        ("--dataset imagefolder-lt --store-size 40", "--store-size 40 without --image-size: it is the size from which"),
        ("--dataset imagelist-lt --image-size 64 --store-size 40", "--store-size 40 smaller than --image-size 64: it"),
        ("--method pgd-at --teacher x", "--teacher is not used by --method pgd-at"),
        (
            "--settings authors",
            "--settings authors: those for ltat on digits-lt are not known, only those for reat on c",
        ),
        (
            "--settings authors --method robal --dataset tinyimagenet-lt",
            "for robal on tinyimagenet-lt are not known, only those for .*robal on cifar100-lt",
        ),
        ("--compile graph --device cpu", "--compile graph .* needs a GPU"),
        ("--eval-attacks pgd,clean", "unknown attack 'pgd': choose from"),
        ("--eval-attacks ,", "no attack named: choose from"),
        ("--alpha nan", "--alpha must be 0 or more"),
        ("--alpha -1", "--alpha must be 0 or more"),
        ("--temperature 0", "--temperature must be above 0"),
        ("--awp -0.01", "--awp must be 0 or more and finite, not -0.01"),
        ("--awp inf", "--awp must be 0 or more and finite, not inf"),
        ("--awp 0.01 --awp-from 0", "--awp-from must be 1 or more, not 0"),
        ("--awp-from 10", "--awp-from has no effect without a weight perturbation: add --awp"),
        ("--method awp --awp 0 --awp-from 10", "--awp-from has no effect without a weight perturbation"),
        ("--ema 1", "--ema must be at least 0 and below 1, not 1"),
        ("--ema nan", "--ema must be at least 0 and below 1, not nan"),
        ("--eps-balance 1", "--eps-balance must be at least 0 and below 1, not 1"),
        ("--eps-balance -0.1", "--eps-balance must be at least 0 and below 1, not -0.1"),
        ("--eps-balance 0.3 --eps-warmup 1.1", "--eps-warmup must be a share of the epochs between 0 and 1, not 1.1"),
        ("--eps-warmup 0.5", "--eps-warmup has no effect without --eps-balance"),
        ("--method natural --eps-balance 0.3", "--eps-balance is for the training attack, and --method natural has no"),
        ("--modify-teacher", "--modify-teacher has no effect with these modifiers"),
        ("--modify-teacher --awp 0", "--modify-teacher has no effect with these modifiers"),
        ("--modify-teacher --eps-balance 0.3", "--modify-teacher has no effect with these modifiers"),
        ("--awp 0.01 --awp-from 9 --epochs 5", "--awp-from 9 is after the last epoch, 5"),
        ("--kl-prior", "--kl-prior has no effect without --kl-weight"),
        ("--attack n-fgsm --noise gaussian", "--noise has no effect with --attack n-fgsm"),
        ("--attack n-fgsm --method natural", "--attack is not used by --method natural"),
        (
            "--modify-teacher --ema 0.9 --method pgd-at",
            "--modify-teacher is for a run that trains a teacher of its own",
        ),
        ("--modify-teacher --ema 0.9 --teacher x", "--modify-teacher is for a run that trains a teacher of its own"),
    ],
)
def test_refused(flags, words):
    with pytest.raises(UserError, match=words) as error:
        parse(*flags.split())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "flags",
    [
        "--bogus",
        "--settings author",
        "--epochs x",
        "--method pgd-at --alpha 3",
        "--augment cutmix",
        "--dataset",
        "stray",
    ],
)
def test_unknown_flags_and_values_exit_2_with_nothing_but_their_own_complaint(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(*flags.split())
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert "usage: " not in err  # one complaint, not a second one from the first look at the flags
    assert (out + err).count("--help") == 1


# -- what is stored and read back -----------------------------------------------------------------------------------


def stored(folder, config, method):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(configuration.to_json(config, method)))
    return folder


def test_what_is_stored_comes_back(tmp_path):
    flags = [
        "--teacher",
        "a b/t.safetensors",
        "--data-dir",
        "d",
        "--gamma",
        "2.5",
        "--limit-eval",
        "64",
        "--alpha",
        "3",
    ]
    config, method = parse(*flags, "--out", str(tmp_path / "run"))
    assert configuration.load(stored(tmp_path / "run", config, method)) == (config, method)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        "3",
        "\x00\xff",
        '{"method": "ltat", "epochs": "many"}',
        '{"method": "ltat", "eps": null}',
        '{"method": ["ltat"]}',
        '{"method": "ltat", "method_options": {"beta": 1}}',
        '{"method": "ltat", "method_options": 3}',
    ],
)
def test_a_damaged_config_is_one_sentence(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"config\.json cannot be read as a run's configuration") as error:
        configuration.load(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"colour": 1}', "this version does not know its settings colour"),
        ('{"method": "mart2"}', "unknown method 'mart2'"),
        ('{"epochs": 0}', "--epochs must be 1 or more"),
        (
            '{"method": "awp", "method_options": {"awp_base": "trades", "awp_gamma": null}}',
            "this version has no options awp_base, awp_gamma of --method awp",
        ),
    ],
)
def test_a_config_of_another_version_is_told(tmp_path, content, words):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=words):
        configuration.load(tmp_path)


def test_no_config_no_run(tmp_path):
    with pytest.raises(UserError, match=r"is not a run: it has no config\.json"):
        configuration.load(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"is not a run: it has no config\.json"):
        configuration.load(tmp_path / "file")


# -- resuming -------------------------------------------------------------------------------------------------------


def test_resume_takes_the_runs_own_settings(tmp_path):
    flags = [
        "--dataset",
        "cifar10-lt",
        "--method",
        "at-bsl",
        "--tau",
        "2",
        "--epochs",
        "7",
        "--out",
        str(tmp_path / "a"),
    ]
    config, method = parse(*flags)
    run = stored(tmp_path / "a", config, method)
    resumed, resumed_method = parse("--out", str(run), "--resume")
    assert resumed == dataclasses.replace(config, resume=True)
    assert resumed_method == method
    moved = run.rename(tmp_path / "b")
    assert parse("--out", str(moved), "--resume")[0].run_dir == moved


def test_the_same_flags_again_differ_in_nothing(tmp_path):
    flags = ["--epochs", "7", "--alpha", "3", "--out", str(tmp_path / "a")]
    run = stored(tmp_path / "a", *parse(*flags))
    assert differences(*configuration.load(run), *parse(*flags, "--resume")) == []


@pytest.mark.parametrize(
    ("flags", "changed"),
    [
        (["--lr", "0.2"], ["lr (0.1 -> 0.2)"]),
        (["--epochs", "9", "--seed", "1"], ["epochs (40 -> 9)", "seed (0 -> 1)"]),
        (["--tau", "7"], ["tau (1.0 -> 7.0)"]),
        (["--ema", "0.9"], ["ema (0.0 -> 0.9)"]),
        (["--label-smoothing", "0.1"], ["label_smoothing (0.0 -> 0.1)"]),
        (["--activation", "silu"], ["activation (relu -> silu)"]),
        (["--method", "pgd-at"], ["method (ltat -> pgd-at)"]),
        (["--dataset", "cifar10-lt"], ["dataset (digits-lt -> cifar10-lt)"]),
        (["--teacher", "x"], ["teacher (None -> x)"]),
        (["--data-dir", "x", "--save-minutes", "1", "--device", "cpu", "--eval-batch-size", "8"], []),
    ],
)
def test_differences_name_the_settings(tmp_path, flags, changed):
    run = stored(tmp_path / "a", *parse("--out", str(tmp_path / "a")))
    assert differences(*configuration.load(run), *parse("--out", str(run), "--resume", *flags)) == changed


def test_a_run_of_a_version_without_modifiers_can_be_resumed(tmp_path):
    config, method = parse("--out", str(tmp_path / "a"))
    run = stored(tmp_path / "a", config, method)
    content = json.loads((run / "config.json").read_text())
    for field in dataclasses.fields(configuration.ModifierSettings):
        del content[field.name]
    (run / "config.json").write_text(json.dumps(content))
    assert configuration.load(run) == (config, method)


def test_no_setting_is_both_checked_and_free():
    names = {field.name for field in dataclasses.fields(Config)}
    assert names >= configuration.FREE_ON_RESUME
    assert math.isfinite(Config.save_minutes)


@pytest.mark.parametrize(("given", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_idle_threads_wait_unless_asked_to_spin(given, expected):
    """Set before torch, and with it OpenMP, is loaded, which reads it once."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_DISPLAY_ENV": "true"} | ({"OMP_WAIT_POLICY": given} if given else {})
    run = [sys.executable, "-c", "import ltat_fast.train, torch"]
    shown = subprocess.run(run, env=environment, capture_output=True, text=True, check=True).stderr
    assert f"OMP_WAIT_POLICY = '{expected}'" in shown


@pytest.mark.parametrize("recorded", ["test", "val", "heldout"])
def test_auto_is_what_the_run_on_disk_chose(recorded):
    """The sweep compares its flags, without --select-on, with what a finished run recorded."""
    asked, method = parse()
    old = dataclasses.replace(asked, select_on=recorded)
    expected = ["select_on (heldout -> auto)"] if recorded == "heldout" else []
    assert differences(old, method, asked, method) == expected
    assert differences(old, method, dataclasses.replace(asked, select_on="test"), method) == (
        [] if recorded == "test" else [f"select_on ({recorded} -> test)"]
    )


def test_a_batch_splits_over_processes_and_micro_batches():
    config, method = parse("--batch-size", "24", "--teacher-batch-size", "32", "--accumulate", "4")
    configuration.validate_batches(config, method, processes=2)
    with pytest.raises(UserError, match="--batch-size 24 does not split evenly over 4 processes with --accumulate 4"):
        configuration.validate_batches(config, method, processes=4)
    unused = ("--method", "pgd-at", "--batch-size", "24", "--teacher-batch-size", "30", "--accumulate", "4")
    configuration.validate_batches(*parse(*unused))


def test_micro_batches_are_part_of_the_experiment():
    (old, method), (new, _) = parse(), parse("--accumulate", "2")
    assert differences(old, method, new, method) == ["accumulate (1 -> 2)"]
