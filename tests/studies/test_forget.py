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
from mora_jax.studies.claims import claims
from mora_jax.studies.conclusion import rates_table
from mora_jax.studies.forget import Forget, _data, _settings, known_at, least_forgetting, matched, pieces
from mora_jax.studies.results import Results
from mora_jax.studies.run import run_study
from mora_jax.studies.spectrum import (
    EPSILONS,
    FACTORS,
    Change,
    Leading,
    Spectrum,
    changes,
    cumulative_energy,
    energy_rank,
    gaussian_energy,
    kernels,
    scaled,
    stable_rank,
)
from mora_jax.studies.study import Arm, Preset, Sources
from mora_jax.sweeps.board import Board

LORA = {"adapter.method": "lora", "adapter.rank": 1, "adapter.targets": ("q_proj", "down_proj")}


class Small(Forget):
    """Two arms for two steps."""

    presets = {
        "test": Preset(
            "a test",
            (Arm("full", {"adapter.method": "full"}, (1e-3,)), Arm("LoRA r1", LORA, (1e-2, 2e-2))),
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
    assert math.isnan(known_at(path, 0.5))


def test_code_is_cut_between_lines():
    text = "ab\ncdef\ng\nh"
    assert pieces(text, 4) == ["ab\ncdef\n", "g\nh"]
    assert "".join(pieces(text * 5, 7)) == text * 5


@pytest.mark.slow
def test_rates_are_chosen_on_held_out_rows_and_reported_on_the_test(done):
    """Rows are drawn from all tasks alike, and not from the head of a file."""
    result, out = done
    for part, count in (("held_out", 5), ("test", 10)):
        rows = [json.loads(line) for line in (out / "data" / f"{part}.jsonl").read_text().splitlines()]
        known = [json.loads(line) for line in Path(demo.data_path(part)).read_text().splitlines()]
        assert len(rows) == count and all(row in known for row in rows)
        assert len({row["task"] for row in rows}) == count
    frame = pd.read_csv(out / "cells.csv")
    first = frame[(frame["step"] == 0) & (frame["metric"] == "loss")]
    by_part = first.groupby(first["stage"] == "reported")["value"]
    assert set(first["stage"]) >= {"choosing", "reported"}
    assert (by_part.max() - by_part.min()).max() < 1e-4
    assert abs(by_part.mean()[True] - by_part.mean()[False]) > 1e-3
    assert result.results.missing() == []


def test_all_test_rows_of_the_quick_preset_are_scored(tmp_path):
    study, preset = Forget(), Forget.presets["quick"]
    study.write_data(preset, preset.levels[0], 1, tmp_path, Sources(demo.model_path()))
    rows = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    assert len(rows) == 240 and len({row["task"] for row in rows}) == 12


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
    assert result.results.values("delta_norm", "full")[1] == pytest.approx(math.sqrt(sum(squares)), rel=1e-2)
    assert 1 < result.results.values("rank90", "full")[1] < 128
    assert result.results.values("rank90_q_proj_0", "LoRA r1")[1] == 1
    assert result.results.values("rank90_k_proj_0", "LoRA r1")[1] == 0


@pytest.mark.slow
def test_the_conclusion_and_figures_of_a_run(done):
    result, out = done
    for heading in ("## Differences", "## At equal learning", "## By learning rate", "Intruder dimensions"):
        assert heading in result.conclusion
    assert "nan" not in result.conclusion
    assert {path.stem for path in (out / "figures").iterdir()} == {"plane", "curves", "spectrum", "intruders", "rates"}


class Written(Forget):
    """Of which a table is made up."""

    presets = {
        "test": Preset(
            "a test",
            (
                Arm("full", {"adapter.method": "full"}, (0.1, 1.0)),
                Arm("LoRA r1", LORA, (2.0, 3.0)),
                Arm("full, weight decay", {"adapter.method": "full"}, (0.1,), control_of="full"),
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
            head |= {"cell": f"{arm} {rate} {seed}", "note": None, "versions": ""}
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
    stated = {(claim.claim, claim.metric.split(",")[0]): claim for claim in claims(written)}
    learned = stated["LoRA r1 − full", "loss on the new domain"]
    known = stated["LoRA r1 − full", "loss on the old domain"]
    assert (learned.effect, learned.verdict, learned.halfway) == (2.0, "worse", 2.0)
    assert (known.effect, known.verdict) == (pytest.approx(-2.5), "better")
    assert stated["full, weight decay − full", "loss on the new domain"].effect == 1.0
    # LoRA ends at 3.0. full passes that two thirds of the way from step 0 to step 1.
    rise = matched(written)
    assert rise["full"] == pytest.approx({1: 2 / 3 * 1.001, 2: 2 / 3 * 1.002})
    assert rise["LoRA r1"] == pytest.approx({1: 0.502, 2: 0.504})
    equal = stated["LoRA r1 − full", "rise of the old domain's loss at equal learning"]
    assert equal.effect == pytest.approx(0.503 - 2 / 3 * 1.0015)
    # On the seed that chooses, full at its lower rate comes to 3.0 half way from step 1 to step 2.
    assert least_forgetting(written, "full", 3.0) == pytest.approx({0.1: 0.15, 1.0: 2 / 3})
    assert least_forgetting(written, "LoRA r1", 3.0) == pytest.approx({2.0: 0.5})
    sections = Written().sections(written)
    assert "| full | 0.668 ± 0.004 | 2 | 0.150 | 0.1 | 1 |" in sections["matched"]
    assert "| LoRA r1, 2 (chosen) | 1 | 1.500 | 3.000 |" in rates_table(written)
    assert "| LoRA r1 | 2 | 2.00 ± 0.00 | -0.250 ± 0.000 | +0.000 ± 0.000 |" in sections["intruders"]


def test_lower_rates_are_explored_until_the_least_forgetting_lies_inside(written):
    cells = {cell.name for cell in Written().explore(written)}
    # At equal learning full forgets least at its lowest rate; LoRA's lowest is its only one that learns as much.
    assert {name.split("_")[0] for name in cells} == {"full", "LoRA-r1"}
    assert {name.split("_")[1] for name in cells} == {"lr0.01", "lr1.33"}
    assert {name.split("_")[2] for name in cells} == {"seed0", "seed1001", "seed1002"}
    rows = written.frame[(written.frame["arm"] == "full") & (written.frame["learning_rate"] == 0.1)]
    slow = rows[rows["seed"] == 0].assign(learning_rate=0.01, stage="exploratory", cell="slow")
    slow.loc[slow["metric"] == "loss", "value"] += 1.0
    further = Results(pd.concat([written.frame, slow]), written.study, written.preset)
    assert not any("full" in cell.name for cell in Written().explore(further))


def test_figures_show_every_rate(written):
    figures = Written().figures(written)
    assert set(figures) == {"plane", "curves", "spectrum", "intruders"}
    [plane] = figures["plane"].axes
    lines = [line.get_xydata().tolist() for line in plane.get_lines() if len(line.get_xdata()) == 2]
    assert [[0.2, 2.5], [3.0, 4.0]] in [np.round(line, 9).tolist() for line in lines]
    assert [text.get_text() for text in figures["plane"].legends[0].get_texts()] == written.arms
    assert "n = 2 seeds" in figures["plane"].get_supxlabel()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--model", "elsewhere"], "give --texts FILE"),
        (["--data", "few.jsonl"], "3 rows with 1 prompts are too few for three parts"),
        (["--data", "tokens.jsonl"], "takes chats or plain texts"),
        (["--preset", "paper", "--model", "elsewhere", "--texts", "few.jsonl"], "give more by --data FILE"),
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
