"""Fills the reference pages from the definitions of what they describe; a hook of mkdocs, named in `mkdocs.yml`.

A page asks for it by a comment on a line of its own:

    <!-- names: PACKAGE in MODULE ... -->   the public names of a package that are defined in these modules
    <!-- names: PACKAGE -->                 all of them; with `; no members` at its end, classes without their methods
    <!-- commands -->                       every command, from its argument parser
    <!-- keys -->                           every configuration key, from the schema
    <!-- families -->                       every model family, from their registry
"""

from __future__ import annotations

import argparse
import ast
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NAMES = re.compile(r"^<!-- names: ([\w.]+)(?: in ([^>;]+))?(; no members)? -->$", re.MULTILINE)
# Columns that a page has room for.
WIDTH = 76
# Tables of choices, which the guides explain, and names that are under `mora_jax` already.
TABLES = {"FORMATS", "MODES", "TEMPLATES", "COLLECTION", "KINDS", "LoRALinear", "MoRALinear"}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """What mkdocs calls with the text of each page."""
    return fill(markdown)


def fill(markdown: str) -> str:
    """The text of a page with its comments replaced by what they ask for."""
    markdown = NAMES.sub(lambda match: _names(match[1], (match[2] or "").split(), match[3] is None), markdown)
    for comment, text in (("<!-- commands -->", commands), ("<!-- keys -->", keys), ("<!-- families -->", families)):
        if comment in markdown:
            markdown = markdown.replace(comment, text())
    return markdown


def public(package: str) -> dict[str, str]:
    """The public names of a package with the module of each, in the order in which the package lists them."""
    if package == "mora_jax":
        import mora_jax

        return mora_jax._HOMES | dict.fromkeys(mora_jax._configs(), "mora_jax.adapters.config")
    path = ROOT / package.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module != "__future__"]
    names = {alias.asname or alias.name: str(node.module) for node in imports for alias in node.names}
    return {name: module for name, module in names.items() if name not in TABLES}


def _names(package: str, modules: list[str], members: bool) -> str:
    options = "" if members else "\n    options:\n      members: false"
    found = [
        f"::: {package}.{name}{options}"
        for name, home in public(package).items()
        if not modules or any(home == module or home.startswith(f"{module}.") for module in modules)
    ]
    if not found:
        raise ValueError(f"no public name of {package} is in {' '.join(modules)}")
    return "\n\n".join(found)


def families() -> str:
    """A table of the model families: the models, their `model_type`, and in what they differ from Llama."""
    from mora_jax.models.families import FAMILIES

    notes = [(family.read.__doc__ or "").partition(": ")[2].strip().rstrip(".") for family in FAMILIES]
    rows = [
        f"| {family.title} | `{family.model_type}` | {note} |" for family, note in zip(FAMILIES, notes, strict=True)
    ]
    return "\n".join(["| models | `model_type` | what is its own |", "| --- | --- | --- |", *rows])


def commands() -> str:
    """Markdown about every command: what it does, how it is called, its options."""
    from mora_jax.cli.main import build_parser

    return "\n\n".join("\n\n".join(_command(name, parser)) for name, parser in build_parser()[1].items())


def _command(name: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    yield f"## mora-jax {name}"
    yield from _paragraphs(parser.description or "")
    yield f"```text\n{_usage(parser)}\n```"
    options = (_option(parser, action) for action in parser._actions if "--help" not in action.option_strings)
    yield "\n".join(["| option | what |", "| --- | --- |", *options])
    if name == "train":
        yield "Each `--config.KEY=VALUE` sets one of the [configuration keys](keys.md)."


def _paragraphs(description: str) -> Iterator[str]:
    for paragraph in description.strip().split("\n\n"):
        lines = paragraph.splitlines()
        if all(line.startswith("  ") for line in lines):
            yield f"```text\n{_wrapped(lines)}\n```"
        else:
            # `lora: …` at the start of a line begins an item of a list.
            text = re.sub(r"^(\w+): ", r"\n- `\1`: ", paragraph, flags=re.MULTILINE)
            yield _escape(text.strip("\n"), "*<[")


def _usage(parser: argparse.ArgumentParser) -> str:
    formatter = argparse.HelpFormatter(parser.prog, width=WIDTH)
    formatter.add_usage(parser.usage, parser._actions, parser._mutually_exclusive_groups, prefix="")
    lines = formatter.format_help().strip().splitlines()
    if parser.usage is None:
        return "\n".join(lines)
    return _wrapped(lines)


def _wrapped(lines: list[str]) -> str:
    wrap = textwrap.TextWrapper(WIDTH, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
    return "\n".join(part for line in lines for part in wrap.wrap(line.strip()))


def _option(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    formatter = argparse.HelpFormatter(parser.prog)
    flags = action.option_strings or [action.dest]
    value = "" if action.nargs == 0 else formatter._format_args(action, str(action.metavar or action.dest).upper())
    words = formatter._expand_help(action) if action.help else ""
    shown = ", ".join(f"`{flag}`" for flag in flags[:-1]) + (", " if flags[1:] else "")
    cells = f"{shown}`{f'{flags[-1]} {value}'.strip()}`", _escape(words)
    return f"| {cells[0].replace('|', chr(92) + '|')} | {cells[1]} |"


def keys() -> str:
    """Markdown about every configuration key: what it means, what it accepts, its default, and who reads it."""
    from mora_jax.training.config import schema

    tables: dict[str, list[str]] = {}
    for name, key in schema.keys().items():
        section, _, last = name.rpartition(".")
        default = "required" if "Required." in key.doc else f"default: {key.show(key.default)}"
        facts = [key.describe(), default]
        if section == "adapter" and (methods := _methods(last, schema.METHOD_KEYS)):
            facts.append(f"methods: {methods}")
        words = key.doc.removesuffix(" Required.")
        cell = f"{_escape(words)}<br>*{_escape('; '.join(facts))}*"
        tables.setdefault(section, []).append(f'| <span id="{name}"></span>`{name}` | {cell} |')
    parts = []
    for section, rows in tables.items():
        parts.append(f"## {section or 'The run'}")
        if section:
            about = (schema.sections()[section].__doc__ or "").strip().splitlines()[0].partition(": ")[2]
            parts.append(about[:1].upper() + about[1:] if about else "How the weights are updated.")
        parts.append("\n".join(["| key | what |", "| --- | --- |", *rows]))
    return "\n\n".join(parts)


def _methods(key: str, read: Any) -> str:
    """Which methods read a key of the section `adapter`; empty where all that have an adapter do."""
    readers = [method for method, names in read.items() if key in names]
    others = [method for method in read if method not in readers]
    if key == "method" or len(others) <= 1:
        return ""
    return f"all but {', '.join(others)}" if len(others) < len(readers) else ", ".join(readers)


def _escape(text: str, special: str = "*<[|") -> str:
    return re.sub(f"([{re.escape(special)}])", r"\\\1", text)
