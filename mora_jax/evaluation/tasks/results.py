"""What an evaluation leaves: a folder with its records and metrics, and a table for people."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mora_jax.data.read.files import open_bytes, read_lines
from mora_jax.display.tables import as_text, table
from mora_jax.errors import InputError
from mora_jax.evaluation.metrics.estimate import Comparison, Estimate, Record, compare
from mora_jax.evaluation.tasks.metrics import TaskMetric
from mora_jax.evaluation.tasks.run import TaskResult
from mora_jax.interop.atomic_folder import new_folder
from mora_jax.paths import local_path

RESULT, RECORDS = "result.json", "records.jsonl"


def write_results(
    out: str, result: TaskResult, settings: Mapping[str, Any], *, overwrite: bool = False, **more: Any
) -> None:
    """Writes `result.json` and `records.jsonl`, whole or not at all.

    Args:
        out: the folder; must not exist, or be empty.
        result: of the task.
        settings: how it came about.
        overwrite: replaces what an earlier evaluation left there.
        **more: further entries of `result.json`.
    """
    content = {**result.to_dict(), "baselines": dict(result.baselines), "confusion": result.confusion, **more}
    with new_folder(out, ours=(RESULT, RECORDS), overwrite=overwrite) as folder:
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in result.records)
        (folder / RECORDS).write_text("".join(lines), encoding="utf-8")
        text = json.dumps({**content, "settings": dict(settings)}, ensure_ascii=False, indent=2)
        (folder / RESULT).write_text(text + "\n", encoding="utf-8")


def read_records(folder: str, task: str) -> list[Record]:
    """The records that an evaluation left.

    Raises:
        InputError: there are none in the folder, or they are of another task.
    """
    place = local_path(folder)
    try:
        result = json.loads((place / RESULT).read_text(encoding="utf-8"))
        with open_bytes(place / RECORDS) as file:
            records = [json.loads(line) for _, line in read_lines(file)]
    except (OSError, ValueError, InputError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{folder} holds no evaluation ({reason}); give a folder that mora-jax eval --task wrote with --out"
        ) from None
    if result.get("task") != task:
        raise InputError(f"{folder} is an evaluation of task {result.get('task')}, not of {task}")
    return records


def compare_with(folder: str, result: TaskResult, metrics: Sequence[TaskMetric]) -> dict[str, Comparison]:
    """Compares an evaluation with one that was written before, in pairs of examples."""
    return compare([one.metric for one in metrics], result.records, read_records(folder, result.task))


def result_table(result: TaskResult, comparison: Mapping[str, Comparison] | None = None) -> str:
    """Metrics with their standard errors, baselines and confusion matrix, in lines for people."""
    count = len(result.records) - result.skipped
    lines = [f"{result.task}, {count} example{'s' if count > 1 else ''}"]
    width = max(map(len, (*result.metrics, *result.baselines)))
    lines += estimate_lines(result.metrics, width)
    meanings = {"majority": "always the commonest answer", "chance": "guessing"}
    lines += [f"  {name:{width}}  {value:8.4f}  {meanings[name]}" for name, value in result.baselines.items()]
    if result.confusion is not None:
        lines += ["", *_confusion_lines(**result.confusion)]
    if comparison:
        lines += ["", "difference from the other evaluation, in pairs, with its 95 % interval"]
        for name, one in comparison.items():
            text = f"  {name:{width}}  {one.value:.4f} - {one.other:.4f} = {one.difference:+.4f}"
            if one.low is not None and one.high is not None:
                text += f"  [{one.low:+.4f}, {one.high:+.4f}]"
            lines.append(text + ("" if one.p_value is None else f"  McNemar p {one.p_value:.3g}"))
    return "\n".join(lines)


def estimate_lines(metrics: Mapping[str, Estimate], width: int = 0) -> list[str]:
    """A line a metric: its name, in `width` characters or the longest name's, its value and standard error."""
    width = max((width, *map(len, metrics)))
    return [f"  {name:{width}}  {_shown(one.value, one.stderr)}" for name, one in metrics.items()]


def _shown(value: float, stderr: float | None) -> str:
    form = ".4f" if abs(value) < 1000 else ".4g"
    text = f"{value:8{form}}"
    return text if stderr is None else f"{text} ± {stderr:{form}}"


def _confusion_lines(labels: Sequence[str], matrix: Sequence[Sequence[int]]) -> list[str]:
    heads = [f"{label:.16}" for label in labels]
    rows = [[head, *map(str, row[: len(heads)])] for head, row in zip(heads, matrix, strict=True)]
    lines = as_text(table(["", *heads], rows)).split("\n")
    return ["rows: the answer; columns: the prediction", *(f"  {line}" for line in lines)]
