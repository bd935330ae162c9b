"""What the TPU's compiler makes of a training step, by its own estimates: time in layers, copies, collectives.

    pip install libtpu
    python benchmarks/tpu/tpu_step.py v5e-8 lora --label after --out benchmarks/results/tpu_step.md
    python benchmarks/tpu/tpu_step.py v5e-8 lora --label before --hlo saved.hlo --out benchmarks/results/tpu_step.md

Llama-3-8B, one row of 2048 tokens a chip, every array cut over all chips (`mesh.fsdp`), bfloat16, `model.remat=full`,
unless `KEY=VALUE` says otherwise; `--flag` gives the compiler one of its options. Adds a row to the file; `--hlo` reads
a program that an earlier state of the code gave instead of compiling one, and `--save` keeps the one that is compiled.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.measuring import stamped
from mora_jax.backend import compiling_for
from mora_jax.losses.chunked_sum import chunk_size
from mora_jax.planning.collectives import Loops
from mora_jax.planning.compile_worker import lower_step
from mora_jax.planning.model_shapes import read_model
from mora_jax.planning.topology import Topology, read_topology
from mora_jax.training.config.schema import Config, lay_over

#: What `run.py` calls this with, and what goes behind it with `--quick`.
CALL = "v5e-8 lora --label now --out {table}"
QUICK = ""
NEEDS = ("libtpu",)
LAYERS, TOKENS = 32, 2048
KERNELS = (6 * 4096 * 8 * 128, 4096 * 4096, 2 * 4096 * 14336, 14336 * 4096)  # numbers in a layer's matrices
VOCABULARY, WIDTH = 128256, 4096
#: FLOPs of a row without attention: 4 a number, and 2 more for what `remat=full` repeats, a layer but its last product.
NEEDED = TOKENS * (LAYERS * (6 * sum(KERNELS) - 2 * KERNELS[-1]) + 4 * VOCABULARY * WIDTH)
BYTES = {"bf16": 2, "f32": 4, "s8": 1, "u8": 1}
OP = re.compile(r"^\s*(?:ROOT )?%?(\S+) = (\w+)\[([\d,]+)\]\S* (copy|reshape|transpose|copy-start)\(")
RESULT = re.compile(r"^\s*(?:ROOT )?%?(\S+) = \w+\[([\d,]*)\]")
PRODUCT = re.compile(r" (?:convolution|dot)\(%?([\w.-]+), %?([\w.-]+)\).*dim_labels=\w+_(\w+)->")
COLUMNS = (
    *("slice", "method", "state", "args GB", "temp GB", "products", "GB moved", "Mcycles forward", "backward"),
    *("outside", "copies", "GB", "gathers beside", "alone"),
)
HEAD = f"""# A training step of Llama-3-8B, as the TPU's compiler makes it

Rows are added by `benchmarks/tpu/tpu_step.py`; nothing was run. One packed row of 2048 tokens a chip, every array
cut over all chips (`mesh.fsdp`), `model.remat=full`, LoRA of rank 8 on all matrices, or MoRA with as many parameters.

- *args* are weights, adapters and moments on a chip, *temp* what the program needs besides.
- *products* are the FLOPs of the program's matrix products, attention's kernels aside, over those of the frozen base:
  4 a weight and token, and 2 for what remat repeats, which is all of a layer but its last product. What is above 1 are
  the adapters' own.
- *GB moved* are the compiler's "bytes accessed", with one turn of each loop: one layer forward, one backward, one chunk
  of the loss.
- *Mcycles* are the compiler's estimates of all operations it estimates, of one layer forward, one backward (with its
  repetition) and of what is outside the loops; those of splash attention's kernels aren't in it.
- *copies* are those of whole stacks of kernels once a step, in number and GB a chip.
- Gathers are counted in the program's text: *beside* are those of asynchronous fusions, which run beside a product or a
  part of one, and those that SparseCores do; *alone* those that nothing else runs beside (adapters' factors in the
  layers, and the output head).

| {" | ".join(COLUMNS)} |
| --- | --- | --- |{" ---: |" * (len(COLUMNS) - 3)}
"""


class Figures(NamedTuple):
    """What the compiler says of a program: bytes of arguments, of temporary memory, and moved."""

    arguments: float
    temp: float
    moved: float

    def columns(self) -> str:
        """Three columns of a row."""
        return f"{self.arguments / 1e9:.2f} | {self.temp / 1e9:.2f} | {{}} | {self.moved / 1e9:.1f}"


def compiled(
    method: str, topology: Topology, settings: list[str], flags: list[str], save: Path | None
) -> tuple[str, Figures]:
    """The step's HLO, and what the compiler says of it."""
    given = {
        "adapter.method": method,
        "data.max_length": 2048,
        "data.packing": True,
        "mesh.data": 1,
        "mesh.fsdp": topology.chips,
        "model.dtype": "bfloat16",
        "model.remat": "full",
        "train.batch_size": topology.chips,
    }
    values = [(name, value, "benchmark") for name, value in given.items()]
    config = lay_over(Config(), values + [(*parse(setting), "benchmark") for setting in settings])
    mesh = (1, topology.chips, 1, 1)
    task = {"config": config.to_dict(), "decoder": read_model("llama3-8b"), "topology": topology.tpu, "mesh": mesh}
    program = lower_step(task)[0].compile(dict(flag.split("=", 1) for flag in flags))
    text, memory = program.as_text(), program.memory_analysis()
    if save is not None:
        save.write_text(text)
    moved = program.cost_analysis()["bytes accessed"]
    return text, Figures(memory.argument_size_in_bytes, memory.temp_size_in_bytes, moved)


def parse(setting: str) -> tuple[str, Any]:
    """`KEY=VALUE`; numbers, `true` and `false` as such."""
    name, value = setting.split("=", 1)
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def products(text: str, devices: int, micro_batches: int) -> float:
    """FLOPs of the matrix products of a program, kernels aside, those in loops as often as they run."""
    with compiling_for("tpu"):
        loops = Loops(LAYERS, micro_batches, -(-TOKENS // chunk_size(VOCABULARY, TOKENS)))
    shapes: dict[str, list[int]] = {}
    total, inside = 0.0, ""
    for line in text.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.<>-]+) .*\{$", line):
            inside = head[1]
        if not (found := RESULT.match(line)):
            continue
        shapes[found[1]] = shape = [int(size) for size in found[2].split(",") if size]
        if product := PRODUCT.search(line):
            kernel = shapes[product[2]]
            name = re.search(r'op_name="([^"]*)"', line)
            trips = loops.trips(name[1] if name else "")
            trips *= max(1, devices // 4) if "windowed" in inside else 1
            total += 2 * trips * math.prod(shape) * math.prod(kernel) / kernel[product[3].index("o")]
    return total


def figures(text: str) -> str:
    """The columns of a row that the program tells."""
    cycles: dict[str, float] = {}
    name, entry, copies, gigabytes = "", "", 0, 0.0
    layers: dict[str, str] = {}
    gathers: dict[str, int] = {}
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.<>-]+) .*\{$", line):
            name = head[2]
            entry = name if head[1] else entry
            cycles[name] = 0.0
        found = re.search(r'"estimated_cycles":"(\d+)"', line)
        if found and int(found[1]) < 1 << 62:  # the largest number there is stands for no estimate
            cycles[name] += float(found[1])
            if "hidden_states" in line and "/while/body" in line and not line.lstrip().startswith("%param"):
                layers.setdefault(name, "backward" if "transpose(" in line else "forward")
        gathers[name] = gathers.get(name, 0) + len(re.findall(r"= \S+ all-gather\(", line))
        op = OP.match(line)
        if op and name == entry:
            sizes = [int(size) for size in op[3].split(",")]
            if sizes[0] == LAYERS and op[2] in BYTES:
                size = BYTES[op[2]]
                for number in sizes:
                    size *= number
                if size > 1e8:
                    copies, gigabytes = copies + 1, gigabytes + size / 1e9
    both = {way: max(cycles[body] for body, found in layers.items() if found == way) for way in ("forward", "backward")}
    apart = set(re.findall(r'execution_thread="sparsecore".*called_computations=\{%?([\w.<>-]+)\}', text))
    beside = sum(n for name, n in gathers.items() if name.startswith("async_collective_fusion") or name in apart)
    alone = sum(gathers.get(name, 0) for name in (entry, *layers))
    outside = cycles[entry] / 1e6
    ways = f"{both['forward'] / 1e6:.1f} | {both['backward'] / 1e6:.1f}"
    return f"{ways} | {outside:.1f} | {copies} | {gigabytes:.2f} | {beside} | {alone} |"


def main() -> None:
    """Adds a row to the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slice", help="such as v5e-8")
    parser.add_argument("method", help="lora or mora")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="of the configuration")
    parser.add_argument("--label", required=True, help="the state of the code, in a word")
    parser.add_argument("--out", type=Path, required=True, help="Markdown file to write.")
    parser.add_argument("--flag", action="append", default=[], metavar="NAME=VALUE", help="an option of the compiler")
    parser.add_argument("--hlo", type=Path, help="a saved program to read")
    parser.add_argument("--save", type=Path, help="where to keep the program")
    options = parser.parse_args()
    topology, settings = read_topology(options.slice), dict(map(parse, options.settings))
    rows = settings.get("train.batch_size", topology.chips)
    micro_batches = rows // (settings.get("train.micro_batch_size") or rows)
    if options.hlo is None:
        text, said = compiled(options.method, topology, options.settings, options.flag, options.save)
        columns = said.columns()
    else:
        text, columns = options.hlo.read_text(), " |  | {} | "
    share = products(text, topology.chips, micro_batches) / NEEDED / micro_batches
    columns = columns.format(f"{share:.3f}")
    row = f"| {options.slice} | {options.method} | {options.label} | {columns} | {figures(text)}"
    print(row)
    before = options.out.read_text() if options.out.exists() else HEAD
    lines = before.splitlines()
    end = max(number for number, line in enumerate(lines) if line.startswith("|")) + 1  # of the table
    options.out.write_text(stamped("\n".join([*lines[:end], row, *lines[end:], ""]), before))


if __name__ == "__main__":
    main()
