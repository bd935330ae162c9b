"""The pages in docs/: what they run prints what they say, and the names in them exist."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import inspect
import io
import re
from pathlib import Path

import pytest

import mora_jax.data
from mora_jax.adapters.methods.mora import KINDS
from mora_jax.data.examples import TRUNCATIONS
from mora_jax.data.formats.registry import FORMATS
from mora_jax.data.inspect.report import CAUSES
from mora_jax.data.loss_weights import ENDS, HEADERS, MODES, NORMALIZERS
from mora_jax.data.templates.builtin import TEMPLATES
from mora_jax.models.families import FAMILIES
from mora_jax.training.config.schema import METHOD_KEYS, QUANTIZE, keys, sections

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
# A block of Python and, if it prints, what it prints.
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)


def read(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def run_blocks(text: str) -> list[tuple[str, str]]:
    """What the blocks of a page should print, and what they do print."""
    scope: dict[str, object] = {}
    results = []
    for number, match in enumerate(BLOCK.finditer(text), start=1):
        code, expected = match.groups()
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, f"block {number}", "exec"), scope)
        results.append((expected or "", printed.getvalue()))
    return results


@pytest.mark.parametrize(
    ("page", "blocks"),
    [
        ("index", 1),
        ("finetune", 3),
        ("evaluation", 1),
        ("walkthrough", 8),
        ("preferences", 1),
        ("own_models", 18),
        ("own_loss", 2),
        ("transforms", 6),
        ("convert", 3),
        ("peft", 5),
        ("mora", 1),
        ("equivalents", 1),
    ],
)
def test_blocks_print_what_they_show(page, blocks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = run_blocks(read(f"{page}.md"))
    assert len(results) == blocks
    for expected, printed in results:
        assert printed == expected


def test_memory_is_that_of_the_study():
    """What a page says of it stands in the study's table, which README's picture is drawn from."""
    from mora_jax.studies.memorize import Memorize
    from mora_jax.studies.results import Results

    results = Results.read(DOCS / "studies" / "memorize" / "quick" / "cells.csv", Memorize())
    arm = r"LoRA r\d(?:, α = 8r)?|MoRA \w+ r\d|full"
    rows = re.findall(rf"^\| ({arm}) \| ([\d,]+) \| (.*) \|$", read("mora.md"), re.MULTILINE)
    assert len(rows) == 6
    for arm, parameters, accuracy in rows:
        assert parameters == f"{results.parameters(arm):,}"
        assert accuracy == results.mean("generated_accuracy", arm, "128 pairs").text(2)


def test_every_method_is_documented():
    text = read("methods.md")
    assert [name for name in (*METHOD_KEYS, *KINDS) if f"`{name}`" not in text] == []


def test_costs_are_those_that_were_measured():
    measured = (DOCS.parent / "benchmarks" / "results" / "method_cost.md").read_text(encoding="utf-8")
    rows = [line for line in measured.splitlines() if line.startswith("| ")]
    assert len(rows) > 15
    assert [row for row in rows if row not in read("methods.md")] == []


def test_figures_of_quantised_bases_are_those_that_were_measured():
    measured = (DOCS.parent / "benchmarks" / "results" / "quantized_base.md").read_text(encoding="utf-8")
    rows = [line for line in measured.splitlines() if line.startswith("| ")]
    assert len(rows) == 5
    assert [row for row in rows if row not in read("quantized_base.md")] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_configuration_keys_exist(page):
    names = "|".join(sections())
    named = set(re.findall(rf"`(?:--config\.)?((?:{names})\.[a-z0-9_]+)", page.read_text(encoding="utf-8")))
    assert named <= keys().keys()


@pytest.mark.parametrize(
    "page, names",
    [
        ("loss.md", (*MODES, *NORMALIZERS, *ENDS, *HEADERS)),
        ("formats.md", FORMATS),
        ("templates.md", TEMPLATES),
        ("batches.md", (*TRUNCATIONS, *CAUSES)),
        ("adapters.md", METHOD_KEYS),
        ("quantized_base.md", QUANTIZE),
    ],
)
def test_every_choice_is_documented(page, names):
    text = read(page)
    assert [name for name in names if f"`{name}`" not in text] == []


def test_weights_of_the_table_are_those_of_the_code():
    rows = re.findall(r"^\| `(\w+)`[^|]*\|([^|]*)\|([^|]*)\|([^|]*)\| `(\w+)` \|", read("loss.md"), re.MULTILINE)
    assert {mode for mode, *_ in rows} == set(MODES)
    for mode, answers, instructions, template, normalize in rows:
        assert normalize == MODES[mode].normalize
        table = MODES[mode].table(0.25)
        for cell, segment in ((answers, "ASSISTANT"), (instructions, "USER"), (template, "HEADER")):
            said = 0.25 if "prompt_weight" in cell else float(cell.split()[0])
            assert table.get(mora_jax.data.Segment[segment], 0.0) == said, (mode, segment)


@pytest.fixture(scope="module")
def hook():
    """The script that fills the reference when the site is built."""
    spec = importlib.util.spec_from_file_location("docs_reference", DOCS.parent / "scripts" / "docs_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_names_every_family():
    text = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    assert [family.title for family in FAMILIES if f"`{family.model_type}`" not in text] == []


def test_reference_has_every_public_name(hook):
    text = "\n".join(hook.fill(path.read_text(encoding="utf-8")) for path in (DOCS / "reference").glob("*.md"))
    named = re.findall(r"^::: (\S+)$", text, re.MULTILINE)
    assert len(named) == len(set(named))
    missing = []
    for package in ("mora_jax", "mora_jax.linen", "mora_jax.data", "mora_jax.evaluation", "mora_jax.interop.convert"):
        module = importlib.import_module(package)
        public = getattr(module, "__all__", [name for name in vars(module) if not name.startswith("_")])
        missing += [f"{package}.{name}" for name in public if f"{package}.{name}" not in named]
    # Modules; tables of choices, which pages of their own explain; the encoder that belongs to `Source`.
    others = {"FORMATS", "MODES", "TEMPLATES", "COLLECTION", "__version__", "Row"}
    names = {name for name in missing if name.rpartition(".")[2] not in others}
    assert {name for name in names if not isinstance(_find(name), type(pytest))} == set()
    for name in named:
        described = _find(name)
        doc = inspect.getdoc(described) or ""
        assert doc, name
        parameters = inspect.signature(described).parameters if inspect.isfunction(described) else ()
        assert [one for one in parameters if not re.search(rf"\b{one}\b", doc)] == [], name
        members = vars(described).values() if inspect.isclass(described) else ()
        for function in filter(inspect.isfunction, [described, *members]):
            assert _described_arguments(function) <= set(inspect.signature(function).parameters), function


def _described_arguments(function: object) -> set[str]:
    """The names in the section `Args` of a docstring; a strict build of the site allows none that is no parameter."""
    section = re.search(r"^Args:\n((?:(?:  .*)?\n)+)", (inspect.getdoc(function) or "") + "\n\n", re.MULTILINE)
    if section is None:
        return set()
    indent = re.match(" +", section[1])[0]
    return {name.lstrip("*") for name in re.findall(rf"^{indent}(\S[^:]*):", section[1], re.MULTILINE)}


def _find(name: str) -> object:
    package, _, last = name.rpartition(".")
    return getattr(importlib.import_module(package), last)


def test_reference_has_every_command_and_option(hook):
    from mora_jax.cli.main import build_parser

    text = hook.fill(read("reference/commands.md"))
    for name, parser in build_parser()[1].items():
        section = text.partition(f"## mora-jax {name}\n")[2].partition("\n## ")[0]
        for action in parser._actions:
            for flag in action.option_strings or [action.dest]:
                assert flag in ("-h", "--help") or re.search(rf"`{flag}[ `]", section), (name, flag)
    assert "%(" not in text and "==SUPPRESS==" not in text


def test_reference_has_every_key_with_its_default(hook):
    text = hook.fill(read("reference/keys.md"))
    for name, key in keys().items():
        (row,) = (line for line in text.splitlines() if f"`{name}` |" in line)
        if isinstance(key.default, (int, float, str)):
            assert f"default: {str(key.default).lower()}" in row, name


def test_settings_of_a_source_are_keys_of_the_configuration():
    fields = {field.name for field in dataclasses.fields(mora_jax.data.Source)} - {"paths"}
    assert {f"data.{name}" for name in fields} <= keys().keys()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+\.md)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).is_file()


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_several_adapters_prints_what_it_shows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = run_blocks(read("several_adapters.md"))
    assert len(results) == 7
    for expected, printed in results:
        assert printed == expected
