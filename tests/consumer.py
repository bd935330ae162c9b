"""A program of a user, which `make lint` checks with mypy's strict mode: what is public is typed. It never runs."""

from collections.abc import Iterator
from typing import Any, assert_type

import jax
import optax
from flax import nnx

import mora_jax as mj
from mora_jax import functional, losses
from mora_jax.adapters import lora, mora
from mora_jax.data import Renderer
from mora_jax.evaluation import Generator, Sampling
from mora_jax.evaluation.chat import generate_batch
from mora_jax.linen import LoRADense, MoRADense
from mora_jax.models.decoder import Decoder
from mora_jax.training.finetune import FinetuneResult
from mora_jax.training.freeze import train_adapters


def adapters_on_a_decoder(path: str) -> jax.Array:
    """Loading, attaching, calling, merging and saving."""
    model, tokenizer = mj.load_pretrained(path, dtype="bfloat16")
    assert_type(model, Decoder)
    report = mj.attach(model, mj.MoRAConfig(rank=8, kind="rotation", targets="all-linear"), rngs=nnx.Rngs(0))
    print(report, report.trainable / report.total)
    graphdef, adapters, frozen = mj.partition(model)
    print(type(nnx.merge(graphdef, adapters, frozen)), jax.tree.leaves(adapters))
    logits = model(jax.numpy.ones((1, 4), "int32"))
    assert_type(logits, jax.Array)
    mj.save_adapter(model, "adapter", overwrite=True)
    mj.load_adapter(model, "adapter", strict=True)
    mj.unmerge(model, mj.merge(model))
    mj.detach(model)
    mj.save_pretrained(model, "merged", tokenizer)
    return logits


def every_method() -> list[Any]:
    """Configurations with their own names."""
    return [
        mj.LoRAConfig(rank=8, alpha=16.0, dropout=0.05, targets=("q_proj", "v_proj")),
        mj.DoRAConfig(rank=4),
        mj.LoRAPlusConfig(lr_ratio=16.0),
        mj.ReLoRAConfig(restart_every=100),
        mj.VeRAConfig(rank=64),
        mj.IA3Config(),
        mj.OFTConfig(),
        mj.FullConfig(),
    ]


class Mine(nnx.Module):
    """Somebody's own model, with layers to use directly."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = mj.LoRALinear(6, 4, rank=2, alpha=4.0, rngs=rngs)
        self.second = mj.MoRALinear(4, 4, rank=2, kind="sharing", rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y: jax.Array = self.second(self.first(x))
        return y


def my_own_loop(x: jax.Array) -> None:
    """Optax sees the adapters alone."""
    graphdef, adapters, frozen = mj.partition(Mine(nnx.Rngs(0)))
    optimizer = optax.adamw(1e-3)
    state = optimizer.init(adapters)
    gradients = jax.grad(lambda adapters: nnx.merge(graphdef, adapters, frozen)(x).sum())(adapters)
    updates, state = optimizer.update(gradients, state, adapters)
    adapters = optax.apply_updates(adapters, updates)
    print(train_adapters(optimizer).init, LoRADense(4, rank=2, alpha=4.0), MoRADense(4, rank=2))


def functions(x: jax.Array, m: jax.Array) -> jax.Array:
    """The pure functions."""
    rank = mora.square_rank(64, 32, 8, kind="sharing")
    assert_type(rank, int)
    print(lora.delta_weight, mora.delta_weight(m, 64, 32, "sharing").shape)
    return mora.apply(x, m, 32, kind="sharing")


def any_tree(params: dict[str, Any]) -> Any:
    """Adapters for a tree of arrays."""
    config = mj.LoRAConfig(rank=4)
    adapters = functional.init(params, config, rngs=nnx.Rngs(0))
    return functional.merge(params, adapters, config)


def training(rows: list[dict[str, str]]) -> FinetuneResult:
    """The loop of the command."""
    schedule = optax.constant_schedule(1e-3)
    options: dict[str, Any] = {"data.max_length": 64}
    result = mj.finetune("model", rows, mj.MoRAConfig(), optimizer=optax.adamw(schedule), steps=4, config=options)
    assert_type(result, FinetuneResult)
    assert_type(result.push_to_hub("owner/name", private=True), str)
    assert_type(mj.push_to_hub("runs/1", "owner/name", licence="mit"), str)
    print(result.metrics[-1]["loss"], result.summary["steps"], result.interrupted, losses.weighted_loss)
    result.save("adapter")
    return result


def speaking(model: Decoder, tokenizer: Any) -> Iterator[int]:
    """Tokens and texts."""
    print(generate_batch(model, tokenizer, [[{"role": "user", "content": "Hi"}]], max_new_tokens=8))
    print(Renderer)
    yield from Generator(model, sampling=Sampling(temperature=0.7, top_p=0.9, seed=1)).stream([1, 2, 3], 8)


def errors() -> None:
    """Bad input is one exception."""
    try:
        mj.load_pretrained("nowhere")
    except mj.InputError as error:
        print(error)
