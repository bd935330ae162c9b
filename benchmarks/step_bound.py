"""How near a training step is to what the machine's own matrix products would take.

    python benchmarks/step_bound.py --model SmolLM2-135M-Instruct [--dtype bfloat16] [--rows 4] [--length 256]
        [--method lora] [--kind rotation] [--trace]

Every product of the step, as jax traces it, is timed alone: as it is written, and with its operands in float32 and in
bfloat16. The sum of the fastest forms is a bound; the step's time over it is the share that products have. With
`--trace` the operations of two steps are listed by the time that they took (XLA's thunks, from `jax.profiler`). Times
are CPU time of the process, all cores together, which other programs on the machine disturb least. Writes a Markdown
table to `--out`.
"""

import argparse
import os
import re
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import jaxprs_in_params
from measuring import stamped, take_turns
from training_step import TrainingStep

from mora_jax.losses.chunked_sum import chunk_size

#: What `run.py` calls this with, and what goes behind it with `--quick`.
CALL = "--model {model} --out {table}"
QUICK = "--dtype float32 --rows 1 --length 32 --rounds 1"
FORMS: dict[str, Any] = {"bfloat16 → float32": jnp.bfloat16, "float32": jnp.float32}


class Product(NamedTuple):
    """A `dot_general`: shapes of both sides, dimension numbers, dtypes of the operands and of the result."""

    left: tuple[int, ...]
    right: tuple[int, ...]
    dims: Any
    dtype: str
    result: str

    @property
    def flops(self) -> float:
        (_, contracted), (_, batched) = self.dims
        kept = [size for axis, size in enumerate(self.right) if axis not in (*contracted, *batched)]
        return 2.0 * int(np.prod(self.left)) * int(np.prod(kept))


def products(jaxpr: Any, times: int, chunks: int) -> Iterator[tuple[Product, int]]:
    """Every product with how often it runs.

    The first `while` loop is that over whole chunks of the loss; one behind it, over parts of a last chunk, has nothing
    to do where every token has a weight.
    """
    whiles = iter((chunks, 0))
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "dot_general":
            left, right = (v.aval for v in equation.invars)
            result = equation.outvars[0].aval.dtype.name
            yield Product(left.shape, right.shape, equation.params["dimension_numbers"], left.dtype.name, result), times
        inside = times * (equation.params["length"] if name == "scan" else next(whiles, 0) if name == "while" else 1)
        for inner in jaxprs_in_params(equation.params) if inside else ():
            yield from products(inner, inside, chunks)


def seconds(run: Callable[[], Any], flops: float) -> float:
    """CPU time of one call: the least of five rounds."""
    jax.block_until_ready(run())
    calls, found = int(min(20, max(1, 2e9 // flops))), []
    for _ in range(5):
        start = time.process_time()
        for _ in range(calls):
            result = run()
        jax.block_until_ready(result)
        found.append((time.process_time() - start) / calls)
    return min(found)


def alone(product: Product, dtype: Any) -> float:
    """CPU time of one product with operands of a dtype and a float32 result."""
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.standard_normal(shape, np.float32), dtype) for shape in (product.left, product.right))
    dot = jax.jit(lambda a, b: lax.dot_general(a, b, product.dims, preferred_element_type=jnp.float32))
    return seconds(lambda: dot(a, b), product.flops)


def traced_operations(step: Callable[[], Any], text: str, steps: int = 2) -> list[tuple[str, float, int]]:
    """Kinds of operations with their seconds and calls a step, by the thunks that XLA ran."""
    with tempfile.TemporaryDirectory() as folder:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        jax.profiler.start_trace(folder, profiler_options=options)
        for _ in range(steps):
            step()
        jax.profiler.stop_trace()
        (path,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
    lines = dict(re.findall(r"^\s*(?:ROOT )?%?([\w.-]+) = (.*)$", text, re.MULTILINE))
    spent: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for plane in data.planes:
        for line in plane.lines:
            for event in line.events:
                if event.name in lines:
                    kind = re.sub(r"[.\d]+$", "", event.name)
                    shape = re.match(r"\(?(\w+\[[\d,]*\])", lines[event.name])
                    kind = f"{kind} {shape[1] if shape else ''}".strip()
                    spent[kind] += event.duration_ns
                    calls[kind] += 1
    return [(kind, ns / 1e9 / steps, calls[kind] // steps) for kind, ns in spent.most_common()]


def processor() -> str:
    """Its name, and its instructions for bfloat16."""
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    name = re.search(r"model name\s*: (.*)", text)
    fast = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in text]
    return f"{name[1] if name else 'unknown processor'} with {' and '.join(fast) or 'no bfloat16 instructions'}"


def main() -> None:
    """Times the step and its products, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a HuggingFace folder")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--method", default="lora")
    parser.add_argument("--kind", default="sharing", help="of MoRA")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trace", action="store_true", help="list the operations of a step by their time")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "step_bound.md")
    args = parser.parse_args()

    kind = {"kind": args.kind} if args.method == "mora" else {}
    step = TrainingStep(args.model, args.dtype, args.method, args.rows, args.length, **kind)
    tokens = args.rows * args.length
    chunks = -(-(tokens - args.rows) // chunk_size(step.model.config.vocab_size, tokens))
    counted = Counter[Product]()
    for product, times in products(step.runner.trace(step.state, step.frozen, step.batch).jaxpr.jaxpr, 1, chunks):
        counted[product] += times
    taken = take_turns({"step": step}, args.rounds)["step"]
    measured = statistics.median(step.spent.cpu)
    head = "| product | dtype | times | GFLOP | " + " | ".join(f"{name}, GFLOP/s" for name in FORMS) + " | best, s |"
    rows, bound, as_written, work = [head, "| --- | --- | ---: | ---: | ---: | ---: | ---: |"], 0.0, 0.0, 0.0
    found = {}
    for product, times in sorted(counted.items(), key=lambda item: -item[0].flops * item[1]):
        found[product] = {name: alone(product, dtype) for name, dtype in FORMS.items()}
        best = min(found[product].values()) * times
        own = found[product]["float32" if product.dtype == "float32" else "bfloat16 → float32"] * times
        bound, as_written, work = bound + best, as_written + own, work + product.flops * times / 1e9
        rates = " | ".join(f"{product.flops / s / 1e9:.0f}" for s in found[product].values())
        gflop = product.flops * times / 1e9
        shapes = f"{list(product.left)} · {list(product.right)}"
        rows.append(f"| {shapes} | {product.dtype} | {times} | {gflop:.1f} | {rates} | {best:.3f} |")
        print(rows[-1], flush=True)
    options = f"--dtype {args.dtype} --rows {args.rows} --length {args.length} --method {args.method}"
    options += f" --kind {args.kind}" if kind else ""
    said = [
        f"Printed by `python benchmarks/step_bound.py --model {Path(args.model).name} {options}`",
        f"(jax {jax.__version__}, {os.cpu_count()} cores, {processor()},",
        f"load {os.getloadavg()[0]:.0f}). Seconds and rates are of CPU time, all cores together.",
        "",
        f"A step takes {measured:.2f} s ({taken.median:.2f} s by the clock, {taken.spread}) for {work:.0f} GFLOP of "
        f"products. Of that {statistics.median(step.spent.system):.2f} s are the system's, for "
        f"{statistics.median(step.spent.faults):,.0f} page faults; {step.temporary / 1e6:,.0f} MB are temporary.",
        "",
        f"The products as written, alone: "
        f"{as_written:.2f} s, {as_written / measured:.0%} of it; each in its faster form: {bound:.2f} s, "
        f"{bound / measured:.0%}.",
        "",
        *rows,
    ]
    if args.trace:
        said += ["", "| operation | seconds a step | calls |", "| --- | ---: | ---: |"]
        operations = traced_operations(step, step.runner.compiled[0].as_text())
        said += [f"| {kind} | {spent:.3f} | {calls} |" for kind, spent, calls in operations[:40]]
    args.out.write_text(stamped("\n".join(said)), encoding="utf-8")
    print(said[4], said[6], sep="\n")


if __name__ == "__main__":
    main()
