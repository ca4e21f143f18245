import shutil

import pytest

from helpers import launching


@pytest.fixture(scope="session")
def undisturbed_folder(shared):
    """The finished run of :mod:`launching` in "run", and the list of its file operations in "operations"."""

    def make(folder):
        folder.mkdir()
        launching.finish(folder / "run", LTAT_OPERATIONS=str(folder / "operations"))

    return shared("undisturbed", make)


@pytest.fixture(scope="session")
def undisturbed(undisturbed_folder):
    """The run folder of a run that was never interrupted."""
    return undisturbed_folder / "run"


@pytest.fixture
def undisturbed_copy(tmp_path, undisturbed):
    """A copy of that folder to work on."""
    return shutil.copytree(undisturbed, tmp_path / "run")


@pytest.fixture(scope="session")
def operations(undisturbed_folder):
    """The file operations of that run in their order, as :mod:`helpers.signalled_train` writes them."""
    return (undisturbed_folder / "operations").read_text().splitlines()
