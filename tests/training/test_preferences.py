"""Preference losses in the step: against whole logits, in every layout, and runs from Python and the command line."""

import dataclasses
import io
import json
import math
import os
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import mora_jax as mj
from mora_jax.errors import InputError
from mora_jax.losses.preference import OBJECTIVES, Answers, Settings
from mora_jax.training.build_step import base_structure
from mora_jax.training.config.load import check_together
from mora_jax.training.config.schema import Config, lay_over
from mora_jax.training.display import Display
from mora_jax.training.preferences import PreferenceLoss
from mora_jax.training.sharding.mesh import make_mesh
from mora_jax.training.sharding.rules import Placement
from mora_jax.training.sharding.runner import JitRunner, PmapRunner
from mora_jax.training.state import Structure, flat_arrays, initial_state
from mora_jax.training.step import StepConfig, make_step
from tests.evaluation import tiny
from tests.models.tiny import fill_randomly
from tests.training.test_objective import SMALL, model_for

# Prompt, first answer and second answer of each example, in tokens.
SIZES = [(3, 4, 6), (5, 2, 2), (2, 7, 3), (4, 3, 5), (3, 1, 4), (6, 5, 2), (2, 2, 2), (4, 6, 1)]
LENGTH = 16


@dataclasses.dataclass
class Pair:
    """Ids of both sequences with their weights, what the pair counts, and whether its first answer is wanted."""

    ids: list[np.ndarray]
    answers: list[np.ndarray]
    sft: np.ndarray
    weight: float
    desired: float


def pairs(seed: int = 0) -> list[Pair]:
    rng = np.random.default_rng(seed)
    made = []
    for number, (prompt, *sizes) in enumerate(SIZES):
        shared = rng.integers(0, SMALL["vocab_size"], prompt)
        ids = [np.concatenate([shared, rng.integers(0, SMALL["vocab_size"], size)]) for size in sizes]
        answers = [np.repeat([0.0, 1.0], [prompt, size]) for size in sizes]
        sft = rng.random(prompt + sizes[0]) * (rng.random(prompt + sizes[0]) > 0.3)
        made.append(Pair(ids, answers, sft, 1.0 + 0.5 * (number % 3), float(number % 2 == 0)))
    return made


def lay(rows: list[list[Pair]], length: int = LENGTH) -> dict[str, np.ndarray]:
    shape, most = (len(rows), 2, length), max(map(len, rows))
    batch = {name: np.zeros(shape, np.int32) for name in ("input_ids", "segment_ids", "positions")}
    batch |= {name: np.zeros(shape, np.float32) for name in ("weights", "answer_weights")}
    batch |= {name: np.zeros((len(rows), most), np.float32) for name in ("example_weights", "desired")}
    batch["counts"] = np.zeros(len(rows), np.float32)
    for row, members in enumerate(rows):
        starts = [0, 0]
        for number, pair in enumerate(members):
            for half in range(2):
                here = slice(starts[half], starts[half] + len(pair.ids[half]))
                batch["input_ids"][row, half, here] = pair.ids[half]
                batch["segment_ids"][row, half, here] = number + 1
                batch["positions"][row, half, here] = np.arange(len(pair.ids[half]))
                batch["answer_weights"][row, half, here] = pair.answers[half]
                if half == 0:
                    batch["weights"][row, 0, here] = pair.sft
                starts[half] = here.stop
            batch["counts"][row] += pair.sft[1:].sum()
            batch["example_weights"][row, number], batch["desired"][row, number] = pair.weight, pair.desired
    return batch


def run(
    model, batch, name, *, sft_weight=0.3, micro_batches=1, devices=1, pmap=False, mesh=None, cached=None, **settings
):
    """One step of plain descent at rate 1; returns the metrics and the gradient."""
    objective = OBJECTIVES[name]
    numbers = Settings(**{"beta": objective.beta, "length_normalize": objective.length_normalize} | settings)
    placement = None
    if mesh is not None:
        placement = Placement.of(mesh := make_mesh(*mesh), *mj.partition(model)[1:])
    graphdef, adapters, frozen = mj.partition(model)
    base = base_structure(model) if objective.referenced and cached is None else None
    step = make_step(
        Structure(graphdef, adapters, frozen),
        optax.sgd(1.0),
        optax.constant_schedule(1.0),
        StepConfig(
            shards=None if mesh is not None or pmap else devices,
            partitioner=None if placement is None else placement.partitioner,
            axis_name="data" if pmap else None,
            loss=PreferenceLoss(objective, numbers, sft_weight, base),
        ),
    )
    if pmap:
        runner = PmapRunner(step, devices)
    elif placement is not None:
        runner = JitRunner(step, mesh, placement.table(adapters, frozen))
    else:
        runner = JitRunner(step, make_mesh(devices))
    arrays = flat_arrays(adapters)
    state = runner.place(initial_state(jax.tree.map(jnp.copy, arrays), optax.sgd(1.0), 0))
    batch = batch if cached is None else batch | {"reference_logps": cached}
    split = {key: value.reshape(micro_batches, -1, *value.shape[1:]) for key, value in batch.items()}
    state, metrics = runner(state, runner.place(flat_arrays(frozen)), runner.place_batch(split))
    assert runner.compilations == 1
    after = runner.unreplicate(state).adapters
    gradient = {key: np.asarray(value) - np.asarray(after[key]) for key, value in arrays.items()}
    return jax.device_get(metrics), gradient


def dense(model, batch, name, *, sft_weight=0.3, **settings):
    """Loss, gradient and the reference's log-probabilities `[B, 2, 1]` from whole logits."""
    objective = OBJECTIVES[name]
    numbers = Settings(**{"beta": objective.beta, "length_normalize": objective.length_normalize} | settings)
    graphdef, adapters, frozen = mj.partition(model)
    base = base_structure(model).model(flat_arrays(frozen))
    rows = {key: value.reshape(-1, value.shape[-1]) for key, value in batch.items() if value.ndim == 3}
    weights = batch["example_weights"][:, 0] / batch["example_weights"].sum()

    def log_p(model):
        logits = model(rows["input_ids"], rows["segment_ids"], rows["positions"])[:, :-1]
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), rows["input_ids"][:, 1:, None], axis=-1)[..., 0]
        return picked * (rows["segment_ids"][:, 1:] > 0)

    def sums(each):
        return jnp.sum(each * rows["answer_weights"][:, 1:], axis=1).reshape(-1, 2, 1)

    reference = sums(log_p(base))
    length = rows["answer_weights"].sum(axis=1).reshape(-1, 2, 1)

    def loss(adapters):
        each = log_p(nnx.merge(graphdef, adapters, frozen))
        logp, point, half = sums(each), None, slice(0, 2)
        if objective.labelled:
            moved = jnp.sum(weights * (logp - reference)[:, 1, 0])
            point, half = jax.lax.stop_gradient(jnp.maximum(moved, 0)), slice(0, 1)
        given = reference[:, half] if objective.referenced else None
        answers = Answers(logp[:, half], given, length[:, half], batch["desired"], point)
        value = jnp.sum(weights * objective.loss(answers, numbers)[:, 0])
        sft = -jnp.sum(each * rows["weights"][:, 1:]) / batch["counts"].sum()
        return value + sft_weight * sft

    value, gradient = jax.jit(jax.value_and_grad(loss))(adapters)
    return float(value), flat_arrays(gradient), np.asarray(reference)


def assert_gradient(found, expected, tolerance=1e-5):
    largest = max(np.abs(value).max() for value in expected.values())
    assert largest > 0
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=tolerance * largest, err_msg=name)


SETTINGS = {
    "dpo": {"beta": 0.4, "label_smoothing": 0.1},
    "ipo": {"beta": 0.3},
    "orpo": {"beta": 0.6},
    "simpo": {"beta": 2.0, "gamma": 0.7},
    "kto": {"beta": 0.4, "desirable_weight": 1.3, "undesirable_weight": 0.8},
    "cpo": {"beta": 0.4},
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_value_and_gradient_against_whole_logits(name):
    model, batch = model_for("lora"), lay([[pair] for pair in pairs()])
    value, gradient, _ = dense(model, batch, name, **SETTINGS[name])
    metrics, found = run(model, batch, name, **SETTINGS[name])
    np.testing.assert_allclose(metrics.loss, value, rtol=1e-5)
    assert_gradient(found, gradient)
    assert metrics.tokens == sum(len(ids) for pair in pairs() for ids in pair.ids[: 1 if name == "kto" else 2])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mora", "head", "tied table"])
def test_heads_and_methods(method):
    """A head or a tied table that is adapted has another kernel than the base."""
    fields = {"tie_word_embeddings": True} if method == "tied table" else {}
    model, batch = model_for(method, **fields), lay([[pair] for pair in pairs()])
    value, gradient, _ = dense(model, batch, "dpo", **SETTINGS["dpo"])
    metrics, found = run(model, batch, "dpo", **SETTINGS["dpo"])
    np.testing.assert_allclose(metrics.loss, value, rtol=1e-5)
    assert_gradient(found, gradient)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo", "kto", "orpo"])
def test_any_layout_gives_the_same_update(name):
    """One pair a row or several, in micro-batches or not, on one device or several."""
    model, made = model_for("lora"), pairs()
    alone = lay([[pair] for pair in made])
    packed = lay([[made[number] for number in row] for row in ([1], [0, 3, 2], [6, 4], [5], [7], [], [], [])], 40)
    expected = run(model, alone, name, **SETTINGS[name])
    for words, batch, split in (
        ("micro-batches", alone, {"micro_batches": 4}),
        ("packed, devices and micro-batches", packed, {"devices": 2, "micro_batches": 2}),
        ("packed, pmap", packed, {"devices": 2, "pmap": True, "micro_batches": 2}),
        ("sharded weights", alone, {"mesh": (1, 2, 2), "micro_batches": 2}),
        ("shared rows", packed, {"mesh": (2, 1, 1, 2)}),
    ):
        found = run(model, batch, name, **split, **SETTINGS[name])
        np.testing.assert_allclose(found[0].loss, expected[0].loss, rtol=3e-6, err_msg=words)
        for metric, value in expected[0].of_loss.items():
            np.testing.assert_allclose(
                found[0].of_loss[metric], value, rtol=1e-4, atol=1e-5, err_msg=f"{words} {metric}"
            )
        np.testing.assert_allclose(found[0].kl, expected[0].kl, rtol=1e-4, err_msg=words)
        assert (found[0].tokens, found[0].trained_tokens) == (expected[0].tokens, expected[0].trained_tokens), words
        assert_gradient(found[1], expected[1], 5e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo", "ipo", "kto"])
def test_a_cached_reference_gives_the_same(name):
    model, batch = model_for("lora"), lay([[pair] for pair in pairs()])
    _, _, reference = dense(model, batch, name)
    expected, found = run(model, batch, name), run(model, batch, name, cached=reference)
    np.testing.assert_allclose(found[0].loss, expected[0].loss, rtol=1e-5)
    assert_gradient(found[1], expected[1], 2e-5)
    assert found[0].kl == 0 and expected[0].kl > 0  # nothing is known of it


def test_metrics_against_loops():
    model, batch = model_for("lora"), lay([[pair] for pair in pairs()])
    metrics, _ = run(model, batch, "dpo", beta=0.4)
    rows = {key: value.reshape(-1, LENGTH) for key, value in batch.items() if value.ndim == 3}
    base = base_structure(model).model(flat_arrays(mj.partition(model)[2]))
    logp = np.zeros((2, len(SIZES), 2))
    divergence = tokens = 0.0
    for number, of in enumerate((model, base)):
        logits = np.asarray(of(rows["input_ids"], rows["segment_ids"], rows["positions"]), np.float64)
        log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        tuned = log_p if number == 0 else tuned  # noqa: F821
        for row, place in zip(*np.nonzero(rows["answer_weights"]), strict=True):
            logp[number, row // 2, row % 2] += log_p[row, place - 1, rows["input_ids"][row, place]]
            if number == 1:
                p = tuned[row, place - 1]
                divergence, tokens = divergence + float((np.exp(p) * (p - log_p[row, place - 1])).sum()), tokens + 1
    weights = batch["example_weights"][:, 0] / batch["example_weights"].sum()
    rewards = 0.4 * (logp[0] - logp[1])
    expected = {
        "margin": (weights * (rewards[:, 0] - rewards[:, 1])).sum(),
        "reward_accuracy": (weights * (rewards[:, 0] > rewards[:, 1])).sum(),
        "chosen_logp": (weights * logp[0, :, 0]).sum(),
        "rejected_logp": (weights * logp[0, :, 1]).sum(),
    }
    assert metrics.of_loss.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics.of_loss[name], value, rtol=1e-4, err_msg=name)
    np.testing.assert_allclose(metrics.kl, divergence / tokens, rtol=1e-4)


@pytest.mark.parametrize("method", ["lora", "mora"])
def test_a_fresh_adapter_begins_at_log_2(method):
    model, batch = model_for(method, fresh=True), lay([[pair] for pair in pairs()])
    metrics, gradient = run(model, batch, "dpo", sft_weight=0.0)
    np.testing.assert_allclose(metrics.loss, math.log(2), rtol=1e-6)
    assert abs(metrics.kl) < 1e-6 and any(np.any(value) for value in gradient.values())


def test_labels_of_one_kind_leave_the_other_undefined():
    model, made = model_for("lora"), [dataclasses.replace(pair, desired=1.0) for pair in pairs()]
    metrics, gradient = run(model, lay([[pair] for pair in made]), "kto")
    assert np.isfinite(metrics.loss) and np.isnan(metrics.of_loss["rejected_logp"])
    assert np.isfinite(metrics.of_loss["chosen_logp"])
    assert all(np.isfinite(value).all() for value in gradient.values())


# Runs

WORDS = ("red", "blue", "green", "black", "white", "pink")
ROWS = [{"prompt": f"Say {word}", "chosen": word, "rejected": f"no {word[::-1]}"} for word in WORDS] * 2
LABELS = [{"prompt": f"Say {word}", "completion": word, "label": len(word) > 4} for word in WORDS] * 2
KEYS = {"model.dtype": "float32", "mesh.data": 1, "optimizer.schedule": "constant", "data.max_length": 64}
LORA = mj.LoRAConfig(rank=2, targets=("q_proj", "down_proj"))


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return tiny.save_folder(tmp_path_factory.mktemp("models") / "model")


def tune(model, rows=ROWS, adapter=LORA, keys=None, **settings):
    settings = {"display": Display(io.StringIO()), "steps": 3, "loss": "dpo", "learning_rate": 1e-2} | settings
    keys = (KEYS if not isinstance(model, nnx.Module) else {k: v for k, v in KEYS.items() if k[:5] != "model"}) | (
        keys or {}
    )
    return mj.finetune(model, rows, adapter, config=keys, **settings)


def losses(result):
    return [row["loss"] for row in result.metrics if "loss" in row]


@pytest.fixture(scope="module")
def result(model_path):
    return tune(model_path, eval_rows=ROWS[:3])


def test_a_run_of_pairs(result):
    first, *_, last = (row for row in result.metrics if "loss" in row)
    np.testing.assert_allclose(first["loss"], math.log(2), rtol=1e-6)
    assert last["loss"] < first["loss"]
    names = {"margin", "reward_accuracy", "chosen_logp", "rejected_logp", "kl"}
    assert names <= first.keys() and first["kl"] < 1e-6 < last["kl"]
    scored = result.metrics[-1]
    for name in (*names, "loss"):
        assert f"eval_{name}" in scored and scored[f"eval_{name}_stderr"] >= 0
    assert result.summary["eval_reward_accuracy"] == scored["eval_reward_accuracy"]
    assert scored["eval_margin"] > 0
    other = dataclasses.replace(result.config.loss, beta=0.2)  # whose losses don't compare
    assert result.summary["eval_data"].endswith(result.config.loss.scored) and other.scored != result.config.loss.scored


def test_scores_of_held_out_pairs_against_whole_logits(result):
    """The trained model's, and that without its adapters as the reference."""
    from mora_jax.data import EncodedDataset, load_rows

    examples = EncodedDataset.build(load_rows(ROWS[:3]), result.tokenizer, max_length=64)
    base = nnx.clone(result.model)
    mj.detach(base)
    ratios = []
    for example in examples:
        both = []
        for model in (result.model, base):
            log_p = jax.nn.log_softmax(model(example.input_ids[None]))[0]
            places = np.flatnonzero(example.answer_weights)
            both.append(float(sum(log_p[place - 1, example.input_ids[place]] for place in places)))
        ratios.append(0.1 * (both[0] - both[1]))
    margins = np.array(ratios[::2]) - ratios[1::2]
    scored = result.metrics[-1]
    np.testing.assert_allclose(scored["eval_margin"], margins.mean(), rtol=1e-4)
    np.testing.assert_allclose(scored["eval_margin_stderr"], margins.std(ddof=1) / math.sqrt(3), rtol=1e-3)
    np.testing.assert_allclose(scored["eval_loss"], np.log1p(np.exp(-margins)).mean(), rtol=1e-4)


@pytest.mark.parametrize("loss", [name for name in OBJECTIVES if name != "dpo"])
def test_every_objective_trains(loss, model_path):
    found = tune(model_path, LABELS if loss == "kto" else ROWS, loss=loss, steps=4)
    assert np.isfinite(losses(found)).all() and losses(found)[-1] < losses(found)[0]


def test_packing_and_micro_batches_change_nothing(model_path, result):
    split = tune(model_path, keys={"train.micro_batch_size": 1})
    np.testing.assert_allclose(losses(split), losses(result), rtol=1e-5)
    packed = tune(model_path, keys={"data.packing": True}, batch_size=2)
    assert np.isfinite(losses(packed)).all() and packed.summary["compilations"] == 1


def test_a_cached_reference_is_the_same_run_and_is_kept(model_path, result, tmp_path, monkeypatch):
    keys = {"loss.reference": "cached", "data.cache": str(tmp_path / "tokens")}
    found = tune(model_path, eval_rows=ROWS[:3], keys=keys)
    np.testing.assert_allclose(losses(found), losses(result), rtol=1e-5)
    for name in ("eval_loss", "eval_margin", "eval_reward_accuracy"):
        np.testing.assert_allclose(found.metrics[-1][name], result.metrics[-1][name], rtol=1e-4)
    kept = sorted((tmp_path / "tokens").glob("reference-*.npy"))
    assert len(kept) == 2
    from mora_jax.training.run import reference

    monkeypatch.setattr(reference, "answer_scores", None)  # what is kept isn't computed again
    assert losses(tune(model_path, eval_rows=ROWS[:3], keys=keys)) == losses(found)


OTHERS = {
    "full": (mj.FullConfig(), "adapter.method=full changes the base"),
    "pissa": (mj.LoRAConfig(rank=2, init="pissa", targets=("q_proj",)), "adapter.init=pissa moves a part of the base"),
    "modules": (mj.LoRAConfig(rank=2, targets=("q_proj",), modules_to_save=("lm_head",)), "modules of the base itself"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_where_adapters_off_is_another_model(name, model_path):
    """The reference is what training began from, cached; the other one is refused with the reason."""
    adapter, reason = OTHERS[name]
    found = tune(model_path, adapter=adapter, learning_rate=1e-3)
    np.testing.assert_allclose(losses(found)[0], math.log(2), rtol=1e-5)
    with pytest.raises(InputError, match=reason):
        tune(model_path, adapter=adapter, keys={"loss.reference": "base"})


def test_trained_biases_are_left_out_with_the_adapter(tmp_path):
    path = tiny.save_folder(tmp_path / "model", attention_bias=True)
    adapter = mj.LoRAConfig(rank=2, targets=("q_proj",), bias="all")
    base, cached = (tune(path, adapter=adapter, keys={"loss.reference": name}) for name in ("base", "cached"))
    np.testing.assert_allclose(losses(base), losses(cached), rtol=1e-5)
    assert losses(base)[-1] < losses(base)[0]


def test_relora_keeps_the_reference_it_began_with(model_path):
    adapter = mj.ReLoRAConfig(rank=2, targets=("q_proj", "down_proj"), restart_every=2, restart_warmup=0)
    found = tune(model_path, adapter=adapter, steps=4)
    np.testing.assert_allclose(losses(found)[0], math.log(2), rtol=1e-5)
    assert found.summary["restarts"] == 1
    assert abs(losses(found)[2] - math.log(2)) > 1e-3  # after the restart it hasn't moved along


def test_adapters_that_training_goes_on_with_are_the_reference(model_path, tmp_path):
    model, tokenizer = mj.load_pretrained(model_path, dtype="float32")
    mj.attach(model, LORA, rngs=nnx.Rngs(0))
    fill_randomly(model)
    mj.save_adapter(model, tmp_path / "adapter")
    begun = tune(model_path, keys={"adapter.path": str(tmp_path / "adapter")})
    run = {"tokenizer": tokenizer, "out": tmp_path / "run", "keys": {"train.save_every": 2}}
    given = tune(model, adapter=None, **run)
    for found in (begun, given):
        np.testing.assert_allclose(losses(found)[0], math.log(2), rtol=1e-5)
    np.testing.assert_allclose(losses(begun), losses(given), rtol=1e-4)
    (tmp_path / "run" / "summary.json").unlink()  # as of a run that was stopped
    with pytest.raises(
        InputError, match=r"the reference 'cached, .* adapters \(xxh3:.*this run has 'cached, .* adapters"
    ):
        tune(model, adapter=None, resume=True, **run)  # trained by now, it is another reference


def test_a_model_that_was_trained_in_part_is_no_reference(model_path, result, tmp_path):
    """Stopped, and gone on with in the same program."""

    def stop(row):
        if row["step"] == 1:
            os.kill(os.getpid(), signal.SIGINT)

    def loaded():
        return mj.load_pretrained(model_path, dtype="float32")[0]

    model, run = loaded(), {"out": tmp_path / "run", "resume": True}
    assert tune(model, callbacks=[stop], **run).interrupted
    with pytest.raises(InputError, match="the reference 'base, the model without adapters', this run has 'cached, the"):
        tune(model, adapter=None, **run)
    assert losses(tune(loaded(), **run)) == losses(result)


def test_a_killed_run_goes_on_bit_for_bit(model_path, tmp_path, monkeypatch):
    from mora_jax.training import loop

    monkeypatch.chdir(tmp_path)
    Path("pairs.json").write_text(json.dumps(ROWS))
    values = {**KEYS, "model.path": str(model_path), "data.train": "pairs.json", "data.eval_fraction": 0.25}
    values |= {"loss.objective": "dpo", "loss.reference": "cached", "train.steps": 4, "train.save_every": 2}
    values |= {"adapter.rank": 2, "adapter.dropout": 0.1}

    def started(out, **changes):
        return lay_over(Config(), [(key, value, "test") for key, value in {**values, "out": out, **changes}.items()])

    def steps(out):
        rows = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
        return {row["step"]: (row["loss"], row["margin"]) for row in rows if "loss" in row}

    class Killed(Exception):
        pass

    def die(row):
        if row.get("step") == 3:
            raise Killed

    assert loop.train(started("whole"), Display(io.StringIO())) == 0
    shown = Display(io.StringIO())
    with pytest.raises(Killed):
        with loop.new_run(started("killed"), loop.RunDirectory("killed"), shown, callbacks=[die]) as trainer:
            trainer.train()
    assert loop.resume("killed", Display(io.StringIO())) == 0
    assert steps("killed") == steps("whole")


REFUSED = [
    ({"loss.beta": 0.2}, "loss.objective=sft does not use loss.beta, which is of dpo, ipo"),
    ({"loss.objective": "dpo", "loss.gamma": 1.0}, "loss.objective=dpo does not use loss.gamma, which is of simpo$"),
    ({"loss.objective": "orpo", "loss.reference": "base"}, "does not use loss.reference, which is of dpo, ipo, kto$"),
    ({"loss.objective": "ipo", "loss.label_smoothing": 0.1}, "does not use loss.label_smoothing"),
    ({"loss.objective": "dpo", "loss.kl_weight": 0.1}, "loss.kl_weight is of loss.objective=sft"),
    ({"loss.objective": "dpo", "data.truncation": "split"}, "data.truncation=split makes pieces of an answer"),
]


@pytest.mark.parametrize(("settings", "words"), REFUSED)
def test_keys_that_an_objective_does_not_use(settings, words):
    values = {"model.path": "m", "data.train": ("d",), "out": "o", **settings}
    with pytest.raises(InputError, match=words) as caught:
        check_together(lay_over(Config(), [(key, value, "test") for key, value in values.items()]))
    assert "\n" not in str(caught.value)


def test_rows_of_another_kind(model_path):
    with pytest.raises(InputError, match="set loss.objective=dpo"):
        tune(model_path, loss="masked")
    with pytest.raises(InputError, match="is trained on rows of `chosen` and `rejected`"):
        tune(model_path, LABELS)
    with pytest.raises(InputError, match="rows of `chosen` and `rejected`"):
        tune(model_path, [{"prompt": "Hi", "completion": "Hello"}] * 3)


def test_runs_of_a_sweep_are_those_of_runs_alone(model_path, result):
    from mora_jax.sweeps.board import Board

    rates = (1e-2, 3e-2)
    keys = KEYS | {"loss.objective": "dpo"}
    swept = mj.sweep(
        str(model_path),
        ROWS,
        LORA,
        grid={"optimizer.learning_rate": rates},
        steps=3,
        config=keys,
        board=Board(io.StringIO()),
    )
    assert len(swept.runs) == 2
    np.testing.assert_allclose(losses(swept.runs[0]), losses(result), rtol=1e-5)
    names = ("margin", "reward_accuracy", "kl")
    for name in names:
        ours, alone = ([row[name] for row in of.metrics if "loss" in row] for of in (swept.runs[0], result))
        np.testing.assert_allclose(ours, alone, rtol=1e-3, atol=1e-6)
    assert losses(swept.runs[1])[-1] < losses(swept.runs[0])[-1]
