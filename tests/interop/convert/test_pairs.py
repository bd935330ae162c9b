"""Every method into LoRA and into MoRA: the stated error is that of the dense change, and a rank's is the least."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

import mora_jax as mj
from mora_jax.adapters.methods.mora import KINDS
from mora_jax.adapters.methods.registry import METHODS
from mora_jax.adapters.sites import sites
from mora_jax.interop.convert import convert_to_lora, convert_to_mora

SETTINGS = {"rank": 2, "block_size": 4, "target_rank": 1, "targets": ("inner", "out")}
OTHERS = {
    "dora on mora": mj.MoRAConfig(rank=2, use_dora=True),
    "miss of form mini": mj.MiSSConfig(rank=6, form="mini", mini_rank=2),
    "ranks beyond the layer": mj.RsLoRAConfig(rank=30),
    "ranks by layer": mj.LoRAConfig(rank=2, rank_pattern={"out": 5}),
} | {f"mora {kind}": mj.MoRAConfig(rank=2, kind=kind) for kind in KINDS}

FULL_RANK = ("dora", "dora on mora", "ia3", "hira", "oft", "randlora", "mora rotation", "mora decouple")


class Pair(nnx.Module):
    """Two layers, wide and narrow, of which one is no multiple of most blocks."""

    def __init__(self):
        self.inner = nnx.Linear(12, 20, use_bias=False, rngs=nnx.Rngs(0))
        self.out = nnx.Linear(20, 8, use_bias=False, rngs=nnx.Rngs(1))


def configs():
    """One configuration of each method that changes kernels, by name."""
    by_name = dict(OTHERS)
    for name, method in METHODS.items():
        if method.adapter is not None and not method.config.biases_alone:
            fields = {field.name for field in dataclasses.fields(method.config)}
            by_name[name] = method.config(**{key: value for key, value in SETTINGS.items() if key in fields})
    return by_name


CONFIGS = configs()


def kernels(model) -> dict[str, np.ndarray]:
    return {path: np.asarray(site.kernel(), np.float64) for site in sites(model) for path in site.paths}


def change(model) -> dict[str, np.ndarray]:
    """What the adapters of a model do to its kernels, dense."""
    merged, base = nnx.clone(model), kernels(Pair())
    mj.merge(merged)
    return {path: kernel - base[path] for path, kernel in kernels(merged).items()}


def norm(by_path: dict[str, np.ndarray]) -> float:
    return float(np.sqrt(sum((array**2).sum() for array in by_path.values())))


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_every_pair(name):
    with jax.default_matmul_precision("highest"):
        model = Pair()
        mj.attach(model, CONFIGS[name], rngs=nnx.Rngs(0))
        for _, node in nnx.iter_graph(model):
            if isinstance(node, mj.AdapterParam):
                noise = np.random.default_rng(node.size).standard_normal(node.shape)
                node.set_value(node[...] + 0.1 * noise.astype(np.float32))
        whole = change(model)
        assert norm(whole) > 0.01
        outcomes = {}
        for to, kind, rank in (("lora", "", None), ("lora", "", 3), *(("mora", kind, 2) for kind in KINDS)):
            converted = nnx.clone(model)
            if to == "lora" and rank is None and name in FULL_RANK:
                with pytest.raises(mj.InputError, match="have full rank"):
                    convert_to_lora(converted)
                continue
            options = {"rank": rank} if to == "lora" else {"kind": kind, "rank": rank}
            conversion = (convert_to_lora if to == "lora" else convert_to_mora)(converted, **options)
            after = change(converted)
            error = norm({path: after[path] - kernel for path, kernel in whole.items()}) / norm(whole)
            assert conversion.error == pytest.approx(error, abs=2e-5), (to, kind, rank)
            outcomes[to, kind, rank] = error
        assert outcomes.get(("lora", "", None), 0.0) < 1e-5
        rest = sum((np.linalg.svd(kernel, compute_uv=False)[3:] ** 2).sum() for kernel in whole.values())
        assert outcomes["lora", "", 3] == pytest.approx(np.sqrt(rest) / norm(whole), abs=2e-5)
        own = getattr(CONFIGS[name], "kind", None)
        if own is not None and not getattr(CONFIGS[name], "use_dora", False) and CONFIGS[name].rank == 2:
            assert outcomes["mora", own, 2] < 1e-5, "its own kind comes out as it was"
