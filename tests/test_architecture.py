"""docs/architecture.md lists the layers of the package; no module imports from a layer above its own."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
LAYERS = [line.split() for line in PAGE.split("```layers\n")[1].split("```")[0].splitlines()]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
SOURCES = {
    path: f"ltat_fast.{path.relative_to(ROOT / 'ltat_fast').with_suffix('')}".replace("/", ".")
    for path in sorted((ROOT / "ltat_fast").rglob("*.py"))
    if "kernels" not in path.parts
}
SOURCES |= {path: f"ltat_fast.kernels.{path.stem}" for path in sorted((ROOT / "kernels").glob("*.py"))}


def imported_modules(source: str) -> set[str]:
    """Every module of this package that ``source`` imports at any depth, as "ltat_fast.x.y"."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:  # a relative import stays in its package
            if node.module == "ltat_fast":
                found |= {f"ltat_fast.{alias.name}" for alias in node.names}
            else:
                found.add(node.module)
    return {name for name in found if name.startswith("ltat_fast.")}


def upward_imports(module: str, source: str) -> list[str]:
    """The imports of ``module`` that leave its package and do not go to a lower layer."""
    own = module.split(".")[1]
    wrong = []
    for name in sorted(imported_modules(source)):
        other = name.split(".")[1]
        if other not in (own, "__version__", "_C") and LEVEL[other] <= LEVEL[own]:
            wrong.append(name)
    return wrong


def test_every_module_has_one_layer():
    listed = [name for names in LAYERS for name in names]
    parts = {module.split(".")[1] for module in SOURCES.values()} - {"__init__", "__main__"}
    assert sorted(listed) == sorted(parts)


@pytest.mark.parametrize("path", [p for p, m in SOURCES.items() if m.split(".")[1] != "__init__"], ids=str)
def test_imports_point_down(path):
    assert upward_imports(SOURCES[path], path.read_text()) == []


def test_an_upward_import_is_found():
    assert upward_imports("ltat_fast.ops.pgd", "def f():\n    from ltat_fast.methods import METHODS") == [
        "ltat_fast.methods"
    ]
    assert upward_imports("ltat_fast.kernels.pgd", "import ltat_fast.ops.pgd") == ["ltat_fast.ops.pgd"]
    assert upward_imports("ltat_fast.methods.ltat", "from ltat_fast import ops, errors") == []
