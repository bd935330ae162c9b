"""`finetune` and `sweep` on models that are none of this library's."""

import functools
import io
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import mora_jax as mj
from mora_jax.errors import InputError
from mora_jax.training.display import Display
from mora_jax.training.finetune import configured
from mora_jax.training.setup import prepare
from tests.evaluation import tiny
from tests.training.own_models import Plain, Stacked, Tied

WORDS = ("red", "blue", "green", "black")
ROWS = [{"instruction": f"Say {word}", "input": "", "output": word} for word in WORDS] * 2
CONFIG = mj.LoRAConfig(rank=2, targets=("qkv", "out"))
KEYS = {"mesh.data": 1, "optimizer.schedule": "constant", "data.max_length": 64, "train.batch_size": 4}


def tune(model, adapter=CONFIG, rows=ROWS, keys=None, **settings):
    settings = {"steps": 3, "tokenizer": tiny.make_tokenizer(), "display": Display(io.StringIO())} | settings
    return mj.finetune(model, rows, adapter, config=KEYS | (keys or {}), **settings)


def losses(result):
    return [row["loss"] for row in result.metrics if "loss" in row]


@functools.cache
def by_hand(make, **keys):
    """The losses of three steps of AdamW, each token's loss written out; batches and adapters as for a run."""
    arguments = {"train.steps": 3}
    objects, config_of = configured(make(), ROWS, CONFIG, tiny.make_tokenizer(), None, None, "masked", arguments)
    setup = prepare(config_of(KEYS | keys, "test"), objects)
    graphdef, adapters, frozen = mj.partition(setup.model)
    settings = setup.config.optimizer
    optimizer = optax.chain(
        optax.clip_by_global_norm(settings.clip_norm) if settings.clip_norm else optax.identity(),
        optax.adamw(settings.learning_rate, weight_decay=settings.weight_decay),
    )

    @jax.jit
    def step(adapters, state, ids, segments, positions, weights):
        def loss(adapters):
            logits = nnx.merge(graphdef, adapters, frozen, copy=True)(ids, segments, positions).astype(jnp.float32)
            nll = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:])
            inside = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
            weight = jnp.where(inside, weights[:, 1:], 0.0)
            return jnp.sum(jnp.where(weight > 0, nll * weight, 0.0)) / jnp.sum(weight)

        value, gradient = jax.value_and_grad(loss)(adapters)
        updates, state = optimizer.update(gradient, state, adapters)
        return optax.apply_updates(adapters, updates), state, value

    state, values = optimizer.init(adapters), []
    for number in range(3):
        batch = setup.batches[number]
        names = ("input_ids", "segment_ids", "positions", "weights")
        arrays = (batch[name].reshape(-1, batch[name].shape[-1]) for name in names)
        adapters, state, value = step(adapters, state, *arrays)
        values.append(float(value))
    return values


@pytest.mark.parametrize(
    ("make", "keys"),
    [
        (Plain, {"train.micro_batch_size": 2}),
        (Tied, {"data.packing": True, "train.batch_size": 1}),
        (Stacked, {}),
    ],
)
def test_the_losses_of_a_loop_by_hand(make, keys):
    found = tune(make(), keys=keys)
    np.testing.assert_allclose(losses(found), by_hand(make, **keys), rtol=3e-3 if make is Tied else 1e-5)
    assert found.summary["mfu"] is None and found.summary["trainable_parameters"] > 0


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path):
    """With dropout of the model's own and of the adapters, also where its last call was an evaluation."""
    config = mj.LoRAConfig(rank=2, dropout=0.2, targets=("qkv", "out"))
    expected = losses(tune(Plain(dropout=0.2), config, steps=4))
    assert expected != losses(tune(Plain(), config, steps=4))

    def stop(row):
        if row["step"] == 2:
            os.kill(os.getpid(), signal.SIGINT)

    evaluated = Plain(dropout=0.2)
    evaluated.eval()
    first = tune(evaluated, config, steps=4, out=tmp_path / "run", callbacks=[stop], resume=True)
    assert evaluated.layers[0].drop.deterministic  # as it was given
    assert first.interrupted
    with pytest.raises(InputError, match=r"optimizer.learning_rate=0.01 would make another run of the one in .*0.0002"):
        tune(Plain(dropout=0.2), config, steps=4, out=tmp_path / "run", resume=True, learning_rate=0.01)
    other = Plain(dropout=0.2)
    other.logits.kernel[...] *= 2.0
    with pytest.raises(InputError, match="the checkpoint was written with base a model in memory"):
        tune(other, config, steps=4, out=tmp_path / "run", resume=True)
    model = Plain(dropout=0.2)
    assert losses(tune(model, config, steps=4, out=tmp_path / "run", resume=True)) == expected
    again = Plain(dropout=0.2)
    mj.load_adapter(again, tmp_path / "run" / "adapter")
    ids = jnp.arange(8).reshape(1, 8)
    for one in (model, again):
        one.eval()
    assert jnp.array_equal(model(ids, ids * 0 + 1, ids), again(ids, ids * 0 + 1, ids))
    with pytest.raises(InputError, match="is finished"):
        tune(Plain(dropout=0.2), config, steps=4, out=tmp_path / "run", resume=True)


@pytest.mark.parametrize("mesh", [{"mesh.data": 2, "mesh.fsdp": 2}, {"mesh.data": 2, "mesh.pmap": True}])
def test_on_several_devices(mesh):
    model, keys = Stacked(), {"train.micro_batch_size": 4} | mesh
    found = tune(model, eval_rows=ROWS[:4], keys=keys)
    np.testing.assert_allclose(losses(found), by_hand(Stacked), rtol=1e-5)
    kernel = model.stack.qkv.kernel[...]
    assert ("mesh.fsdp" in mesh) == (kernel.addressable_shards[0].data.size < kernel.size)


def test_preferences_and_the_divergence_from_the_base():
    pairs = [{"prompt": f"Say {word}", "chosen": word, "rejected": "no"} for word in WORDS]
    keys = {"loss.kl_weight": 0.5, "train.eval_on_start": True}
    found = tune(Plain(), rows=ROWS, eval_rows=ROWS[:2], keys=keys, learning_rate=0.05)
    kl = [row["kl"] for row in found.metrics if "kl" in row]
    assert kl[0] == pytest.approx(0, abs=1e-6) and kl[-1] > 1e-6
    dpo = tune(Plain(), rows=pairs, eval_rows=pairs, loss="dpo", learning_rate=0.05)
    assert losses(dpo)[0] == pytest.approx(np.log(2), rel=1e-5) and losses(dpo)[-1] < losses(dpo)[0]


@pytest.mark.slow
def test_runs_of_a_sweep_have_the_masks_that_they_have_alone():
    """Their rows are of other lengths in the same step."""
    long = [row | {"output": " ".join([row["output"]] * 16)} for row in ROWS]
    keys = KEYS | {"data.bucketing": True, "data.max_length": 128}
    grid = [{"seed": 0}, {"seed": 1, "optimizer.learning_rate": 1e-2}]
    settings = {"steps": 3, "tokenizer": tiny.make_tokenizer()}
    result = mj.sweep(Plain(dropout=0.1), ROWS + long, CONFIG, grid=grid, config=keys, **settings)
    alone = tune(Plain(dropout=0.1), rows=ROWS + long, learning_rate=1e-2, keys=keys | {"seed": 1})
    np.testing.assert_allclose([row["loss"] for row in result.runs[1].metrics], losses(alone), rtol=1e-5)


class Wrong(Plain):
    def __call__(self, ids):
        return ids


class Pooled(Plain):
    def __call__(self, ids, segments, positions):
        return super().__call__(ids, segments, positions).mean(axis=1)


class Normed(Plain):
    def __init__(self):
        super().__init__()
        self.norm = nnx.BatchNorm(4, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("make", "change", "message"),
    [
        (Wrong, {}, r"takes \(input_ids, segment_ids, positions\), int \[B, T\]: Wrong refused them \(TypeError"),
        (Pooled, {}, r"Pooled gives \(2, 261\) for ids \(2, 8\), and should give logits \[B, T, V\]"),
        (Normed, {}, "Normed has batch statistics"),
        (Plain, {"keys": {"mesh.tensor": 2}}, "mesh.tensor=2 shares matrices by the names of their axes"),
        (Plain, {"keys": {"train.neftune_alpha": 5.0}}, "train.neftune_alpha adds noise to embeddings"),
        (Plain, {"adapter": mj.FullConfig(), "out": "run"}, "a model of your own has none: leave out out="),
        (Plain, {"tokenizer": None}, "tokenizer="),
    ],
)
def test_bad_input_is_refused_in_one_line(make, change, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message) as error:
        tune(make(), **change)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())
