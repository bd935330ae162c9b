"""What remat and offload save on a TPU, from compiling the real training step without one.

    pip install libtpu
    python benchmarks/tpu/memory.py --out benchmarks/results/memory.md

Shapes of SmolLM2-1.7B on a v5e-8, `mesh.fsdp=8`, rows of 2,048 tokens, one a chip. The compiler's own figures, in GiB a
chip.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from long_context import compiled_step

from benchmarks.measuring import stamped

#: What `run.py` calls this with, and what goes behind it with `--quick`.
CALL = "--out {table}"
QUICK = "--cases 0"
NEEDS = ("libtpu",)
CASES = [
    ("lora", {"model.remat": "none"}),
    ("lora", {"model.remat": "dots"}),
    ("lora", {"model.remat": "full"}),
    ("lora", {"model.remat": "offload"}),
    ("full", {"model.remat": "full"}),
    ("full", {"model.remat": "full", "optimizer.offload": True}),
]
GIB = 2**30


def main() -> None:
    """Prints the table, and writes it where `--out` says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="Markdown file to write.")
    parser.add_argument("--cases", type=int, nargs="*", default=range(len(CASES)), help="Which rows of the table.")
    options = parser.parse_args()
    lines = [
        "# What remat and offload save",
        "",
        "SmolLM2-1.7B's shapes on a v5e-8, `mesh.fsdp=8`, 8 rows of 2,048 tokens, bfloat16 base. Compiled by",
        "`python benchmarks/tpu/memory.py`; nothing was run. GiB a chip: *held* is what stays on the device (weights,",
        "the optimizer's state), *temp* what a step needs beside, *donated* the part of held whose place the results",
        "take.",
        "",
        "| method | settings | held | temp | donated | host held | host temp |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for number in options.cases:
        method, settings = CASES[number]
        given = {"adapter.method": method, **settings}
        stats = compiled_step("smollm2-1.7b", "v5e:2x4", 8, (1, 8, 1, 1), 2048, given).memory_analysis()
        sizes = (
            stats.argument_size_in_bytes,
            stats.temp_size_in_bytes,
            stats.alias_size_in_bytes,
            stats.host_argument_size_in_bytes,
            stats.host_temp_size_in_bytes,
        )
        words = ", ".join(f"{name}={value}" for name, value in settings.items())
        lines.append(f"| {method} | {words} | " + " | ".join(f"{size / GIB:.2f}" for size in sizes) + " |")
        print(lines[-1], flush=True)
    text = "\n".join(lines) + "\n"
    print(text)
    if options.out:
        options.out.write_text(stamped(text))


if __name__ == "__main__":
    main()
