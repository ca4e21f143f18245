"""``python -m ltat_fast.export``: every file computes the logits of the network and does not need this package."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import small_disks, train_runs
from ltat_fast.methods import METHODS
from ltat_fast.models import ARCHS, build_model, standalone
from ltat_fast.runs import export as exporting
from ltat_fast.runs.model_card import PUBLIC_DATASETS, model_card
from ltat_fast.runs.weights import read_weights, write_weights

HAS_HUB = find_spec("huggingface_hub") is not None
needs_hub = pytest.mark.skipif(not HAS_HUB, reason="huggingface_hub is not installed")

# A process in which neither this package nor huggingface_hub can be imported.
ELSEWHERE = """
import sys
class Refuse:
    def find_spec(self, name, *_):
        if name.split(".")[0] in ("ltat_fast", "kernels", "huggingface_hub"):
            raise ImportError("not here")
sys.meta_path.insert(0, Refuse())
import numpy as np
from model import load_model; model = load_model(); logits = model(__import__("torch").from_numpy(np.load("in.npy")))
np.save("out.npy", logits.detach().numpy())
assert not model.training
from model import Model
try:
    Model.from_pretrained(".")
    raise SystemExit("it has no mixin")
except ImportError as error:
    assert str(error) == "from_pretrained() needs huggingface_hub; load_model() does not"
"""


@pytest.fixture(scope="module")
def exported(digits_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "an export"
    assert train_runs.status_of("export", str(digits_run), "--out", str(out)) == 0
    return out


@pytest.fixture
def images():
    return torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(3))


def live(run, which="last"):
    """The network of the checkpoint, built without the code under test."""
    tensors, card = read_weights(run / "checkpoints" / f"{which}.safetensors")
    model = build_model(card["arch"], card["num_classes"], in_channels=card["in_channels"])
    model.load_state_dict(tensors)
    return model.eval()


def test_three_lines_without_this_package(exported, digits_run, images):
    np.save(exported / "in.npy", images.numpy())
    subprocess.run([sys.executable, "-c", ELSEWHERE], cwd=exported, check=True, timeout=600)
    assert np.array_equal(np.load(exported / "out.npy"), live(digits_run)(images).detach().numpy())


def test_the_weights_are_the_checkpoints(exported, digits_run):
    tensors, _ = read_weights(digits_run / "checkpoints" / "last.safetensors")
    written = load_file(exported / "model.safetensors")
    assert tensors.keys() == written.keys()
    assert all(torch.equal(tensors[name], written[name]) for name in tensors)


@pytest.mark.parametrize("batch", [1, 5, 64])
def test_the_program_takes_any_batch(exported, digits_run, batch):
    images = torch.rand(batch, 1, 8, 8, generator=torch.Generator().manual_seed(batch))
    program = torch.export.load(exported / "model.pt2").module()
    torch.testing.assert_close(program(images), live(digits_run)(images), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(find_spec("onnxruntime") is None, reason="onnxruntime is not installed")
@pytest.mark.parametrize("batch", [1, 5])
def test_onnx_takes_any_batch(exported, digits_run, batch):
    import onnxruntime

    images = torch.rand(batch, 1, 8, 8, generator=torch.Generator().manual_seed(batch))
    session = onnxruntime.InferenceSession(exported / "model.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), live(digits_run)(images).detach(), rtol=1e-4, atol=1e-5)


def test_the_config(exported, digits_run):
    card = json.loads((exported / "config.json").read_text())
    config = json.loads((digits_run / "config.json").read_text())
    scores = json.loads((digits_run / "eval.json").read_text())["last"]
    assert card["threat_model"] == {"norm": "Linf", "eps": config["eps"]}
    assert card["input"] == "float32 (N, 1, 8, 8) in [0, 1]"
    assert card["training"]["method_options"] == config["method_options"]
    assert card["accuracy"]["pgd20"] == {name: scores["pgd20"][name] for name in ("all", "tail", "images")}
    assert str(digits_run.parent) not in json.dumps(card)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("method", "activation"), [("pgd-at", "relu"), ("robal", "relu"), ("pgd-at", "silu")])
def test_the_module_of_every_network(arch, method, activation, tmp_path):
    """With a linear classifier, with RoBal's cosine classifier and its shift, and with another activation."""
    torch.manual_seed(0)
    model = build_model(arch, 10, activation=activation)
    counts = torch.arange(10, 0, -1) * 7
    options = {"robal_config": "N"} if method == "robal" else {}
    model = METHODS[method](**options).wrap_model(model, counts).eval()
    origin = {"arch": arch, "activation": activation, "num_classes": 10, "in_channels": 3}
    (tmp_path / "config.json").write_text(json.dumps({"architecture": exporting.architecture(model, origin)}))
    save_file(model.state_dict(), tmp_path / standalone.WEIGHTS)
    text = exporting.source(model, ARCHS[arch])
    assert "ltat_fast." not in text.replace("ltat-fast", "")
    (tmp_path / "model.py").write_text(text)
    x = torch.rand(2, 3, 16, 16)
    module = exporting.import_file(tmp_path / "model.py")
    with torch.no_grad():
        assert torch.equal(module.load_model()(x), model(x))
        if HAS_HUB:
            assert torch.equal(module.Model.from_pretrained(tmp_path)(x), model(x))


@pytest.mark.filterwarnings("error:nothing is folded")
def test_as_a_teacher(exported, tmp_path, monkeypatch):
    """The folder can be used as ``--teacher module:model:load_model``, with batch norm folded."""
    monkeypatch.syspath_prepend(str(exported))
    flags = [*train_runs.QUICK[:-2], "--max-steps", "2", "--method", "ard", "--teacher", "module:model:load_model"]
    assert train_runs.train("--out", str(tmp_path / "student"), *flags) == 0


def test_again_into_the_same_folder(exported, digits_run):
    assert train_runs.status_of("export", str(digits_run), "--out", str(exported), "--checkpoint", "best") == 0
    assert json.loads((exported / "config.json").read_text())["name"].endswith("-best")
    assert train_runs.status_of("export", str(digits_run), "--out", str(exported)) == 0


@pytest.mark.parametrize(("name", "content"), [("thesis.tex", "mine"), ("config.json", "[]"), ("config.json", "{")])
def test_other_folders_are_refused(digits_run, tmp_path, capsys, name, content):
    (tmp_path / name).write_text(content)
    assert train_runs.status_of("export", str(digits_run), "--out", str(tmp_path)) == 2
    assert "is not empty, and not an export" in capsys.readouterr().err
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [(name, content)]


def test_refusals(digits_run, tmp_path, capsys):
    assert train_runs.status_of("export", str(digits_run), "--out", str(digits_run)) == 2
    assert "is not empty, and not an export" in capsys.readouterr().err
    assert train_runs.status_of("export", str(tmp_path)) == 2
    assert "no finished weights" in capsys.readouterr().err


def test_a_run_that_did_not_record_its_image_size(digits_run, tmp_path, capsys):
    run = shutil.copytree(digits_run, tmp_path / "old")
    file = run / "checkpoints" / "last.safetensors"
    tensors, card = read_weights(file)
    del card["image_size"]
    write_weights(file, tensors, card)
    assert train_runs.status_of("export", str(run)) == 2
    assert "--image-size" in capsys.readouterr().err
    for size in ("-3", "0"):
        assert train_runs.status_of("export", str(run), "--image-size", size) == 2
        assert capsys.readouterr().err == f"ltat_fast: error: --image-size must be 1 or more, not {size}\n"
    assert train_runs.status_of("export", str(run), "--image-size", "8") == 0


def test_the_recorded_image_size_stays(digits_run, tmp_path, capsys):
    flags = (str(digits_run), "--out", str(tmp_path / "out"), "--image-size")
    assert train_runs.status_of("export", *flags, "16") == 2
    assert "last.safetensors was trained on images of 8 x 8" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert train_runs.status_of("export", *flags, "8") == 0


def test_a_file_that_computes_something_else_is_refused(digits_run, tmp_path, monkeypatch, capsys):
    lines = exporting.source

    def broken(*arguments):
        return lines(*arguments).replace(".mean((2, 3))", ".amax((2, 3))")

    monkeypatch.setattr(exporting, "source", broken)
    assert train_runs.status_of("export", str(digits_run), "--out", str(tmp_path / "out")) == 2
    assert "gives other logits than the network" in capsys.readouterr().err
    assert not any((tmp_path / "out").iterdir()), "a wrong file is not exported"


def test_a_full_disk(digits_run, tmp_path, capfd):
    """One sentence, no partial files, and an older export does not change."""
    with small_disks.file_system(tmp_path / "disk", "700k") as disk:
        out = disk / "export"
        assert train_runs.status_of("export", str(digits_run), "--out", str(out)) == 2
        assert capfd.readouterr().err.startswith(f"ltat_fast: error: cannot write {out}: No space left on device")
        assert [*out.iterdir()] == []
        old = '{"architecture": {}, "ltat_fast": "the old one"}'
        (out / "config.json").write_text(old)
        assert train_runs.status_of("export", str(digits_run), "--out", str(out)) == 2
        assert [path.name for path in out.iterdir()] == ["config.json"]
        assert (out / "config.json").read_text() == old


# -- the Hugging Face hub -------------------------------------------------------------------------------------------


@needs_hub
def test_from_pretrained_loads_the_same_network(exported, images):
    module = exporting.import_file(exported / "model.py")
    model = module.Model.from_pretrained(exported)
    assert not model.training
    expected = module.load_model()
    with torch.no_grad():
        assert torch.equal(model(images), expected(images))
    ours, theirs = model.state_dict(), load_file(exported / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours.keys() | theirs.keys())


@needs_hub
def test_save_pretrained_writes_the_same_folder(exported, images, tmp_path):
    module = exporting.import_file(exported / "model.py")
    module.Model.from_pretrained(exported).save_pretrained(tmp_path)
    read = [json.loads((folder / "config.json").read_text()) for folder in (exported, tmp_path)]
    assert read[0] == read[1]
    assert torch.equal(module.Model.from_pretrained(tmp_path)(images), module.load_model()(images))


@needs_hub
def test_a_missing_tensor_is_refused(exported, tmp_path):
    """The mixin alone would leave the layer random."""
    tensors = load_file(exported / "model.safetensors")
    del tensors["fc.bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((exported / "config.json").read_bytes())
    with pytest.raises(RuntimeError, match=r"fc\.bias"):
        exporting.import_file(exported / "model.py").Model.from_pretrained(tmp_path)


DOWNLOADED = """
import sys, torch
from huggingface_hub import snapshot_download
folder = snapshot_download("somebody/a-network", local_files_only=True)
sys.path.insert(0, folder)
from model import Model, load_model
images = torch.linspace(0, 1, 320).view(5, 1, 8, 8)
for model in (load_model(), Model.from_pretrained(folder), Model.from_pretrained("somebody/a-network")):
    assert torch.equal(model(images), load_model()(images))
assert not [name for name in sys.modules if name.startswith("ltat_fast")]
"""


@needs_hub
def test_the_lines_of_the_readme_after_a_download(exported, tmp_path):
    """The cache of huggingface_hub as a download leaves it: a snapshot of links to files with hashes as names."""
    repository, revision = tmp_path / "hub" / "models--somebody--a-network", "0123456789abcdef0123456789abcdef01234567"
    snapshot, blobs = repository / "snapshots" / revision, repository / "blobs"
    for folder in (snapshot, blobs, repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    for number, file in enumerate(exported.iterdir()):
        (blobs / f"{number:040x}").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040x}")
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    subprocess.run([sys.executable, "-c", DOWNLOADED], cwd=tmp_path, env=environment, check=True, timeout=600)


@needs_hub
def test_the_model_card(exported, digits_run):
    from huggingface_hub import ModelCard

    card = ModelCard.load(exported / "README.md")
    assert card.data.library_name == "ltat-fast"
    assert card.data.pipeline_tag == "image-classification"
    assert card.data.metrics == ["accuracy"]
    assert {"adversarial-training", "pytorch_model_hub_mixin", "ltat"} <= set(card.data.tags)
    assert card.data.datasets is None, "the digits are not on the hub"
    assert card.data.license is None
    scores = json.loads((digits_run / "eval.json").read_text())["last"]["pgd20"]
    assert f"| pgd20 | {scores['all']:.2f} | {scores['tail']:.2f} | {scores['images']} |" in card.text


@needs_hub
@pytest.mark.parametrize("dataset", PUBLIC_DATASETS)
def test_the_card_of_a_public_dataset(exported, dataset):
    from huggingface_hub import ModelCard

    about = json.loads((exported / "config.json").read_text())
    about["training"] |= {"dataset": dataset, "imbalance_ratio": None}
    assert ModelCard(model_card(about, True)).data.datasets == [PUBLIC_DATASETS[dataset]]
