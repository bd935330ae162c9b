"""The machine that code is traced for, the dtype to compute in there, and what XLA needs to be told on CPUs."""

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from mora_jax.errors import InputError

NAMES = ("float32", "bfloat16")
CPUINFO = Path("/proc/cpuinfo")


def default_dtype() -> jnp.dtype:
    """bfloat16 where its matrix products are fast, else float32."""
    return jnp.dtype("bfloat16" if multiplies_bfloat16() else "float32")


def multiplies_bfloat16() -> bool:
    """Whether matrix products of bfloat16 are fast: on TPUs, on GPUs since Ampere, and on CPUs with units for them.

    Those are AMX, and AVX512-BF16 on AMD's. Intel's do no more products with that alone than with float32, and what XLA
    calls there was measured at 1.6 times float32's time. jax 0.7 has CPUs where it lacks such a product.
    """
    if backend() != "cpu":
        capabilities = {getattr(device, "compute_capability", "") for device in jax.local_devices()}
        return not capabilities & {"6.0", "6.1", "7.0", "7.2", "7.5"}  # a T4 has 7.5
    if jax.__version_info__ < (0, 8):
        return False
    flags = cpu_flags()
    return "amx_bf16" in flags or ("avx512_bf16" in flags and processor("vendor_id") != "GenuineIntel")


def read_dtype(dtype: Any) -> jnp.dtype:
    """The compute dtype that `dtype` names, None for the default; InputError for anything but `NAMES`."""
    if dtype is None:
        return default_dtype()
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in NAMES:
        raise InputError(f"dtype {name!r} is not supported; give one of {', '.join(NAMES)}")
    return jnp.dtype(name)


def cpu_flags(cpuinfo: Path = CPUINFO) -> set[str]:
    """The instruction sets of the first processor; empty where the system does not say."""
    return set(processor("flags", cpuinfo).split())


def processor(field: str, cpuinfo: Path = CPUINFO) -> str:
    """What the system says of the first processor, such as its `vendor_id`; empty where it doesn't."""
    lines = _own_lines() if cpuinfo == CPUINFO else _lines(cpuinfo)
    return next((line.partition(":")[2].strip() for line in lines if line.split(":")[0].strip() == field), "")


@functools.cache
def _own_lines() -> list[str]:
    """Those of this machine, read once: every product of a model asks for them."""
    return _lines(CPUINFO)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


_TARGET: ContextVar[str | None] = ContextVar("target", default=None)


def backend() -> str:
    """`cpu`, `gpu` or `tpu`: where what is traced now will run."""
    return _TARGET.get() or jax.default_backend()


def false_after(array: jax.Array) -> jax.Array:
    """A bool `[]` that is false, which no compiler knows before it has the float `array`.

    What is chosen by it is computed after the array. XLA on CPUs drops barriers before it fuses operations, looks for
    common ones and decides what to copy, so that a barrier can't say that.
    """
    first = array[(0,) * array.ndim]
    size = array.dtype.itemsize
    pattern = {2: 0x7FA5, 4: 0x7FA50000, 8: 0x7FF4A50000000000}[size]  # a NaN that no arithmetic gives
    return jax.lax.bitcast_convert_type(first, f"uint{8 * size}") == jnp.array(pattern, f"uint{8 * size}")


def product_over_tokens(x: jax.Array, y: jax.Array) -> jax.Array:
    """`x [..., N, in].T @ y [..., N, out]`, batched: `[..., in, out]` in float32, or float64 where the operands are."""
    axis = x.ndim - 2
    batch = (tuple(range(axis)),) * 2
    wide = jnp.promote_types(x.dtype, jnp.float32)
    if not _widened_if_transposed(x.dtype):
        return jax.lax.dot_general(x, y, (((axis,), (axis,)), batch), preferred_element_type=wide)
    turned = untransposed(jnp.swapaxes(x, -1, -2))
    product = jax.lax.dot_general(turned, y, (((axis + 1,), (axis,)), batch), preferred_element_type=wide)
    return jax.lax.optimization_barrier(product)  # a transposed product would be one that XLA can't do


def untransposed(x: jax.Array) -> jax.Array:
    """`x` as a product should get it that is transposed.

    XLA on CPUs widens bfloat16 operands that are transposed, and a product takes twice as long then. Between barriers,
    and with another axis in between, it sees a copy that isn't.
    """
    if not _widened_if_transposed(x.dtype):
        return x
    return jax.lax.optimization_barrier(jax.lax.optimization_barrier(x).reshape(1, *x.shape)).reshape(x.shape)


def _widened_if_transposed(dtype: Any) -> bool:
    return dtype == jnp.bfloat16 and backend() == "cpu" and multiplies_bfloat16()


_INTERPRETED: ContextVar[bool] = ContextVar("interpreted", default=False)


def interpreted() -> bool:
    """Whether kernels for a TPU are interpreted here (see `interpreting`)."""
    return _INTERPRETED.get()


@contextlib.contextmanager
def interpreting() -> Iterator[None]:
    """Kernels for a TPU that are traced inside are interpreted: slowly, and on any machine."""
    token = _INTERPRETED.set(True)
    try:
        yield
    finally:
        _INTERPRETED.reset(token)


def alone() -> bool:
    """Whether what is traced now, without a word about a mesh, runs on one device or is one device's share."""
    if _TARGET.get() is not None or jax.device_count() == 1:
        return True
    mesh = jax.sharding.get_abstract_mesh()
    return bool(mesh.axis_names) and set(mesh.manual_axes) == set(mesh.axis_names)


@contextlib.contextmanager
def compiling_for(name: str) -> Iterator[None]:
    """What is traced inside is meant for the backend `name`, which this machine may not have."""
    token = _TARGET.set(name)
    try:
        yield
    finally:
        _TARGET.reset(token)
