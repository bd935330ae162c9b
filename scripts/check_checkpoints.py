"""Compares the logits of LoRA in the programs that trained it with those of what `mora-jax convert --from` writes.

    python -m venv TUNIX && TUNIX/bin/pip install google-tunix qwix
    python -m venv GEMMA && GEMMA/bin/pip install gemma
    python -m venv KERAS && KERAS/bin/pip install keras-hub jax safetensors
    python scripts/check_checkpoints.py --peft PEFT/bin/python [--tunix TUNIX/bin/python] [--gemma GEMMA/bin/python]
        [--keras KERAS/bin/python]

Each program runs in an environment of its own, PEFT's has torch, transformers and peft, and this one mora_jax. A tiny
model with random weights is written by transformers; the program reads these weights, puts its LoRA on every matrix
that it can, with random factors, and writes its own checkpoint; that is converted, and read by PEFT and by mora_jax.
All is float32. Prints a table in Markdown; exits 1 where logits differ by more than 1e-4 of the largest.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "rms_norm_eps": 1e-6,
}
ROPE = {"rope_theta": 1_000_000.0}
GEMMA2 = {"model_type": "gemma2", "sliding_window": 4, "query_pre_attn_scalar": 16}
GEMMA3 = {"model_type": "gemma3_text", "sliding_window": 4, "query_pre_attn_scalar": 16, "num_hidden_layers": 6}
EQUAL_HEADS = {"num_key_value_heads": 4}
#: Of each program, the models by name.
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "tunix": {
        "Gemma 2": GEMMA2,
        "Gemma 3": GEMMA3,
        "Gemma 3, as many key/value heads as queries": GEMMA3 | EQUAL_HEADS,
        # Tunix 0.1.7 turns by this theta, whatever its configuration says.
        "Llama 3": {"model_type": "llama", "tie_word_embeddings": False, **ROPE},
        "Qwen 2.5": {"model_type": "qwen2", "tie_word_embeddings": True, "head_dim": 8, **ROPE},
        "Qwen 3": {"model_type": "qwen3", "tie_word_embeddings": True, **ROPE},
    },
    "gemma": {
        "Gemma 2": GEMMA2,
        "Gemma 3": GEMMA3,
        "Gemma 3, as many key/value heads as queries": GEMMA3 | EQUAL_HEADS,
    },
}
CASES["keras"] = {
    "Gemma 1": {"model_type": "gemma"},
    **CASES["gemma"],
    **{name: CASES["tunix"][name] for name in ("Qwen 2.5", "Qwen 3")},
    # Heads here are hidden_size / num_attention_heads wide, whatever the configuration says.
    "Llama 3": CASES["tunix"]["Llama 3"] | {"head_dim": 8},
}
RANK, ALPHA, BOUND = 4, 6.0, 1e-4
TOKENS = np.random.default_rng(0).integers(3, SIZES["vocab_size"], (2, 12))


def make_base(folder: Path) -> None:
    """Writes the base model of `config.json`, in PEFT's environment."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    values = json.loads((folder / "case.json").read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases, which start as constants
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder / "base")


def run_tunix(folder: Path) -> None:
    """Trains nothing: puts random LoRA on Tunix's model, in its environment."""
    import jax.numpy as jnp
    import qwix
    from flax import nnx
    from orbax import checkpoint as ocp
    from tunix.sft.checkpoint_manager import CheckpointManager

    model = tunix_model(folder / "base")
    count = TOKENS.shape[1]
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((count, count), bool)), (len(TOKENS), count, count))
    inputs = jnp.asarray(TOKENS), jnp.broadcast_to(jnp.arange(count), TOKENS.shape), None, mask
    np.save(folder / "before.npy", model(*inputs)[0])
    names = "q_einsum|kv_einsum|qkv_einsum|attn_vec_einsum|[qkvo]_proj|gate_proj|up_proj|down_proj|lm_head"
    provider = qwix.LoraProvider(module_path=f".*({names})", rank=RANK, alpha=ALPHA)
    model = qwix.apply_lora_to_model(model, provider, **model.get_model_input(), rngs=nnx.Rngs(0))
    draws = np.random.default_rng(1)
    factors = nnx.state(model, nnx.LoRAParam)
    for _, factor in nnx.to_flat_state(factors):
        factor.set_value(jnp.asarray(draws.normal(0, 0.2, factor.shape), jnp.float32))
    nnx.update(model, factors)
    np.save(folder / "after.npy", model(*inputs)[0])
    manager = CheckpointManager(str(folder / "checkpoint"))
    manager.save(1, model, force=True)
    manager.save(2, model, save_only_lora_params=True, force=True)
    manager.close()
    # As it is saved without Tunix, by who has only Qwix.
    ocp.PyTreeCheckpointer().save(folder / "qwix", nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam)))


def tunix_model(base: Path) -> Any:
    """Tunix's class for a HuggingFace folder, with its weights by Tunix's own loader."""
    import jax.numpy as jnp

    values = json.loads((base / "config.json").read_text(encoding="utf-8"))
    sizes: dict[str, Any] = {
        "num_layers": values["num_hidden_layers"],
        "embed_dim": values["hidden_size"],
        "hidden_dim": values["intermediate_size"],
        "num_heads": values["num_attention_heads"],
        "num_kv_heads": values["num_key_value_heads"],
        "head_dim": values["head_dim"],
    }
    theta = values.get("rope_theta") or values["rope_parameters"].get("rope_theta")
    turned = {"vocab_size": values["vocab_size"], "rope_theta": theta, "norm_eps": values["rms_norm_eps"]}
    match values["model_type"]:
        case "gemma2":
            from tunix.models.gemma import model as classes, params_safetensors as loader

            kinds = {"sliding_attention": "LOCAL_SLIDING", "full_attention": "GLOBAL"}
            config = classes.ModelConfig(
                **sizes,
                num_embed=values["vocab_size"],
                final_logit_softcap=values["final_logit_softcapping"],
                attn_logits_soft_cap=values["attn_logit_softcapping"],
                use_post_attn_norm=True,
                use_post_ffw_norm=True,
                attention_types=[classes.AttentionType[kinds[kind]] for kind in values["layer_types"]],
                sliding_window_size=values["sliding_window"],
            )
        case "gemma3_text":
            from tunix.models.gemma3 import model as classes, params_safetensors as loader

            config = classes.ModelConfig(
                **sizes,
                num_embed=values["vocab_size"],
                sliding_window_size=values["sliding_window"],
                global_base_frequency=1_000_000,
                param_dtype=jnp.float32,
            )
        case "llama":
            from tunix.models.llama3 import model as classes, params as loader

            config = classes.ModelConfig(**sizes, **turned, weight_tying=values["tie_word_embeddings"])
        case "qwen2" | "qwen3" as kind:
            if kind == "qwen2":
                from tunix.models.qwen2 import model as classes, params as loader
            else:
                from tunix.models.qwen3 import model as classes, params as loader
            config = classes.ModelConfig(**sizes, **turned, use_tied_embedding=values["tie_word_embeddings"])
    return loader.create_model_from_safe_tensors(str(base), config, dtype=jnp.float32)


def run_gemma(folder: Path) -> None:
    """Trains nothing: puts random LoRA on gemma's model, in its environment."""
    import dataclasses

    import jax
    import jax.numpy as jnp
    from gemma import gm, peft
    from safetensors.numpy import load_file

    values = json.loads((folder / "base" / "config.json").read_text(encoding="utf-8"))
    is_third = values["model_type"] == "gemma3_text"
    like = gm.nn.Gemma3_1B if is_third else gm.nn.Gemma2_2B
    kinds = {"sliding_attention": "LOCAL_SLIDING", "full_attention": "GLOBAL"}
    config = dataclasses.replace(
        like.config,
        num_embed=values["vocab_size"],
        embed_dim=values["hidden_size"],
        hidden_dim=values["intermediate_size"],
        num_heads=values["num_attention_heads"],
        num_kv_heads=values["num_key_value_heads"],
        head_dim=values["head_dim"],
        sliding_window_size=values["sliding_window"],
        attention_types=tuple(gm.nn.AttentionType[kinds[kind]] for kind in values["layer_types"]),
    )
    model = like(config=config, dtype=jnp.float32)
    params = gemma_params(load_file(folder / "base" / "model.safetensors"), config)
    tokens = jnp.asarray(TOKENS)
    np.save(folder / "before.npy", model.apply({"params": params}, tokens).logits)
    model = gm.nn.LoRA(rank=RANK, model=model, dtype=jnp.float32)
    draws = np.random.default_rng(1)
    shapes = peft.split_params(jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]).lora
    lora = jax.tree.map(lambda factor: jnp.asarray(draws.normal(0, 0.2, factor.shape), jnp.float32), shapes)
    params = peft.merge_params(params, lora)
    np.save(folder / "after.npy", model.apply({"params": params}, tokens).logits)
    gm.ckpts.save_params(params, folder / "checkpoint" / "1", wait_until_finished=True)
    gm.ckpts.save_params(lora, folder / "checkpoint" / "2", wait_until_finished=True)


def gemma_params(tensors: dict[str, np.ndarray], config: Any) -> dict[str, Any]:
    """The parameters of gemma's model out of the tensors of a HuggingFace folder."""

    def heads(tensor: np.ndarray, count: int) -> np.ndarray:
        return tensor.reshape(count, config.head_dim, config.embed_dim).transpose(0, 2, 1)

    tree: dict[str, Any] = {
        "embedder": {"input_embedding": tensors["model.embed_tokens.weight"]},
        "final_norm": {"scale": tensors["model.norm.weight"]},
    }
    for layer in range(config.num_layers):
        of_layer = {
            name.removeprefix(f"model.layers.{layer}.").removesuffix(".weight"): tensor
            for name, tensor in tensors.items()
            if name.startswith(f"model.layers.{layer}.")
        }
        query, key, value, out = (of_layer[f"self_attn.{name}_proj"] for name in "qkvo")
        q = heads(query, config.num_heads)
        kv = [heads(key, config.num_kv_heads), heads(value, config.num_kv_heads)]
        attention = {"attn_vec_einsum": {"w": out.T.reshape(config.num_heads, config.head_dim, config.embed_dim)}}
        if config.num_heads == config.num_kv_heads:
            attention["qkv_einsum"] = {"w": np.stack([q, *kv])}
        else:
            attention |= {"q_einsum": {"w": q}, "kv_einsum": {"w": np.stack(kv)}}
        if config.use_qk_norm:
            attention["_query_norm"] = {"scale": of_layer["self_attn.q_norm"]}
            attention["_key_norm"] = {"scale": of_layer["self_attn.k_norm"]}
        gating = np.stack([of_layer["mlp.gate_proj"], of_layer["mlp.up_proj"]])
        if not config.transpose_gating_einsum:
            gating = gating.transpose(0, 2, 1)
        tree[f"layer_{layer}"] = {
            "attn": attention,
            "mlp": {"gating_einsum": gating, "linear": of_layer["mlp.down_proj"].T},
            "pre_attention_norm": {"scale": of_layer["input_layernorm"]},
            "post_attention_norm": {"scale": of_layer["post_attention_layernorm"]},
            "pre_ffw_norm": {"scale": of_layer["pre_feedforward_layernorm"]},
            "post_ffw_norm": {"scale": of_layer["post_feedforward_layernorm"]},
        }
    return tree


def run_keras(folder: Path) -> None:
    """Trains nothing: puts random LoRA on keras-hub's model, in its environment."""
    import os

    os.environ["KERAS_BACKEND"] = "jax"
    import keras_hub

    backbone = keras_hub.models.Backbone.from_preset(str(folder / "base"), dtype="float32")
    inputs = {"token_ids": TOKENS, "padding_mask": np.ones_like(TOKENS)}

    def logits() -> np.ndarray:
        return np.asarray(backbone.token_embedding(backbone(inputs), reverse=True))

    np.save(folder / "before.npy", logits())
    (folder / "checkpoint").mkdir()
    names = ["key", "attention_output", "ffw_gating", "ffw_gating_2", "ffw_linear"]
    names += [f"feedforward_{part}_dense" for part in ("gate", "intermediate", "output")]
    backbone.enable_lora(RANK, target_layer_names=[*backbone.default_lora_layer_names(), *names])
    draws = np.random.default_rng(1)
    for layer in backbone._flatten_layers():
        if getattr(layer, "lora_enabled", False):
            for factor in (layer.lora_kernel_a, layer.lora_kernel_b):
                factor.assign(draws.normal(0, 0.2, factor.shape))
    np.save(folder / "after.npy", logits())
    backbone.save_lora_weights(str(folder / "checkpoint" / "all.lora.h5"))


def run_peft(folder: Path) -> None:
    """Writes PEFT's logits, in its environment."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "base", attn_implementation="eager")
    with torch.no_grad():
        np.save(folder / "peft_before.npy", model(torch.tensor(TOKENS)).logits.numpy())
        model = PeftModel.from_pretrained(model, folder / "adapter").eval()
        np.save(folder / "peft_after.npy", model(torch.tensor(TOKENS)).logits.numpy())


def run_mora_jax(folder: Path, program: str) -> None:
    """Converts the checkpoint by the command, and writes mora_jax's logits."""
    from flax import nnx

    import mora_jax as mj
    from mora_jax.cli.main import main

    alpha = ["--alpha", str(ALPHA)] if program == "tunix" else []
    forms = {"tunix": ("checkpoint", "checkpoint/1", "qwix"), "keras": ("checkpoint/all.lora.h5",)}
    files, shared = set(), ["--model", str(folder / "base"), "--out", str(folder / "adapter"), "--overwrite", *alpha]
    for checkpoint in forms.get(program, ("checkpoint", "checkpoint/1")):
        assert main(["convert", "--from", program, "--adapter", str(folder / checkpoint), *shared]) == 0
        files.add((folder / "adapter" / "adapter_model.safetensors").read_bytes())
    assert len(files) == 1, "checkpoints of the same factors differ"
    model, _ = mj.load_pretrained(folder / "base", dtype="float32")
    mj.load_adapter(model, folder / "adapter")
    np.save(folder / "mora_jax_after.npy", nnx.jit(lambda model, ids: model(ids))(model, TOKENS))


def in_environment(python: str, work: str, folder: Path) -> None:
    """Runs one of the functions above by another Python."""
    command = [python, __file__, "--work", work, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env={"JAX_PLATFORMS": "cpu", "HOME": str(folder)})
    if done.returncode:
        sys.exit(f"{work} in {python} failed:\n{done.stderr[-3000:]}")


def versions(python: str, *packages: str) -> str:
    """The versions of packages in another environment."""
    code = f"import importlib.metadata as m; print(*(f'{{n}} {{m.version(n)}}' for n in {packages!r}), sep=', ')"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def main() -> int:
    """Runs the cases; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peft", help="python with torch, transformers and peft")
    for program in CASES:
        parser.add_argument(f"--{program}", help=f"python with {program}")
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    works = {"base": make_base, "tunix": run_tunix, "gemma": run_gemma, "keras": run_keras, "peft": run_peft}
    if args.work:
        works[args.work[0]](Path(args.work[1]))
        return 0
    packages = {"tunix": ("google-tunix", "qwix"), "gemma": ("gemma",), "keras": ("keras-hub", "keras")}
    rows, good = [], True
    for program, cases in CASES.items():
        python = getattr(args, program)
        if python is None:
            continue
        version = versions(python, *packages[program])
        for name, values in cases.items():
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary)
                (folder / "case.json").write_text(json.dumps(SIZES | values), encoding="utf-8")
                in_environment(args.peft, "base", folder)
                in_environment(python, program, folder)
                run_mora_jax(folder, program)
                in_environment(args.peft, "peft", folder)
                logits = {path.stem: np.load(path).astype(np.float64) for path in folder.glob("*.npy")}
            largest = np.abs(logits["after"]).max()
            change = np.abs(logits["after"] - logits["before"]).max()
            base = np.abs(logits["peft_before"] - logits["before"]).max()
            differences = [np.abs(logits[f"{other}_after"] - logits["after"]).max() for other in ("peft", "mora_jax")]
            good = good and max(differences) <= BOUND * largest < change
            shown = [f"{value:.2g}" for value in (largest, change, base, *differences)]
            rows.append(f"| {version} | {name} | {' | '.join(shown)} |")
            print(rows[-1], file=sys.stderr)
    print(f"{versions(args.peft, 'peft', 'transformers')}; flax {importlib.metadata.version('flax')}\n")
    print(
        "| program | model | largest logit | changed by LoRA | base alone differs | PEFT differs | mora_jax differs |"
    )
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    print("\n".join(rows))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
