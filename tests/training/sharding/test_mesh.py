"""The mesh's sizes: what fits, what is left over, and what is refused."""

import pytest

from mora_jax.errors import InputError
from mora_jax.training.config.load import check_together
from mora_jax.training.config.schema import Config, MeshConfig, lay_over
from mora_jax.training.sharding.mesh import make_mesh, mesh_shape


@pytest.mark.parametrize(
    ("sizes", "rows", "expected"),
    [
        ({}, 16, (8, 1, 1, 1, 1)),
        ({}, 6, (6, 1, 1, 1, 1)),  # nobody asked for a number: the most that share the rows evenly
        ({"data": 2}, 6, (2, 1, 1, 1, 1)),
        ({"fsdp": 4}, 8, (2, 4, 1, 1, 1)),
        ({"fsdp": 4}, 4, (1, 4, 1, 1, 1)),
        ({"fsdp": -1}, 8, (1, 8, 1, 1, 1)),
        ({"data": 2, "fsdp": -1}, 8, (2, 4, 1, 1, 1)),
        ({"tensor": -1}, 3, (1, 1, 8, 1, 1)),
        ({"fsdp": 2, "tensor": 2}, 8, (2, 2, 2, 1, 1)),
        ({"fsdp": 2, "tensor": -1}, 4, (1, 2, 4, 1, 1)),
        ({"data": 1, "fsdp": 3}, 3, (1, 3, 1, 1, 1)),
        ({"context": 4}, 2, (2, 1, 1, 4, 1)),
        ({"fsdp": 2, "context": -1}, 2, (1, 2, 1, 4, 1)),
        ({"expert": 4}, 8, (2, 1, 1, 1, 4)),
        ({"tensor": 2, "expert": -1}, 8, (1, 1, 2, 1, 4)),
    ],
)
def test_sizes(sizes, rows, expected):
    assert mesh_shape(MeshConfig(**sizes), rows, available=8) == expected


@pytest.mark.parametrize(
    ("sizes", "rows", "words"),
    [
        ({"data": 9}, 9, "mesh.data=9, mesh.fsdp=1, mesh.tensor=1 asks for 9 devices, but there are 8"),
        ({"data": 2, "fsdp": 2, "tensor": 4}, 4, "mesh.tensor=4 asks for 16 devices, but there are 8"),
        ({"fsdp": 3}, 3, "mesh.fsdp=3, mesh.tensor=1: 8 devices can't be laid out in rows of 3"),
        ({"data": 3, "tensor": -1}, 3, "8 devices can't be laid out in rows of 3"),
        ({"fsdp": -1, "tensor": -1}, 8, "only one axis can take the rest of the 8 devices"),
        ({"data": 4}, 6, "4 devices can't share 6 rows of a micro-batch evenly"),
        ({"fsdp": 4}, 6, "devices can't share 6 rows"),
        ({"fsdp": -1}, 4, "8 devices can't share 4 rows"),
        (
            {"expert": 8},
            4,
            r"mesh.expert=8: 8 devices can't share 4 rows of .* evenly \(data × fsdp × expert",
        ),
    ],
)
def test_refused_with_the_sizes(sizes, rows, words):
    with pytest.raises(InputError, match=words):
        mesh_shape(MeshConfig(**sizes), rows, available=8)


def test_pmap_shares_rows_only():
    given = {"model.path": "m", "data.train": ("d",), "out": "o", "mesh.pmap": True, "mesh.fsdp": 2}
    config = lay_over(Config(), [(name, value, "test") for name, value in given.items()])
    with pytest.raises(InputError, match=r"mesh.pmap shares rows only; set mesh.fsdp \(now 2\) to 1"):
        check_together(config)


def test_devices_of_this_run():
    mesh = make_mesh(*mesh_shape(MeshConfig(fsdp=2, tensor=2), 2))
    assert dict(mesh.shape) == {"data": 1, "fsdp": 2, "tensor": 2, "context": 1, "expert": 1}
    assert [device.id for device in mesh.devices.flat] == [0, 1, 2, 3]
