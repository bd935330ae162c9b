"""The vocabulary loss in chunks against all logits at once, and masked against unmasked training.

    python benchmarks/vocabulary_loss.py --model SmolLM2-135M-Instruct --data dolly.jsonl long_prompts.jsonl

Three parts, each a section of the file that `--out` names; `--parts` makes some of them anew and keeps the others.

- `cpu`: loss with its gradient by the hidden states, here, against the logits `[B, T, V]` with optax's loss. Both take
  turns.
- `tpu`: the same, as the TPU's compiler makes it without a TPU (needs libtpu): temporary memory, bytes that products
  and fusions read and write, cycles that the compiler expects. Nothing is run.
- `masks`: the masks that each data set gives: the loss alone and a whole LoRA step, with loss on the answers alone and
  with loss on prompts too. Tokens without weight are left out of the vocabulary product.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

# Read before jax is imported: libtpu asks the machine about itself unless it is told not to.
os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
os.environ |= {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-1", "JAX_PLATFORMS": "cpu"}

import jax
import jax.numpy as jnp
import measuring
import numpy as np
import optax
from jax.experimental import topologies

import mora_jax as mj
from mora_jax.backend import compiling_for
from mora_jax.data import BatchPlan
from mora_jax.data.pipeline import BatchSource
from mora_jax.losses.chunked_sum import chunk_size
from mora_jax.losses.cross_entropy import next_token_targets, weighted_loss
from mora_jax.training.build_step import assemble
from mora_jax.training.config.schema import Config, lay_over
from mora_jax.training.setup import encode_data, put_adapter
from mora_jax.training.sharding.mesh import make_mesh

#: What `run.py` calls this with, and what goes behind it with `--quick`.
CALL = "--model {model} --data {data} --out {table}"
QUICK = "--parts cpu masks --rounds 1 --rows 1 --length 64 --tokens 128 --vocabularies 4096"
HEADS = {
    "cpu": "The loss with its gradient on a CPU, {tokens} tokens of {width} numbers. *ratio* is the chunked form's CPU "
    "time over that of the whole logits, the median of {rounds} rounds with its range.",
    "tpu": "B 2 × T 2048, {width} numbers, bfloat16, as libtpu compiles it; nothing was run. "
    "*GB* are the bytes of all operations, and "
    "*Mcycles* the compiler's estimates, the chunks' as often as these run.",
    "masks": "Masks of the data, {rows} rows of up to {length} tokens, {model}, {dtype}, LoRA on every linear layer. "
    "*masked* trains answers, *unmasked* prompts too; *ratio* is masked over unmasked in CPU time, the median of "
    "{rounds} rounds, each with a batch of its own.",
}
CHIPS = {"v5e": "v5e:2x2", "v6e": "v6e:2x2"}
FORMS = ("whole", "chunks")


def whole(hidden: Any, kernel: Any, targets: Any, weights: Any) -> Any:
    """The loss by the logits of all tokens."""
    logits = jnp.einsum("btd,vd->btv", hidden, kernel, preferred_element_type=jnp.float32)
    return jnp.sum(weights * optax.softmax_cross_entropy_with_integer_labels(logits, targets))


def compiled(form: str, *shapes: Any) -> Any:
    """Loss and gradient by `hidden`, compiled."""
    return jax.jit(jax.value_and_grad({"whole": whole, "chunks": weighted_loss}[form])).lower(*shapes).compile()


def on_cpu(options: argparse.Namespace) -> str:
    """The table of part `cpu`."""
    rng, found = np.random.default_rng(0), []
    for dtype in options.dtypes:
        for vocab in options.vocabularies:
            hidden = jnp.asarray(rng.standard_normal((2, options.tokens // 2, options.width), np.float32), dtype)
            kernel = jnp.asarray(0.1 * rng.standard_normal((vocab, options.width), np.float32), dtype)
            targets = jnp.asarray(rng.integers(0, vocab, hidden.shape[:2]))
            given = hidden, kernel, targets, jnp.ones(hidden.shape[:2])
            programs = {form: compiled(form, *given) for form in FORMS}
            turns = {form: (lambda _, run=run, given=given: void(run(*given))) for form, run in programs.items()}
            times = measuring.take_turns(turns, options.rounds)
            ratios = [ours / theirs for ours, theirs in zip(times["chunks"].cpu, times["whole"].cpu, strict=True)]
            temp = {form: run.memory_analysis().temp_size_in_bytes / 2**20 for form, run in programs.items()}
            row = [dtype, f"{vocab}", f"{times['whole'].median_cpu:.2f}", f"{times['chunks'].median_cpu:.2f}"]
            row += [f"{np.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"]
            row += [f"{times['whole'].median:.2f}", f"{times['chunks'].median:.2f}"]
            found.append([*row, f"{temp['whole']:.0f}", f"{temp['chunks']:.0f}"])
            print(" | ".join(found[-1]), flush=True)
    columns = ["dtype", "V", "whole, CPU s", "chunks", "ratio", "whole, s", "chunks", "whole, temp MiB", "chunks"]
    return measuring.table(columns, 1, found)


def void(arrays: Any) -> None:
    """Waits for arrays, as a turn."""
    jax.block_until_ready(arrays)


def estimates(text: str, turns: int) -> tuple[float, float]:
    """What a program's operations read and write, in bytes, and the cycles that the compiler expects them to take.

    Counted are the operations that it estimates; those of the loop over chunks as often as it runs. A loop inside them
    repeats what overflowed, and doesn't run.
    """
    sizes = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "pred": 1}

    def size(words: str) -> float:
        arrays = re.findall(r"(\w+)\[([\d,]*)\]", words)
        return sum(sizes.get(kind, 4) * float(np.prod([int(n) for n in dims.split(",") if n])) for kind, dims in arrays)

    known: dict[str, float] = {}
    found: dict[str, tuple[float, float]] = {}
    callers: dict[str, str] = {}
    name, entry = "", ""
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.<>-]+) .*\{$", line):
            name = head[2]
            entry = name if head[1] else entry
        elif made := re.match(r"\s*(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) [\w-]+\((.*)", line):
            known[made[1]] = size(re.sub(r"\{[^}]*\}", "", made[2]))
            if body := re.search(r"body=%?([\w.<>-]+)", line):
                callers[body[1]] = name
            if cycles := re.search(r'"estimated_cycles":"(\d+)"', line):
                operands = re.findall(r"%([\w.-]+)", made[3].partition(")")[0])
                moved = known[made[1]] + sum(known.get(operand, 0.0) for operand in operands)
                before = found.get(name, (0.0, 0.0))
                found[name] = before[0] + moved, before[1] + float(cycles[1])
    loops = [found.get(body, (0.0, 0.0)) for body, caller in callers.items() if caller == entry]
    moved, expected = found.get(entry, (0.0, 0.0))
    return moved + turns * sum(loop[0] for loop in loops), expected + turns * sum(loop[1] for loop in loops)


def on_tpu(options: argparse.Namespace) -> str:
    """The table of part `tpu`."""
    found = []
    for chip in options.chips:
        device = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip]).devices[0]
        place = jax.sharding.SingleDeviceSharding(device)

        def shape(*sizes: int, dtype: Any = jnp.bfloat16, place: Any = place) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

        for vocab in options.vocabularies:
            for form in FORMS:
                rows = shape(2, 2048, dtype=jnp.int32), shape(2, 2048, dtype=jnp.float32)
                with compiling_for("tpu"):
                    program = compiled(form, shape(2, 2048, options.width), shape(vocab, options.width), *rows)
                    chunks = -(-4096 // chunk_size(vocab, 4096)) if form == "chunks" else 1
                moved, cycles = estimates(program.as_text(), chunks)
                temp = program.memory_analysis().temp_size_in_bytes / 2**20
                found.append([chip, form, f"{vocab}", f"{temp:.0f}", f"{moved / 1e9:.2f}", f"{cycles / 1e6:.1f}"])
                print(" | ".join(found[-1]), flush=True)
    return measuring.table(["chip", "form", "V", "temp MiB", "GB", "Mcycles"], 2, found)


def with_masks(options: argparse.Namespace) -> str:
    """The table of part `masks`."""
    model, tokenizer = mj.load_pretrained(options.model, dtype=options.dtypes[0])
    settings: dict[str, Any] = {"data.max_length": options.length, "data.max_rows": 400, "data.cache": "off"}
    base = lay_over(Config(), [(name, value, "benchmark") for name, value in settings.items()])
    put_adapter(model, base, 100)
    vocab, width = model.config.vocab_size, model.config.hidden_size
    made = assemble(model, base, 100, make_mesh(1))
    runner: Any = made.runner
    state, frozen = made.placed_state(0), runner.place(made.frozen)
    rng, found = np.random.default_rng(0), []
    kernel = jnp.asarray(0.1 * rng.standard_normal((vocab, width), np.float32), options.dtypes[0])
    loss = jax.jit(jax.value_and_grad(weighted_loss))
    for path in options.data:
        turns: dict[str, measuring.Turn] = {}
        shares: dict[str, list[float]] = {}
        for mode in ("masked", "unmasked"):
            values = {"data.train": (str(path),), "loss.mode": mode}
            config = lay_over(base, [(name, value, "benchmark") for name, value in values.items()])
            encoded, _ = encode_data(config, tokenizer, vocab)
            plan = BatchPlan(encoded.lengths, options.rows, 0, steps=options.rounds + 1, max_length=options.length)
            source = BatchSource(encoded, plan, options.rows)
            batches = [runner.place_batch(source[number]) for number in range(options.rounds + 1)]

            def step(number: int, batches: Any = batches) -> None:
                nonlocal state
                state, metrics = runner(state, frozen, batches[number])
                jax.block_until_ready((state, metrics))

            inputs = []
            for batch in batches:
                rows = (batch[name][0] for name in ("input_ids", "weights", "segment_ids"))
                targets, weights = next_token_targets(*rows)
                hidden = jnp.asarray(rng.standard_normal((*targets.shape, width), np.float32), options.dtypes[0])
                inputs.append((hidden, kernel, targets, weights))
                shares.setdefault(mode, []).append(float(jnp.mean(weights > 0)))
            turns[f"loss {mode}"] = lambda number, inputs=inputs: void(loss(*inputs[number]))
            turns[f"step {mode}"] = step
        times = measuring.take_turns(turns, options.rounds)
        for part in ("loss", "step"):
            masked, unmasked = times[f"{part} masked"], times[f"{part} unmasked"]
            ratio = np.median([ours / theirs for ours, theirs in zip(masked.cpu, unmasked.cpu, strict=True)])
            weighted = [f"{np.mean(shares[mode]):.0%}" for mode in ("masked", "unmasked")]
            row = [Path(path).stem, part, *weighted, f"{masked.median_cpu:.2f}", f"{unmasked.median_cpu:.2f}"]
            found.append([*row, f"{ratio:.2f}", f"{masked.median:.2f}", f"{unmasked.median:.2f}"])
            print(" | ".join(found[-1]), flush=True)
    columns = ["data", "what", "tokens with weight, masked", "unmasked", "masked, CPU s", "unmasked", "ratio"]
    return measuring.table([*columns, "masked, s", "unmasked, s"], 2, found)


def main() -> None:
    """Makes the parts, and writes the file after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"cpu": on_cpu, "tpu": on_tpu, "masks": with_masks}
    parser.add_argument("--model", required=True, help="a HuggingFace folder")
    parser.add_argument("--data", nargs="+", required=True, help="training data, a row of the table each")
    parser.add_argument("--parts", nargs="+", choices=parts, help="none: all that can be made here")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="part masks takes the first")
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[32768, 65536, 152064])
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS), help="of part tpu")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=1024, help="of part cpu")
    parser.add_argument("--rows", type=int, default=2, help="of part masks")
    parser.add_argument("--length", type=int, default=512, help="of part masks")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "vocabulary_loss.md")
    options = parser.parse_args()
    chosen = options.parts or ["cpu", *(["tpu"] if measuring.machine()["versions"].get("libtpu") else []), "masks"]
    before = options.out.read_text(encoding="utf-8") if options.out.exists() else ""
    kept = measuring.without_stamp(before).split("\n## ")[1:]
    sections = {text.partition("\n")[0]: text.partition("\n")[2].strip() for text in kept}
    said = vars(options) | {"model": Path(options.model).name, "dtype": options.dtypes[0]}
    for part in chosen:
        said["machine"] = measuring.in_words(measuring.machine())
        head = HEADS[part].format(**said)
        sections[part] = f"{head}\n\n{said['machine']}\n\n{parts[part](options)}"
        body = "".join(f"\n## {name}\n\n{sections[name]}\n" for name in parts if name in sections)
        title = "# The vocabulary loss\n\nWritten by `python benchmarks/vocabulary_loss.py`.\n"
        options.out.write_text(measuring.stamped(f"{title}{body}", before), encoding="utf-8")


if __name__ == "__main__":
    main()
