"""Makes everything that the demo embeds, from nothing: instructions, corpus, tokenizer, base model.

    python scripts/make_demo_model.py                       # the whole, into mora_jax/demo/assets
    python scripts/make_demo_model.py --out assets          # elsewhere
    python scripts/make_demo_model.py --no-weights          # all but the pretraining, seconds

The base model is a Llama of under a million parameters, pretrained from random weights by
`mora-jax train` itself (method `full`, plain text) on documents that
`demo_model.corpus` writes. About ten minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path

from demo_model import corpus, instructions, tokenizer as demo_tokenizer

from mora_jax.demo import ASSETS, PARTS

#: A small Llama. The wide initial weights suit the small width: with the usual 0.02 attention
#: stays nearly uniform for most of so short a run.
ARCHITECTURE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": demo_tokenizer.MAX_LENGTH,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "initializer_range": 0.08,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 1,
}

TOKENIZER_DOCUMENTS = 6_000
MAX_LENGTH = 64
STEPS, BATCH_SIZE, LEARNING_RATE = 10_000, 8, 2e-3
DOCUMENTS = STEPS * BATCH_SIZE
SEED = 0


def make_instructions(out: Path) -> None:
    """Writes the three parts of the instruction set; the last needs the corpus, to say nothing of it."""
    train, held_out = instructions.build()
    test = instructions.build_test(*corpus.said(corpus.Corpus().documents(0, DOCUMENTS)))
    for part, questions in zip(PARTS, (train, held_out, test), strict=True):
        instructions.write(questions, out / f"instructions_{part}.jsonl")
    print(f"instructions: {len(train)} to train on, {len(held_out)} held out, {len(test)} to report")


def make_corpus(path: Path, start: int, stop: int) -> str:
    """Writes documents of the corpus as JSON lines and returns their SHA-256."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for text in corpus.Corpus().documents(start, stop):
            line = (json.dumps({"text": text}) + "\n").encode()
            digest.update(line)
            file.write(line)
    print(f"corpus: {stop - start} documents, {path.stat().st_size / 1e6:.1f} MB")
    return digest.hexdigest()


def make_start(folder: Path) -> None:
    """Writes a folder with the tokenizer and random weights."""
    from flax import nnx

    from mora_jax.interop.hub import load_tokenizer
    from mora_jax.interop.save import save_pretrained
    from mora_jax.models.init import init_decoder

    with tempfile.TemporaryDirectory() as scratch:
        trained = demo_tokenizer.train(corpus.Corpus().documents(0, TOKENIZER_DOCUMENTS))
        demo_tokenizer.save(trained, Path(scratch))
        config = ARCHITECTURE | {"vocab_size": trained.get_vocab_size()}
        model = init_decoder(config, nnx.Rngs(SEED))
        save_pretrained(model, folder, load_tokenizer(Path(scratch)))
        # The tokenizer's own two files, as short as they were written.
        demo_tokenizer.save(trained, folder)


def pretrain(start: Path, corpus_file: Path, out: Path) -> None:
    """Trains every weight on plain text, as `mora-jax train` does."""
    from mora_jax.training.config.schema import (
        AdapterConfig,
        Config,
        DataConfig,
        LossConfig,
        ModelConfig,
        OptimizerConfig,
        TrainSection,
    )
    from mora_jax.training.loop import train

    code = train(
        Config(
            seed=SEED,
            out=str(out),
            model=ModelConfig(path=str(start), dtype="float32"),
            adapter=AdapterConfig(method="full"),
            data=DataConfig(train=(str(corpus_file),), format="text", max_length=MAX_LENGTH),
            loss=LossConfig(mode="full"),
            train=TrainSection(steps=STEPS, batch_size=BATCH_SIZE, log_every=50, save_every=1000, keep=1),
            optimizer=OptimizerConfig(
                learning_rate=LEARNING_RATE, schedule="cosine", warmup_steps=100, weight_decay=0.01
            ),
        ),
        overwrite=True,
    )
    if code:
        raise SystemExit(code)


def main(argv: list[str] | None = None) -> int:
    """Makes the assets in a scratch folder, then puts them into place."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder of the assets")
    parser.add_argument("--no-weights", action="store_true", help="only instructions, corpus and tokenizer")
    parser.add_argument("--work", type=Path, help="keep the corpus and the training run in this folder")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    make_instructions(args.out)
    make_corpus(args.out / "held_out_texts.jsonl", *corpus.HELD_OUT)
    with tempfile.TemporaryDirectory() as scratch:
        work = args.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        digest = make_corpus(work / "corpus.jsonl", 0, DOCUMENTS)
        make_start(work / "start")
        if args.no_weights:
            return 0
        pretrain(work / "start", work / "corpus.jsonl", work / "run")
        summary = json.loads((work / "run" / "summary.json").read_text(encoding="utf-8"))
        finish(work / "run" / "model", args.out / "model")
    facts = {
        "corpus_seed": corpus.SEED,
        "corpus_documents": DOCUMENTS,
        "corpus_sha256": digest,
        "pretraining": {
            "steps": STEPS,
            "batch_size": BATCH_SIZE,
            "learning_rate": LEARNING_RATE,
            "parameters": summary["total_parameters"],
            "final_loss": summary["final_loss"],
        },
    }
    (args.out / "provenance.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return 0


def finish(trained: Path, folder: Path) -> None:
    """Rounds the trained weights to float16 and writes the folder to embed."""
    from mora_jax.interop.load import load_pretrained
    from mora_jax.interop.save import save_pretrained

    model, _ = load_pretrained(trained, dtype="float32")
    shutil.rmtree(folder, ignore_errors=True)
    save_pretrained(model, folder, dtype="float16")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(trained.parent.parent / "start" / name, folder / name)
    # The template stands in tokenizer_config.json.
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    for file in folder.iterdir():
        file.chmod(0o644)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"model: {folder}, {size / 1e6:.2f} MB")


if __name__ == "__main__":
    sys.exit(main())
