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


def imports_of(path: Path, *, for_types: bool, on_demand: bool = True) -> set[str]:
    """The modules of the library that a file imports.

    Args:
        path: the file.
        for_types: also those for type checkers alone.
        on_demand: also those that a function imports when it runs.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = set()
    for node in ast.walk(tree):
        typing = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        if (typing and not for_types) or (isinstance(node, ast.FunctionDef) and not on_demand):
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
    assert packages - {"__init__", "__main__"} == set(rules())


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
    graph = {name: imports_of(path, for_types=True) - {name} for name, path in MODULES.items()}
    # The top package imports on demand what it exports.
    graph["mora_jax"] = set()
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"modules import each other: {' <- '.join(error.args[1])}")


def loaded_by(*starts: str) -> set[str]:
    """The modules of the library that importing `starts` runs, those that only import on demand left out.

    A package's `__init__` runs before its modules, so what it imports counts, and it itself if it imports anything.
    """
    found: set[str] = set()
    waiting = list(starts)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += imports_of(MODULES[name], for_types=False, on_demand=False)
            parts = name.split(".")
            waiting += [".".join(parts[:end]) for end in range(1, len(parts))]
    inits = {name for name in found if MODULES[name].stem == "__init__"}
    return found - {name for name in inits if not imports_of(MODULES[name], for_types=False, on_demand=False)}


def test_a_training_step_can_be_followed_through_few_files():
    found = loaded_by("mora_jax.training.step", "mora_jax.models.decoder")
    assert {"mora_jax.losses.cross_entropy", "mora_jax.adapters.base"} <= found
    assert len(found) <= 25, sorted(found)
    on_demand = {name for name in found if imports_of(MODULES[name], for_types=False) - found}
    assert on_demand == set(), "what a function imports is read as well"


BESIDE = ("__pycache__", "__init__.py", "__main__.py")


def test_folders_can_be_grasped():
    for folder in [PACKAGE, *(path for path in PACKAGE.rglob("*") if path.is_dir() and path.name != "__pycache__")]:
        entries = [path for path in folder.iterdir() if path.name not in BESIDE]
        assert len(entries) <= 22, f"{folder.relative_to(ROOT)} has {len(entries)} entries"
