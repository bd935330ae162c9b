"""The study forget: spectra and intruders against dense oracles, equal learning by hand numbers, and a whole study."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pytest
from flax import nnx
from safetensors.numpy import load_file

from mora_jax import demo
from mora_jax.adapters.attach import attach
from mora_jax.adapters.base import AdapterParam
from mora_jax.adapters.config import LoRAConfig, MoRAConfig
from mora_jax.adapters.merge import merge
from mora_jax.cli.main import main
from mora_jax.interop import load_pretrained
from mora_jax.studies.forget.intruders import EPSILONS, FACTORS, Leading, scaled
from mora_jax.studies.forget.presets import _data, _settings
from mora_jax.studies.forget.spectrum import (
    Change,
    Spectrum,
    changes,
    cumulative_energy,
    energy_rank,
    gaussian_energy,
    kernels,
    stable_rank,
)
from mora_jax.studies.forget.stdlib_code import pieces
from mora_jax.studies.forget.study import Forget
from mora_jax.studies.forget.trade import known_at, lowest_known_at
from mora_jax.studies.results import Results
from mora_jax.studies.run import run_study
from mora_jax.studies.study import Arm, Preset, Sources
from mora_jax.sweeps.board import Board

LORA = {"adapter.method": "lora", "adapter.rank": 1, "adapter.targets": ("q_proj", "down_proj")}


class Small(Forget):
    """Two arms for two steps."""

    presets = {
        "test": Preset(
            "a test",
            (Arm("full", {"adapter.method": "full"}, (1e-3,)), Arm("LoRA r1", LORA, (5e-2, 1e-3))),
            _settings(steps=2, batch_size=4, max_length=32, evaluations=1, **{"model.dtype": "float32"}),
            _data("instructions", rows=12, scored=10, text_length=64, layers=2, top=4),
            seeds=2,
        )
    }


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("forget") / "out"
    return run_study(Small(), "test", str(out), Sources(demo.model_path()), board=Board()), out


def tuned(config):
    """The embedded model with an adapter of random values, its matrices before, and the merged model."""
    model, _ = load_pretrained(demo.model_path(), dtype="float32")
    before = kernels(model)
    attach(model, config, rngs=nnx.Rngs(0))
    state = nnx.state(model, AdapterParam)
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(state))))
    nnx.update(model, jax.tree.map(lambda array: 0.3 * jax.random.normal(next(keys), array.shape), state))
    graphdef, every = nnx.split(model)
    merged = nnx.merge(graphdef, jax.tree.map(lambda array: array, every))
    merge(merged)
    return model, before, merged


@pytest.fixture(scope="module")
def lora():
    return tuned(LoRAConfig(rank=2, targets=("q_proj", "down_proj")))


def test_ranks_are_those_of_known_singular_values():
    values = np.array([4.0, 2.0, 1.0, 1.0])
    np.testing.assert_allclose(cumulative_energy(values), [16 / 22, 20 / 22, 21 / 22, 1.0])
    assert (energy_rank(values), energy_rank(values, 0.7), energy_rank(values, 0.95)) == (2, 1, 3)
    assert stable_rank(values) == 1.375
    assert (energy_rank(np.zeros(3)), stable_rank(np.zeros(3))) == (0, 0.0)
    noise = gaussian_energy([(128, 128)])
    assert abs(int(np.argmax(noise >= 0.9)) + 1 - 66) <= 2


@pytest.mark.parametrize("rank", [2, pytest.param(None, marks=pytest.mark.slow)])
def test_changes_are_those_of_merged_weights(rank, request):
    model, before, merged = request.getfixturevalue("lora") if rank else tuned(MoRAConfig(rank=2))
    after = kernels(merged)
    found = list(changes(model))
    assert len(found) == len(before) == 28
    assert {(one.module, one.kind) for one in found} >= {("q_proj", "attention"), ("down_proj", "MLP")}
    for one in found:
        np.testing.assert_array_equal(one.base, before[one.path])
        np.testing.assert_allclose(one.delta, after[one.path] - before[one.path], atol=2e-6)
    figures = Spectrum.of(found).figures()
    squares = sum(float(np.square(after[path] - before[path], dtype=np.float64).sum()) for path in before)
    assert figures["delta_norm"] == pytest.approx(math.sqrt(squares), rel=1e-4)
    ranks = [np.linalg.matrix_rank(one.delta, tol=1e-5) for one in found if one.delta.any()]
    assert rank is None or set(ranks) == {rank}
    assert [one.layer for one in changes(model, every=2)] == [one.layer for one in found if one.layer in (0, 2)]


def test_changes_of_trained_kernels_are_differences_to_the_base(lora):
    model, before, merged = lora
    of_adapters = {one.path: one.delta for one in changes(model)}
    for one in changes(merged, before):
        np.testing.assert_array_equal(one.base, before[one.path])
        np.testing.assert_allclose(one.delta, of_adapters[one.path], atol=2e-6)


def test_intruders_are_found_by_cosines_with_all_of_the_base():
    rng = np.random.default_rng(0)
    base, delta = rng.normal(size=(6, 9)), np.outer(rng.normal(size=6), 5 * rng.normal(size=9))
    found = Leading.of(Change("layers.0.mlp.up_proj", None, (), base, delta), 3)
    # By eigenvectors of WᵀW, vector by vector.
    of_base = np.linalg.eigh(base.T @ base)[1].T[::-1][:6]
    of_tuned = np.linalg.eigh((base + delta).T @ (base + delta))[1].T[::-1][:3]
    nearest = [max(abs(sum(a * b for a, b in zip(u, v, strict=True))) for v in of_base) for u in of_tuned]
    np.testing.assert_allclose(found.nearest, nearest, atol=1e-9)
    for below in (0.1, 0.5, 0.7, 0.9, 1.1):
        assert found.count(below) == sum(value < below for value in nearest)
    below = min(nearest) + 1e-6
    assert found.count(below) == 1
    np.testing.assert_allclose(found.scaling(below, 1.0), 0, atol=1e-12)
    without = base + delta + found.scaling(below, 0.0)
    values = np.linalg.svd(base + delta, compute_uv=False)
    gone = int(np.argmin(nearest))
    np.testing.assert_allclose(np.linalg.svd(without, compute_uv=False)[:-1], np.delete(values, gone), atol=1e-9)


def test_scaling_gives_the_model_of_the_scaled_matrices_and_leaves_the_other(lora):
    model, _, merged = lora
    after = kernels(merged)
    found = [Leading.of(one, 4) for one in changes(model, every=2)]
    assert sum(one.count(0.7) for one in found) > 3
    before = kernels(model)
    copy = scaled(model, found, 0.7, 0.25)
    merge(copy)
    changed = kernels(copy)
    np.testing.assert_allclose(
        changed["model.layers.1.mlp.down_proj"], after["model.layers.1.mlp.down_proj"], atol=1e-6
    )
    for one in found:
        inputs, values, outputs = np.linalg.svd(after[one.change.path].astype(np.float64))
        expected = after[one.change.path].astype(np.float64)
        for place in np.flatnonzero(one.nearest < 0.7):
            expected -= 0.75 * values[place] * np.outer(inputs[:, place], outputs[place])
        np.testing.assert_allclose(changed[one.change.path], expected, atol=5e-5)
    for path, kernel in kernels(model).items():
        np.testing.assert_array_equal(kernel, before[path])


def test_what_was_known_is_read_where_as_much_was_learned():
    path = [(4.0, 1.0), (2.0, 1.4), (2.5, 1.5), (1.0, 2.0)]
    assert known_at(path, 3.0) == pytest.approx(1.2)
    assert known_at(path, 2.0) == pytest.approx(1.4)
    assert known_at(path, 1.75) == pytest.approx(1.75)
    assert known_at(path, 5.0) == 1.0
    assert known_at(path, 0.5) is None
    assert lowest_known_at({0.1: path, 0.2: [(4.0, 1.0), (2.0, 1.1)], 0.3: [(4.0, 1.0)]}, 3.0) == (0.2, 1.05)
    assert lowest_known_at({0.1: path}, 0.1) is None


def test_code_is_cut_between_lines():
    text = "ab\ncdef\ng\nh"
    assert pieces(text, 4) == ["ab\ncdef\n", "g\nh"]
    assert "".join(pieces(text * 5, 7)) == text * 5


@pytest.mark.slow
def test_rates_are_chosen_on_held_out_rows_and_reported_on_the_test(done):
    result, out = done
    for part in ("held_out", "test"):
        rows = [json.loads(line) for line in (out / "data" / f"{part}.jsonl").read_text().splitlines()]
        known = [json.loads(line)["messages"] for line in Path(demo.data_path(part)).read_text().splitlines()]
        assert [row["messages"] for row in rows] == known[:10]
    frame = pd.read_csv(out / "cells.csv")
    first = frame[(frame["step"] == 0) & (frame["metric"] == "loss")].groupby("stage")["value"]
    assert set(first.groups) == {"choosing", "reported"}
    assert (first.max() - first.min()).max() < 1e-4
    assert abs(first.mean()["choosing"] - first.mean()["reported"]) > 1e-3
    assert result.results.missing() == []


@pytest.mark.slow
def test_the_change_of_a_run_is_that_of_its_files(done):
    result, out = done
    base = load_file(demo.model_path() + "/model.safetensors")
    tuned = load_file(next((out / "runs").glob("full_*seed1")) / "model" / "model.safetensors")
    squares = [
        np.square(tuned[name].astype(np.float64) - base[name].astype(np.float64)).sum()
        for name in base
        if name.endswith("proj.weight") and int(name.split(".")[2]) % 2 == 0
    ]
    assert len(squares) == 14
    assert result.results.last("delta_norm", "full")[1] == pytest.approx(math.sqrt(sum(squares)), rel=1e-2)
    assert 1 < result.results.last("rank90", "full")[1] < 128
    assert result.results.last("rank90_q_proj_0", "LoRA r1")[1] == 1
    assert result.results.last("rank90_k_proj_0", "LoRA r1")[1] == 0


@pytest.mark.slow
def test_the_conclusion_and_figures_of_a_run(done):
    result, out = done
    for words in ("At equal steps", "At equal learning", "a knob of its own", "Intruder dimensions", "all parameters"):
        assert words in result.conclusion
    assert "nan" not in result.conclusion
    assert {path.stem for path in (out / "figures").iterdir()} == {"pareto", "curves", "spectrum", "intruders"}


class Written(Forget):
    """Of which a table is made up."""

    presets = {
        "test": Preset(
            "a test",
            (
                Arm("full", {"adapter.method": "full"}, (0.1, 1.0)),
                Arm("LoRA r1", LORA, (2.0, 3.0)),
                Arm("full, weight decay", {"adapter.method": "full"}, (0.1,)),
            ),
            {},
            _data("instructions", rows=12),
            seeds=2,
        )
    }


@pytest.fixture(scope="module")
def written():
    # (arm, rate): the losses on the new and on the old domain, at steps 0, 1 and 2.
    courses = {
        ("full", 0.1): [(5.0, 1.0), (3.5, 1.1), (2.5, 1.2)],
        ("full", 1.0): [(5.0, 1.0), (2.0, 2.0), (1.0, 4.0)],
        ("LoRA r1", 2.0): [(5.0, 1.0), (4.0, 1.2), (3.0, 1.5)],
        ("LoRA r1", 3.0): [(5.0, 1.0), (4.5, 1.4), (4.0, 1.5)],
        ("full, weight decay", 0.1): [(5.0, 1.0), (4.0, 1.2), (2.0, 1.8)],
    }
    reported = {("full", 1.0), ("LoRA r1", 2.0), ("full, weight decay", 0.1)}
    rows = []
    for (arm, rate), course in courses.items():
        seeds = [("choosing", 0)] + [("reported", seed) for seed in (1, 2) if (arm, rate) in reported]
        for stage, seed in seeds:
            head = {"stage": stage, "seed": seed, "arm": arm, "level": "", "learning_rate": rate, "parameters": 7}
            for step, (new, old) in enumerate(course):
                for metric, value in (("loss", new), ("base_text_loss", old + seed * step * 0.001)):
                    rows.append({**head, "step": step, "metric": metric, "value": value})
            if stage == "reported":
                last = {"rank90": 3.0, "rank90_q_proj_0": 4, "rank90_up_proj_0": 2, "delta_norm": 2.0 + (arm != "full")}
                last |= {f"intruders_{below}": 2.0 * (arm != "full") for below in EPSILONS}
                last |= {f"loss_scaled_{factor}": new for factor in FACTORS}
                last |= {f"base_text_loss_scaled_{factor}": 1.25 + seed * step * 0.001 for factor in FACTORS}
                rows += [{**head, "step": 2, "metric": metric, "value": value} for metric, value in last.items()]
    return Results(pd.DataFrame(rows), Written(), Written.presets["test"])


def test_the_conclusion_is_what_the_table_says(written):
    text = "\n".join(Written().conclude(written))
    assert "**LoRA r1 learns less than full and LoRA r1 forgets less than full**" in text
    assert "**full, weight decay** against **full**: learns less (+1.000 ± 0.000" in text
    # LoRA ends at 3.0. full passes that two thirds of the way from step 0 to step 1, at its lower rate later.
    assert "| full | 0.668 ± 0.004 | 2 |  | 0.150 | 0.1 |" in text
    assert "| LoRA r1 | 0.503 ± 0.013 | 2 | -0.165 ± 0.008 | 0.500 | 2 |" in text
    assert "**LoRA r1** against **full**: forgets less, -0.165 ± 0.008" in text
    # full learns at one rate alone (2.5 is more than twice 1.0), LoRA at both, which differ by nothing.
    assert (
        "differs by 0.000 on average (most, 0.000, for full); among the methods at their chosen rates by 2.500" in text
    )
    assert "ranges overlap" not in text
    assert "Of *learns less* and *forgets less* both hold here." in text
    assert "LoRA r1 moves the weights furthest, but full forgets most" in text
    assert "- **full**: it has none" in text
    assert "- **LoRA r1**: without them the old domain is better, 50% of what was lost comes back" in text


def test_figures_show_every_rate(written):
    found = Written().figures(written)
    assert set(found) == {"pareto", "curves", "spectrum", "intruders"}
    first = found["pareto"].axes[0]
    assert [text.get_text() for text in first.get_legend().get_texts()] == ["0.1", "1 (chosen)"]
    lines = [line.get_xydata().tolist() for line in first.get_lines() if not line.get_label().startswith("_")]
    np.testing.assert_allclose(lines, [[[0, 0], [0.1, 1.5], [0.2, 2.5]], [[0, 0], [1, 3], [3, 4]]], atol=1e-9)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--model", "elsewhere"], "give --texts FILE"),
        (["--data", "few.jsonl"], "and there are 3 in all"),
        (["--data", "tokens.jsonl"], "takes chats or plain texts"),
    ],
)
def test_bad_input_is_one_line(given, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "few.jsonl").write_text('{"text": "a b"}\n' * 3)
    (tmp_path / "tokens.jsonl").write_text('{"input_ids": [3, 4, 5]}\n' * 3)
    assert main(["study", "forget", "--preset", "tiny", "--out", "out", *given]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert words in error
