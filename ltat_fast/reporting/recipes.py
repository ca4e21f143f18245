"""The sweep's table "recipes": LTAT, each modifier alone on it, all of them together, and LTAT with a one-step attack.

It is not a table of the paper. The strengths of the modifiers are those of their papers for CIFAR-10-LT, or chosen on
held-out training images (docs/recipes.md).
"""

PAPERS = {
    "AWP": ("--awp", "0.005"),
    "EMA": ("--ema", "0.995"),
    "class-wise eps": ("--eps-balance", "0.3", "--eps-warmup", "0.8"),
    "label smoothing": ("--label-smoothing", "0.1"),
}
CHOSEN: dict[str, dict[str, tuple[str, ...]]] = {
    "digits-lt": {
        "EMA": ("--ema", "0.9"),
        "class-wise eps": ("--eps-balance", "0.2", "--eps-warmup", "0.4"),
        "label smoothing": ("--label-smoothing", "0.05"),
    },
}
"""Strengths that replace those of :data:`PAPERS`, by dataset and modifier."""


def recipes(dataset: str | None) -> dict:
    """Return the table "recipes", in the form of a table of the paper, with the strengths for ``dataset``."""
    strengths = PAPERS | CHOSEN.get(dataset or "", {})
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
