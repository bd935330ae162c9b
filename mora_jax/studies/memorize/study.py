"""Does MoRA store more than LoRA at equal parameters? After the UUID pairs of MoRA (arXiv 2405.12130, section 3)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mora_jax.errors import InputError
from mora_jax.evaluation.chat import generate_batch
from mora_jax.studies.conclusion import arms_table, table
from mora_jax.studies.figures import draw_curves, draw_rates, legend, new_figure
from mora_jax.studies.folder import read_rows, write_rows
from mora_jax.studies.intervals import paired, verdict
from mora_jax.studies.memorize.pairs import BITS, SYMBOLS, make_pairs, share_of_right
from mora_jax.studies.results import Results
from mora_jax.studies.scoring import score_rows, texts_of
from mora_jax.studies.study import Arm, Cell, Level, Measuring, Preset, Sources, Study

#: Answers are generated at so many of the evaluations, the last one included.
_GENERATIONS = 4


def _lora(rank: int, alpha: float) -> dict[str, Any]:
    return {"adapter.method": "lora", "adapter.rank": rank, "adapter.alpha": alpha}


def _mora(rank: int, kind: str) -> dict[str, Any]:
    return {"adapter.method": "mora", "adapter.rank": rank, "adapter.kind": kind}


def _arms(rank: int, high: int, *, scale: float = 1.0, full: tuple[float, ...]) -> tuple[Arm, ...]:
    """The arms at a rank; learning rates are those of a narrow model times `scale`."""

    def rates(*values: float) -> tuple[float, ...]:
        return tuple(float(f"{value * scale:.3g}") for value in values)

    return (
        Arm(f"LoRA r{rank}", _lora(rank, 2.0 * rank), rates(2.5e-3, 5e-3, 1e-2)),
        Arm(f"LoRA r{rank}, α = 8r", _lora(rank, 8.0 * rank), rates(1e-3, 2e-3, 4e-3, 8e-3)),
        Arm(f"MoRA sharing r{rank}", _mora(rank, "sharing"), rates(1e-3, 3e-3, 6e-3)),
        Arm(f"MoRA rotation r{rank}", _mora(rank, "rotation"), rates(3e-3, 1e-2, 2e-2, 4e-2)),
        Arm(f"HiRA r{rank}", {"adapter.method": "hira", "adapter.rank": rank}, rates(3e-3, 1e-2, 3e-2, 6e-2)),
        Arm(f"LoRA r{high}", _lora(high, 2.0 * high), rates(1e-3, 3e-3, 6e-3)),
        Arm("full", {"adapter.method": "full"}, full),
    )


def _small_arms() -> tuple[Arm, ...]:
    """Those that a model of about 100 M parameters has an hour for."""
    return (
        Arm("LoRA r2", _lora(2, 4.0), (1.75e-3, 3.5e-3, 7e-3, 1.4e-2)),
        Arm("MoRA sharing r2", _mora(2, "sharing"), (2e-4, 7e-4, 2.1e-3, 4.2e-3)),
        Arm("MoRA rotation r2", _mora(2, "rotation"), (2.1e-3, 7e-3, 1.4e-2, 2.8e-2)),
        Arm("LoRA r16", _lora(16, 32.0), (7e-4, 2.1e-3, 4.2e-3)),
        Arm("full", {"adapter.method": "full"}, (1.5e-5, 5e-5, 1.5e-4, 5e-4)),
    )


def _settings(*, steps: int, batch_size: int, max_length: int, evaluations: int = 16) -> dict[str, Any]:
    return {
        "data.max_length": max_length,
        "loss.end_of_turn": "none",
        "optimizer.schedule": "constant",
        "optimizer.warmup_steps": min(20, steps),
        "train.steps": steps,
        "train.batch_size": batch_size,
        "train.eval_every": max(1, steps // evaluations),
        "train.log_every": max(1, steps // 40),
    }


class Memorize(Study):
    """Random pairs of keys and values; the loss is on the values alone."""

    name = "memorize"
    question = "does MoRA store more than LoRA at equal parameters?"
    paper = "MoRA (arXiv 2405.12130), section 3"
    chosen_by = "generated_accuracy"
    higher = True
    presets = {
        "tiny": Preset(
            "seconds; shows the form of the results, and no more",
            tuple(Arm(arm.name, arm.settings, arm.rates[1:3]) for arm in _arms(2, 8, full=(1e-3, 2e-3))[:3:2]),
            _settings(steps=4, batch_size=4, max_length=16),
            {"pairs": 8, "length": 2},
            seeds=2,
        ),
        "quick": Preset(
            "the embedded model, minutes on two cores",
            _arms(2, 8, full=(3e-4, 1e-3, 3e-3)),
            _settings(steps=320, batch_size=32, max_length=20),
            {"pairs": 128, "length": 8},
        ),
        "small": Preset(
            "a model of about 100 M parameters, an hour or two on two cores",
            _small_arms(),
            # ChatML, because the model's own template may put a system message before every key.
            {**_settings(steps=48, batch_size=12, max_length=28, evaluations=6), "data.template": "chatml"},
            {"pairs": 48, "length": 8},
        ),
        "paper": Preset(
            "a model of 7 B parameters on eight accelerators",
            _arms(8, 256, scale=0.03, full=(1e-5, 3e-5, 1e-4)),
            {
                **_settings(steps=1000, batch_size=1000, max_length=128),
                "train.micro_batch_size": 200,
                "model.remat": "full",
                "mesh.fsdp": -1,
            },
            {"pairs": 10_000, "length": 32},
        ),
    }

    def write_data(self, preset: Preset, level: Level, seed: int, folder: Path, sources: Sources) -> dict[str, Any]:
        """A file of pairs."""
        if sources.data is not None:
            raise InputError("study memorize makes its own pairs; leave out --data")
        rows = make_pairs(preset.data["pairs"], preset.data["length"], seed)
        return {"data.train": (write_rows(folder / f"pairs_{seed}.jsonl", rows),)}

    def measure(self, cell: Cell, settings: Measuring, tokenizer: Any, model: Any, step: int) -> dict[str, float]:
        """Loss and accuracy given the right symbols before; at some steps what is generated, and the base's texts."""
        (path,) = settings.data["data.train"]
        scores = score_rows(settings, tokenizer, model, path, end_of_turn="none")
        found = {"loss": scores.nll, "teacher_forced_accuracy": scores.accuracy}
        every = settings.steps // _GENERATIONS or 1
        if step % every and step != settings.steps:
            return found
        rows = read_rows(path)
        answers = generate_batch(
            model,
            tokenizer,
            [row["prompt"] for row in rows],
            max_new_tokens=settings.preset.data["length"] + 1,
            batch_size=min(len(rows), 128),
            template=settings.preset.template,
        )
        right, whole = share_of_right(answers, [row["completion"] for row in rows])
        found |= {"generated_accuracy": right, "pairs_right": whole}
        if (texts := texts_of(settings.sources)) is not None:
            found["base_text_loss"] = score_rows(settings, tokenizer, model, texts, mode="full").nll
        return found

    def conclude(self, results: Results) -> list[str]:
        """Whether MoRA leads, what full fine-tuning and a higher rank do, and a row an arm."""
        small, strong = _equal_loras(results)
        data = results.preset.data
        bits = data["pairs"] * data["length"] * BITS
        metrics = {
            "generated_accuracy": "generated accuracy",
            "teacher_forced_accuracy": "teacher-forced accuracy",
            "pairs_right": "pairs right",
            "loss": "loss (nats a symbol)",
        }
        if not results.frame[results.frame["metric"] == "base_text_loss"].empty:
            length = results.preset.settings["data.max_length"]
            metrics["base_text_loss"] = f"loss on {length} tokens of base texts"
        chance = 1 / len(SYMBOLS)
        others = [arm for arm in results.arms if arm != small]
        against = [f"## Against {small}\n\n" + "\n".join(_compared(results, arm, small) for arm in others)]
        if strong is not None:
            moras = [arm for arm in results.arms if arm.startswith("MoRA")]
            lines = "\n".join(_compared(results, arm, strong) for arm in moras)
            against.append(f"## Against {strong}, the same matrices with a larger factor\n\n{lines}")
        return [
            f"{data['pairs']} pairs of {data['length']} symbols, {bits:,} bits; chance is {chance:.4f}. *Generated* is "
            "by greedy decoding from the key, position by position; *teacher-forced* is given the right ones before.",
            arms_table(results, metrics),
            *against,
            "## Steps until half of the symbols are right\n\n" + _steps_table(results),
        ]

    def figures(self, results: Results) -> dict[str, Any]:
        """Accuracy against steps, and against the learning rate."""
        figure, [panels] = new_figure(3)
        words = {
            "generated_accuracy": "generated accuracy",
            "teacher_forced_accuracy": "teacher-forced accuracy",
            "loss": "loss, nats a symbol",
        }
        for panel, (metric, label) in zip(panels, words.items(), strict=True):
            draw_curves(panel, results, metric)
            panel.set_ylabel(label)
        for panel in panels[:2]:
            panel.axhline(1 / len(SYMBOLS), color="0.5", linewidth=1, linestyle=":", zorder=0)
        legend(figure, panels[0])
        rates, [[panel]] = new_figure(width=7, height=4.6)
        draw_rates(panel, results, "generated_accuracy")
        panel.set_ylabel("generated accuracy after the last step")
        legend(rates, panel, columns=3)
        return {"curves": figure, "rates": rates}


def _equal_loras(results: Results) -> tuple[str, str | None]:
    """LoRA with the usual factor, and the one of the same rank with a larger factor, if there is any."""
    loras = [arm for arm in results.preset.arms if arm.settings["adapter.method"] == "lora"]
    small = loras[0]
    same = [arm.name for arm in loras[1:] if arm.settings["adapter.rank"] == small.settings["adapter.rank"]]
    return small.name, next(iter(same), None)


def _compared(results: Results, arm: str, other: str) -> str:
    difference = results.difference("generated_accuracy", arm, other)
    if not difference.n:
        return f"- **{arm}**: missing."
    words = verdict(difference, "stores more", "stores less")
    ours, theirs = results.parameters(arm), results.parameters(other)
    size = f"{ours / theirs:.2f} times the parameters" if ours and theirs else "parameters unknown"
    sooner = paired(_over_the_run(results, arm), _over_the_run(results, other))
    speed = verdict(sooner, "learns sooner", "learns later")
    return (
        f"- **{arm}** ({size}): {words}, {difference.text(sign=True)} in generated accuracy at the end; {speed}, "
        f"{sooner.text(sign=True)} in teacher-forced accuracy, averaged over the evaluations."
    )


def _over_the_run(results: Results, arm: str) -> dict[int, float]:
    """The mean teacher-forced accuracy of all evaluations behind the first step, by seed: arms that end at 1 differ."""
    curves = results.curves("teacher_forced_accuracy", arm)
    return {seed: sum(value for step, value in rows if step) / (len(rows) - 1) for seed, rows in curves.items()}


def _steps_table(results: Results) -> str:
    """By the mean over seeds at the evaluations."""
    rows = []
    for arm in results.arms:
        by_step: dict[int, list[float]] = {}
        for curve in results.curves("teacher_forced_accuracy", arm).values():
            for step, value in curve:
                by_step.setdefault(step, []).append(value)
        reached = [step for step, values in sorted(by_step.items()) if sum(values) / len(values) >= 0.5]
        rows.append([arm, str(reached[0]) if reached else "not reached" if by_step else "missing"])
    return table(["arm", "step (teacher-forced)"], rows)
