"""What rank and learning rate does a method need? After LoRA Without Regret and later comparisons with swept rates."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mora_jax.data import EncodedDataset, load_rows
from mora_jax.studies.rates.conclude import conclude
from mora_jax.studies.rates.draw import draw
from mora_jax.studies.rates.readings import BATCH, VARIANTS
from mora_jax.studies.rates.rows import HELD_OUT, TEST, TRAIN, take, write_parts
from mora_jax.studies.results import Results
from mora_jax.studies.scoring import score_rows
from mora_jax.studies.study import Arm, Cell, Level, Measuring, Preset, Sources, Study

#: Of all ranks, as in LoRA Without Regret: with alpha / rank the first steps then move the kernel alike at any rank.
ALPHA = 32.0
#: The loss on trained rows is of so many.
_TRAINED_ROWS = 128


def _lora(rank: int, rates: tuple[float, ...], method: str = "lora", name: str = "LoRA", **others: Any) -> Arm:
    settings = {"adapter.method": method, "adapter.rank": rank, "adapter.alpha": ALPHA}
    return Arm(f"{name} r{rank}", settings | {f"adapter.{key}": value for key, value in others.items()}, rates)


def _mora(kind: str, rank: int, rates: tuple[float, ...]) -> Arm:
    settings = {"adapter.method": "mora", "adapter.rank": rank, "adapter.kind": kind}
    return Arm(f"MoRA {kind} r{rank}", settings, rates)


def _full(rates: tuple[float, ...]) -> Arm:
    return Arm("full", {"adapter.method": "full"}, rates)


def _attention(rank: int, rates: tuple[float, ...]) -> Arm:
    return Arm(f"LoRA r{rank}, q and v", dict(_lora(rank, rates, targets=("q_proj", "v_proj")).settings), rates)


def _scaled(rates: tuple[float, ...], scale: float) -> tuple[float, ...]:
    return tuple(float(f"{rate * scale:.3g}") for rate in rates)


def _preset(
    doc: str,
    *,
    scale: float,
    full_scale: float,
    ranks: tuple[int, int, int],
    rows: tuple[int, ...],
    batch_size: int,
    large: int,
    steps: int,
    settings: Mapping[str, Any],
    seeds: int = 3,
) -> Preset:
    """A size of the study.

    Args:
        doc: of the preset.
        scale, full_scale: of the rates of adapters and of full fine-tuning, which are those of a narrow model.
        ranks: low, middle, high.
        rows: numbers of examples, the largest first.
        batch_size, large: rows of a step, in general and at the level of large batches.
        steps: in general.
        settings: further configuration keys.
        seeds: reported.
    """
    low, middle, high = ranks
    wide = _scaled((3e-4, 1e-3, 3e-3, 1e-2, 3e-2), scale)
    small = _scaled((1e-4, 3e-4, 1e-3, 3e-3, 1e-2), full_scale)
    sweep = (
        _attention(low, wide),
        *(_lora(rank, wide) for rank in ranks),
        *(_mora(kind, rank, wide) for kind in ("sharing", "rotation") for rank in (middle, high)),
        _full(small),
    )
    variants = (
        _lora(middle, wide[1:4], "dora", "DoRA"),
        _lora(middle, wide[:3], "lora_plus", "LoRA+"),
        _lora(middle, wide[:3], "pissa", "PiSSA"),
    )
    few = (
        _attention(low, wide[2:]),
        _lora(low, wide[1:4]),
        _lora(high, wide[1:4]),
        _mora("sharing", middle, wide[1:4]),
        _full(small[1:4]),
    )
    batch = {"batch_size": batch_size}
    most, *fewer = rows
    of_large = {
        "train.batch_size": large,
        "train.steps": steps * batch_size // large,
        "train.eval_every": steps * batch_size // large,
        "train.log_every": max(1, steps * batch_size // large // 4),
        "optimizer.warmup_steps": max(1, steps * batch_size // large // 10),
    }
    return Preset(
        doc,
        (),
        {
            "loss.mode": "masked",
            "optimizer.schedule": "constant",
            "optimizer.warmup_steps": max(1, steps // 10),
            "train.steps": steps,
            "train.batch_size": batch_size,
            "train.eval_every": steps,
            "train.eval_on_start": False,
            "train.log_every": max(1, steps // 6),
            **settings,
        },
        levels=(
            Level(f"{most} rows", {"examples": most, **batch}, arms=sweep, neighbours=True),
            *(Level(f"{count} rows", {"examples": count, **batch}, arms=few) for count in fewer),
            Level(VARIANTS, {"examples": most, **batch}, arms=variants),
            Level(
                f"{BATCH} {large}",
                {"examples": most, "batch_size": large},
                of_large,
                (_lora(low, wide[1:4]), _lora(high, wide[1:4]), _full(small[1:4])),
            ),
        ),
        seeds=seeds,
    )


class Rates(Study):
    """One task, all methods, every learning rate."""

    name = "rates"
    question = "what rank and learning rate does a method need?"
    paper = "LoRA Without Regret (Thinking Machines, 2025) and arXiv 2602.04998"
    chosen_by = "held_out_loss"
    higher = False
    notes = (
        "Ranks are of the base's width: rank 16 of 128 is another thing than rank 16 of 4,096.",
        "Runs are short, and the learning rate is constant; longer ones and other schedules may want other rates.",
        "Above its best rate the loss rises faster than below, which draws the parabola's lowest point to lower rates.",
    )
    presets = {
        "tiny": Preset(
            "seconds; shows the form of the results, and no more",
            (),
            {
                "data.max_length": 25,
                "optimizer.schedule": "constant",
                "train.steps": 4,
                "train.batch_size": 4,
                "train.eval_every": 4,
                "train.eval_on_start": False,
            },
            levels=(
                Level(
                    "16 rows",
                    {"examples": 16, "batch_size": 4},
                    arms=(_lora(4, (1e-3, 3e-3)), _mora("sharing", 4, (1e-3, 3e-3))),
                    neighbours=True,
                ),
            ),
            seeds=2,
        ),
        "quick": _preset(
            "the embedded model and instructions, minutes on two cores",
            scale=1.0,
            full_scale=1.0,
            ranks=(1, 4, 16),
            rows=(1024, 128),
            batch_size=16,
            large=64,
            steps=64,
            settings={"data.max_length": 25},
        ),
        "small": _preset(
            "a model of about 100 M parameters, hours on two cores",
            scale=0.3,
            full_scale=0.1,
            ranks=(1, 8, 64),
            rows=(256, 64),
            batch_size=8,
            large=32,
            steps=32,
            settings={"data.max_length": 128},
        ),
        "paper": _preset(
            "a model of 7 B parameters on eight accelerators",
            scale=0.1,
            full_scale=0.03,
            ranks=(1, 16, 256),
            rows=(50_000, 5_000, 500),
            batch_size=40,
            large=400,
            steps=1_250,
            settings={"data.max_length": 1024, "mesh.fsdp": -1},
        ),
    }

    def write_data(self, preset: Preset, level: Level, seed: int, folder: Path, sources: Sources) -> dict[str, Any]:
        """As many rows as the level says, drawn by the seed from the part that is trained on."""
        parts = write_parts(sources, folder)
        return {"data.train": (take(parts[TRAIN], level.values["examples"], seed, folder),)}

    def measure(self, cell: Cell, settings: Measuring, tokenizer: Any, model: Any, step: int) -> dict[str, float]:
        """The losses on answers: of the reported part, where a rate is chosen of that part, else of trained rows."""
        parts = write_parts(settings.sources, settings.folder)
        (path,) = settings.data["data.train"]
        length = settings.preset.settings["data.max_length"]
        if path not in settings.cache:
            settings.cache[path] = EncodedDataset.build(load_rows(path), tokenizer, max_length=length).report
        found = {
            "loss": score_rows(settings, tokenizer, model, str(parts[TEST])).nll,
            "trained_tokens": settings.cache[path].trained_tokens,
        }
        if cell.chooses:
            found["held_out_loss"] = score_rows(settings, tokenizer, model, str(parts[HELD_OUT])).nll
        elif not cell.neighbour:
            some = take(Path(path), min(_TRAINED_ROWS, cell.level.values["examples"]), cell.seed, settings.folder)
            found["trained_rows_loss"] = score_rows(settings, tokenizer, model, some).nll
        return found

    def conclude(self, results: Results) -> list[str]:
        """Positions of the best rates, variants, capacity and batch size."""
        return conclude(results)

    def figures(self, results: Results) -> dict[str, Any]:
        """Loss against rate, the best rates, capacity and batch size."""
        return draw(results)
