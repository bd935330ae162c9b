"""What a batch whose rows use different adapters costs, beside one adapter and beside the base alone.

    python benchmarks/several_adapters.py --model SmolLM2-135M-Instruct [--rows 8] [--adapters 4] [--rank 8]

Four contestants a method take turns in one process, one measurement each a round: the base alone, one adapter attached
as for training, the same adapter as the active one of several, and every row its own. The table gives medians of the
rounds as tokens a second, and as a share of the base's speed. On a busy machine without an accelerator `--cpu-time`
counts the seconds that the process was given instead of those that passed.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import mora_jax as mj
from mora_jax.adapters.base import AdapterParam
from mora_jax.adapters.slots import choose_rows
from mora_jax.interop.read_adapter import bare

#: What `run.py` calls this with, and what goes behind it with `--quick`.
CALL = "--model {model}"
QUICK = "--methods LoRA --rows 2 --adapters 2 --length 16 --steps 4 --rounds 1"
METHODS: dict[str, Callable[[int], Any]] = {
    "LoRA": lambda rank: mj.LoRAConfig(rank=rank),
    "MoRA sharing": lambda rank: mj.MoRAConfig(rank=rank, kind="sharing"),
    "MoRA rotation": lambda rank: mj.MoRAConfig(rank=rank, kind="rotation"),
}


@functools.partial(jax.jit, static_argnums=0)
def prefill(graphdef: Any, state: Any, ids: Any, rows: Any) -> Any:
    """Reads prompts `[B, T]`: the next tokens `[B]`, and the cache with as much room again."""
    model = nnx.merge(graphdef, state)
    choose_rows(model, rows, len(ids))
    logits, cache = model.extend(model.init_cache(len(ids), 2 * ids.shape[1]), ids)
    return jnp.argmax(logits, axis=-1), cache


@functools.partial(jax.jit, static_argnums=(0, 5))
def decode(graphdef: Any, state: Any, token: Any, cache: Any, rows: Any, steps: int) -> Any:
    """Makes `steps` tokens for each row."""
    model = nnx.merge(graphdef, state)
    choose_rows(model, rows, len(token))

    def step(_: Any, carry: Any) -> Any:
        token, cache = carry
        logits, cache = model.extend(cache, token[:, None])
        return jnp.argmax(logits, axis=-1), cache

    return jax.lax.fori_loop(0, steps, step, (token, cache))


class Contestant:
    """A model, as it is now, and which adapter each row uses."""

    def __init__(self, model: nnx.Module, rows: Any = None):
        self.graphdef, self.state = nnx.split(model)
        self.rows = rows
        self.seconds: dict[str, list[float]] = {"prefill": [], "decode": []}

    def measure(self, ids: Any, steps: int, clock: Callable[[], float]) -> None:
        """One prefill and one decode; the first call compiles and is thrown away by the caller."""
        start = clock()
        token, cache = jax.block_until_ready(prefill(self.graphdef, self.state, ids, self.rows))
        read = clock()
        jax.block_until_ready(decode(self.graphdef, self.state, token, cache, self.rows, steps))
        self.seconds["prefill"].append(read - start)
        self.seconds["decode"].append(clock() - read)


def adapted(base: nnx.Module, config: Any, seed: int) -> nnx.Module:
    """The base with one random adapter."""
    model = bare(base)
    mj.attach(model, config, rngs=nnx.Rngs(seed))
    draws = np.random.default_rng(seed)
    for _, node in nnx.iter_graph(model):
        if isinstance(node, AdapterParam):
            node.set_value(jnp.asarray(0.01 * draws.standard_normal(node.shape), jnp.float32))
    return model


def contestants(base: nnx.Module, config: Any, count: int, rows: int) -> dict[str, Contestant]:
    """The four of one method; they share the base's arrays."""
    found = {"base alone": Contestant(base)}
    model = bare(base)
    named = mj.NamedAdapters(model, slots=count)
    for seed in range(count):
        source = adapted(base, config, seed)
        named.add(str(seed), source)
        if seed == 0:
            found["one attached"] = Contestant(source)
    found["one active"] = Contestant(model)
    found[f"{count} by row"] = Contestant(model, named.ids([str(row % count) for row in range(rows)]))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="HuggingFace folder")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="tokens of a prompt, and most that are made")
    parser.add_argument("--steps", type=int, default=32, help="tokens that are made")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype")
    parser.add_argument("--cpu-time", action="store_true", help="tokens a second of CPU time")
    args = parser.parse_args(argv)
    print(f"{args.rows} rows, prompts of {args.length} tokens, {args.steps} made, rank {args.rank}, {jax.devices()[0]}")
    print("\n| method | contestant | prefill tokens/s | of base | decode tokens/s | of base |")
    print("|---|---|---|---|---|---|")
    clock = time.process_time if args.cpu_time else time.perf_counter
    base, _ = mj.load_pretrained(args.model, dtype=args.dtype)
    for name in args.methods:
        config = METHODS[name](args.rank)
        found = contestants(base, config, args.adapters, args.rows)
        ids = np.random.default_rng(0).integers(0, 1000, (args.rows, args.length)).astype(np.int32)
        for one in found.values():
            one.measure(ids, args.steps, clock)
            one.seconds = {"prefill": [], "decode": []}
        for _ in range(args.rounds):
            for one in found.values():
                one.measure(ids, args.steps, clock)
        sizes = {"prefill": args.rows * args.length, "decode": args.rows * args.steps}
        speeds = {
            title: {part: sizes[part] / statistics.median(times) for part, times in one.seconds.items()}
            for title, one in found.items()
        }
        for title, speed in speeds.items():
            cells = [f"{speed[part]:.0f} | {speed[part] / speeds['base alone'][part]:.2f}" for part in sizes]
            print(f"| {name} | {title} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
