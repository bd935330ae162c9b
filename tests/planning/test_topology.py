"""Names of slices and hosts."""

import pytest

from mora_jax.errors import InputError
from mora_jax.planning.topology import _LINKS, larger, names, read_topology


@pytest.mark.parametrize(
    "name, chips, tpu",
    [
        ("v5e-8", 8, "v5e:2x4"),
        ("v5litepod-8", 8, "v5e:2x4"),
        ("v5p-64", 32, "v5p:2x4x4"),
        ("V6E-16", 16, "v6e:4x4"),
        ("v4-8", 4, "v4:2x2x1"),
        ("h100x8", 8, None),
        ("h100", 1, None),
        ("h100-pciex2", 2, None),
        ("a100-40gbx4", 4, None),
        ("h100x32", 32, None),
    ],
)
def test_names(name, chips, tpu):
    found = read_topology(name)
    assert (found.chips, found.tpu) == (chips, tpu)
    assert 0.9 * found.chip.memory_bytes < found.usable_bytes < found.chip.memory_bytes


@pytest.mark.parametrize(
    "name, words",
    [
        ("v5p-7", "did you mean v5p-8"),
        ("v5e-9", "did you mean v5e-8"),
        ("h100x24", "there are 1, 2, 4, 8, 16, 32, 64, 128, 256 of h100, eight a host"),
        ("l4x16", "there are 1, 2, 4, 8 of l4"),
        ("h10x8", "did you mean h100x8"),
        ("abacus", "unknown; give a TPU slice"),
        ("", "unknown"),
    ],
)
def test_unknown_names_are_refused_in_one_line(name, words):
    with pytest.raises(InputError, match=words) as caught:
        read_topology(name)
    assert "\n" not in str(caught.value)


def test_every_name_can_be_read_and_has_as_many_chips_as_its_shape():
    for name in names():
        found = read_topology(name)
        assert found.chip.name in _LINKS
        if found.tpu:
            sizes = [int(size) for size in found.tpu.partition(":")[2].split("x")]
            product = 1
            for size in sizes:
                product *= size
            assert product == found.chips


def test_larger_slices():
    assert [other.name for other in larger(read_topology("v5e-64"))] == ["v5e-128", "v5e-256"]
    assert [other.name for other in larger(read_topology("l4x2"))] == ["l4x4", "l4x8"]
    assert [other.name for other in larger(read_topology("h100x4"))][:3] == ["h100x8", "h100x16", "h100x32"]


def test_several_hosts_are_linked_by_their_network_cards():
    one, several = read_topology("a100x8"), read_topology("a100x16")
    assert several.link_bandwidth == 8 * 25e9 < one.link_bandwidth
