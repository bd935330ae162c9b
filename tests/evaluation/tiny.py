"""A tiny random model and a byte-level tokenizer, for tests of generation, scoring and the command line."""

from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mora_jax.interop import save_pretrained
from mora_jax.models.decoder import Decoder
from mora_jax.models.families import read_config

CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<eos>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]


def llama_config(**changes):
    """Returns a HuggingFace config.json of a one-layer Llama."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 261,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": 256,
        **changes,
    }


def make_model(**changes):
    """A random decoder with sharp enough logits that its argmax is no matter of rounding."""
    return Decoder(read_config(llama_config(**changes), "config.json"), rngs=nnx.Rngs(0))


def make_tokenizer():
    """256 bytes and five special tokens; characters outside ASCII take several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")
    fast.add_special_tokens({"additional_special_tokens": SPECIAL[1:]})
    fast.chat_template = CHAT
    return fast


def save_folder(path, **changes):
    """Writes both as a HuggingFace folder; `changes` are of the configuration."""
    save_pretrained(make_model(**changes), path, make_tokenizer())
    return path
