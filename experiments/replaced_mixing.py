"""Replaced mixing: the loss on text when attention weights are another distribution, in some of the layers.

Run: python experiments/replaced_mixing.py [--json experiments/results/replaced_mixing.json] [--windows 4] [--length 96]

Claim (after "Deconstructing Attention", arXiv 2510.11602, which trains each variant): mixing tokens is indispensable;
that weights depend on the input is not, as long as some layers keep it. The paper trains its models with the variants.
Here the variants replace the attention of a trained model, which was never adapted to them, so that losses are upper
bounds of what training would reach, and only the order of variants and of layer subsets can be compared.

Variants, in all heads of the layers of a subset (`interp.AttentionEdit`):

* ``identity``: every token reads itself. No mixing.
* ``uniform``: all visible keys alike.
* ``random``: weights drawn at random, for each window, head, query and key; they do not depend on the text.

Subsets: all layers, every other layer (15 of 30), the halves, and the first, middle and last third.

Result (results/replaced_mixing.json: SmolLM2-135M-Instruct, 4 windows of 96 tokens; loss in nats per token, 5.08
without edits, ln(vocabulary) is 10.80):

=============  ========  =======  ======
layers         identity  uniform  random
=============  ========  =======  ======
all                9.39     8.56    8.63
even              10.04     8.06    8.15
odd               10.28     6.89    7.09
first half         9.39     8.58    8.61
last half          8.92     6.76    6.82
first third        7.63     7.86    7.92
middle third       7.94     6.14    6.22
last third         7.89     5.95    5.99
=============  ========  =======  ======

No mixing is worse than uniform or random mixing, except in the first third alone. Fixed mixing costs most in early
layers: 2.8 nats in the first third, 1.1 in the middle one and 0.9 in the last. What the paper finds for trained models,
that variants do well if interleaved with attention, is not seen without training: uniform mixing in every other layer
leaves a loss of 8.06 or 6.89 (mean 7.48), in one half of the layers 8.58 or 6.76 (mean 7.67).

Null: gates of 1 in all layers leave the loss the same to the bit, and so does a block without edits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from resource_meter import ResourceMeter
from study_record import study_parser, study_record, write_record
from text_loss import about_text, loss, windows

import interp

VARIANTS = ("identity", "uniform", "random")


def subsets(n_layers: int) -> dict[str, Sequence[int]]:
    """Return layers by the name of their subset."""
    half, third = n_layers // 2, n_layers // 3
    return {
        "all": range(n_layers), "even": range(0, n_layers, 2), "odd": range(1, n_layers, 2),
        "first half": range(half), "last half": range(half, n_layers),
        "first third": range(third), "middle third": range(third, 2 * third), "last third": range(2 * third, n_layers),
    }  # fmt: skip


def replaced_losses(model: interp.Model, ids: torch.Tensor) -> list[dict[str, Any]]:
    """Return one row per variant and subset, with its loss in nats per token."""
    rows = []
    for name, layers in subsets(model.n_layers).items():
        for variant in VARIANTS:
            with model.edited(interp.AttentionEdit(layers=layers, counterfactual=variant)):
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
    parser.add_argument("--windows", type=int, default=4, help="number of windows of text")
    parser.add_argument("--length", type=int, default=96, help="tokens of a window")
    options = parser.parse_args(arguments)
    model = interp.load(options.model)
    ids = windows(model, options.windows, options.length)
    with ResourceMeter() as meter:
        unedited = loss(model, ids)
        nulls, rows = null_differences(model, ids, unedited), replaced_losses(model, ids)
    print(f"unedited {unedited:.3f}; nulls {nulls}; {meter.seconds:.0f} s")
    uniform = float(torch.tensor(model.bridge.cfg.d_vocab).log())
    numbers = {
        **about_text(ids), "unedited_loss": unedited, "uniform_prediction": uniform, "null_differences": nulls,
        "losses": rows,
    }  # fmt: skip
    return write_record(study_record(model, meter, numbers), options.json)


if __name__ == "__main__":
    main()
