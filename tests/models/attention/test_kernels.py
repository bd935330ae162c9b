"""Kernels for accelerators: splash attention, interpreted, against XLA's blocks; cuDNN's, lowered; which is taken."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import mora_jax as mj
from mora_jax.backend import compiling_for, interpreting
from mora_jax.errors import InputError
from mora_jax.models.attention.causal import NO_WINDOW, Rows, attention
from mora_jax.models.attention.kernels import AttentionChoice, Cudnn, Splash, tile_of
from mora_jax.models.attention.ring import HeadShards
from mora_jax.models.families import read_config
from mora_jax.models.init import init_decoder
from mora_jax.training.sharding.mesh import make_mesh
from mora_jax.training.sharding.rules import Placement
from tests.models.tiny import LLAMA, fill_randomly

B, T, G, N, H = 2, 140, 2, 2, 8  # two tiles of 128, the second filled up
SCALE = 0.5
SEGMENTS = np.ones((B, T), np.int32)
SEGMENTS[0, 50:] = 2
SEGMENTS[0, 133:] = 0
SEGMENTS[1, :3] = 0
DRAWS = np.random.default_rng(0)
SHAPES = ((B, T, G, N, H), (B, T, G, H), (B, T, G, H), (B, T, G, N, H))
ARRAYS = tuple(DRAWS.standard_normal(shape).astype(np.float32) for shape in SHAPES)
LLAMA_8B = read_config(LLAMA | {"head_dim": 128}, "the model")


def out_and_gradients(kernel, window, softcap, arrays=ARRAYS, segments=SEGMENTS):
    def run(query, key, value, window):
        out = attention(
            query,
            key,
            value,
            q_segments=segments,
            kv_segments=segments,
            window=window,
            scale=SCALE,
            softcap=softcap,
            kernel=kernel,
        )
        return jnp.sum(out * arrays[3]), out

    static = window is None or isinstance(window, int)
    run = jax.value_and_grad(lambda q, k, v, w, inner=run: inner(q, k, v, window if static else w), (0, 1, 2), True)
    (_, out), gradients = jax.jit(run)(*arrays[:3], jnp.asarray(0 if static else window))
    return out, *gradients


MESHES = {"alone": None, "auto": AxisType.Auto, "explicit": AxisType.Explicit}


@pytest.mark.parametrize(
    ("window", "softcap", "mesh"),
    [
        (None, None, "alone"),
        (np.int32(37), 3.0, "auto"),  # traced, one of two
        pytest.param(37, 3.0, "auto", marks=pytest.mark.slow),
        pytest.param(None, None, "explicit", marks=pytest.mark.slow),
        pytest.param(np.int32(NO_WINDOW), None, "alone", marks=pytest.mark.slow),
    ],
)
def test_splash_gives_what_blocks_give(window, softcap, mesh):
    shards, arrays, segments = None, ARRAYS, SEGMENTS
    if MESHES[mesh] is not None:
        devices = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "tensor"), axis_types=(MESHES[mesh],) * 2)
        shards = HeadShards(devices, ("data",), "tensor")
        by_head = PartitionSpec("data", None, "tensor")
        arrays = tuple(jax.device_put(array, NamedSharding(devices, by_head)) for array in ARRAYS)
        segments = jax.device_put(SEGMENTS, NamedSharding(devices, PartitionSpec("data")))
    splash = Splash((None, 37), shards, interpret=True)
    found = out_and_gradients(splash, window, softcap, arrays, segments)
    for ours, blocks in zip(found, out_and_gradients(None, window, softcap), strict=True):
        np.testing.assert_allclose(ours, blocks, atol=3e-5)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "dots"])
def test_a_decoder_with_windows_in_turn(remat):
    sizes = LLAMA | {
        "architectures": ["Gemma2ForCausalLM"],
        "head_dim": 8,
        "sliding_window": 20,
        "num_hidden_layers": 2,
    }
    sizes |= {"query_pre_attn_scalar": 12, "attn_logit_softcapping": 2.0, "max_position_embeddings": 256}
    ids = np.random.default_rng(0).integers(0, 97, (1, 40))
    found = []
    with interpreting():
        for name in ("xla", "splash"):
            model = init_decoder(sizes, nnx.Rngs(0), remat=remat, attention=name)
            mj.attach(model, mj.LoRAConfig(rank=2), rngs=nnx.Rngs(1))
            fill_randomly(model)
            graphdef, adapters, frozen = mj.partition(model)

            def loss(adapters, graphdef=graphdef, frozen=frozen):
                return jnp.mean(jnp.square(nnx.merge(graphdef, adapters, frozen).forward(ids)))

            found.append(jax.jit(jax.value_and_grad(loss))(adapters))
    for splash, xla in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(splash, xla, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("packed", [True, False])
def test_cudnn_lowers_both_ways(packed, monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo as fused

    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)  # this machine has none
    arrays = tuple(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in SHAPES[:3])

    def run(query, key, value):
        options = {"segments": jnp.asarray(SEGMENTS), "window": 37, "scale": SCALE, "softcap": None}
        return jnp.sum(Cudnn(packed).attention(query, key, value, **options).astype(jnp.float32))

    text = jax.jit(jax.grad(run, (0, 1, 2))).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    bias = "ScaleBias" if packed else ""
    assert f"__cudnn$fmha{bias}Softmax" in text and f"__cudnn$fmha{bias}SoftmaxBackward" in text
    assert f'"sliding_window_length":{37}' in text.replace(" ", "").replace("\\22", '"')
    assert ("PADDING_CAUSAL" in text) != packed


def test_tiles_fill_rows_up_little():
    assert [tile_of(length) for length in (1, 200, 512, 640, 2048, 2100, 8192)] == [128, 128, 512, 128, 512, 256, 512]


@pytest.mark.parametrize(
    ("backend", "length", "change", "name"),
    [
        ("cpu", 8192, {}, "xla"),
        ("tpu", 8192, {}, "splash"),
        ("tpu", 128, {}, "xla"),
        ("gpu", 4096, {}, "xla"),  # cuDNN's has to be asked for
        ("gpu", 32768, {"packed": False}, "xla"),
    ],
)
def test_auto(backend, length, change, name):
    rows = dataclasses.replace(Rows(LLAMA_8B, "bfloat16", 2, length), **change)
    with compiling_for(backend):
        assert AttentionChoice("auto").implementation(rows) == name


@pytest.mark.parametrize("packed", [True, False])
def test_cudnn_is_taken_where_it_is_asked_for(packed):
    with compiling_for("gpu"):
        rows = Rows(LLAMA_8B, "bfloat16", 2, 4096, packed=packed)
        assert AttentionChoice("cudnn").implementation(rows) == "cudnn"
        assert AttentionChoice("cudnn").kernel(rows) == Cudnn(packed)


@pytest.mark.parametrize(
    ("backend", "asked", "model", "change", "words"),
    [
        ("cpu", "splash", {}, {}, "model.attention=splash needs a TPU, and this is for cpu; set model.attention=auto"),
        ("tpu", "cudnn", {}, {}, "model.attention=cudnn needs an NVIDIA GPU, and this is for tpu"),
        ("gpu", "cudnn", {}, {"dtype": "float32"}, "computes in bfloat16, and model.dtype is float32"),
        ("gpu", "cudnn", {"head_dim": 256}, {}, "this model has 256"),
        ("gpu", "cudnn", {"attention_softcap": 2.0}, {}, "has no cap on scores"),
        ("gpu", "cudnn", {"windows": (None, 5, None)}, {}, "has one window for all layers"),
        ("gpu", "cudnn", {}, {"length": 4095}, "rows of an even length, not of 4095 tokens"),
    ],
)
def test_what_cannot_be_is_refused_by_name(backend, asked, model, change, words):
    config = dataclasses.replace(LLAMA_8B, **model)
    rows = dataclasses.replace(Rows(config, "bfloat16", 2, 4096), **change)
    with compiling_for(backend), pytest.raises(InputError, match=words) as caught:
        AttentionChoice(asked).implementation(rows)
    assert "\n" not in str(caught.value)


def test_a_ring_takes_all_rows_that_are_shared():
    rows = Rows(LLAMA_8B, "bfloat16", 2, 8192, Placement.of(make_mesh(1, 1, 1, 4)))
    with compiling_for("tpu"):
        auto = AttentionChoice("auto")
        assert auto.implementation(rows) == "xla" and auto.kernel(rows) == rows.partitioner.ring(2)
        with pytest.raises(InputError, match="model.attention=splash takes whole rows"):
            AttentionChoice("splash").implementation(rows)


def test_several_devices_without_a_mesh_have_blocks():
    rows = Rows(LLAMA_8B, "bfloat16", 4, 8192)
    with interpreting():  # here are four devices, and nobody says how arrays lie on them
        assert AttentionChoice("auto").implementation(rows) == "xla"
        mapped = []
        jax.pmap(lambda x: mapped.append(AttentionChoice("auto").implementation(rows)) or x)(np.zeros(4))
    assert mapped == ["splash"]
