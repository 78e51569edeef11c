"""Peeking masks and many cuts at once, against masked scores and in a known circuit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import interp
from interp.errors import InterpError, PromptError
from interp.model.dense_edits import cells_of
from interp.model.edit_tables import CallSize, edit_arguments
from interp.model.hooks import hooks
from interp.model.layer_edits import LayerEdit

PAIRS = [interp.PromptPair(f"w{a} w5 w{b} w6 w7", "w8 w5 w9 w6 w7", "w95", "w96") for a in (1, 2) for b in (3, 4)]


@settings(deadline=None, derandomize=True, max_examples=30)
@given(st.data())
def test_segments_cut_what_a_mask_cuts(data) -> None:
    """Any number of cuts of any rows, keys and heads, of several cells that need not have as many."""
    length, start = data.draw(st.integers(1, 8)), 0
    span = st.tuples(st.integers(0, length), st.integers(0, length)).map(sorted)
    one = st.builds(
        lambda rows, keys, heads: LayerEdit(0, queries=range(*rows), keys=range(*keys), heads=heads), span, span,
        st.one_of(st.none(), st.sets(st.integers(0, 2), min_size=1).map(tuple)),
    )  # fmt: skip
    cells = data.draw(st.lists(st.lists(one, max_size=6), min_size=1, max_size=3))
    start = data.draw(st.integers(0, length - 1))
    size = CallSize(3, start, length, length)
    arguments = edit_arguments(cells, size, torch.device("cpu"), torch.float32)
    for n, edits in enumerate(cells):
        expected = torch.zeros(3, length - start, length, dtype=torch.bool)
        for e in edits:
            expected |= cells_of(e, e.keys, 3, start, length, length)
        if arguments["edit"].knockout is None:
            assert not any(cells) and not expected.any()
            continue
        q, k = arguments["q_segments"][n], arguments["k_segments"][n]
        assert torch.equal(arguments["edit"].knockout[n][:, q][:, :, k], expected)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox", "gemma2"])
@pytest.mark.parametrize("context", ["mean", "keep"])
def test_peeking_fast_equals_naive(tiny, kind: str, context: str) -> None:
    model = tiny(kind)
    for full in (0, 1):
        fast, naive = (
            interp.peek(model, PAIRS, full=full, context=context, engine=e).frame() for e in ("fast", "naive")
        )
        np.testing.assert_allclose(fast["patched"], naive["patched"], atol=1e-9)
        assert fast["raw"].abs().max() > 1e-4 and fast["layer"].tolist()[:3] == [0, 1, 2]


def test_masks_are_those_of_the_publication(tiny) -> None:
    """By hand: queries from the third on see key 0 and themselves, and the last one everything while it peeks."""
    model = tiny("llama")
    wait, full = 0, 1
    got = interp.peek(model, PAIRS[0], wait, full, context="keep").frame()["patched"][0]
    tokens = torch.tensor([model.coder.encode(PAIRS[0].clean)])
    n = tokens.shape[1]
    own = torch.eye(n, dtype=torch.bool)
    own[:, 0] = True
    own[:2] = True

    def mask(layer: int):
        seen = own.clone()
        if layer <= wait + full:
            seen[-1] = True
        return f"blocks.{layer}.attn.hook_attn_scores", lambda x, hook: x.masked_fill(~seen, torch.finfo(x.dtype).min)

    with torch.no_grad(), hooks(model, *map(mask, range(wait + 1, model.n_layers))):
        logits = model.last_logits(tokens)[0]
    answer, foil = (model.coder.continuation(w)[0] for w in ("w95", "w96"))
    assert got == pytest.approx(float(logits[answer] - logits[foil]), abs=1e-8)


def test_waiting_is_the_context_aware_mean(tiny) -> None:
    """After the last layer there is nothing to mask: peeking from there is that ablation."""
    model = tiny("gpt2")
    last = model.n_layers - 1
    peeked = interp.peek(model, PAIRS, last).frame()["patched"]
    ablated = interp.ablate(model, PAIRS, f"resid_post.L{last}", using="cama").frame()["patched"]
    np.testing.assert_allclose(peeked, ablated, atol=1e-12)
    kept = interp.peek(model, PAIRS, last, context="keep")
    assert (kept.frame()["raw"] == 0).all()
    assert kept.provenance["ablation"] == "masked attention", "nothing was replaced by a mean"


def test_one_layer_of_transfer_is_found_in_a_known_circuit() -> None:
    """L1H2 carries the answer to the last token: with a full peek in layer 1 nothing is lost, without all of it."""
    known = interp.zoo.one_head()
    model, pairs = known.model, known.pairs(6)
    effect = {
        (wait, full): interp.peek(model, pairs, wait, full, context="keep").summary()["effect"][0]
        for wait, full in ((0, 1), (0, 0), (1, 0))
    }
    assert effect[0, 1] == pytest.approx(0, abs=0.02) and effect[1, 0] == pytest.approx(0, abs=0.02)
    assert effect[0, 0] == pytest.approx(1, abs=0.1)


def test_bad_peeks_teach(tiny) -> None:
    for options, kind, words in (
        ({"full": -1}, InterpError, "a number of layers"),
        ({"context": "some"}, InterpError, "'mean' or 'keep'"),
        ({"reference": ["w1 w2"]}, PromptError, "lack a second reference prompt"),
    ):
        with pytest.raises(kind, match=words):
            interp.peek(tiny("llama"), PAIRS, **options)


def test_a_bare_string_is_no_list_of_reference_prompts(tiny) -> None:
    """Taken for one, it would be a prompt for each of its characters."""
    model, pair = tiny("llama"), interp.PromptPair("w1 w2 w3", "w1 w9 w3", "w95", "w96")
    for wrong in ("w1 w2 w3", [1.5, 2.5], 7):
        for call in (
            lambda r: interp.ablate(model, pair, "z.L0H0", reference=r),
            lambda r: interp.peek(model, pair, reference=r),
        ):
            with pytest.raises(PromptError, match="a list of prompts expected"):
                call(wrong)
