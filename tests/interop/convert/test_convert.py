"""Conversions: exact where they can be, nearest elsewhere, with the error stated and never silently lossy."""

import functools
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import mora_jax as mj
from mora_jax.adapters.attach import adapters_of
from mora_jax.adapters.methods.mora import KINDS, square_rank
from mora_jax.adapters.methods.registry import adapter_class
from mora_jax.adapters.sites import sites
from mora_jax.interop.convert.convert import convert_to_lora, convert_to_mora
from mora_jax.interop.load import load_shapes
from tests.models.tiny import fill_randomly, hf_folder, random_ids
from tests.models.tiny_torch import hf_logits, hf_model
from tests.peers import peft

IDS = random_ids(2, 9)
LOW_RANK = [kind for kind in KINDS if kind not in ("rotation", "decouple")]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return hf_folder(tmp_path_factory.mktemp("base"))


def shapes_with(folder: Path, config) -> mj.models.Decoder:
    """The model without its weights, with a random adapter."""
    model = load_shapes(folder)
    mj.attach(model, config, rngs=nnx.Rngs(0))
    fill_randomly(model)
    return model


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def dense(config, in_features, out_features, params):
    """One program for all matrices of a size."""
    return adapter_class(config).dense(config, in_features, out_features, params)


def kernels(model) -> dict[str, np.ndarray]:
    return {
        entry.path: np.asarray(dense(entry.config, entry.in_features, entry.out_features, entry.params))
        for entry in adapters_of(model)
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", LOW_RANK)
@pytest.mark.parametrize("rank", [1, 8])
def test_mora_of_low_rank_becomes_an_exact_lora(base, kind, rank):
    model = shapes_with(base, mj.MoRAConfig(rank=rank, kind=kind))
    before = kernels(model)
    conversion = convert_to_lora(model)
    after = kernels(model)
    assert set(after) == set(before)
    for path, kernel in before.items():
        np.testing.assert_allclose(after[path], kernel, atol=1e-5)
    assert conversion.error == 0
    for entry, row in zip(adapters_of(model), conversion.rows, strict=True):
        n_in, n_out = entry.in_features, entry.out_features
        assert entry.method == "lora"
        assert entry.config.rank == row.size == min(square_rank(n_in, n_out, rank, kind), n_in, n_out)
        np.testing.assert_allclose(row.norm, np.linalg.norm(before[entry.path]), rtol=1e-4)


@pytest.mark.parametrize("kind", ["rotation", "decouple"])
def test_full_rank_is_refused_with_the_errors_of_some_ranks(base, kind):
    model = shapes_with(base, mj.MoRAConfig(rank=1, kind=kind))
    before = kernels(model)
    rest, whole = 0.0, 0.0
    for kernel in before.values():
        values = np.linalg.svd(kernel, compute_uv=False)
        rest, whole = rest + (values[8:] ** 2).sum(), whole + (values**2).sum()
    with pytest.raises(mj.InputError, match=f"kind {kind}: 21 of 21 updates have full rank") as caught:
        convert_to_lora(model)
    assert f"{np.sqrt(rest / whole):.3g} at rank 8" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert {entry.method for entry in adapters_of(model)} == {"mora"}, "nothing has changed"


@pytest.mark.parametrize(
    "config",
    [mj.MoRAConfig(rank=2, kind="rotation"), mj.MoRAConfig(rank=4), mj.LoRAConfig(rank=6, alpha=15.0)],
    ids=lambda config: f"{type(config).__name__}",
)
def test_a_given_rank_is_the_nearest_one_with_its_error(base, config):
    model = shapes_with(base, config)
    before = kernels(model)
    conversion = convert_to_lora(model, rank=3)
    after = kernels(model)
    left = {path: np.linalg.norm(after[path] - before[path]) for path in before}
    for row in conversion.rows:
        values = np.linalg.svd(before[row.path], compute_uv=False)
        np.testing.assert_allclose(left[row.path], np.linalg.norm(values[3:]), atol=1e-4)
        np.testing.assert_allclose([row.norm, row.error], [np.linalg.norm(values), left[row.path]], atol=1e-4)
        assert row.size == 3
    whole = np.sqrt(sum(np.linalg.norm(kernel) ** 2 for kernel in before.values()))
    np.testing.assert_allclose(conversion.error, np.linalg.norm(list(left.values())) / whole, rtol=1e-3)
    assert 0.01 < conversion.error < 1
    assert f"error {conversion.error:.3g} in total" in str(conversion)


@pytest.mark.parametrize(
    "config",
    [mj.DoRAConfig(rank=2), pytest.param(mj.MoRAConfig(rank=2, use_dora=True), marks=pytest.mark.slow)],
    ids=["dora", "mora"],
)
def test_a_magnitude_changes_the_base_too(base, config):
    model = mj.load_pretrained(base, dtype="float32")[0]
    mj.attach(model, config, rngs=nnx.Rngs(0))
    for _, node in nnx.iter_graph(model):
        if isinstance(node, mj.AdapterParam):
            noise = np.random.default_rng(node.size).standard_normal(node.shape)
            node.set_value(node[...] + 0.1 * noise.astype(np.float32))
    expected = np.asarray(model(IDS))
    with pytest.raises(mj.InputError, match=r"with a magnitude: 21 of 21 updates have full rank"):
        convert_to_lora(model)
    conversion = convert_to_lora(model, rank=32)
    assert conversion.error < 1e-5
    np.testing.assert_allclose(np.asarray(model(IDS)), expected, atol=1e-3)


@pytest.mark.parametrize("convert", [convert_to_lora, functools.partial(convert_to_mora, kind="rotation")])
def test_nothing_is_made_of_values_that_are_not_finite(base, convert):
    model = shapes_with(base, mj.LoRAConfig(rank=2, targets=("q_proj",)))
    adapter = next(place.adapter for place in sites(model) if place.adapter is not None)
    values = np.array(adapter.lora_b[...])
    values[1, 0, 0] = np.nan
    adapter.lora_b[...] = values
    with pytest.raises(mj.InputError, match=r"layers.1.self_attn.q_proj has values that are no finite numbers"):
        convert(model)


def test_what_no_update_of_a_matrix_can_hold(base):
    model = mj.load_pretrained(base, dtype="float32")[0]
    mj.attach(model, mj.LoRAConfig(rank=2, modules_to_save=("norm",)), rngs=nnx.Rngs(0))
    with pytest.raises(mj.InputError, match="modules that are trained whole can't be converted"):
        convert_to_lora(model)
    model = mj.load_pretrained(base, dtype="float32")[0]
    mj.attach(model, mj.BitFitConfig(), rngs=nnx.Rngs(0))
    with pytest.raises(mj.InputError, match="trains its bias, which can't be converted"):
        convert_to_mora(model)


def test_a_larger_rank_changes_nothing(base):
    model = shapes_with(base, mj.LoRAConfig(rank=2, alpha=7.0, dropout=0.25))
    before = kernels(model)
    conversion = convert_to_lora(model, rank=8)
    assert conversion.error == 0
    for path, kernel in kernels(model).items():
        np.testing.assert_allclose(kernel, before[path], atol=1e-6)
    assert {(entry.config.rank, entry.config.dropout) for entry in adapters_of(model)} == {(8, 0.25)}


@pytest.mark.parametrize("kind", ["sharing", "rotation", "grouped_tile"])
def test_mora_comes_back_from_its_own_update(base, kind):
    model = shapes_with(base, mj.MoRAConfig(rank=2, kind=kind))
    before = kernels(model)
    convert_to_lora(model, rank=48)
    conversion = convert_to_mora(model, kind=kind, rank=2)
    assert conversion.error < 1e-5
    for path, kernel in kernels(model).items():
        np.testing.assert_allclose(kernel, before[path], atol=1e-4)
    assert {(entry.method, entry.config.kind, entry.config.rank) for entry in adapters_of(model)} == {("mora", kind, 2)}


def test_the_fit_to_a_lora_states_its_error(base):
    model = shapes_with(base, mj.LoRAConfig(rank=2, targets=("q_proj", "down_proj")))
    before = kernels(model)
    conversion = convert_to_mora(model)
    after = kernels(model)
    assert {entry.config.rank for entry in adapters_of(model)} == {2}
    for row in conversion.rows:
        np.testing.assert_allclose(row.error, np.linalg.norm(after[row.path] - before[row.path]), rtol=1e-4)
        assert 0.1 < row.relative < 1


def test_an_embedding_has_no_mora(tmp_path):
    model = nnx.Dict(table=nnx.Embed(5, 4, rngs=nnx.Rngs(0)))
    mj.attach(model, mj.LoRAConfig(rank=2, targets=("table",)), rngs=nnx.Rngs(0))
    with pytest.raises(mj.InputError, match="table is an embedding, for which MoRA has no form"):
        convert_to_mora(model)
    assert convert_to_lora(model, rank=4).rows[0].size == 4


def test_models_without_adapters_are_refused(base):
    for convert in (convert_to_lora, convert_to_mora):
        with pytest.raises(mj.InputError, match="no adapter to convert"):
            convert(load_shapes(base))


@pytest.mark.peers
def test_real_peft_loads_lifted_mora(base, tmp_path):
    model = mj.load_pretrained(base, dtype="float32")[0]
    mj.attach(model, mj.MoRAConfig(rank=1), rngs=nnx.Rngs(0))
    fill_randomly(model)
    expected = np.asarray(model(IDS))
    convert_to_lora(model)
    np.testing.assert_allclose(np.asarray(model(IDS)), expected, atol=1e-4)
    mj.save_adapter(model, tmp_path / "lifted")
    loaded = peft.PeftModel.from_pretrained(hf_model("llama"), str(tmp_path / "lifted")).eval()
    np.testing.assert_allclose(hf_logits(loaded, IDS), expected, atol=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        mj.VeRAConfig(rank=5),
        mj.VeRAConfig(rank=40),
        mj.AdaLoRAConfig(4, 6.0, target_rank=2),
        mj.MiSSConfig(rank=5),
        mj.MiSSConfig(rank=7, form="mini", mini_rank=4),
    ],
)
def test_other_thin_updates_become_exact_loras(base, config):
    model = shapes_with(base, config)
    pruned = None
    if isinstance(config, mj.AdaLoRAConfig):
        for place in sites(model):
            if place.adapter is not None:
                kept = np.arange(4) < 1 + len(place.part) % 4  # another rank for each matrix, one of them 1
                place.adapter.lora_e[...] = place.adapter.lora_e[...] * kept
                pruned = {**(pruned or {}), place.part: int(kept.sum())}
    before = kernels(model)
    conversion = convert_to_lora(model)
    assert conversion.error == 0 and str(conversion).startswith("matrix")
    for path, kernel in kernels(model).items():
        np.testing.assert_allclose(kernel, before[path], atol=1e-5)
    for entry in adapters_of(model):
        rank = entry.config.rank
        assert rank == (pruned[entry.path.rpartition(".")[2]] if pruned else min(config.rank, 16 if rank == 16 else 32))
    assert before and max(np.abs(kernel).max() for kernel in before.values()) > 1e-2


def test_ia3_has_full_rank(base):
    model = mj.load_pretrained(base, dtype="float32")[0]
    mj.attach(model, mj.IA3Config(), rngs=nnx.Rngs(0))
    fill_randomly(model)
    expected = np.asarray(model(IDS))
    with pytest.raises(mj.InputError, match=r"ia3: 9 of 9 updates have full rank, .* error is .* at rank 8"):
        convert_to_lora(model)
    conversion = convert_to_lora(model, rank=32)
    assert conversion.error < 1e-5
    np.testing.assert_allclose(np.asarray(model(IDS)), expected, atol=1e-3)
