"""Our LoRA step against that of Google Tunix + Qwix, on the same cores, with the same weights and tokens.

    python -m venv OTHER && OTHER/bin/pip install google-tunix qwix
    python benchmarks/lora_against_tunix.py --model SmolLM2-135M-Instruct --other-python OTHER/bin/python [--rounds 5]

Tunix pins versions of its own, so it runs in an environment of its own: a process for each dtype, which this script
asks for one step at a time over a pipe, and which otherwise waits. There it is Tunix's Llama class, Qwix's LoRA on
every linear layer, and the compiled step of Tunix's trainer (`PeftTrainer`), without its loop. The contestants take
turns. The first losses stand side by side: the adapters change nothing yet, so they are the base model's. (The Llama of
Tunix 0.1.7 leaves out the `rope_theta` of its configuration when it turns queries and keys; here it gets it.)
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from measuring import save, table, take_turns

#: What `run.py` calls this with, and what goes behind it with `--quick`.
CALL = "--model {model} --other-python {python} --json {json}"
QUICK = "--rows 1 --length 32 --rounds 2"
RATE = 1e-3
DTYPES = ("float32", "bfloat16")
LINEAR = ".*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def work(settings: dict[str, Any]) -> None:
    """The other environment: makes a step for each line of stdin, and answers with a line of JSON."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    import qwix
    from flax import nnx
    from tunix.models.llama3 import model as llama, params
    from tunix.sft import peft_trainer, utils

    values = json.loads((Path(settings["model"]) / "config.json").read_text(encoding="utf-8"))
    heads = values["num_attention_heads"]
    config = llama.ModelConfig(
        num_layers=values["num_hidden_layers"],
        vocab_size=values["vocab_size"],
        embed_dim=values["hidden_size"],
        hidden_dim=values["intermediate_size"],
        num_heads=heads,
        head_dim=values.get("head_dim") or values["hidden_size"] // heads,
        num_kv_heads=values["num_key_value_heads"],
        rope_theta=values["rope_theta"],
        norm_eps=values["rms_norm_eps"],
        weight_tying=values["tie_word_embeddings"],
    )
    llama.apply_rope = functools.partial(llama.apply_rope, rope_theta=values["rope_theta"])
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    dtype = jnp.dtype(settings["dtype"])
    with jax.set_mesh(mesh):
        model = params.create_model_from_safe_tensors(settings["model"], config, mesh, dtype)
        lora = qwix.LoraProvider(module_path=LINEAR, rank=settings["rank"], alpha=2.0 * settings["rank"])
        model = qwix.apply_lora_to_model(model, lora, rngs=nnx.Rngs(0), **model.get_model_input())
        trained = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.LoRAParam)))
        options = peft_trainer.TrainingConfig(eval_every_n_steps=1 << 30, max_steps=1 << 30)
        trainer = peft_trainer.PeftTrainer(model, optax.adamw(RATE, weight_decay=0.0), options)
        ids = jnp.asarray(np.array(settings["ids"]), jnp.int32)
        mask = jnp.ones_like(ids, bool)
        trainer = trainer.with_gen_model_input_fn(
            lambda x: {
                "input_tokens": x.input_tokens,
                "input_mask": x.input_mask,
                "positions": utils.build_positions_from_mask(x.input_mask),
                "attention_mask": utils.make_causal_attn_mask(x.input_mask),
            }
        )
        step, _ = trainer.jit_train_and_eval_step(cache_nnx_graph=True)
        batch = peft_trainer.TrainingInput(input_tokens=ids, input_mask=mask)
        print(json.dumps({"trained": trained, "jax": jax.__version__}), flush=True)
        for _ in sys.stdin:
            start, used = time.perf_counter(), time.process_time()
            loss, _, _ = jax.block_until_ready(step(batch))
            seconds = time.perf_counter() - start, time.process_time() - used
            print(json.dumps({"loss": float(loss), "seconds": seconds}), flush=True)


class Theirs:
    """Tunix in a process of its own.

    Attributes:
        trained: numbers that are trained.
        losses: of its steps.
    """

    def __init__(self, python: str, settings: dict[str, Any]):
        command = [python, __file__, "--work", json.dumps(settings)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        self.losses: list[float] = []
        self.trained = self._answer()["trained"]

    def step(self, number: int) -> tuple[float, float]:
        """One step; its seconds by the clock and of CPU time."""
        assert self._process.stdin is not None
        print(number, file=self._process.stdin, flush=True)
        said = self._answer()
        self.losses.append(said["loss"])
        wall, cpu = said["seconds"]
        return wall, cpu

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:  # others write to stdout, too
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"error: the other environment ended with exit code {self._process.wait()}")


def main() -> None:
    """Compares the first losses, and times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--model", help="a HuggingFace folder of a Llama with tied embeddings")
    parser.add_argument("--other-python", help="the python of an environment with google-tunix and qwix")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--json", type=Path, help="also write the times of each round here")
    args = parser.parse_args()
    if args.work:
        work(json.loads(args.work))
        return
    if not (args.model and args.other_python):
        parser.error("--model and --other-python are needed")

    # Not at the top: the other environment has no mora_jax.
    import numpy as np
    from flax import nnx
    from gpu_training import Contestant

    import mora_jax as mj
    from mora_jax.training.config.schema import Config, lay_over

    settings: dict[str, Any] = {
        "adapter.rank": args.rank,
        "adapter.alpha": 2.0 * args.rank,
        "data.max_length": args.length,
        "optimizer.learning_rate": RATE,
        "train.batch_size": args.rows,
    }
    ours, theirs = {}, {}
    for dtype in args.dtypes:
        config = lay_over(Config(), [(key, value, "benchmark") for key, value in settings.items()])
        one = ours[f"mora_jax LoRA, {dtype}"] = Contestant(
            nnx.split(mj.load_pretrained(args.model, dtype=dtype)[0]), config
        )
        ids = np.asarray(one.batch["input_ids"])[0].tolist()
        asked = {"model": str(Path(args.model).resolve()), "dtype": dtype, "rank": args.rank, "ids": ids}
        theirs[f"Tunix + Qwix, {dtype}"] = Theirs(args.other_python, asked)
    everybody: dict[str, Any] = theirs | ours
    times = take_turns({name: one.step for name, one in everybody.items()}, args.rounds)
    tokens = args.rows * args.length
    rates = {name: tokens / taken.median for name, taken in times.items()}
    best = max(rates[name] for name in theirs)
    rows = []
    for name, taken in times.items():
        one = everybody[name]
        cells = [f"{one.trained:,}" if name in theirs else f"{one.trainable:,}", f"{one.losses[0]:.5f}"]
        cells += [f"{taken.first:.0f}", f"{taken.median:.3g}", taken.spread, f"{rates[name]:.0f}"]
        rows.append([name, *cells, f"{rates[name] / best:.2f}", f"{taken.median_cpu:.3g}"])
    columns = ["step", "trained parameters", "first loss", "first step s", "median s", "least to most", "tokens/s"]
    print(table([*columns, "against Tunix's best", "CPU s"], 1, rows))
    print(f"\n{args.rows} × {args.length} tokens a step, rank {args.rank}, all linear layers; `first step` compiles")
    save(args.json, times)
    for one in theirs.values():
        one.close()


if __name__ == "__main__":
    main()
