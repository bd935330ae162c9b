"""Loss over the instruction or not? After Instruction Modelling (arXiv 2405.14394), with the control that it lacks.

Under unmasked loss an answer also weighs less: its share of its example. The arm `share` is masked loss with that
weight, row by row, so that what it doesn't explain is the instruction's own doing. A factor on the whole loss would be
no control, because AdamW cancels it; `lr_share` lowers the learning rate instead.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mora_jax.data import load_tokenizer
from mora_jax.demo.answers import mean_scores
from mora_jax.evaluation.chat import generate_batch
from mora_jax.paths import new_file
from mora_jax.studies.folder import write_rows
from mora_jax.studies.instruct.report import conclude
from mora_jax.studies.instruct.rows import (
    Parts,
    base_texts,
    embedded_parts,
    enough,
    facts_file,
    facts_of,
    parts_of_files,
    read_facts,
    short_answers,
)
from mora_jax.studies.results import Results
from mora_jax.studies.scoring import score_rows, texts_of
from mora_jax.studies.study import Arm, Cell, Level, Measuring, Preset, Sources, Study

#: Answers of so many words at most are generated and compared with the right ones.
_CHECKED_WORDS = 8
_WARMUP = 5

LOSSES: dict[str, dict[str, Any]] = {
    "masked": {},
    "unmasked": {"loss.mode": "unmasked"},
    "full sequence": {"loss.mode": "full"},
    "im_paper": {"loss.mode": "im_paper"},
    **{f"weighted {weight:g}": {"loss.mode": "weighted", "loss.prompt_weight": weight} for weight in (0.01, 0.1, 0.5)},
    "wit 0.5": {"loss.mode": "wit", "loss.prompt_weight": 0.5},
    "share": {"loss.normalize": "share"},
    "lr_share": {},
}


def arms(method: str, settings: Mapping[str, Any], rates: tuple[float, ...], losses: tuple[str, ...]) -> list[Arm]:
    """A method under several losses.

    Args:
        method: its name in tables.
        settings: its configuration keys.
        rates: the learning rates that are tried for each loss.
        losses: keys of `LOSSES`.
    """
    return [
        Arm(f"{method} {loss}", {**settings, **LOSSES[loss]}, rate_of=f"{method} masked")
        if loss == "lr_share"
        else Arm(f"{method} {loss}", {**settings, **LOSSES[loss]}, rates)
        for loss in losses
    ]


def lora(rates: tuple[float, ...], *losses: str, rank: int = 8) -> list[Arm]:
    """LoRA under several losses."""
    settings = {"adapter.method": "lora", "adapter.rank": rank, "adapter.alpha": 2.0 * rank}
    return arms("LoRA", settings, rates, losses)


def _mora(rates: tuple[float, ...], *losses: str, rank: int = 8) -> list[Arm]:
    return arms("MoRA", {"adapter.method": "mora", "adapter.rank": rank, "adapter.kind": "rotation"}, rates, losses)


def _full(rates: tuple[float, ...], *losses: str) -> list[Arm]:
    return arms("full", {"adapter.method": "full"}, rates, losses)


def levels(
    ratios: int, epochs: int, batch_size: int, arms_by_rows: Mapping[int, list[Arm]], which: tuple[int, ...] = ()
) -> tuple[Level, ...]:
    """Ratios with every number of rows and its arms.

    Args:
        ratios: how many of them, from the lowest.
        epochs: of training.
        batch_size: rows of a step.
        arms_by_rows: what is compared at each number of rows.
        which: the numbers of the ratios, from 1; empty for all.
    """
    found = []
    for rows, chosen in arms_by_rows.items():
        steps = -(-rows // batch_size)
        settings = {
            "train.batch_size": batch_size,
            "train.steps": steps * epochs,
            "train.eval_every": steps,
            "train.log_every": steps,
            "optimizer.schedule": "constant",
            "optimizer.warmup_steps": min(_WARMUP, steps),
        }
        found += [
            Level(f"ratio {k} of {ratios}, {rows} rows", {"ratio_level": k, "rows": rows}, settings, tuple(chosen))
            for k in which or range(1, ratios + 1)
        ]
    return tuple(found)


_MAIN = ("masked", "unmasked", "weighted 0.1", "share")
_RATES, _FULL_RATES = (1e-3, 3e-3, 1e-2), (3e-4, 1e-3, 3e-3)
#: A model of 100 M parameters wants about a fifth, and one of 7 B a thirtieth of the rates of the embedded one.
_SMALL, _SMALL_MORA = (2e-4, 6e-4, 2e-3), (6e-4, 2e-3, 6e-3)
_PAPER, _PAPER_FULL = (5e-5, 1.5e-4, 5e-4), (5e-6, 2e-5, 6e-5)
_TWO = ("masked", "unmasked")


class Instruct(Study):
    """Masked, unmasked and weighted loss, by how long prompts are beside answers, and by the number of rows."""

    name = "instruct"
    question = "should the instruction carry loss?"
    paper = "Instruction Tuning With Loss Over Instructions (arXiv 2405.14394)"
    chosen_by = "validation_loss"
    chosen_at_best = True
    higher = False
    notes = (
        "A difference says what happens at that ratio, that number of rows and that method; no two of them are pooled.",
        "The study's own questions get a passage in front of them for a higher ratio: it is no part of what is asked, "
        "and it is of the kind of text that forgetting is measured on, so that training on it is also rehearsal of "
        "that text. Groups of rows given by --data differ in more than their ratio.",
    )
    presets = {
        "tiny": Preset(
            "seconds; shows the form of the results, and no more",
            (),
            {"data.max_length": 64},
            {"sentences": (0,), "lengths": (26,), "scored": 16, "new_tokens": 4},
            levels(1, 2, 8, {16: lora(_RATES[:2], "masked", "unmasked")}),
            seeds=2,
        ),
        "quick": Preset(
            "the embedded model, minutes on two cores",
            (),
            {"data.max_length": 64},
            {"sentences": (0, 3), "lengths": (26, 56), "scored": 120, "new_tokens": 12},
            levels(
                2,
                8,
                8,
                {
                    64: lora(_RATES, *_MAIN) + _mora(_RATES, *_TWO) + _full(_FULL_RATES, *_TWO),
                    256: lora(_RATES, *_TWO, "share"),
                },
            ),
        ),
        "small": Preset(
            "a model of about 100 M parameters, an hour or two on two cores",
            (),
            # ChatML, because the model's own template may put a system message before every question.
            {"data.max_length": 80, "data.template": "chatml"},
            {"sentences": (0, 2, 4, 6), "scored": 32, "new_tokens": 16},
            # The control is for where the answer is a small share.
            levels(4, 4, 4, {32: lora(_SMALL, *_TWO) + _mora(_SMALL_MORA, *_TWO)}, which=(1,))
            + levels(4, 4, 4, {32: lora(_SMALL, *_TWO, "share") + _mora(_SMALL_MORA, *_TWO)}, which=(4,)),
        ),
        "paper": Preset(
            "a model of 7 B parameters on eight accelerators",
            (),
            {
                "data.max_length": 2048,
                "train.micro_batch_size": 16,
                "mesh.data": 1,
                "mesh.fsdp": -1,
            },
            {"sentences": (0, 3, 8), "scored": 480, "new_tokens": 32},
            levels(
                3,
                8,
                128,
                {
                    rows: lora(_PAPER, *LOSSES) + _mora(_PAPER, *_TWO, "share") + _full(_PAPER_FULL, *_TWO, "share")
                    for rows in (256, 4096)
                },
            ),
        ),
    }

    def write_data(self, preset: Preset, level: Level, seed: int, folder: Path, sources: Sources) -> dict[str, Any]:
        """Files of rows: to train on by level and seed, for validation and the test by ratio."""
        group, count = level.values["ratio_level"], level.values["rows"]
        length = preset.settings["data.max_length"]
        if sources.data is None and "lengths" in preset.data:
            length = preset.data["lengths"][group - 1]
        train = str(folder / f"train_{group}_{count}_{seed}.jsonl")
        if not facts_file(train).exists():
            tokenizer = load_tokenizer(sources.model)
            parts = self._parts(preset, group, seed, sources, tokenizer)
            rows = enough(parts.train, count, level.name)
            write_rows(Path(train), rows)
            for name, others in (("validation", parts.validation), ("test", parts.test)):
                write_rows(folder / f"{name}_{group}.jsonl", others)
            facts = facts_of(rows, tokenizer, length, preset.template) | {"duplicate_prompts": parts.duplicates}
            with new_file(facts_file(train)) as file:
                file.write_text(json.dumps(facts), encoding="utf-8")
        if sources.texts is None:
            write_rows(folder / "base_texts.jsonl", base_texts())
        return {"data.train": (train,), "data.max_length": length}

    def _parts(self, preset: Preset, group: int, seed: int, sources: Sources, tokenizer: Any) -> Parts:
        sentences, scored = preset.data["sentences"], preset.data["scored"]
        if sources.data is None:
            return embedded_parts(sentences[group - 1], scored, seed)
        length, groups = preset.settings["data.max_length"], len(sentences)
        return parts_of_files(sources.data, tokenizer, length, group, groups, scored, seed, preset.template)

    def learning_rate(self, cell: Cell, data: Mapping[str, Any]) -> float:
        """The cell's, or for `lr_share` that of masked loss times the share of answers."""
        if not cell.arm.rate_of:
            return cell.rate
        return float(f"{cell.rate * read_facts(data['data.train'][0])['share']:.3g}")

    def measure(self, cell: Cell, settings: Measuring, tokenizer: Any, model: Any, step: int) -> dict[str, float]:
        """Losses after 1, 2, 4, 8, … epochs; at the end, and once at the start, also answers and the base's texts."""
        epoch, rest = divmod(step, cell.level.settings["train.eval_every"])
        if rest or (epoch & (epoch - 1) and step != settings.steps):
            return {}
        if step:
            return self._measured(cell, settings, tokenizer, model, step == settings.steps)
        # Adapters begin as nothing, so that all arms begin as the base.
        key = "before", cell.level.name, cell.seed
        if key not in settings.cache:
            settings.cache[key] = self._measured(cell, settings, tokenizer, model, True)
        return {**settings.cache[key], **read_facts(settings.data["data.train"][0])}

    def _measured(self, cell: Cell, settings: Measuring, tokenizer: Any, model: Any, whole: bool) -> dict[str, float]:
        group = cell.level.values["ratio_level"]
        validation, test = (str(settings.folder / f"{name}_{group}.jsonl") for name in ("validation", "test"))
        scores = score_rows(settings, tokenizer, model, test)
        found = {
            "validation_loss": score_rows(settings, tokenizer, model, validation).nll,
            "test_loss": scores.nll,
            "test_accuracy": scores.accuracy,
            "trained_rows_loss": score_rows(settings, tokenizer, model, settings.data["data.train"][0]).nll,
        }
        if scores.prompt_nll is not None:
            found["instruction_loss"] = scores.prompt_nll
        if not whole:
            return found
        if texts_of(settings.sources) is not None:
            texts = settings.sources.texts or str(settings.folder / "base_texts.jsonl")
            length = settings.preset.settings["data.max_length"]
            found["base_text_loss"] = score_rows(settings, tokenizer, model, texts, mode="full", max_length=length).nll
        prompts, truths = short_answers(test, _CHECKED_WORDS)
        if prompts:
            new, size = settings.preset.data["new_tokens"], settings.preset.data["scored"]
            got = generate_batch(
                model,
                tokenizer,
                prompts,
                max_new_tokens=new,
                batch_size=size,
                template=settings.preset.template,
            )
            found["exact_match"], found["f1"] = mean_scores([one.strip() for one in got], truths)
        return found

    def conclude(self, results: Results) -> list[str]:
        """What each loss does against masked loss, by level; what the control says; how it goes with the ratio."""
        return conclude(results)

    def figures(self, results: Results) -> dict[str, Any]:
        """Differences against the ratio and the number of rows; losses over epochs; the choice of rates."""
        from mora_jax.studies.instruct.figures import draw

        return draw(results)
