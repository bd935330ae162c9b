"""The default dtype follows the processor."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

import mora_jax as mj
from mora_jax import backend


def test_flags_of_the_processor(tmp_path):
    file = tmp_path / "cpuinfo"
    file.write_text("processor : 0\nflags\t\t: fpu avx512_bf16 sse\nprocessor : 1\nflags\t\t: fpu\n")
    assert backend.cpu_flags(file) == {"fpu", "avx512_bf16", "sse"}
    file.write_text("nothing\n")
    assert backend.cpu_flags(file) == set()
    assert backend.cpu_flags(tmp_path / "absent") == set()


@pytest.mark.parametrize(
    "platform, vendor, flags, expected",
    [
        ("cpu", "AuthenticAMD", {"avx512_bf16"}, "bfloat16"),
        ("cpu", "GenuineIntel", {"avx512_bf16"}, "float32"),
        ("cpu", "GenuineIntel", {"amx_bf16", "avx512_bf16"}, "bfloat16"),
        ("cpu", "", {"fpu", "avx512f"}, "float32"),
        ("gpu", "", set(), "bfloat16"),
        ("tpu", "", set(), "bfloat16"),
    ],
)
def test_default(monkeypatch, platform, vendor, flags, expected):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr(backend, "cpu_flags", lambda: flags)
    monkeypatch.setattr(backend.jax, "__version_info__", (0, 8, 0))
    monkeypatch.setattr(backend, "processor", lambda field: {"vendor_id": vendor}[field])
    assert backend.read_dtype(None) == jnp.dtype(expected)


def test_names():
    assert backend.read_dtype("float32") == jnp.float32
    assert backend.read_dtype(jnp.bfloat16) == jnp.bfloat16
    for bad in ("float16", "int8", "fast"):
        with pytest.raises(mj.InputError, match=f"dtype '{bad}' is not supported; give one of float32, bfloat16"):
            backend.read_dtype(bad)


@pytest.mark.parametrize(("capability", "expected"), [("7.5", "float32"), ("8.0", "bfloat16"), ("gfx942", "bfloat16")])
def test_a_gpu_without_products_of_bfloat16_computes_in_float32(monkeypatch, capability, expected):
    monkeypatch.setattr(backend, "backend", lambda: "gpu")
    monkeypatch.setattr(backend.jax, "local_devices", lambda: [SimpleNamespace(compute_capability=capability)])
    assert backend.default_dtype() == expected


def test_jax_0_7_computes_in_float32_on_cpus(monkeypatch):
    monkeypatch.setattr(backend, "cpu_flags", lambda: {"amx_bf16"})
    monkeypatch.setattr(backend.jax, "__version_info__", (0, 7, 2))
    assert backend.default_dtype() == "float32"
