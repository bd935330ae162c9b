"""Messages of libtpu: the newer as 0.0.52 prints it, the older as in reports of older versions."""

import pytest

from mora_jax.planning.topology import read_topology
from mora_jax.planning.tpu_compile import read_shortage

NEW = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
    "temporaries (18.15G) exceeds available HBM (15.75G). HLO module: jit_step."
)
OLD = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 33.50G of 31.25G hbm. Exceeded by 2.25G."


@pytest.mark.parametrize("message, total, slice_", [(NEW, 18.15, "v5e-1"), (OLD, 33.5, "v6e-1")])
def test_both_numbers_are_read(message, total, slice_):
    found = read_shortage(message)
    assert found["total"] == total * 2**30
    # What the compiler lets a program have is what the table of chips says, to 2 %.
    assert found["limit"] == pytest.approx(read_topology(slice_).usable_bytes, rel=0.02)


def test_other_words_are_kept():
    assert read_shortage("RESOURCE_EXHAUSTED: something else\nmore") == {
        "message": "RESOURCE_EXHAUSTED: something else"
    }
