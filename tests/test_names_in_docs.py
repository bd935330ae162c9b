"""What README, docs, configs and launch scripts name exists: links, paths, commands, options, keys, extras, targets."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from mora_jax.cli.main import COMMANDS, HAND_ON, build_parser
from mora_jax.cli.options import take_overrides
from mora_jax.training.config.schema import find_key, keys, sections

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = [*PAGES, *sorted((ROOT / "configs").glob("*.py")), *sorted((ROOT / "scripts" / "launch").iterdir())]
BLOCK = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
FOLDERS = "configs|scripts|benchmarks|notebooks|docs|mora_jax|tests"
# Options of other programs that pages name alone.
OTHERS = {"--gpus-per-node", "--accelerator-type", "--runtime-version", "--worker"}
OTHERS |= {"--model", "--apply_chat_template", "--output_path", "--use_cache"}  # of the lm-evaluation-harness
OTHERS |= {"--lora-modules", "--max-lora-rank", "--base"}  # of vLLM and llama.cpp

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
each_text = pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.name)


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def inline(text: str) -> list[str]:
    """What stands between single backticks; a line's end is a space."""
    return [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", BLOCK.sub("", text))]


def shell_lines(page: Path) -> list[str]:
    """Lines of shell, those that go on joined, comments left out."""
    blocks = [code for kind, code in BLOCK.findall(read(page)) if kind in ("sh", "bash", "")]
    code = "\n".join(blocks) if page.suffix == ".md" else read(page)
    lines = code.replace("\\\n", " ").splitlines()
    return [re.sub(r"(^|\s)#.*", "", line).strip() for line in lines]


def commands(page: Path) -> list[list[str]]:
    """The arguments of every `mora-jax` in shell or between backticks."""
    lines = [line for line in [*shell_lines(page), *inline(read(page))] if "mora-jax " in f"{line} "]
    found = []
    for line in lines:
        for call in re.findall(r"(?<![\w/-])mora-jax( [^|;&>)]*)", line):
            # Of a command within the quotes of another the last quote is left.
            found.append(shlex.split(call if call.count("'") % 2 == 0 else call.replace("'", "")))
    return [call for call in found if call]


def slugs(page: Path) -> set[str]:
    """The anchors of a page: those of its headings, and of what mkdocstrings puts there."""
    text = BLOCK.sub("", read(page))
    found = {re.sub(r"[^\w\s-]", "", title).strip().lower() for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}
    # What `scripts/docs_reference.py` puts in when the site is built counts as the names of the package.
    names = {
        f"{package}.{name}"
        for package in re.findall(r"^<!-- names: ([\w.]+)", text, re.MULTILINE)
        for name in public(package)
    }
    return {re.sub(r"\s+", "-", title) for title in found} | names | set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))


def public(package: str) -> list[str]:
    module = importlib.import_module(package)
    return getattr(module, "__all__", dir(module))


@each_page
def test_links(page):
    for target in re.findall(r"\]\(\s*([^)\s]+)", BLOCK.sub("", read(page))):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        assert not anchor or anchor in slugs(file), target


def test_every_page_is_in_the_site():
    named = set(re.findall(r": ([\w/]+\.md)$", read(ROOT / "mkdocs.yml"), re.MULTILINE))
    assert named == {page.relative_to(ROOT / "docs").as_posix() for page in PAGES[1:]}


@each_text
def test_paths(page):
    for path in re.findall(rf"(?<![\w./~-])((?:{FOLDERS})/[\w./*-]*[\w*/])", read(page)):
        assert list(ROOT.glob(path)), path


@each_text
def test_names_in_python(page):
    for name in re.findall(r"(?<![\w./-])mora_jax(?:\.[a-zA-Z_]\w*)+", read(page)):
        parts = name.split(".")
        found, depth = importlib.import_module(parts[0]), 1
        while depth < len(parts):
            try:
                found = importlib.import_module(".".join(parts[: depth + 1]))
            except ModuleNotFoundError:
                break
            depth += 1
        if depth < len(parts) and hasattr(found, "__path__") and importlib.util.find_spec(".".join(parts[: depth + 1])):
            continue  # its extra is not installed
        for part in parts[depth:]:
            assert hasattr(found, part), name
            found = getattr(found, part)
    import mora_jax

    for name in re.findall(r"\bmj\.(\w+)", read(page)):
        assert hasattr(mora_jax, name), name


@each_text
def test_commands(page):
    for call in commands(page):
        rest, overrides = take_overrides(call)
        for name, text in overrides:
            if "*" not in name and name not in ("KEY", "section.key"):
                find_key(name, "page").parse(text, "page")
        command = rest[0] if rest else ""
        if command in COMMANDS and not any("…" in word or "..." in word for word in rest):
            options = _options(command)
            if command in HAND_ON:
                continue
            assert [word for word in rest if word.startswith("--") and word.partition("=")[0] not in options] == [], (
                call
            )
        else:
            assert command in {*COMMANDS, "COMMAND", "help", "…", ""} or command.startswith("-"), call


@each_page
def test_command_lines_can_be_parsed(page):
    """Those of shell blocks are whole: the real parser takes them."""
    for line in shell_lines(page):
        calls = re.findall(r"^(?:srun |\S+=\S+ )*mora-jax( [^|;&>)]*)", line)
        for call in calls:
            rest, _ = take_overrides(shlex.split(call))
            if not any("…" in word or "..." in word for word in rest) and rest[0] not in HAND_ON:
                build_parser()[0].parse_args(rest)


@functools.cache
def _options(command: str) -> set[str]:
    return {option for action in build_parser()[1][command]._actions for option in action.option_strings}


@each_page
def test_options_alone(page):
    """An option that stands alone between backticks is some command's, or some script's."""
    programs = "".join(
        read(file) for folder in ("scripts", "benchmarks") for file in sorted((ROOT / folder).rglob("*.py"))
    )
    known = {option for command in COMMANDS for option in _options(command)} | OTHERS
    known |= set(re.findall(r'add_argument\("(--[\w-]+)"', programs))
    for code in inline(read(page)):
        for word in code.split():
            name = word.partition("=")[0]
            if code.startswith("--") and name.startswith("--") and not name.startswith("--config."):
                assert name in known, code


@each_page
def test_scripts_have_the_options_they_are_called_with(page):
    for line in shell_lines(page):
        found = re.search(r"\bpython3? ((?:scripts|benchmarks)/[\w/]+\.py)(.*)", line)
        if found is None:
            continue
        source = read(ROOT / found[1])
        for word in found[2].partition(" -- ")[0].split():
            assert not word.startswith("--") or f'"{word.partition("=")[0]}"' in source, line


@each_text
def test_configuration_keys(page):
    names = "|".join(sections())
    for name in re.findall(r"--config\.([a-z_]+(?:\.[a-z_]+)*)", read(page)):
        assert name in keys() or any(key.startswith(f"{name}.") for key in keys()), name
    for code in inline(read(page)) if page.suffix == ".md" else ():
        for word in code.split():
            if found := re.fullmatch(rf"((?:{names})\.[a-z_]+)(?:=\S+)?", word):
                assert found[1] in keys(), code


@each_page
def test_extras_and_targets(page):
    extras = tomllib.loads(read(ROOT / "pyproject.toml"))["project"]["optional-dependencies"]
    for names in re.findall(r"(?:mora-jax|'\.|\"\.)\[([\w,-]+)\]", read(page)):
        assert set(names.split(",")) <= set(extras), names
    targets = set(re.findall(r"^([\w-]+):", read(ROOT / "Makefile"), re.MULTILINE))
    for code in [*shell_lines(page), *inline(read(page))]:
        if found := re.match(r"make ([a-z-]+)", code):
            assert found[1] in targets, code


#: What a target runs, by the marks of its tests; `shared` are in each, where that folder is.
RUNS = {
    "`make test`": lambda marks: not marks & {"slow", "peers", "shared"},
    "`make test-peers`": lambda marks: "peers" in marks and not marks & {"slow", "shared"},
    "`make test-all`": lambda marks: "shared" not in marks,
    "*shared*": lambda marks: "shared" in marks and "slow" not in marks,
}


def marks_of_tests(file: Path) -> dict[str, tuple[set[str], str]]:
    """The marks of each test of a file, and what it is skipped without."""
    tree = ast.parse(read(file))
    texts = {
        ast.unparse(node.targets[0]): ast.unparse(node.value) for node in tree.body if isinstance(node, ast.Assign)
    }
    tests = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
            text = "\n".join([texts.get("pytestmark", ""), *decorators, *(texts.get(one, "") for one in decorators)])
            skipped = "".join(re.findall(r"skip.*", text)) + "".join(re.findall(r"pytest\.skip.*", ast.unparse(node)))
            tests[node.name] = set(re.findall(r"mark\.(\w+)", text)), skipped
    return tests


def test_what_was_verified_is_run_by_what_the_page_names():
    page = ROOT / "docs" / "verified.md"
    rows = [row for row in read(page).splitlines() if row.startswith("| ")]
    rows = [row for row in rows if not re.match(r"\| (---|method|family|part) ", row)]
    assert len(rows) > 20
    for row in rows:
        cell = row.rstrip(" |").rpartition(" | ")[2]
        for part in cell.split("; "):
            target, _, names = part.partition(": ")
            assert target in RUNS and names, row
            for name in re.findall(r"`([^`]+)`", names):
                path, _, function = name.partition("::")
                tests = marks_of_tests(ROOT / path)
                chosen = [tests[function]] if function else list(tests.values())
                runs = [skipped for marks, skipped in chosen if RUNS[target](marks)]
                assert runs, f"{target} runs nothing of {name}"
                for skipped in runs:
                    assert all(variable in row for variable in re.findall(r"[A-Z]+_[A-Z0-9_]+", skipped)), name
                    assert not skipped or "environ" in skipped or not function, f"{name} may be skipped"


def test_a_test_that_a_target_leaves_out_is_found(tmp_path):
    (tmp_path / "test_x.py").write_text(
        "import pytest\npytestmark = pytest.mark.peers\n@pytest.mark.slow\ndef test_one(): ...\ndef test_two(): ...\n"
    )
    tests = marks_of_tests(tmp_path / "test_x.py")
    assert [RUNS["`make test-peers`"](tests[name][0]) for name in ("test_one", "test_two")] == [False, True]
    assert not RUNS["`make test`"](tests["test_two"][0]) and RUNS["`make test-all`"](tests["test_one"][0])
