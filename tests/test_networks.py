"""Networks of timm, torchvision and of a module as ``--arch``, from the command line to the export."""

import copy
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from helpers import train_runs
from ltat_fast._torchvision import torchvision
from ltat_fast.errors import UserError
from ltat_fast.models import build_model
from ltat_fast.models.frozen import FrozenTwin
from ltat_fast.models.libraries import Shape, find
from ltat_fast.runs.weights import initialise, read_weights

timm = pytest.importorskip("timm", reason="timm is not installed")

X = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
SHAPE = Shape(3, 3, (32, 32))
FLAGS = ("--dataset", "imagefolder-lt", "--batch-size", "8", "--teacher-batch-size", "4", "--max-steps", "2")
FLAGS += ("--epochs", "1", "--teacher-epochs", "1", "--precision", "fp32", "--attack-steps", "2", "--lr", "0.01")
FLAGS += ("--eval-attacks", "clean", "--device", "cpu")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """An image folder of three classes, 32 x 32."""
    root, rng = tmp_path_factory.mktemp("tree"), np.random.RandomState(0)
    for split, count in (("train", 8), ("test", 4)):
        for name in ("ant", "bee", "cow"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.randint(0, 256, (32, 32, 3), np.uint8)).save(root / split / name / f"{i}.png")
    return root


def train(tree, out, *flags):
    return train_runs.train(*FLAGS, "--data-dir", str(tree), "--out", str(out), *flags)


def small(arch, **options):
    """The network ``arch`` for :data:`X`, in eval mode."""
    torch.manual_seed(0)
    return build_model(arch, 3, image_size=(32, 32), **options).eval()


# -- the network ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "head"),
    [
        ("timm:resnet18", "fc"),
        ("timm:vit_tiny_patch16_224", "head"),
        ("timm:convnext_atto", "head.fc"),
        ("torchvision:mobilenet_v2", "classifier.1"),
        ("torchvision:squeezenet1_1", None),
    ],
)
def test_logits_are_those_of_the_library_on_normalised_pixels(arch, head):
    kind, name = arch.split(":")
    torch.manual_seed(0)
    size = {"img_size": 32} if "vit" in name else {}
    theirs = torchvision.models.get_model(name, num_classes=3) if kind == "torchvision" else None
    theirs = (theirs or timm.create_model(name, num_classes=3, **size)).eval()
    half = (0.5,) * 3 if "vit" in name else None  # timm's numbers for its vit_tiny; ImageNet's for the others
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (half or (0.485, 0.456, 0.406), half or (0.229, 0.224, 0.225)))
    ours = small(arch)
    assert ours.head == head
    with torch.no_grad():
        expected = theirs((X - mean) / std)
        torch.testing.assert_close(ours(X), expected)
        torch.testing.assert_close(FrozenTwin(ours, fold_bn=True)(X), expected, rtol=1e-3, atol=1e-4)
        if head:
            torch.testing.assert_close(ours.fc(ours.features(X)), expected)


def test_batch_norm_of_timm_is_folded():
    assert len(FrozenTwin(small("timm:resnet18")).folded) == 20


MODULE = """
import torch
from torch import nn
net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
net.append(nn.Linear(4, 3))
def shared(): return net
class Branch(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, num_classes)
    def forward(self, x):
        maps = self.bn(self.conv(x))
        if maps.mean() > -1e9:  # torch.fx cannot trace this
            maps = maps.relu()
        return self.fc(maps.mean((2, 3)))
def branch(num_classes): return Branch(num_classes)
def maps(): return nn.Conv2d(3, 3, 3)
def pair():
    class Pair(nn.Module):
        def forward(self, x): return x, x
    return Pair()
def seven(): return nn.Sequential(nn.Flatten(), nn.Linear(3072, 7))
class Spare(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.spare = nn.Linear(3072, 3), nn.Linear(2, 2)
    def forward(self, x): return self.fc(x.flatten(1))
def square(image_size, in_channels): return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * image_size[0] ** 2, 3))
"""


@pytest.fixture
def zoo(tmp_path, monkeypatch):
    (tmp_path / "my_networks.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "module:my_networks"
    sys.modules.pop("my_networks", None)


def test_networks_of_a_module(zoo):
    first, second = small(f"{zoo}:shared"), small(f"{zoo}:shared")
    assert first.net[0].weight is not second.net[0].weight, "teacher and student must not share weights"
    assert small(f"{zoo}:square")(X).shape == (2, 3)
    with pytest.warns(UserWarning, match="cannot be traced"):
        twin = FrozenTwin(branch := small(f"{zoo}:branch"))
    torch.testing.assert_close(twin(X), branch(X))


@pytest.mark.parametrize(
    ("arch", "words"),
    [
        ("timm:resnet81", "timm has no network called 'resnet81'; did you mean .*resnet18"),
        ("torchvision:resnet17", "torchvision has no classifier called 'resnet17'; did you mean .*resnet1"),
        ("timm:vit_tiny_patch16_224:8", "has no network called"),
        ("torchvision:inception_v3", "torchvision:inception_v3"),
        ("ZOO:maps", r"returns shape \(2, 3, 30, 30\) for two images, not logits of 3 classes each"),
        ("ZOO:pair", "returns a tuple for two images, not logits of 3 classes each"),
        ("ZOO:seven", r"returns shape \(2, 7\) for two images"),
    ],
)
def test_networks_that_cannot_be_used(zoo, arch, words):
    with pytest.raises(UserError, match=words):
        small(arch.replace("ZOO", zoo))


def test_timm_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"--arch timm:resnet18 needs the package timm .*pip install timm"):
        find("timm:resnet18")


def test_timm_can_be_imported_in_a_new_process():
    """With the wheel of torchvision that is built for another torch, timm alone cannot."""
    program = "from ltat_fast.models.libraries import find; print(find('timm:resnet18', '--teacher').spec)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600)
    assert done.stdout == "timm:resnet18\n", done.stderr


# -- initial weights ------------------------------------------------------------------------------------------------


def file_of(net, path):
    save_file({name: tensor.contiguous() for name, tensor in net.state_dict().items()}, path)
    return str(path)


def test_published_weights_from_a_file_get_a_new_head(tmp_path, capsys):
    torch.manual_seed(5)
    published = timm.create_model("resnet18", num_classes=1000)
    model = small("timm:resnet18")
    head = copy.deepcopy(model.fc)
    initialise(model, "timm:resnet18", file_of(published, tmp_path / "w.safetensors"), SHAPE)
    assert torch.equal(model.net.layer1[0].conv1.weight, published.layer1[0].conv1.weight)
    assert torch.equal(model.fc.weight, head.weight)
    assert "new last layer of 3 classes (fc.bias, fc.weight)" in capsys.readouterr().out


def test_a_file_with_the_same_classes_is_loaded_whole(tmp_path):
    torch.manual_seed(5)
    net = timm.create_model("resnet18", num_classes=3).eval()
    model = small("timm:resnet18")
    initialise(model, "timm:resnet18", file_of(net, tmp_path / "w.safetensors"), SHAPE)
    with torch.no_grad():
        torch.testing.assert_close(model(X), net(model.normalize(X)))
    again = small("timm:resnet18")
    initialise(again, "timm:resnet18", file_of(model, tmp_path / "own.safetensors"), SHAPE)
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in model.state_dict().items())


def test_positions_of_a_transformer_are_resized(tmp_path):
    """A published file is for 224 pixels (196 patches); the network here takes 32 pixels (4 patches)."""
    published = timm.create_model("vit_tiny_patch16_224", num_classes=1000)
    model = small("timm:vit_tiny_patch16_224")
    initialise(model, "timm:vit_tiny_patch16_224", file_of(published, tmp_path / "w.safetensors"), SHAPE)
    assert model.net.pos_embed.shape == (1, 5, 192)
    assert torch.equal(model.net.blocks[3].mlp.fc1.weight, published.blocks[3].mlp.fc1.weight)


def test_published_weights_of_torchvision(monkeypatch):
    theirs = torchvision.models.resnet18(num_classes=1000)
    of = torchvision.models.ResNet18_Weights
    monkeypatch.setattr(of, "get_state_dict", lambda self, **_: theirs.state_dict())
    model = small("torchvision:resnet18")
    initialise(model, "torchvision:resnet18", "published", SHAPE)
    assert torch.equal(model.net.conv1.weight, theirs.conv1.weight)
    assert torch.equal(model.normalize.mean.flatten(), torch.tensor([0.485, 0.456, 0.406]))


def test_the_file_of_another_network(tmp_path):
    file = file_of(timm.create_model("resnet34", num_classes=3), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"w.safetensors does not fit timm:resnet18: has the unknown tensor"):
        initialise(small("timm:resnet18"), "timm:resnet18", file, SHAPE)


# -- runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "flags"),
    [
        ("timm:convnext_atto", ("--method", "ltat", "--ema", "0.5")),
        ("timm:vit_tiny_patch16_224", ("--method", "pgd-at", "--awp", "0.01")),
        ("torchvision:mobilenet_v2", ("--method", "robal")),  # with dropout
        ("timm:resnet18", ("--method", "reat")),
    ],
)
def test_a_run_from_training_to_export(tree, tmp_path, arch, flags):
    run, other = tmp_path / "run", tmp_path / "whole"
    assert train(tree, run, "--arch", arch, *flags) == 0
    assert train_runs.status_of("evaluate", str(run), "--attacks", "clean,fgsm", "--device", "cpu") == 0
    assert train_runs.status_of("analyse", str(run), "--limit", "4", "--device", "cpu") == 0
    assert train_runs.status_of("report", str(run)) == 0
    assert train_runs.status_of("export", str(run)) == 0
    exported = run / "export-last"
    assert json.loads((exported / "config.json").read_text())["architecture"]["arch"] == arch
    program = "import torch; from model import Model, load_model; x = torch.linspace(0, 1, 6144).view(2, 3, 32, 32);"
    program += "logits = load_model()(x).detach(); torch.save(logits, 'out.pt');"
    program += "assert torch.equal(Model.from_pretrained('.')(x), logits)"
    subprocess.run([sys.executable, "-c", program], cwd=exported, check=True, timeout=600)
    logits = torch.load(exported / "out.pt")
    images = torch.linspace(0, 1, 6144).view(2, 3, 32, 32)
    torch.testing.assert_close(torch.export.load(exported / "model.pt2").module()(images), logits, rtol=1e-3, atol=1e-4)
    assert train(tree, other, "--arch", arch, *flags) == 0
    ours, theirs = (load_file(path / "checkpoints" / "last.safetensors") for path in (run, other))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items()), "a run can be repeated"


@pytest.mark.parametrize("arch", ["module:my_networks:branch", "torchvision:squeezenet1_1"])
def test_a_killed_run_continues_bit_equal(tree, tmp_path, zoo, arch):
    """Squeezenet has dropout, which draws from torch's own generator."""
    flags = ("--arch", arch, "--method", "pgd-at", "--epochs", "2", "--max-steps", "4")
    assert train(tree, tmp_path / "whole", *flags) == 0
    assert train(tree, tmp_path / "part", *flags, "--eval-every", "1") == 0
    state = tmp_path / "part" / "checkpoints"
    _, progress = read_weights(state / "resume.safetensors")
    assert progress["finished"]
    (state / "resume.previous.safetensors").replace(state / "resume.safetensors")
    (state / "last.safetensors").unlink()
    assert train_runs.train("--out", str(tmp_path / "part"), "--resume", "--arch", arch) == 0
    whole, part = (load_file(tmp_path / run / "checkpoints" / "last.safetensors") for run in ("whole", "part"))
    assert all(torch.equal(tensor, part[name]) for name, tensor in whole.items())


def test_an_export_of_a_module_has_no_model_py(tree, tmp_path, zoo, capsys):
    assert train(tree, tmp_path / "run", "--arch", f"{zoo}:shared", "--method", "natural") == 0
    earlier = tmp_path / "run" / "export-last"
    earlier.mkdir()
    (earlier / "config.json").write_text('{"architecture": {}, "ltat_fast": "1"}')
    (earlier / "model.py").write_text("of another network")
    assert train_runs.status_of("export", str(tmp_path / "run"), "--trust-run") == 0
    assert "no model.py: module:my_networks:shared is code of yours" in capsys.readouterr().out
    files = {path.name for path in (tmp_path / "run" / "export-last").iterdir()}
    assert "model.py" not in files and {"model.safetensors", "model.pt2", "README.md"} <= files  # noqa: PT018
    assert "`from_pretrained` cannot load this folder" in (tmp_path / "run" / "export-last" / "README.md").read_text()


def test_weights_without_gradient_are_refused_with_awp(tree, tmp_path, zoo, capsys):
    flags = ("--arch", f"{zoo}:Spare", "--method", "pgd-at")
    assert train(tree, tmp_path / "awp", *flags, "--awp", "0.01") == 2
    assert "has a weight that gets no gradient (spare.weight): use --awp 0" in capsys.readouterr().err
    assert train(tree, tmp_path / "run", *flags) == 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--arch", "resnet99"), "unknown arch 'resnet99'"),
        (("--arch", "timm:resnet81"), "--arch timm:resnet81: timm has no network called 'resnet81'; did you mean"),
        (("--arch", "timm:resnet18", "--activation", "silu"), "--activation is for the built-in networks"),
        (("--arch", "smallresnet", "--init", "published"), "there are no published weights of smallresnet"),
        (("--arch", "smallresnet", "--init", "w.pth"), "--init takes none, published or the path of a .safetensors"),
        (("--arch", "smallresnet", "--init", "no.safetensors"), "there is no checkpoint no.safetensors"),
        (
            ("--arch", "torchvision:squeezenet1_1", "--method", "robal"),
            "--method robal needs the features before the last linear layer, and torchvision:squeezenet1_1",
        ),
    ],
)
def test_wrong_flags_leave_no_run(tree, tmp_path, capsys, flags, words):
    assert train(tree, tmp_path / "run", "--method", "pgd-at", *flags) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_built_in_network_starts_from_a_file(tree, tmp_path, capsys):
    torch.manual_seed(5)
    file = file_of(nn.ModuleDict({"x": build_model("smallresnet", 10)})["x"], tmp_path / "ten.safetensors")
    flags = ("--arch", "smallresnet", "--method", "pgd-at", "--init", file)
    assert train(tree, tmp_path / "run", *flags) == 0
    assert "new last layer of 3 classes" in capsys.readouterr().out
