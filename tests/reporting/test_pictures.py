"""The pictures belong to the images and networks that their captions name."""

import base64
import io
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from ltat_fast.attacks import AttackConfig, pgd
from ltat_fast.attacks.objectives import cross_entropy
from ltat_fast.config import load
from ltat_fast.reporting.pictures import _signed, gallery
from ltat_fast.reporting.study import studies
from ltat_fast.runs.experiments import experiments
from ltat_fast.runs.splits import load_splits
from ltat_fast.runs.weights import load_model

CPU = torch.device("cpu")
EPS = 0.1


def pixels(picture):
    data = base64.b64decode(picture.source.removeprefix("data:image/png;base64,"))
    return np.asarray(Image.open(io.BytesIO(data)), dtype=np.float64) / 255


@pytest.fixture(scope="module")
def shown(digits_run):
    (study,) = studies(experiments([digits_run]))
    return gallery(study, CPU)


@pytest.fixture(scope="module")
def data(digits_run):
    return load_splits(load(digits_run)[0], CPU)


def test_the_images_are_the_first_of_classes_by_frequency(shown, data):
    assert [row.name for row in shown.adversarial] == ["0", "2", "4", "5", "7", "9"]
    for row in shown.adversarial:
        first = int((data.test.labels == int(row.name)).nonzero()[0])
        assert np.array_equal(pixels(row.original), data.test.images[first, 0].numpy() / 255)
        assert row.training_images == data.counts[int(row.name)]


def test_adversarial_examples_are_in_the_ball_and_their_perturbation_is_amplified(shown):
    for row in shown.adversarial:
        attacked, amplified = map(pixels, row.cells[0])
        change = attacked - pixels(row.original)
        assert 0.9 * EPS < np.abs(change).max() <= EPS + 1 / 255
        assert (amplified - 0.5) * 2 * EPS == pytest.approx(change, abs=1.5 / 255)


def test_the_predictions_are_those_of_the_network(shown, data, digits_run):
    model = load_model(digits_run / "checkpoints/last.safetensors", CPU, "smallresnet", data).eval()
    for row, salient in zip(shown.adversarial, shown.saliency, strict=True):
        for picture in (row.cells[0][0], salient.cells[0][0]):
            seen = row.original if picture is salient.cells[0][0] else picture
            x = torch.tensor(pixels(seen), dtype=torch.float32)[None, None]
            taken = model(x).argmax(1).item()
            assert (picture.note, picture.correct) == (str(taken), taken == int(row.name))


def test_attacked_images_are_those_of_twenty_steps(shown, data, digits_run):
    """They raise the loss about as much as another PGD-20 does."""
    model = load_model(digits_run / "checkpoints/last.safetensors", CPU, "smallresnet", data)
    x = torch.stack([torch.tensor(pixels(row.original), dtype=torch.float32) for row in shown.adversarial])[:, None]
    y = torch.tensor([int(row.name) for row in shown.adversarial])
    attacked = torch.stack([torch.tensor(pixels(row.cells[0][0]), dtype=torch.float32) for row in shown.adversarial])
    ours = pgd(model, x, cross_entropy(y), AttackConfig(EPS, EPS / 4, 20), torch.Generator().manual_seed(7))
    loss = torch.nn.CrossEntropyLoss()
    with torch.no_grad():
        model.eval()
        found, own, clean = (loss(model(images), y) for images in (attacked[:, None], ours, x))
    assert found > clean + 0.8 * (own - clean)


def test_gradients_are_those_of_autograd(shown, data, digits_run):
    model = load_model(digits_run / "checkpoints/last.safetensors", CPU, "smallresnet", data).eval()
    chosen = data.test.labels == 9  # the tail: all of its 60 images
    x = (data.test.images[chosen].float() / 255).requires_grad_()
    torch.nn.functional.cross_entropy(model(x), data.test.labels[chosen], reduction="sum").backward()
    assert np.sort(shown.gradients["Tail"][0]) == pytest.approx(np.sort(x.grad.abs().flatten()), rel=1e-3, abs=1e-6)
    assert set(shown.gradients) == {"Head", "Medium", "Tail"}


def test_saliency_is_red_if_positive_blue_if_negative_white_if_zero():
    for sign in (1.0, -1.0):
        image = Image.open(io.BytesIO(base64.b64decode(_signed(torch.tensor([[[sign, 0.0]]])).partition(",")[2])))
        (red, _, blue), middle = image.getpixel((0, 0)), image.getpixel((1, 0))
        assert (red > blue) == (sign > 0)
        assert min(middle) > 240
    assert _signed(torch.zeros(3, 2, 2))  # no gradient at all is no error


def test_images_of_a_folder_are_shown_without_a_warning(folder_run):
    """Decoded images are mapped from a read-only file; torch warns about such arrays once per process."""
    script = (
        "import sys, torch; from pathlib import Path; from ltat_fast.runs.experiments import experiments;"
        "from ltat_fast.reporting.pictures import gallery; from ltat_fast.reporting.study import studies;"
        "(study,) = studies(experiments([Path(sys.argv[1])]));"
        "print(len(gallery(study, torch.device('cpu')).adversarial))"
    )
    command = [sys.executable, "-c", script, str(folder_run)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.stdout.splitlines()[-1:] == ["3"], done.stderr
    assert "not writable" not in done.stderr


def test_a_missing_or_damaged_network_loses_only_its_own_pictures(digits_run, tmp_path):
    other = shutil.copytree(digits_run, tmp_path / "other", ignore=shutil.ignore_patterns("tb", "teacher"))
    config = json.loads((other / "config.json").read_text()) | {"lr": 0.3}
    (other / "config.json").write_text(json.dumps(config))
    weights = other / "checkpoints/last.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (study,) = studies(experiments([other, digits_run]))
    found = gallery(study, CPU)
    assert found.methods == [1]
    assert [len(row.cells) for row in found.adversarial] == [1] * 6
    (sentence,) = found.missing
    assert "damaged" in sentence
    assert str(tmp_path) not in sentence
