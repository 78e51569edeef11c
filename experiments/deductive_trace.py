"""Deductive traces: confidence along a symbolic trace, and the heads that choose a token in its middle.

Run: python experiments/deductive_trace.py [--json experiments/results/deductive_trace.json] [--prompts 24]

Claim (Algorithmic Deductive Circuits, arXiv 2605.27824): in a symbolic derivation a model is unsure (p < 0.8) mostly
where it selects a premise or a rule. Few heads carry the choice of the rule: their average indirect effect (AIE) is
large, and zeroing about 3% of all heads destroys it, while as many random heads do little. The paper uses models of 4
to 8 billion parameters; this is SmolLM2-135M-Instruct, which gets one example in front of shorter traces:

    Rules: S -> N, G -> D, N -> G, B -> Y. Start: S. Trace: S -> N, N -> G, G -> D.

Tokens of the trace are premises (which repeat the last conclusion), arrows, conclusions (which need the rule) and ends
(comma or full stop). `model.confidence` gives the probability of each. For the AIE, the corrupt prompt exchanges the
conclusions of the second rule of the chain and of the rule that is not needed. The trace stays. Each head's z is
restored at the second arrow of the trace, and the rise of the right conclusion's probability is read there, in the
middle of the prompt (``at=``); only traces whose second conclusion the model predicts rightly are used. The heads with
the largest AIE then get a gate of 0 on other prompts, at all tokens.

Result (results/deductive_trace.json; 48 traces for the confidence, 24 for the AIE, 24 others for closed heads). Where
the model is unsure agrees with the claim: p < 0.8 at 94% of premises and 92% of conclusions, at 64% of the ends and 19%
of the arrows. This small model is right at 70% of premises and 63% of conclusions. The right conclusion's probability
is 0.50, and 0.13 after the corrupt rules. L18H6 alone restores 0.14 of it, L18H7 0.06, L29H1 0.05 and L23H0 0.04; no
other of the 270 heads restores 0.02. Without the eight best heads (3%), right conclusions fall from 71% to 15%, right
premises from 71% to 33%, arrows from 99% to 76% and ends from 86% to 81%.

Null: eight random heads among the others, closed on the same prompts. In eight of ten draws 47% to 74% of conclusions
stay right. In the other two 19% and 3% do; there premises fall to 47% and 1%, arrows to 75% and none, and ends to 61%
and 43%. Closing random heads can thus destroy the whole trace, and the fall at conclusions alone does not tell the
best heads from those draws. That the best heads restore the choice, and that ends and arrows suffer less, does.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from resource_meter import ResourceMeter
from study_record import study_parser, study_record, write_record

import interp

LETTERS = "ABCDEFGHKLMNPQRSTUVWXYZ"
KINDS = ("premise", "arrow", "conclusion", "end")
STEPS, STEP = 3, 1  # rules of a chain; the step whose conclusion is read
UNSURE, BEST = 0.8, 8
Head = tuple[int, int]


def drawn(rng: random.Random) -> tuple[list[str], list[tuple[str, str]]]:
    """Draw a chain of letters, and its rules and one that is not needed, in random order."""
    letters = rng.sample(LETTERS, STEPS + 3)
    chain = letters[: STEPS + 1]
    rules = [*pairwise(chain), (letters[-2], letters[-1])]
    rng.shuffle(rules)
    return chain, rules


def told(chain: Sequence[str], rules: Iterable[tuple[str, str]]) -> str:
    """Write a derivation: rules, start and trace."""
    said, trace = (", ".join(f"{a} -> {b}" for a, b in pairs) for pairs in (rules, pairwise(chain)))
    return f"Rules: {said}. Start: {chain[0]}. Trace: {trace}."


def derivation(rng: random.Random) -> interp.PromptPair:
    """Draw an example and a derivation; the corrupt prompt exchanges two conclusions among the rules."""
    example, (chain, rules) = told(*drawn(rng)) + "\n", drawn(rng)
    right = chain[STEP + 1]
    wrong = next(b for a, b in rules if a not in chain)
    exchanged = [(a, {right: wrong, wrong: right}.get(b, b)) for a, b in rules]
    clean, corrupt = (example + told(chain, r) for r in (rules, exchanged))
    arrow = len(clean) - len(", ".join(f"{a} -> {b}" for a, b in pairwise(chain[STEP:])) + ".") + len("A ")
    return interp.PromptPair(clean, corrupt, f" {right}", f" {wrong}", {"choice": (arrow, arrow + 2)})


def along_traces(model: interp.Model, pairs: Sequence[interp.PromptPair]) -> Any:
    """Return a table of the traces' tokens: example, kind, step, probability, and whether it is the likeliest."""
    table = model.confidence([pair.clean for pair in pairs]).dropna(subset=["probability"])
    last = table.groupby("example").tail(4 * STEPS)
    steps, kinds = zip(*[(step, kind) for step in range(STEPS) for kind in KINDS], strict=True)
    return last.assign(
        kind=kinds * len(pairs), step=steps * len(pairs), right=last["best"] == last["next"],
        unsure=last["probability"] < UNSURE,
    )  # fmt: skip


def by_kind(table: Any, *columns: str) -> dict[str, dict[str, float]]:
    """Return the means of some columns for each kind of token."""
    means = table.groupby("kind")[list(columns)].mean()
    return {kind: {c: float(means.loc[kind, c]) for c in columns} for kind in KINDS}


def indirect_effects(
    model: interp.Model, pairs: Sequence[interp.PromptPair]
) -> tuple[dict[Head, float], dict[str, float]]:
    """Return each head's average indirect effect, largest first, and the mean probability in both runs."""
    sites = model.sites("z", positions="choice")
    effects = interp.patch(model, pairs, sites, metric=interp.prob, at="choice", show_progress=False)
    frame: Any = effects.frame()
    means = frame.groupby(["layer", "head"])["raw"].mean().sort_values(ascending=False)
    unpatched = {run: float(frame[run].mean()) for run in ("clean", "corrupt")}
    return {(int(layer), int(head)): float(rise) for (layer, head), rise in means.items()}, unpatched


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure confidence, AIE and what closed heads do, print and write them."""
    parser = study_parser(__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--prompts", type=int, default=24, help="prompts of each measurement")
    parser.add_argument("--draws", type=int, default=10, help="random groups of heads")
    options = parser.parse_args(arguments)
    model, rng = interp.load(options.model), random.Random(0)
    with ResourceMeter() as meter:
        scored, fresh = ([derivation(rng) for _ in range(n * options.prompts)] for n in (2, 1))
        table = along_traces(model, scored)
        read = table[(table["kind"] == "conclusion") & (table["step"] == STEP)]
        right = [pair for pair, is_right in zip(scored, read["right"], strict=True) if is_right]
        aie, unpatched = indirect_effects(model, right[: options.prompts])
        heads, n = list(aie), min(BEST, len(aie) // 2)
        groups = {"best": heads[:n], **{f"random {i}": rng.sample(heads[n:], n) for i in range(options.draws)}}
        closed = {"none": by_kind(along_traces(model, fresh), "probability", "right")}
        for name, group in groups.items():
            with model.edited(interp.AttentionEdit(heads=group, gate=0.0)):
                closed[name] = by_kind(along_traces(model, fresh), "probability", "right")
            print(name, closed[name], flush=True)
    named = {name: [f"L{layer}H{head}" for layer, head in group] for name, group in groups.items()}
    numbers = {
        "prompts": options.prompts, "example": scored[0].clean, "corrupt": scored[0].corrupt,
        "confidence": by_kind(table, "probability", "unsure", "right"),
        "share_of_unsure_tokens": (table[table["unsure"]]["kind"].value_counts(normalize=True)).to_dict(),
        "pairs_of_aie": len(right[: options.prompts]), "unpatched_probability": unpatched,
        "aie": {f"L{layer}H{head}": aie[layer, head] for layer, head in heads[:20]},
        "closed": closed, "groups": named,
    }  # fmt: skip
    print(json.dumps({k: v for k, v in numbers.items() if k != "closed"}, indent=1))
    return write_record(study_record(model, meter, numbers), options.json)


if __name__ == "__main__":
    main()
