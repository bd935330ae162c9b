"""What the TPU's compiler makes of a training step, by its own estimates: time in layers, copies, collectives.

    pip install libtpu
    python benchmarks/tpu/tpu_step.py v5e-8 lora --label after --out benchmarks/results/tpu_step.md
    python benchmarks/tpu/tpu_step.py v5e-8 lora --label before --hlo saved.hlo --out benchmarks/results/tpu_step.md

Llama-3-8B, one row of 2048 tokens a chip, every array cut over all chips (`mesh.fsdp`), bfloat16, `model.remat=full`.
Adds a row to the file; `--hlo` reads a program that an earlier state of the code gave instead of compiling one, and
`--save` keeps the one that is compiled.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from mora_jax.planning.compile_worker import lower_step
from mora_jax.planning.model_shapes import read_model
from mora_jax.planning.topology import Topology, read_topology
from mora_jax.training.config.schema import Config, lay_over

#: What `run.py` calls this with, and what goes behind it with `--quick`.
CALL = "v5e-8 lora --label now --out {table}"
QUICK = ""
NEEDS = ("libtpu",)
LAYERS = 32
BYTES = {"bf16": 2, "f32": 4, "s8": 1, "u8": 1}
OP = re.compile(r"^\s*(?:ROOT )?%?(\S+) = (\w+)\[([\d,]+)\]\S* (copy|reshape|transpose|copy-start)\(")
HEAD = """# A training step of Llama-3-8B, as the TPU's compiler makes it

Rows are added by `benchmarks/tpu/tpu_step.py`; nothing was run. One packed row of 2048 tokens a chip, every array
cut over all chips (`mesh.fsdp`), bfloat16, `model.remat=full`. *Mcycles* are the compiler's estimates of all operations
it estimates, of one layer forward, one backward (with its repetition) and of what is outside the loops; those of splash
attention's kernels aren't in it. *copies* are those of whole stacks of kernels once a step, in number and GB a chip.
Gathers are counted in the program's text: *beside* are those of asynchronous fusions, which run beside a product or a
part of one, *alone* those that nothing else runs beside (adapters' factors in the layers, and the output head).

| slice | method | state | temp GB | Mcycles forward | backward | outside | copies | GB | gathers beside | alone |
| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
"""


def compiled(method: str, topology: Topology, settings: list[str], save: Path | None) -> tuple[str, float]:
    """The step's HLO, and its temporary memory in bytes."""
    given = {
        "adapter.method": method,
        "data.max_length": 2048,
        "data.packing": True,
        "mesh.data": 1,
        "mesh.fsdp": topology.chips,
        "model.dtype": "bfloat16",
        "model.remat": "full",
        "train.batch_size": topology.chips,
        **dict(setting.split("=", 1) for setting in settings),
    }
    config = lay_over(Config(), [(name, value, "benchmark") for name, value in given.items()])
    mesh = (1, topology.chips, 1, 1)
    task = {"config": config.to_dict(), "decoder": read_model("llama3-8b"), "topology": topology.tpu, "mesh": mesh}
    program = lower_step(task)[0].compile()
    text = program.as_text()
    if save is not None:
        save.write_text(text)
    return text, program.memory_analysis().temp_size_in_bytes


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
        if found := re.search(r'"estimated_cycles":"(\d+)"', line):
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
    beside = sum(count for name, count in gathers.items() if name.startswith("async_collective_fusion"))
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
    parser.add_argument("--hlo", type=Path, help="a saved program to read")
    parser.add_argument("--save", type=Path, help="where to keep the program")
    options = parser.parse_args()
    if options.hlo is None:
        text, temp = compiled(options.method, read_topology(options.slice), options.settings, options.save)
        memory = f"{temp / 1e9:.2f}"
    else:
        text, memory = options.hlo.read_text(), ""
    row = f"| {options.slice} | {options.method} | {options.label} | {memory} | {figures(text)}"
    print(row)
    before = options.out.read_text() if options.out.exists() else HEAD
    options.out.write_text(f"{before}{row}\n")


if __name__ == "__main__":
    main()
