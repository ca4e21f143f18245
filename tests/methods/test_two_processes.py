"""AWP, REAT and TAET in two processes: the perturbation, the counts and the class losses are those of all images."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import two_processes


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> dict[str, dict]:
    out = tmp_path_factory.mktemp("two") / "outcomes.pt"
    tests = Path(__file__).parent
    path = os.pathsep.join(filter(None, [str(tests), str(tests.parent), os.environ.get("PYTHONPATH")]))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [*launch, two_processes.__file__, str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    return torch.load(out, weights_only=True)


@pytest.mark.parametrize("name", two_processes.OPTIONS)
def test_two_processes_train_like_one(two, name):
    one = two_processes.outcome(name)
    assert two[name].keys() == one.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(two[name][key], tensor, atol=1e-5, rtol=1e-4, msg=lambda m, k=key: f"{k} {m}")
    if name == "reat":
        assert one["predicted"].sum() == 32
