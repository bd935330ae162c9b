"""Kernels of several matrices as TPUs store them, the way products take them: same weights, none moved in a step."""

import math
from functools import partial

import jax
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

import mora_jax as mj
from mora_jax.adapters.sites import sites
from mora_jax.backend import compiling_for
from mora_jax.interop.save import tensors_of
from mora_jax.models.families import read_config
from mora_jax.planning.abstract_step import abstract_model, assemble_abstract
from mora_jax.training.config.schema import Config, lay_over
from mora_jax.training.sharding.mesh import make_mesh
from mora_jax.training.sharding.rules import base_shardings, placed
from tests.models.tiny import hf_folder, random_ids
from tests.training.meshed import SIZES

LAYERS = SIZES["even"]["num_hidden_layers"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return hf_folder(tmp_path_factory.mktemp("model"))


def loaded(folder, target, **settings):
    with compiling_for(target):
        return mj.load_pretrained(folder, dtype="float32", **settings)[0]


def axes_of(model):
    layers = model.layers
    return [projection.kernel.ndim for projection in (layers.self_attn.qkv_proj, layers.mlp.gate_up_proj)]


def kernels(model):
    return {path: np.asarray(place.kernel()) for place in sites(model) for path in place.paths[:1]}


@pytest.mark.slow
@pytest.mark.parametrize(("quantize", "fsdp"), [("none", 4), ("int8", 1), ("int8", 4)])
def test_the_same_weights_are_read(folder, quantize, fsdp):
    """The int8 scales of one block of inputs are shared along outputs."""
    shardings = partial(base_shardings, make_mesh(1, fsdp, 1)) if fsdp > 1 else None
    model = loaded(folder, "tpu", quantize=quantize, shardings=shardings)
    plain = loaded(folder, "cpu", quantize=quantize)
    assert axes_of(model) == [3, 3] and axes_of(plain) == [5, 4]
    jax.tree.map(np.testing.assert_array_equal, kernels(model), kernels(plain))


def test_a_changed_model_computes_and_is_written_as_ever(folder):
    models = loaded(folder, "tpu"), loaded(folder, "cpu")
    ids, hidden = random_ids(1, 7), []
    for model in models:
        for place in list(sites(model))[1:5]:
            place.put_kernel(place.kernel() * 1.5)
        hidden.append(np.asarray(nnx.jit(lambda model, ids: model(ids))(model, ids)))
    np.testing.assert_allclose(*hidden, rtol=1e-5, atol=1e-5)
    assert axes_of(models[0]) == [3, 3]
    jax.tree.map(np.testing.assert_array_equal, *(dict(tensors_of(model)) for model in models))


def test_a_mesh_that_shards_outputs_has_their_axes(folder):
    model = loaded(folder, "tpu")
    with compiling_for("tpu"):
        placed(make_mesh(1, 2, 2), model)
        assert axes_of(model) == [5, 4]
        jax.tree.map(np.testing.assert_array_equal, kernels(model), kernels(loaded(folder, "cpu")))
        placed(make_mesh(1, 4, 1), model)
        assert axes_of(model) == [3, 3]


def test_what_is_trained_has_one_form_on_all_backends(folder):
    model = loaded(folder, "tpu")
    mj.attach(model, mj.FullConfig(), rngs=nnx.Rngs(0))
    assert axes_of(model) == [5, 4]


def stacks_made(jaxpr, sizes):
    """Operations that give an array as large as a stack of kernels, on their own and not by what they call."""
    found = []
    for equation in jaxpr.eqns:
        inner = list(jaxprs_in_params(equation.params))
        for one in inner:
            found += stacks_made(one, sizes)
        if not inner:
            shapes = [getattr(v.aval, "shape", ()) for v in equation.outvars]
            found += [equation for shape in shapes if shape[:1] == (LAYERS,) and math.prod(shape) in sizes]
    return found


@pytest.mark.parametrize(
    ("quantize", "fsdp", "method"),
    [("none", 1, "lora"), ("none", 4, "mora"), ("int8", 1, "mora"), ("nf4", 4, "lora"), ("none", 1, "relora")],
)
def test_a_step_moves_no_stack_of_kernels(quantize, fsdp, method):
    """With several micro-batches: what is made of a stack before the loop over them lives as long as that. Of methods
    that change the base checkpoints hold kernels, in one form on all backends."""
    settings = {"model.quantize": quantize, "model.dtype": "bfloat16", "model.remat": "full", "mesh.fsdp": fsdp}
    settings |= {"train.batch_size": 8, "train.micro_batch_size": 4, "data.max_length": 24, "adapter.method": method}
    config = lay_over(Config(), [(name, value, "test") for name, value in settings.items()])
    with compiling_for("tpu"):
        model = abstract_model(read_config(SIZES["even"], "config.json"), config)
        fused = [model.layers.self_attn.qkv_proj, model.layers.mlp.gate_up_proj]
        numbers = [LAYERS * projection.in_features * projection.layout.features for projection in fused]
        made, arguments = assemble_abstract(model, config, (1, fsdp, 1, 1))
        jaxpr = made.runner.trace(*arguments).jaxpr.jaxpr
    sizes = {size // part for size in numbers for part in (1, 2)}  # codes of nf4 are half as many
    assert bool(stacks_made(jaxpr, sizes)) == (method == "relora")
