"""AWP, REAT, TAET, modifiers, micro-batches in two processes: what they measure is measured over all images."""

import pytest
import torch
import two_processes

from helpers.launching import in_two_processes


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> dict[str, dict]:
    out = tmp_path_factory.mktemp("two") / "outcomes.pt"
    done = in_two_processes(two_processes.__file__, str(out))
    assert done.returncode == 0, done.stderr
    return torch.load(out, weights_only=True)


@pytest.mark.parametrize("name", two_processes.CASES)
def test_two_processes_train_like_one(two, name):
    one = two_processes.outcome(name)
    assert two[name].keys() == one.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(two[name][key], tensor, atol=1e-5, rtol=1e-4, msg=lambda m, k=key: f"{k} {m}")
    if name == "reat":
        assert one["method.predicted"].sum() == 32
