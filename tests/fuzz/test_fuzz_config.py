"""Every flag gets values of every kind: config.json gives back the same configuration, or UserError is raised."""

import dataclasses
import json
import typing
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ltat_fast import config as configuration
from ltat_fast.config import PRESETS, Config, from_json, to_json
from ltat_fast.errors import UserError
from ltat_fast.flags import parse_args
from ltat_fast.methods import METHODS
from ltat_fast.models import ARCHS


def examples(number: int) -> settings:
    """Return settings for ``number`` examples, the same in every run."""
    slow = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    return settings(max_examples=number, deadline=None, derandomize=True, database=None, suppress_health_check=slow)


count = st.integers(1, 10**6)
positive = st.floats(1e-9, 1e9)
share = st.floats(0.001, 0.999)
fraction = st.one_of(st.floats(1e-6, 1).map(str), st.integers(1, 255).map(lambda n: f"{n}/255"))
text = st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), max_size=20)
name = text.filter(lambda value: value and value[0] != "-" and value != "None")  # possible names of a path
VALID = {
    "dataset": st.sampled_from(sorted(PRESETS)),
    "method": st.sampled_from(sorted(METHODS)),
    "arch": st.sampled_from(sorted(ARCHS)),
    "imbalance_ratio": st.floats(1, 1e6),
    "data_dir": name.map(Path),
    "image_size": st.none(),
    "store_size": st.none(),
    "bad_images": st.just("stop"),
    "accumulate": st.just(1),
    "out": name.map(Path),
    "lr": positive,
    "lr_schedule": st.sampled_from(["step", "igdm", "rslad", "onecycle", "0.5", "0.5,0.8", "1e-3,0.999"]),
    "momentum": share,
    "weight_decay": positive,
    "gamma": positive,
    "settings": st.just("paper"),
    "teacher": st.none(),
    "init": st.one_of(st.just("none"), name.map(lambda value: f"{value}.safetensors")),
    "eps": fraction,
    "step_size": fraction,
    "compile": st.sampled_from(["auto", "none", "step"]),
    "seed": st.integers(-(10**9), 2**63),
    "heldout": share,
    "label_smoothing": st.just(0.0),  # some methods refuse another value
    "eval_attacks": st.lists(st.sampled_from(["clean", "fgsm", "pgd20", "cw20"]), min_size=1, unique=True).map(
        ",".join
    ),
    "save_minutes": positive,
    "resume": st.just(False),
    "awp_from": st.just(1),  # the other values need --awp
    "eps_balance": st.just(0.0),  # not with a method without an attack
    "eps_warmup": st.just(0.0),
    "modify_teacher": st.just(False),
}


def valid(owner: type, field: dataclasses.Field) -> st.SearchStrategy:
    """Return values that are valid for ``field`` whatever the other fields are."""
    kind = typing.get_type_hints(owner)[field.name]
    if owner is Config and field.name in VALID:
        return VALID[field.name]
    if typing.get_origin(kind) is Literal:
        return st.sampled_from(typing.get_args(kind))
    return {bool: st.booleans(), float: share}.get(kind, count)


@st.composite
def flags(draw) -> dict[str, tuple[type, object]]:
    """Draw some flags with valid values. Return the class of each field and its value, by field name."""
    chosen = {"method": (Config, draw(VALID["method"]))}
    for owner in (Config, METHODS[chosen["method"][1]]):
        fields = [field for field in dataclasses.fields(owner) if field.name != "method"]
        for field in draw(st.permutations(fields))[: draw(st.integers(0, 8))]:
            chosen[field.name] = owner, draw(valid(owner, field))
    return chosen


def command_line(chosen: dict) -> list[str]:
    line = []
    for key, (_, value) in chosen.items():
        flag = key.replace("_", "-")
        if value is True or value is False:
            line.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            line += [f"--{flag}={value}"] if str(value).startswith("-") else [f"--{flag}", str(value)]
    return line


def through_a_file(config: Config, method) -> tuple:
    return from_json(json.loads(json.dumps(to_json(config, method))))


@examples(40)
@given(flags())
def test_valid_flags_are_stored_and_loaded_again(chosen):
    config, method = parse_args(command_line(chosen))
    for key, (owner, value) in chosen.items():
        if value is not None:
            assert getattr(config if owner is Config else method, key) == value, key
    assert through_a_file(config, method) == (config, method)


ALL_FLAGS = {
    field.name.replace("_", "-"): method
    for method in sorted(METHODS)
    for field in (*dataclasses.fields(METHODS[method]), *dataclasses.fields(Config))
}
ODD = (
    "",
    "None",
    "nan",
    "-inf",
    "1e999",
    "-1",
    "0",
    "1.5",
    "9" * 400,
    "9" * 5000,
    "True",
    "8/0",
    "--",
    "-x",
    "{}",
    "@x",
)


@examples(60)
@given(
    st.sampled_from(sorted(ALL_FLAGS)),
    st.one_of(st.sampled_from(ODD), text, st.floats().map(str), st.integers().map(str)),
    st.booleans(),
)
def test_any_text_for_any_flag_is_accepted_or_refused(capsys, flag, value, joined):
    line = ["--method", ALL_FLAGS[flag]] * (flag != "method")
    line += [f"--{flag}={value}"] if joined else [f"--{flag}", value]
    try:
        config, method = parse_args(line)
    except (UserError, SystemExit) as refused:
        status = refused.code if isinstance(refused, SystemExit) else 2  # an error of the parser, or --help
        if status not in (0, 2):
            raise
    else:
        assert through_a_file(config, method) == (config, method)
    capsys.readouterr()


anything = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), text, st.sampled_from([10**400, -(2**63), 2**53])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=5,
)


@examples(400)
@given(st.sampled_from(sorted(METHODS)), st.data())
def test_any_value_in_config_json_is_accepted_or_refused(tmp_path, name, data):
    content = to_json(Config(method=name), METHODS[name]())
    options = content["method_options"]
    place = data.draw(st.sampled_from([*content, *options, "method_options", "new"]))
    (options if place in options else content)[place] = data.draw(anything)
    (tmp_path / "config.json").write_text(json.dumps(content))
    try:
        config, method = configuration.load(tmp_path)
    except UserError:
        return
    for owner in (config, method):
        for key, kind in typing.get_type_hints(type(owner)).items():
            if kind in (int, bool, str):
                assert type(getattr(owner, key)) is kind, key
            elif kind is float:
                assert type(getattr(owner, key)) in (int, float), key
    assert through_a_file(config, method) == (config, method)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("epochs", 1.5, "--epochs takes int, not 1.5"),
        ("epochs", True, "--epochs takes int, not True"),
        ("lr", "0.1", "--lr takes float, not '0.1'"),
        ("lr", 10**400, "--lr takes float, not 1000"),
        ("precision", "fp64", r"--precision takes \('auto', 'fp32', 'bf16'\), not 'fp64'"),
        ("image_size", [8], r"--image-size takes int \| None, not \[8\]"),
        ("seed", "x", "--seed takes int, not 'x'"),
        ("deterministic", "yes", "--deterministic takes bool, not 'yes'"),
    ],
)
def test_a_value_of_a_wrong_type_is_named(key, value, words):
    with pytest.raises(UserError, match=f"^{words}"):
        from_json(to_json(Config(), METHODS["ltat"]()) | {key: value})


def test_a_deeply_nested_config_json_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="cannot be read as a run's configuration"):
        configuration.load(tmp_path)
