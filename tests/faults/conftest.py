import pytest

from helpers import launching


@pytest.fixture(scope="session")
def undisturbed(shared):
    """The run of :mod:`launching`, which nothing has happened to."""
    return shared("undisturbed", launching.finish)
