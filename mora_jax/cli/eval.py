"""Score a model on a data file: perplexity and next-token accuracy over the tokens that carry loss, or with --task the
metrics of a task with their standard errors:

  mora-jax eval --model M --data rows.jsonl
  mora-jax eval --model M --adapter A --task arc_easy --data arc_easy.jsonl --limit 200 --out runs/arc --json

Rows that judge answers are scored by an objective of preferences, against the model without its adapter:

  mora-jax eval --model M --adapter A --data pairs.jsonl --objective dpo
"""

import argparse
import json
import math
import sys
from typing import Any

from mora_jax.cli.options import ADAPTER, add_data, add_key, add_keys, add_model, add_number, add_out, load
from mora_jax.display.progress import progress
from mora_jax.errors import InputError

HELP = "perplexity and accuracy on a data file, or a task's metrics"

# Options that say how a row becomes a conversation with loss weights, which a task says itself.
_WITHOUT_TASK = (
    "format", "columns", "roles", "on_error", "max_rows", "template", "fallback", "truncation", "cache", "loss_mode",
    "prompt_weight", "loss_roles", "end_of_turn", "headers", "objective", "beta",
)  # fmt: skip
_WITH_TASK = ("limit", "shots", "metrics", "out", "overwrite", "compare", "fsdp", "tensor", "expert")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    add_model(parser)
    parser.add_argument("--adapter", metavar="A", help=ADAPTER)
    add_data(parser)
    add_key(parser, "--batch-size", "train.batch_size", help="Rows computed at once", default=8)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_keys(parser, "loss", "objective", "beta")
    group = parser.add_argument_group("tasks", "--max-length is then the longest input, by default the model's context")
    group.add_argument("--task", metavar="NAME", help="arc_easy, boolq, gsm8k, ..., or a task file NAME.toml")
    add_number(group, "--limit", int, None, "Takes so many rows, drawn with a fixed seed", at_least=1)
    add_number(group, "--shots", int, 0, "Solved examples before each, drawn from the other rows", at_least=0)
    group.add_argument("--metrics", metavar="NAMES", help="metrics in place of the task's own, separated by commas")
    group.add_argument("--compare", metavar="DIR", help="folder of another model's evaluation, compared in pairs")
    add_keys(group, "mesh", "fsdp", "tensor", "expert")
    add_out(group)
    given = {name: parser.get_default(name) for name in (*_WITHOUT_TASK, *_WITH_TASK, "max_length")}
    parser.set_defaults(defaults=given, max_length=None)


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code."""
    apart, reason = (_WITH_TASK, "needs --task") if args.task is None else (_WITHOUT_TASK, "can't be given with --task")
    for name in apart:
        if getattr(args, name) != args.defaults[name]:
            raise InputError(f"--{name.replace('_', '-')} {reason}")
    if args.task is not None:
        return _run_task(args)
    from mora_jax.cli.options import read_data
    from mora_jax.data.preferences import refuse_preferences
    from mora_jax.evaluation.perplexity import score
    from mora_jax.training.config.schema import LossConfig

    loss = LossConfig(objective=args.objective, beta=args.beta)
    if loss.preference is None and args.beta is not None:
        raise InputError("--beta is of an objective of preferences: give --objective too")
    if loss.preference is not None and loss.preference.referenced and args.adapter is None:
        raise InputError(
            f"--objective {args.objective} compares with the model without its adapter: give --adapter, or an "
            "objective without a reference (orpo, simpo, cpo)"
        )
    args.max_length = args.max_length or args.defaults["max_length"]
    model, tokenizer = load(args, args.adapter, args.dtype, args.quantize)
    dataset = read_data(args, tokenizer, model.config.vocab_size)
    for note in dataset.report.notes:
        print(f"note: {note}", file=sys.stderr)
    about = {"dropped": dataset.report.dropped, "template": dataset.report.template}
    about |= {"model": args.model, "adapter": args.adapter}
    if loss.preference is not None:
        return _score_preferences(args, model, dataset, loss, about)
    refuse_preferences(dataset.store)
    with progress("scoring") as report:
        scores = score(model, dataset, batch_size=args.batch_size, progress=report)
    if not math.isfinite(scores.nll):
        raise InputError(f"{args.model} gives a loss of {scores.nll} on {', '.join(args.data)}; try --dtype float32")
    result = {**scores.to_dict(), "examples": len(dataset), "loss_mode": args.loss_mode, **about}
    print(json.dumps(result) if args.json else str(scores))
    return 0


def _score_preferences(args: argparse.Namespace, model: Any, answers: Any, loss: Any, about: dict[str, Any]) -> int:
    """Scores judged answers; the reference is the model without its adapter."""
    from mora_jax.data.preferences import PreferenceDataset
    from mora_jax.evaluation.preferences import answer_scores, preference_metrics
    from mora_jax.evaluation.tasks.results import estimate_lines

    objective = loss.preference
    dataset = PreferenceDataset(answers, labelled=objective.labelled)
    base, size = objective.referenced, args.batch_size
    with progress("scoring") as report:
        scores = answer_scores(model, dataset, batch_size=size, base=base, progress=report)
    metrics = preference_metrics(dataset, scores, objective, loss.settings)
    if not math.isfinite(metrics["loss"].value):
        raise InputError(f"{args.model} gives no finite loss on {', '.join(args.data)}; try --dtype float32")
    if args.json:
        about |= {name: one.value for name, one in metrics.items()}
        about |= {f"{name}_stderr": one.stderr for name, one in metrics.items()}
        about |= {"objective": args.objective, "beta": loss.settings.beta, "examples": len(dataset)}
        print(json.dumps(about))
    else:
        print(f"{args.objective}, beta {loss.settings.beta:g}, {len(dataset)} examples")
        print("\n".join(estimate_lines(metrics)))
    return 0


def _run_task(args: argparse.Namespace) -> int:
    """Evaluates a task; what can be refused is refused before the model is loaded."""
    from mora_jax.evaluation.metrics.estimate import in_order_of
    from mora_jax.evaluation.tasks import examples, results
    from mora_jax.evaluation.tasks.run import metrics_of, run_task
    from mora_jax.evaluation.tasks.task import load_task
    from mora_jax.interop.atomic_folder import check_out

    task = load_task(args.task)
    if args.out is not None:
        check_out(args.out, overwrite=args.overwrite)
    where = {"split": args.split, "subset": args.subset, "streaming": args.streaming}
    rows = examples.read_rows(args.data, whole_texts=task.type == "text", **where)
    questions = examples.make_examples(task, rows, shots=args.shots, limit=args.limit)
    if args.compare is not None:
        in_order_of([vars(question) for question in questions], results.read_records(args.compare, task.name))
    metrics = metrics_of(task, questions, () if args.metrics is None else args.metrics.split(","))
    scorer = _scorer(args)
    with progress("generating" if task.type == "generate" else "scoring") as report:
        result = run_task(task, questions, scorer, metrics=metrics, progress=report)
    for note in result.notes:
        print(f"note: {note}", file=sys.stderr)
    comparison, compared = None, {}
    if args.compare is not None:
        comparison = results.compare_with(args.compare, result, metrics)
        compared = {"comparison": {name: one._asdict() for name, one in comparison.items()}}
    if args.out is not None:
        names = ("model", "adapter", "data", "limit", "shots", "batch_size", "max_length", "dtype", "compare")
        settings = {name: getattr(args, name) for name in names}
        results.write_results(args.out, result, settings, overwrite=args.overwrite, **compared)
    print(json.dumps(result.to_dict() | compared) if args.json else results.result_table(result, comparison))
    return 0


def _scorer(args: argparse.Namespace) -> Any:
    """The model, over all devices that share the rows evenly."""
    from flax import nnx

    from mora_jax.evaluation import LoglikelihoodScorer
    from mora_jax.training.build_step import put_model
    from mora_jax.training.config.schema import MeshConfig
    from mora_jax.training.sharding.mesh import make_mesh, mesh_shape
    from mora_jax.training.sharding.rules import Placement

    sizes = MeshConfig(fsdp=args.fsdp, tensor=args.tensor, expert=args.expert)
    mesh = make_mesh(*mesh_shape(sizes, args.batch_size))
    model, tokenizer = load(args, args.adapter, args.dtype, args.quantize, mesh)
    placement = Placement.of(mesh, nnx.state(model))
    if placement.partitioner is not None:
        put_model(placement, model)
    context = model.config.max_positions
    if args.max_length is not None and args.max_length > context:
        raise InputError(f"--max-length {args.max_length} is beyond the model's context of {context} tokens")
    options = {"batch_size": args.batch_size, "max_length": args.max_length, "partitioner": placement.partitioner}
    return LoglikelihoodScorer(model, tokenizer, **options)
