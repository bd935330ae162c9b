"""A run's result on the HuggingFace hub, with a model card that says what it is."""

import importlib.metadata
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import yaml

from mora_jax.errors import InputError
from mora_jax.interop.hub import is_hub_id
from mora_jax.paths import local_path
from mora_jax.training.config.schema import Config
from mora_jax.training.run.directory import RunDirectory
from mora_jax.training.run.saving import result_name
from mora_jax.training.setup import describe_loss
from mora_jax.training.update_rules import OBJECT

#: What of a summary is a score, in words, in the card's order; tasks' and preferences' come behind these.
_SCORES = {
    "eval_loss": "held-out loss",
    "eval_perplexity": "held-out perplexity of answers",
    "eval_accuracy": "held-out tokens of answers that are likeliest",
}
_PACKAGES = ("mora-jax", "jax", "flax", "optax")


def push_to_hub(
    run: str | os.PathLike[str],
    repo_id: str,
    *,
    licence: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload from mora-jax",
) -> str:
    """Uploads the result of a run, an adapter or a model, with a card that is written from the run.

    Args:
        run: a finished run's directory.
        repo_id: OWNER/NAME on the hub; made where it isn't there yet.
        licence: of the result, as the hub calls it, such as "apache-2.0"; None: what the base model's card says, where
            that is beside its weights.
        private: whether only its owner sees a repository that is made; None: the owner's default.
        token: of the hub; None: that of `hf auth login`, or of the environment.
        commit_message: of the upload.

    Returns:
        The address of the upload.

    Raises:
        InputError: the run has no result yet, `repo_id` is none, or the hub can't be reached or refuses.

    Examples:
        >>> import mora_jax as mj
        >>> mj.push_to_hub("runs/dolly", "someone/dolly-lora", licence="apache-2.0")  # doctest: +SKIP
    """
    directory = RunDirectory(os.fspath(run), writes=False)
    config, summary = directory.read_config(), directory.read_json("summary.json")
    if not summary:
        raise InputError(f"{directory.path} has not ended: continue it with mora-jax train --resume {directory.path}")
    folder = local_path(directory.path) / result_name(config)
    if not folder.is_dir():
        raise InputError(f"{directory.path} holds no result: there is no folder {folder.name} in it")
    card = model_card(config, summary, repo_id, licence=licence)
    return upload(folder, repo_id, card, private=private, token=token, commit_message=commit_message)


def upload(
    folder: Path, repo_id: str, card: str, *, private: bool | None, token: str | None, commit_message: str
) -> str:
    """Uploads a folder with a card as its README.md; arguments, result and errors as of `push_to_hub`."""
    if not is_hub_id(repo_id):
        raise InputError(f"repo_id should be OWNER/NAME on the hub, and is {repo_id!r}")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="mora-jax-") as temporary:
            (Path(temporary) / "README.md").write_text(card, encoding="utf-8")
            # The card first: a result without its description is never there.
            for source in (Path(temporary), folder):
                done = api.upload_folder(
                    folder_path=str(source),
                    repo_id=repo_id,
                    commit_message=commit_message,
                    ignore_patterns=[] if source != folder else ["README.md", ".*"],
                )
    except (OSError, ValueError, HfHubHTTPError) as error:
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{repo_id} could not be written to the hub: {cause}; log in with hf auth login, or give token="
        ) from None
    return str(done)


def model_card(config: Config, summary: Mapping[str, Any], repo_id: str, *, licence: str | None = None) -> str:
    """The card of a result, in Markdown with the hub's fields before it.

    Paths of this machine are not in it: of files it has the names alone.

    Args:
        config: of the run.
        summary: what `summary.json` holds.
        repo_id: where the result will be.
        licence: as for `push_to_hub`.
    """
    base = config.model.path or ""
    is_model = config.adapter.config_class.changes_base
    on_hub = is_hub_id(base) and not local_path(base).exists()
    licence = licence or _licence_of(base)
    data = config.data.train or ()
    fields: dict[str, Any] = {
        "base_model": base if on_hub else None,
        "library_name": "transformers" if is_model else "peft" if config.adapter.config_class.in_peft else "mora-jax",
        "license": licence,
        "pipeline_tag": "text-generation",
        "tags": ["mora-jax", config.adapter.method, *([] if is_model else ["adapter"])],
        "datasets": [name for name in data if is_hub_id(name) and not local_path(name).exists()] or None,
    }
    head = yaml.safe_dump({name: value for name, value in fields.items() if value is not None}, sort_keys=False)
    trained, total = summary.get("trainable_parameters"), summary.get("total_parameters")
    optimizer, train = config.optimizer, config.train
    share = summary.get("trained_fraction")
    facts = {
        "base": base if on_hub else PurePath(base).name,
        "method": summary.get("method_settings") or config.adapter.method,
        "trained": f"{trained:,} of {total:,} parameters ({trained / total:.2%})" if trained and total else None,
        "data": ", ".join(name if is_hub_id(name) else PurePath(name).name for name in data),
        "loss": describe_loss(config.loss) + (f"; {share:.1%} of the tokens carry loss" if share else ""),
        "steps": f"{summary.get('steps')} of {train.batch_size} rows, at most {config.data.max_length} tokens a row",
        "optimizer": "an optax object"
        if optimizer.name == OBJECT
        else f"{optimizer.name}, learning rate {optimizer.learning_rate:g}, {optimizer.schedule}, "
        f"{optimizer.warmup_steps} steps of warm-up, weight decay {optimizer.weight_decay:g}",
        "seed": str(config.seed),
        "versions": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES),
        "licence": licence or "not stated: that of the base holds, and that of the data",
    }
    lines = [f"| {name} | {value} |" for name, value in facts.items() if value]
    kind = "A language model" if is_model else f"A {config.adapter.method} adapter"
    parts = [
        f"---\n{head}---\n\n# {repo_id.rpartition('/')[2]}\n",
        f"{kind}, trained with mora-jax from {facts['base']}.\n",
        "## Training\n\n| | |\n| --- | --- |\n" + "\n".join(lines) + "\n",
        _scores(summary, "" if config.loss.preference else " of answers, nats a token"),
        f"## Use\n\n{_usage(is_model, config.adapter.config_class.in_peft, base if on_hub else 'BASE', repo_id)}",
    ]
    return "\n".join(part for part in parts if part)


def _scores(summary: Mapping[str, Any], unit: str) -> str:
    """A table of what was measured on held-out data, with standard errors; `unit` is that of the loss."""
    names = [name for name in _SCORES if summary.get(name) is not None]
    numbers = [name for name, value in summary.items() if isinstance(value, float) and math.isfinite(value)]
    names += [
        name for name in numbers if name.startswith("eval_") and not name.endswith("_stderr") and name not in _SCORES
    ]
    if not names:
        return "## Scores\n\nNone: the run had no data to evaluate on.\n"
    lines = []
    for name in names:
        error = summary.get(f"{name}_stderr")
        spread = "" if error is None else f" ± {error:.3g}"
        title = _SCORES.get(name, name.removeprefix("eval_").replace("_", " ")) + (unit if name == "eval_loss" else "")
        lines.append(f"| {title} | {summary[name]:.4g}{spread} |")
    table = "\n".join(lines)
    return f"## Scores\n\n| | value ± standard error |\n| --- | ---: |\n{table}\n"


def _usage(is_model: bool, pefts: bool, base: str, repo_id: str) -> str:
    """How the result is loaded, as code."""
    ours = f'model, tokenizer = mj.load_pretrained("{repo_id if is_model else base}")'
    lines = ["import mora_jax as mj", "", ours, *([] if is_model else [f'mj.load_adapter(model, "{repo_id}")'])]
    blocks = ["\n".join(lines)]
    if is_model:
        other = f'AutoModelForCausalLM.from_pretrained("{repo_id}")'
        blocks.append(f"from transformers import AutoModelForCausalLM\n\nmodel = {other}")
    elif pefts:
        other = f'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{repo_id}")'
        imports = "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM"
        blocks.append(f"{imports}\n\nmodel = {other}")
    return "\n\n".join(f"```python\n{block}\n```" for block in blocks) + "\n"


def _licence_of(base: str) -> str | None:
    """What the card beside a base model's weights says; None where there is none, or it says nothing."""
    from huggingface_hub import metadata_load

    try:
        licence = (metadata_load(local_path(base) / "README.md") or {}).get("license")
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return licence if isinstance(licence, str) else None
