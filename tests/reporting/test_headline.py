"""The headline claims no more than the numbers show."""

import pytest

from helpers import made_runs
from ltat_fast.reporting.headline import headline
from ltat_fast.reporting.study import studies
from ltat_fast.runs.experiments import experiments


def write_run(folder, tail, *, images=None, drop=(), **config):
    """A run with the accuracy ``tail`` under every attack except clean. images: number of images by attack."""
    run = made_runs.write_run(folder, **config)
    images = images or {"clean": 600, "pgd20": 600, "autoattack": 100}
    entries = {a: {"all": 80.0, "tail": tail + 30 * (a == "clean"), "images": n} for a, n in images.items()}
    made_runs.write(run / "eval.json", {which: entries for which in ("best", "last") if which not in drop})
    return run


def headline_of(*runs):
    (study,) = studies(experiments(list(runs)))
    return headline(study)


def test_one_method(tmp_path):
    told = headline_of(write_run(tmp_path / "a", 59.44))
    assert told.sentence == "LTAT classifies 59.4 % of tail-class images correctly under PGD-20."
    assert told.caveat == "One seed each."


def test_two_methods_with_one_seed(tmp_path):
    told = headline_of(write_run(tmp_path / "a", 50.0, method="at-bsl"), write_run(tmp_path / "b", 60.0))
    assert told.sentence.endswith(
        "LTAT classifies 60.0 % of tail-class images correctly under PGD-20, against 50.0 % for AT-BSL."
    )
    assert told.caveat == "One seed each. So few seeds cannot show whether LTAT leads AT-BSL by more than chance."


def test_two_seeds_that_agree_by_chance_prove_nothing(tmp_path):
    for s in (0, 1):
        write_run(tmp_path / f"a{s}", 60.0, seed=s)
        write_run(tmp_path / f"b{s}", 50.0, seed=s, method="robal")
    assert "So few seeds cannot show" in headline_of(*sorted(tmp_path.iterdir())).caveat


def test_the_weight_of_one_image_is_told_if_all_were_attacked(tmp_path):
    (study,) = studies(experiments([write_run(tmp_path / "a", 59.4)]))
    assert headline(study, {"all": 600, "tail": 60}).caveat.endswith(
        " One of the 60 tail-class images makes 1.7 points."
    )
    assert headline(study, {"all": 900, "tail": 60}).caveat == "One seed each."  # only 600 of 900 images were attacked


@pytest.mark.parametrize(("shift", "verdict"), [(20.0, "exceed"), (1.0, "are within")])
def test_a_lead_is_compared_with_the_spread(tmp_path, shift, verdict):
    for s, noise in enumerate((-2.0, 0.0, 2.0)):  # standard deviation 2 each, of the difference 2.83
        write_run(tmp_path / f"a{s}", 50 + noise, seed=s)
        write_run(tmp_path / f"b{s}", 50 - shift + noise, seed=s, method="robal")
    told = headline_of(*sorted(tmp_path.iterdir()))
    assert told.caveat == (
        "Mean ± standard deviation over 3 seeds. "
        f"The {shift:.1f} points between LTAT and RoBal {verdict} the spread of their difference, 2.8."
    )


def test_many_methods_are_summarised_by_first_next_and_last(tmp_path):
    methods = {"trades": 20.0, "ltat": 60.0, "awp": 10.0, "at-bsl": 55.0}
    told = headline_of(*(write_run(tmp_path / m, tail, method=m) for m, tail in methods.items()))
    assert told.sentence.endswith("against 55.0 % for AT-BSL, the next of 4 methods, and 10.0 % for the last, AWP.")
    assert [rank.name for rank in told.ranking] == ["LTAT", "AT-BSL", "TRADES", "AWP"]


def test_a_method_that_occurs_twice_is_named_with_its_options(tmp_path):
    a = write_run(tmp_path / "a", 60.0)
    b = write_run(tmp_path / "b", 50.0)
    config = made_runs.read(b / "config.json")
    config["method_options"]["alpha"] = 7.5
    made_runs.write(b / "config.json", config)
    assert {rank.name for rank in headline_of(a, b).ranking} == {"LTAT (defaults)", "LTAT (alpha=7.5)"}


def test_a_method_that_occurs_twice_is_named_with_its_settings(tmp_path):
    runs = [write_run(tmp_path / str(lr), 60.0 - lr, lr=lr) for lr in (0.25, 0.5)]
    assert [rank.name for rank in headline_of(*runs).ranking] == ["LTAT (lr=0.25)", "LTAT (lr=0.5)"]


def test_modifiers_are_part_of_the_name(tmp_path):
    runs = [write_run(tmp_path / f"ema{ema}", 60.0 - ema, ema=ema) for ema in (0.0, 0.5)]
    assert [rank.name for rank in headline_of(*runs).ranking] == ["LTAT", "LTAT + ema 0.5"]
    longer = [write_run(tmp_path / str(lr), 50.0 - lr, ema=0.5, lr=lr) for lr in (0.25, 0.5)]
    names = [rank.name for rank in headline_of(runs[0], *longer).ranking]
    assert names == ["LTAT", "LTAT + ema 0.5 (lr=0.25)", "LTAT + ema 0.5 (lr=0.5)"]


def test_the_headline_uses_the_strongest_attack_on_most_images(tmp_path):
    on_all = write_run(tmp_path / "a", 40.0, images={"clean": 600, "pgd20": 600, "autoattack": 600})
    assert "under AutoAttack" in headline_of(on_all).sentence
    assert "under PGD-20" in headline_of(write_run(tmp_path / "b", 40.0)).sentence
    # an attack that one of the runs lacks cannot be compared
    other = write_run(tmp_path / "c", 30.0, method="trades", images={"clean": 600, "pgd20": 600})
    assert "under PGD-20" in headline_of(on_all, other).sentence


def test_worst_cases_over_different_attacks_are_not_compared(tmp_path):
    def with_worst(name, attacks, **config):
        run = write_run(tmp_path / name, 40.0, images={"clean": 600, "pgd20": 600, "worst": 600}, **config)
        results = made_runs.read(run / "eval.json")
        for which in results:
            results[which]["worst"]["attacks"] = attacks
        made_runs.write(run / "eval.json", results)
        return run

    weak = with_worst("a", ["clean", "pgd20"])
    strong = with_worst("b", ["clean", "pgd20", "autoattack"], method="trades")
    same = with_worst("c", ["pgd20", "clean"], method="awp")
    assert "under all attacks together" in headline_of(weak, same).sentence
    assert "under PGD-20" in headline_of(weak, strong).sentence


def test_best_is_shown_only_if_selected_on_held_out_images(tmp_path):
    def checkpoint_of(run):
        return studies(experiments([run]))[0].checkpoint

    assert checkpoint_of(write_run(tmp_path / "a", 1.0)) == "last"
    assert checkpoint_of(write_run(tmp_path / "b", 1.0, select_on="heldout")) == "best"
    assert checkpoint_of(write_run(tmp_path / "v", 1.0, select_on="val")) == "best"
    assert checkpoint_of(write_run(tmp_path / "c", 1.0, select_on="heldout", drop=("best",))) == "last"
    assert checkpoint_of(write_run(tmp_path / "d", 1.0, drop=("last",))) == "best"


def test_runs_without_an_attack_are_compared_by_clean_accuracy(tmp_path):
    told = headline_of(write_run(tmp_path / "a", 20.0, images={"clean": 600}))
    assert told.sentence == "LTAT classifies 50.0 % of tail-class images correctly."
    run = write_run(tmp_path / "b", 1.0)
    made_runs.write(run / "eval.json", {})
    assert headline_of(run).sentence == "No run has been evaluated yet."
