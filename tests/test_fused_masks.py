"""Masks as segments of the kernel, against a softmax over the visible keys written out here."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import headstats
import numpy as np
import pytest
import torch
from test_masks import CASES, IDS, PAIRS, N
from torch import Tensor

import interp
from interp import AttentionEdit, AttentionMask
from interp.circuits.evaluation.evaluator import Evaluator
from interp.doctor.families.text import tiny_hf
from interp.errors import InterpError, PromptError
from interp.model.apply_masks import apply_masks, dense_masks
from interp.model.attention_call import AttentionCall, dense_attention
from interp.model.edited_attention import attend, weight_options
from interp.model.layer_edits import LayerEdit
from interp.model.resolve_masks import layer_masks

BACKENDS = ["blocked", "reference", "auto"]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def prompt(n: int) -> Any:
    return SimpleNamespace(tokens=[str(i) for i in range(n)], spans={})


def call_of(mask: AttentionMask, edits: tuple[LayerEdit, ...] = (), dtype: Any = torch.float32, n: int = N) -> Any:
    """A call of three heads, with one mask and some edits in its second batch row, and the mask alone in its first."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 4, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3))
    masks = tuple(layer_masks(mask, [0], prompt(n)))
    return AttentionCall(0, q, k, v, 0.7, edits=(masks, (*masks, *edits)))


def pattern_by_hand(call: AttentionCall, visible: Tensor) -> Tensor:
    scores = (call.q.double() @ call.k.double().mT * call.scale).masked_fill(~visible, -torch.inf)
    return scores.softmax(-1).nan_to_num(0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_every_mask_of_the_catalogue_is_exact_in_the_kernel(name: str, dtype: torch.dtype, backend: str) -> None:
    mask, visible = CASES[name]
    fused, why = apply_masks(call_of(mask, dtype=dtype))
    assert not why and fused.bias is None
    expected = pattern_by_hand(fused, visible) @ fused.v.double()
    for call in (fused, dense_masks(call_of(mask, dtype=dtype))):
        out = attend(call, backend=backend).out
        torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[dtype], rtol=0)


EDITS = {
    "gain": AttentionEdit(gain=0.3), "cut": AttentionEdit(gain=0.0, renormalise=False),
    "take": AttentionEdit(take=[0, 1], give=[2, 3], keep_fraction=0.25), "bias": AttentionEdit(bias=1.5),
    "uniform": AttentionEdit(counterfactual="uniform"), "gate": AttentionEdit(gate=0.5),
    "temperature": AttentionEdit(temperature=2.0),
}  # fmt: skip


def layer_edit(edit: AttentionEdit, n: int = N) -> LayerEdit:
    rows = {name: getattr(edit, name) or () for name in ("take", "give")}
    return LayerEdit(0, edit, range(3, n - 1), None if edit.take else (1, 2, 5), (0, 2), **rows)


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("name", ["open later keys", "close", "sinks under a window", "segments", "stride"])
def test_masks_and_edits_share_segments(name: str, edit: str) -> None:
    """The kernel, with one table over masks and edits, against the plain steps over a whole pattern."""
    whole = call_of(CASES[name][0], (layer_edit(EDITS[edit]),), torch.float64)
    fused, _ = apply_masks(whole)
    plain = dense_attention(dense_masks(whole))
    torch.testing.assert_close(attend(fused).out, plain, atol=1e-10, rtol=0)
    torch.testing.assert_close(dense_attention(fused), plain, atol=1e-10, rtol=0)
    rows = headstats.pattern_rows(fused.q, fused.k, None, torch.arange(N), **weight_options(fused))
    if edit != "gate":
        torch.testing.assert_close(rows @ fused.v, plain, atol=1e-10, rtol=0)


@pytest.mark.parametrize("edit", [None, "gain"])
@pytest.mark.parametrize("name", ["open later keys", "close", "sinks under a window"])
def test_statistics_by_segment_are_those_of_the_asked_segments(name: str, edit: str | None) -> None:
    whole = call_of(CASES[name][0], (layer_edit(EDITS[edit]),) if edit else (), torch.float64)
    spans = torch.tensor([[0, 0, 1, 1, -1, 2, 2, 0]] * 2)
    spec = replace(headstats.StatSpec.none(), segments=True, segment_outputs=True, entropy=True)
    fused = apply_masks(whole)[0]
    result = attend(fused, spec=spec, k_segments=spans, backend="blocked")
    every_key = torch.eye(N, dtype=torch.float64).expand(2, 3, N, N)
    pattern = dense_attention(replace(dense_masks(whole), v=every_key))
    for span in range(3):
        mass = pattern[..., spans[0] == span].sum(-1)
        torch.testing.assert_close(result.stats.segments[..., span], mass, atol=1e-10, rtol=0)
        outputs = pattern[..., spans[0] == span] @ fused.v[:, :, spans[0] == span]
        torch.testing.assert_close(result.stats.segment_outputs[..., span, :], outputs, atol=1e-10, rtol=0)
    assert result.stats.segments.shape[-1] == 3
    plain = attend(fused, spec=replace(spec, segments=None, segment_outputs=False)).stats
    assert plain.segments is None


@pytest.mark.parametrize("name", [n for n in CASES if n != "window"])
def test_gradients_are_those_of_the_written_out_softmax(name: str) -> None:
    mask, visible = CASES[name]
    fused, _ = apply_masks(call_of(mask, dtype=torch.float64))
    leaves = [x.clone().requires_grad_() for x in (fused.q, fused.k, fused.v)]
    call = replace(fused, q=leaves[0], k=leaves[1], v=leaves[2])
    weights = torch.linspace(-1, 1, call.v.numel(), dtype=torch.float64).view_as(call.v)
    ours = torch.autograd.grad((attend(call).out * weights).sum(), leaves)
    scores = (leaves[0] @ leaves[1].mT * call.scale).masked_fill(~visible, -1e300)
    by_hand = torch.autograd.grad(((scores.softmax(-1) @ leaves[2]) * weights).sum(), leaves)
    for a, b in zip(ours, by_hand, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def test_overwritten_rows_lie_on_keys_that_a_mask_shows(word_tokenizer) -> None:
    model = interp.load(tiny_hf("llama"), tokenizer=word_tokenizer)
    onto_later = AttentionEdit(queries=1, weights={5: 0.75, 0: 0.25}, layers=0)
    with model.edited(AttentionMask(open=[([1], [5])]), onto_later):
        _, cache = model.run_with_cache(torch.tensor(IDS))
    z, v = cache["blocks.0.attn.hook_z"][0], cache["blocks.0.attn.hook_v"][0]
    expected = (0.75 * v[5] + 0.25 * v[0]).repeat_interleave(z.shape[1] // v.shape[1], 0)
    torch.testing.assert_close(z[1], expected, atol=1e-6, rtol=0)
    for mask in (AttentionMask(close=[([1], [0])]), AttentionMask(open=[([1], [4])])):
        with model.edited(mask, onto_later), pytest.raises(InterpError, match="does not see"):
            model(torch.tensor(IDS))


def test_the_first_rows_see_no_later_sink() -> None:
    """Sinks 0, 1 and 2 under a window: row 0 sees itself alone, row 1 the keys 0 and 1."""
    fused, _ = apply_masks(call_of(AttentionMask(window=1, open=[(None, [0, 1, 2])])))
    rows = headstats.pattern_rows(fused.q, fused.k, None, torch.arange(N), **weight_options(fused))
    seen = [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]
    for row, keys in enumerate(seen):
        assert (rows[0, 0, row] > 0).nonzero()[:, 0].tolist() == keys


LONG = 80
DENSE = {
    "in their own way": AttentionMask(stride=3, window=4),
    "80 queries": AttentionMask(open=[(None, None)], future=False, window=3),
}


@pytest.mark.parametrize("why", DENSE)
def test_masks_of_single_tokens_go_dense_and_say_so(word_tokenizer, why: str) -> None:
    model = interp.load(tiny_hf("llama"), tokenizer=word_tokenizer)
    ids = torch.randint(0, 90, (1, LONG), generator=torch.Generator().manual_seed(0))
    mask = replace(DENSE[why], layers=1)
    with model.edited(AttentionMask(close=[(None, [3])]), mask), torch.no_grad():
        ours = model.bridge.original_model(ids).logits
        report: Any = model.backend_report()["dense_because"].tolist()
    assert report[0] == "" and str(mask) in report[1] and why in report[1]
    q, k = torch.arange(LONG)[:, None], torch.arange(LONG)[None]
    hf = tiny_hf("llama")
    hf.set_attn_implementation("eager")
    shown = ((q - k) % 3 == 0) | (q - k < 4) if "own" in why else q - k >= 0
    closed = (k <= q) & (k != 3)
    _hand_masks_to_layers(hf, [closed & shown if layer == 1 else closed for layer in range(model.n_layers)])
    with torch.no_grad():
        torch.testing.assert_close(ours, hf(ids).logits, atol=1e-5, rtol=0)


def _hand_masks_to_layers(hf: Any, visible: list[Tensor]) -> None:
    for layer, seen in zip(hf.model.layers, visible, strict=True):
        bias = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]

        def put(_module: Any, args: Any, kwargs: Any, bias: Tensor = bias) -> Any:
            return args, {**kwargs, "attention_mask": bias}

        layer.register_forward_pre_hook(put, with_kwargs=True)


def test_what_the_callers_mask_hides_is_opened_densely(word_tokenizer) -> None:
    model = interp.load(tiny_hf("llama"), tokenizer=word_tokenizer)
    causal = torch.zeros(1, 1, N, N).masked_fill(torch.ones(N, N).triu(1).bool(), torch.finfo(torch.float32).min)
    run = model.bridge.original_model
    with torch.no_grad(), model.edited(AttentionMask(close=[([4], [2])])):
        run(input_ids=torch.tensor(IDS), attention_mask=causal)
        assert not any(model.backend_report()["dense_because"])
    with torch.no_grad(), model.edited(AttentionMask(open=[([1], [5])])):
        run(input_ids=torch.tensor(IDS), attention_mask=causal)
        assert all("n×n mask of the model or of the caller" in x for x in model.backend_report()["dense_because"])


@pytest.mark.parametrize("name", ["prefix", "close", "sinks under a window"])
def test_hooks_see_the_pattern_of_the_masked_layer(word_tokenizer, name: str) -> None:
    model = interp.load(tiny_hf("llama"), tokenizer=word_tokenizer)
    patterns: list[Tensor] = []
    hooked = [("blocks.0.attn.hook_pattern", lambda x, hook: patterns.append(x))]
    with torch.no_grad(), model.edited(CASES[name][0]):
        fused = model(torch.tensor(IDS))
        with model.bridge.hooks(fwd_hooks=hooked):
            dense = model(torch.tensor(IDS))
    torch.testing.assert_close(fused, dense, atol=1e-5, rtol=0)
    assert torch.equal(patterns[0][0, 0] > 0, CASES[name][1])


# Masks that show no token what comes after it.
CAUSAL_MASKS = {
    "close": AttentionMask(close=[([-3, -1], [-6, -4])]), "window": AttentionMask(window=3, layers=[1]),
    "stride": AttentionMask(stride=2), "segments": AttentionMask(segments=[[0, 1, 2], [-3, -2]], sees=[(1, 0)]),
    "sinks": AttentionMask(window=2, open=[(None, [0, 1])]), "stride with a window": AttentionMask(stride=2, window=2),
    "earlier keys": AttentionMask(window=1, open=[([-1], [-4, -3])], layers=0),
}  # fmt: skip


@pytest.mark.parametrize(("family", "name"), [
    *(("llama", name) for name in CAUSAL_MASKS), ("mistral", "window"), ("mistral", "sinks"), ("gpt2", "close"),
    ("mpt", "segments"),
])  # fmt: skip
def test_cells_under_masks_are_packed_and_equal_full_forwards(tiny, family: str, name: str) -> None:
    model = tiny(family)
    edits = {"cut": AttentionEdit(queries=-1, keys=-3, knockout=True), "blind": AttentionMask(close=[(-1, -5)])}

    def effects(engine: Any) -> dict[str, Any]:
        options: dict[str, Any] = {"engine": engine, "show_progress": False}
        return {
            "patch": interp.patch(model, PAIRS, model.sites("resid_pre", positions=[-5, -2]), at=[-3, -1], **options),
            "edit": interp.edit(model, PAIRS, edits, **options),
            "ablate": interp.ablate(model, PAIRS[:1], model.sites("z", positions="all"), using="zero", **options),
            "knock out": interp.knock_out(model, PAIRS[:1], keys=-4, queries=-1, **options),
        }

    with model.edited(CAUSAL_MASKS[name]):
        packed, naive = effects("fast"), effects("naive")
    for recipe, of_recipe in packed.items():
        assert of_recipe.provenance["engine"] == "packed, exact"
        a, b = (torch.tensor(x.frame()["patched"].to_numpy()) for x in (of_recipe, naive[recipe]))
        torch.testing.assert_close(a, b, atol=2e-6, rtol=0, msg=f"{name} {recipe}")


def test_a_mask_that_shows_later_tokens_takes_full_forwards(tiny) -> None:
    model = tiny("llama")
    cells = {"blocks": AttentionMask(blocks=2), "close": AttentionMask(close=[(-1, -3)])}
    effects = interp.edit(model, PAIRS, cells, show_progress=False)
    assert "full forward per cell (an attention mask shows" in str(effects.provenance["engine"])
    with model.edited(AttentionMask(open=[([-4], [-2])])):
        patched = interp.patch(model, PAIRS, model.sites("resid_pre", positions=-2), show_progress=False)
    assert "full forward per cell (an attention mask shows" in str(patched.provenance["engine"])


def test_knocking_out_all_that_a_mask_shows_is_refused(tiny) -> None:
    model, pair = tiny("llama"), PAIRS[:1]
    with model.edited(AttentionMask(close=[(-1, range(4))])):
        interp.knock_out(model, pair, keys=-1, queries=-1, show_progress=False)
    with (
        model.edited(AttentionMask(close=[(-1, [*range(5), -2])])),
        pytest.raises(PromptError, match="nothing to read"),
    ):
        interp.knock_out(model, pair, keys=-1, queries=-1, show_progress=False)


@pytest.mark.parametrize("edit", [AttentionEdit(counterfactual="shuffled"), AttentionEdit(gain=0.3)])
@pytest.mark.parametrize("name", ["close", "sinks under a window", "bias"])
def test_a_shared_prefix_counts_among_the_keys(name: str, edit: AttentionEdit) -> None:
    """Random edits are computed row by row, with the masks and the bias of all keys."""
    masked = AttentionMask(window=N) if name == "bias" else CASES[name][0]
    whole = call_of(masked, (LayerEdit(0, edit, range(N)),), torch.float64)
    k, v = (x[:1].expand(2, -1, -1, -1) for x in (whole.k, whole.v))
    bias = torch.linspace(-1, 1, N, dtype=torch.float64).view(1, 1, 1, N) if name == "bias" else None
    whole = replace(whole, k=k, v=v, q=whole.q[:, :, 3:], bias=bias)
    own = replace(whole, k=k[:, :, 3:], v=v[:, :, 3:])
    expected = attend(apply_masks(whole)[0]).out
    shared = k[:1, :, :3], v[:1, :, :3]
    torch.testing.assert_close(attend(apply_masks(own, N)[0], prefix=shared).out, expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(dense_attention(dense_masks(whole)), expected, atol=1e-10, rtol=0)


def test_a_single_query_without_keys_gives_zero_densely_too() -> None:
    whole = call_of(AttentionMask(close=[([N - 1], None)]))
    last = replace(whole, q=whole.q[:, :, -1:])
    for out in (attend(apply_masks(last)[0]).out, dense_attention(dense_masks(last))):
        assert not out.any()


@pytest.mark.parametrize(("name", "is_packed"), [("close", True), ("sinks", True), ("prefix", False)])
def test_circuits_under_masks_equal_those_in_full_forwards(tiny, name: str, is_packed: bool) -> None:
    model, masks = tiny("llama"), {**CAUSAL_MASKS, "prefix": AttentionMask(prefix=range(4))}
    with model.edited(masks[name]):
        packed, whole = (Evaluator(model, PAIRS, "logit_diff", "zero", engine=e) for e in ("auto", "naive"))
        kept = packed.graph.allowed & (np.random.default_rng(0).random(packed.graph.allowed.shape) < 0.8)
        np.testing.assert_allclose(packed(kept), whole(kept), atol=2e-6)
    assert (packed.packed is not None) == is_packed and whole.packed is None
