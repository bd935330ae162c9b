"""Plans with a quantised base: bytes by hand, and when one is recommended."""

import pytest

from mora_jax.planning import advice
from mora_jax.planning.advice import formats, recommend
from mora_jax.planning.model_shapes import PUBLISHED
from mora_jax.planning.plan import by_formula
from mora_jax.planning.topology import read_topology
from mora_jax.training.config.schema import Config, lay_over

ONE = read_topology("v5e-1")


def run_of(**settings) -> Config:
    named = {name.replace("__", "."): value for name, value in settings.items()}
    common = {"model.dtype": "bfloat16", "model.remat": "full", "data.max_length": 2048, "train.batch_size": 1}
    return lay_over(Config(), [(name, value, "test") for name, value in (common | named).items()])


def test_llama3_8b_fits_on_one_v5e_with_a_quantised_base():
    width, mlp, vocabulary, layers = 4096, 14336, 128256, 32
    layer = width * width * 2 + width * 1024 * 2 + 3 * width * mlp
    whole = 2 * vocabulary * width * 2 + (2 * layers + 1) * width * 4  # embedding and head, and float32 norms
    sizes = {"none": 2.0, "int8": 1 + 4 / 64, "nf4": 1 / 2 + 4 / 64}  # bytes a number
    plans = {
        held: by_formula(run_of(model__quantize=held), PUBLISHED["llama3-8b"], ONE) for held in ("none", "int8", "nf4")
    }
    for held, plan in plans.items():
        # Scales of adapters are frozen, too: one number a matrix and layer.
        assert plan.memory.weights == layers * layer * sizes[held] + whole + layers * 7 * 4
        assert plan.fits == (held != "none")
        assert plan.settings()["model.quantize"] == held
    assert 9e9 < plans["int8"].memory.weights < 10e9 and plans["int8"].needed < 13e9
    assert len({(plan.parameters, plan.trainable, plan.estimate.flops) for plan in plans.values()}) == 1


def test_shards_and_what_is_gathered():
    topology = read_topology("v5e-8")
    alone, shared = (
        by_formula(run_of(model__quantize="nf4", train__batch_size=8, mesh__data=1, mesh__fsdp=fsdp), MODEL, topology)
        for fsdp in (1, 8)
    )
    assert shared.memory.weights < 1.02 * alone.memory.weights / 8
    dense = by_formula(run_of(train__batch_size=8, mesh__data=1, mesh__fsdp=8), MODEL, topology)

    def gathered(plan):
        return sum(entry.bytes for entry in plan.collectives if entry.kind == "all-gather")

    assert gathered(shared) < 0.5 * gathered(dense)


MODEL = PUBLISHED["smollm2-1.7b"]


@pytest.mark.parametrize(
    ("name", "held"),
    [
        ("qwen3-14b", {"nf4"}),
        pytest.param("llama3-8b", {"int8"}, marks=pytest.mark.slow),
        pytest.param("smollm2-1.7b", {"none"}, marks=pytest.mark.slow),
    ],
)
def test_a_format_is_tried_only_where_nothing_else_fits(name, held, monkeypatch):
    # What takes least memory decides; the rest of the ways is traced for seconds each.
    monkeypatch.setattr(advice, "_REMAT", ("full",))
    monkeypatch.setattr(advice, "_LAST_REMAT", ("offload",))
    assert {way.config.model.quantize for way in recommend(run_of(), PUBLISHED[name], ONE)} == held


def test_full_fine_tuning_does_not_fit_in_any_format():
    assert recommend(run_of(adapter__method="full"), PUBLISHED["llama3-8b"], ONE) == []


@pytest.mark.parametrize(
    ("settings", "tried"),
    [
        ({}, ["none", "int8", "nf4"]),
        ({"model__quantize": "int8"}, ["int8", "nf4"]),
        ({"model__quantize": "nf4"}, ["nf4"]),
        ({"adapter__method": "full"}, ["none"]),
        ({"adapter__init": "pissa"}, ["none"]),
    ],
)
def test_formats_that_are_tried(settings, tried):
    assert formats(run_of(**settings)) == tried
