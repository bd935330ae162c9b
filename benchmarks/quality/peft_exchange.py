"""Adapters that cross between PEFT + torch and this library, trained for real: same logits, same losses afterwards.

    python benchmarks/quality/peft_exchange.py --model SmolLM2-135M-Instruct --data dolly.json [--steps 30] [--more 30]

- A LoRA and a DoRA are trained by PEFT in torch, imported here, and trained on by both sides on the same tokens.
- A LoRA is trained here, loaded by PEFT, and trained on by both sides.
- A MoRA of the kind `sharing` is trained here, lifted to an exact LoRA, and loaded by PEFT.

Writes one row a crossing (the largest difference of the logits on rows that nobody trained on, and their largest value)
and the losses of both sides after it, step by step, into `--out`, a Markdown file. All in float32. `--data` has
rows with `instruction`, `input` and `output`, or with `messages`. Needs torch and peft (the extra `peers`).
"""

import argparse
import json
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
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
from benchmarks.measuring import stamped
from mora_jax.interop.convert.convert import convert_to_lora

#: What `run.py` calls this with, and what goes behind it with `--quick`.
CALL = "--model {model} --data {data} --out {table}"
QUICK = "--steps 2 --more 2 --rows 1 --length 32"
RATE, RANK = 5e-4, 8
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def batches(folder: str, data: Path, count: int, rows: int, length: int) -> list[np.ndarray]:
    """Token ids `[rows, length]` of the data's texts, one behind the other."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids: list[int] = []
    written = data.read_text(encoding="utf-8")
    for row in json.loads(written) if written.startswith("[") else map(json.loads, written.splitlines()):
        turns = [message["content"] for message in row.get("messages", ())]
        text = "\n".join(part for part in turns or (row["instruction"], row.get("input", ""), row["output"]) if part)
        ids += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        if len(ids) >= count * rows * length:
            break
    return list(np.array(ids[: count * rows * length]).reshape(count, rows, length))


@dataclass
class Crossing:
    """One adapter that went from one side to the other.

    Attributes:
        title: what crossed, and which way.
        before: losses before it, on the side that trained.
        difference, largest: of the logits on rows that nobody trained on.
        peft, here: losses after it.
    """

    title: str
    before: list[float]
    difference: float
    largest: float
    peft: list[float]
    here: list[float]

    @property
    def apart(self) -> float:
        """The largest relative difference of the losses after the crossing."""
        return max((abs(a - b) / b for a, b in zip(self.here, self.peft, strict=True)), default=0.0)


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
    """The crossings of one model."""

    def __init__(self, args: argparse.Namespace, work: Path):
        self.args, self.work = args, work
        *rows, self.held = batches(args.model, args.data, args.steps + args.more + 1, args.rows, args.length)
        self.train, self.more = rows[: args.steps], rows[args.steps :]
        self.crossings: list[Crossing] = []

    def base(self) -> Any:
        """The base model in torch."""
        return AutoModelForCausalLM.from_pretrained(self.args.model, dtype=torch.float32)

    def here(self, adapter: Path | None = None) -> Any:
        """The base model here, with an adapter if one is given."""
        model, _ = mj.load_pretrained(self.args.model, dtype="float32")
        if adapter is not None:
            mj.load_adapter(model, adapter)
        return model

    def cross(self, title: str, before: list[float], theirs: Theirs, ours: Any, *, more: bool = True) -> None:
        """Compares logits and trains both on."""
        expected, found = theirs.logits(self.held), np.asarray(ours(self.held))
        crossing = Crossing(title, before, np.abs(found - expected).max(), np.abs(expected).max(), [], [])
        print(f"{title}: {before[0]:.3f} to {before[-1]:.3f}, logits differ by {crossing.difference:.1e}", flush=True)
        if more:
            both = Ours(ours)
            for ids in self.more:
                crossing.peft.append(theirs.step(ids))
                crossing.here.append(both.step(ids))
                print(f"  {crossing.peft[-1]:.5f} by PEFT, {crossing.here[-1]:.5f} here", flush=True)
        self.note(crossing)

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
        self.cross(f"{title}, PEFT to here", losses, theirs, self.here(folder))

    def to_peft(self, title: str, config: Any, *, lift: bool = False) -> None:
        """This library trains, PEFT takes over."""
        model = self.here()
        mj.attach(model, config, rngs=nnx.Rngs(0))
        ours = Ours(model)
        losses = [ours.step(ids) for ids in self.train]
        trained, folder = ours.trained(), self.work / f"{title} from here"
        before = np.asarray(trained(self.held))
        if lift:
            convert_to_lora(trained)
        mj.save_adapter(trained, folder)
        theirs = Theirs(PeftModel.from_pretrained(self.base(), str(folder), is_trainable=True))
        if not lift:
            self.cross(f"{title}, here to PEFT", losses, theirs, trained)
            return
        expected = theirs.logits(self.held)
        difference = np.abs(before - expected).max()
        print(f"{title}: {losses[0]:.3f} to {losses[-1]:.3f}, logits differ by {difference:.1e}", flush=True)
        self.note(Crossing(f"{title}, here to PEFT", losses, difference, np.abs(expected).max(), [], []))

    def note(self, crossing: Crossing) -> None:
        """Rewrites the report, so that an interrupted run leaves what it has."""
        self.crossings.append(crossing)
        self.args.out.write_text(stamped(report(self.crossings, self.args)), encoding="utf-8")


def report(crossings: list[Crossing], args: argparse.Namespace) -> str:
    """The crossings as Markdown."""
    name, tokens = Path(args.model).name, f"{args.rows} × {args.length}"
    lines = [
        f"Printed by `python benchmarks/quality/peft_exchange.py --model {name} --data {args.data.name} "
        f"--steps {args.steps} --more {args.more} --rows {args.rows} --length {args.length}`",
        f"(jax {jax.__version__}, torch {torch.__version__.partition('+')[0]}, peft {version('peft')}; float32, "
        f"rank {RANK}, all linear layers, AdamW at {RATE:g},",
        f"{tokens} tokens a step; a new optimizer on both sides after the crossing).",
        "",
        f"| crossing | losses of the first and the last of {args.steps} steps before it, on other rows | "
        "largest difference of logits | largest logit | "
        f"largest relative difference of the {args.more} losses after it |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for c in crossings:
        apart = f"{c.apart:.1e}" if c.peft else "not trained on"
        change = f"{c.before[0]:.3f} to {c.before[-1]:.3f}"
        lines.append(f"| {c.title} | {change} | {c.difference:.1e} | {c.largest:.1f} | {apart} |")
    curves = [c for c in crossings if c.peft]
    lines += ["", "Losses after the crossing, on the same tokens:", ""]
    lines.append("| step | " + " | ".join(f"{c.title}: by PEFT | here" for c in curves) + " |")
    lines.append("| ---: |" + " ---: | ---: |" * len(curves))
    for step in range(args.more):
        losses = " | ".join(f"{c.peft[step]:.5f} | {c.here[step]:.5f}" for c in curves)
        lines.append(f"| {step + 1} | {losses} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs every crossing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a HuggingFace folder")
    parser.add_argument(
        "--data", required=True, type=Path, help="a JSON list, or lines of JSON, of Alpaca rows or messages"
    )
    parser.add_argument("--steps", type=int, default=30, help="steps before a crossing")
    parser.add_argument("--more", type=int, default=30, help="steps of both sides after it")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=96)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "peft_exchange.md")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as work:
        exchange = Exchange(args, Path(work))
        exchange.from_peft("LoRA")
        exchange.to_peft("LoRA", mj.LoRAConfig(rank=RANK, alpha=2 * RANK))
        exchange.to_peft("MoRA sharing lifted to LoRA", mj.MoRAConfig(rank=RANK), lift=True)
        exchange.from_peft("DoRA", use_dora=True)


if __name__ == "__main__":
    main()
