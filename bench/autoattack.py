"""AutoAttack: the package of its authors and ours on the same network and images, processor time and verdicts.

    OMP_NUM_THREADS=1 python -m bench.autoattack RUN [--images 200] [--data-dir DIR] [--levers] [--torchattacks]

RUN is a finished run; the images are test images, spread evenly over the classes. The columns take turns on groups of
images. With one thread, the times are processor time and hardly depend on other load.

--levers also measures the package on the frozen twin, and ours with one optimisation at a time switched off.
--torchattacks adds the port of torchattacks, if it is installed.

The last table counts the images on which the verdicts differ from the package's. Every adversarial example is checked:
in the ball, in [0, 1], and misclassified by the network itself in float32.
"""

import argparse
import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

from bench.common import append_csv, cpu_clock, provenance
from ltat_fast import config as configuration
from ltat_fast.attacks import autoattack as ours
from ltat_fast.attacks import square
from ltat_fast.attacks.balls import Ball
from ltat_fast.models.frozen import FrozenTwin
from ltat_fast.models.precision import without_tf32
from ltat_fast.pixels import to_unit
from ltat_fast.runs.metrics import spread
from ltat_fast.runs.splits import load_splits
from ltat_fast.runs.weights import load_model, weights_file

Attack = Callable[[Tensor, Tensor], tuple[Tensor, dict[str, float]]]
"""Images and labels to adversarial examples and the seconds of each part."""
BATCH_SIZE = 250  # the default of the package
standard = ours.searches
clock = time.process_time if cpu_clock() == "process" else time.perf_counter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--checkpoint", choices=["best", "last"], default="last")
    parser.add_argument("--images", type=int, help="number of test images; all if not given")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--group", type=int, default=1000, help="images per turn")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--levers", action="store_true")
    parser.add_argument("--torchattacks", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("bench/results/autoattack.csv"))
    arguments = parser.parse_args()
    logging.getLogger("auto-attack").setLevel(logging.ERROR)
    device = torch.device(arguments.device)

    config, _ = configuration.load(arguments.run)
    data_dir = arguments.data_dir or config.data_dir
    config = dataclasses.replace(config, out=arguments.run, data_dir=data_dir, limit_eval=None)
    splits = load_splits(config, device)
    model = load_model(weights_file(arguments.run, arguments.checkpoint), device, config.arch, splits).eval()
    chosen = torch.from_numpy(spread(splits.test.labels.cpu().numpy(), arguments.images)).to(device)
    x, y, eps = to_unit(splits.test.images[chosen]), splits.test.labels[chosen], config.attack_config.eps

    columns = {"package": package(model, eps, device), "ours": own(model, eps)}
    if arguments.torchattacks:
        columns["torchattacks"] = port(model, eps)
    if arguments.levers:
        columns["package on the frozen twin"] = package(FrozenTwin(model), eps, device)
        columns["ours, search in float32"] = own(model, eps, precision="fp32")
        columns["ours, Square asks again"] = own(model, eps, patch=mock.patch.object(square, "LARGEST_TABLE", 0))
        columns["ours, broken images stay"] = own(model, eps, patch=mock.patch.object(ours, "searches", never_checked))
    with without_tf32():
        measured = interleaved(model, columns, x, y, eps, arguments.group)
    about = {"arch": config.arch, "images": len(y), "eps": eps, **provenance(device)}
    append_csv(arguments.out, [row | about for row in measured])


def package(model: nn.Module, eps: float, device: torch.device) -> Attack:
    """The standard version of the package pyautoattack, which calls ``model`` as it is; one call per part."""
    from pyautoattack import AutoAttack

    def attack(x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, float]]:
        x_adv, seconds = x.clone(), {}
        left = (predict(model, x) == y).nonzero().squeeze(1)
        for part in ours.PARTS:
            judge = AutoAttack(model, device=device, eps=eps, norm="Linf", seed=0, version="standard")
            judge.attacks_to_run = [part]
            began = clock()
            if len(left):
                x_adv[left] = judge.run_standard_evaluation(x[left], y[left], batch_size=BATCH_SIZE)[0]
                left = left[predict(model, x_adv[left]) == y[left]]
            seconds[part] = clock() - began
        return x_adv, seconds

    return attack


def own(model: nn.Module, eps: float, *, patch: contextlib.AbstractContextManager | None = None, **options) -> Attack:
    def attack(x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, float]]:
        seconds, last = {}, [clock()]

        def stop_watch(progress: ours.Progress) -> None:
            seconds[progress.part] = seconds.get(progress.part, 0.0) - last[0] + clock()
            last[0] = clock()

        with patch or contextlib.nullcontext():
            options_here = {"batch_size": BATCH_SIZE, "keep_adversarial": True, "on_progress": stop_watch, **options}
            x_adv = ours.autoattack(model, x, y, eps, **options_here).x_adv
        assert x_adv is not None
        again = sum(seconds.pop(part) for part in list(seconds) if part not in ours.PARTS)
        return x_adv, seconds | {"again": again}

    return attack


def never_checked(ball: Ball) -> dict:
    """The parts of ours; a broken image stays in its batch until the last step."""
    searches = standard(ball)
    for search in searches.values():
        object.__setattr__(search, "check_every", search.steps)
    return searches


def port(model: nn.Module, eps: float) -> Attack:
    import torchattacks

    def attack(x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, float]]:
        with torch.no_grad():
            classes = model(x[:1]).shape[1]
        began = clock()
        theirs = torchattacks.AutoAttack(model, norm="Linf", eps=eps, version="standard", n_classes=classes, seed=0)
        return theirs(x, y), {"all": clock() - began}

    return attack


def interleaved(
    model: nn.Module, columns: dict[str, Attack], x: Tensor, y: Tensor, eps: float, group: int
) -> list[dict[str, object]]:
    """Attack every group in every column, print the table, and return one row per column."""
    robust = {name: torch.zeros_like(y, dtype=torch.bool) for name in columns}
    seconds: dict[str, dict[str, float]] = {name: {} for name in columns}
    for places in torch.arange(len(y), device=y.device).split(group):
        for name, attack in columns.items():
            x_adv, times = attack(x[places], y[places])
            robust[name][places] = predict(model, x_adv) == y[places]
            check(x[places], x_adv, eps)
            seconds[name] |= {part: seconds[name].get(part, 0.0) + spent for part, spent in times.items()}
            print(f"  {name}: {int(robust[name].sum())} robust of {int(places[-1]) + 1}", flush=True)
    reference = next(iter(columns))
    rows = []
    print(f"\n{len(y)} images, {int((predict(model, x) == y).sum())} classified correctly, eps {eps:g}")
    for name in columns:
        total, differ = sum(seconds[name].values()), (robust[name] != robust[reference]).nonzero().squeeze(1).tolist()
        speedup = sum(seconds[reference].values()) / total
        times = {part: round(seconds[name].get(part, 0.0), 2) for part in (*ours.PARTS, "again")}
        count = int(robust[name].sum())
        rows.append({"column": name, "robust": count, "differ": len(differ), "seconds": round(total, 2), **times})
        parts = ", ".join(f"{part} {spent:.1f}" for part, spent in times.items() if spent)
        print(
            f"{name:28} {count} robust, {len(differ)} other verdicts {differ or ''}, {total:.1f} s, {speedup:.2f} times"
        )
        print(f"{'':28} {parts}")
    return rows


@torch.no_grad()
def predict(model: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([model(part).argmax(1) for part in x.split(250)]) if len(x) else x.new_empty(0, dtype=torch.int64)


def check(x: Tensor, x_adv: Tensor, eps: float) -> None:
    """Raise ValueError if an adversarial example is outside the ball or outside [0, 1]."""
    if len(x) and not ((x_adv - x).abs().amax() <= eps + 1e-6 and x_adv.amin() >= 0 and x_adv.amax() <= 1):
        raise ValueError("an adversarial example is outside the ball")


if __name__ == "__main__":
    main()
