"""AttentionPatterns: what is kept equals the dense pattern; segments, receiver heads, files."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

import interp
from interp.errors import InterpError, PromptError, SiteError
from interp.results.attention_patterns import (
    AttentionPatterns,
    chunked,
    partition,
    receiver_score,
    roots,
    vertical_scores,
    weights_of,
)
from interp.results.parquet import read_parquet

TEXT = " ".join(f"w{i}" for i in (5, 9, 3, 5, 9, 44, 7, 61, 5, 9, 3, 12, 12, 80, 2, 33, 5, 9))


def dense(model: interp.Model, text: str, layer: int) -> np.ndarray:
    """The layer's pattern by TransformerLens' own hook, in float64."""
    name = f"blocks.{layer}.attn.hook_pattern"
    _, cache = model.run_with_cache(torch.tensor([model.coder.encode(text)]), names_filter=[name])
    return cache[name][0].double().detach().numpy()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral", "gpt_oss"])
def test_a_short_prompt_keeps_its_whole_pattern(tiny, kind: str):
    model = tiny(kind)
    found = model.attention_patterns(TEXT)
    (example,) = found.examples
    assert not example.pooled and len(found.heads) == len(model.attention_layers) * model.n_heads
    run = example.runs["clean"]
    for layer in model.attention_layers:
        p = dense(model, TEXT, layer)
        for head in range(model.n_heads):
            i = found.heads.index((layer, head))
            np.testing.assert_array_equal(run.maps[i], roots(p[head]))
            for s, (_, a, b) in enumerate(example.segments):
                for t, (_, c, d) in enumerate(example.segments):
                    assert run.blocks[i, s, t] == pytest.approx(p[head, a:b, c:d].sum(-1).mean(), abs=1e-5)


def test_a_long_prompt_is_pooled_and_chosen_heads_stay_exact(tiny):
    model = tiny("llama")
    found = model.attention_patterns(TEXT, heads=[(0, 1)], exact=["L1H0", "z.L0H1"], resolution=7, topk=3, rows=4)
    assert found.heads == [(0, 1), (1, 0)] and found.exact == [(1, 0), (0, 1)]
    (example,) = found.examples
    run, edges = example.runs["clean"], example.edges
    n = example.n_tokens
    assert example.pooled and len(edges) == 8 and edges[-1] == n
    for layer, head in found.heads:
        p = dense(model, TEXT, layer)[head]
        bins = list(pairwise(edges))
        pooled = [[p[a:b, c:d].max() for c, d in bins] for a, b in bins]
        np.testing.assert_array_equal(run.maps[found.heads.index((layer, head))], roots(np.array(pooled)))
        i = found.exact.index((layer, head))
        np.testing.assert_array_equal(run.rows[i], roots(p[run.queries]))
        for q in range(n):
            seen = min(q + 1, 3)
            np.testing.assert_allclose(run.top_value[i, q, :seen], np.sort(p[q])[::-1][:seen], atol=1e-6)
            np.testing.assert_allclose(p[q, run.top_index[i, q, :seen]], run.top_value[i, q, :seen], atol=1e-6)
            assert (run.top_index[i, q, seen:] == -1).all()
    assert run.queries[-1] == n - 1 and len(run.queries) == 4


def test_pairs_keep_both_runs_and_their_spans(tiny):
    model = tiny("llama")
    pair = interp.PromptPair("w1 w2 w3 w4", "w1 w9 w3 w4", "w5", "w6").span("who", "w2")
    (example,) = model.attention_patterns(pair).examples
    assert list(example.runs) == ["clean", "corrupt"]
    assert [t for t in example.runs["corrupt"].tokens if t.strip()] != example.runs["clean"].tokens
    assert [name for name, _, _ in example.segments].count("who") == 1


def test_the_forward_is_not_changed(tiny):
    model = tiny("llama")
    tokens = torch.tensor([model.coder.encode(TEXT)])
    before = model(tokens)
    model.attention_patterns(TEXT, exact=[(0, 0)], resolution=4)
    torch.testing.assert_close(model(tokens), before)


def test_files_come_back(tiny, tmp_path: Path):
    found = tiny("llama").attention_patterns([TEXT, "w1 w2"], exact=[(0, 0)], resolution=5)
    back = AttentionPatterns.read(found.write(tmp_path / "p.parquet"))
    assert (back.heads, back.exact, back.provenance) == (found.heads, found.exact, found.provenance)
    for a, b in zip(back.examples, found.examples, strict=True):
        assert a.segments == b.segments and a.runs.keys() == b.runs.keys()
        for name, run in a.runs.items():
            for field, value in vars(run).items():
                np.testing.assert_array_equal(value, getattr(b.runs[name], field))
    with pytest.raises(InterpError, match="does not hold effects"):
        read_parquet(tmp_path / "p.parquet", kind="effects")
    assert "2 prompt(s)" in repr(back)


def test_roots_keep_small_weights_apart():
    p = np.linspace(0, 1, 1001)
    assert np.abs(weights_of(roots(p)) - p).max() < 1 / 255
    assert np.abs(weights_of(roots(p[:10])) - p[:10]).max() < 4e-4


def test_partition_covers_everything_once_and_short_spans_win():
    assert partition({"a": (1, 5), "b": (2, 3)}, 7) == [("", 0, 1), ("a", 1, 2), ("b", 2, 3), ("a", 3, 5), ("", 5, 7)]
    assert partition({}, 3) == [("", 0, 3)]
    assert chunked(5, 2) == [("0–1", 0, 2), ("2–4", 2, 5)]
    assert chunked(1) == [("0", 0, 1)]


def test_receiver_score_of_a_head_that_reads_one_sentence():
    """One-hot vertical scores of length m have excess kurtosis (m² − 3m + 3)/(m − 1) − 3."""
    n, m = 15, 10
    segments = [("", 0, 1), *((f"s{i}", 2 * i + 1, 2 * i + 3) for i in range(n - 1))]
    blocks = np.zeros((n, n))
    blocks[:, 0], blocks[:, 4] = 0.4, 0.5  # the start token is read by all, and does not count
    scores = vertical_scores(blocks, segments)
    np.testing.assert_allclose(scores[1 : m + 1], np.eye(m)[3] * 0.25)
    assert np.isnan(scores[0]) and np.isnan(scores[m + 1 :]).all()
    assert receiver_score(blocks, segments) == pytest.approx((m * m - 3 * m + 3) / (m - 1) - 3)
    named = [("s", 0, 1), *segments[1:5], ("", 9, 11), *segments[6:]]  # the first token's segment; what lies between
    assert np.isnan(vertical_scores(blocks, named)[[0, 5]]).all() and np.isfinite(vertical_scores(blocks, named)[4])
    assert np.isnan(receiver_score(blocks[:10, :10], segments[:10]))
    uniform = np.tile(np.full(n, 1 / n), (n, 1))
    assert np.isnan(receiver_score(uniform, segments)), "no spread: nothing stands out"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.attention_patterns(TEXT, heads=[(99, 0)]), SiteError, "is no head of this model"),
        (lambda m: m.attention_patterns(TEXT, exact=["mlp"]), SiteError, "is no head"),
        (lambda m: m.attention_patterns([]), PromptError, "no prompts"),
        (lambda m: m.attention_patterns(TEXT, resolution=0), PromptError, "at least 1"),
        (lambda m: m.attention_patterns([3.5]), PromptError, "float"),
    ],
)
def test_bad_input(tiny, call, error, message: str):
    with pytest.raises(error, match=message):
        call(tiny("llama"))
