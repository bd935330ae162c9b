"""Makes the tables of the benchmarks: all, or those that are named, one after the other.

    python benchmarks/run.py --list
    python benchmarks/run.py --quick
    python benchmarks/run.py decoding lora_against_peft --model SmolLM2-135M-Instruct --out runs/benchmarks
    python benchmarks/run.py decoding --model SmolLM2-135M-Instruct -- --rows 1 --rounds 3
    python benchmarks/run.py --stale

Each benchmark is a script of its own and runs in a process of its own. Of each this writes `OUT/NAME.md`, the machine
and the table, and `OUT/NAME.json`, the same for programs: the machine, the command, how long it took, the tables row by
row, and the times of each round where the benchmark keeps them. One that fails doesn't stop the others; those that
failed are named at the end. `--quick` takes the smallest sizes, on the embedded demo model some seconds to a minute
each: it shows that they work, and its numbers say nothing. What stands behind `--` goes to the scripts.

The files in `benchmarks/results` name the commit that they were made at. `--stale` lists those of which the script or a
file of the library has changed since, of the files that the script imports, directly or not.

A script says in two constants what it is called with: `CALL`, and `QUICK`, which goes behind it with `--quick`. In them
`{model}`, `{data}` and `{python}` are what this is given, `{table}` and `{json}` files that the script writes (without
`{table}` what it prints is taken), and `{work}` a folder for what else it leaves.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import os
import queue
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measuring

from mora_jax.demo import data_path, model_path
from mora_jax.environment import has_nvidia_gpu

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
#: Seconds of silence after which the time that has passed is shown.
PATIENCE = 30


@dataclass(frozen=True)
class Benchmark:
    """One script.

    Attributes:
        script: its path.
        title: the first sentence of its docstring.
        call: its arguments, with placeholders.
        quick: those that follow with `--quick`; None where it has no quick form.
        needs: packages that it imports or names in `NEEDS`, and `GPU`, which a quick run does without.
    """

    script: Path
    title: str
    call: str
    quick: str | None
    needs: tuple[str, ...]

    @classmethod
    def read(cls, script: Path) -> Benchmark:
        """What a script says of itself, without running it."""
        tree = ast.parse(script.read_text(encoding="utf-8"))
        said = {}
        packages = set()
        for node in tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                if node.targets[0].id in ("CALL", "QUICK", "NEEDS"):
                    said[node.targets[0].id] = ast.literal_eval(node.value)
            elif isinstance(node, ast.Import):
                packages |= {name.name.partition(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                packages.add(node.module.partition(".")[0])
        own = {"benchmarks", *(file.stem for folder in (script.parent, FOLDER) for file in folder.glob("*.py"))}
        title = (ast.get_docstring(tree) or "").partition("\n")[0]
        needs = (*sorted(packages - own - set(sys.stdlib_module_names)), *said.get("NEEDS", ()))
        return cls(script, title, said.get("CALL", ""), said.get("QUICK"), needs)

    def obstacle(self, values: dict[str, str], quick: bool) -> str | None:
        """Why it can't run here; None where it can."""
        if quick and self.quick is None:
            return "has no quick form"
        missing = [name for name in self.needs if name != "GPU" and importlib.util.find_spec(name) is None]
        if missing:
            return f"needs {', '.join(missing)}"
        if "GPU" in self.needs and not quick and not has_nvidia_gpu():
            return "needs a GPU"
        if "{python}" in self.call and not values["python"]:
            return "needs --other-python"
        return None

    def arguments(self, values: dict[str, str], options: argparse.Namespace) -> list[str]:
        """What it is called with."""
        words = shlex.split(self.call) + (shlex.split(self.quick or "") if options.quick else [])
        return [word.format(**values) for word in words] + options.others


def benchmarks() -> dict[str, Benchmark]:
    """Every script by its name."""
    others = {"run", "measuring", "training_step"}
    found = (path for path in FOLDER.rglob("*.py") if path.stem not in others)
    return {path.stem: Benchmark.read(path) for path in sorted(found, key=lambda path: (path.parent != FOLDER, path))}


def tables(text: str) -> list[dict[str, Any]]:
    """The tables of a Markdown text: their columns, and their rows cell by cell."""
    found: list[list[list[str]]] = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            found[-1].append([cell.strip() for cell in line.strip().strip("|").split("|")])
        elif found[-1]:
            found.append([])
    whole = (block for block in found if len(block) > 2)
    return [{"columns": columns, "rows": rows} for columns, _, *rows in whole]


def lines_of(process: subprocess.Popen[str], start: float) -> Iterator[str]:
    """What a process prints, line by line; while it is silent, the time that has passed is shown."""
    waiting: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            waiting.put(line)
        waiting.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = waiting.get(timeout=PATIENCE)
        except queue.Empty:
            print(f"    … {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
            continue
        if line is None:
            return
        yield line


def run(name: str, benchmark: Benchmark, options: argparse.Namespace) -> bool:
    """Runs one and writes its two files; False where it failed, with what it had printed in the files."""
    values = placeholders(options, name)
    for path in (Path(values["table"]), Path(values["json"])):
        path.unlink(missing_ok=True)
    arguments = benchmark.arguments(values, options)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.getenv("PYTHONPATH"))))}
    machine, started, start = measuring.machine(), time.time(), time.perf_counter()
    command = [sys.executable, "-u", str(benchmark.script), *arguments]
    printed = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        for line in lines_of(process, start):
            printed.append(line)
            print(f"    {line}", end="", flush=True)
    code, seconds = process.returncode, time.perf_counter() - start
    table = Path(values["table"])
    text = table.read_text(encoding="utf-8") if table.exists() else "".join(printed)
    shown = [f"benchmarks/{benchmark.script.relative_to(FOLDER).as_posix()}"]
    shown += benchmark.arguments({key: Path(value).name for key, value in values.items()}, options)
    kept = json.loads(Path(values["json"]).read_text(encoding="utf-8")) if Path(values["json"]).exists() else None
    head = f"{benchmark.title} `python {shlex.join(shown)}`\n\n"
    failed = f"**It failed** with exit code {code}.\n\n" if code else ""
    table.write_text(f"{head}{measuring.in_words(machine)}\n\n{failed}{text}", encoding="utf-8")
    figures = {
        "benchmark": name,
        "title": benchmark.title,
        "command": shlex.join(shown),
        "quick": options.quick,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "seconds": round(seconds, 1),
        "exit_code": code,
        "machine": machine,
        "tables": tables(text),
        "measured": kept,
    }
    measuring.save(Path(values["json"]), figures)
    return code == 0


#: Results files that come from a script of another name, or whose figures are of another program than their script.
MADE_BY = {
    **dict.fromkeys(("plan.md", "experts.md"), "benchmarks/tpu/plan_table.py"),
    **dict.fromkeys(("plan_cells.json", "expert_cells.json"), "mora_jax/planning/compile_worker.py"),
}


def sources(script: Path) -> set[Path]:
    """A script and all files of the library and of this folder that it imports, directly or not, also on demand."""
    found: set[Path] = set()
    waiting = [script]
    while waiting:
        path = waiting.pop()
        # The package's front imports all of it on demand; what measures is not what is measured.
        if path in found or not path.is_file() or path in (ROOT / "mora_jax" / "__init__.py", FOLDER / "measuring.py"):
            continue
        found.add(path)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            for name in names:
                parts = name.split(".")
                folders = [ROOT] if parts[0] in ("mora_jax", "benchmarks") else [path.parent, FOLDER]
                for folder in folders:
                    waiting += [folder.joinpath(*parts).with_suffix(".py"), folder.joinpath(*parts, "__init__.py")]
    return found


def script_of(result: Path, known: dict[str, Benchmark]) -> Path:
    """What a results file is made by."""
    named = MADE_BY.get(result.name)
    return known[result.stem].script if named is None else ROOT / named


def stale() -> list[str]:
    """A line for each results file whose sources have changed since it was made, the most changed first.

    Raises:
        OSError: there is no git.
    """
    known = benchmarks()
    lines: list[tuple[int, str]] = []
    for result in sorted([*(FOLDER / "results").glob("*.md"), *(FOLDER / "results").glob("*.json")]):
        commits = measuring.commits_of(result.read_text(encoding="utf-8"))
        if not commits:
            lines.append((10**6, f"{result.name}: names no commit"))
            continue
        oldest = commits[0].removesuffix("-changed")
        files = sources(script_of(result, known))
        command = ["git", "-C", str(ROOT), "diff", "--numstat", oldest, "--", *sorted(map(str, files))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines.append((10**6, f"{result.name}: the commit {oldest} isn't known here"))
        elif changes := [line.split("\t") for line in done.stdout.splitlines()]:
            changed = sum(int(added) + int(removed) for added, removed, _ in changes)
            largest = max(changes, key=lambda change: int(change[0]) + int(change[1]))[2]
            what = f"{len(changes)} of {len(files)} sources have changed, {changed} lines, most in {largest}"
            lines.append((changed, f"{result.name}: since {oldest} {what}"))
    return [line for _, line in sorted(lines, reverse=True)]


def placeholders(options: argparse.Namespace, name: str) -> dict[str, str]:
    """What stands for `{model}` and the others in a script's arguments."""
    return {
        "model": options.model or model_path(),
        "data": options.data or data_path(),
        "python": options.other_python or "",
        "table": str(options.out / f"{name}.md"),
        "json": str(options.out / f"{name}.json"),
        "work": str(options.out / name),
    }


def main() -> int:
    """Lists them or runs them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="which; none: all that can run here")
    parser.add_argument("--list", action="store_true", help="list them, run none")
    parser.add_argument("--stale", action="store_true", help="list results whose sources have changed, run none")
    parser.add_argument("--quick", action="store_true", help="the smallest sizes, to see that they work")
    parser.add_argument("--model", help="a HuggingFace folder; none: the embedded demo model")
    parser.add_argument("--data", help="an instruction file; none: the embedded one")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="where to write (%(default)s)")
    parser.add_argument(
        "--other-python", metavar="FILE", help="the python of an environment with google-tunix and qwix"
    )
    given = sys.argv[1:]
    cut = given.index("--") if "--" in given else len(given)
    options = parser.parse_args(given[:cut], argparse.Namespace(others=given[cut + 1 :]))
    known = benchmarks()
    if unknown := [name for name in options.names if name not in known]:
        print(f"error: no benchmark is called {', '.join(unknown)}; --list names them", file=sys.stderr)
        return 2
    obstacles = {name: one.obstacle(placeholders(options, name), options.quick) for name, one in known.items()}
    if options.list:
        for name, one in known.items():
            print(f"{name:20} {one.title}" + (f" ({obstacles[name]})" if obstacles[name] else ""))
        return 0
    if options.stale:
        print(*stale() or ["no results are stale"], sep="\n")
        return 0
    chosen = options.names or list(known)
    options.out.mkdir(parents=True, exist_ok=True)
    start, failed = time.perf_counter(), [name for name in options.names if obstacles[name]]
    for number, name in enumerate(chosen, 1):
        passed = time.perf_counter() - start
        print(f"[{number} of {len(chosen)}, {passed:.0f} s so far] {name}: {known[name].title}", flush=True)
        if obstacles[name]:
            print(f"    left out: it {obstacles[name]}", flush=True)
        elif not run(name, known[name], options):
            failed.append(name)
    print(f"{len(chosen)} benchmarks in {time.perf_counter() - start:.0f} s; the tables are in {options.out}")
    if failed:
        print(f"error: failed or couldn't run: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
