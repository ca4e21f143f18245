"""Commands set OMP_WAIT_POLICY before they import torch; the parts of the package do not set it."""

import os
import subprocess
import sys

import pytest

COMMANDS = ["train", "evaluate", "analyse", "report", "sweep", "sensitivity", "demo", "replay"]
# Prints the policy at the moment when torch is about to be imported, and ends there.
WATCH_TORCH = """
import os, sys

class Watch:
    def find_spec(name, path=None, target=None):
        if name == "torch":
            raise SystemExit(os.environ.get("OMP_WAIT_POLICY"))

sys.meta_path.insert(0, Watch)
"""


def policy_when_torch_is_imported(module, **environment):
    unset = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    code = f"{WATCH_TORCH}\nimport {module}\nraise SystemExit('torch was not imported')"
    ran = subprocess.run(
        [sys.executable, "-c", code], env=unset | environment, capture_output=True, text=True, check=False
    )
    return ran.stderr.strip()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_sets_the_policy_before_torch_is_imported(command):
    assert policy_when_torch_is_imported(f"ltat_fast.{command}") == "PASSIVE"


def test_a_policy_that_is_set_is_kept():
    assert policy_when_torch_is_imported("ltat_fast.train", OMP_WAIT_POLICY="ACTIVE") == "ACTIVE"


def test_importing_the_ops_leaves_the_environment_alone():
    unset = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    code = "import os, ltat_fast.ops, ltat_fast.attacks; print(os.environ.get('OMP_WAIT_POLICY'))"
    ran = subprocess.run([sys.executable, "-c", code], env=unset, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "None"
