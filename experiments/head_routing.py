"""Mixture of heads: gates on heads chosen once for all tokens, and for every token.

Run: python experiments/head_routing.py --windows 8 [--json experiments/results/head_routing.json] [--length 96]

Claim (after MoH, mixture-of-head attention, arXiv 2410.11842): a token needs only some heads of a layer, and which ones
differs from token to token. A model therefore loses less if k heads of each layer are chosen for every token than if
the same k heads serve all tokens. MoH trains a router; nothing is trained here. Gates are 1 or 0, and the heads that
stay open are chosen in three ways:

* ``token``: at every token the k heads of each layer with the largest norm of their output there (``value_norm``);
* ``static``: the k heads of each layer whose mean norm is largest on other text;
* ``random`` (null): k heads drawn for every token.

The norms of ``token`` come from the unedited run on the same text: they stand for a router, and are not a saving.

Result (results/head_routing.json: SmolLM2-135M-Instruct, 9 heads a layer, 8 windows of 96 tokens, loss 4.987 nats per
token without edits). Loss with 8, 7, 6 and 4 heads open: 4.984, 5.031, 5.049 and 5.482 if they are chosen for every
token; 5.127, 5.180, 5.353 and 5.872 if the choice is static. One head of nine can be closed at every token at no cost.

Null: random heads cost more for every k: 5.218, 5.683, 6.300 and 8.435. Gates of 1 leave the loss the same to the bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import headstats
import numpy as np
import torch
from resource_meter import ResourceMeter
from study_record import study_parser, study_record, write_record
from text_loss import about_text, loss, windows

import interp

CHOICES = ("token", "static", "random")
NORMS = headstats.StatSpec(value_norm=True)


def output_norms(model: interp.Model, ids: torch.Tensor) -> np.ndarray:
    """Return the norms of heads' outputs [window, layer, head, position], before W_O."""
    return np.stack(model.attention_stats(ids, NORMS).values["value_norm"])


def largest(scores: np.ndarray, k: int) -> np.ndarray:
    """Return where the ``k`` largest scores along the axis of heads are; the array is [layer, head, position]."""
    order = np.argsort(-scores, axis=1, kind="stable")
    is_open = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(is_open, order[:, :k], True, axis=1)
    return is_open


def closing(is_open: np.ndarray) -> Iterable[interp.AttentionEdit]:
    """Return edits that close the gates of a window, where ``is_open`` [layer, head, position] is false."""
    for layer, head in np.argwhere(~is_open.all(-1)):
        tokens = np.flatnonzero(~is_open[layer, head]).tolist()
        yield interp.AttentionEdit(queries=tokens, heads=[(int(layer), int(head))], gate=0.0)


def gated_loss(model: interp.Model, ids: torch.Tensor, scores: np.ndarray, k: int) -> float:
    """Return the mean loss with k heads open at every token; scores are [window, layer, head, position]."""
    losses = []
    for row, of_window in zip(ids, scores, strict=True):
        with model.edited(*closing(largest(of_window, k))):
            losses.append(loss(model, row[None]))
    return float(np.mean(losses))


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure the loss for each number of open heads and each choice, print and write it."""
    parser = study_parser(__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--windows", type=int, default=4, help="windows of text, and as many for the static choice")
    parser.add_argument("--length", type=int, default=96, help="tokens of a window")
    parser.add_argument("--open", type=int, nargs="+", default=[8, 7, 6, 4], help="open heads of a layer")
    options = parser.parse_args(arguments)
    model = interp.load(options.model)
    every = windows(model, 2 * options.windows, options.length)
    ids, other = every[::2], every[1::2]
    with ResourceMeter() as meter:
        norms = output_norms(model, ids)
        scores = {
            "token": norms,
            "static": np.broadcast_to(output_norms(model, other).mean((0, 3), keepdims=True), norms.shape),
            "random": np.random.default_rng(0).random(norms.shape),
        }
        unedited = float(np.mean([loss(model, row[None]) for row in ids]))
        with model.edited(interp.AttentionEdit(gate=1.0)):
            null = float(np.mean([loss(model, row[None]) for row in ids])) - unedited
        rows = []
        for k in options.open:
            for choice in CHOICES:
                rows.append({"open_heads": k, "choice": choice, "loss": gated_loss(model, ids, scores[choice], k)})
                print("{open_heads} heads, {choice:>6}: {loss:.3f}".format(**rows[-1]), flush=True)
    print(f"unedited {unedited:.3f}; gates of 1 change it by {null}; {meter.seconds:.0f} s")
    numbers = {
        **about_text(ids), "heads_of_a_layer": model.n_heads, "unedited_loss": unedited,
        "gates_of_1_minus_unedited": null, "losses": rows,
    }  # fmt: skip
    return write_record(study_record(model, meter, numbers), options.json)


if __name__ == "__main__":
    main()
