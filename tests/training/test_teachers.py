"""Teachers of every kind compute the right logits in a run; unusable ones are refused."""

import sys
import types

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from helpers import train_runs
from ltat_fast import config
from ltat_fast._torchvision import torchvision
from ltat_fast.errors import UserError
from ltat_fast.models import build_model
from ltat_fast.models.classifier import FullPrecisionLinear
from ltat_fast.runs.splits import DeviceImages, Splits
from ltat_fast.runs.weights import write_weights
from ltat_fast.training import teachers
from ltat_fast.training.device import Hardware
from ltat_fast.training.step import frozen_twin

FP32, BF16 = (Hardware(torch.device("cpu"), dtype, "test") for dtype in (torch.float32, torch.bfloat16))


@pytest.fixture(scope="module")
def data():
    """Two images per class of three classes, 3x32x32."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (6, 3, 32, 32), generator=generator, dtype=torch.uint8)
    few = DeviceImages(images, torch.arange(6) % 3)
    return Splits(few, few, few, [2, 2, 2], {"tail": [2]}, ("ant", "bee", "cow"), "", 4, True)


def images(data):
    return data.train.images.float() / 255


def untrained(make, **options):
    """Return a network in eval mode with random batch norm statistics."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = make(**options)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    return net.eval()


def assert_computes(teacher, net, data):
    """Assert that ``teacher`` and its frozen twin compute ``net`` of the images as pixels in [0, 1]."""
    with torch.no_grad():
        expected = net(images(data))
        torch.testing.assert_close(teacher(images(data)), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(frozen_twin(teacher, FP32)(images(data)), expected, atol=1e-3, rtol=1e-3)
    assert not teacher.training


# -- torchvision ----------------------------------------------------------------------------------------------------


def test_a_torchvision_teacher_with_the_users_weights(data, tmp_path):
    net = untrained(torchvision.models.resnet18, num_classes=3)
    file = tmp_path / "my weights.safetensors"
    save_file(net.state_dict(), file)
    assert_computes(teachers.load(f"torchvision:resnet18@{file}", "resnet18", data, FP32), net, data)


@pytest.fixture
def published(monkeypatch):
    """A stand-in for torchvision's published ResNet-18, with three classes and without a download."""
    net = untrained(torchvision.models.resnet18, num_classes=3)
    weights = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    monkeypatch.setitem(weights.meta, "categories", ["ant", "bee", "cow"])
    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", lambda self, **_: net.state_dict())
    return net


def test_a_torchvision_teacher_with_published_weights_and_normalisation(data, published):
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    teacher = teachers.load("torchvision:resnet18", "resnet18", data, FP32)
    assert_computes(teacher, lambda x: published((x - mean) / std), data)


def test_unusable_torchvision_teachers_are_refused(data, tmp_path):
    with pytest.raises(UserError, match="torchvision has no classifier called 'resnet17'"):
        teachers.find("torchvision:resnet17", "resnet18")
    with pytest.raises(UserError, match=r"there is no checkpoint nowhere\.safetensors"):
        teachers.find("torchvision:resnet18@nowhere.safetensors", "resnet18")
    (tmp_path / "w.pth").touch()
    with pytest.raises(UserError, match=r"is not a \.safetensors file"):
        teachers.find(f"torchvision:resnet18@{tmp_path / 'w.pth'}", "resnet18")
    known = "torchvision:resnet18: its published weights have 1000 classes, the data has 3; use your own weights"
    with pytest.raises(UserError, match=known):
        teachers.load("torchvision:resnet18", "resnet18", data, FP32)
    file = tmp_path / "ten.safetensors"
    save_file(torchvision.models.squeezenet1_1(num_classes=10).state_dict(), file)
    with pytest.raises(UserError, match=r"ten.safetensors does not fit squeezenet1_1: classifier.1.* is \(10"):
        teachers.load(f"torchvision:squeezenet1_1@{file}", "resnet18", data, FP32)


# -- timm -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def timm(monkeypatch):
    """A stand-in for the package timm with one network."""

    def create_model(name, pretrained=False, num_classes=5, in_chans=3):
        net = untrained(build_model, arch="smallresnet", num_classes=num_classes, in_channels=in_chans)
        if pretrained:
            nn.init.constant_(net.fc.bias, 2.0)
        return net

    cards = {"tiny": types.SimpleNamespace(num_classes=5, mean=(0.5, 0.5, 0.5), std=(0.2, 0.3, 0.4)), "bare": None}
    package = types.ModuleType("timm")
    package.is_model = cards.__contains__
    package.get_pretrained_cfg = cards.get
    package.create_model = create_model
    package.list_models = lambda: list(cards)
    monkeypatch.setitem(sys.modules, "timm", package)
    return package, cards


def test_a_timm_teacher_with_the_users_weights(data, tmp_path, timm):
    net = untrained(build_model, arch="smallresnet", num_classes=3)
    nn.init.constant_(net.fc.bias, -1.0)
    file = tmp_path / "w.safetensors"
    save_file(net.state_dict(), file)
    assert_computes(teachers.load(f"timm:tiny@{file}", "resnet18", data, FP32), net, data)


def test_timm_with_its_own_weights_and_normalisation(data, timm):
    package, cards = timm
    with pytest.raises(UserError, match="timm:tiny: its published weights have 5 classes, the data has 3"):
        teachers.load("timm:tiny", "resnet18", data, FP32)
    make = package.create_model
    package.create_model = lambda name, pretrained: make(name, pretrained, num_classes=3)
    cards["tiny"].num_classes = 3
    net, std = make("tiny", True, 3), torch.tensor((0.2, 0.3, 0.4)).view(3, 1, 1)
    assert_computes(teachers.load("timm:tiny", "resnet18", data, FP32), lambda x: net((x - 0.5) / std), data)


def test_unusable_timm_teachers_are_refused(data, timm, monkeypatch):
    with pytest.raises(UserError, match="timm has no network called 'nothing'"):
        teachers.find("timm:nothing", "resnet18")
    with pytest.raises(UserError, match="timm has no weights for it; use your own with timm:bare@FILE"):
        teachers.load("timm:bare", "resnet18", data, FP32)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"--teacher timm:tiny needs the package timm .*pip install timm"):
        teachers.find("timm:tiny", "resnet18")


# -- modules --------------------------------------------------------------------------------------------------------

MODULE = """
import torch
from torch import nn

class Normalised(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 900, classes))

    def forward(self, x):
        return self.net((x - 0.5) / 0.25)

net = Normalised(3)
def teacher(): return net
def ten_classes(): return Normalised(10)
def not_a_network(): return lambda x: x
def broken(): raise OSError("weights could not\\nbe downloaded")
class Grey(nn.Module):
    def forward(self, x): return torch.nn.functional.conv2d(x, torch.ones(3, 1, 32, 32)).flatten(1)
class Infinite(nn.Module):
    def forward(self, x): return x.flatten(1)[:, :3] / 0
class Tuple(nn.Module):
    def forward(self, x): return x, x
number = 3
"""


@pytest.fixture
def my_teachers(tmp_path, monkeypatch):
    (tmp_path / "zoo").mkdir()
    (tmp_path / "zoo" / "__init__.py").touch()
    (tmp_path / "zoo" / "my_teachers.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "module:zoo.my_teachers"
    for name in ("zoo", "zoo.my_teachers"):
        sys.modules.pop(name, None)


def test_a_module_of_the_user_as_teacher(data, my_teachers):
    teacher = teachers.load(f"{my_teachers}:teacher", "resnet18", data, FP32)
    assert_computes(teacher, sys.modules["zoo.my_teachers"].net, data)


def test_the_logits_of_a_teacher_stay_float32_in_a_bf16_run(data, my_teachers):
    teacher = teachers.load(f"{my_teachers}:teacher", "resnet18", data, BF16)
    assert isinstance(teacher.net[-1], FullPrecisionLinear)
    with torch.no_grad():
        logits = frozen_twin(teacher, BF16)(images(data))
    assert (logits != logits.bfloat16().float()).any()
    torch.testing.assert_close(logits, teacher(images(data)).detach(), atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("module:nowhere.at_all:teacher", "cannot be used: ModuleNotFoundError: No module named 'nowhere'"),
        ("module:zoo.my_teachers", "is incomplete: write module:PACKAGE.MODULE:NAME"),
        ("module:zoo.my_teachers:nothing", "zoo.my_teachers has no function called 'nothing'"),
        ("module:zoo.my_teachers:number", "zoo.my_teachers has no function called 'number'"),
    ],
)
def test_modules_that_cannot_be_found_are_refused_before_the_data_is_read(my_teachers, name, words):
    with pytest.raises(UserError, match=words):
        teachers.find(name, "resnet18")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("broken", "cannot be used: OSError: weights could not$"),
        ("not_a_network", r"not_a_network\(\) returns a function, not a torch.nn.Module"),
        ("ten_classes", r"returns shape \(2, 10\) for two images, not logits of 3 classes each"),
        ("Tuple", "returns a tuple for two images, not logits of 3 classes each"),
        ("Grey", "cannot be used: RuntimeError: Given groups=1"),
        ("Infinite", "returns logits that are not finite numbers"),
    ],
)
def test_modules_that_do_not_fit_the_data_are_refused(data, my_teachers, name, words):
    with pytest.raises(UserError, match=words):
        teachers.load(f"{my_teachers}:{name}", "resnet18", data, FP32)


# -- ltat_fast ------------------------------------------------------------------------------------------------------


def test_a_teacher_trained_by_this_package(data, tmp_path):
    net = untrained(build_model, arch="smallresnet", num_classes=3)
    write_weights(
        tmp_path / "checkpoints" / "last.safetensors", net.state_dict(), {"arch": "smallresnet", "num_classes": 3}
    )
    for path in (tmp_path, tmp_path / "checkpoints" / "last.safetensors"):
        assert_computes(teachers.load(str(path), "resnet18", data, FP32), net, data)


def test_a_plain_state_dict_as_teacher_has_the_architecture_of_the_run(data, tmp_path):
    net = untrained(build_model, arch="smallresnet", num_classes=3)
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    assert_computes(teachers.load(str(tmp_path / "w.safetensors"), "smallresnet", data, FP32), net, data)
    with pytest.raises(UserError, match="does not fit resnet18"):
        teachers.load(str(tmp_path / "w.safetensors"), "resnet18", data, FP32)


def test_weights_of_another_program_have_the_activation_of_the_run(data, tmp_path):
    net = untrained(build_model, arch="smallresnet", num_classes=3, activation="silu")
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    assert_computes(teachers.load(str(tmp_path / "w.safetensors"), "smallresnet", data, FP32, "silu"), net, data)


def test_a_missing_path_is_refused_as_teacher():
    with pytest.raises(UserError, match="nowhere has no finished weights"):
        teachers.find("nowhere", "resnet18")


def test_a_run_with_a_module_as_teacher_from_the_command_line(tmp_path, monkeypatch):
    """AdaAD needs gradients through the teacher. The run records its teacher."""
    (tmp_path / "digit_teacher.py").write_text(
        "from torch import nn\ndef teacher(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    flags = ("--max-steps", "2", "--attack-steps", "2", "--limit-eval", "50", "--eval-attacks", "clean")
    flags += ("--method", "adaad", "--teacher", "module:digit_teacher:teacher", "--out", str(tmp_path / "run"))
    assert train_runs.train(*flags) == 0
    assert not (tmp_path / "run" / "teacher").exists()
    assert config.load(tmp_path / "run")[0].teacher == "module:digit_teacher:teacher"
