"""The methods that pages write out by hooks, against plain arithmetic on an untouched Hugging Face model."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import interp
from interp.doctor.families.text import tiny_hf

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
from doc_outputs import BLOCK, DOCS

IDS, ANSWER, FOIL = [3, 17, 5, 9, 40, 8], 12, 31


def names_of(page: str) -> dict[str, Any]:
    """The names that the first block of a page defines."""
    names: dict[str, Any] = {"__name__": page}
    code = BLOCK.findall((DOCS / "how-to" / f"{page}.md").read_text(encoding="utf-8"))[0][0]
    exec(compile(code, page, "exec"), names)
    return names


def streams(hf: Any, blocks: Any) -> list[torch.Tensor]:
    """The residual stream behind the embedding and behind each block, at the last position."""
    kept: list[torch.Tensor] = []
    handles = [blocks[0].register_forward_pre_hook(lambda m, a, k: kept.append((a or [k["hidden_states"]])[0]),
                                                   with_kwargs=True)]  # fmt: skip
    handles += [b.register_forward_hook(lambda m, a, out: kept.append(out[0] if isinstance(out, tuple) else out))
                for b in blocks]  # fmt: skip
    with torch.no_grad():
        hf(torch.tensor([IDS]))
    for handle in handles:
        handle.remove()
    return [x[0, -1] for x in kept]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_lens_and_attribution_are_those_of_arithmetic(kind: str, word_tokenizer) -> None:
    hf = tiny_hf(kind).eval()
    core = hf.transformer if kind == "gpt2" else hf.model
    blocks, norm = (core.h, core.ln_f) if kind == "gpt2" else (core.layers, core.norm)
    stream = streams(hf, blocks)
    weight = hf.lm_head.weight
    with torch.no_grad():
        lens = torch.stack([weight @ norm(x[None])[0] for x in stream[1:]])
        final = stream[-1]
        centred = (lambda x: x - x.mean()) if kind == "gpt2" else (lambda x: x)
        eps = norm.eps if kind == "gpt2" else norm.variance_epsilon
        scale = (centred(final).pow(2).mean() + eps).sqrt()
        direction = norm.weight / scale * (weight[ANSWER] - weight[FOIL])
        by_block = [float(direction @ centred(b - a)) for a, b in pairwise(stream)]
        embedding = float(direction @ centred(stream[0]))
    model = interp.load(tiny_hf(kind), tokenizer=word_tokenizer)
    torch.testing.assert_close(names_of("lens")["logit_lens"](model, IDS), lens, atol=1e-6, rtol=1e-6)
    terms = names_of("dla")["attribute_logits"](model, IDS, ANSWER, FOIL)
    assert terms["embedding"] == pytest.approx(embedding, abs=1e-6)
    for i, wanted in enumerate(by_block):
        ours = sum(x for n, x in terms.items() if n.startswith(f"L{i}H") or n in (f"MLP {i}", f"attention bias {i}"))
        assert ours == pytest.approx(wanted, abs=1e-6)
    assert sum(terms.values()) == pytest.approx(float(lens[-1, ANSWER] - lens[-1, FOIL]), abs=1e-6)
