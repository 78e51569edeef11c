"""Replaced mixing: the loss on text when attention weights are another distribution, in some of the layers.

Run: python experiments/replaced_mixing.py [--json experiments/results/replaced_mixing.json] [--windows 12]

Claim (after "Deconstructing Attention", arXiv 2510.11602, which trains each variant): mixing tokens is indispensable;
that weights depend on the input is not, as long as some layers keep it. The paper trains its models with the variants.
Here the variants replace the attention of a trained model, which was never adapted to them, so that losses are upper
bounds of what training would reach, and only the order of variants and of layer subsets can be compared.

Variants, in all heads of the layers of a subset (`interp.AttentionEdit`):

* ``identity``: every token reads itself. No mixing.
* ``uniform``: all visible keys alike.
* ``random``: weights drawn at random, for each window, head, query and key; they do not depend on the text.
* ``static``: the layer's own mean weights by distance, over heads, queries and other text. The mean is taken over the
  first token and over the distances 0, 1, 2–3, 4–7, 8–15 and so on; a query's row is scaled to the sum 1.

Subsets: all layers, every other layer (15 of 30), the halves, and the first, middle and last third.

Result (results/replaced_mixing.json: SmolLM2-135M-Instruct, 12 windows of 32 tokens; loss in nats per token, 5.64
without edits, ln(vocabulary) is 10.80):

=============  ========  =======  ======  ======
layers         identity  uniform  random  static
=============  ========  =======  ======  ======
all                9.44     8.62    8.64    8.84
even              10.25     8.31    8.28    7.93
odd               10.26     6.72    6.90    6.12
first half         9.44     8.57    8.50    8.85
last half          9.34     6.94    7.20    6.08
first third        7.63     7.82    7.91    7.95
middle third       7.92     6.29    6.39    5.96
last third         8.45     6.42    6.45    6.01
=============  ========  =======  ======  ======

No mixing is worse than the other variants, except in the first third alone. Fixed mixing costs most in early layers,
where the layer's own mean weights are no better than uniform ones (8.85 and 8.57 in the first half). In late layers
they keep most of what attention does: static mixing adds 0.44 nats in the last half, where uniform mixing adds 1.29,
and 0.31 and 0.36 in the middle and last third, where uniform mixing adds 0.65 and 0.78. What the paper finds for
trained models, that variants do well if interleaved with attention, is seen only in part without training: in every
other layer uniform mixing leaves a loss of 8.31 or 6.72 (mean 7.51) and static mixing one of 7.93 or 6.12 (mean 7.02);
in one half of the layers 8.57 or 6.94 (mean 7.75), and 8.85 or 6.08 (mean 7.47).

Null: gates of 1 in all layers leave the loss the same to the bit, and so does a block without edits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from resource_meter import ResourceMeter
from study_record import study_parser, study_record, write_record
from text_loss import about_text, loss, windows

import interp

VARIANTS = ("identity", "uniform", "random", "static")


def subsets(n_layers: int) -> dict[str, Sequence[int]]:
    """Return layers by the name of their subset."""
    half, third = n_layers // 2, n_layers // 3
    return {
        "all": range(n_layers), "even": range(0, n_layers, 2), "odd": range(1, n_layers, 2),
        "first half": range(half), "last half": range(half, n_layers),
        "first third": range(third), "middle third": range(third, 2 * third), "last third": range(2 * third, n_layers),
    }  # fmt: skip


def classes(n: int) -> np.ndarray:
    """Return the class of each pair of a query and a key [n, n]: distances on a scale of octaves; −1 for later keys.

    The first token is a class of its own, except as its own key.
    """
    query, key = np.arange(n)[:, None], np.arange(n)[None]
    distance = query - key
    octave = np.where(distance > 0, 1 + np.log2(np.maximum(distance, 1)).astype(int), 0)
    first = np.where((key == 0) & (query > 0), octave.max() + 1, octave)
    return np.where(distance >= 0, first, -1)


def static_rows(model: interp.Model, ids: torch.Tensor) -> np.ndarray:
    """Return each layer's mean weights by class of distance [layer, query, key], over heads and windows."""
    patterns = model.attention_patterns([interp.Prompt(row.tolist()) for row in ids])  # pyright: ignore
    of_pair = classes(ids.shape[1])
    rows = np.zeros((model.n_layers, *of_pair.shape))
    for layer in range(model.n_layers):
        maps = [patterns.map((layer, head), i) for head in range(model.n_heads) for i in range(len(ids))]
        mean = np.mean(maps, 0)
        for number in range(of_pair.max() + 1):
            rows[layer][of_pair == number] = mean[of_pair == number].mean()
    return rows / rows.sum(-1, keepdims=True)


def mixing(variant: str, layers: Sequence[int], rows: np.ndarray) -> list[interp.AttentionEdit]:
    """Return the edits of a variant; ``rows`` [layer, query, key] are those of static mixing."""
    if variant != "static":
        return [interp.AttentionEdit(layers=layers, counterfactual=variant)]  # pyright: ignore
    return [
        interp.AttentionEdit(queries=query, layers=layer, weights=row.tolist())
        for layer in layers for query, row in enumerate(rows[layer])
    ]  # fmt: skip


def replaced_losses(model: interp.Model, ids: torch.Tensor, rows_of_layers: np.ndarray) -> list[dict[str, Any]]:
    """Return one row per variant and subset, with its loss in nats per token."""
    rows = []
    for name, layers in subsets(model.n_layers).items():
        for variant in VARIANTS:
            with model.edited(*mixing(variant, layers, rows_of_layers)):
                rows.append({"layers": name, "n_layers": len(layers), "mixing": variant, "loss": loss(model, ids)})
            print("{layers:>13} {mixing:>9}: {loss:.3f}".format(**rows[-1]), flush=True)
    return rows


def null_differences(model: interp.Model, ids: torch.Tensor, unedited: float) -> dict[str, float]:
    """Return how far edits that change nothing move the loss."""
    with model.edited(interp.AttentionEdit(gate=1.0)):
        gates_of_one = loss(model, ids)
    with model.edited():
        no_edit = loss(model, ids)
    return {"gates of 1": gates_of_one - unedited, "no edit": no_edit - unedited}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure the loss of every variant in every subset, print and write it."""
    parser = study_parser(__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--windows", type=int, default=12, help="windows of text, and as many for the mean weights")
    parser.add_argument("--length", type=int, default=32, help="tokens of a window")
    options = parser.parse_args(arguments)
    model = interp.load(options.model)
    every = windows(model, 2 * options.windows, options.length)
    ids, other = every[::2], every[1::2]
    with ResourceMeter() as meter:
        unedited = loss(model, ids)
        nulls, rows = null_differences(model, ids, unedited), replaced_losses(model, ids, static_rows(model, other))
    print(f"unedited {unedited:.3f}; nulls {nulls}; {meter.seconds:.0f} s")
    uniform = float(torch.tensor(model.bridge.cfg.d_vocab).log())
    numbers = {
        **about_text(ids), "unedited_loss": unedited, "uniform_prediction": uniform, "null_differences": nulls,
        "losses": rows,
    }  # fmt: skip
    return write_record(study_record(model, meter, numbers), options.json)


if __name__ == "__main__":
    main()
