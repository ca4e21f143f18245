"""IGDM on PGD-AT and TRADES: three steps against the formula, and a teacher only where it is used."""

import pytest
from test_trades import Float64BalancedTrades, Float64Trades

from helpers import train_runs
from helpers.float64_distillation import Float64Distillation, assert_equals_the_formula
from helpers.three_steps import cross_entropy, kl
from ltat_fast import config
from ltat_fast.errors import UserError
from ltat_fast.flags import parse_args
from ltat_fast.methods.pgd_at import PgdAt
from ltat_fast.methods.trades import Trades
from ltat_fast.runs.records import read_metrics


class Float64PgdAt(Float64Distillation):
    def base(self, adv, x, x_adv, y):
        return cross_entropy(adv, y)


class Float64TradesWithIgdm(Float64Distillation):
    trades = Float64Trades
    objective = Float64Trades.objective

    def loss(self, x, x_adv, y):
        self.clean = self.logits(x)  # batch norm sees the clean images first
        return super().loss(x, x_adv, y)

    def base(self, adv, x, x_adv, y):
        ce = cross_entropy(self.clean + self.trades.log_prior, y)
        return ce + self.trades.beta * kl(self.clean.softmax(1), adv.softmax(1))


class Float64BalancedTradesWithIgdm(Float64TradesWithIgdm):
    trades = Float64BalancedTrades


@pytest.mark.parametrize(
    ("method", "reference", "options", "tolerance"),
    [
        (PgdAt, Float64PgdAt, {"igdm_alpha": 7.0}, 1e-6),  # its cross-entropy is in float32
        (Trades, Float64TradesWithIgdm, {"igdm_alpha": 7.0}, 1e-8),
        (Trades, Float64BalancedTradesWithIgdm, {"igdm_alpha": 2.0, "beta": 1.5, "balanced": True}, 1e-8),
    ],
    ids=["pgd-at", "trades", "balanced trades"],
)
def test_three_steps_equal_the_formula(method, reference, options, tolerance):
    assert_equals_the_formula(method, reference, options, tolerance)


@pytest.mark.parametrize("method", [PgdAt, Trades])
def test_a_teacher_is_used_only_with_igdm(method):
    assert method().teacher == "none"
    assert method(igdm_alpha=1e-3).teacher == "robust"
    with pytest.raises(UserError, match=f"--teacher is not used by --method {method.name} without --igdm-alpha"):
        parse_args(["--method", method.name, "--teacher", "x"])
    assert parse_args(["--method", method.name, "--teacher", "x", "--igdm-alpha", "3"])[1].igdm_alpha == 3.0
    with pytest.raises(UserError, match="--igdm-alpha must be 0 or more and finite, not -1"):
        method(igdm_alpha=-1.0).check()


def test_a_run_of_trades_with_igdm_trains_a_robust_teacher_first(tmp_path):
    run = tmp_path / "run"
    flags = ("--epochs", "1", "--teacher-epochs", "1", "--max-steps", "2", "--attack-steps", "2")
    flags += ("--eval-attacks", "clean,pgd20", "--limit-eval", "50")
    assert train_runs.train("--method", "trades", "--igdm-alpha", "5", "--out", str(run), *flags) == 0
    (record,) = read_metrics(run / "metrics.jsonl")
    assert record["loss"] == pytest.approx(record["ce"] + 6 * record["kl"] + 5 * record["igdm"], rel=1e-4)
    assert record["igdm"] > 0
    (of_teacher,) = read_metrics(run / "teacher" / "metrics.jsonl")
    assert "igdm" not in of_teacher
    assert config.load(run)[1] == Trades(igdm_alpha=5.0)
