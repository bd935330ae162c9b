"""The logical axes of what is trained: by them a mesh shards it, so each must name an axis of its size."""

import pytest
from flax import nnx

import mora_jax as mj
from mora_jax.adapters.projection import Part, Projection
from tests.adapters.test_conformance import CASES

SIZES = {"layers": 3, "embed": 7, "mlp": 5}


@pytest.mark.parametrize("case", CASES)
def test_an_axis_with_the_name_of_the_base_s_has_its_size(case):
    options = {"axes": ("embed", "mlp"), "out_shape": (SIZES["mlp"],), "path": "layers.{layer}.mlp.{name}"}
    model = Projection(
        (Part("up_proj", SIZES["mlp"]),), SIZES["embed"], num_layers=SIZES["layers"], rngs=nnx.Rngs(0), **options
    )
    mj.attach(model, CASES[case], rngs=nnx.Rngs(1))
    found = nnx.to_flat_state(nnx.state(model, mj.AdapterParam))
    assert found
    for path, variable in found:
        named = [(name, size) for name, size in zip(variable.axes, variable.shape, strict=True) if name in SIZES]
        assert named[0] == ("layers", 3), path
        assert all(SIZES[name] == size for name, size in named), path
