"""LoRA and MoRA of 8B models on one GPU, beside published figures: tokens a second, memory, utilisation.

    python benchmarks/gpu_training.py [--models llama3-8b qwen2.5-7b] [--methods lora mora-sharing mora-rotation]
        [--rows 2] [--remat none] [--micro-batches 1] [--packed] [--rounds 10]

Shapes of published models with random weights, drawn on the device; no checkpoint is read. The step is the one that
`mora-jax train` compiles, bfloat16, rank 16 on every linear layer, each row one example of `--length` tokens that all
carry loss (with `--packed` two). The methods share the base and take turns, one step each a round. `--rows` is the
micro-batch; without it the most of 1, 2, 4, ... rows that the compiler says fit, with the first of `model.remat` none,
dots and full that has room for one row. Attention is what `model.attention=auto` takes.

TFLOP/s count 4N a token, N all parameters, as the published figures do; MFU 4N is that against the dense bfloat16 peak
of `mora_jax/training/observe/flops.py`, and *MFU with attention* is what `mora-jax train` shows (4N without the
embedding, 2N of the trained ones, 12·L·H·Q·T).
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# jax takes three quarters of a GPU's memory unless it is told otherwise, before it is imported.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from measuring import Turn, save, table, take_turns

from mora_jax.errors import InputError
from mora_jax.models.attention.causal import Rows
from mora_jax.models.attention.kernels import AttentionChoice
from mora_jax.models.config import DecoderConfig
from mora_jax.models.decoder import Decoder
from mora_jax.models.families import read_config
from mora_jax.planning.abstract_step import abstract_model, assemble_abstract
from mora_jax.planning.model_shapes import read_model
from mora_jax.training.build_step import assemble
from mora_jax.training.config.schema import Config, lay_over
from mora_jax.training.observe.flops import StepFlops, peak_flops
from mora_jax.training.setup import put_adapter
from mora_jax.training.sharding.mesh import make_mesh

#: What `run.py` calls this with, and what goes behind it with `--quick`.
CALL = "--json {json}"
QUICK = "--models {model} --length 32 --rows 2 --rounds 2 --dtype float32"
NEEDS = ("GPU",)

STEPS = 1000
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"adapter.method": "lora", "adapter.alpha": 32.0},
    "mora-sharing": {"adapter.method": "mora", "adapter.kind": "sharing"},
    "mora-rotation": {"adapter.method": "mora", "adapter.kind": "rotation"},
    "dora": {"adapter.method": "dora", "adapter.alpha": 32.0},
}
REMATS = ("none", "dots", "full")
#: NVIDIA NeMo AutoModel's performance summary: LoRA of rank 16, rows of 4096 tokens, bfloat16, one H100, tokens/s.
PUBLISHED = {"llama3-8b": 12_473, "qwen2.5-7b": 14_110}
#: Share of the device's memory that a step may take as the compiler plans it; the rest is for what lies beside it.
ROOM = 0.94


def configuration(options: argparse.Namespace, method: str, rows: int, remat: str) -> Config:
    """The run whose step is measured."""
    settings = {
        "adapter.rank": options.rank,
        "data.max_length": options.length,
        "data.packing": options.packed,
        "mesh.data": 1,
        "model.attention": options.attention,
        "model.dtype": options.dtype,
        "model.remat": remat,
        "train.batch_size": rows * options.micro_batches,
        "train.micro_batch_size": rows,
        **METHODS[method],
    }
    return lay_over(Config(), [(name, value, "benchmark") for name, value in settings.items()])


def traced(decoder: DecoderConfig, config: Config) -> Any:
    """The step of a run, traced for shapes alone: nothing is allocated."""
    made, arguments = assemble_abstract(abstract_model(decoder, config), config, (1,) * 5)
    runner: Any = made.runner
    return runner.trace(*arguments)


def planned_bytes(decoder: DecoderConfig, config: Config) -> int | None:
    """What the compiler plans for a step, arguments and buffers; None where it doesn't fit."""
    try:
        found = traced(decoder, config).lower().compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None
    return found.argument_size_in_bytes + found.temp_size_in_bytes


def fitting(options: argparse.Namespace, decoder: DecoderConfig) -> tuple[int, str]:
    """Rows and remat, where they aren't given: those that every method has room for."""
    remats = [options.remat] if options.remat else list(REMATS)
    if options.rows:
        return options.rows, remats[0]
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit is None:
        raise InputError(
            f"this device ({jax.devices()[0].device_kind}) doesn't say how much memory it has; give --rows"
        )

    def fits(rows: int, remat: str) -> bool:
        for method in options.methods:
            needed = planned_bytes(decoder, configuration(options, method, rows, remat))
            if needed is None or needed > ROOM * limit:
                return False
        return True

    for remat in remats:
        rows = 0
        while rows < options.most_rows and fits(max(1, 2 * rows), remat):
            rows = max(1, 2 * rows)
        if rows:
            return rows, remat
    raise InputError(f"not one row of {options.length} tokens fits with model.remat={', '.join(remats)}")


def random_base(decoder: DecoderConfig, config: Config) -> tuple[Any, Any]:
    """Graph and arrays of a model with random weights, drawn on the device in one program."""
    model = config.model
    dtype, choice = jnp.dtype(model.dtype), AttentionChoice(model.attention)
    graph, shapes = nnx.split(
        nnx.eval_shape(lambda: Decoder(decoder, dtype=dtype, rngs=None, remat=model.remat, attention=choice))
    )

    def draw() -> Any:
        keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(shapes))))
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: random_array(jax.tree_util.keystr(path), next(keys), leaf), shapes
        )

    return graph, jax.jit(draw)()


def random_array(name: str, key: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
    """Ones for norms, zeros for biases, normal numbers for matrices, large ones in parts: their bits take room too."""
    if "norm" in name:
        return jnp.ones(like.shape, like.dtype)
    if "bias" in name:
        return jnp.zeros(like.shape, like.dtype)
    parts = math.gcd(like.shape[0], 32) if like.size > 2**26 else 1
    shape = (like.shape[0] // parts, *like.shape[1:])
    drawn = jax.lax.map(
        lambda key: (0.02 * jax.random.normal(key, shape)).astype(like.dtype), jax.random.split(key, parts)
    )
    return drawn.reshape(like.shape)


class Contestant:
    """One method on the shared base.

    Attributes:
        tokens: of a step.
        trainable, parameters: numbers that are trained, and all of the base.
        losses: of its steps.
    """

    def __init__(self, base: tuple[Any, Any], config: Config):
        model = nnx.merge(*base)
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
        self.trainable = put_adapter(model, config, STEPS).trainable
        made = assemble(model, config, STEPS, make_mesh(1))
        self.runner: Any = made.runner
        self.state, self.frozen = made.placed_state(0), self.runner.place(made.frozen)
        train, length = config.train, config.data.max_length
        self.tokens = train.batch_size * length
        ends = [length // 2, length - length // 2] if config.data.packing else [length]
        self.flops = StepFlops.of(model.config, made.adapters, made.frozen, ends)
        shape = (train.batch_size // train.micro_batch, train.micro_batch, length)
        ids = np.random.default_rng(0).integers(0, model.config.vocab_size, shape, np.int32)
        segments = np.broadcast_to(np.repeat(np.arange(1, len(ends) + 1, dtype=np.int32), ends), shape)
        starts = np.broadcast_to(np.concatenate([np.arange(end, dtype=np.int32) for end in ends]), shape)
        weights = (starts > 0).astype(np.float32)  # nothing predicts an example's first token
        batch = {"input_ids": ids, "segment_ids": segments, "positions": starts, "weights": weights}
        self.batch = self.runner.place_batch(batch | {"counts": weights.sum(-1)})
        self.losses: list[float] = []

    def step(self, number: int) -> None:
        """One optimiser step, waited for."""
        self.state, metrics = self.runner(self.state, self.frozen, self.batch)
        jax.block_until_ready((self.state, metrics))
        self.losses.append(float(metrics.loss))

    @property
    def needed(self) -> float:
        """FLOPs of a step by the convention of `mora-jax train`."""
        return self.flops.needed(self.tokens, self.tokens)  # all but the first of each example carry loss


def measure(name: str, options: argparse.Namespace) -> Iterator[tuple[list[str], dict[str, Any]]]:
    """The rows of the table that are about one model, and what else is kept of each."""
    decoder = read_config(read_model(name), name)
    rows, remat = fitting(options, decoder)
    configs = {method: configuration(options, method, rows, remat) for method in options.methods}
    base = random_base(decoder, next(iter(configs.values())))
    contestants = {method: Contestant(base, config) for method, config in configs.items()}
    turns: dict[str, Turn] = {method: one.step for method, one in contestants.items()}
    times = take_turns(turns, options.rounds)
    device = jax.devices()[0]
    peak = peak_flops([device])
    used = (device.memory_stats() or {}).get("peak_bytes_in_use")
    packed = options.packed
    attention = AttentionChoice(options.attention).implementation(
        Rows(decoder, options.dtype, rows, options.length, packed=packed)
    )
    short = Path(name).name
    for method, one in contestants.items():
        taken = times[method]
        rate, work = one.tokens / taken.median, 4.0 * one.parameters * one.tokens / taken.median
        shares = [f"{flops / peak:.1%}" if peak else "" for flops in (work, one.needed / taken.median)]
        published = PUBLISHED.get(short) if (options.length, method) == (4096, "lora") else None
        against = "" if published is None else f"{rate / published:.2f}× of {published:,}"
        plan = one.runner.compiled[0].memory_analysis()
        gigabytes = (plan.argument_size_in_bytes + plan.temp_size_in_bytes) / 1e9
        cells = [short, method, remat, attention, f"{rows} × {options.length}", str(options.micro_batches)]
        compiling = sum(compilation.seconds for compilation in one.runner.compilation_log)
        cells += [f"{one.trainable:,}", f"{compiling:.0f}", f"{taken.median:.3g}", taken.spread]
        cells += [f"{rate:,.0f}", f"{work / 1e12:,.3g}", *shares, f"{gigabytes:.1f}", against]
        yield cells, {"times": taken, "tokens": one.tokens, "needed": one.needed, "peak_bytes": used}


COLUMNS = (
    *("model", "method", "remat", "attention", "rows × length", "micro-batches", "trained parameters", "compile s"),
    *("median s", "least to most", "tokens/s", "TFLOP/s (4N)", "MFU 4N", "MFU with attention", "planned GB"),
    "published",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", default=list(PUBLISHED), help="published models, or folders with a config"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["lora", "mora-sharing", "mora-rotation"])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--rows", type=int, help="rows at once; none: the most that fit")
    parser.add_argument("--most-rows", type=int, default=16, help="where --rows is not given (%(default)s)")
    parser.add_argument("--remat", choices=REMATS, help="none given: the first that has room for a row")
    parser.add_argument("--micro-batches", type=int, default=1, help="accumulated in a step (%(default)s)")
    parser.add_argument("--packed", action="store_true", help="two examples a row")
    parser.add_argument("--attention", default="auto", help="as model.attention (%(default)s)")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path, help="also write the times of each round here")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        if options.rows is None:  # what is compiled to see whether it fits is run afterwards
            jax.config.update("jax_compilation_cache_dir", folder)
        return make_table(options)


def make_table(options: argparse.Namespace) -> int:
    """Measures one model after the other, and prints each row when it is there; returns the exit code."""
    kept: dict[str, Any] = {}
    start = time.perf_counter()
    print(f"{jax.devices()[0].device_kind}, one device, {options.dtype}, rank {options.rank}\n")
    print(table(COLUMNS, 4, []), flush=True)
    for name in options.models:
        try:
            for cells, figures in measure(name, options):
                print("| " + " | ".join(cells) + " |", flush=True)
                kept[f"{cells[0]}, {cells[1]}"] = figures
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        save(options.json, kept)
        print(f"{name}: measured after {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    print("\n`published`: NeMo AutoModel's figures for LoRA of rank 16, rows of 4096 tokens, on one H100.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
