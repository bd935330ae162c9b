"""Random configurations: `finetune` is the command, what is saved and loaded trains on as it would have, pmap is jit,
and a run of a sweep is a run alone. Each seed gives one configuration; most seeds are slow tests."""

from __future__ import annotations

import io
import json
import random
import re

import numpy as np
import pytest

import mora_jax as mj
from mora_jax.adapters.methods.registry import CONFIGS
from mora_jax.errors import InputError
from mora_jax.sweeps.board import Board
from mora_jax.training import loop
from mora_jax.training.config.load import check_together
from mora_jax.training.config.schema import METHOD_KEYS, Config, lay_over
from mora_jax.training.display import Display
from tests.evaluation import tiny

ROWS = [
    {"instruction": f"Say {word} {number} times", "input": "", "output": " ".join([word] * number)}
    for word in ("red", "blue", "green")
    for number in (1, 2, 5, 9)
] + [
    {
        "messages": [
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "1"},
            {"role": "user", "content": "two"},
            {"role": "assistant", "content": "2, and then 3"},
        ]
    }
]
CHATS = [
    row
    if "messages" in row
    else {
        "messages": [
            {"role": "user", "content": row["instruction"]},
            {"role": "assistant", "content": row["output"]},
        ]
    }
    for row in ROWS
]
METHODS = sorted(CONFIGS)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    tiny.save_folder(folder / "model")
    (folder / "rows.json").write_text(json.dumps(CHATS))
    return folder


def quiet() -> Display:
    return Display(io.StringIO())


def seeds(quick: int, every: int) -> list:
    return [seed if seed < quick else pytest.param(seed, marks=pytest.mark.slow) for seed in range(every)]


def method_keys(draw: random.Random, method: str) -> dict:
    """Settings of a method; restarts and ranks that fall within a few steps."""
    values = {
        "rank": draw.choice([1, 2, 4]),
        "alpha": draw.choice([2.0, 8.0]),
        "dropout": draw.choice([0.0, 0.0, 0.2]),
        "targets": draw.choice([("q_proj", "down_proj"), "all-linear", ("v_proj",)]),
        "bias": draw.choice(["none", "none", "lora_only"]),
        "use_dora": draw.random() < 0.2,
        "lr_ratio": draw.choice([1.0, 16.0]),
        "restart_every": draw.choice([1, 2, 3]),
        "restart_warmup": draw.choice([0, 1]),
        "prune": draw.choice([0.0, 0.5, 1.0]),
        "target_rank": 1,
        "tinit": draw.choice([0, 1]),
        "delta_t": 1,
        "d_initial": 0.1,
    }
    known = METHOD_KEYS[method]
    return {f"adapter.{name}": value for name, value in values.items() if name in known and draw.random() < 0.8}


def drawn(seed: int, method: str | None = None) -> dict:
    """One configuration; about one in five can't be."""
    draw = random.Random(seed)
    method = draw.choice(METHODS) if method is None else method
    how = draw.choice(["plain", "plain", "packing", "bucketing"])
    values = {
        "adapter.method": method,
        **method_keys(draw, method),
        "seed": draw.randrange(4),
        "model.dtype": "float32",
        "model.remat": draw.choice(["none", "none", "dots", "full"]),
        "data.max_length": draw.choice([32, 64, 96]),
        "data.truncation": draw.choice(["right", "left", "prompt_first", "split", "drop"]),
        "data.packing": how == "packing",
        "data.bucketing": how == "bucketing",
        "data.eval_fraction": draw.choice([0.0, 0.3]),
        "loss.mode": draw.choice(["masked", "unmasked", "weighted", "last_turn", "full", "im_paper", "wit"]),
        "loss.normalize": draw.choice([None, None, "token", "example", "response", "constant"]),
        "loss.constant": draw.choice([None, 7.0, 7.0, 7.0]),
        "loss.kl_weight": draw.choice([0.0, 0.0, 0.1]),
        "train.steps": draw.choice([2, 3, 4]),
        "train.batch_size": draw.choice([2, 4]),
        "train.micro_batch_size": draw.choice([*[None] * 8, *[2] * 5, 3]),
        "train.eval_every": draw.choice([0, 2]),
        "train.log_every": draw.choice([1, 1, 3]),
        "train.neftune_alpha": draw.choice([0.0, 0.0, 5.0]),
        "optimizer.learning_rate": draw.choice([1e-4, 1e-2]),
        "optimizer.schedule": draw.choice(["constant", "linear", "cosine"]),
        "optimizer.warmup_steps": draw.choice([0, 0, 0, 0, 0, 1, 1, 2, 2, 9]),
        "optimizer.weight_decay": draw.choice([0.0, 0.1]),
        "optimizer.clip_norm": draw.choice([None, 1.0, 0.01]),
        "mesh.data": 1,
    }
    return {name: value for name, value in values.items() if value is not None or name == "optimizer.clip_norm"}


def plain(seed: int, method: str, **changes) -> dict:
    """One that can be."""
    values = drawn(seed, method) | PLAIN
    if CONFIGS[method].restarts:
        values |= {"adapter.restart_every": 2, "adapter.restart_warmup": 1}
    return values | {name.replace("__", "."): value for name, value in changes.items()}


def config_of(values: dict, inputs, out) -> Config:
    given = {"model.path": str(inputs / "model"), "data.train": str(inputs / "rows.json"), "out": str(out), **values}
    config = lay_over(Config(), [(name, value, "config") for name, value in given.items()])
    check_together(config)
    return config


NUMBERS = ("step", "loss", "grad_norm", "learning_rate", "tokens", "eval_loss", "eval_prompt_loss", "kl", "mean_rank")


def numbers(rows: list[dict]) -> list[dict]:
    return [{name: row[name] for name in NUMBERS if name in row} for row in rows]


def outcome(work) -> tuple[list[dict] | None, str]:
    """The numbers of a run's rows, or what it was refused with, without where things lie."""
    try:
        return numbers(work()), ""
    except InputError as error:
        return None, re.sub(r"^config: ", "", str(error))


@pytest.mark.slow
@pytest.mark.parametrize("seed", seeds(5, 200))
def test_finetune_is_the_command(inputs, tmp_path, seed):
    values, out = drawn(seed), tmp_path / "run"

    def command() -> list[dict]:
        assert loop.train(config_of(values, inputs, out), quiet()) == 0
        return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]

    def python() -> list[dict]:
        return mj.finetune(str(inputs / "model"), CHATS, config=values, display=quiet()).metrics

    expected, found = outcome(command), outcome(python)
    assert found == expected
    assert (expected[0] is None) == (not out.exists()) or "not finite" in expected[1]


def test_there_are_refusals_among_them(inputs, tmp_path):
    """That the comparison above compares both: rows, and refusals."""
    refused = 0
    for seed in range(200):
        values = drawn(seed)
        try:
            config_of(values, inputs, tmp_path)
        except InputError:
            refused += 1
    assert 10 < refused < 80


ALL_METHODS = [
    name if name in ("lora", "mora", "full", "vera") else pytest.param(name, marks=pytest.mark.slow) for name in METHODS
]
#: What makes a continuation differ from what it continues in memory.
PLAIN = {"data.packing": False, "data.bucketing": False, "data.eval_fraction": 0.0, "optimizer.warmup_steps": 0}
PLAIN |= {"loss.normalize": "token", "train.micro_batch_size": 2, "train.log_every": 1, "loss.kl_weight": 0.0}


@pytest.mark.slow
@pytest.mark.parametrize("method", ALL_METHODS)
def test_what_is_saved_and_loaded_trains_on(inputs, tmp_path, method):
    """As the model in memory does: all that training reads is in the folder."""
    values = plain(METHODS.index(method), method, train__steps=4)
    if "adapter.dropout" in values:
        values["adapter.dropout"] = 0.0
    if "target_rank" in METHOD_KEYS[method]:  # what was pruned is not in the folder, and counts in AdaLoRA's penalty
        values |= {"adapter.rank": 2, "adapter.target_rank": 2}
    first = mj.finetune(str(inputs / "model"), CHATS, config=values, display=quiet())
    first.save(tmp_path / "saved")
    settings = {"tokenizer": first.tokenizer, "display": quiet()}
    if CONFIGS[method].changes_base:
        loaded, _ = mj.load_pretrained(tmp_path / "saved", dtype="float32")
        again = {name: value for name, value in values.items() if not name.startswith("model.")}
    else:
        loaded, _ = mj.load_pretrained(inputs / "model", dtype="float32")
        # LoRA's folders don't say which of these it was trained by.
        told = CONFIGS[method]() if method in ("lora_fa", "olora", "pissa") else None
        mj.load_adapter(loaded, tmp_path / "saved", method=told)
        again = {name: value for name, value in values.items() if not name.startswith(("model.", "adapter."))}
        # A file doesn't say how an adapter is trained.
        trained = CONFIGS[method].training_settings()
        again |= {name: value for name, value in values.items() if name.removeprefix("adapter.") in trained}
    whole = method == "full"
    if whole:
        again = {name: value for name, value in again.items() if not name.startswith("adapter.")}
    expected = mj.finetune(first.model, CHATS, mj.FullConfig() if whole else None, config=again, **settings)
    found = mj.finetune(loaded, CHATS, mj.FullConfig() if whole else None, config=again, **settings)
    for mine, its in zip(numbers(found.metrics), numbers(expected.metrics), strict=True):
        for name in its:
            np.testing.assert_allclose(mine[name], its[name], rtol=2e-4, atol=1e-6, err_msg=f"{name} of {its['step']}")


@pytest.mark.parametrize(
    "method", [name if name == "mora" else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
)
def test_pmap_is_jit(inputs, tmp_path, method):
    values = plain(METHODS.index(method) + 50, method, train__steps=4, train__batch_size=4)
    found = []
    for name, mesh in {"jit": {"mesh.data": 1}, "pmap": {"mesh.data": 2, "mesh.pmap": True}}.items():
        assert loop.train(config_of(values | mesh, inputs, tmp_path / name), quiet()) == 0
        found.append(numbers([json.loads(row) for row in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]))
    for mine, its in zip(*found, strict=True):
        for name in its:
            np.testing.assert_allclose(mine[name], its[name], rtol=1e-4, atol=1e-5, err_msg=f"{name} of {its['step']}")


SWEPT = [name if name in ("lora_plus", "relora") else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]


@pytest.mark.slow
@pytest.mark.parametrize("method", SWEPT)
def test_a_run_of_a_sweep_is_a_run_alone(inputs, method):
    values = plain(METHODS.index(method) + 100, method, train__steps=4, data__eval_fraction=0.3)
    rates = [values.pop("optimizer.learning_rate"), 3e-3]
    grid, model = {"optimizer.learning_rate": rates}, str(inputs / "model")
    result = mj.sweep(model, CHATS, grid=grid, config=values, board=Board(io.StringIO()))
    for run, rate in zip(result.runs, rates, strict=True):
        alone = mj.finetune(model, CHATS, config=values | {"optimizer.learning_rate": rate}, display=quiet())
        for mine, its in zip(numbers(run.metrics), numbers(alone.metrics), strict=True):
            for name in its:
                np.testing.assert_allclose(
                    mine[name], its[name], rtol=2e-4, atol=1e-6, err_msg=f"{name}, {its['step']}"
                )
