"""The model `mora_jax` of EleutherAI's lm-evaluation-harness: what its tasks ask, answered by a `Decoder`.

Importing this module registers the model (`mora_jax.cli.lm_eval` does so for the harness's command line, which looks
for no models of other packages). Texts become tokens as in the harness's own model `hf`, so that items compare.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import inspect
import json
import pickle
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jinja2
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models import utils as harness
from tqdm import tqdm

from mora_jax.data.conversation import Conversation, Message
from mora_jax.data.templates.render import Renderer
from mora_jax.errors import InputError, refused
from mora_jax.evaluation.chat import complete_batch, stated_stop_ids
from mora_jax.evaluation.generate import Generator, Sampling
from mora_jax.evaluation.loglikelihood import LoglikelihoodScorer, windows
from mora_jax.interop import load_adapter, load_pretrained
from mora_jax.interop.hub import adapter_folder
from mora_jax.interop.read_adapter import bare
from mora_jax.models.decoder import Decoder

# While a cache is written, results are handed to it after so many batches.
SAVED_BATCHES = 32
# Generation arguments without effect at these values; `until` and the number of tokens apart, others are refused.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "repetition_penalty": (1, 1.0),
    "top_k": (0, -1),
    "min_p": (0, 0.0),
    "use_cache": (True, False),
}
# Those that say how tokens are drawn, and nothing where the likeliest are taken.
DRAWING = ("top_k", "top_p", "min_p")

_shared: dict[Any, tuple[Decoder, Any]] | None = None


@contextlib.contextmanager
def one_base() -> Iterator[None]:
    """Models that are made within it share the arrays of a base that they name alike: it is loaded once."""
    global _shared
    before, _shared = _shared, {} if _shared is None else _shared
    try:
        yield
    finally:
        _shared = before


@register_model("mora_jax")
class MoraJaxLM(TemplateLM):
    """A decoder, with or without an adapter, for `lm_eval.simple_evaluate`.

    Each process of `jax.distributed` takes its share of a task's items and holds the whole model.

    Args:
        pretrained: a HuggingFace folder, a hub id, or a model that is loaded already; that is not changed.
        adapter: an adapter folder, a run directory that holds one, or a hub id; None: what the model carries.
        tokenizer: of a model that is loaded already.
        dtype: "float32" or "bfloat16"; None or "auto": the machine's default.
        quantize: how the base is held: "none", "int8" or "nf4".
        adapter_kind: the kind of a MoRA adapter, where its file has an older one.
        batch_size: rows computed at once.
        max_length: most tokens of an input; None: the model's context.
        max_gen_toks: most tokens of an answer, where a task doesn't say.
        template: what chat messages are rendered with, as `data.template`; None: the tokenizer's own template.
        chat_template_args: further arguments of the tokenizer's own template.
        think_end_token: text that ends a model's reasoning; an answer begins behind it.
        add_bos_token: whether texts begin with a beginning-of-sequence token; None: as the tokenizer has it.
        prefix_token_id: the token before a text that has no context; None: the tokenizer's bos_token, or its eos_token.
        seed: equal seeds give equal draws, where a task has answers drawn.
        device: JAX's own platform; another is refused.
        max_batch_size: refused.

    Raises:
        InputError: an argument is unknown or can't be used, or what it names can't be loaded.
    """

    model: Decoder

    def __init__(
        self,
        pretrained: Any = None,
        adapter: Any = None,
        *,
        tokenizer: Any = None,
        dtype: str | None = None,
        quantize: str = "none",
        adapter_kind: str | None = None,
        batch_size: int | str = 8,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        template: str | None = None,
        chat_template_args: Mapping[str, Any] | None = None,
        think_end_token: str | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        seed: int = 0,
        device: str | None = None,
        max_batch_size: int | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        _refuse(unknown, device, max_batch_size)
        sizes = {"batch_size": batch_size, "max_length": max_length, "max_gen_toks": max_gen_toks}
        rows, longest, self.max_gen_toks = (_positive(name, size) for name, size in sizes.items())
        # Before the base: a wrong path is told at once.
        folder = None if adapter is None else adapter_folder(str(adapter))
        model: Any
        model, self.tokenizer = _load(pretrained, tokenizer, dtype, quantize)
        if folder is not None:
            model = bare(model)
            load_adapter(model, folder, kind=adapter_kind)
        self.model, self.adapter, self.batch_size = model, adapter, rows
        context = model.config.max_positions
        if longest is not None and longest > context:
            raise InputError(f"max_length is {longest}, but the model's context has {context} tokens")
        self.max_length = longest or context
        self.add_bos_token, self.seed = add_bos_token, seed
        self._renderer = None if template is None else Renderer(self.tokenizer, template)
        self._template_args, self._think_end = dict(chat_template_args or {}), think_end_token
        self._scorer = LoglikelihoodScorer(model, self.tokenizer, batch_size=rows, max_length=self.max_length)
        self._prefix = self._scorer.prefix_id if prefix_token_id is None else prefix_token_id
        self._stop_ids = stated_stop_ids(model, self.tokenizer)
        self._generator: Generator | None = None
        if jax.process_count() > 1 and importlib.util.find_spec("torch") is None:
            raise InputError("the harness needs torch where several processes work together: pip install torch")
        self._rank, self._world_size, self._device = jax.process_index(), jax.process_count(), "cpu"

    # What the harness asks about tokens.

    @property
    def eot_token_id(self) -> int | None:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context."""
        if self._prefix is None:
            raise InputError("the tokenizer has neither a bos_token nor an eos_token; give prefix_token_id")
        return self._prefix

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The tokens of a text, with those that the tokenizer adds, unless the text begins with one already."""
        if add_special_tokens is None:
            first = self._prefix
            begins = first is not None and harness.has_bos_prefix(string, self.tokenizer.decode([first]))
            add_special_tokens = False if begins else self.add_bos_token
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer(string, verbose=False, **options)["input_ids"]

    # Log-likelihoods.

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy) of continuations, given as (texts, context, continuation)."""
        # Long ones first; those of one context together, since they share an input.
        order = sorted(range(len(requests)), key=lambda i: (-len(requests[i][1] + requests[i][2]), requests[i][1]))
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        with self._bar(len(requests), "log-likelihoods", disable_tqdm) as bar:
            for part in self._parts(order):
                scores = self._scorer.score([requests[number][1:] for number in part], _advance(bar))
                for number, score in zip(part, scores, strict=True):
                    results[number] = (score.logprob, score.is_greedy)
                    self.cache_hook.add_partial("loglikelihood", requests[number][0], results[number])
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, in windows of `max_length` tokens, each token once."""
        texts = [request.args[0] for request in requests]
        cut = [windows(self.tok_encode(text), self.prefix_token_id, self.max_length) for text in texts]
        totals = [0.0] * len(texts)
        with self._bar(sum(map(len, cut)), "rolling log-likelihoods", disable_tqdm) as bar:
            for part in self._parts(range(len(texts))):
                scores = iter(self._scorer.score([pair for number in part for pair in cut[number]], _advance(bar)))
                for number in part:
                    totals[number] = sum((next(scores).logprob for _ in cut[number]), 0.0)
                    self.cache_hook.add_partial("loglikelihood_rolling", (texts[number],), totals[number])
        return totals

    def _parts(self, numbers: Sequence[int]) -> list[Sequence[int]]:
        """All at once, or with a cache so many as may be lost when the run ends early."""
        size = len(numbers) if self.cache_hook.dbdict is None else SAVED_BATCHES * self.batch_size
        return [numbers[start : start + size] for start in range(0, len(numbers), size)]

    # Generation.

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers to prompts, up to a stop sequence, which is left out."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(number)
        plans = [(self._plan(requests[numbers[0]].args[1]), numbers) for numbers in groups.values()]
        answers = [""] * len(requests)
        with self._bar(len(requests), "answers", disable_tqdm) as bar:
            for plan, numbers in plans:
                prompts = {number: self._prompt(requests[number].args[0], plan.max_new_tokens) for number in numbers}
                for part in self._parts(sorted(numbers, key=lambda number: -len(prompts[number]))):
                    texts = self._answers(plan, {number: prompts[number] for number in part}, _advance(bar))
                    for number, text in zip(part, texts, strict=True):
                        answers[number] = text
                        self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return answers

    def _plan(self, arguments: Mapping[str, Any]) -> _Plan:
        """What generation arguments of a task ask for.

        Raises:
            InputError: one of them is not supported, or leaves no room for the prompt.
        """
        wanted = harness.normalize_gen_kwargs(dict(arguments), self.max_gen_toks)
        stop = [text for text in wanted.pop("until") if text]
        eos = None if self.eot_token_id is None else self.tokenizer.decode([self.eot_token_id])
        stop = harness.handle_stop_sequences(stop, eos)
        count, drawn = wanted.pop("max_gen_toks"), wanted.pop("do_sample")
        temperature = float(wanted.pop("temperature", 0.0) or 0.0)
        rest = {name: value for name, value in wanted.items() if value is not None}
        if not drawn:
            rest = {name: value for name, value in rest.items() if name not in DRAWING}
        top_p = rest.pop("top_p", 1.0)
        unsupported = [f"{name}={value}" for name, value in rest.items() if value not in NEUTRAL.get(name, ())]
        if unsupported:
            raise InputError(
                f"generation arguments {', '.join(unsupported)} are not supported; there are until, max_gen_toks, "
                "do_sample, temperature and top_p"
            )
        if drawn and temperature == 0:
            raise InputError("do_sample=True needs a temperature above 0 beside it")
        with refused("generation arguments"):
            sampling = Sampling(temperature if drawn else 0.0, float(top_p), self.seed)
        if not 0 < count < self.max_length:
            raise InputError(
                f"max_gen_toks={count} must be at least 1 and leave room for the prompt in max_length={self.max_length}"
            )
        # A special token is not in the text, where it could be found.
        special = self.tokenizer.get_added_vocab()
        return _Plan(sampling, stop, count, self._stop_ids | {special[text] for text in stop if text in special})

    def _prompt(self, text: str, room: int) -> list[int]:
        """The tokens of a prompt: its end, where they leave no room for the answer."""
        return (self.tok_encode(text) or [self.prefix_token_id])[room - self.max_length :]

    def _answers(self, plan: _Plan, prompts: Mapping[int, list[int]], progress: Any) -> list[str]:
        """The answers to prompts by their requests' numbers, to which draws belong."""
        if self._generator is None:
            self._generator = Generator(self.model)
        self._generator.stop_ids, self._generator.sampling = plan.stop_ids, plan.sampling

        def ended(tokens: np.ndarray) -> bool:
            text = self.tokenizer.decode(tokens)
            return any(stop in text for stop in plan.stop)

        answers = complete_batch(
            self._generator,
            list(prompts.values()),
            max_new_tokens=plan.max_new_tokens,
            batch_size=self.batch_size,
            numbers=[number * self.world_size + self.rank for number in prompts],
            ended=ended,
            progress=progress,
        )
        texts = (self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in answers)
        return [harness.postprocess_generated_text(text, plan.stop, self._think_end) for text in texts]

    # Chat.

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt of messages; without a generation prompt the last one, the assistant's, is left open.

        Raises:
            InputError: there is no template.
        """
        if self._renderer is not None:
            messages = tuple(Message(one["role"], one["content"]) for one in chat_history)
            if add_generation_prompt:
                return self._renderer.prompt(messages)
            text, last = self._renderer.render(Conversation(messages)).text, messages[-1].content
            return text[: text.rindex(last) + len(last)]
        if not self.tokenizer.chat_template:
            raise InputError("the tokenizer has no chat template: give template=alpaca or another in model_args")
        options = {
            "tokenize": False,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
            **self._template_args,
        }
        try:
            return self.tokenizer.apply_chat_template(chat_history, **options)
        except jinja2.TemplateError:  # of a template that knows no system messages
            rest = [message for message in chat_history if message["role"] != "system"]
            return self.tokenizer.apply_chat_template(rest, **options)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template in use, for the harness's records."""
        if self._renderer is not None:
            return self._renderer.program if chat_template else None
        return super().chat_template(chat_template) if self.tokenizer.chat_template else None

    @property
    def tokenizer_name(self) -> str:
        """What the harness keys its cache of requests with."""
        name = str(self.tokenizer.name_or_path).replace("/", "__")
        return name if self._renderer is None else f"{name}-{self._renderer.template.replace('/', '__')}"

    # Several processes.

    def all_gather(self, tensor: Any) -> Any:
        """A torch scalar of each process, as one tensor `[processes]`."""
        if self.world_size == 1:
            return tensor
        return tensor.new_tensor(np.asarray(multihost_utils.process_allgather(tensor.cpu().numpy())).reshape(-1))

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """The objects of all processes, on process `dst`; None on the others."""
        if self.world_size == 1:
            return [obj]
        data = np.frombuffer(pickle.dumps(obj), np.uint8)
        sizes = np.asarray(multihost_utils.process_allgather(np.int32(data.size))).reshape(-1)
        padded = np.zeros(sizes.max(), np.uint8)
        padded[: data.size] = data
        rows = np.asarray(multihost_utils.process_allgather(padded))
        if self.rank != dst:
            return None
        return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]

    def barrier(self) -> None:
        """Waits for the other processes."""
        if self.world_size > 1:
            multihost_utils.sync_global_devices("lm_eval")

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into its results."""
        count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(self.model, nnx.Param)))
        info = {"model_num_parameters": count, "model_dtype": str(np.dtype(self.model.dtype))}
        return info if self.adapter is None else {**info, "adapter": str(self.adapter)}

    def _bar(self, total: int, what: str, disabled: bool) -> tqdm:
        return tqdm(total=total, desc=what, disable=disabled or self.rank != 0)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """How answers are made."""

    sampling: Sampling
    stop: list[str]
    max_new_tokens: int
    stop_ids: frozenset[int]


def _advance(bar: tqdm) -> Any:
    """A progress callback; each call of `score` counts from 0 again."""
    before = bar.n
    return lambda done, _: bar.update(before + done - bar.n)


def _load(pretrained: Any, tokenizer: Any, dtype: str | None, quantize: str) -> tuple[Decoder, Any]:
    if isinstance(pretrained, Decoder):
        if tokenizer is None:
            raise InputError("give the tokenizer of a model that is loaded already: tokenizer=...")
        return pretrained, tokenizer
    if pretrained is None:
        raise InputError("model_args lack pretrained=: a HuggingFace folder or a hub id")
    if tokenizer is not None:
        raise InputError("tokenizer= belongs to a model that is loaded already; a folder has its own")
    key = (str(pretrained), dtype, quantize)
    if _shared is not None and key in _shared:
        return _shared[key]
    model, tokenizer = load_pretrained(pretrained, dtype=None if dtype == "auto" else dtype, quantize=quantize)
    if tokenizer is None:
        raise InputError(f"{pretrained} has no tokenizer files; give a folder with tokenizer.json beside the weights")
    if _shared is not None:
        _shared[key] = (model, tokenizer)
    return model, tokenizer


def _refuse(unknown: Mapping[str, Any], device: str | None, max_batch_size: int | None) -> None:
    # The harness's command says cuda:0 where its user says nothing.
    if device not in (None, "cuda:0") and str(device).partition(":")[0].replace("cuda", "gpu") != jax.default_backend():
        raise InputError(f"device={device}: JAX chooses its device itself; the variable JAX_PLATFORMS names another")
    if max_batch_size is not None:
        raise InputError("max_batch_size goes with batch_size=auto, which is not supported: give batch_size a number")
    if unknown:
        known = [name for name in inspect.signature(MoraJaxLM).parameters if name != "unknown"]
        hint = "; an adapter folder is given as adapter=" if "peft" in unknown else ""
        raise InputError(f"unknown model_args {', '.join(unknown)}{hint}; there are {', '.join(known)}")


def _positive(name: str, value: Any) -> Any:
    if value is None and name == "max_length":
        return None
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name} must be a positive whole number, got {value!r}")
    return value
