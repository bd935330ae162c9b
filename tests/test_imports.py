"""Imports go one way: the table in docs/design.md is the rule, and no modules import each other in a circle."""

from __future__ import annotations

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mora_jax"
ROW = re.compile(r"^\| `(\w+)` \|[^|]*\|([^|]*)\|$", re.MULTILINE)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(path: Path, *, for_types: bool) -> set[str]:
    """The modules of the library that a file imports anywhere; `for_types`: also those for type checkers alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = set()
    if not for_types:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
                skipped |= {id(child) for child in ast.walk(node)}
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "mora_jax":
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in MODULES else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in MODULES}
    return found


def rules() -> dict[str, set[str]]:
    """What each package may import, from the table, whose order counts."""
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    section = text[text.index("## Packages") : text.index("## Where a new thing goes")]
    allowed: dict[str, set[str]] = {}
    for package, cell in ROW.findall(section):
        allowed[package] = set(allowed) if "all of the above" in cell else set(re.findall(r"`(\w+)`", cell))
    return allowed


def test_every_package_has_its_row():
    packages = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert packages - {"__init__"} == set(rules())


@pytest.mark.parametrize("package", sorted(rules()))
def test_imports_go_one_way(package):
    allowed = rules()[package] | {package}
    files = [path for name, path in MODULES.items() if name.split(".")[1:2] == [package]]
    assert files
    against = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files
        for name in sorted(imports_of(path, for_types=True))
        if name.count(".") and name.split(".")[1] not in allowed
    ]
    assert against == []


def test_no_circle():
    graph = {name: imports_of(path, for_types=False) - {name} for name, path in MODULES.items()}
    # The top package imports on demand what it exports.
    graph["mora_jax"] = set()
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"modules import each other: {' <- '.join(error.args[1])}")


def test_folders_can_be_grasped():
    for folder in [PACKAGE, *(path for path in PACKAGE.rglob("*") if path.is_dir())]:
        entries = [path for path in folder.iterdir() if path.name not in ("__pycache__", "__init__.py")]
        assert len(entries) <= 20, f"{folder.relative_to(ROOT)} has {len(entries)} entries"
