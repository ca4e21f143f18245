"""One thread per process, a visible note about GPU tests that did not run, and runs that many tests share."""

import os

import pytest

# Set before torch is imported. There are as many workers as cores: idle threads of one would spin on another's core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

NO_GPU = "no CUDA device: this GPU test did not run"


def pytest_collection_modifyitems(items):
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason=NO_GPU))


def pytest_terminal_summary(terminalreporter):
    skipped = [report for report in terminalreporter.stats.get("skipped", []) if NO_GPU in str(report.longrepr)]
    if skipped:
        terminalreporter.section("GPU", yellow=True)
        terminalreporter.write_line(f"{len(skipped)} GPU tests did NOT run: there is no CUDA device here", yellow=True)


@pytest.fixture(autouse=True)
def _no_command():
    """Forget the command line of the last command that ran in this process."""
    from ltat_fast import trust

    trust.reset()


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """Return ``shared(name, make)``: the first worker fills the folder with ``make(folder)``, all workers get it."""
    from ltat_fast.files import exclusive

    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def once(name, make):
        with exclusive(root / f"{name}.lock", lambda text: None):
            if not (root / f"{name}.made").exists():
                make(root / name)
                (root / f"{name}.made").touch()
        return root / name

    return once


@pytest.fixture(scope="session")
def digits_run(shared):
    """A short, finished LTAT run on the digits, from the command line. Copy it before changing anything in it."""
    from helpers import train_runs

    return shared("digits", lambda out: train_runs.finish(train_runs.start("--out", str(out), *train_runs.QUICK)))


@pytest.fixture(scope="session")
def image_tree(shared):
    """Folders of 8x8 colour images of three classes: 24, 12 and 8 training images, 5 test images each."""
    from helpers import train_runs

    return shared("images a b", train_runs.write_images)


@pytest.fixture(scope="session")
def folder_run(shared, image_tree):
    """A finished LTAT run of three steps on those images. Copy it before changing anything in it."""
    from helpers import train_runs

    def make(out):
        assert train_runs.train("--out", str(out), *train_runs.FOLDER, "--data-dir", str(image_tree)) == 0

    return shared("folder", make)
