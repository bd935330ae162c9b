"""Does LoRA learn less and forget less? After arXiv 2405.09673, with the spectra and intruders of what was changed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mora_jax import demo
from mora_jax.data import load_rows
from mora_jax.data.conversation import Conversation
from mora_jax.demo.answers import mean_scores
from mora_jax.errors import InputError
from mora_jax.evaluation.chat import generate_batch
from mora_jax.interop.load import load_pretrained
from mora_jax.studies.folder import read_rows, write_rows
from mora_jax.studies.forget import conclude, draw
from mora_jax.studies.forget.intruders import EPSILON, EPSILONS, FACTORS, Leading, output_side, scaled
from mora_jax.studies.forget.presets import PRESETS
from mora_jax.studies.forget.spectrum import COUNTS, Change, Spectrum, changes, gaussian_energy, kernels
from mora_jax.studies.forget.stdlib_code import PARTS, code_texts
from mora_jax.studies.results import Results
from mora_jax.studies.scoring import score_rows, texts_of
from mora_jax.studies.study import Cell, Level, Measuring, Preset, Sources, Study
from mora_jax.studies.user_rows import as_messages

#: Spectra are measured at so many of the evaluations, the last one included.
_SPECTRA = 4
#: Tokens of a generated answer.
_ANSWER = 16


class Forget(Study):
    """A new domain is learned while texts of the old one are watched."""

    name = "forget"
    question = "does LoRA learn less and forget less?"
    paper = "LoRA Learns Less and Forgets Less (arXiv 2405.09673) and LoRA vs Full Fine-tuning (arXiv 2410.21228)"
    chosen_by = "loss"
    higher = False
    presets = PRESETS
    notes = (
        "*full* is this library's full fine-tuning, of all parameters, embeddings and norms included; adapters are on "
        "the linear layers alone. The paper's full fine-tuning trains all parameters too.",
        "Learning rates were chosen by the loss on the new domain alone, as somebody would who does not watch the old "
        "one.",
        "Weight decay is AdamW's: it pulls towards zero, not towards the base, by the rate times 1.0 a step.",
        "A change of high rank does not show that a high rank was needed: independent noise has one too.",
    )

    def write_data(self, preset: Preset, level: Level, seed: int, folder: Path, sources: Sources) -> dict[str, Any]:
        """The rows of the new domain in three parts: to train on, to choose rates by, to report; texts of the old."""
        texts = texts_of(sources)
        if texts is None:
            raise InputError("study forget watches texts like those that the base was pretrained on: give --texts FILE")
        limit = preset.data["scored"]
        known = folder / "texts.jsonl"
        if not known.exists():
            write_rows(known, _rows([texts], "--texts")[:limit])
        train = folder / f"train_{seed}.jsonl"
        if not train.exists() or not (folder / "test.jsonl").exists():
            parts = _parts(preset, sources)
            for part in PARTS[1:]:
                write_rows(folder / f"{part}.jsonl", parts[part][:limit])
            rows = parts["train"]
            write_rows(train, random.Random(seed).sample(rows, min(len(rows), preset.data["rows"])))
        return {"data.train": (str(train),)}

    def measure(self, cell: Cell, settings: Measuring, tokenizer: Any, model: Any, step: int) -> dict[str, float]:
        """Losses on both domains; at some steps the spectrum of the change; at the end of reported cells the rest."""
        found = _losses(cell, settings, tokenizer, model)
        last = step == settings.steps
        if not last and (cell.chooses or not step or step % max(1, settings.steps // _SPECTRA)):
            return found
        spectrum = Spectrum.of(_changes(cell, settings, model))
        found |= spectrum.figures()
        if last and not cell.chooses:
            found |= spectrum.details(COUNTS)
            if cell.seed == 1 and cell.arm is settings.preset.arms[0]:
                found |= _noise(spectrum)
            found |= _intruders(cell, settings, tokenizer, model, spectrum.changes)
            found |= _answers(cell, settings, tokenizer, model)
        return found

    def conclude(self, results: Results) -> list[str]:
        """At equal steps, at equal learning, what the rate does, spectra and intruders."""
        return conclude.paragraphs(results)

    def figures(self, results: Results) -> dict[str, Any]:
        """Forgetting against learning, both against steps, spectra, and intruders."""
        return draw.figures(results)


def _rows(files: Sequence[str], option: str) -> list[dict[str, Any]]:
    """The rows of files in forms that every loss mode takes."""
    found: list[dict[str, Any]] = []
    for file in files:
        for row in load_rows(file):
            if not isinstance(row, Conversation):
                raise InputError(f"{option} {file}: study forget takes chats or plain texts, and no rows of tokens")
            if row.text is not None:
                found.append({"text": row.text})
            else:
                found.append(as_messages(row))
    return found


def _parts(preset: Preset, sources: Sources) -> dict[str, list[dict[str, Any]]]:
    """Rows by part: the user's own, the embedded instructions, or code."""
    if sources.data is not None:
        rows = _rows(sources.data, "--data")
        tenth = len(rows) // 10
        if not tenth:
            raise InputError(
                f"--data {sources.data[0]}: study forget keeps a tenth of the rows to choose rates by and a tenth to "
                f"report, and there are {len(rows)} in all"
            )
        random.Random(0).shuffle(rows)
        return {"held_out": rows[:tenth], "test": rows[tenth : 2 * tenth], "train": rows[2 * tenth :]}
    if preset.data["source"] == "code":
        return code_texts(preset.data["characters"])
    return {part: _rows([demo.data_path(part)], "--data") for part in PARTS}


def _scored(cell: Cell, settings: Measuring) -> Path:
    """The part of the new domain that a cell is measured on: rates are not chosen on what is reported."""
    return settings.folder / ("held_out.jsonl" if cell.chooses else "test.jsonl")


def _losses(cell: Cell, settings: Measuring, tokenizer: Any, model: Any) -> dict[str, float]:
    scores = score_rows(settings, tokenizer, model, str(_scored(cell, settings)))
    length = settings.preset.data["text_length"]
    known = score_rows(settings, tokenizer, model, str(settings.folder / "texts.jsonl"), mode="full", max_length=length)
    return {"loss": scores.nll, "accuracy": scores.accuracy, "base_text_loss": known.nll}


def _changes(cell: Cell, settings: Measuring, model: Any) -> list[Change]:
    """Of the layers whose spectra are measured."""
    every, base = settings.preset.data["layers"], None
    if cell.arm.settings["adapter.method"] == "full":
        if "kernels" not in settings.cache:
            settings.cache["kernels"] = _base_kernels(settings, every)
        base = settings.cache["kernels"]
    return list(changes(model, base, every))


def _base_kernels(settings: Measuring, every: int) -> dict[str, np.ndarray]:
    """Read on the host: the devices hold the model that is trained."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        model, _ = load_pretrained(settings.sources.model, dtype=settings.preset.settings.get("model.dtype"))
        return kernels(model, every)


def _noise(spectrum: Spectrum) -> dict[str, float]:
    """The energies that matrices of these shapes would have if their numbers were independent and normal."""
    energy = gaussian_energy([one.delta.shape for one in spectrum.changes])
    return {f"energy_noise_{count}": float(energy[count - 1]) for count in COUNTS if count <= len(energy)}


def _intruders(
    cell: Cell, settings: Measuring, tokenizer: Any, model: Any, found: Sequence[Change]
) -> dict[str, float]:
    """How many there are, and both losses with them scaled."""
    cache, top = settings.cache, settings.preset.data["top"]
    if "vectors" not in cache:
        cache["vectors"] = {one.path: output_side(one.base) for one in found}
    leading = [Leading.of(one, top, cache["vectors"][one.path]) for one in found]
    values: dict[str, float] = {
        f"intruders_{below}": float(np.mean([one.count(below) for one in leading])) for below in EPSILONS
    }
    for factor in FACTORS:
        losses = _losses(cell, settings, tokenizer, scaled(model, leading, EPSILON, factor))
        values |= {f"{name}_scaled_{factor}": losses[name] for name in ("loss", "base_text_loss")}
    return values


def _answers(cell: Cell, settings: Measuring, tokenizer: Any, model: Any) -> dict[str, float]:
    """The share of answers that are right, where each row of the new domain is a question and its answer."""
    rows = read_rows(str(_scored(cell, settings)))
    if settings.preset.data["source"] != "instructions" or settings.sources.data is not None:
        return {}
    questions, truths = ([row["messages"][turn]["content"] for row in rows] for turn in (0, 1))
    answers = generate_batch(model, tokenizer, questions, max_new_tokens=_ANSWER, batch_size=len(questions))
    return {"exact_match": mean_scores(answers, truths)[0]}
