"""Changes the library in one small place at a time and asks whether a test notices.

    python scripts/mutate.py cover tests/losses tests/models     # which test runs which line, and how long it takes
    python scripts/mutate.py run --count 200                     # mutants, each against the tests that run its line
    python scripts/mutate.py report --save mutants.jsonl         # the table, what was not killed, a line a mutant

Needs Python 3.12 and the extra `test`. All work is done in a copy of the repository under --work, on what `make test`
selects; both first commands go on where they were stopped. A mutant is killed by a test that fails: one that runs out
of time, or ends its process, is counted by itself and not as killed. Each result names the commit that it is of, and
those of other commits are left out of the table. A mutant that no test can tell from the original has a line with the
reason in scripts/equivalent_mutants.json. A mutant keeps its name while its function and its text stay.
"""

from __future__ import annotations

import argparse
import ast
import collections
import copy
import difflib
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
EQUIVALENT = Path(__file__).with_name("equivalent_mutants.json")
SELECTION = "not slow and not peers"
# A library that the children have from their parent and that has a plugin of pytest.
IGNORED = "ignore::pytest.PytestAssertRewriteWarning"
#: Packages and the files of each that are changed, as patterns; a sample has as many mutants of each package.
PACKAGES = {
    "adapters": ("adapters/*.py", "adapters/config/*.py"),
    "adapters/methods": ("adapters/methods/*.py",),
    "adapters/products": ("adapters/products/*.py",),
    "data": ("data/**/*.py",),
    "evaluation": ("evaluation/**/*.py",),
    "interop": ("interop/*.py", "interop/convert/*.py"),
    "interop/peft": ("interop/peft/*.py",),
    "linen": ("linen/*.py",),
    "losses": ("losses/*.py",),
    "models": ("models/**/*.py",),
    "studies, statistics": ("studies/intervals.py", "studies/results.py"),
    "sweeps": ("sweeps/*.py",),
    "training": ("training/*.py", "training/config/*.py", "training/sharding/*.py", "training/observe/*.py"),
    "training/run": ("training/run/*.py",),
}


class Mutant(NamedTuple):
    """One change: `text` in place of the characters from `start` to `end` of `path`."""

    name: str
    path: str
    kind: str
    line: int
    last_line: int
    in_function: bool
    start: int
    end: int
    text: str

    def source(self, original: str) -> str:
        """The changed file."""
        return original[: self.start] + self.text + original[self.end :]


# What stands in for an operator.
COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
ARITHMETIC = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip


# Calls whose first two arguments may change places, and one that fails at once when they do.
SAME_SWAPPED = ("min", "max", "minimum", "maximum", "isinstance")


def variants(node: ast.AST) -> Iterator[tuple[str, ast.AST, ast.AST | str]]:
    """Kind, node that is replaced and what replaces it, for the changes at this node itself."""
    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            new = copy.deepcopy(node)
            new.ops[i] = COMPARISONS[type(op)]()
            yield "comparison", node, new
    elif isinstance(node, (ast.BinOp, ast.AugAssign)) and type(node.op) in ARITHMETIC:
        new = copy.deepcopy(node)
        new.op = ARITHMETIC[type(node.op)]()
        yield "arithmetic", node, new
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
        yield "arithmetic", node, ast.BinOp(node.right, ast.MatMult(), node.left)
    elif isinstance(node, ast.BoolOp):
        new = copy.deepcopy(node)
        new.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield "boolean", node, new
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        yield "boolean" if isinstance(node.op, ast.Not) else "arithmetic", node, node.operand
    elif isinstance(node, ast.Constant) and type(node.value) in (bool, int, float):
        value = node.value
        other = not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else value * 2 or 1.0
        yield "constant", node, ast.Constant(other)
    elif isinstance(node, ast.Return) and node.value is not None and not is_constant(node.value, None):
        yield "returned value", node, "return None"
    elif isinstance(node, (ast.If, ast.IfExp)):
        yield "condition", node.test, ast.UnaryOp(ast.Not(), node.test)
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield "removed call", node, "pass"
    if isinstance(node, ast.Call) and len(node.args) >= 2 and not any(isinstance(a, ast.Starred) for a in node.args):
        new = copy.deepcopy(node)
        new.args[:2] = new.args[1::-1]
        if ast.unparse(node.func).split(".")[-1] not in SAME_SWAPPED and ast.dump(new) != ast.dump(node):
            yield "swapped arguments", node, new


def is_constant(node: ast.AST, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def mutants_of(path: Path, repository: Path) -> list[Mutant]:
    """All changes to one file, in the order of its text."""
    source = path.read_text()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def offset(line: int, column: int) -> int:
        text = source[starts[line - 1] : starts[line]]
        return starts[line - 1] + len(text.encode()[:column].decode())

    found: list[Mutant] = []
    seen: collections.Counter[str] = collections.Counter()
    relative = str(path.relative_to(repository))

    def visit(node: ast.AST, scope: tuple[str, ...], in_function: bool) -> None:
        for kind, old, new in variants(node):
            start, end = offset(old.lineno, old.col_offset), offset(old.end_lineno, old.end_col_offset)
            text = new if isinstance(new, str) else ast.unparse(ast.fix_missing_locations(new))
            if isinstance(old, ast.expr) and not isinstance(new, ast.Constant):
                text = f"({text})"
            key = "|".join((kind, ".".join(scope), source[start:end], text))
            seen[key] += 1
            digest = hashlib.sha256(f"{key}|{seen[key]}".encode()).hexdigest()[:8]
            name = f"{relative.removeprefix('mora_jax/')}:{'.'.join(scope) or '<module>'}:{digest}"
            found.append(Mutant(name, relative, kind, old.lineno, old.end_lineno, in_function, start, end, text))
        # What is said, not what is done: messages, annotations, texts, decorators.
        if isinstance(node, (ast.Raise, ast.JoinedStr, ast.Assert)):
            return
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns", "decorator_list"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if not isinstance(child, ast.AST):
                    continue
                named = isinstance(child, (ast.FunctionDef, ast.ClassDef))
                inner = isinstance(node, (ast.FunctionDef, ast.Lambda)) and field == "body"
                visit(child, (*scope, child.name) if named else scope, in_function or inner)

    visit(ast.parse(source), (), False)
    return found


def copy_repository(work: Path) -> Path:
    """A copy of what the tests read, with a link to the folder shared/ beside it.

    One that is there stays, for its lines are those that `cover` saw; but its tests are those of today.
    """
    target = work / "repository"
    ignore = shutil.ignore_patterns(".git", ".venv", "build", "runs", "__pycache__", ".*_cache", ".hypothesis")
    if target.is_dir():
        shutil.rmtree(target / "tests")
        shutil.copytree(ROOT / "tests", target / "tests", ignore=ignore)
    else:
        shutil.copytree(ROOT, target, ignore=ignore, symlinks=True)
        command = ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=-changed"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        (work / "commit").write_text(done.stdout or "unknown\n")
    shared = ROOT.parent / "shared"
    if shared.is_dir() and not (work / "shared").exists():
        (work / "shared").symlink_to(shared.resolve())
    return target


def prepare(work: Path) -> None:
    """Settings of tests/conftest.py that jax reads when it is imported, and the libraries that every child needs."""
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_ENABLE_ASYNC_DISPATCH": "0",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        # Programs that a mutant leaves as they are need not be compiled again.
        "JAX_COMPILATION_CACHE_DIR": str(work / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    sys.dont_write_bytecode = True
    import flax.nnx  # noqa: F401
    import jax  # noqa: F401
    import optax  # noqa: F401
    import orbax.checkpoint  # noqa: F401
    import pytest  # noqa: F401
    import transformers  # noqa: F401


def run_pytest(repository: Path, arguments: list[str], log: Path, seconds: float, plugin: Any = None) -> int | str:
    """The exit status of pytest in a child of its own, or "timeout" after so many seconds of one core."""
    child = os.fork()
    if child == 0:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.nice(19 - os.nice(0))
        with open(log, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.chdir(repository)
        os.environ["PYTHONPATH"] = str(repository)
        sys.path[:] = [str(repository), *(p for p in sys.path if Path(p).resolve() not in (ROOT, ROOT / "scripts"))]
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 5))
        import pytest

        common = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=line", "-m", SELECTION, "-W", IGNORED]
        status = 70
        try:
            status = int(pytest.main(common + arguments, plugins=[plugin] if plugin else []))
        except BaseException:  # noqa: BLE001 - the child ends here
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    waited, deadline = 0, time.monotonic() + 20 * seconds
    status = 0
    while not waited:
        waited, status = os.waitpid(child, os.WNOHANG)
        if not waited and time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "timeout"
        time.sleep(0.05)
    try:
        os.killpg(child, signal.SIGKILL)  # what tests left running
    except ProcessLookupError:
        pass
    if os.WIFSIGNALED(status):
        return "timeout" if os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL) else "crash"
    return os.WEXITSTATUS(status)


class Recorder:
    """A pytest plugin that notes which lines of the library each test runs, its time and its outcome."""

    def __init__(self, repository: Path, out: Path) -> None:
        self.library, self.root, self.out = str(repository / "mora_jax") + "/", str(repository) + "/", out
        self.lines: dict[str, set[int]] = collections.defaultdict(set)
        self.reports: list[Any] = []

    def pytest_sessionstart(self) -> None:
        monitoring = sys.monitoring
        tool, events = monitoring.COVERAGE_ID, monitoring.events
        monitoring.use_tool_id(tool, "mutate")

        def started(code: Any, offset: int) -> object:
            if code.co_filename.startswith(self.library) and not monitoring.get_local_events(tool, code):
                monitoring.set_local_events(tool, code, events.LINE)
            return monitoring.DISABLE

        def ran(code: Any, line: int) -> object:
            self.lines[code.co_filename.removeprefix(self.root)].add(line)
            return monitoring.DISABLE

        monitoring.register_callback(tool, events.PY_START, started)
        monitoring.register_callback(tool, events.LINE, ran)
        monitoring.set_events(tool, events.PY_START)

    def pytest_runtest_logstart(self) -> None:
        self.lines.clear()
        self.reports.clear()
        sys.monitoring.restart_events()

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.reports.append(report)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        record = {
            "test": nodeid,
            "passed": all(r.passed for r in self.reports),
            "seconds": {r.when: round(r.duration, 3) for r in self.reports},
            "lines": {path: sorted(lines) for path, lines in self.lines.items()},
        }
        with open(self.out, "a") as file:
            file.write(json.dumps(record) + "\n")


def cover(work: Path, paths: list[str]) -> None:
    """Runs test files one by one and notes what each test runs; a file that is done is left out."""
    repository = copy_repository(work)
    out = work / "coverage"
    out.mkdir(exist_ok=True)
    prepare(work)
    for path in paths:
        given = repository / path
        for file in sorted(given.rglob("test_*.py")) if given.is_dir() else [given]:
            name = str(file.relative_to(repository))
            done = out / (name.replace("/", "--") + ".jsonl")
            if done.exists():
                continue
            partial = done.with_suffix(".partial")
            partial.unlink(missing_ok=True)
            begin = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
            status = run_pytest(repository, [name], work / "cover.log", 1800, Recorder(repository, partial))
            used = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu = used.ru_utime + used.ru_stime - begin[1].ru_utime - begin[1].ru_stime
            print(f"{name}: {status}, {cpu:.1f} s of a core, {time.monotonic() - begin[0]:.1f} s", flush=True)
            if status in (0, 1, 5) and partial.touch() is None:
                partial.rename(done)


def load_coverage(work: Path) -> tuple[dict[str, dict[int, set[str]]], dict[str, float]]:
    """The tests by file and line, and their seconds, without those that fail in the original."""
    tests: dict[str, dict[int, set[str]]] = collections.defaultdict(lambda: collections.defaultdict(set))
    seconds: dict[str, float] = {}
    for file in sorted((work / "coverage").glob("*.jsonl")):
        for line in file.read_text().splitlines():
            record = json.loads(line)
            if not record["passed"]:
                continue
            seconds[record["test"]] = sum(record["seconds"].values())
            for path, lines in record["lines"].items():
                for number in lines:
                    tests[path][number].add(record["test"])
    return tests, seconds


def choose_tests(
    mutant: Mutant, repository: Path, tests: dict[str, dict[int, set[str]]], seconds: dict[str, float]
) -> list[str]:
    """The tests that run the mutant's lines; first those of the file that mirrors the module, then the fastest."""
    lines = tests.get(mutant.path, {})
    if mutant.in_function:
        found = set().union(*(lines.get(number, set()) for number in range(mutant.line, mutant.last_line + 1)))
    else:
        # What runs while the module is imported: every test of the module, and of lines elsewhere with its name.
        found = set().union(*lines.values())
        text = (repository / mutant.path).read_text().splitlines()[mutant.line - 1]
        if name := re.match(r"\s*(\w+)\s*[:=]", text):
            for path, others in tests.items():
                source = (repository / path).read_text().splitlines()
                for number, those in others.items():
                    if any(re.search(rf"\b{name[1]}\b", line) for line in source[number - 1 : number]):
                        found |= those  # an empty module runs a first line that it doesn't have
    mirror = f"test_{Path(mutant.path).stem}.py"
    return sorted(found, key=lambda test: (f"/{mirror}::" not in test, seconds[test]))


def collected(repository: Path, work: Path, selected: list[str]) -> bool:
    """Whether the tests are there without the mutant."""
    return run_pytest(repository, ["--collect-only", *selected], work / "control.log", 900) == 0


def outcome(status: int | str, by: str) -> str:
    """killed, survived, timeout, crash or unclear: what pytest's exit status, and the first test that failed, say."""
    if status in ("timeout", "crash", "unclear"):
        return str(status)
    if status in (0, "no test"):
        return "survived"
    if status == 70:
        return "crash"
    # Without a test that failed nothing was noticed by one.
    return "killed" if by else "unclear"


def run(work: Path, packages: list[str], count: int, seed: int, budget: float, again: bool) -> None:
    """Runs a seeded sample of mutants and adds a line for each to results.jsonl."""
    tests, seconds = load_coverage(work)
    repository = copy_repository(work)
    commit = (work / "commit").read_text().strip()
    results_path = work / "results.jsonl"
    done = {name: r for name, r in load_results(work).items() if not (again and r["result"] == "survived")}
    equivalent = load_equivalent()
    prepare(work)
    for package, mutant in sample(repository, packages, count, seed):
        if mutant.name in done or mutant.name in equivalent:
            continue
        chosen = choose_tests(mutant, repository, tests, seconds)
        selected, total = [], 0.0
        for test in chosen:
            if selected and total + seconds[test] > budget:
                break
            selected.append(test)
            total += seconds[test]
        begin = time.monotonic()
        original = (repository / mutant.path).read_text()
        if not selected:
            result: int | str = "no test"
        else:
            file = repository / mutant.path
            file.write_text(mutant.source(original))
            os.utime(file, (time.time() + 1000, time.time() + 1000))
            try:
                result = run_pytest(repository, ["-x", *selected], work / "mutant.log", 60 + 4 * total)
            finally:
                file.write_text(original)
        if result in (2, 3, 4, 5) and not collected(repository, work, selected):
            result = "unclear"
        by = first_failure(work / "mutant.log") if selected and result != 0 else ""
        record = mutant._asdict() | {
            "package": package,
            "commit": commit,
            "result": outcome(result, by),
            "status": result,
            "tests": f"{len(selected)} of {len(chosen)}",
            "seconds": round(time.monotonic() - begin, 1),
            "by": by,
            "change": difference(original, mutant),
        }
        with open(results_path, "a") as log:
            log.write(json.dumps(record) + "\n")
        print(f"{record['result']:9} {record['seconds']:6.1f} s {mutant.name} {record['by']}", flush=True)


def first_failure(log: Path) -> str:
    """The first test that failed, as pytest's summary names it."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return lines[0].split(" ")[1] if lines else ""


def difference(original: str, mutant: Mutant) -> str:
    """The changed lines."""
    lines = difflib.unified_diff(original.splitlines(), mutant.source(original).splitlines(), lineterm="", n=0)
    return "\n".join(line for line in lines if not line.startswith(("---", "+++", "@@")))


def sample(repository: Path, packages: list[str], count: int, seed: int) -> list[tuple[str, Mutant]]:
    """A seeded sample with the package of each mutant: as many of each, in turns, so that any beginning is even too.

    Within a package every possible change is as likely as any other. `count` is of all packages; 0 takes all changes.
    """
    pools = {}
    for package in packages:
        files = sorted({path for pattern in PACKAGES[package] for path in (repository / "mora_jax").glob(pattern)})
        pools[package] = [mutant for path in files for mutant in mutants_of(path, repository)]
        random.Random(f"{seed} {package}").shuffle(pools[package])
    most = max(map(len, pools.values())) if count <= 0 else -(-count // len(pools))
    return [(package, pool[i]) for i in range(most) for package, pool in pools.items() if i < len(pool)]


def load_results(work: Path) -> dict[str, dict[str, Any]]:
    """The last result of each mutant that the copy of the library still has, at the copy's commit."""
    repository, commit = work / "repository", (work / "commit").read_text().strip()
    path = work / "results.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    records = [record for record in map(json.loads, lines) if record.get("commit") == commit]
    files = [repository / name for name in {record["path"] for record in records}]
    there = {mutant.name for file in files if file.exists() for mutant in mutants_of(file, repository)}
    return {record["name"]: record for record in records if record["name"] in there}


def load_equivalent() -> dict[str, str]:
    """Reason by mutant."""
    return json.loads(EQUIVALENT.read_text()) if EQUIVALENT.exists() else {}


#: The columns of the table.
RESULTS = ("equivalent", "killed", "survived", "timeout", "crash", "unclear")


def report(work: Path, save: Path | None) -> None:
    """Prints a table by package, and each mutant that was not killed; saves a line of JSON a mutant."""
    equivalent = load_equivalent()
    rows: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    survivors = []
    for name, record in sorted(load_results(work).items()):
        result = "equivalent" if name in equivalent else record["result"]
        rows[record["package"]][result] += 1
        if result not in ("killed", "equivalent"):
            survivors.append(record)
    total: collections.Counter[str] = sum(rows.values(), collections.Counter())
    print(f"| package | mutants | {' | '.join(RESULTS)} |\n| --- | ---: |{' ---: |' * len(RESULTS)}")
    for package, counts in [*sorted(rows.items()), ("all", total)]:
        print(f"| `{package}` | {counts.total()} | {' | '.join(str(counts[name]) for name in RESULTS)} |")
    real = total.total() - total["equivalent"]
    print(
        f"\nKilled: {total['killed']} of {real} that are not equivalent, {100 * total['killed'] / max(real, 1):.1f} %."
    )
    print(f"Commit {(work / 'commit').read_text().strip()}.")
    if save is not None:
        records = sorted(load_results(work).items())
        marked = (record | {"equivalent": equivalent.get(name)} for name, record in records)
        save.write_text("".join(json.dumps(record) + "\n" for record in marked), encoding="utf-8")
    for record in survivors:
        print(
            f"\n{record['result']} {record['name']} line {record['line']} ({record['kind']}; {record['tests']} tests)"
        )
        print(record["change"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "mutation", help="where the copy and results are")
    commands = parser.add_subparsers(dest="command", required=True)
    covering = commands.add_parser("cover")
    covering.add_argument("paths", nargs="*", default=["tests"])
    running = commands.add_parser("run")
    running.add_argument("--count", type=int, default=200, help="size of the sample; 0 for all")
    running.add_argument("--seed", type=int, default=0)
    running.add_argument("--packages", nargs="*", default=list(PACKAGES), choices=list(PACKAGES), metavar="PACKAGE")
    running.add_argument("--budget", type=float, default=120, help="seconds of tests for a mutant, as cover took them")
    running.add_argument("--again", action="store_true", help="run survivors again")
    commands.add_parser("report").add_argument("--save", type=Path, metavar="FILE", help="the results, a line each")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    work = args.work.resolve()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if args.command == "cover":
        cover(work, args.paths)
    elif args.command == "run":
        run(work, args.packages, args.count, args.seed, args.budget, args.again)
    else:
        report(work, args.save)


if __name__ == "__main__":
    main()
