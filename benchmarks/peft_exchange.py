"""Adapters that cross between PEFT + torch and this library, trained for real: same logits, same losses afterwards.

    python benchmarks/peft_exchange.py --model SmolLM2-135M-Instruct --data dolly.json [--steps 30] [--more 5]

- A LoRA and a DoRA are trained by PEFT in torch, imported here, and trained on by both sides on the same tokens.
- A LoRA is trained here, loaded by PEFT, and trained on by both sides.
- A MoRA of the kind `sharing` is trained here, lifted to an exact LoRA, and loaded by PEFT.

Prints one row a crossing: the largest difference of the logits on rows that nobody trained on, their largest value, and
both sides' losses of the steps after the crossing. All in float32. `--data` is a JSON list of rows with `instruction`,
`input` and `output`. Needs torch and peft (the extra `test`).
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import mora_jax as mj
from mora_jax.interop.convert import convert_to_lora

RATE, RANK = 5e-4, 8
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def batches(folder: str, data: Path, count: int, rows: int, length: int) -> list[np.ndarray]:
    """Token ids `[rows, length]` of the data's texts, one behind the other."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids: list[int] = []
    for row in json.loads(data.read_text(encoding="utf-8")):
        text = "\n".join(part for part in (row["instruction"], row.get("input", ""), row["output"]) if part)
        ids += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        if len(ids) >= count * rows * length:
            break
    return list(np.array(ids[: count * rows * length]).reshape(count, rows, length))


class Theirs:
    """PEFT in torch."""

    def __init__(self, model: Any):
        self.model = model
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)

    def step(self, ids: np.ndarray) -> float:
        """One step; returns the loss before it."""
        self.model.train()
        rows = torch.tensor(ids)
        loss = self.model(rows, labels=rows).loss
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """float32 `[B, T, V]`."""
        self.model.eval()
        with torch.no_grad():
            return self.model(torch.tensor(ids)).logits.float().numpy()


class Ours:
    """A model of this library with an adapter, trained with optax as anybody could."""

    def __init__(self, model: Any):
        self.graphdef, self.adapters, self.frozen = mj.partition(model)
        optimizer = optax.adamw(RATE, weight_decay=0.0)
        self.optimizer_state = optimizer.init(self.adapters)
        graphdef = self.graphdef

        @jax.jit
        def step(adapters, optimizer_state, frozen, ids):
            def mean_loss(adapters):
                logits = nnx.merge(graphdef, adapters, frozen)(ids)[:, :-1]
                return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

            loss, gradients = jax.value_and_grad(mean_loss)(adapters)
            updates, optimizer_state = optimizer.update(gradients, optimizer_state, adapters)
            return loss, optax.apply_updates(adapters, updates), optimizer_state

        self._step = step

    def step(self, ids: np.ndarray) -> float:
        """One step; returns the loss before it."""
        loss, self.adapters, self.optimizer_state = self._step(
            self.adapters, self.optimizer_state, self.frozen, jnp.asarray(ids)
        )
        return float(loss)

    def trained(self) -> Any:
        """The model with the adapter as it is now."""
        return nnx.merge(self.graphdef, self.adapters, self.frozen)


class Exchange:
    """The crossings of one model, and the table of what they gave."""

    def __init__(self, args: argparse.Namespace, work: Path):
        self.args, self.work = args, work
        count = args.steps + args.more + 1
        *self.train, self.held = batches(args.model, args.data, count, args.rows, args.length)
        self.more = self.train[args.steps :]
        self.train = self.train[: args.steps]
        print(f"{'crossing':44} {'max |Δ logit|':>13} {'max |logit|':>11}   losses after it: PEFT / here", flush=True)

    def base(self) -> Any:
        """The base model in torch."""
        return AutoModelForCausalLM.from_pretrained(self.args.model, dtype=torch.float32)

    def here(self, adapter: Path | None = None) -> Any:
        """The base model here, with an adapter if one is given."""
        model, _ = mj.load_pretrained(self.args.model, dtype="float32", unroll=1)
        if adapter is not None:
            mj.load_adapter(model, adapter)
        return model

    def row(self, title: str, theirs: Theirs, ours: Any, *, more: bool = True) -> None:
        """Compares logits, trains both on, and prints one row."""
        expected, found = theirs.logits(self.held), np.asarray(ours(self.held))
        losses = ""
        if more:
            both = Ours(ours)
            losses = "  ".join(f"{theirs.step(ids):.4f}/{both.step(ids):.4f}" for ids in self.more)
        print(
            f"{title:44} {np.abs(found - expected).max():13.2e} {np.abs(expected).max():11.1f}   {losses}", flush=True
        )

    def from_peft(self, title: str, **fields: Any) -> None:
        """PEFT trains, this library takes over."""
        config = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS, **fields)
        torch.manual_seed(0)
        theirs = Theirs(get_peft_model(self.base(), config))
        losses = [theirs.step(ids) for ids in self.train]
        folder = self.work / title
        theirs.model.save_pretrained(folder)
        # A new optimizer on both sides: folders hold adapters, not the state of an optimizer.
        theirs = Theirs(PeftModel.from_pretrained(self.base(), str(folder), is_trainable=True))
        self.row(f"{title} by PEFT, {losses[0]:.3f} to {losses[-1]:.3f}", theirs, self.here(folder))

    def to_peft(self, title: str, config: Any, *, lift: bool = False) -> None:
        """This library trains, PEFT takes over."""
        model = self.here()
        mj.attach(model, config, rngs=nnx.Rngs(0))
        ours = Ours(model)
        losses = [ours.step(ids) for ids in self.train[: self.args.ours]]
        trained, folder = ours.trained(), self.work / title
        title = f"{title} from here, {losses[0]:.3f} to {losses[-1]:.3f}"
        before = np.asarray(trained(self.held))
        if lift:
            title += f", error {convert_to_lora(trained).error:.1e}"
        mj.save_adapter(trained, folder)
        theirs = Theirs(PeftModel.from_pretrained(self.base(), str(folder), is_trainable=True))
        if lift:
            difference = np.abs(theirs.logits(self.held) - before).max()
            print(f"  (PEFT's logits against those of the MoRA before it was lifted: {difference:.2e})", flush=True)
        self.row(title, theirs, trained, more=not lift)


def main() -> None:
    """Runs every crossing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a HuggingFace folder")
    parser.add_argument("--data", required=True, type=Path, help="a JSON list of instruction, input and output")
    parser.add_argument("--steps", type=int, default=30, help="steps of PEFT before a crossing")
    parser.add_argument("--ours", type=int, default=10, help="steps here before a crossing")
    parser.add_argument("--more", type=int, default=5, help="steps of both sides after it")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as work:
        exchange = Exchange(args, Path(work))
        exchange.from_peft("LoRA")
        exchange.from_peft("DoRA", use_dora=True)
        exchange.to_peft("LoRA back", mj.LoRAConfig(rank=RANK, alpha=2 * RANK))
        exchange.to_peft("MoRA sharing as LoRA", mj.MoRAConfig(rank=RANK), lift=True)


if __name__ == "__main__":
    main()
