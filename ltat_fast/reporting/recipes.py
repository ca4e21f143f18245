"""The sweep's table "recipes": AT-BSL, LTAT, LTAT with each modifier and with all, and LTAT with one attack step.

It is not a table of the paper. docs/recipes.md says where the strengths come from.
"""

DEFAULTS = {
    "AWP": ("--awp", "0.005"),
    "EMA": ("--ema", "0.995"),
    "class-wise eps": ("--eps-balance", "0.3", "--eps-warmup", "0.8"),
    "label smoothing": ("--label-smoothing", "0.1"),
}
CHOSEN: dict[str, dict[str, tuple[str, ...]]] = {
    "cifar100-lt": {"class-wise eps": ("--eps-balance", "0.4", "--eps-warmup", "0.6")},
    "tinyimagenet-lt": {"class-wise eps": ("--eps-balance", "0.4", "--eps-warmup", "0.6")},
    "digits-lt": {
        "EMA": ("--ema", "0.9"),
        "class-wise eps": ("--eps-balance", "0.2", "--eps-warmup", "0.4"),
        "label smoothing": ("--label-smoothing", "0.05"),
    },
}
"""Strengths that replace those of :data:`DEFAULTS`, by dataset and modifier."""


def recipes(dataset: str | None) -> dict:
    """Return the table "recipes", in the form of a table of the paper, with the strengths for ``dataset``."""
    strengths = DEFAULTS | CHOSEN.get(dataset or "", {})
    together = tuple(flag for flags in strengths.values() for flag in flags)
    one_step = ("--attack", "n-fgsm")
    rows = {
        "AT-BSL": ("--method", "at-bsl"),
        "LTAT": (),
        **{f"LTAT + {name}": flags for name, flags in strengths.items()},
        "LTAT + all": together,
        "LTAT, one step": one_step,
        "LTAT, one step + all": (*one_step, *together),
    }
    own = {"dataset": "cifar10-lt", "arch": "resnet18", "imbalance_ratio": 50.0}
    lines = [{"name": name, "flags": ["--method", "ltat", *flags], "paper": {}} for name, flags in rows.items()]
    return {"notes": [], "experiments": [own | {"rows": lines}]}
