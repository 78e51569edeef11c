"""The mask catalogue: attention masks of published methods, each said with `interp.AttentionMask`.

Run: python experiments/mask_catalogue.py [--json experiments/results/mask_catalogue.json]

Claim: an `AttentionMask` says each of the masks below. Logits then equal those of an untouched Hugging Face model that
is given the same mask as a 4-D tensor, and no weight falls on a forbidden key. The models have three layers and random
weights (Llama with rotary positions and grouped queries, GPT-2), and read 24 random tokens, float32 on the CPU.

Result (results/mask_catalogue.json): one mask says each of them, and none needs a dense table written by hand. Logits
differ by at most 4e-6 and weights by at most 4e-7; the mass on forbidden keys is exactly 0. All stay in the kernel, as
tables over segments, as `model.backend_report()` says. In a prompt of 96 tokens, those that treat every token in its
own way become an n×n bias ("dense"):

=======================  ===================================================  ================
mask                     source                                               at 96 tokens
=======================  ===================================================  ================
intra-document           packed documents, arXiv 2402.13991                   in the kernel
prefix-LM                arXiv 1910.10683                                     in the kernel
modality-mutual          AKI, arXiv 2503.02597: the image sees the question   in the kernel
frame-wise block-causal  TC-LLaVA, arXiv 2409.03206 (our reading)             in the kernel
SCAM                     ACDiT, arXiv 2412.07720, appendix C                  in the kernel
NXTP                     arXiv 2312.02142, the mask of training               in the kernel
tree                     SpecInfer, arXiv 2305.09781: ancestors only          dense
window                   Longformer, arXiv 2004.05150                         in the kernel
window and sinks         StreamingLLM, arXiv 2309.17453                       in the kernel
stride                   a token of four, at multiples of the distance        in the kernel
stride and window        sparse transformer, arXiv 1904.10509                 dense
=======================  ===================================================  ================

A mask says nothing of positions: methods that number tokens anew (depth in a tree, position in a label) need position
ids of their own as well.

Null: a mask that hides nothing which causality shows, and opens nothing which it hides, changes no bit of the logits
(seven such masks). Without its mask, the model's logits differ from the masked reference by at least 1.9, so that the
comparison would notice a mask that does not act.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool
from resource_meter import ResourceMeter
from study_record import study_parser, study_record, write_record
from torch import Tensor

import interp
from interp import AttentionMask
from interp.doctor.families.text import tiny_hf

Visible = Bool[Tensor, "query key"]
N = 24  # tokens
Q, K = torch.arange(N)[:, None], torch.arange(N)[None]
CAUSAL = K <= Q
FAMILIES = ("llama", "gpt2")
LONG = 96  # tokens of a longer prompt, of which only the report is read


def numbered(spans: Sequence[range]) -> Tensor:
    """Return the number of the span that holds each token; −1 in none."""
    out = torch.full((N,), -1)
    for i, span in enumerate(spans):
        out[span.start : span.stop] = i
    return out


def spans_of(*lengths: int, start: int = 0) -> list[range]:
    """Return spans of these lengths, one behind the other."""
    stops = torch.tensor([start, *lengths]).cumsum(0).tolist()
    return [range(a, b) for a, b in pairwise(stops)]


def same(numbers: Tensor) -> Visible:
    """Return which pairs of tokens are in one span."""
    return (numbers[:, None] == numbers) & (numbers >= 0)


def of_documents() -> tuple[AttentionMask, Visible]:
    """Intra-document attention: packed documents do not see each other."""
    documents = spans_of(10, 8, 6)
    return AttentionMask(segments=documents), CAUSAL & same(numbered(documents))


def of_frames() -> tuple[AttentionMask, Visible]:
    """Frame-wise block-causal attention: full inside a frame, causal between frames and in text (three words, then)."""
    frames = spans_of(5, 5, 5, start=3)
    return AttentionMask(blocks=frames), CAUSAL | same(numbered(frames))


def of_clean_and_noisy() -> tuple[AttentionMask, Visible]:
    """SCAM: clean blocks, then noisy ones; a noisy block sees itself and the clean blocks before it."""
    n, size = 3, N // 6
    blocks = spans_of(*[size] * 2 * n)
    earlier = [(i, j) for i in range(n) for j in range(i)]
    mask = AttentionMask(blocks=size, segments=blocks, sees=[*earlier, *((n + i, j) for i, j in earlier)])
    query, key = Q // size, K // size
    clean, noisy = (query < n) & (key < n) & (key <= query), (query >= n) & (key < n) & (key < query - n)
    return mask, clean | noisy | (query == key)


def of_labels() -> tuple[AttentionMask, Visible]:
    """NXTP: an image whose tokens see each other, a prompt, and labels that do not see one another."""
    image, labels = range(1, 9), spans_of(3, 4, 3, start=14)
    number = numbered(labels)
    hidden = (number[:, None] != number) & (number[:, None] >= 0) & (number >= 0)
    in_image = (Q >= 1) & (Q < 9) & (K >= 1) & (K < 9)
    return AttentionMask(prefix=image, segments=labels), (CAUSAL | in_image) & ~hidden


def of_tree(n: int = N) -> tuple[AttentionMask, Visible]:
    """Tree attention: each token sees itself and its ancestors. Token i > 0 hangs on token (i − 1) // 2."""
    visible = torch.eye(n, dtype=torch.bool)
    for child in range(1, n):
        visible[child] |= visible[(child - 1) // 2]
    return AttentionMask(segments=list(range(n)), sees=visible.nonzero().tolist()), visible


def catalogue() -> dict[str, tuple[AttentionMask, Visible]]:
    """Return each mask, and which keys it shows, by plain arithmetic on token numbers."""
    image, question = (Q >= 1) & (Q < 9), (K >= 9) & (K < 18)
    return {
        "intra-document": of_documents(),
        "prefix-LM": (AttentionMask(prefix=range(10)), CAUSAL | ((Q < 10) & (K < 10))),
        "modality-mutual": (AttentionMask(open=[(range(1, 9), range(9, 18))]), CAUSAL | (image & question)),
        "frame-wise block-causal": of_frames(),
        "SCAM": of_clean_and_noisy(),
        "NXTP": of_labels(),
        "tree": of_tree(),
        "window": (AttentionMask(window=6), CAUSAL & (Q - K < 6)),
        "window and sinks": (
            AttentionMask(window=6, open=[(None, [0, 1, 2, 3])]), CAUSAL & ((Q - K < 6) | (K < 4)),
        ),
        "stride": (AttentionMask(stride=4), CAUSAL & ((Q - K) % 4 == 0)),
        "stride and window": (AttentionMask(stride=4, window=4), CAUSAL & (((Q - K) % 4 == 0) | (Q - K < 4))),
    }  # fmt: skip


NULLS = {
    "one document": AttentionMask(segments=[range(N)]),
    "a prefix of one token": AttentionMask(prefix=[0]),
    "blocks of one token": AttentionMask(blocks=1),
    "a window of all tokens": AttentionMask(window=N),
    "a stride of one": AttentionMask(stride=1),
    "later keys closed": AttentionMask(close=[(range(5), range(5, N))]),
    "earlier keys opened": AttentionMask(open=[(range(5, N), range(5))]),
}


def reference(hf: Any, ids: Tensor, visible: Visible) -> tuple[Tensor, Tensor]:
    """Return logits and weights [layer, head, query, key] of a Hugging Face model that is given a 4-D mask."""
    mask = torch.zeros(1, 1, N, N).masked_fill(~visible, torch.finfo(torch.float32).min)
    with torch.no_grad():
        out = hf(input_ids=ids, attention_mask=mask, output_attentions=True)
    return out.logits, torch.cat(out.attentions)


def weights(model: interp.Model, ids: Tensor) -> Tensor:
    """Return the model's attention weights [layer, head, query, key]: every token is a span of its own."""
    prompt = interp.Prompt(ids[0].tolist(), {f"token {i}": (i, i + 1) for i in range(N)})
    blocks = model.attention_patterns(prompt).examples[0].runs["clean"].blocks
    return torch.from_numpy(blocks).unflatten(0, (model.n_layers, model.n_heads))


def compared(model: interp.Model, hf: Any, ids: Tensor, mask: AttentionMask, visible: Visible) -> dict[str, Any]:
    """Compare a masked model with the untouched one that is given the mask."""
    logits, pattern = reference(hf, ids, visible)
    unmasked = model(ids)
    with model.edited(mask):
        masked = model(ids)
        reasons = dense_because(model)
        own = weights(model, ids)
    return {
        "written": mask.text,
        "shown": int(visible.sum()),
        "logits": float((masked - logits).abs().max()),
        "weights": float((own - pattern).abs().max()),
        "forbidden_mass": float((own * ~visible).sum(-1).max()),
        "unmasked": float((unmasked - logits).abs().max()),
        "computed": "dense" if reasons else "in the kernel",
        "dense_because": reasons,
    }


def dense_because(model: interp.Model) -> list[str]:
    """Return why the latest forward was dense in some layers; empty if it was not."""
    report: Any = model.backend_report()
    return sorted({why for why in report["dense_because"] if why})


def computed_in_long_prompts() -> dict[str, str]:
    """Return where each mask is computed in a longer prompt, whose further tokens belong to no span of the mask."""
    model, out = interp.load(tiny_hf("llama", torch.float32), tokenizer=False), {}
    for name, (mask, _) in {**catalogue(), "tree": of_tree(LONG)}.items():
        with model.edited(mask):
            model.bridge(torch.arange(2, 2 + LONG)[None] % 90)  # beyond the context of the tiny model
            out[name] = "dense" if dense_because(model) else "in the kernel"
    return out


def null_differences(model: interp.Model, ids: Tensor) -> dict[str, float]:
    """Return how far masks that show what the model shows change its logits."""
    plain, out = model(ids), {}
    for name, mask in NULLS.items():
        with model.edited(mask):
            out[name] = float((model(ids) - plain).abs().max())
    return out


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Compare every mask on every family, print and write the differences."""
    options = study_parser(__doc__).parse_args(arguments)
    ids = torch.randint(2, 90, (1, N), generator=torch.Generator().manual_seed(0))
    rows, nulls, models = [], {}, {}
    with ResourceMeter() as meter:
        for family in FAMILIES:
            model, hf = interp.load(tiny_hf(family, torch.float32), tokenizer=False), tiny_hf(family, torch.float32)
            models[family] = model.fingerprint()
            nulls[family] = null_differences(model, ids)
            for name, (mask, visible) in catalogue().items():
                rows.append({"family": family, "mask": name, **compared(model, hf, ids, mask, visible)})
                print("{family:>5} {mask:>23}: logits {logits:.1e}, weights {weights:.1e}, forbidden "
                      "{forbidden_mass:g}, unmasked {unmasked:.2f}, {computed}".format(**rows[-1]))  # fmt: skip
        long = computed_in_long_prompts()
    print("nulls", nulls, f"{LONG} tokens", long, sep="\n")
    numbers = {"tokens": N, "masks": rows, f"computed_at_{LONG}_tokens": long, "null_differences": nulls}
    return write_record(study_record(models, meter, numbers), options.json)


if __name__ == "__main__":
    main()
