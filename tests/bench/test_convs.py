"""The layers that bench.convs times are those of the network, and its passes are the passes of training."""

import csv

import pytest
import torch

from bench.convs import Layer, calls, layers_of, main
from bench.step import Problem
from ltat_fast.models import build_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("arch", ["smallresnet", "mobilenetv2"])
def test_layers_add_up_to_the_flops_of_the_network(arch):
    layers = layers_of(build_model(arch, 10), 3, 16)
    convolutions = sum(count * layer.flops(1) for layer, count in layers.items())
    assert convolutions == pytest.approx(Problem(CPU, arch, image_size=16).forward_flops(), rel=0.02)


def test_layers_of_resnet18_at_32_pixels():
    layers = layers_of(build_model("resnet18", 10), 3, 32)
    assert layers.total() == 20
    assert next(iter(layers)) == Layer(3, 64, (3, 3), (1, 1), (1, 1), 1, 32, 32)
    assert layers[Layer(64, 64, (3, 3), (1, 1), (1, 1), 1, 32, 32)] == 4
    assert layers[Layer(256, 512, (1, 1), (2, 2), (0, 0), 1, 8, 8)] == 1


@pytest.mark.parametrize(
    "layer",
    [
        Layer(3, 8, (3, 3), (1, 1), (1, 1), 1, 8, 6),
        Layer(8, 4, (1, 1), (1, 1), (0, 0), 1, 5, 5),
        Layer(8, 4, (3, 3), (2, 2), (1, 1), 1, 8, 8),
        Layer(8, 8, (3, 3), (1, 1), (1, 1), 8, 8, 8),
    ],
)
def test_passes_are_gradients_of_the_forward(layer):
    torch.manual_seed(0)
    passes = calls(layer, 2, CPU)
    grad_input = passes["input gradient"]()[0]
    assert passes["weight gradient"]()[1].shape[:2] == (layer.out_channels, layer.in_channels // layer.groups)
    assert grad_input.shape == (2, layer.in_channels, layer.height, layer.width)
    assert passes["forward"]().dtype == grad_input.dtype == torch.bfloat16
    applies = layer.stride == (1, 1) and layer.groups == 1
    assert ("input gradient as forward" in passes) is applies
    if applies:
        torch.testing.assert_close(passes["input gradient as forward"](), grad_input, rtol=2**-6, atol=0.05)


def test_each_layer_pass_and_batch_is_a_row(tmp_path, capsys):
    out = tmp_path / "convs.csv"
    main(
        ["--device", "cpu", "--arch", "smallresnet", "--image-size", "8", "--batch-sizes", "2", "4", "--out", str(out)]
    )
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["batch"] for row in rows} == {"2", "4"}
    forward = [row for row in rows if row["pass"] == "forward" and row["batch"] == "2"]
    assert sum(int(row["count"]) for row in forward) == 9
    assert [row["in_channels"] for row in forward[:2]] == ["3", "8"], "the stem is timed with 3 and 8 channels"
    assert all(float(row["median_us"]) > 0 and not row["note"] for row in rows)
    row = forward[0]
    assert float(row["tflop_per_s"]) == pytest.approx(1e3 * float(row["gflop"]) / float(row["median_us"]), rel=0.01)
    assert "batch 4, all layers, weight gradient" in capsys.readouterr().out
