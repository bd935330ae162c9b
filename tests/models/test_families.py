"""Every family computes what transformers computes, from tiny random checkpoints."""

import json

import numpy as np
import pytest
import transformers
from flax import nnx
from safetensors.numpy import load_file, save_file

import mora_jax as mj
from mora_jax.models import read_config
from mora_jax.models.families import FAMILIES
from tests.models.odd import IDS, LLAMA3, LOCAL, ODD, YARN
from tests.models.tiny import SIZES, fill_randomly, random_ids
from tests.models.tiny_torch import hf_logits, hf_model, save_torch
from tests.peers import peft, torch

WINDOW = {"use_sliding_window": True, "sliding_window": 4}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 12, "sliding_window": 4}

CASES = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("llama", {"head_dim": 16, "num_key_value_heads": 1}),
    "llama-no-grouping": ("llama", {"num_key_value_heads": 4, "hidden_act": "gelu"}),
    "llama-linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}},
    ),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "llama-yarn-mscale": ("llama", {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.4}}),
    "llama-yarn-factor": ("llama", {"rope_parameters": YARN | {"attention_factor": 1.3, "truncate": False}}),
    "mistral": ("mistral", {"sliding_window": 5}),
    "mistral-no-window": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("qwen2", {}),
    "qwen2-window": ("qwen2", WINDOW | {"max_window_layers": 1}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3-window": (
        "qwen3",
        {
            "head_dim": 8,
            "use_sliding_window": True,
            "sliding_window": 3,
            "max_window_layers": 0,
            "attention_bias": True,
        },
    ),
    "qwen3-yarn": ("qwen3", {"head_dim": 16, "rope_parameters": YARN, "tie_word_embeddings": True}),
    "gemma2": ("gemma2", GEMMA),
    "gemma2-caps": ("gemma2", GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma2-no-caps": ("gemma2", GEMMA | {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma3": ("gemma3_text", GEMMA | {"sliding_window_pattern": 2}),
    "gemma3-scaled": (
        "gemma3_text",
        GEMMA
        | {
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 9000.0, "factor": 8.0},
                "sliding_attention": LOCAL,
            },
            "final_logit_softcapping": 4.0,
        },
    ),
}

LONG = {"rope_parameters": ODD["phi3"]["rope_parameters"] | {"original_max_position_embeddings": 32}}
GEMMA4 = IDS | {"vocab_size_per_layer_input": SIZES["vocab_size"], "head_dim": 8, "global_head_dim": 16}
CASES |= {
    # Its defaults, as far as a tiny model can have them.
    **{name: (name, IDS) for name in ODD if name not in CASES},
    **{f"{name}-odd": (name, fields) for name, fields in ODD.items()},
    "ministral": ("ministral", IDS | {"head_dim": 8}),  # transformers wants it said
    "gemma4_text": ("gemma4_text", GEMMA4),
    "gemma4_text-experts": (
        "gemma4_text",
        GEMMA4 | {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 12},
    ),
    "qwen3_5_text": ("qwen3_5_text", IDS | {"num_hidden_layers": 4}),  # transformers wants a layer with attention
    "helium": ("helium", IDS | {"head_dim": 8}),  # the only one that transformers can do
    "phi3-short": ("phi3", ODD["phi3"] | LONG | {"original_max_position_embeddings": 32, "sliding_window": None}),
    "gpt_neox-parallel": ("gpt_neox", ODD["gpt_neox"] | {"use_parallel_residual": True, "attention_bias": False}),
    "exaone4-no-window": ("exaone4", ODD["exaone4"] | {"sliding_window": None, "layer_types": ["full_attention"] * 3}),
    "smollm3-intervals": ("smollm3", ODD["smollm3"] | {"no_rope_layers": None, "no_rope_layer_interval": 2}),
    "starcoder2-no-bias": ("starcoder2", ODD["starcoder2"] | {"use_bias": False}),
    "qwen3_5-chunks": ("qwen3_5_text", ODD["qwen3_5_text"] | {"layer_types": None, "full_attention_interval": 2}),
    "gemma4-large": (
        "gemma4_text",
        ODD["gemma4_text"] | {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "attention_k_eq_v": False},
    ),
    "glm-no-bias": ("glm", ODD["glm"] | {"attention_bias": False}),
}


def ours(folder, **options):
    return mj.load_pretrained(folder, dtype="float32", **options)[0]


@pytest.mark.peers
@pytest.mark.parametrize("name", CASES)
def test_logits_agree_with_transformers(name, tmp_path):
    model_type, fields = CASES[name]
    reference = hf_model(model_type, **fields)
    model = ours(save_torch(tmp_path, reference))
    ids = random_ids(2, 20)
    mask = np.ones_like(ids)
    mask[1, :6] = 0  # padding on the left
    found, expected = np.asarray(model(ids, mask)), hf_logits(reference, ids, mask)
    seen = mask.astype(bool)
    np.testing.assert_allclose(found[seen], expected[seen], atol=2e-4, rtol=1e-4)
    np.testing.assert_array_equal(found[seen].argmax(-1), expected[seen].argmax(-1))
    assert np.isfinite(found).all()


@pytest.mark.peers
@pytest.mark.parametrize(
    "model_type, fields, old",
    [
        (
            "llama",
            {"rope_parameters": LLAMA3},
            {"rope_theta": 5000.0, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}},
        ),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}}, {"rope_theta": 300.0}),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}},
            {"rope_scaling": {"type": "linear", "factor": 3.0}},
        ),
        (
            "gemma3_text",
            GEMMA
            | {
                "sliding_window_pattern": 3,
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "rope_theta": 9000.0, "factor": 8.0},
                    "sliding_attention": LOCAL,
                },
            },
            {
                "layer_types": None,
                "sliding_window_pattern": 3,
                "rope_theta": 9000.0,
                "rope_local_base_freq": 100.0,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
        ),
    ],
    ids=["llama3", "theta", "linear", "gemma3"],
)
def test_the_older_spelling_of_rope_settings(model_type, fields, old, tmp_path):
    reference = hf_model(model_type, **fields)
    model = ours(save_torch(tmp_path, reference, {"rope_parameters": None} | old))
    ids = random_ids(1, 20)
    np.testing.assert_allclose(np.asarray(model(ids)), hf_logits(reference, ids), atol=2e-4, rtol=1e-4)


SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4}
IMAGES = {
    "gemma3": {"vision_config": SMALL | {"image_size": 8}, "mm_tokens_per_image": 4},
    "mistral3": {"vision_config": SMALL | {"image_size": 8, "head_dim": 8}},
    "gemma4": {
        "vision_config": SMALL | {"head_dim": 8, "num_key_value_heads": 2, "position_embedding_size": 8},
        "audio_config": None,
    },
    "qwen3_5": {
        "vision_config": {
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "patch_size": 4,
        },
    },
}


def with_images(model_type, text):
    family = next(family for family in FAMILIES if family.model_type == model_type)
    config = transformers.AutoConfig.for_model(
        model_type, text_config={"model_type": text.partition("-")[0], **SIZES, **ODD[text]}, **IMAGES[model_type]
    )
    config.architectures = [family.architecture]
    whole = getattr(transformers, family.architecture)._from_config(config, attn_implementation="eager").eval()
    return family, whole


class Tokens:
    """A tokenizer's list of tokens."""

    def __init__(self, count):
        self.ids = {str(number): number for number in range(count)}

    def get_vocab(self):
        return dict(self.ids)

    def add_tokens(self, tokens):
        self.ids |= {token: len(self.ids) + i for i, token in enumerate(tokens)}

    def convert_tokens_to_ids(self, tokens):
        return [self.ids[token] for token in tokens]


@pytest.mark.peers
@pytest.mark.parametrize("model_type, text", [("mistral3", "mistral"), ("gemma4", "gemma4_text")])
def test_a_grown_vocabulary_of_a_model_with_images(model_type, text, tmp_path):
    _, whole = with_images(model_type, text)
    whole.save_pretrained(tmp_path / "whole")
    with pytest.warns(UserWarning, match="the text part is loaded"):
        model = ours(tmp_path / "whole")
    ids = np.array([[1, 2, *mj.add_tokens(model, Tokens(SIZES["vocab_size"]), ["<new>"]), 3]])
    mj.save_pretrained(model, tmp_path / "grown")
    again = type(whole).from_pretrained(tmp_path / "grown", dtype=torch.float32, attn_implementation="eager")
    np.testing.assert_allclose(hf_logits(again.eval(), ids), np.asarray(model(ids)), atol=2e-4, rtol=1e-4)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore:no expert carries an adapter:UserWarning")
@pytest.mark.parametrize(
    "model_type, text, older",
    [
        (model_type, text, older)
        for model_type, text in [("gemma3", "gemma3_text"), ("mistral3", "ministral3"), ("mistral3", "mistral")]
        for older in (False, True)
    ]
    + [("gemma4", "gemma4_text", False), ("gemma4", "gemma4_text-experts", False), ("qwen3_5", "qwen3_5_text", False)],
)
def test_the_text_part_of_a_model_with_images(model_type, text, older, tmp_path):
    family, whole = with_images(model_type, text)
    whole.save_pretrained(tmp_path / "whole")
    path = tmp_path / "whole" / "model.safetensors"
    names = {new: old for old, new in family.older.items()} if older else family.older
    renamed = {}
    for name, tensor in load_file(path).items():
        start = next((start for start in names if name.startswith(start)), "")
        renamed[names.get(start, "") + name.removeprefix(start)] = tensor
    save_file(renamed, path, metadata={"format": "pt"})
    ids = random_ids(1, 20)
    with pytest.warns(UserWarning, match="the text part is loaded; [0-9]+ tensors beside it are not, such as model"):
        model = ours(tmp_path / "whole")
    np.testing.assert_allclose(np.asarray(model(ids)), hf_logits(whole, ids), atol=2e-4, rtol=1e-4)
    mj.attach(model, mj.LoRAConfig(rank=2, targets=("q_proj", "up_proj")), rngs=nnx.Rngs(0))
    fill_randomly(model)
    expected = np.asarray(model(ids))
    mj.save_adapter(model, tmp_path / "adapter")
    adapted = peft.PeftModel.from_pretrained(whole, tmp_path / "adapter")
    np.testing.assert_allclose(hf_logits(adapted, ids), expected, atol=2e-4, rtol=1e-4)
    mj.merge(model)
    mj.save_pretrained(model, tmp_path / "merged")
    again, report = type(whole).from_pretrained(
        tmp_path / "merged", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values())
    np.testing.assert_allclose(hf_logits(again.eval(), ids), expected, atol=2e-4, rtol=1e-4)
    for name, tensor in adapted.unload().state_dict().items():
        if "language_model" not in name and "lm_head" not in name:
            assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.peers
def test_sliding_windows_really_slide(tmp_path):
    reference = hf_model("mistral", sliding_window=5, num_hidden_layers=1)
    model = ours(save_torch(tmp_path, reference))
    ids = random_ids(1, 12)
    changed = ids.copy()
    changed[0, 0] = (changed[0, 0] + 1) % SIZES["vocab_size"]
    same = np.isclose(np.asarray(model(ids)), np.asarray(model(changed)), atol=1e-6).all(-1)[0]
    np.testing.assert_array_equal(same, [False] * 5 + [True] * 7)


def base_config(**fields) -> dict:
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "max_position_embeddings": 64}
    if "architectures" in fields and fields["architectures"] is not None:
        del config["model_type"]
    return json.loads(json.dumps(SIZES | config | fields))


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"architectures": ["BertModel"]},
            "'BertModel' is not supported; supported are LlamaForCausalLM, Mi",
        ),
        ({"architectures": None, "model_type": "mamba"}, "architecture 'mamba' is not supported"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope type 'dynamic' is not supported"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "short_factor must be a list of 4 positive numbers, found None"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: factor is missing"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling: factor is missing"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor is missing"),
        ({"rope_scaling": 3}, "rope_scaling must be an object, found 3"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "do not exist in this family"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor other than 1 is not supported"),
        ({"hidden_act": "laplace"}, "hidden_act 'laplace' is not supported; supported are gelu"),
        (
            {"num_key_value_heads": 3},
            r"\(4\) is not a multiple of num_key_value_heads \(3\)",
        ),
        ({"hidden_size": 30}, r"hidden_size \(30\) is not a multiple of num_attention_heads \(4\)"),
        ({"head_dim": 5}, r"head_dim \(5\) must be even"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive whole number, found 0"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be at most 10000, found 1000000000"),
        ({"vocab_size": 2**31}, "vocab_size must be at most 2147483647, found 2147483648"),
        ({"rope_theta": 10**400}, "rope_theta must be a positive number, found 10{14}"),
        ({"model_type": "bert"}, "model_type is 'bert', but architectures names LlamaForCausalLM, whose model_type is"),
        ({"model_type": 3}, "model_type is 3, but architectures names"),
        ({"model_type": None}, "model_type is None, but architectures names"),
        ({"architectures": "LlamaForCausalLM"}, "architectures must be a list with the name of a class, found 'Llama"),
        ({"architectures": [1]}, r"architectures must be a list with the name of a class, found \[1\]"),
        ({"architectures": [], "model_type": None}, "no architecture is named"),
        ({"hidden_act": None}, "hidden_act must be one of gelu, .*, found None"),
        ({"hidden_act": "x" * 1000}, r"hidden_act 'x{12}\.\.\.x{13}' is not supported"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps must be a positive number, found 'small'"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false, found 1"),
        ({"quantization_config": {"bits": 4}}, "the checkpoint is quantized"),
        (
            {"architectures": ["Qwen2ForCausalLM"], "layer_types": ["sliding_attention"] * 3},
            "sliding_attention but sliding_window is null or turned off",
        ),
        (
            {"architectures": ["Qwen2ForCausalLM"], "layer_types": ["full_attention"]},
            "one entry for each of the 3",
        ),
        ({"architectures": ["Qwen3ForCausalLM"], "layer_types": ["chunked"] * 3}, "layer_types has 'chunked'"),
        (
            {"architectures": ["Gemma2ForCausalLM"], "use_bidirectional_attention": True},
            "use_bidirectional_attention",
        ),
        ({"architectures": ["Gemma3ForCausalLM"], "rope_parameters": {"rope_theta": 1.0}}, "alone"),
        (
            {
                "architectures": ["GPT2LMHeadModel"],
                "n_embd": 32,
                "n_head": 4,
                "n_layer": 2,
                "add_cross_attention": True,
            },
            "add_cross_attention True is not supported; supported is false",
        ),
        (
            {"architectures": ["GPT2LMHeadModel"], "scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx True is not supported",
        ),
        (
            {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "attn_logit_softcapping": 2.0},
            "attn_logit_softcapping 2.0 is not supported; supported is null",
        ),
        (
            {
                "architectures": ["SmolLM3ForCausalLM"],
                "model_type": "smollm3",
                "sliding_window": 4,
                "use_sliding_window": False,
                "layer_types": ["sliding_attention"] * 3,
            },
            "sliding_attention but sliding_window is null or turned off",
        ),
        ({"architectures": ["GPT2LMHeadModel"]}, "n_embd is missing"),
        (
            {"architectures": ["Phi3ForCausalLM"], "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            "rope_scaling must be of the rope type default or longrope",
        ),
        (
            {"architectures": ["Phi3ForCausalLM"], "rope_scaling": {"type": "su", "short_factor": [1.0]}},
            "rope_scaling: short_factor must be a list of 4 positive numbers, found",
        ),
        (
            {"architectures": ["Glm4ForCausalLM"], "partial_rotary_factor": 1.5},
            "partial_rotary_factor must be at most 1",
        ),
        (
            {"architectures": ["GPTNeoXForCausalLM"], "rotary_pct": 0.4},
            "an even number of each head has to rotate, not 3",
        ),
        (
            {"architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": [1, 2]},
            "no_rope_layers must be a list of 0 and 1",
        ),
        ({"architectures": ["GemmaForCausalLM"], "use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ],
    ids=str,
)
def test_configs_that_are_refused(fields, message):
    with pytest.raises(mj.InputError, match=message) as caught:
        read_config(base_config(**fields), "folder/config.json")
    assert str(caught.value).startswith("folder/config.json: ")
    assert "\n" not in str(caught.value)


@pytest.mark.peers
@pytest.mark.parametrize("model_type, buffer", [("gpt2", "h.1.attn.bias"), ("gpt_neox", "layers.1.attention.bias")])
def test_files_without_the_class_around_and_with_masks(model_type, buffer, tmp_path):
    reference = hf_model(model_type, **ODD[model_type])
    folder = save_torch(tmp_path, reference)
    tensors = load_file(folder / "model.safetensors")
    base = "transformer." if model_type == "gpt2" else "gpt_neox."
    tensors = {name.removeprefix(base): value for name, value in tensors.items()} | {buffer: np.ones((1, 8), bool)}
    save_file(tensors, folder / "model.safetensors")
    ids = random_ids(1, 20)
    np.testing.assert_allclose(np.asarray(ours(folder)(ids)), hf_logits(reference, ids), atol=2e-4, rtol=1e-4)


def test_the_model_type_is_enough():
    assert read_config(base_config(architectures=None)).family == "llama"
