"""Measure what it costs to stream the images from a file instead of keeping them on the device.

    python -m bench.loader --device cpu [--image-size 64] [--images 65536] [--arch resnet18] [--out FILE.csv]

Rows:

- gather: batches of uint8 images read from a memory map into host memory by the background threads, nothing else;
- loader: the same batches augmented (crop and flip) and converted to float32 on the device;
- step: training steps of PGD-AT on these batches.

"device" keeps the images on the device, "stream" reads them from a file. A sample is several consecutive batches or
steps. Samples are timed in interleaved rounds: by processor time of all threads with one compute thread
(OMP_NUM_THREADS=1), else by wall clock. ``gb_per_s`` counts the bytes of the uint8 images. ``relative`` is the rate
divided by that of the row with placement "device". ``growth_mb`` is how much the memory of the process that is no file
(RssAnon) grew from the first round of the part to its last.

The file is read once before, so that the system can keep it in memory; rates of a disk are not measured here.

Prediction on a CPU: gather is bound by memory and reaches several GB/s per thread; a step of a ResNet-18 at 64 pixels
takes seconds and a batch of it microseconds, so that stream and device differ by less than the noise.
"""

import argparse
import contextlib
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench import common
from bench.recipes import build
from bench.step import LR, Problem
from ltat_fast.data import DeviceLoader, HostImages
from ltat_fast.data.partial import npy_header
from ltat_fast.training.device import Hardware

CLASSES = 10
BATCHES = 50
"""consecutive batches of a sample of the parts without training"""
COLUMNS = ["part", "placement", "batches_per_s", "gb_per_s", "relative", "growth_mb"]


def make_file(path: Path, images: int, size: int) -> np.ndarray:
    """Write random images to ``path`` in blocks, and return their memory map, read once."""
    shape, rng = (images, 3, size, size), np.random.RandomState(0)
    with path.open("wb") as file:
        file.write(npy_header(shape))
        for start in range(0, images, 1024):
            file.write(rng.bytes((min(start + 1024, images) - start) * 3 * size**2))
    mapped = np.load(path, mmap_mode="r")
    np.add.reduce(mapped.reshape(-1)[::4096])
    return mapped


def anonymous_megabytes() -> float:
    """Return the memory of this process that is no mapped file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024 / 1e6
    return float("nan")


def samples(
    take: dict[str, Callable[[], None]], steps: int, rounds: int, device: torch.device
) -> tuple[dict[str, float], float]:
    """Return the median batches per second of each entry, and the growth of the memory in MB over all rounds."""
    clock = time.process_time if common.cpu_clock() == "process" and device.type == "cpu" else time.perf_counter
    rates = {name: [] for name in take}
    memory = []
    for number in range(rounds + 1):
        for name, call in take.items():
            begin = clock()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if number:  # the first one is warm-up
                rates[name].append(steps / (clock() - begin))
        memory.append(anonymous_megabytes())
    return {name: statistics.median(values) for name, values in rates.items()}, memory[-1] - memory[0]


def measure(args: argparse.Namespace, folder: Path) -> list[dict[str, str]]:
    device = torch.device(args.device)
    mapped = make_file(folder / "images.npy", args.images, args.image_size)
    labels = np.arange(args.images) % CLASSES
    sources = {"device": HostImages(mapped, device=device).to_device(), "stream": HostImages(mapped, device=device)}
    options = {"batch_size": args.batch_size, "seed": 0, "pad": 4, "flip": True, "device": device}
    loaders = {name: DeviceLoader(images, labels, channels_last=True, **options) for name, images in sources.items()}
    order = np.random.RandomState(1).permutation(args.images)
    indices = list(order[: len(order) // args.batch_size * args.batch_size].reshape(-1, args.batch_size))
    epochs = itertools.count()

    def first(batches: Iterator, count: int = BATCHES, take: Callable = lambda batch: None) -> None:
        with contextlib.closing(batches):
            for batch in itertools.islice(batches, count):
                take(batch)

    parts: dict[str, dict[str, Callable[[], None]]] = {
        "gather": {"stream": lambda: first(sources["stream"]._gathered(indices[:BATCHES]))},
        "loader": {name: lambda one=one: first(one.batches(next(epochs))) for name, one in loaders.items()},
    }
    if args.arch != "none":
        problem = Problem(device, args.arch, args.image_size, args.batch_size)
        dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
        flags = ["--method", "pgd-at", "--attack-steps", str(args.attack_steps)]
        step = build(problem, flags, Hardware(device, dtype, "benchmark"))

        def train(batch: tuple[Tensor, Tensor]) -> None:
            step(*batch, lr=LR, progress=1.0, seed=0)

        parts["step"] = {
            name: lambda one=one: first(one.batches(next(epochs)), args.steps, train) for name, one in loaders.items()
        }
    rows, batch_bytes = [], args.batch_size * 3 * args.image_size**2
    for part, take in parts.items():
        found, growth = samples(take, args.steps if part == "step" else BATCHES, args.rounds, device)
        for placement, rate in found.items():
            known = found.get("device")
            rows.append(
                {
                    "arch": args.arch if part == "step" else "",
                    "image_size": str(args.image_size),
                    "images": str(args.images),
                    "batch_size": str(args.batch_size),
                    "part": part,
                    "placement": placement,
                    "batches_per_s": f"{rate:.4g}",
                    "gb_per_s": f"{rate * batch_bytes / 1e9:.3g}",
                    "relative": f"{rate / known:.3f}" if known else "",
                    "growth_mb": f"{growth:.1f}",
                }
            )
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    common.add_device_flag(parser)
    common.add_problem_flags(parser, arch_choices=["none"])
    parser.set_defaults(image_size=64)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--attack-steps", type=int, default=10)
    parser.add_argument("--images", type=int, default=65536)
    parser.add_argument("--steps", type=int, default=20, help="consecutive training steps of a sample")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the file is written for the time of the measurement")
    parser.add_argument("--out", type=Path, help="CSV to append to, default bench/results/loader-DEVICE.csv")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        rows = measure(args, Path(folder))
    out = args.out or Path(__file__).parent / "results" / f"loader-{args.device}.csv"
    title = f"{args.images:,} images of {args.image_size} pixels, batches of {args.batch_size}"
    common.keep_and_show(rows, COLUMNS, title, torch.device(args.device), out)


if __name__ == "__main__":
    main()
