"""LoRA out of orbax checkpoints in the layouts of Tunix with Qwix and of gemma, against dense updates by `einsum`.

Paths and axes are those of checkpoints that the programs wrote (`scripts/check_checkpoints.py` runs them).
"""

import json
from pathlib import Path

import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from orbax import checkpoint as ocp

import mora_jax as mj
from mora_jax.adapters.attach import adapters_of
from mora_jax.cli.main import main
from mora_jax.interop.convert.checkpoints import adapter_from_checkpoint
from tests.models.tiny import hf_folder

WIDTH, INNER, HEADS, KEYS, SIZE, RANK, ALPHA = 32, 48, 4, 2, 8, 3, 4.5
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# By module: axes of A and B, and how the dense update of each matrix comes of them.
EINSUM = {
    "attn/q_einsum": ((WIDTH,), (HEADS, SIZE), {"q_proj": "dr,rnh->dnh"}),
    "attn/kv_einsum": ((WIDTH,), (2, KEYS, SIZE), {"k_proj": "dr,rkh->dkh", "v_proj": "dr,rkh->dkh"}),
    "attn/attn_vec_einsum": ((HEADS, SIZE), (WIDTH,), {"o_proj": "nhr,rd->nhd"}),
}
NAMED = {
    "attn/q_proj": ((WIDTH,), (HEADS, SIZE), {"q_proj": "dr,rnh->dnh"}),
    "attn/k_proj": ((WIDTH,), (KEYS, SIZE), {"k_proj": "dr,rkh->dkh"}),
    "attn/v_proj": ((WIDTH,), (KEYS, SIZE), {"v_proj": "dr,rkh->dkh"}),
    "attn/o_proj": ((HEADS, SIZE), (WIDTH,), {"o_proj": "nhr,rd->nhd"}),
}
MLP = {
    "mlp/gate_proj": ((WIDTH,), (INNER,), {"gate_proj": "dr,rf->df"}),
    "mlp/up_proj": ((WIDTH,), (INNER,), {"up_proj": "dr,rf->df"}),
    "mlp/down_proj": ((INNER,), (WIDTH,), {"down_proj": "fr,rd->fd"}),
}
FUSED = {
    "mlp/_LoRAEinsum_gating_einsum": ((WIDTH,), (2, INNER), {"gate_proj": "dr,rf->df", "up_proj": "dr,rf->df"}),
    "mlp/_LoRAEinsum_linear": ((INNER,), (WIDTH,), {"down_proj": "fr,rd->fd"}),
}
HEAD = {"lm_head": ((WIDTH,), (97,), {"lm_head": "dr,rv->dv"})}


def tunix_paths(layer: int, module: str) -> list[str]:
    kernel = "kernel" if module in MLP else "w"
    start = f"{module}/{kernel}_lora" if module in HEAD else f"layers/{layer}/{module}/{kernel}_lora"
    return [f"{start}_{factor}/value" for factor in "ab"]


def gemma_paths(layer: int, module: str) -> list[str]:
    inner = "" if module in FUSED else "/_LoRAEinsum_0"
    return [f"layer_{layer}/{module}{inner}/lora/{factor}" for factor in "ab"]


LAYOUTS = {
    "tunix": ("tunix", tunix_paths, NAMED | MLP | HEAD),
    "tunix_gemma": ("tunix", tunix_paths, EINSUM | MLP),
    "gemma": ("gemma", gemma_paths, EINSUM | FUSED),
}


def written(layout: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The arrays of a checkpoint by path, and the dense updates `[in, out]` by module path, not yet scaled."""
    _, paths, modules = LAYOUTS[layout]
    draws = np.random.default_rng(3)
    arrays, updates = {}, {}
    for layer in range(2):
        for module, (inputs, outputs, matrices) in modules.items():
            a = draws.standard_normal((*inputs, RANK)).astype(np.float32)
            b = draws.standard_normal((RANK, *outputs)).astype(np.float32)
            arrays |= dict(zip(paths(layer, module), (a, b), strict=True))
            for number, (name, product) in enumerate(matrices.items()):
                update = np.einsum(product, a, b[:, number] if len(matrices) > 1 else b)
                part = "mlp" if name in PROJECTIONS else "self_attn"
                path = name if module in HEAD else f"model.layers.{layer}.{part}.{name}"
                updates[path] = update.reshape(int(np.prod(inputs)), -1)
    return arrays, updates


def save(folder: Path, arrays: dict[str, np.ndarray]) -> Path:
    ocp.PyTreeCheckpointer().save(folder, unflatten_dict({tuple(path.split("/")): a for path, a in arrays.items()}))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return hf_folder(tmp_path_factory.mktemp("base") / "llama", num_hidden_layers=2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_updates_are_those_of_the_program(layout, base, tmp_path):
    arrays, updates = written(layout)
    rest = {"embedder/input_embedding": np.zeros((97, WIDTH), np.float32)}
    folder = save(tmp_path / "checkpoint", arrays | rest)
    program = LAYOUTS[layout][0]
    alpha = ALPHA if program == "tunix" else None
    model, others = adapter_from_checkpoint(folder, program, base, alpha=alpha)
    assert others == ["embedder/input_embedding"]
    scaling = ALPHA / RANK if program == "tunix" else 1.0
    found = {}
    for entry in adapters_of(model):
        assert entry.config.rank == RANK
        found[entry.path] = entry.params["scaling"] * (entry.params["lora_a"] @ entry.params["lora_b"])
    assert found.keys() == updates.keys()
    for path, update in updates.items():
        np.testing.assert_allclose(found[path], scaling * update, atol=1e-4, err_msg=path)


def test_keys_and_values_share_one_kernel_with_the_queries(base, tmp_path):
    """Where there are as many of them: one B `[r, 3, heads, head_dim]`."""
    equal = hf_folder(tmp_path / "equal", num_hidden_layers=1, num_key_value_heads=HEADS)
    draws = np.random.default_rng(4)
    a, b = draws.standard_normal((WIDTH, RANK)), draws.standard_normal((RANK, 3, HEADS, SIZE))
    paths = gemma_paths(0, "attn/qkv_einsum")
    folder = save(tmp_path / "checkpoint", dict(zip(paths, (a, b), strict=True)))
    model, _ = adapter_from_checkpoint(folder, "gemma", equal)
    for number, entry in enumerate(adapters_of(model)):
        assert entry.path.endswith(("q_proj", "k_proj", "v_proj")[number])
        update = np.einsum("dr,rnh->dnh", a, b[:, number]).reshape(WIDTH, -1)
        np.testing.assert_allclose(entry.params["lora_a"] @ entry.params["lora_b"], update, atol=1e-4)
    paths = gemma_paths(0, "attn/qkv_einsum")
    with pytest.raises(mj.InputError, match=r"qkv_einsum/_LoRAEinsum_0/lora/b has shape \[3, 3, 4, 8\], but"):
        adapter_from_checkpoint(folder, "gemma", base)


def test_the_command_writes_what_peft_loads(base, tmp_path, capsys):
    arrays, updates = written("tunix_gemma")
    for step, factor in ((9, 0.0), (10, 1.0)):  # of CheckpointManager, whose newest step counts
        save(tmp_path / "run" / str(step) / "model_params", {path: factor * array for path, array in arrays.items()})
    out = tmp_path / "adapter"
    command = ["convert", "--from", "tunix", "--model", base, "--adapter", tmp_path / "run", "--alpha", ALPHA]
    assert main([str(word) for word in (*command, "--out", out)]) == 0
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == [f"{len(updates)} matrices carry LoRA of rank 3", f"wrote {out}"]
    values = json.loads((out / "adapter_config.json").read_text())
    assert (values["peft_type"], values["r"], values["lora_alpha"]) == ("LORA", RANK, ALPHA)
    assert values["alpha_pattern"] == values["rank_pattern"] == {}
    model, _ = mj.load_pretrained(base, dtype="float32")
    mj.load_adapter(model, out)
    path = "model.layers.1.self_attn.v_proj"
    entry = {entry.path: entry for entry in adapters_of(model)}[path]
    np.testing.assert_allclose(1.5 * entry.params["lora_a"] @ entry.params["lora_b"], 1.5 * updates[path], atol=1e-4)


QUERY_A, QUERY_B = tunix_paths(0, "attn/q_proj")
ODD = {
    "unknown module": (
        lambda arrays: {"layers/0/mlp/router/kernel_lora_a/value": arrays[QUERY_A]},
        "layers/0/mlp/router/kernel_lora_a/value is no LoRA that tunix is known to put on llama",
    ),
    "another program's": (
        lambda arrays: {gemma_paths(0, "attn/q_einsum")[0]: arrays[QUERY_A]},
        "layer_0/attn/q_einsum/_LoRAEinsum_0/lora/a is no LoRA that tunix",
    ),
    "half a pair": (
        lambda arrays: {QUERY_B.replace("/0/", "/1/").replace("q_proj", "o_proj"): arrays[QUERY_B]},
        "has no other factor beside it",
    ),
    "a layer too many": (
        lambda arrays: {path.replace("/0/", "/2/"): arrays[path] for path in (QUERY_A, QUERY_B)},
        "the model has no model.layers.2.self_attn.q_proj for layers/2/attn/q_proj",
    ),
    "other inputs": (lambda arrays: {QUERY_A: arrays[QUERY_A][1:]}, "[31, 3], but the model has 32 inputs there"),
    "other heads": (
        lambda arrays: {QUERY_B: arrays[QUERY_B][:, 1:]},
        "[3, 3, 8], but the model has [3, 32] there",
    ),
    "another rank": (lambda arrays: {QUERY_B: arrays[QUERY_B][1:]}, "[2, 4, 8], but the model has [3, 32] there"),
}


@pytest.mark.parametrize("odd", ODD)
def test_what_does_not_fit_is_named(odd, base, tmp_path):
    change, message = ODD[odd]
    arrays = dict(zip((QUERY_A, QUERY_B), (np.ones((WIDTH, RANK)), np.ones((RANK, HEADS, SIZE))), strict=True))
    folder = save(tmp_path / "checkpoint", arrays | change(arrays))
    with pytest.raises(mj.InputError) as caught:
        adapter_from_checkpoint(folder, "tunix", base, alpha=1.0)
    assert message in str(caught.value)


def test_what_cannot_be_read_is_refused_and_nothing_written(base, tmp_path, capsys):
    arrays, _ = written("gemma")
    folder = save(tmp_path / "checkpoint", arrays)
    bare = save(tmp_path / "bare", {"layer_0/attn/q_einsum/w": np.ones((4, 32, 8), np.float32)})
    damaged = save(tmp_path / "damaged", arrays)
    (damaged / "_METADATA").write_text('{"tree_metadata": {')
    cases = [
        (["gemma", folder, "--alpha", 2], "gemma has no alpha"),
        (["tunix", folder], "checkpoints of tunix don't hold alpha: give the one of Qwix's rule with --alpha"),
        (["gemma", bare], f"{bare} holds no LoRA: its arrays are layer_0/attn/q_einsum/w"),
        (["gemma", base], f"{base} is no orbax checkpoint of gemma: there is no _METADATA in it"),
        (["gemma", tmp_path / "absent"], "absent is no orbax checkpoint of gemma"),
        (["gemma", damaged], f"{damaged} can't be read: "),
        (["gemma", folder, "--to", "lora"], "--from writes a PEFT folder; leave --to away"),
    ]
    for (program, checkpoint, *options), message in cases:
        command = ["convert", "--from", program, "--adapter", checkpoint, "--model", base, "--out", tmp_path / "out"]
        assert main([str(word) for word in (*command, *options)]) == 2, message
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith(f"error: {message}") or message in printed.err, printed.err
        assert len(printed.err.splitlines()) == 1
        assert not (tmp_path / "out").exists()
