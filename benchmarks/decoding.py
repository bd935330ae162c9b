"""Greedy decoding against `transformers.generate` in torch, in one process on the same cores, with the same prompts.

    python benchmarks/decoding.py --model SmolLM2-135M-Instruct [--rows 1 8] [--new-tokens 64] [--rounds 5]

The contestants take turns, one answer each a round, for each number of rows; no stop token ends an answer. The table
gives medians of the rounds with their spread, the time of a first call (which compiles) and the CPU time that a token
took, which on a busy machine says more than the time that passed. The tokens of both in float32 are compared. torch is
timed at each number of threads that `--threads` names. `products alone` are our matrix products of as many tokens, one
after the other as a token has them, with only a rescaling between: what a token of ours can't come below. Needs torch
(the extra `peers`).
"""

import argparse
import os
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from measuring import Turn, save, table, take_turns, vocabulary
from transformers import AutoModelForCausalLM

import mora_jax as mj
from mora_jax.adapters.products.matmul import TransposedKernel, base_product
from mora_jax.evaluation.generate import Generator
from mora_jax.models.decoder import Head

#: What `run.py` calls this with, and what goes behind it with `--quick`.
CALL = "--model {model} --json {json}"
QUICK = "--rows 1 2 --prompt-tokens 8 --new-tokens 8 --rounds 2"
DTYPES = ("float32", "bfloat16")
#: Prompts, int `[B, T]`, and how many tokens to make → int `[B, N]`.
Answer = Callable[[np.ndarray, int], np.ndarray]


def ours(generator: Generator) -> Answer:
    """Answers of `Generator.batch`, int `[B, N]`."""
    return lambda prompts, count: np.stack(generator.batch(list(prompts), count))


def products(generator: Generator) -> Answer:
    """Runs the products of as many tokens, each with the result of the one before."""
    layers, model = generator._layers, generator.model
    assert layers is not None

    def matrices(layer: Any) -> list[TransposedKernel]:
        attention, mlp = layer.self_attn, layer.mlp
        used = (attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj)
        return [projection.kernel.get_value() for projection in used]

    kernels = [kernel for leaves in layers.leaves for kernel in matrices(layers.structure.merge(leaves))]

    @jax.jit
    def token(x: jax.Array, kernels: list[TransposedKernel], head: Head) -> jax.Array:
        for kernel in kernels:
            y = base_product(x[:, : kernel.array.shape[1]], kernel)
            x = (y / jnp.max(jnp.abs(y))).astype(x.dtype)
        width = model.config.hidden_size
        return head.logits(x[:, :width])[:, :width].astype(x.dtype)

    def answer(prompts: np.ndarray, count: int) -> np.ndarray:
        # A single bfloat16 row is computed as two, as the generator does.
        rows = 2 if len(prompts) == 1 and model.dtype == jnp.bfloat16 else len(prompts)
        x = jnp.ones((rows, model.config.hidden_size), model.dtype)
        for _ in range(count):
            x = token(x, kernels, model.head())
        return np.asarray(x[:, :1].astype(jnp.int32))

    return answer


def theirs(folder: str, dtype: str, threads: int) -> Answer:
    """Answers of `transformers.generate`, int `[B, N]`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    def answer(prompts: np.ndarray, count: int) -> np.ndarray:
        torch.set_num_threads(threads)
        ids = torch.tensor(prompts)
        with torch.no_grad():
            # The same number of tokens for all: with an end-of-sequence token forbidden, greedy answers could differ.
            made = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=count,
                eos_token_id=-1,
                pad_token_id=0,
            )
        return made[:, ids.shape[1] :].numpy()

    return answer


def main() -> None:
    """Compares tokens, then times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a HuggingFace folder")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[os.cpu_count() or 1])
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    generators = {dtype: Generator(mj.load_pretrained(args.model, dtype=dtype)[0]) for dtype in DTYPES}
    contestants = {f"mora_jax {dtype}": ours(generator) for dtype, generator in generators.items()}
    apart = {dtype: generator for dtype, generator in generators.items() if generator._layers is not None}
    contestants |= {f"{dtype} products alone": products(generator) for dtype, generator in apart.items()}
    for threads in args.threads:
        for dtype in DTYPES:
            contestants[f"transformers {dtype}, {threads} threads"] = theirs(args.model, dtype, threads)
    rng = np.random.default_rng(0)
    print(f"prompts of {args.prompt_tokens} tokens, {args.new_tokens} made, {args.rounds} rounds\n", flush=True)
    figures = {}
    for rows in args.rows:
        prompts = rng.integers(3, vocabulary(args.model), (rows, args.prompt_tokens))
        answers: dict[str, np.ndarray] = {}

        def turn(name: str, prompts: np.ndarray = prompts, answers: dict[str, np.ndarray] = answers) -> Turn:
            def answer(number: int) -> None:
                answers[name] = contestants[name](prompts, args.new_tokens)

            return answer

        times = take_turns({name: turn(name) for name in contestants}, args.rounds)
        same = answers["mora_jax float32"] == answers[f"transformers float32, {args.threads[0]} threads"]
        print(f"rows: {rows}; {same.mean():.1%} of the float32 tokens agree\n")
        count, lines = rows * args.new_tokens, []
        for name, taken in times.items():
            cells = [f"{taken.first:.1f}", f"{taken.median:.3g}", taken.spread, f"{count / taken.median:.1f}"]
            lines.append([str(rows), name, *cells, f"{1e3 * taken.median_cpu / count:.1f}"])
        columns = ["rows", "contestant", "first s", "median s", "least to most", "tokens/s", "CPU ms a token"]
        print(table(columns, 2, lines))
        figures[str(rows)] = times
        for unit, seconds in (("time", attrgetter("median")), ("CPU time", attrgetter("median_cpu"))):
            best = {
                side: min(seconds(taken) for name, taken in times.items() if name.startswith(side))
                for side in ("mora_jax", "transformers")
            }
            ratio = best["transformers"] / best["mora_jax"]
            print(f"\n{unit}, each at its best: {ratio:.2f} times transformers' speed")
        print(flush=True)
    save(args.json, figures)


if __name__ == "__main__":
    main()
