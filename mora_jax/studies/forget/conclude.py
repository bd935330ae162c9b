"""The written conclusion of the study `forget`, from its table alone."""

from __future__ import annotations

from mora_jax.studies.conclusion import arms_table, table
from mora_jax.studies.forget.intruders import EPSILON, FACTORS
from mora_jax.studies.forget.presets import CONTROL, FULL
from mora_jax.studies.forget.trade import known_at, lowest_known_at, paths, paths_by_rate
from mora_jax.studies.intervals import Interval, interval, paired, verdict
from mora_jax.studies.results import Results

LEARNED, KNOWN = "loss", "base_text_loss"


def paragraphs(results: Results) -> list[str]:
    """In Markdown."""
    return [
        _setting(results),
        arms_table(results, _metrics(results)),
        "## At equal steps\n\n" + _equal_steps(results),
        "## At equal learning\n\n" + _equal_learning(results),
        "## The learning rate is a knob of its own\n\n" + _rates(results),
        "## The spectrum of the change\n\n" + _spectrum(results),
        "## Intruder dimensions\n\n" + _intruders(results),
    ]


def _has(results: Results, metric: str) -> bool:
    return bool((results.frame["metric"] == metric).any())


def _metrics(results: Results) -> dict[str, str]:
    exact = {"exact_match": "exact match"} if _has(results, "exact_match") else {}
    return {LEARNED: "loss, new domain", "accuracy": "token accuracy", **exact, KNOWN: "loss, old domain"}


def _mains(results: Results) -> list[str]:
    return [arm for arm in results.arms if CONTROL not in arm]


def _starts(results: Results, metric: str) -> float:
    """The value of the base, which all cells start from."""
    values = [curve[0][1] for arm in results.arms for curve in results.curves(metric, arm).values()]
    return interval(values).mean


def _setting(results: Results) -> str:
    old, new = _starts(results, KNOWN), _starts(results, LEARNED)
    return (
        f"Before training the loss is {new:.3f} nats a token on the new domain and {old:.3f} on texts of the old one. "
        "*Learning* is how far the first falls, *forgetting* how far the second rises; both are measured on rows that "
        "were not trained on."
    )


def _equal_steps(results: Results) -> str:
    low = next((arm for arm in _mains(results) if arm != FULL), None)
    if FULL not in results.arms or low is None:
        return "There is nothing to compare: full or all adapters are missing."
    pairs = [(FULL, arm) for arm in _mains(results) if arm != FULL]
    pairs += [(arm, arm.split(CONTROL)[0]) for arm in results.arms if CONTROL in arm]
    lines = [_against(results, *pair) for pair in pairs if results.difference(LEARNED, *pair).n]
    learned, known = results.difference(LEARNED, FULL, low), results.difference(KNOWN, FULL, low)
    halves = (
        verdict(learned, f"{low} learns more than full", f"{low} learns less than full"),
        verdict(known, f"{low} forgets less than full", f"{low} forgets more than full"),
    )
    words = " and ".join(half if low in half else f"{half} in {what}" for half, what in zip(halves, _WHAT, strict=True))
    said = f"With rates chosen by the new domain alone, after equally many steps: **{words}**."
    if learned.decided and known.decided:
        holds = [half for half, one in zip(_SLOGAN, (-learned.mean, known.mean), strict=True) if one > 0]
        said += " Of *learns less* and *forgets less* " + (
            f"{' and '.join(holds)} holds here."
            if len(holds) == 1
            else "both hold here."
            if holds
            else "neither holds here."
        )
    return said + "\n\n" + "\n".join(lines)


_WHAT = ("learning", "forgetting")
_SLOGAN = ("the first", "the second")


def _against(results: Results, arm: str, other: str) -> str:
    learned, known = results.difference(LEARNED, arm, other), results.difference(KNOWN, arm, other)
    first = verdict(learned, "learns less", "learns more")
    second = verdict(known, "forgets more", "forgets less")
    return (
        f"- **{arm}** against **{other}**: {_said(first, _WHAT[0])} ({learned.text(sign=True)} on the new domain), "
        f"{_said(second, _WHAT[1])} ({known.text(sign=True)} on the old)."
    )


def _said(words: str, what: str) -> str:
    return words if words.startswith(("learns", "forgets")) else f"{words} in {what}"


def matched(results: Results) -> dict[str, dict[int, float]]:
    """For each arm by seed the old domain's loss where it has learned what the weakest arm of that seed ends with."""
    ends: dict[int, list[float]] = {}
    for arm in _mains(results):
        for seed, value in results.last(LEARNED, arm).items():
            ends.setdefault(seed, []).append(value)
    found: dict[str, dict[int, float]] = {}
    for arm in results.arms:
        by_seed = paths(results, arm, LEARNED, KNOWN)
        values = {seed: known_at(path, max(ends[seed])) for seed, path in by_seed.items() if seed in ends}
        found[arm] = {seed: value for seed, value in values.items() if value is not None}
    return found


def _equal_learning(results: Results) -> str:
    found, start, envelope = matched(results), _starts(results, KNOWN), _envelope(results)
    reference = FULL if found.get(FULL) else next((arm for arm in found if found[arm]), None)
    if reference is None:
        return "No arm has come to its end."
    rows, lines = [], []
    for arm in results.arms:
        mine = interval(value - start for value in found[arm].values())
        difference = paired(found[arm], found[reference])
        minus = "" if arm == reference else difference.text(sign=True)
        rows.append([arm, mine.text(), str(mine.n), minus, *envelope.get(arm, ("missing", ""))])
        if arm != reference and difference.n:
            words = _said(verdict(difference, "forgets more", "forgets less"), _WHAT[1])
            lines.append(f"- **{arm}** against **{reference}**: {words}, {difference.text(sign=True)}.")
    heads = ["arm", "forgetting", "seeds that got there", f"minus {reference}", "least over rates, seed 0", "at rate"]
    return (
        "On each seed the arm, controls aside, that ends with the highest loss on the new domain sets the mark. The "
        "table has the rise of the old domain's loss where each arm first had learned as much, between evaluations by "
        "a line: with the chosen rate over seeds, and the least over all rates on the seed that chooses (one seed, so "
        "no interval).\n\n" + table(heads, rows) + "\n\n" + "\n".join(lines)
    )


def _envelope(results: Results) -> dict[str, tuple[str, str]]:
    """On the seed that chooses, by arm: the least forgetting over rates at the mark, and at which rate."""
    by_arm = {arm: paths_by_rate(results, arm, LEARNED, KNOWN) for arm in results.arms}
    ends = [path[-1][0] for arm in _mains(results) if (path := by_arm[arm].get(results.rate(arm) or 0.0))]
    found = {}
    for arm, by_rate in by_arm.items() if ends else ():
        lowest = lowest_known_at(by_rate, max(ends))
        if lowest is not None:
            rate, known = lowest
            found[arm] = f"{known - by_rate[rate][0][1]:.3f}", f"{rate:g}"
    return found


def _ends_by_rate(results: Results, arm: str) -> dict[float, tuple[float, float]]:
    """After the last step on the seed that chooses, by rate: the new domain's loss and how far the old one's rose."""
    by_rate = paths_by_rate(results, arm, LEARNED, KNOWN)
    return {rate: (path[-1][0], path[-1][1] - path[0][1]) for rate, path in sorted(by_rate.items()) if path}


def _learn(ends: dict[float, tuple[float, float]]) -> list[float]:
    """How far the old domain's loss rose at those rates at which an arm learns: see `_rates`."""
    lowest = min(learned for learned, _ in ends.values())
    return [risen for learned, risen in ends.values() if learned <= 2 * lowest]


def _rates(results: Results) -> str:
    found = {arm: ends for arm in results.arms if (ends := _ends_by_rate(results, arm))}
    chosen = {arm: results.rate(arm) for arm in found}
    at_chosen = [ends[rate][1] for arm, ends in found.items() if CONTROL not in arm and (rate := chosen[arm]) in ends]
    if not at_chosen:
        return "No learning rates were compared."
    rows = [
        [f"{arm}, {rate:g}{' (chosen)' if rate == chosen[arm] else ''}", f"{learned:.3f}", f"{risen:+.3f}"]
        for arm, ends in found.items()
        for rate, (learned, risen) in ends.items()
    ]
    learn = {arm: _learn(ends) for arm, ends in found.items()}
    spans = {arm: max(risen) - min(risen) for arm, risen in learn.items()}
    widest = max(spans, key=lambda arm: spans[arm])
    said = (
        "On the seed that chooses, among the rates of one arm that end with at most twice its lowest loss on the new "
        f"domain, the old domain's rise differs by {sum(spans.values()) / len(spans):.3f} on average (most, "
        f"{spans[widest]:.3f}, for {widest}); among the methods at their chosen rates by "
        f"{max(at_chosen) - min(at_chosen):.3f}. **What is forgotten depends on the learning rate as well as on the "
        "method.**"
    )
    if FULL in learn:
        both = [arm for arm in learn if CONTROL not in arm and arm != FULL and _overlap(learn[FULL], learn[arm])]
        if both:
            said += (
                f" At such rates full and {', '.join(both)} have forgotten amounts whose ranges overlap: a comparison "
                "at one rate each can show either of two as the one that forgets less."
            )
    return said + "\n\n" + table(["arm, rate", "loss, new domain", "old domain's rise"], rows)


def _overlap(first: list[float], second: list[float]) -> bool:
    return max(min(first), min(second)) < min(max(first), max(second))


def _spectrum(results: Results) -> str:
    heads = {
        "rank90": "rank at 90 % of the energy",
        "rank90_attention": "attention",
        "rank90_MLP": "MLP",
        "stable_rank": "stable rank",
        "delta_norm": "Frobenius norm",
    }
    said = "Means over matrices; the norm is of all of them together."
    if FULL in results.arms and (courses := results.curves("rank90", FULL)):
        steps = sorted({step for course in courses.values() for step, _ in course})
        means = {
            step: interval(dict(course)[step] for course in courses.values() if step in dict(course)).mean
            for step in steps
        }
        said += " In full fine-tuning the rank goes " + ", ".join(f"{means[s]:.1f} at step {s}" for s in steps) + "."
        kinds = paired(results.last("rank90_MLP", FULL), results.last("rank90_attention", FULL))
        said += f" MLP minus attention: {kinds.text(1, sign=True)}."
    forgetting = _norms(results)
    return f"{said}\n\n{arms_table(results, heads, digits=1)}" + (f"\n\n{forgetting}" if forgetting else "")


def _norms(results: Results) -> str:
    """Whether the arm that moves weights furthest forgets most."""
    mains = [arm for arm in _mains(results) if results.last("delta_norm", arm)]
    if len(mains) < 2:
        return ""
    furthest = max(mains, key=lambda arm: results.mean("delta_norm", arm).mean)
    most = max(mains, key=lambda arm: results.mean(KNOWN, arm).mean)
    if furthest == most:
        return f"{furthest} moves the weights furthest and forgets most."
    return f"{furthest} moves the weights furthest, but {most} forgets most: distance alone does not say what is lost."


def _intruders(results: Results) -> str:
    heads = [
        "arm",
        f"intruders a matrix at ε = {EPSILON}",
        "old domain's loss, λ = 0",
        "minus λ = 1",
        "new domain's loss, λ = 0",
        "minus λ = 1",
    ]
    rows, lines = [], []
    for arm in results.arms:
        counts = results.mean(f"intruders_{EPSILON}", arm)
        if not counts.n:
            continue
        row = [arm, counts.text(2)]
        for metric in (KNOWN, LEARNED):
            row += [results.mean(f"{metric}_scaled_0.0", arm).text(), _moved(results, metric, arm).text(sign=True)]
        rows.append(row)
        if CONTROL not in arm:
            lines.append(f"- **{arm}**: {_removal(results, arm, counts)}")
    return (
        f"Of the leading {results.preset.data['top']} singular vectors of each tuned matrix; a matrix minus its "
        "intruders is λ = 0, as trained λ = 1. In brackets: changes on the old domain, on the new one.\n\n"
        f"{table(heads, rows)}\n\n" + "\n".join(lines)
    )


def _moved(results: Results, metric: str, arm: str, factor: float = 0.0) -> Interval:
    """What scaling intruders by λ changes in a loss, paired by seed; 0 takes them away."""
    return paired(results.last(f"{metric}_scaled_{factor}", arm), results.last(metric, arm))


def _removal(results: Results, arm: str, counts: Interval) -> str:
    if counts.mean == 0:
        return "it has none, so there is nothing to take away."
    risen = interval(value - _starts(results, KNOWN) for value in results.last(KNOWN, arm).values())
    old, new = _moved(results, KNOWN, arm), _moved(results, LEARNED, arm)
    first = verdict(old, "without them the old domain is worse", "without them the old domain is better")
    share = ""
    if old.decided and old.mean < 0 < risen.mean:
        share = f", {min(1.0, -old.mean / risen.mean):.0%} of what was lost comes back"
    second = verdict(new, "the new one is worse", "the new one is better")
    partly = _pair(*(_moved(results, metric, arm, _PARTLY) for metric in (KNOWN, LEARNED)))
    return (
        f"{_in(first, 'the old domain')}{share}; {_in(second, 'the new one')} ({_pair(old, new)}). At λ = {_PARTLY:g}: "
        f"{partly}."
    )


_PARTLY = max(FACTORS)


def _in(words: str, where: str) -> str:
    return words if "worse" in words or "better" in words else f"{words} on {where}"


def _pair(*found: Interval) -> str:
    return ", ".join(one.text(sign=True) for one in found)
