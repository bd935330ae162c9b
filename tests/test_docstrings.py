"""The examples in docstrings run and print what they say."""

from __future__ import annotations

import doctest
import importlib
import inspect
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "mora_jax"
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
