"""What each method means, as dense matrices written by loops in float64: the oracle of the conformance test.

`FORMULAS[method](base, bias, params, config, fixed)` gives the kernel `[in, out]` and the addition to the bias `[out]`.
`fixed` are the parameters at which constants of the gradient (DoRA's norm) are taken. `COUNTS[method](in, out, config)`
is the number of trained parameters.
"""

import math

import numpy as np

from tests.adapters import oracle


def product(a: np.ndarray, b: np.ndarray, scale: float) -> np.ndarray:
    """`scale · A B`, element by element."""
    result = np.zeros((a.shape[0], b.shape[1]))
    for i in range(a.shape[0]):
        for o in range(b.shape[1]):
            for r in range(a.shape[1]):
                result[i, o] += scale * a[i, r] * b[r, o]
    return result


def with_magnitude(base, delta, fixed_delta, params):
    """DoRA's columns: direction of base + delta, length of the magnitude, the norm held at `fixed_delta`."""
    if "magnitude" not in params:
        return base + delta
    result = np.zeros_like(base)
    for o in range(base.shape[1]):
        norm = math.sqrt(sum((base[i, o] + fixed_delta[i, o]) ** 2 for i in range(base.shape[0])))
        for i in range(base.shape[0]):
            result[i, o] = params["magnitude"][o] * (base[i, o] + delta[i, o]) / norm
    return result


def lora_like(scale):
    def formula(base, bias, params, config, fixed):
        delta, held = (product(p["lora_a"], p["lora_b"], scale(config)) for p in (params, fixed))
        if "initial_a" in params:
            first = product(params["initial_a"], params["initial_b"], scale(config))
            delta, held = delta - first, held - first
        return with_magnitude(base, delta, held, params), params.get("bias", 0.0)

    return formula


def mora(base, bias, params, config, fixed):
    delta, held = (oracle.dense(p["m"], *base.shape, config.kind).T for p in (params, fixed))
    return with_magnitude(base, delta, held, params), params.get("bias", 0.0)


def bitfit(base, bias, params, config, fixed):
    return base, params["bias"]


def ia3(base, bias, params, config, fixed):
    result = np.zeros_like(base)
    for i in range(base.shape[0]):
        for o in range(base.shape[1]):
            result[i, o] = base[i, o] * params["ia3_l"][i if config.feedforward else o]
    return result, 0.0 if config.feedforward else (params["ia3_l"] - 1.0) * bias


def vera(base, bias, params, config, fixed):
    delta = product(params["vera_a"] * params["vera_d"], params["vera_b"], 1.0)
    return base + delta * params["vera_b_scale"], 0.0


def adalora(base, bias, params, config, fixed):
    return base + product(params["lora_a"] * params["lora_e"], params["lora_b"], config.alpha / config.rank), 0.0


def hira(base, bias, params, config, fixed):
    factor, result = product(params["hira_a"], params["hira_b"], 1.0), np.zeros_like(base)
    for i in range(base.shape[0]):
        for o in range(base.shape[1]):
            result[i, o] = base[i, o] + base[i, o] * factor[i, o]
    return result, 0.0


def miss(base, bias, params, config, fixed):
    block, result = params["miss_block"], base.copy()
    for i in range(base.shape[0]):
        for o in range(base.shape[1]):
            result[i, o] += block[i % config.rank, o % config.mini_rank if config.form == "mini" else o]
    return result, params.get("bias", 0.0)


def randlora(base, bias, params, config, fixed):
    """`s · Σ_q B[:, q] A[q]`: columns of the B's base by base, rows of the scaled A rank by rank, as in PEFT."""
    a, b, left, right = (params[f"randlora_{name}"] for name in ("a", "b", "lambda", "gamma"))
    rank, count = left.shape
    on_inputs = base.shape[0] <= base.shape[1]  # which side A lies on
    result = base.copy()
    for q in range(rank * count):
        (basis, inner), (other, number) = divmod(q, rank), divmod(q, count)
        for i in range(base.shape[0]):
            for o in range(base.shape[1]):
                small, large = (i, o) if on_inputs else (o, i)
                scaled = left[other, number] * a[other, small] * right[number, small]
                result[i, o] += config.alpha / config.rank * b[large, basis, inner] * scaled
    return result, params.get("bias", 0.0)


def randlora_count(i, o, config):
    smaller = min(i, o)
    return -(-smaller // config.rank) * (config.rank + smaller)


def oft_blocks(i, config):
    """How many blocks, and their size, of sizes that divide."""
    size = i // config.blocks if config.blocks else min(config.block_size, i)
    return i // size, size


def oft(base, bias, params, config, fixed):
    count, size = oft_blocks(len(base), config)
    rotation = np.zeros((len(base), len(base)))
    for block in range(count):
        values = iter(params["oft_r"][0 if config.block_share else block])
        skew = np.zeros((size, size))
        for i in range(size):
            for j in range(i + 1, size):
                skew[i, j] = next(values)
                skew[j, i] = -skew[i, j]
        one = np.eye(size)
        if config.use_cayley_neumann:
            power, terms = np.eye(size), config.num_cayley_neumann_terms
            factors = [2.0] if terms == 2 else [2.0, 2.0, 1.0] if terms == 3 else [2.0] * (terms - 2) + [1.0]
            for factor in factors:
                power = power @ skew
                one = one + factor * power
        else:
            one = (one - skew) @ np.linalg.inv(one + skew)
        rotation[block * size : (block + 1) * size, block * size : (block + 1) * size] = one
    return product(rotation, base, 1.0), params.get("bias", 0.0)


def lora_count(i, o, config):
    return config.rank * (i + o) + (o if config.use_dora else 0)


def mora_count(i, o, config):
    q = int(math.sqrt((i + o) * config.rank) + 0.5)
    return (q - q % 2 if config.kind == "rotation" else q) ** 2 + (o if config.use_dora else 0)


over_rank = lora_like(lambda config: config.alpha / config.rank)
FORMULAS = {
    "lora": over_rank,
    "rslora": lora_like(lambda config: config.alpha / math.sqrt(config.rank)),
    "dora": over_rank,
    "pissa": over_rank,
    "olora": over_rank,
    "lora_plus": over_rank,
    "lora_fa": over_rank,
    "relora": over_rank,
    "mora": mora,
    "remora": mora,  # in its first turn
    "vera": vera,
    "adalora": adalora,
    "miss": miss,
    "randlora": randlora,
    "ia3": ia3,
    "hira": hira,
    "oft": oft,
    "bitfit": bitfit,
}
COUNTS = {
    "lora": lora_count,
    "rslora": lora_count,
    "dora": lora_count,
    "pissa": lora_count,
    "olora": lora_count,
    "lora_plus": lora_count,
    "relora": lora_count,
    "lora_fa": lambda i, o, config: config.rank * o + (o if config.use_dora else 0),
    "mora": mora_count,
    "remora": mora_count,
    "vera": lambda i, o, config: config.rank + o,
    "adalora": lambda i, o, config: config.rank * (i + o + 1),
    "hira": lambda i, o, config: config.rank * (i + o),
    "randlora": randlora_count,
    "miss": lambda i, o, config: config.rank * (config.mini_rank if config.form == "mini" else o),
    "oft": lambda i, o, config: oft_blocks(i, config)[0] * math.comb(oft_blocks(i, config)[1], 2),
    "ia3": lambda i, o, config: i if config.feedforward else o,
    "bitfit": lambda i, o, config: o,
}
