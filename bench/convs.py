"""Time every convolution layer of a network by itself: forward, input gradient and weight gradient, in bf16 and NHWC.

    python -m bench.convs [--device cuda|cpu] [--arch resnet18] [--image-size 32] [--batch-sizes 32 128 256] [--out CSV]

About 20 seconds on a GPU. The layers are found by hooks on a forward pass; layers of equal shapes are timed once, and
``count`` says how many there are. Besides the three passes of training there are three variants that could replace
one of them: the stem with its input padded to 8 channels, the input gradient of a stride-1 convolution computed as a
forward convolution with flipped weights, and cuDNN's convolution with bias and ReLU in one call (CUDA).
Rows are appended to the CSV layer by layer. At the end the sums over the network are printed.
"""

import argparse
import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from bench import common
from ltat_fast.models import ARCHS, build_model

PADDED_CHANNELS = 8
PASSES = ("forward", "input gradient", "weight gradient")
ROUNDS = 15


@dataclass(frozen=True)
class Layer:
    """Shape of a convolution. height, width: of its input."""

    in_channels: int
    out_channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    groups: int
    height: int
    width: int

    def flops(self, batch: int) -> int:
        """Return the operations of one pass, 2 for a multiply-add. All three passes have the same number."""
        size = (self.height, self.width)
        out = [
            (n + 2 * p - k) // s + 1 for n, p, k, s in zip(size, self.padding, self.kernel, self.stride, strict=True)
        ]
        taps = self.kernel[0] * self.kernel[1] * self.in_channels // self.groups
        return 2 * batch * self.out_channels * out[0] * out[1] * taps


def layers_of(net: nn.Module, channels: int, image_size: int) -> Counter[Layer]:
    """Return the convolution layers of ``net``, in the order of a forward pass, with how often each shape occurs."""
    found: Counter[Layer] = Counter()

    def note(conv: nn.Conv2d, inputs: tuple[Tensor], output: Tensor) -> None:
        shape = (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.groups)
        found[Layer(*shape, *inputs[0].shape[2:])] += 1

    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(note)
    with torch.no_grad():
        net.eval()(torch.zeros(1, channels, image_size, image_size))
    return found


def calls(layer: Layer, batch: int, device: torch.device) -> dict[str, Callable[[], Tensor]]:
    """Return the passes of a layer and the variants that apply to it, by name."""

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).bfloat16().contiguous(memory_format=torch.channels_last)

    aten = torch.ops.aten
    x = tensor(batch, layer.in_channels, layer.height, layer.width)
    weight = tensor(layer.out_channels, layer.in_channels // layer.groups, *layer.kernel)
    geometry = (layer.stride, layer.padding, (1, 1))

    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return torch.conv2d(x, weight, None, *geometry, layer.groups)

    grad = torch.randn_like(forward(x, weight))

    def backward(mask: list[bool]) -> Callable[[], Tensor]:
        arguments = (grad, x, weight, None, *geometry, False, (0, 0), layer.groups, mask)
        return lambda: aten.convolution_backward(*arguments)

    result = {
        "forward": lambda: forward(x, weight),
        "input gradient": backward([True, False, False]),
        "weight gradient": backward([False, True, False]),
    }
    if layer.stride == (1, 1) and layer.groups == 1:
        flipped = weight.flip(2, 3).transpose(0, 1).contiguous(memory_format=torch.channels_last)
        padding = [k - 1 - p for k, p in zip(layer.kernel, layer.padding, strict=True)]
        result["input gradient as forward"] = lambda: torch.conv2d(grad, flipped, None, 1, padding)
    if device.type == "cuda" and hasattr(aten, "cudnn_convolution_relu"):
        bias = torch.randn(layer.out_channels, device=device).bfloat16()
        fused = (*geometry, layer.groups)
        result["forward, bias, ReLU: one call"] = lambda: aten.cudnn_convolution_relu(x, weight, bias, *fused)
        plain = (x, weight, bias, *geometry, layer.groups)
        result["forward, bias, ReLU: eager"] = lambda: torch.conv2d(*plain).relu_()
    return result


def measure(layer: Layer, batch: int, device: torch.device) -> list[dict[str, object]]:
    """Return a row for each call of a layer. A call that fails has a note in place of numbers."""
    timed, notes = {}, {}
    for name, call in calls(layer, batch, device).items():
        try:
            call()
            timed[name] = call
        except RuntimeError as error:  # cuDNN has no algorithm for it
            notes[name] = str(error).strip().splitlines()[0]
    timings = common.time_interleaved(timed, device, ROUNDS)
    rows = []
    for name in (*timed, *notes):
        row = {"batch": batch} | dataclasses.asdict(layer)
        row |= {key: "x".join(map(str, row[key])) for key in ("kernel", "stride", "padding")}
        median = 1e3 * timings[name].median if name in timings else float("nan")
        row |= {
            "pass": name,
            "median_us": f"{median:.2f}",
            "gflop": f"{layer.flops(batch) / 1e9:.4g}",
            "tflop_per_s": f"{layer.flops(batch) / median / 1e6:.4g}",
            "note": notes.get(name, ""),
        }
        rows.append(row)
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    common.add_device_flag(parser)
    parser.add_argument("--arch", choices=sorted(ARCHS), default="resnet18")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32, 128, 256])
    parser.add_argument("--out", type=Path, help="CSV to append to, default bench/results/convs-DEVICE.csv")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    torch.backends.cudnn.benchmark = True
    source = common.provenance(device)
    print(", ".join(f"{key} {value}" for key, value in source.items()))
    out = args.out or Path(__file__).parent / "results" / f"convs-{args.device}.csv"

    layers = layers_of(build_model(args.arch, 10), 3, args.image_size)
    stem = next(iter(layers))
    problems = [(layer, count) for layer, count in layers.items()]
    problems.insert(1, (dataclasses.replace(stem, in_channels=PADDED_CHANNELS), 0))  # not a layer of the network
    for batch in args.batch_sizes:
        microseconds, flops = defaultdict(float), defaultdict(int)
        for layer, count in problems:
            rows = [
                source | {"arch": args.arch, "image_size": args.image_size, "count": count} | row
                for row in measure(layer, batch, device)
            ]
            common.append_csv(out, rows)
            for row in rows:
                print(
                    "{count} x {in_channels:>4} -> {out_channels:<4} {kernel} /{stride} at {height:>3}x{width:<3} "
                    "batch {batch:<4} {pass:30} {median_us:>10} us {tflop_per_s:>8} TFLOP/s {note}".format(**row),
                    flush=True,
                )
                microseconds[row["pass"]] += count * float(row["median_us"])
                flops[row["pass"]] += count * layer.flops(batch)
        for name in PASSES:
            rate = flops[name] / microseconds[name] / 1e6
            print(
                f"batch {batch}, all layers, {name}: {microseconds[name] / 1e3:.3f} ms, {rate:.4g} TFLOP/s", flush=True
            )
    print(out)


if __name__ == "__main__":
    main()
