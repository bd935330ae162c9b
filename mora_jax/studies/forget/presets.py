"""The arms and sizes of the study `forget`."""

from __future__ import annotations

from typing import Any

from mora_jax.studies.study import Arm, Preset

#: Arms whose names have this in them are controls: an arm with something that is said to keep what was known.
CONTROL = ", "
FULL = "full"


def _arms(
    low: int, high: int, *, full: float, lora: float, mora: float, spread: tuple[float, float] = (3.0, 3.0)
) -> tuple[Arm, ...]:
    """The arms, each with three learning rates or more.

    Args:
        low, high: ranks.
        full: a rate of full fine-tuning that others lie around.
        lora, mora: such of LoRA at the low rank, and of MoRA by rotation; a high rank takes less, and so does sharing.
        spread: the factors between rates of full fine-tuning, and of adapters.
    """

    def rates(middle: float, factor: float, below: int = 1) -> tuple[float, ...]:
        return tuple(float(f"{middle * factor**power:.2g}") for power in range(-below, 2))

    def of_lora(rank: int, **others: Any) -> dict[str, Any]:
        return {"adapter.method": "lora", "adapter.rank": rank, "adapter.alpha": 2.0 * rank, **others}

    def of_mora(kind: str) -> dict[str, Any]:
        return {"adapter.method": "mora", "adapter.rank": low, "adapter.kind": kind}

    whole, name = {"adapter.method": "full"}, f"LoRA r{high}"
    of_full, of_high = rates(full, spread[0]), rates(0.4 * lora, spread[1])
    divergence = {"loss.kl_weight": 1.0, "loss.kl_tokens": "prompt"}
    return (
        Arm(FULL, whole, of_full),
        Arm(f"LoRA r{low}", of_lora(low), rates(lora, spread[1], 2)),
        Arm(name, of_lora(high), of_high),
        Arm(f"MoRA sharing r{low}", of_mora("sharing"), rates(0.5 * mora, spread[1])),
        Arm(f"MoRA rotation r{low}", of_mora("rotation"), rates(mora, spread[1], 2)),
        Arm(f"{FULL}{CONTROL}weight decay", whole | {"optimizer.weight_decay": 1.0}, of_full),
        Arm(f"{name}{CONTROL}dropout", of_lora(high, **{"adapter.dropout": 0.1}), of_high),
        Arm(f"{name}{CONTROL}KL", of_lora(high, **divergence), rates(0.4 * lora, spread[1], 2)),
    )


def _settings(*, steps: int, batch_size: int, max_length: int, evaluations: int, **others: Any) -> dict[str, Any]:
    return {
        "data.max_length": max_length,
        "optimizer.schedule": "constant",
        "optimizer.warmup_steps": min(20, steps // 2),
        "train.steps": steps,
        "train.batch_size": batch_size,
        "train.eval_every": max(1, steps // evaluations),
        "train.log_every": steps,
        **others,
    }


def _data(source: str, **others: Any) -> dict[str, Any]:
    """Of the study.

    `rows`: to train on at most; `scored`: to measure on at most, of rows and of texts; `text_length`: of the texts of
    what was known, in tokens; `layers`: whose spectra are measured, every so many; `top`: leading singular vectors
    that are looked at; `characters`: a row of code.
    """
    return {"source": source, "scored": 240, "text_length": 128, "layers": 1, "top": 10, **others}


_QUICK = _arms(2, 16, full=6e-4, lora=1e-2, mora=1e-2, spread=(3.3, 2.0))

PRESETS = {
    "tiny": Preset(
        "seconds; shows the form of the results, and no more",
        tuple(Arm(arm.name, arm.settings, arm.rates[:2]) for arm in _QUICK[:2]),
        _settings(steps=4, batch_size=4, max_length=32, evaluations=2, **{"model.dtype": "float32"}),
        _data("instructions", rows=64, scored=16),
        seeds=2,
    ),
    "quick": Preset(
        "the embedded model, minutes on two cores",
        _QUICK,
        _settings(steps=96, batch_size=16, max_length=32, evaluations=8, **{"model.dtype": "float32"}),
        _data("instructions", rows=2000, scored=120),
    ),
    "small": Preset(
        "a model of about 100 M parameters, hours on two cores",
        _arms(8, 64, full=1e-4, lora=1e-3, mora=1e-3),
        _settings(steps=200, batch_size=8, max_length=256, evaluations=8, **{"model.dtype": "float32"}),
        _data("code", rows=4000, scored=100, text_length=256, layers=5, characters=800),
    ),
    "paper": Preset(
        "a model of 7 B parameters on eight accelerators",
        _arms(16, 256, full=1e-5, lora=2e-4, mora=2e-4),
        _settings(
            steps=2000,
            batch_size=192,
            max_length=4096,
            evaluations=8,
            **{"train.micro_batch_size": 8, "model.remat": "full", "mesh.data": 1, "mesh.fsdp": -1},
        ),
        _data("code", rows=400_000, scored=500, text_length=4096, layers=8, characters=12_000),
    ),
}
