"""Weights on a mesh: every mesh trains like one device, and no device ever holds the whole base."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec as P

import mora_jax as mj
from mora_jax.adapters.products.quantization import FORMATS
from mora_jax.errors import InputError
from mora_jax.models.decoder import Decoder
from mora_jax.models.families import read_config
from mora_jax.training.sharding.mesh import make_mesh
from mora_jax.training.sharding.rules import Placement
from mora_jax.training.sharding.runner import JitRunner
from tests.training.meshed import METHODS, SIZES, run

ROOT = Path(__file__).resolve().parents[2]


def placed(method: str, mesh: tuple[int, ...], sizes: str) -> tuple[Placement, dict[str, P]]:
    """The placement of a model, and where each array is stored."""
    model = Decoder(read_config(SIZES[sizes], "config.json"), rngs=nnx.Rngs(0))
    mj.attach(model, METHODS[method], rngs=nnx.Rngs(1))
    _, adapters, frozen = mj.partition(model)
    placement = Placement.of(make_mesh(*mesh), adapters, frozen)
    return placement, {name: place.spec for name, place in placement.table(adapters, frozen).items()}


def test_the_table_on_a_model_that_divides():
    placement, specs = placed("lora", (1, 2, 2), "even")
    assert placement.notes() == []
    expected = {
        "embed_tokens.embedding": ("tensor", "fsdp"),
        "layers.self_attn.qkv_proj.kernel": (None, "fsdp", "tensor", None, None),
        "layers.self_attn.o_proj.kernel": (None, "tensor", "fsdp"),
        "layers.mlp.gate_up_proj.kernel": (None, "fsdp", None, "tensor"),
        "layers.mlp.down_proj.kernel": (None, "tensor", "fsdp"),
        "layers.attention_norm.weight": (None, None),
        "layers.self_attn.qkv_proj.adapters.q_proj.lora_a": (None, "fsdp", None),
        "layers.self_attn.qkv_proj.adapters.q_proj.lora_b": (None, None, "tensor"),
        "layers.mlp.down_proj.adapters.down_proj.lora_a": (None, "tensor", None),
        "layers.mlp.down_proj.adapters.down_proj.lora_b": (None, None, "fsdp"),
    }
    assert {name: tuple(specs[name]) for name in expected} == expected


@pytest.mark.parametrize(
    ("mesh", "sizes", "qkv", "gate_up"),
    [
        ((1, 4, 1), "even", True, True),
        ((1, 2, 2), "even", True, False),  # halves of gate and halves of up are no block of columns
        ((1, 1, 4), "odd", True, False),
    ],
)
def test_kernels_are_matrices_where_devices_hold_blocks_of_columns(mesh, sizes, qkv, gate_up):
    placement, specs = placed("lora", mesh, sizes)
    layers = Decoder(read_config(SIZES[sizes], "config.json"), rngs=nnx.Rngs(0)).layers
    kernels = layers.self_attn.qkv_proj.kernel, layers.mlp.gate_up_proj.kernel
    flat = [placement.flattens(kernel.get_metadata()["axes"][1:], kernel.shape[1:]) for kernel in kernels]
    assert flat == [qkv, gate_up]


def test_an_axis_that_does_not_divide_stays_whole_and_the_matrix_is_cut_elsewhere():
    placement, specs = placed("mora", (1, 1, 4), "odd")
    assert [note.split(" doesn't")[0] for note in placement.notes()] == ["kv_heads (2)", "vocab (97)"]
    assert tuple(specs["embed_tokens.embedding"]) == (None, ("fsdp", "tensor"))
    assert tuple(specs["layers.self_attn.qkv_proj.kernel"]) == (None, ("fsdp", "tensor"), None, None, None)
    kernels = [spec for name, spec in specs.items() if name.endswith(("kernel", "embedding"))]
    assert kernels and all("tensor" in str(spec) for spec in kernels)


def test_square_matrices_are_cut_where_they_divide():
    _, specs = placed("mora", (1, 2, 2), "even")
    squares = {spec for name, spec in specs.items() if name.endswith(".m")}
    assert squares == {P(None, "fsdp", None)}


CASES = [
    pytest.param("lora", (4, 1, 1), {}, marks=pytest.mark.slow),
    pytest.param("lora", (1, 4, 1), {"sizes": "even"}, marks=pytest.mark.slow),
    pytest.param("lora", (1, 1, 4), {"sizes": "even"}, marks=pytest.mark.slow),
    pytest.param("mora", (1, 4, 1), {"micro_batches": 2}, marks=pytest.mark.slow),
    pytest.param("mora", (1, 1, 4), {}, marks=pytest.mark.slow),
    ("sharing", (1, 1, 4), {"sizes": "even"}),
    pytest.param("full", (2, 2, 1), {"micro_batches": 2}, marks=pytest.mark.slow),
    pytest.param("full", (1, 2, 2), {"packed": False, "sizes": "even"}, marks=pytest.mark.slow),
    pytest.param("lora", (1, 4, 1), {"sizes": "blocks", "quantize": "nf4"}, marks=pytest.mark.slow),
    pytest.param("lora", (1, 1, 4), {"sizes": "blocks", "quantize": "nf4"}, marks=pytest.mark.slow),
    ("lora", (1, 2, 2), {"sizes": "experts", "dropout": 0.2}),
    pytest.param("mora", (1, 1, 4), {"sizes": "experts"}, marks=pytest.mark.slow),
    pytest.param("lora", (4, 1, 1), {"sizes": "experts"}, marks=pytest.mark.slow),
    pytest.param("lora", (1, 2, 2), {"sizes": "three_experts"}, marks=pytest.mark.slow),
    pytest.param("full", (1, 2, 2), {"sizes": "experts"}, marks=pytest.mark.slow),
    pytest.param("lora", (1, 1, 2, 2), {"sizes": "experts"}, marks=pytest.mark.slow),
    pytest.param(
        "lora", (1, 1, 1, 1, 4), {"sizes": "experts", "micro_batches": 2, "dropout": 0.2}, marks=pytest.mark.slow
    ),
    pytest.param("lora", (1, 1, 2, 1, 2), {"sizes": "six_experts"}, marks=pytest.mark.slow),
    pytest.param("mora", (1, 2, 1, 1, 2), {"sizes": "experts"}, marks=pytest.mark.slow),
    pytest.param("full", (1, 1, 2, 1, 2), {"sizes": "experts"}, marks=pytest.mark.slow),
    pytest.param("lora", (1, 1, 1, 2, 2), {"sizes": "experts"}, marks=pytest.mark.slow),
    pytest.param("lora", (1, 2, 1, 1, 2), {"sizes": "experts", "quantize": "nf4"}, marks=pytest.mark.slow),
]


def assert_same_curve(losses, method: str, options: dict) -> None:
    kept = {name: value for name, value in options.items() if name in ("sizes", "packed", "quantize", "dropout")}
    expected = run(method, **kept).losses
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert abs(expected[-1] / expected[0] - 1) > 1e-3  # it does train


@pytest.mark.parametrize(("method", "mesh", "options"), CASES)
def test_the_losses_are_those_of_one_device(method, mesh, options):
    assert_same_curve(run(method, mesh, **options).losses, method, options)


def test_experts_and_what_trains_them_lie_along_expert():
    """Weights, adapters and moments of one expert a device; ten steps leave what they leave on one device."""
    options = {"sizes": "experts", "dropout": 0.2}
    alone, spread = run("lora", **options), run("lora", (1, 1, 1, 1, 4), micro_batches=2, **options)
    shares = [name for name in (*spread.frozen, *spread.state.adapters) if ".mlp." in name and "router" not in name]
    assert len(shares) > 6
    leaves = jax.tree_util.tree_flatten_with_path((spread.frozen, spread.state.adapters, spread.state.optimizer))[0]
    held = [leaf for path, leaf in leaves if getattr(path[-1], "key", None) in shares]
    assert len(held) > len(shares)  # moments too
    assert {(leaf.shape[1], leaf.addressable_shards[0].data.shape[1]) for leaf in held} == {(4, 1)}
    for name, array in spread.state.adapters.items():
        np.testing.assert_allclose(array, alone.state.adapters[name], rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("expert", "sizes", "words"),
    [(2, "even", "mesh.expert=2 shards experts, and this model has none"), (4, "six_experts", "divide this model's 6")],
)
def test_an_expert_axis_that_does_not_fit_the_model(expert, sizes, words):
    with pytest.raises(InputError, match=words):
        placed("lora", (1, 1, 1, 1, expert), sizes)


def test_experts_are_shared_along_expert_and_tensor_as_far_as_they_divide():
    placement, specs = placed("lora", (1, 1, 2, 1, 2), "experts")
    assert placement.notes() == []
    assert tuple(specs["layers.mlp.gate_up_proj.kernel"])[:3] == (None, ("expert", "tensor"), "fsdp")
    assert tuple(specs["embed_tokens.embedding"]) == ("tensor", ("expert", "fsdp"))
    placement, specs = placed("lora", (1, 1, 2, 1, 2), "six_experts")
    assert [note.split(" doesn't")[0] for note in placement.notes()] == ["experts (6)"]
    assert tuple(specs["layers.mlp.gate_up_proj.kernel"])[:2] == (None, "expert")


def test_a_mesh_of_one_s_own_may_lack_axes():
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    state = nnx.state(Decoder(read_config(SIZES["even"], "config.json"), rngs=nnx.Rngs(0)))
    ours, theirs = (Placement.of(each, state) for each in (make_mesh(1, 2, 2), mesh))
    assert {name: place.spec for name, place in ours.table(state).items()} == {
        name: place.spec for name, place in theirs.table(state).items()
    }
    rows = JitRunner(lambda *arguments: arguments, mesh).place_batch({"input_ids": np.zeros((1, 4, 8), np.int32)})
    assert rows["input_ids"].addressable_shards[0].data.shape == (1, 2, 8)


def eight_devices(cases) -> None:
    """Runs the cases in a process with eight devices and compares with one device here."""
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"}
    command = [sys.executable, "-m", "tests.training.meshed", json.dumps(cases)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for losses, (method, _, options) in zip(json.loads(done.stdout), cases, strict=True):
        assert_same_curve(losses, method, options)


@pytest.mark.slow
def test_all_three_axes_at_once():
    eight_devices([("mora", (2, 2, 2), {"micro_batches": 2})])


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_mesh_of_eight_devices(method):
    meshes = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (2, 4, 1), (1, 2, 4)]
    cases = [(method, mesh, {"sizes": "odd", "micro_batches": 2}) for mesh in meshes]
    cases += [(method, mesh, {"sizes": "even", "packed": False}) for mesh in meshes]
    eight_devices(cases)


def gathers(compiled) -> list[tuple[str, int]]:
    """The all-gathers of a compiled program: the computation they are in, and the numbers that they give."""
    found, inside = [], ""
    for line in compiled.as_text().splitlines():
        if head := re.match(r"^(ENTRY )?%?([\w.-]+) .*\{$", line):
            inside = "entry" if head[1] else head[2]
        if op := re.search(r"= (.*?) all-gather(-start)?\(", line):
            shapes = re.findall(r"[a-z]+\d+\[([\d,]*)\]", op[1])
            found.append((inside, max(int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes)))
    return found


def base_bytes(frozen, device) -> int:
    return sum(
        shard.data.nbytes
        for name, array in frozen.items()
        for shard in array.addressable_shards
        if shard.device == device and name.endswith(("kernel", "embedding"))
    )


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(1, 4, 1), (1, 1, 4)])
def test_no_device_holds_the_base(mesh):
    alone, spread = run("lora", sizes="even"), run("lora", mesh, sizes="even")
    for device in jax.devices()[:4]:
        assert base_bytes(spread.frozen, device) * 4 == base_bytes(alone.frozen, jax.devices()[0])
    before, after = alone.compiled.memory_analysis(), spread.compiled.memory_analysis()
    # Arguments are the base, the state and the batch: a quarter of it but for vectors and what the mesh keeps whole.
    assert after.argument_size_in_bytes < 0.4 * before.argument_size_in_bytes
    assert after.temp_size_in_bytes < 0.6 * before.temp_size_in_bytes


def test_weights_are_gathered_inside_the_layer_that_uses_them():
    spread = run("lora", (1, 4, 1), sizes="even")
    layer = max(array.size // array.shape[0] for name, array in spread.frozen.items() if name.startswith("layers."))
    head = spread.frozen["embed_tokens.embedding"].size
    found = gathers(spread.compiled)
    assert len({inside for inside, _ in found if inside != "entry"}) == 2  # the loops forward and backward
    assert all(size <= layer for inside, size in found if inside != "entry")
    # Outside the loops: the head, once, for the loss; nothing else of its size (the rest is token ids).
    assert [size for inside, size in found if inside == "entry" and size > 512] == [head]


@pytest.mark.parametrize("method", ["lora", "sharing"])
def test_along_tensor_nothing_is_gathered(method):
    spread = run(method, (1, 1, 4), sizes="even")
    assert gathers(spread.compiled) == []
    text = spread.compiled.as_text()
    assert not re.search(r" (all-to-all|collective-permute|reduce-scatter)(-start)?\(", text)
    assert "f32[1,256,24]" in text and "f32[1,256,96]" not in text  # a chunk of logits, a quarter on each device


@pytest.mark.slow
@pytest.mark.parametrize("held", FORMATS)
def test_every_mesh_of_eight_devices_with_a_quantised_base(held):
    meshes = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (1, 2, 4)]
    options = {"sizes": "blocks", "quantize": held}
    eight_devices([("lora", mesh, options) for mesh in meshes] + [("mora", (1, 4, 2), options)])


@pytest.mark.slow
def test_a_quantised_base_is_gathered_as_it_is():
    spread = run("lora", (1, 4, 1), sizes="blocks", quantize="nf4")
    arrays = [array.size // array.shape[0] for name, array in spread.frozen.items() if name.endswith("kernel.scales")]
    adapters = [array.size // array.shape[0] for array in spread.state.adapters.values()]
    text, dense = spread.compiled.as_text(), 256 * 2 * 512
    gathered = re.findall(r"= (?:\(.*, )?([a-z]+\d+)\[([\d,]*)\]\S* all-gather(?:-start)?\(.*while/body", text)
    sizes = {(kind, int(np.prod([int(n) for n in shape.split(",")]))) for kind, shape in gathered}
    assert ("u8", dense // 2) in sizes
    assert all(size <= max(*arrays, *adapters) for kind, size in sizes if kind != "u8")


@pytest.mark.slow
def test_along_tensor_nothing_of_a_quantised_base_is_gathered():
    assert gathers(run("lora", (1, 1, 4), sizes="blocks", quantize="nf4").compiled) == []


def test_optimizer_states_lie_like_their_parameters():
    state = run("full", (1, 2, 2), packed=False, sizes="even").state
    checked = 0
    for path, leaf in jax.tree_util.tree_flatten_with_path(state.optimizer)[0]:
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        if names:
            assert leaf.sharding == state.adapters[names[-1]].sharding, names
            checked += leaf.sharding.spec != P()
    assert checked >= 2 * 5
