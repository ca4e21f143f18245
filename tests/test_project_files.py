"""Files about the project agree with each other: versions, linters, and the commands and links in CONTRIBUTING.md."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ltat_fast

ROOT = Path(__file__).parents[1]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
BEFORE, BLOCK, AFTER = CONTRIBUTING.split("```")
COMMANDS = [line.split("#")[0].strip() for line in BLOCK.splitlines()] + re.findall(r"`([^`]+)`", BEFORE + AFTER)


def pinned(name: str) -> str:
    """Return the version of the package ``name`` in requirements-dev.txt."""
    (version,) = re.findall(rf"^{re.escape(name)}==(\S+)$", (ROOT / "requirements-dev.txt").read_text(), re.MULTILINE)
    return version


def test_the_citation_has_the_version_of_the_package():
    assert re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE) == [ltat_fast.__version__]


def test_pre_commit_runs_the_pinned_ruff():
    config = (ROOT / ".pre-commit-config.yaml").read_text()
    assert re.findall(r"ruff-pre-commit\n +rev: v(\S+)", config) == [pinned("ruff")]


def test_pyright_and_its_node_are_pinned():
    assert re.fullmatch(r"\d+\.\d+\.\d+", pinned("pyright[nodejs]"))


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)]+)\)", CONTRIBUTING))
def test_links_of_contributing_lead_to_files(link):
    assert (ROOT / link).exists()


@pytest.mark.parametrize("path", sorted({p for p in re.findall(r"[\w./-]+", " ".join(COMMANDS)) if "/" in p}))
def test_paths_in_contributing_exist(path):
    made_by_commands = (".venv/", "runs/")
    assert path.startswith(made_by_commands) or (ROOT / path).exists()


def test_make_targets_in_contributing_exist():
    targets = {command.split()[1] for command in COMMANDS if command.startswith("make ")}
    assert targets == {"test", "test-all", "lint"}
    rules = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert targets <= set(rules)


def modules_with_flags() -> list[tuple[str, set[str]]]:
    """Return the modules that CONTRIBUTING.md runs by ``python -m``, each with the flags that it passes."""
    found = [re.search(r"python -m ((?:ltat_fast|bench)\S*)(.*)", command) for command in COMMANDS]
    return [
        (match[1], set(re.findall(r"--[a-z-]+", match[2].split(" -- ")[0]))) for match in found if match is not None
    ]


def test_modules_in_contributing_exist():
    missing = [module for module, _ in modules_with_flags() if importlib.util.find_spec(module) is None]
    assert missing == []
    assert len(modules_with_flags()) >= 6


@pytest.mark.slow
@pytest.mark.parametrize(("module", "flags"), modules_with_flags(), ids=[name for name, _ in modules_with_flags()])
def test_modules_in_contributing_take_their_flags(module, flags):
    command = [sys.executable, "-m", module, "--help"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert flags <= set(re.findall(r"--[a-z-]+", printed))


@pytest.mark.slow
def test_the_pytest_command_of_contributing_selects_tests():
    (command,) = [command for command in COMMANDS if command.startswith("python -m pytest tests/ops")]
    collect = [sys.executable, *command.split()[1:], "--collect-only", "-q"]
    printed = subprocess.run(collect, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "test_pgd.py::" in printed
