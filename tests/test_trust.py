"""A run folder of somebody else runs no code and makes no folders, unless the user names them or says --trust-run."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from helpers import train_runs
from ltat_fast import trust
from ltat_fast.errors import UserError
from ltat_fast.runs.weights import build_from_card, read_weights, write_weights

SPEC = "module:bomb:network"
REFUSED = f"names the code '{SPEC}', which is not run"


@pytest.fixture
def run(digits_run, tmp_path) -> Path:
    return Path(shutil.copytree(digits_run, tmp_path / "run"))


@pytest.fixture
def fuse(tmp_path, monkeypatch) -> Path:
    """The file that exists once the code of :data:`SPEC` ran."""
    lines = ("from pathlib import Path", "from torch import nn", f"Path({str(tmp_path / 'burnt')!r}).touch()")
    lines += ("def network(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))",)
    (tmp_path / "bomb.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "burnt"
    sys.modules.pop("bomb", None)


def set_config(run: Path, **settings: object) -> None:
    file = run / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def set_card(file: Path, **entries: object) -> None:
    """Change the card of a weights file, with a checksum that fits."""
    tensors, card = read_weights(file)
    write_weights(file, tensors, card | entries)


@pytest.mark.parametrize("command", ["train", "analyse"])
def test_a_teacher_in_config_json(run, fuse, capsys, command):
    shutil.rmtree(run / "teacher")
    set_config(run, teacher=SPEC)
    flags = {"train": ("--resume", "--out"), "analyse": ("--limit", "4", "--parts", "linearity")}[command]
    assert train_runs.status_of(command, *flags, str(run)) == 2
    assert REFUSED in capsys.readouterr().err
    assert not fuse.exists()
    train_runs.status_of(command, *flags, str(run), "--trust-run")
    assert fuse.exists()


def test_a_teacher_that_stands_on_the_command_line_too(run, fuse, capsys):
    set_config(run, teacher=SPEC)
    train_runs.train("--out", str(run), "--resume", f"--teacher={SPEC}")
    assert REFUSED not in capsys.readouterr().err
    assert fuse.exists()


@pytest.mark.parametrize("command", ["evaluate", "export", "analyse"])
def test_a_network_in_the_card_of_the_weights(run, fuse, capsys, command):
    for which in ("best", "last"):
        set_card(run / "checkpoints" / f"{which}.safetensors", arch=SPEC)
    flags = ("--again", "--attacks", "clean", "--limit-eval", "4") if command == "evaluate" else ()
    assert train_runs.status_of(command, str(run), *flags) == 2
    assert REFUSED in capsys.readouterr().err
    assert not fuse.exists()
    train_runs.status_of(command, str(run), *flags, "--trust-run")
    assert fuse.exists()


def test_a_network_in_config_json(run, fuse, capsys):
    set_config(run, arch=SPEC)
    assert train_runs.train("--out", str(run), "--resume") == 2
    assert REFUSED in capsys.readouterr().err
    assert not fuse.exists()


def test_the_page_of_a_report_leaves_the_pictures_out(run, fuse, tmp_path):
    for which in ("best", "last"):
        set_card(run / "checkpoints" / f"{which}.safetensors", arch=SPEC)
    assert train_runs.status_of("report", str(run), "--html", str(tmp_path / "page.html")) == 0
    assert "which is not run" in (tmp_path / "page.html").read_text()
    assert not fuse.exists()


def test_a_card_in_python(run, fuse):
    """Python code may build what it names itself. What the card of a file names needs a call."""
    file = run / "checkpoints" / "best.safetensors"
    set_card(file, arch=SPEC)
    with pytest.raises(UserError, match="allow_module"):
        build_from_card(file, *read_weights(file))
    assert not fuse.exists()


@pytest.mark.parametrize("command", ["evaluate", "train"])
def test_data_dir_of_config_json_gets_no_folder(run, tmp_path, capsys, monkeypatch, command):
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("a download"))
    set_config(run, dataset="cifar10-lt", data_dir=str(tmp_path / "chosen by the file"))
    flags = (str(run), "--again") if command == "evaluate" else ("--out", str(run), "--resume")
    assert train_runs.status_of(command, *flags) == 2
    assert "is missing; name its folder with --data-dir" in capsys.readouterr().err
    assert not (tmp_path / "chosen by the file").exists()


def test_decoded_images_stay_out_of_a_folder_that_only_the_file_names(folder_run, image_tree, tmp_path, monkeypatch):
    run, images = tmp_path / "run", tmp_path / "images"
    shutil.copytree(folder_run, run)
    shutil.copytree(image_tree, images, ignore=lambda *_: [".ltat_fast_cache"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    set_config(run, data_dir=str(images))
    flags = (str(run), "--again", "--attacks", "clean")
    assert train_runs.status_of("evaluate", *flags) == 0
    assert sorted(path.name for path in images.iterdir()) == ["test", "train"]
    assert (tmp_path / "cache" / "ltat_fast").is_dir()
    shutil.rmtree(tmp_path / "cache")
    assert train_runs.status_of("evaluate", *flags, "--data-dir", str(images)) == 0
    assert (images / ".ltat_fast_cache").is_dir()


@pytest.mark.parametrize(
    ("argv", "trust_run", "code", "folder"),
    [
        ([], False, False, False),
        (["--teacher", SPEC], False, True, False),
        ([f"--arch={SPEC}", "--data-dir=there"], False, True, True),
        (["--data_dir", "there"], False, False, True),
        (["there", "--out", "there"], False, False, False),
        ([], True, True, True),
    ],
)
def test_what_a_command_line_names(argv, trust_run, code, folder):
    trust.follow(argv, trust_run)
    if code:
        trust.refuse_code(SPEC, "x")
    else:
        with pytest.raises(UserError, match="x names the code"):
            trust.refuse_code(SPEC, "x")
    assert trust.may_write(Path("there")) == folder
    assert trust.may_write(None)
    trust.refuse_code("timm:resnet18", "x", from_card=True)
