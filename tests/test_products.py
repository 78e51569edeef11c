"""Matrix products by the faster library, and blocks in bare products: the same numbers, wherever they are used."""

from __future__ import annotations

import pytest
import torch

import interp
from interp.doctor.families.text import tiny_hf
from interp.engine import Engine
from interp.engine import matmul as products
from interp.engine import packed_forward as packed
from interp.engine.base_runs import record_with_plain_blocks
from interp.engine.matmul import ONEDNN, PLAIN, round_up_rows
from interp.engine.plain_blocks import WRITABLE, read_plain_blocks
from interp.engine.runs import record
from interp.engine.verified import Verified

EARLY = interp.PromptPair("w1 w2 w3 w4 w5 w6", "w9 w2 w3 w4 w5 w6", "w95", "w96")
HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@pytest.fixture
def onednn(monkeypatch):
    """oneDNN, whether it pays here or not."""
    if not HAS_ONEDNN:
        pytest.skip("this build of torch has no oneDNN")
    monkeypatch.setattr(products, "is_onednn_faster", lambda threads: True)


@pytest.mark.parametrize("rows", [1, 3, 64, 129])
@pytest.mark.parametrize("biased", [False, True])
def test_products_equal_float64(onednn, rows: int, biased: bool) -> None:
    torch.manual_seed(rows)
    x, weight, other = torch.randn(rows, 48), torch.randn(40, 48), torch.randn(rows, 40)
    bias = torch.randn(40) if biased else None
    exact = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    with torch.no_grad():
        for p in (products.PLAIN, products.ONEDNN):
            torch.testing.assert_close(p.linear(x, weight, bias).double(), exact, atol=1e-5, rtol=1e-5)
            silu = torch.nn.functional.silu(exact)
            torch.testing.assert_close(p.silu(x, weight, bias).double(), silu, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(p.times(x, weight, bias, other).double(), exact * other, atol=1e-5, rtol=1e-4)


def test_a_models_own_products_are_redirected_and_others_left_alone(onednn, monkeypatch) -> None:
    seen = []
    real = products.OneDNN.linear
    monkeypatch.setattr(products.OneDNN, "linear", lambda self, *a: seen.append(a[0].dtype) or real(self, *a))
    x, weight, bias = torch.randn(1, 5, 8), torch.randn(6, 8), torch.randn(6)
    with torch.no_grad(), products.redirect_products(torch.float32, torch.device("cpu")):
        linear = torch.nn.functional.linear(x, weight, bias)
        conv = torch.addmm(bias, x[0], weight.t().contiguous())
        torch.testing.assert_close(linear[0], conv)
        torch.nn.functional.linear(x.double(), weight.double())
        torch.addmm(torch.zeros(5, 6), x[0], weight.t())  # a matrix is added, not a bias
    assert seen == [torch.float32] * 2
    with products.redirect_products(torch.float32, torch.device("cpu")):  # autograd is on
        torch.nn.functional.linear(x, weight)
    with torch.no_grad(), products.redirect_products(torch.float64, torch.device("cpu")):
        torch.nn.functional.linear(x.double(), weight.double())
    assert len(seen) == 2


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox"])
def test_float32_sweeps_equal_naive(onednn, word_tokenizer, kind: str) -> None:
    """In float32, where the faster products are used (the other tests of the engine run in float64)."""
    model = interp.load(tiny_hf(kind), tokenizer=word_tokenizer, dtype=torch.float32)
    model.bridge.original_model.float()
    sites = model.sites("resid_pre") | model.sites("z") | model.sites("mlp_out", layers=1)
    fast, naive = (interp.patch(model, EARLY, sites, engine=e).frame()["patched"] for e in ("fast", "naive"))
    assert abs(fast - naive).max() < 1e-4


def test_which_models_are_lean(tiny) -> None:
    assert all(read_plain_blocks(tiny(kind)) for kind in ("llama", "mistral", "qwen2"))
    assert not any(
        read_plain_blocks(tiny(kind)) for kind in ("gpt2", "neox", "gemma2", "qwen3", "olmo2", "mixtral", "cohere")
    )
    model = tiny("llama")
    model.bridge.set_use_attn_result(True)
    assert read_plain_blocks(model) is None
    model.bridge.set_use_attn_result(False)


def test_lean_blocks_equal_the_models_own_in_float64(tiny) -> None:
    model = tiny("llama")
    sites = [s for c in ("resid_pre", "resid_mid", "attn_out", "mlp_out", "q", "k", "v", "z") for s in model.sites(c)]
    lean = interp.patch(model, EARLY, sites).frame()["patched"]
    Verified.of(model).plain_blocks_differ = True
    try:
        own = interp.patch(model, EARLY, sites).frame()["patched"]
    finally:
        Verified.forget(model)
    assert abs(lean - own).max() < 1e-9
    assert abs(lean - lean.mean()).max() > 1e-3


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_base_runs_in_bare_products_are_the_models_own(tiny, kind: str) -> None:
    """All that a run holds, of prompts of several lengths, twice the same, with and without noise."""
    model = tiny(kind)
    components = ["resid_pre", *sorted(WRITABLE - {"resid_pre"})]
    prompts = [model.coder.encode(t) for t in ("w1 w2 w3 w4 w5", "w7", "w9 w8 w7 w6 w5", "w7", "w1 w2 w3 w4 w5")]
    loud = torch.randn(len(prompts[2]), model.d_model, dtype=model.dtype)
    noise = [None, None, loud, None, loud]
    runner = Engine(model, "fast")
    with torch.no_grad():
        want = record(model, prompts, components, noise, runner.frame)
        got = record_with_plain_blocks(model, read_plain_blocks(model) or [], runner.frame, prompts, components, noise)
        plain = record_with_plain_blocks(model, read_plain_blocks(model) or [], runner.frame, prompts, components)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.ids == theirs.ids and ours.noise is theirs.noise
        for c in components:
            for layer in range(model.n_layers):
                torch.testing.assert_close(ours.whole(c, layer), theirs.whole(c, layer), atol=1e-9, rtol=1e-9)
        pairs = zip((*ours.keys, *ours.values, ours.logits), (*theirs.keys, *theirs.values, theirs.logits), strict=True)
        for a, b in pairs:
            torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)
    assert plain[1] is plain[3] and plain[0] is plain[4]  # equal prompts share a run
    assert (got[0].logits - got[4].logits).abs().max() > 1e-3


def test_only_what_was_seen_is_run_lean(tiny, monkeypatch) -> None:
    """Longer prompts than any before, and components inside experts' or fused parts, go through the model itself."""
    model = tiny("llama")
    Verified.forget(model)
    seen = []
    real = type(model).last_logits
    monkeypatch.setattr(type(model), "last_logits", lambda self, t: seen.append(len(t)) or real(self, t))
    short, long = ([model.coder.encode(t)] for t in ("w1 w2", "w1 w2 w3"))
    for prompts, components, forwards in (
        (short, (), 1), (short, ("z",), 0), (long, (), 1), (long, ("v",), 0), (short, ("mlp_post",), 1),
    ):  # fmt: skip
        seen.clear()
        Engine(model).record(prompts, components)
        assert len(seen) == forwards, (prompts, components)
    Verified.forget(model)


def test_a_lean_block_that_is_wrong_gives_way_to_the_models_own(word_tokenizer, monkeypatch) -> None:
    """Weights that TransformerLens holds elsewhere than in the modules would be such a case."""
    model = interp.load(tiny_hf("llama"), tokenizer=word_tokenizer)
    want = interp.patch(model, EARLY, model.sites("z"), engine="naive").frame()["patched"]
    wrong = read_plain_blocks(model)
    assert wrong is not None
    monkeypatch.setattr(
        "interp.engine.core.read_plain_blocks",
        lambda model: [b.__class__(**{**vars(b), "o": wrong[0].q}) for b in wrong],
    )
    e = interp.patch(model, EARLY, model.sites("z"), engine="fast")
    assert abs(e.frame()["patched"] - want).max() < 1e-9
    assert e.provenance["engine"] == "packed, exact"


def test_logits_that_no_metric_reads_are_not_computed(tiny, monkeypatch) -> None:
    model, seen = tiny("llama"), []
    real = packed.compute_final_logits

    def spied(model, rows, columns=None):
        out = real(model, rows, columns)
        seen.append(tuple(out.shape))
        return out

    sites = model.sites("resid_pre", layers=1)
    interp.patch(model, EARLY, sites)
    monkeypatch.setattr(packed, "compute_final_logits", spied)
    pairwise = interp.patch(model, EARLY, sites).frame()["patched"]
    assert {shape[1] for shape in seen} == {2}
    custom = interp.patch(model, EARLY, sites, metric=lambda x, r: x.gather(1, r.answer[:, None])[:, 0]
                          - x.gather(1, r.foil[:, None])[:, 0]).frame()["patched"]  # fmt: skip
    assert seen[-1][1] == model.bridge.cfg.d_vocab
    assert abs(pairwise - custom).max() < 1e-12
    assert Engine(model, "naive").fast is False


def test_few_numbers_of_rows_are_compiled_for() -> None:
    """Each costs a megabyte or two for as long as the process lives, and a sweep meets thousands."""
    filled = [round_up_rows(n) for n in range(1, 4097)]
    assert len(set(filled)) <= 28 and all(f >= n for n, f in enumerate(filled, 1))
    assert max(f / n for n, f in enumerate(filled, 1) if n > 128) < 1.25


@pytest.mark.skipif(not HAS_ONEDNN, reason="this build of torch has no oneDNN")
def test_rows_that_fill_up_leave_no_trace() -> None:
    x, weight, other = torch.randn(2, 101, 64), torch.randn(48, 64), torch.randn(2, 101, 48)
    for call in (lambda p: p.linear(x, weight), lambda p: p.silu(x, weight), lambda p: p.times(x, weight, None, other)):
        torch.testing.assert_close(call(ONEDNN), call(PLAIN), rtol=1e-4, atol=1e-4)
