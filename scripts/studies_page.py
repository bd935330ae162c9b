"""Writes docs/studies/index.md, and claims.json beside every conclusion there, from the tables of cells alone.

    python scripts/studies_page.py            writes them
    python scripts/studies_page.py --check    exits with 1 where one is not what its table says

The text is scripts/studies_page.md, a template for string.Template; every number of a result in it comes from here.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from string import Template

from mora_jax.studies.claims import Claim, claims, to_json
from mora_jax.studies.conclusion import table
from mora_jax.studies.intervals import interval
from mora_jax.studies.results import Results
from mora_jax.studies.run import STUDIES

ROOT = Path(__file__).parents[1]
PAGE, TEMPLATE = ROOT / "docs/studies/index.md", Path(__file__).with_suffix(".md")

#: claim of a paper; (table, difference, metric, level, sign of the effect where it holds); what would decide it.
CLAIMS = [
    (
        "MoRA learns pairs by heart sooner than LoRA at equal parameters (2405.12130)",
        [("memorize/quick", "MoRA sharing r2 − LoRA r2", "generated accuracy", "128 pairs", 1),
         ("memorize/quick", "MoRA sharing r2 − LoRA r2, α = 8r", "generated accuracy", "128 pairs", 1),
         ("memorize/small", "MoRA sharing r2 − LoRA r2", "generated accuracy", "", 1)],
        "`memorize` small with 8 seeds and LoRA at its best form",
    ),
    (
        "MoRA stores more than LoRA at equal parameters (2405.12130)",
        [],
        "`memorize` saturation: bits stored against pairs until nothing more is learned",
    ),
    (
        "LoRA learns less than full fine-tuning (2405.09673)",
        [("forget/quick", "LoRA r2 − full", "loss on the new domain, nats a token", "", 1),
         ("forget/quick", "LoRA r16 − full", "loss on the new domain, nats a token", "", 1)],
        "`forget` quick with 10 seeds; `forget` small",
    ),
    (
        "LoRA forgets less than full fine-tuning (2405.09673)",
        [("forget/quick", "LoRA r2 − full", "loss on the old domain, nats a token", "", -1),
         ("forget/quick", "LoRA r16 − full", "loss on the old domain, nats a token", "", -1)],
        "the same, at equal learning and with rates lowered until the least forgetting lies inside",
    ),
    (
        "Loss on instructions helps where they are long and rows are few (2405.14394)",
        [("instruct/quick", "LoRA unmasked − LoRA masked", "test loss at the best epoch, nats a token",
          "ratio 2 of 2, 64 rows", -1),
         ("instruct/small", "LoRA unmasked − LoRA masked", "test loss at the best epoch, nats a token",
          "ratio 4 of 4, 32 rows", -1)],
        "`instruct` small with rates inside their grids, more rows and the normaliser `response`",
    ),
]  # fmt: skip


def read_tables() -> dict[str, Results]:
    """All of them, by study and preset."""
    files = sorted((ROOT / "docs/studies").glob("*/*/cells.csv"))
    return {f"{file.parts[-3]}/{file.parts[-2]}": Results.read(file, STUDIES[file.parts[-3]]) for file in files}


def find(stated: list[Claim], claim: str, metric: str, level: str) -> Claim:
    """The claim of this name."""
    return next(one for one in stated if (one.claim, one.metric, one.level) == (claim, metric, level))


def claims_table(stated: dict[str, list[Claim]]) -> str:
    """A row a claim of a paper and a table that says something of it."""
    rows = []
    for text, evidence, decides in CLAIMS:
        if not evidence:
            rows.append([text, "not measured", "", "", "", decides])
        for name, claim, metric, level, sign in evidence:
            one = find(stated[name], claim, metric, level)
            holds = "undecided" if not one.decided else "holds" if (one.effect or 0) * sign > 0 else "doesn't hold"
            where = f"`{name.replace('/', '` ')}: {claim}{f', {level}' if level else ''}"
            p = "" if one.p is None else f"{one.p:.2g}"
            rows.append([text, holds, where, f"{one.effect_text()} ({metric})", f"{one.n}, {p}", decides])
            text, decides = "", ""
    return table(["claim", "found", "where", "effect", "n, p (Holm)", "what would decide it"], rows)


def numbers(tables: dict[str, Results], stated: dict[str, list[Claim]]) -> dict[str, str]:
    """What stands in the text, by name."""
    accuracy, known = "generated accuracy", "loss on the old domain, nats a token"
    quick, small, forget = tables["memorize/quick"], tables["memorize/small"], stated["forget/quick"]
    values = {}
    for name, results, level in (("quick", quick, "128 pairs"), ("small", small, "")):
        for arm, short in (("LoRA r2", "lora"), ("LoRA r2, α = 8r", "alpha"), ("MoRA sharing r2", "sharing"),
                           ("MoRA rotation r2", "rotation")):  # fmt: skip
            if arm in results.arms_at(level):
                values[f"{short}_{name}"] = results.mean("generated_accuracy", arm, level).text(2)
        for kind in ("sharing", "rotation"):
            one = find(stated[f"memorize/{name}"], f"MoRA {kind} r2 − LoRA r2", accuracy, level)
            values[f"{kind}_lead_{name}"] = one.effect_text()
    for arm, short in (("LoRA r2", "r2"), ("LoRA r16", "r16"), ("MoRA sharing r2", "sharing"),
                       ("MoRA rotation r2", "rotation")):  # fmt: skip
        values[f"forget_{short}"] = find(forget, f"{arm} − full", known, "").effect_text()
    learned = find(forget, "MoRA sharing r2 − LoRA r2", "loss on the new domain, nats a token", "")
    values["learned_sharing"] = learned.effect_text()
    rise = "rise of the old domain's loss at equal learning, nats a token"
    equal = find(forget, "LoRA r16, dropout − full", rise, "")
    values["forget_dropout"] = equal.effect_text()
    values["forget_kl"] = find(forget, "LoRA r16, KL − LoRA r16", known, "").effect_text()
    rates = tables["rates/quick"]
    loras = {rates.rate(f"LoRA r{rank}", "1024 rows") for rank in (1, 4, 16)}
    values |= {
        "lora_rate": ", ".join(f"{rate:g}" for rate in loras),
        "full_rate": f"{rates.rate('full', '1024 rows'):g}",
    }
    for rows in ("1024", "128"):
        means = [rates.values("trained_rows_loss", arm, f"{rows} rows") for arm in ("LoRA r16", "full")]
        gap = interval(means[0][seed] - means[1][seed] for seed in means[0])
        values[f"r16_trained_{rows}"] = gap.text(sign=True)
    for name, claims_of in stated.items():
        values[f"decided_{name.replace('/', '_')}"] = f"{sum(one.decided for one in claims_of)} of {len(claims_of)}"
    for name, results in tables.items():
        edges = [
            f"{arm} ({level})" if level else arm
            for level in results.levels
            for arm in results.arms_at(level)
            if results.at_edge(arm, level)
        ]
        values[f"edges_{name.replace('/', '_')}"] = ", ".join(edges) or "none"
    return values


def main() -> int:
    """Writes the files, or compares them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a file differs")
    check = parser.parse_args().check
    tables = read_tables()
    stated = {name: claims(results) for name, results in tables.items()}
    text = Template(TEMPLATE.read_text(encoding="utf-8"))
    files = {PAGE: text.substitute(numbers(tables, stated), claims=claims_table(stated))}
    files |= {ROOT / "docs/studies" / name / "claims.json": to_json(of) for name, of in stated.items()}
    differing = [file for file, text in files.items() if not file.exists() or file.read_text("utf-8") != text]
    for file in differing:
        print(f"{file.relative_to(ROOT)} is not what its table says" if check else f"wrote {file.relative_to(ROOT)}")
        if not check:
            file.write_text(files[file], encoding="utf-8")
    return int(check and bool(differing))


if __name__ == "__main__":
    sys.exit(main())
