"""What runs answer to the same prompts."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mora_jax.data.conversation import Conversation, Message
from mora_jax.data.formats.load import open_rows
from mora_jax.errors import InputError
from mora_jax.evaluation import generate_batch
from mora_jax.evaluation.chat import REPLACEMENT
from mora_jax.interop import load_adapter, load_pretrained
from mora_jax.interop.read_adapter import bare
from mora_jax.models.decoder import Decoder
from mora_jax.report.runs import Run
from mora_jax.training.run.saving import result_name

#: Stands for the model without an adapter where a run's name would: no run has this name, nor one that begins so.
BASE = "base"


@dataclass(frozen=True)
class Question:
    """A prompt.

    Attributes:
        messages: up to where the answer begins.
        reference: the answer in the data; None for a prompt that came without.
        answers: by run, and of the base under `BASE`; a run that can't answer says why in `silent`.
    """

    messages: tuple[Message, ...]
    reference: str | None = None
    answers: dict[str, str] = field(default_factory=dict)


def ask(prompts: Sequence[str] = (), data: str | None = None, most: int = 3) -> list[Question]:
    """Questions from texts, then the first rows of a data file, each up to its last answer.

    Raises:
        InputError: the file has no conversation.
    """
    questions = [Question((Message("user", text),)) for text in prompts]
    if data is not None:
        rows = [row for row in itertools.islice(open_rows(data), most) if isinstance(row, Conversation)]
        for row in rows:
            turns = row.messages
            last = max((place for place, turn in enumerate(turns) if turn.role == "assistant"), default=0)
            if last:
                questions.append(Question(turns[:last], turns[last].text))
        if not rows or len(questions) == len(prompts):
            raise InputError(f"--prompts {data}: its first rows have no answered conversation")
    return questions


def answer(
    questions: Sequence[Question], runs: Sequence[Run], max_new_tokens: int, begins: Callable[[str], object]
) -> dict[str, str]:
    """Lets each run, and each base model before them, answer greedily.

    Args:
        questions: their `answers` are filled in.
        runs: those that have trained a model together are loaded on one base.
        max_new_tokens: the longest answer.
        begins: told what answers next.

    Returns:
        Why a run has no answers, by its name.
    """
    silent: dict[str, str] = {}
    prompts = [question.messages for question in questions]
    by_base: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        by_base.setdefault((run.config.model.path or "", run.config.model.quantize), []).append(run)
    for (path, quantize), members in by_base.items():
        try:
            base, tokenizer = load_pretrained(path, quantize=quantize)
        except InputError as error:
            silent |= {run.name: str(error) for run in members}
            continue
        speakers: dict[str, Run | None] = {BASE if len(by_base) == 1 else f"{BASE} {path}": None}
        for name, who in (speakers | {run.name: run for run in members}).items():
            begins(name)
            try:
                model = base if who is None else _trained(who, base)
                template = (who or members[0]).config.data.template
                texts = generate_batch(model, tokenizer, prompts, max_new_tokens=max_new_tokens, template=template)
            except InputError as error:
                silent[name] = str(error)
                continue
            for question, text in zip(questions, texts, strict=True):
                question.answers[name] = text.rstrip(REPLACEMENT).strip()
    return silent


def _trained(run: Run, base: Decoder) -> Decoder:
    """The model that a run has made: its best, where it kept that apart."""
    folder = run.directory.path / (run.summary.get("best") or result_name(run.config))
    if not folder.is_dir():
        raise InputError("it has no result yet")
    if run.config.adapter.config_class.changes_base:
        return load_pretrained(folder)[0]
    model = bare(base)
    load_adapter(model, folder)
    return model
