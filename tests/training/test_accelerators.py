"""The table of accelerators, against what jax itself knows of TPUs."""

import pytest

from mora_jax.training.observe.flops import ACCELERATORS, by_device_kind


def test_kinds_are_distinct_and_unknown_ones_have_no_figures():
    kinds = [kind for entry in ACCELERATORS.values() for kind in entry.kinds]
    assert len(kinds) == len(set(kinds))
    assert by_device_kind("cpu") is None and by_device_kind("TPU v9") is None
    assert by_device_kind("NVIDIA H100 80GB HBM3") is ACCELERATORS["h100"]


@pytest.mark.parametrize("name", ["v4", "v5e", "v5p", "v6e"])
def test_tpu_figures_are_those_of_jax(name):
    # Private to jax, and only compared with: a version that keeps it elsewhere skips this.
    info = pytest.importorskip("jax._src.pallas.mosaic.tpu_info")
    if not hasattr(info, "_get_tpu_info_impl"):
        pytest.skip("this jax keeps its table elsewhere")
    entry = ACCELERATORS[name]
    for kind in entry.kinds:
        version = info.chip_version_from_device_kind(kind)
        cores = version.num_physical_tensor_cores_per_chip
        core = info._get_tpu_info_impl(version, cores)
        assert entry.bf16_flops == pytest.approx(core.bf16_ops_per_second * cores, rel=0.01)
        assert entry.memory_bytes == pytest.approx(core.hbm_capacity_bytes * cores, rel=0.08)
        assert entry.memory_bandwidth == pytest.approx(core.mem_bw_bytes_per_second * cores, rel=0.15)  # v5p differs
