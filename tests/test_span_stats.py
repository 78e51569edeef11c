"""Attention statistics by span, against plain sums over patterns and values of untouched Hugging Face models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES
from headstats import StatSpec
from pictured import blocks_of
from torch import Tensor

import interp
from interp import AttentionEdit, AttentionMask
from interp.doctor.families.text import FAMILIES, tiny_hf
from interp.errors import InterpError, PromptError
from interp.model import dummy_inputs
from interp.results.span_stats import SpanStats
from interp.zoo.tokenizer import SPECIALS, word_tokenizer

Array = np.ndarray
OTHERS = [
    pytest.param(name, marks=pytest.mark.slow)
    for name, family in FAMILIES.items()
    if family.kind == "decoder" and family.eager and name not in ARCHITECTURES
]
SPEC = StatSpec(
    entropy=True, argmax=True, topk=3, received=True, received_max=True, segment_value_norms=True, segment_outputs=True
)
LONG = interp.Prompt("w1 w2 w3 w4 w5 w6 w7 w8 w9 w10 w11", {"a": (3, 8), "b": (15, 23)})  # w2 w3, w6 w7 w8
SHORT = interp.Prompt("w9 w8 w7 w6 w5", {"b": (12, 14), "a": (0, 5)})  # w5, w9 w8
ROWS = [  # with <bos> in front
    {"a": [2, 3], "b": [6, 7, 8], "(other)": [0, 1, 4, 5, 9, 10, 11]},
    {"a": [1, 2], "b": [5], "(other)": [0, 3, 4]},
]


def eager(family: str) -> Any:
    hf = tiny_hf(family)
    hf.set_attn_implementation("eager")
    return hf.eval().float()  # in float64, eager softmax gives NaN to padded queries


def values_of(hf: Any, family: str, run: Any) -> list[Tensor]:
    """Values [batch, heads, position, d_v] of every layer, read from the projections of an untouched model."""
    n_heads, seen = hf.config.num_attention_heads, []
    layers = {"gpt2": "transformer.h", "neox": "gpt_neox.layers"}.get(family, "model.layers")
    name = {"gpt2": "attn.c_attn", "neox": "attention.query_key_value"}.get(family, "self_attn.v_proj")

    def read(_module: Any, _args: Any, out: Tensor) -> None:
        if family == "gpt2":
            out = out.chunk(3, -1)[2].unflatten(-1, (n_heads, -1))
        elif family == "neox":
            out = out.unflatten(-1, (n_heads, 3, -1))[..., 2, :]
        else:
            groups = n_heads // hf.config.num_key_value_heads
            out = out.unflatten(-1, (n_heads // groups, -1)).repeat_interleave(groups, 2)
        seen.append(out.transpose(1, 2))

    handles = [layer.get_submodule(name).register_forward_hook(read) for layer in hf.get_submodule(layers)]
    run()
    for handle in handles:
        handle.remove()
    return seen


def by_hand(p: Array, v: Array | None, rows: Mapping[str, Sequence[int]], k: int = 3) -> dict[str, Array]:
    """Statistics of patterns p [layers, heads, n, n] and values [layers, heads, n, d_v] by plain sums over spans."""
    spans = list(rows.values())
    place = np.empty(p.shape[-1], int)
    for number, of_span in enumerate(spans):
        place[of_span] = number
    inside = place[:, None] == np.arange(len(spans))  # [key, span]

    def over_queries(x: Array) -> Array:
        return np.stack([x[:, :, of_span].mean(2) for of_span in spans], 2)

    seen = p > 0
    order = np.argsort(-p, -1, kind="stable")[..., :k]
    weights = np.take_along_axis(p, order, -1)
    is_one = np.take_along_axis(seen, order, -1)[..., None] & inside[order]
    logs = np.log(np.where(seen, p, 1))
    received = p.sum(2) / seen.sum(2)
    expected = {
        "segments": over_queries(p @ inside),
        "argmax": over_queries(inside[p.argmax(-1)].astype(float)),
        "topk_mass": over_queries((weights[..., None] * is_one).sum(-2)),
        "topk_keys": over_queries(is_one.sum(-2).astype(float)),
        "entropy": over_queries(-(p * logs).sum(-1)),
        "received": over_queries(received),
        "received_max": over_queries(p.max(2)),
    }
    if v is not None:
        norms = np.sqrt((v**2).sum(-1))
        expected["segment_value_norms"] = over_queries(np.einsum("lhij,lhj,js->lhis", p, norms, inside))
        expected["segment_outputs"] = over_queries(np.einsum("lhij,lhjd,js->lhisd", p, v, inside))
    return expected


def assert_equal(stats: SpanStats, example: int, expected: dict[str, Array], atol: float = 1e-5) -> None:
    for name, array in expected.items():
        ours = {**stats.between, **stats.within}[name][example]
        np.testing.assert_allclose(ours, array, atol=atol, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_statistics_equal_sums_over_the_patterns_of_a_padded_batch(family: str, tiny: Any) -> None:
    model, hf = tiny(family), eager(family)
    stats = model.attention_stats([LONG, SHORT], SPEC, by="span")
    ids = [model.coder.encode(p.text) for p in (LONG, SHORT)]
    n = len(ids[0])
    padded = torch.tensor([[1] * (n - len(row)) + row for row in ids])
    mask = torch.tensor([[0] * (n - len(row)) + [1] * len(row) for row in ids])
    places = (mask.cumsum(-1) - 1).clamp_min(0)
    outputs: list[Any] = []

    def run() -> None:
        with torch.no_grad():
            options = {"attention_mask": mask, "position_ids": places, "output_attentions": True}
            outputs.append(hf(input_ids=padded, **options))

    values = values_of(hf, family, run)
    for i, row in enumerate(ids):
        own = slice(n - len(row), n)
        p = np.stack([x[i, :, own, own].double().numpy() for x in outputs[0].attentions])
        v = np.stack([x[i, :, own].detach().double().numpy() for x in values])
        assert list(stats.query_spans[i]) == sorted(ROWS[i], key=lambda s: (s == "(other)", ROWS[i][s][0]))
        rows = {name: ROWS[i][name] for name in stats.query_spans[i]}
        assert_equal(stats, i, by_hand(p, v, rows))
        np.testing.assert_allclose(stats.between["segments"][i].sum(-1), 1, atol=1e-6)
        # the spans' outputs, over all keys, are what the head writes
        whole = np.stack([(p @ v)[:, :, of_span].mean(2) for of_span in rows.values()], 2)
        np.testing.assert_allclose(stats.between["segment_outputs"][i].sum(3), whole, atol=1e-5)


@pytest.mark.parametrize("family", OTHERS)
def test_the_mass_on_spans_on_every_family_of_decoders(family: str, tiny: Any) -> None:
    model, hf = tiny(family), tiny_hf(family)
    hf.set_attn_implementation("eager")
    stats = model.attention_stats(LONG, StatSpec(topk=3), by="span")
    with torch.no_grad():
        out = hf.eval()(input_ids=torch.tensor([model.coder.encode(LONG.text)]), output_attentions=True)
    expected = by_hand(torch.stack(out.attentions, 1)[0].double().numpy(), None, ROWS[0])
    assert_equal(stats, 0, {key: expected[key] for key in ("segments", "argmax", "topk_mass", "topk_keys", "entropy")})


def test_targets_and_features_are_read_at_the_tokens_that_are_named(tiny: Any) -> None:
    model, hf = tiny("llama"), eager("llama")
    ids = [model.coder.encode(p.text) for p in (LONG, SHORT)]
    before = [[-1, *range(len(row) - 1)] for row in ids]  # the key before each query
    weights = [np.linspace(-1, 2, len(row)) for row in ids]
    stats = model.attention_stats([LONG, SHORT], by="span", targets={"before": before}, key_features={"x": weights})
    named = model.attention_stats([LONG, SHORT], by="span", targets=["a:last", np.int64(-2)])
    for i, row in enumerate(ids):
        with torch.no_grad():
            out = hf(input_ids=torch.tensor([row]), output_attentions=True)
        p = torch.stack(out.attentions, 1)[0].double().numpy()
        spans = [ROWS[i][name] for name in stats.query_spans[i]]
        target = np.zeros(p.shape[:3])
        target[..., 1:] = p[..., np.arange(1, len(row)), np.arange(len(row) - 1)]
        last = ROWS[i]["a"][-1]
        for table, name, x in (
            (stats, "targets[before]", target),
            (stats, "key_features[x]", p @ weights[i]),
            (named, "targets[a:last]", p[..., last]),
            (named, "targets[-2]", p[..., -2]),
        ):
            # <bos> has no key before it, and the mean is over the queries that have one
            rows = [[r for r in s if r > 0] if name == "targets[before]" else s for s in spans]
            expected = np.stack([x[:, :, s].mean(2) for s in rows], 2)
            np.testing.assert_allclose(table.within[name][i], expected, atol=1e-6, err_msg=name)


def test_a_query_without_a_target_is_in_no_mean(tiny: Any) -> None:
    prompt = interp.Prompt("w1 w2 w3 w4", {"a": (0, 5)})
    stats = tiny("llama").attention_stats(prompt, by="span", targets={"t": [0, -1, -1, 2, 3]})
    assert list(stats.query_spans[0]) == ["a", "(other)"]
    assert np.isnan(stats.within["targets[t]"][0][..., 0]).all()  # no query of the span has one
    assert np.isfinite(stats.within["targets[t]"][0][..., 1]).all()


def test_sentences_divide_a_text(tiny: Any) -> None:
    model, hf = tiny("gpt2"), eager("gpt2")
    text = "w1 w2 .\nw3 w4 w5\nw6 w7"
    stats = model.attention_stats(text, by="sentence")
    rows = {"sentence_1": [1, 2, 3], "sentence_2": [4, 5, 6], "sentence_3": [7, 8], "(other)": [0]}
    assert stats.query_spans == [{name: len(of_span) for name, of_span in rows.items()}]
    with torch.no_grad():
        out = hf(input_ids=torch.tensor([model.coder.encode(text)]), output_attentions=True)
    p = torch.stack(out.attentions, 1)[0].double().numpy()
    expected = by_hand(p, None, rows)
    assert_equal(stats, 0, {name: expected[name] for name in ("segments", "argmax", "entropy")})
    assert (stats.per_head("sentence_1", "sentence_3") == 0).all()  # which stands behind it


# ---------------------------------------------------------------- edits and masks


def edited_by_hand(hf: Any, ids: list[int], change: Any) -> tuple[Array, Array]:
    """Patterns and values of a Hugging Face model whose attention is computed here, with changed weights."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    patterns, values = [], []

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        scores = q @ k.mT * scaling
        n = scores.shape[-1]
        scores = scores.masked_fill(~torch.ones(n, n).tril().bool(), -torch.inf)
        p = change(module.layer_idx, scores)
        patterns.append(p[0].detach().double().numpy())
        values.append(v[0].detach().double().numpy())
        return (p @ v).transpose(1, 2).contiguous(), None

    AttentionInterface.register("by_hand_spans", attend)
    AttentionMaskInterface.register("by_hand_spans", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    hf.set_attn_implementation("by_hand_spans")
    with torch.no_grad():
        hf(input_ids=torch.tensor([ids]))
    return np.stack(patterns), np.stack(values)


def test_edits_keep_their_own_segments(tiny: Any) -> None:
    model, hf = tiny("llama"), eager("llama")
    edits = [  # two kinds, which take a call of the kernel each
        AttentionEdit(queries="b", keys="a", layers=0, heads=["L0H1"], knockout=True),
        AttentionEdit(queries=[9, 10], keys=range(1, 7), layers=0, heads=["L0H2"], gain=2.5, renormalise=False),
        AttentionEdit(queries=[-1], take=[0], give="b", layers=1, heads=["L1H0"], keep_fraction=0.25),
    ]

    def change(layer: int, scores: Tensor) -> Tensor:
        if layer == 0:
            scores = scores.clone()
            scores[:, 1, 6:9, 2:4] = -torch.inf
        p = scores.softmax(-1)
        if layer == 0:
            p[:, 2, 9:11, 1:7] *= 2.5
        if layer == 1:
            taken = 0.75 * p[:, 0, -1, 0]
            p[:, 0, -1, 0] *= 0.25
            p[:, 0, -1, 6:9] *= 1 + taken / p[:, 0, -1, 6:9].sum()
        return p

    p, v = edited_by_hand(hf, model.coder.encode(LONG.text), change)
    spec = StatSpec(entropy=False, topk=2, segment_value_norms=True, segment_outputs=True)
    with model.edited(*edits):
        stats = model.attention_stats(LONG, spec, by="span", targets="a:last")
    expected = by_hand(p, v, ROWS[0], k=2)
    names = ("segments", "segment_value_norms", "segment_outputs", "argmax", "topk_mass", "topk_keys")
    assert_equal(stats, 0, {name: expected[name] for name in names})
    target = np.stack([p[:, :, of_span, 3].mean(2) for of_span in ROWS[0].values()], 2)
    np.testing.assert_allclose(stats.within["targets[a:last]"][0], target, atol=1e-6)
    plain = model.attention_stats(LONG, spec, by="span")
    assert np.abs(plain.between["segments"][0] - stats.between["segments"][0]).max() > 0.05
    assert len(stats.provenance["edited"]) == 3 and "edited" not in plain.provenance


def test_masks_and_several_prompts_under_edits_that_know_their_row(tiny: Any) -> None:
    model, hf = tiny("llama"), eager("llama")
    other = interp.Prompt("w11 w2 w3 w41 w5 w6 w7 w8 w9 w1 w11", {"a": (4, 9), "b": (17, 25)})  # w2 w3, w6 w7 w8
    rows = [{"a": [2, 3], "b": [6, 7, 8], "(other)": [0, 1, 4, 5, 9, 10, 11]}] * 2

    def change(_layer: int, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, :, 6:9, 2:4] = -torch.inf
        return scores.softmax(-1)

    with model.edited(AttentionMask(close=[("b", "a")])):
        stats = model.attention_stats([LONG, other], by="span")
    for i, prompt in enumerate((LONG, other)):
        p, _ = edited_by_hand(hf, model.coder.encode(prompt.text), change)
        expected = by_hand(p, None, rows[i])
        assert_equal(stats, i, {name: expected[name] for name in ("segments", "argmax", "entropy")})
    assert (stats.per_head("b", "a") == 0).all()
    shuffled = AttentionEdit(layers=0, counterfactual="shuffled")
    with model.edited(shuffled):
        both = model.attention_stats([LONG, other], by="span", targets={"t": [[3] * 12, [4] * 12]})
        alone = model.attention_stats(other, by="span", targets={"t": [4] * 12})
    np.testing.assert_array_equal(both.between["segments"][1], alone.between["segments"][0])
    np.testing.assert_array_equal(both.within["targets[t]"][1], alone.within["targets[t]"][0])


# ---------------------------------------------------------------- images, encoders, other families


@pytest.fixture(scope="module")
def words() -> Any:
    return word_tokenizer(tuple(f"w{i}" for i in range(100 - len(SPECIALS))))


def test_images_and_text_are_spans(words: Any) -> None:
    hf, model = tiny_hf("llava"), interp.load(tiny_hf("llava"), tokenizer=words)
    hf.set_attn_implementation("eager")
    prompt = dummy_inputs.placed(dummy_inputs.image_prompt(hf, 0), torch.device("cpu"), torch.float32)
    prompt = {name: x.to(next(hf.parameters()).dtype) if x.is_floating_point() else x for name, x in prompt.items()}
    assert model.pictures is not None
    spans = model.pictures.read(prompt).spans
    (start, stop), (text, end) = spans["image"], spans["text"]
    seen: list[Tensor] = []
    handles = [
        block.self_attn.v_proj.register_forward_hook(lambda _m, _a, out: seen.append(out))
        for block in blocks_of(hf, model)
    ]
    with torch.no_grad():
        p = torch.stack(hf(**prompt, output_attentions=True).attentions, 1)[0].double().numpy()
    for handle in handles:
        handle.remove()
    heads = p.shape[1]
    values = [x[0].double() for x in seen]
    width = model.bridge.cfg.d_head
    v = np.stack(
        [
            x.unflatten(-1, (-1, width)).transpose(0, 1).repeat_interleave(heads // (x.shape[-1] // width), 0).numpy()
            for x in values
        ]
    )
    rows = {"image": range(start, stop), "text": range(text, end), "(other)": range(start)}
    stats = model.attention_stats([prompt, interp.Prompt("w1 w2 w3").span("x", "w2")], SPEC, by="span")
    assert list(stats.query_spans[0]) == list(rows) and list(stats.query_spans[1]) == ["x", "(other)"]
    assert_equal(stats, 0, by_hand(p, v, {name: list(r) for name, r in rows.items()}))
    pair = interp.ImagePair(prompt, prompt, 1, 2, spans={"word": (text, text + 1)})
    named = model.attention_stats(pair, by="span", spans=["image", "word"])
    assert list(named.query_spans[0]) == ["image", "word", "(other)"]
    tower = model.attention_stats([prompt], by="span", stack="vision")
    by_token = model.attention_stats([prompt], stack="vision")
    assert tower.stack == "vision" and list(tower.query_spans[0]) == ["cls", "patches"]
    np.testing.assert_allclose(tower.within["entropy"][0][..., 0], by_token.values["entropy"][0][..., 0], rtol=1e-6)
    np.testing.assert_allclose(tower.between["segments"][0].sum(-1), 1, atol=1e-5)


def test_an_encoder_decoder_has_spans_of_source_and_target(word_tokenizer: Any) -> None:
    hf = tiny_hf("t5")
    model = interp.load(tiny_hf("t5"), tokenizer=word_tokenizer)
    source = interp.Prompt("w5 w9 w5 w77 w12 w9").span("x", "w77 w12")
    target = interp.Prompt("w4 w8 w15 w16").span("y", "w8 w15")
    hf.set_attn_implementation("eager")
    inputs = torch.tensor([model.coder.encode(source.text)])
    start = hf.config.decoder_start_token_id
    ids = torch.tensor([[start, *word_tokenizer(target.text, add_special_tokens=False)["input_ids"]]])
    with torch.no_grad():
        out = hf(input_ids=inputs, decoder_input_ids=ids, output_attentions=True)
    of_source, of_target = {"x": [4, 5], "(other)": [0, 1, 2, 3, 6]}, {"y": [2, 3], "(other)": [0, 1, 4]}
    for stack, patterns, queries, keys in (
        ("cross", out.cross_attentions, of_target, of_source),
        ("encoder", out.encoder_attentions, of_source, of_source),
        ("decoder", out.decoder_attentions, of_target, of_target),
    ):
        stats = model.attention_stats(source, target=target, stack=stack, by="span", targets=-1)
        assert (list(stats.query_spans[0]), list(stats.key_spans[0])) == (list(queries), list(keys))
        p = torch.stack(patterns, 1)[0].double().numpy()
        for q, name in enumerate(queries):
            for k, key_name in enumerate(keys):
                mass = p[:, :, queries[name]][..., keys[key_name]].sum(-1).mean(-1)
                np.testing.assert_allclose(stats.between["segments"][0][:, :, q, k], mass, atol=1e-5)
            np.testing.assert_allclose(
                stats.within["targets[-1]"][0][..., q], p[:, :, queries[name], -1].mean(-1), atol=1e-5
            )
        assert set(stats.frame()["stack"]) == {stack}


def test_layers_without_softmax_attention_hold_nan(tiny: Any) -> None:
    stats = tiny("lfm2").attention_stats(LONG, SPEC, by="span")
    mass = stats.between["segments"][0]
    assert np.isnan(mass[[0, 2]]).all() and np.allclose(mass[1].sum(-1), 1, atol=1e-5)
    assert np.isnan(stats.frame().query("layer == 0")["segments"]).all()


# ---------------------------------------------------------------- tables and refusals


def test_tables_and_files(tiny: Any, tmp_path: Any) -> None:
    stats = tiny("llama").attention_stats([LONG, SHORT], SPEC, by="span", targets=0)
    frame, spans = stats.frame(), stats.per_span()
    assert len(frame) == 2 * 3 * 4 * 9 and len(spans) == 2 * 3 * 4 * 3
    assert list(frame)[:8] == [
        "example", "layer", "head", "query_span", "key_span", "query_tokens", "key_tokens", "segments",
    ]  # fmt: skip
    row = frame.query("example == 1 and layer == 2 and head == 3 and query_span == 'b' and key_span == 'a'").iloc[0]
    assert (row["query_tokens"], row["key_tokens"]) == (1, 2)
    assert row["segments"] == stats.between["segments"][1][2, 3, 1, 0]
    np.testing.assert_array_equal(row["segment_outputs"], stats.between["segment_outputs"][1][2, 3, 1, 0])
    row = spans.query("example == 0 and layer == 1 and head == 2 and span == 'b'").iloc[0]
    assert row["tokens"] == 3 and row["entropy"] == stats.within["entropy"][0][1, 2, 1]
    assert set(stats.names) <= set(stats.provenance["definitions"])
    expected = np.mean([stats.between["segments"][i][:, :, q, k] for i, q, k in ((0, 1, 0), (1, 1, 0))], axis=0)
    np.testing.assert_allclose(stats.per_head("b", "a"), expected)
    again = SpanStats.read(stats.write(tmp_path / "spans.parquet"))
    assert repr(again) == repr(stats) and again.query_spans == stats.query_spans
    assert again.per_span().equals(spans) and again.provenance == stats.provenance and again.backends == stats.backends
    for name, arrays in stats.between.items():
        for ours, read in zip(arrays, again.between[name], strict=True):
            np.testing.assert_array_equal(ours, read)
    with pytest.raises(InterpError, match="'received' between spans was not collected"):
        stats.per_head("a", "b", "received")
    with pytest.raises(InterpError, match="no prompt has the spans 'a' and 'c'"):
        stats.per_head("a", "c")


def test_statistics_of_tokens_keep_every_bit(tiny: Any) -> None:
    model = tiny("llama")
    before, spec = model.attention_stats([LONG, SHORT]), StatSpec(topk=3, segments=True, segment_outputs=True)
    model.attention_stats([LONG, SHORT], by="span")
    after = model.attention_stats([LONG, SHORT], spec, by="token")
    assert after.provenance["left_out"] == ["topk", "segments", "segment_outputs"]
    assert before.frame().equals(after.frame())


@pytest.mark.parametrize(("options", "why"), [
    ({"by": "word"}, "by='word': 'token', 'span' or 'sentence'"),
    ({"spans": "a"}, "spans= is read with by='span'"),
    ({"targets": 0}, "targets= is read with by='span'"),
    ({"by": "span", "spans": ["a", "c"]}, "prompt 0 has no span 'c'; its spans: 'a', 'b'"),
    ({"by": "span", "spans": []}, "names of the prompts' spans"),
    ({"by": "span", "spans": 3}, "names of the prompts' spans"),
    ({"by": "span", "spans": {"a": (0, 2)}}, "names of the prompts' spans"),
    ({"by": "span", "targets": "b"}, "the span 'b' has 3 tokens, and a target is one key"),
    ({"by": "span", "targets": 40}, "position 40 is outside"),
    ({"by": "span", "targets": []}, "positions, ends of spans"),
    ({"by": "span", "targets": [1.5]}, "a position or the end of a span"),
    ({"by": "span", "targets": {"t": [0, 1]}}, "12 finite numbers expected"),
    ({"by": "span", "targets": {"t": [0.5] * 12}}, "must hold a key number for each query"),
    ({"by": "span", "targets": {"t": [12] * 12}}, "from 0 to 11"),
    ({"by": "span", "key_features": [1] * 12}, "{name: numbers} expected"),
    ({"by": "span", "key_features": {"x": [1.0] * 11 + [float("nan")]}}, "12 finite numbers"),
    ({"by": "span", "key_features": {"x": ["w"] * 12}}, "numbers expected"),
    ({"by": "span", "key_features": {"x": [[1] * 12] * 2}}, "2 lists for 1 prompt"),
    ({"by": "span", "spec": StatSpec(targets=True)}, r"StatSpec\(targets=True\) needs targets="),
    ({"by": "span", "spec": StatSpec(targets=False), "targets": 0}, "leaves it unread"),
    ({"by": "span", "spec": StatSpec(**{**dict.fromkeys(StatSpec.none().__dict__, False)})}, "asks for no statistic"),
    ({"by": "span", "spec": "entropy"}, "a headstats.StatSpec is expected"),
])  # fmt: skip
def test_refusals_of_arguments(tiny: Any, options: dict[str, Any], why: str) -> None:
    with pytest.raises(PromptError, match=why):
        tiny("llama").attention_stats(LONG, **options)


def test_refusals_of_prompts(tiny: Any) -> None:
    model = tiny("llama")
    overlapping = interp.Prompt(LONG.text, {"a": (0, 8), "b": (6, 11)})
    with pytest.raises(PromptError, match="prompt 1: the spans 'a' and 'b' share token 3"):
        model.attention_stats([LONG, overlapping], by="span")
    assert list(model.attention_stats(overlapping, by="span", spans="b").query_spans[0]) == ["b", "(other)"]
    with pytest.raises(PromptError, match="prompt 0 has no named span"):
        model.attention_stats("w1 w2", by="span")
    with pytest.raises(PromptError, match="a span named '\\(other\\)'"):
        model.attention_stats(interp.Prompt("w1 w2", {"(other)": (0, 2)}), by="span")
    with pytest.raises(PromptError, match="prompt 0 holds no sentence"):
        model.attention_stats("  ", by="sentence")
    with pytest.raises(PromptError, match="prompt 0 is not a text"):
        model.attention_stats([0, 4, 5], by="sentence")
    ids: Any = [0, 4, 5, 6]
    ids = interp.Prompt(ids, {"a": (1, 3)})  # spans of token ids are token ranges
    assert model.attention_stats(ids, by="span").query_spans == [{"a": 2, "(other)": 2}]


def test_prompts_of_vectors_have_spans(tiny: Any) -> None:
    model = tiny("llama")
    vectors = model.bridge.original_model.get_input_embeddings()(torch.tensor(model.coder.encode(LONG.text)))
    prompt = interp.Embeddings(vectors, spans={"a": (2, 4), "b": (6, 9)})
    ours, of_words = (model.attention_stats(p, SPEC, by="span") for p in (prompt, LONG))
    assert ours.query_spans == of_words.query_spans
    np.testing.assert_allclose(ours.between["segments"][0], of_words.between["segments"][0], atol=1e-6)
    with pytest.raises(PromptError, match="prompt 0 is not a text"):
        model.attention_stats(prompt, by="sentence")


# ---------------------------------------------------------------- figures and the command line


def test_a_head_is_drawn_by_span(tiny: Any, tmp_path: Any) -> None:
    from interp.plots import span_map
    from interp.plots.read_results import read_results

    other = interp.Prompt("w1 w2 w3", {"c": (0, 2)})
    stats = tiny("llama").attention_stats([LONG, other], SPEC, by="span")
    (trace,) = span_map(stats, "L1H2").data
    assert list(trace.y) == list(trace.x) == ["a", "b", "(other)", "c"]
    assert trace.z[1, 0] == pytest.approx(stats.between["segments"][0][1, 2, 1, 0])
    assert np.isnan(trace.z[0, 3])  # no prompt has both
    means = [stats.between["segments"][0][1, 2, 2, 2], stats.between["segments"][1][1, 2, 1, 1]]
    assert trace.z[2, 2] == pytest.approx(np.mean(means))
    for wrong, why in (({"statistic": "segment_outputs"}, "one number for each pair"), ({"head": "L9H0"}, "no head")):
        with pytest.raises(InterpError, match=why):
            span_map(stats, **{"head": "L0H0", **wrong})
    file = stats.write(tmp_path / "spans.parquet")
    with pytest.raises(InterpError, match="the page does not show"):
        read_results(file)
    tiny("llama").attention_stats(LONG).write(tmp_path / "tokens.parquet")
    assert list(read_results(tmp_path)) == ["tokens"]


def test_the_command_line_measures_prompts_of_a_file(tiny: Any, tmp_path: Any, monkeypatch: Any) -> None:
    from pathlib import Path

    from typer.testing import CliRunner

    from interp.cli.main import app

    monkeypatch.setattr("interp.model.load_model.load", lambda *args, **options: tiny("llama"))
    monkeypatch.chdir(tmp_path)
    Path("pairs.csv").write_text("clean,corrupt,answer,foil,span:a\nw1 w2 w3 w4,w1 w5 w3 w4,w95,w96,w2 w3\n")
    Path("texts.txt").write_text("w1 w2 w3\nw4 w5\n")

    def run(*words: str) -> Any:
        return CliRunner().invoke(app, ["stats", "tiny", *words])

    assert run("--by", "span", "--data", "pairs.csv", "--statistics", "segment_value_norms").exit_code == 0
    stats = SpanStats.read("spans.parquet")
    assert stats.names == ["segments", "segment_value_norms"] and stats.spans == ["a", "(other)"]
    assert run("--by", "sentence", "--data", "texts.txt", "-o", "table.csv").exit_code == 0
    assert Path("table.csv").read_text().startswith("example,layer,head,query_span,key_span,query_tokens,key_tokens,")
    for words, why in (
        (("--by", "word", "--data", "texts.txt"), "--by word"),
        (("--by", "span", "--data", "texts.txt"), "prompt 0 has no named span"),
        (("--by", "span", "--data", "pairs.csv", "--workers", "2"), "--workers is of runs over a corpus"),
        (("--by", "span", "--data", "pairs.csv", "-o", "table.txt"), "a .parquet or .csv file"),
        (("--spans", "a", "--data", "pairs.csv"), "--spans goes with --by span"),
    ):
        assert why in str(run(*words).exception)
