"""The decoder by itself: segments, positions, dtypes, errors. test_families checks what it computes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mora_jax as mj
from mora_jax.models import decoder, init_decoder
from tests.models.tiny import LLAMA, fill_randomly, random_ids

IDS = random_ids(2, 12)


@pytest.fixture(scope="module")
def model():
    return init_decoder(LLAMA, nnx.Rngs(0))


def close(found, expected) -> None:
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), atol=2e-5)


def test_logits_are_float32_and_causal(model):
    logits = model(IDS)
    assert logits.shape == (2, 12, LLAMA["vocab_size"])
    assert logits.dtype == jnp.float32
    close(model(IDS[:, :8]), logits[:, :8])


def test_a_packed_row_equals_its_parts(model):
    segments = np.array([[1] * 5 + [2] * 4 + [0] * 3])
    packed = model(IDS[:1], segments)
    close(packed[:, :5], model(IDS[:1, :5]))
    close(packed[:, 5:9], model(IDS[:1, 5:9]))
    assert np.isfinite(packed).all()


def test_equal_numbers_see_each_other_wherever_they_stand(model):
    segments = np.array([[3, 3, 7, 7, 3, 0, 3, 7, 3, 7, 0, 0]])
    logits = model(IDS[:1], segments)
    for number in (3, 7):
        where = segments[0] == number
        close(logits[:, where], model(IDS[:1, where]))


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_mask_is_a_valid_segment_id(model, side):
    kept = slice(4, None) if side == "left" else slice(None, -4)
    mask = np.zeros_like(IDS)
    mask[:, kept] = 1
    logits = model(IDS, mask)
    close(logits[:, kept], model(IDS[:, kept]))
    assert np.isfinite(logits).all()


def test_boolean_masks_and_rows_of_padding_alone(model):
    mask = np.ones(IDS.shape, dtype=bool)
    mask[1] = False
    logits = model(IDS, mask)
    close(logits[:1], model(IDS[:1]))
    assert np.isfinite(logits).all()


def test_only_differences_of_positions_matter(model):
    positions = np.broadcast_to(np.arange(12), IDS.shape)
    close(model(IDS, positions=positions + 5), model(IDS))
    assert not np.allclose(model(IDS, positions=2 * positions), model(IDS), atol=1e-2)


@pytest.mark.parametrize("bad", [97, -1, 10**6])
def test_ids_outside_the_embedding_are_refused(model, bad):
    ids = IDS.copy()
    ids[0, 3] = bad
    with pytest.raises(ValueError, match=f"token id {bad} is outside the embedding: ids go from 0 to 96"):
        model(ids)
    with pytest.raises(ValueError, match=f"token id {bad} is outside"):
        model.extend(model.init_cache(2, 12), ids)
    traced = jax.jit(lambda ids: model(ids))(ids)
    assert np.isnan(traced[0, 3]).all()  # never the values of another token
    close(traced[1], model(IDS)[1])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((IDS[0],), r"input_ids must be \[batch, length\], got shape \(12,\)"),
        ((IDS, IDS[:, :3]), r"segment_ids must have the shape of input_ids \(2, 12\), got \(2, 3\)"),
        ((IDS, None, IDS[:1]), r"positions must have the shape of input_ids \(2, 12\), got \(1, 12\)"),
        ((IDS.astype(np.float32),), "token ids must be integers, got float32"),
    ],
)
def test_bad_arguments(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model(*arguments)


def test_lists_are_accepted(model):
    close(model(IDS.tolist()), model(IDS))


def test_bad_settings():
    with pytest.raises(ValueError, match="remat must be one of none, dots, full, offload, got 'some'"):
        init_decoder(LLAMA, nnx.Rngs(0), remat="some")
    with pytest.raises(mj.InputError, match="dtype 'int8' is not supported"):
        init_decoder(LLAMA, nnx.Rngs(0), dtype="int8")


def gradients(**options) -> tuple:
    model = init_decoder(LLAMA, nnx.Rngs(0), **options)
    mj.attach(model, mj.LoRAConfig(rank=2, targets=("q_proj", "up_proj", "down_proj")), rngs=nnx.Rngs(1))
    fill_randomly(model)
    graphdef, adapters, frozen = mj.partition(model)

    def loss(adapters):
        return jnp.mean(jnp.square(nnx.merge(graphdef, adapters, frozen)(IDS)))

    value, gradient = jax.jit(jax.value_and_grad(loss))(adapters)
    return value, jax.tree.leaves(gradient)


@pytest.mark.slow
def test_remat_changes_nothing():
    expected = gradients()
    assert all(np.abs(leaf).max() > 0 for leaf in expected[1])
    for remat in ("full", "dots"):
        found = gradients(remat=remat)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, expected)


def test_dropout_acts_on_the_adapters_alone(model):
    mine = init_decoder(LLAMA, nnx.Rngs(0))
    mj.attach(mine, mj.LoRAConfig(rank=2, dropout=0.5), rngs=nnx.Rngs(1))
    close(mine(IDS, dropout_key=jax.random.key(0)), model(IDS))
    fill_randomly(mine)
    plain, dropped, again, other = (
        np.asarray(mine(IDS, dropout_key=key)) for key in (None, *map(jax.random.key, (0, 0, 1)))
    )
    np.testing.assert_array_equal(dropped, again)
    for different in (plain, other):
        assert not np.allclose(dropped, different, atol=1e-2)


def test_eager_calls_compile_once(model):
    model(IDS)
    before = decoder._logits._cache_size()
    for _ in range(3):
        model(IDS)
    assert decoder._logits._cache_size() == before


def test_bfloat16_keeps_its_dtypes(model):
    half = init_decoder(LLAMA, nnx.Rngs(0), dtype="bfloat16")
    assert half.hidden(IDS).dtype == jnp.bfloat16
    assert half(IDS).dtype == jnp.float32
    dtypes = {
        (type(node).__name__, value.dtype.name)
        for _, node in nnx.iter_modules(half)
        for value in vars(node).values()
        if isinstance(value, nnx.Param)
    }
    assert dtypes == {("Projection", "bfloat16"), ("TokenEmbedding", "bfloat16"), ("Norm", "float32")} | {
        ("OutputHead", "bfloat16")
    }
    difference = np.abs(np.asarray(half(IDS)) - np.asarray(model(IDS)))
    assert difference.max() < 0.1 * np.abs(np.asarray(model(IDS))).max()


def test_every_parameter_names_its_axes(model):
    known = {
        "layers",
        "embed",
        "kv_heads",
        "q_per_kv",
        "head_dim",
        "heads",
        "gate_up",
        "mlp",
        "vocab",
        "rank",
    }
    mine = init_decoder(LLAMA, nnx.Rngs(0))
    mj.attach(mine, mj.LoRAConfig(rank=2), rngs=nnx.Rngs(1))
    parameters = [node for _, node in nnx.iter_graph(mine) if isinstance(node, nnx.Param)]
    assert len(parameters) == 2 + 4 + 3 + 2 * 7  # embedding and head, projections, norms, factors
    for parameter in parameters:
        axes = parameter.get_metadata()["axes"]
        assert len(axes) == parameter.ndim
        assert set(axes) <= known | {"rank"}
        if parameter.ndim > 2:
            assert axes[0] == "layers"


def test_random_weights_follow_the_config_and_the_key():
    first = init_decoder(LLAMA, nnx.Rngs(0))
    kernel = first.layers.mlp.gate_up_proj.kernel[...]
    assert abs(float(kernel.std()) - LLAMA["initializer_range"]) < 0.01
    close(init_decoder(LLAMA, nnx.Rngs(0))(IDS), first(IDS))
    assert not np.allclose(init_decoder(LLAMA, nnx.Rngs(1))(IDS), first(IDS), atol=1e-2)


def test_configs_come_from_files_too(tmp_path, model):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    for path in (tmp_path, tmp_path / "config.json"):
        assert init_decoder(path, nnx.Rngs(0)).config == model.config
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"hidden_size": 0}))
    with pytest.raises(mj.InputError, match=f"^{tmp_path}/config.json: hidden_size must be"):
        init_decoder(tmp_path, nnx.Rngs(0))
    with pytest.raises(mj.InputError, match="nowhere does not exist"):
        init_decoder(tmp_path / "nowhere", nnx.Rngs(0))


def test_the_head_gives_the_logits(model):
    head = model.head()
    assert head.kernel.shape == (LLAMA["vocab_size"], LLAMA["hidden_size"])
    assert head.softcap is None
    close(head.logits(model.hidden(IDS)), model(IDS))
    capped = decoder.Head(head.kernel, 2.0)
    close(capped.logits(model.hidden(IDS)), 2.0 * np.tanh(np.asarray(model(IDS)) / 2.0))
