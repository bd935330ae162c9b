"""The examples in docstrings run and print what they say."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import re
from pathlib import Path

import pytest

import mora_jax as mj
import mora_jax.functional
import mora_jax.linen
import mora_jax.losses
from mora_jax.training.config.schema import keys

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mora_jax"
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)

# Packages without which a module may fail to import.
OF_EXTRAS = {"lm_eval"}


@pytest.mark.parametrize("name", MODULES)
def test_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # examples may write files
    module = importlib.import_module(name.removesuffix(".__init__"))
    failures, attempted = doctest.testmod(module)
    assert attempted > 0
    assert failures == 0, "the report is in the captured output"


@pytest.mark.parametrize("module", [mj, mj.linen, mj.functional, mj.losses], ids=lambda module: module.__name__)
def test_every_public_name_has_an_example(module):
    public = {name: getattr(module, name) for name in dir(module) if not name.startswith("_")}
    described = {
        name: value
        for name, value in public.items()
        if (inspect.isclass(value) or inspect.isfunction(value)) and value.__module__.startswith("mora_jax.")
    }
    assert len(described) > 3
    assert [name for name, value in described.items() if ">>> " not in inspect.getdoc(value)] == []


def test_every_public_definition_has_a_docstring():
    names = [".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in PACKAGE.rglob("*.py")]
    bare = []
    for name in sorted(name.removesuffix(".__init__") for name in names if not name.endswith("__main__")):
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name not in OF_EXTRAS:
                raise
            continue
        for defined in vars(module).values():
            if getattr(defined, "__module__", None) != name or not (inspect.isclass(defined) or callable(defined)):
                continue
            where = getattr(defined, "__qualname__", "")
            if not inspect.isclass(defined) and not inspect.isfunction(defined) or where.startswith("_"):
                continue
            if not inspect.getdoc(defined):
                bare.append(f"{name}.{where}")
            for member, value in vars(defined).items() if inspect.isclass(defined) else ():
                function = getattr(value, "fget", None) or getattr(value, "__func__", None) or value
                # An overriding method may leave the words to its base.
                described = any(inspect.getdoc(vars(base)[member]) for base in defined.__mro__ if member in vars(base))
                if inspect.isfunction(function) and function.__module__ == name and function.__name__ == member:
                    bare += [] if member.startswith("_") or described else [f"{name}.{where}.{member}"]
    assert bare == []


# Programs and packages whose names docstrings have beside the library's own.
ELSEWHERE = {
    "jax",
    "nnx",
    "nn",
    "optax",
    "datasets",
    "transformers",
    "tokenizers",
    "faulthandler",
    "pathlib",
    "lm_eval",
}
ELSEWHERE |= {"vllm", "metrics", "hf", "RankAllocator", "LlamaModel", "add_scalar", "variable_axes", "torch", "peft"}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)


def identifiers(tree: ast.Module) -> set[str]:
    """All names in code and, of short texts, all words; docstrings are longer."""
    names: set[str] = set()
    for node in ast.walk(tree):
        for field in ("id", "attr", "arg", "name", "asname"):
            if isinstance(value := getattr(node, field, None), str):
                names |= set(value.split("."))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) < 60:
            names |= set(re.findall(r"\w+", node.value))
    return names


def members(classes: dict[str, list[ast.ClassDef]], name: str) -> set[str] | None:
    """What a class of the library has, with its bases; None where one of these is of another package."""
    found: set[str] = set()
    for node in classes[name]:
        for child in ast.walk(node):
            if isinstance(child, ast.FunctionDef):
                found.add(child.name)
            elif isinstance(child, ast.Name | ast.Attribute) and isinstance(child.ctx, ast.Store):
                found.add(child.id if isinstance(child, ast.Name) else child.attr)
        for base in (ast.unparse(base).split("[")[0].split(".")[-1] for base in node.bases):
            inherited = members(classes, base) if base in classes and base != name else None
            if inherited is None and base not in ("Protocol", "NamedTuple", "Generic"):
                return None
            found |= inherited or set()
    return found


def test_names_in_docstrings_exist():
    """Files as `matmul.py`, and what stands between backticks as `name` or `name.name`."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}
    files = {path.name for folder in ("mora_jax", "scripts", "benchmarks") for path in (ROOT / folder).rglob("*.py")}
    known = set().union(*map(identifiers, trees.values()), *(path.relative_to(ROOT).parts for path in trees))
    known |= {path.stem for path in trees} | set(re.findall(r"\w+", " ".join(keys())))
    classes: dict[str, list[ast.ClassDef]] = {}
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                classes.setdefault(node.name, []).append(node)
    unknown = []
    for path, tree in trees.items():
        for node in (node for node in ast.walk(tree) if isinstance(node, DOCUMENTED)):
            text = ast.get_docstring(node) or ""
            missing = [name for name in re.findall(r"(?<![\w/.-])(\w+\.py)\b", text) if name not in files]
            for code in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text):
                found = re.fullmatch(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)(?:\(.*\))?", code, re.ASCII)
                parts = found[1].split(".") if found else []
                # Files of other kinds, and names with a number, which are examples.
                if not parts or parts[0] in ELSEWHERE or re.search(r"_\d|\.(json|txt|md)$|^[A-Z]+_|_[A-Z]+_", code):
                    continue
                if parts[0] in classes and len(parts) > 1:
                    has = members(classes, parts[0])
                    missing += [code] if has is not None and parts[1] not in has else []
                elif not known.issuperset(parts):
                    missing.append(code)
            unknown += [f"{path.relative_to(ROOT)}, {getattr(node, 'name', 'module')}: {name}" for name in missing]
    assert unknown == []
