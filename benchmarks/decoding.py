"""Greedy decoding against `transformers.generate` in torch, in one process on the same cores, with the same prompts.

    python benchmarks/decoding.py --model SmolLM2-135M-Instruct [--rows 1 8] [--new-tokens 64] [--rounds 5]

The contestants take turns, one answer each a round, for each number of rows; no stop token ends an answer. The table
gives medians of the rounds with their spread, the time of a first call (which compiles) and the CPU time that a token
took, which on a busy machine says more than the time that passed. The tokens of both in float32 are compared. torch is
timed at each number of threads that `--threads` names. Needs torch (the extra `test`).
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM

import mora_jax as mj
from mora_jax.evaluation.generate import Generator

DTYPES = ("float32", "bfloat16")


def ours(folder: str, dtype: str) -> Callable[[np.ndarray, int], np.ndarray]:
    """Answers of `Generator.batch`, int `[B, N]`."""
    model, _ = mj.load_pretrained(folder, dtype=dtype)
    generator = Generator(model)
    return lambda prompts, count: np.stack(generator.batch(list(prompts), count))


def theirs(folder: str, dtype: str, threads: int) -> Callable[[np.ndarray, int], np.ndarray]:
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


def cpu_name() -> str:
    """The processor's name and how many there are."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    found = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{found}, {os.cpu_count()} cores"


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
    contestants = {f"mora_jax {dtype}": ours(args.model, dtype) for dtype in DTYPES}
    for threads in args.threads:
        for dtype in DTYPES:
            contestants[f"transformers {dtype}, {threads} threads"] = theirs(args.model, dtype, threads)
    rng = np.random.default_rng(0)
    print(f"{cpu_name()}; jax {jax.__version__}, torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"prompts of {args.prompt_tokens} tokens, {args.new_tokens} made, {args.rounds} rounds\n", flush=True)
    figures = []
    for rows in args.rows:
        prompts = rng.integers(3, 40_000, (rows, args.prompt_tokens))
        first: dict[str, float] = {}
        wall: dict[str, list[float]] = {name: [] for name in contestants}
        cpu: dict[str, list[float]] = {name: [] for name in contestants}
        answers = {}
        for done in range(args.rounds + 1):
            for name, answer in contestants.items():
                start, used = time.perf_counter(), time.process_time()
                answers[name] = answer(prompts, args.new_tokens)
                passed, spent = time.perf_counter() - start, time.process_time() - used
                if done:
                    wall[name].append(passed)
                    cpu[name].append(spent)
                else:
                    first[name] = passed
        same = answers["mora_jax float32"] == answers[f"transformers float32, {args.threads[0]} threads"]
        print(f"{rows} rows: {same.mean():.1%} of the float32 tokens agree\n")
        print("| contestant | first s | median s | least to most | tokens/s | CPU ms a token |")
        print("| --- | ---: | ---: | ---: | ---: | ---: |")
        for name in contestants:
            median, count = statistics.median(wall[name]), rows * args.new_tokens
            each = 1e3 * statistics.median(cpu[name]) / count
            spread = f"{min(wall[name]):.2f}–{max(wall[name]):.2f}"
            print(f"| {name} | {first[name]:.1f} | {median:.2f} | {spread} | {count / median:.1f} | {each:.1f} |")
            figures.append({"rows": rows, "contestant": name, "seconds": wall[name], "cpu_seconds": cpu[name]})
        for unit, times in (("time", wall), ("CPU time", cpu)):
            best = {
                side: min(statistics.median(times[name]) for name in times if name.startswith(side))
                for side in ("mora_jax", "transformers")
            }
            ratio = best["transformers"] / best["mora_jax"]
            print(f"\n{unit}, each at its best: {ratio:.2f} times transformers' speed")
        print(flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
