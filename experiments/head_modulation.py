"""V-SEAM's modulation of heads: scale every head by the effect of ablating it.

Run: python experiments/head_modulation.py [--json experiments/results/head_modulation.json] [--steps 750]

Claim (V-SEAM, arXiv 2509.14837): heads can be scored by replacing their output with the mean of the layer's other
heads; scaling each head by clip(1 + λ · score, 0, 2), without training, makes the model answer more questions rightly.
The score of a head is the mean fall of the answer's probability. Positive heads help on prompts that the model answers
rightly, negative heads hurt on those that it answers wrongly.

The paper scales heads of a vision-language model. This script shows the mechanics on a tiny model of text: that of
`row_repair.py` (3 layers, 4 heads), whose training on indirect object identification is stopped half way. Scores come
from one set of prompts and accuracies from another, unlike the released code, which scores and evaluates on the same
questions. Two arms:

* ``trained``: the model as it is. No head was made to be harmful.
* ``planted``: the head of the largest score gets a gate of −1 in an edit around all else, so that one head harms.

Result (results/head_modulation.json, 400 prompts to score on and 400 to evaluate on). ``trained``: accuracy is 0.853,
and 0.863, 0.870 and 0.855 for λ of 1, 2 and 4 (standard errors of the rise 0.008, 0.009 and 0.011). No gain is shown:
all 12 scores are positive, and permuted scores reach 0.870, 0.873 and 0.870. ``planted``: the planted head, L2H0, has
the score −0.244 and the others lie between −0.033 and 0.021. Accuracy is 0.180, and 0.200, 0.258 and 0.458 for λ of 1,
2 and 4; at 4 the planted head is closed. Modulation thus finds and closes a head that harms, and has nothing to gain
where none does.

Null: λ = 0 leaves every probability the same to the bit. Permuted scores (20 draws) give a mean accuracy of 0.854,
0.846 and 0.818 in ``trained``, and of 0.179, 0.189 and 0.237 in ``planted``, at most 0.205, 0.263 and 0.450 there. The
mean gate on all heads gives 0.853, 0.850 and 0.838, and 0.178, 0.168 and 0.168.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from resource_meter import ResourceMeter
from row_repair import indirect_object, trained_model
from study_record import study_parser, study_record, write_record

import interp

Pairs = Sequence[interp.PromptPair]
LAMBDAS = (0.0, 1.0, 2.0, 4.0)


def answers(model: interp.Model, pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
    """Return the probability of each prompt's answer, and whether it is the likeliest token."""
    logits = model.next_token_logits([model.coder.encode(p.clean) for p in pairs])
    ids = torch.tensor([model.coder.continuation(p.answer)[0] for p in pairs])
    probabilities = logits.softmax(-1).gather(1, ids[:, None])[:, 0]
    return probabilities.numpy(), (logits.argmax(-1) == ids).numpy()


def falls(model: interp.Model, pairs: Pairs) -> np.ndarray:
    """Return the fall of the answer's probability when each head is ablated [prompt, layer, head]."""
    effects = interp.ablate(
        model, pairs, model.sites("z"), using="other_heads", metric=interp.prob, show_progress=False
    )
    frame: Any = effects.frame().sort_values(["example", "layer", "head"])
    return -frame["raw"].to_numpy().reshape(len(pairs), model.n_layers, model.n_heads)


def mean_over(values: np.ndarray, chosen: np.ndarray) -> list[list[float]]:
    """Return the mean over the chosen prompts [layer, head]; 0 if there are none."""
    return (values[chosen].sum(0) / max(1, int(chosen.sum()))).tolist()


def scaling(scores: np.ndarray, strength: float) -> np.ndarray:
    """Return the gate of every head, for scores [layer, head]."""
    return np.clip(1 + strength * scores, 0, 2)


def gated(model: interp.Model, pairs: Pairs, gates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return `answers` with a gate on every head [layer, head]."""
    edits = [interp.AttentionEdit(heads=[at], gate=float(gates[at])) for at in np.ndindex(*gates.shape)]
    with model.edited(*edits):
        return answers(model, pairs)


def modulated(model: interp.Model, scored: Pairs, fresh: Pairs, draws: int) -> dict[str, Any]:
    """Score heads on some prompts, scale them for each λ, and return scores and the accuracies on others."""
    fall, (_, is_right) = falls(model, scored), answers(model, scored)
    signed = fall.mean(0)
    unedited, was_right = answers(model, fresh)
    permute = np.random.default_rng(0).permutation
    permuted = [permute(signed.ravel()).reshape(signed.shape) for _ in range(draws)]
    rows = []
    for strength in LAMBDAS:
        gates = scaling(signed, strength)
        probability, right = gated(model, fresh, gates)
        change = right.astype(float) - was_right
        rows.append({
            "lambda": strength, "accuracy": float(right.mean()), "probability": float(probability.mean()),
            "largest_change": float(np.abs(probability - unedited).max()),
            "standard_error_of_rise": float(change.std(ddof=1) / len(fresh) ** 0.5),
            "mean_gate_on_all": float(gated(model, fresh, np.full_like(gates, gates.mean()))[1].mean()),
            "permuted": [float(gated(model, fresh, scaling(p, strength))[1].mean()) for p in permuted],
        })  # fmt: skip
        print("λ = {lambda}: {accuracy:.3f} (rise ± {standard_error_of_rise:.3f}), mean gate on all "
              "{mean_gate_on_all:.3f}".format(**rows[-1]), f"permuted {np.mean(rows[-1]['permuted']):.3f}")  # fmt: skip
    return {
        "accuracy_where_scored": float(is_right.mean()), "accuracy": float(was_right.mean()),
        "signed": signed.tolist(), "positive": mean_over(np.maximum(fall, 0), is_right),
        "negative": mean_over(np.maximum(-fall, 0), ~is_right), "scaled": rows,
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, modulate the model as it is and with a planted harmful head, print and write the accuracies."""
    parser = study_parser(__doc__)
    parser.add_argument("--steps", type=int, default=750, help="updates of the training")
    parser.add_argument("--prompts", type=int, default=400, help="prompts to score on; as many to evaluate on")
    parser.add_argument("--draws", type=int, default=20, help="permutations of the scores")
    options = parser.parse_args(arguments)
    with ResourceMeter() as meter:
        model, rng = trained_model(options.steps), random.Random("fresh prompts")
        scored, fresh = ([indirect_object(rng) for _ in range(options.prompts)] for _ in range(2))
        trained = modulated(model, scored, fresh, options.draws)
        signed = np.array(trained["signed"])
        layer, head = (int(i) for i in np.unravel_index(signed.argmax(), signed.shape))
        with model.edited(interp.AttentionEdit(heads=[(layer, head)], gate=-1.0)):
            planted = modulated(model, scored, fresh, options.draws)
    print("signed scores [layer, head]:", signed.round(3), np.round(planted["signed"], 3), sep="\n")
    numbers = {
        "steps": options.steps, "prompts": options.prompts, "trained": trained, "planted": planted,
        "planted_head": f"L{layer}H{head}",
    }  # fmt: skip
    return write_record(study_record(model, meter, numbers), options.json)


if __name__ == "__main__":
    main()
