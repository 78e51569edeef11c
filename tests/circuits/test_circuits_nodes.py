"""Nodes: the QK fix against one softmax at a time, GradDrop against detached layers, integrated gradients add up."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import interp
from interp import zoo
from interp.circuits import atp_star, attribute_sites, screen
from interp.circuits.attribution.hook_gradients import first_hook
from interp.circuits.attribution.qk_fix import Rerun, Secants
from interp.circuits.capture import capture, capture_calls
from interp.errors import InterpError, ModelError
from interp.model.attention_call import dense_attention
from interp.model.hooks import hooks
from interp.sites import Site

PAIR = interp.PromptPair("w1 w2 w3 w4 w5", "w1 w9 w3 w7 w5", "w95", "w96")
# grouped; plain; soft cap and window; sinks; bias by position; latent
KINDS = ("llama", "gpt2", "gemma2", "gpt_oss", "bloom", "deepseek_v3")


def ids(model: interp.Model, text: str) -> Tensor:
    return torch.tensor([model.coder.encode(text)])


def calls(model: interp.Model, *texts: str):
    with torch.no_grad(), capture_calls(model) as kept:
        for text in texts:
            model.last_logits(ids(model, text))
            yield dict(kept)


@pytest.mark.parametrize("kind", KINDS)
def test_queries_and_keys_equal_one_softmax_at_a_time(tiny, kind: str, monkeypatch) -> None:
    model = tiny(kind)
    base, source = calls(model, PAIR.clean, "w4 w9 w3 w7 w1")
    rerun = Rerun("auto", base, source)
    generator = torch.Generator().manual_seed(0)
    for layer in (0, model.n_layers - 1):
        call, other = base[layer], source[layer]
        z = dense_attention(call).transpose(1, 2)
        grads = torch.randn(z.shape, generator=generator, dtype=z.dtype)
        n, group = z.shape[1], model.n_heads // model.n_kv_heads
        want = torch.zeros(1, n, model.n_kv_heads)
        for t in range(n):
            for head in range(model.n_kv_heads):
                k = call.k.clone()
                k[:, head, t] = other.k[:, head, t]
                change = (dense_attention(replace(call, k=k)).transpose(1, 2) - z) * grads
                want[0, t, head] = change[:, :, head * group : (head + 1) * group].sum()
        for tile in (1, 2**21):
            monkeypatch.setattr("interp.circuits.attribution.qk_fix.TILE", tile)
            torch.testing.assert_close(rerun.each_key(layer, grads), want.to(grads), atol=1e-6, rtol=1e-5)
        q = dense_attention(replace(call, q=other.q)).transpose(1, 2) - z
        torch.testing.assert_close(rerun.queries(layer), q, atol=1e-6, rtol=1e-5)
        k = torch.cat([call.k[:, :, :2], other.k[:, :, 2:4], call.k[:, :, 4:]], 2)
        k = dense_attention(replace(call, k=k)).transpose(1, 2) - z
        torch.testing.assert_close(rerun.keys(layer, 2, 4), k, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("component", ["q", "k"])
def test_the_fix_is_the_change_of_z_times_its_slope_also_in_latent_attention(tiny, component: str) -> None:
    """Heads one by one: z′ from a forward with that head's queries or keys, ∂metric/∂z by autograd."""
    model = tiny("deepseek_v3")
    layer = model.n_layers - 1
    name, z_name = (f"blocks.{layer}.attn.hook_{c}" for c in (component, "z"))
    acts: dict[str, Tensor] = {}

    def keep(key: str):
        return lambda x, hook: acts.__setitem__(key, x.clone())

    def retain(x: Tensor, hook: object) -> Tensor:
        x.retain_grad()
        acts["z"] = x
        return x

    with torch.no_grad(), hooks(model, (name, keep("source"))):
        model.last_logits(ids(model, PAIR.corrupt))
    with hooks(model, (z_name, retain)):
        logits = model.forward(ids(model, PAIR.clean))[0, -1]
    answer, foil = (model.coder.continuation(word)[0] for word in ("w95", "w96"))
    (logits[answer] - logits[foil]).backward()
    expected = []
    for head in range(model.n_heads):

        def put(x: Tensor, hook: object, head: int = head) -> Tensor:
            x = x.clone()
            x[:, :, head] = acts["source"][:, :, head]
            return x

        with torch.no_grad(), hooks(model, (name, put), (z_name, keep("changed"))):
            model.last_logits(ids(model, PAIR.clean))
        expected.append(((acts["changed"] - acts["z"].detach()) * acts["z"].grad).sum().item())
    sites = model.sites(component, layers=layer)
    got = attribute_sites(model, PAIR, sites, mode="noise", method="atp-qk").frame()["raw"]
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert np.abs(expected).max() > 1e-3


def test_saturated_attention_is_seen_with_the_fix_alone() -> None:
    """Behind the head everything is linear, so that the fixed estimate is the exact effect; the slope is zero."""
    known = zoo.induction()
    model, pairs = known.model, known.pairs(3)
    each = model.sites("k", layers=1, heads=2, positions="each")
    for sites in (["k.L1H2", "q.L1H2"], each, ["k.L1H2@A1", "k.L1H2@B1"]):
        exact = interp.patch(model, pairs, sites, mode="noise").frame()
        fixed = attribute_sites(model, pairs, sites, mode="noise", method="atp-qk").frame()
        plain = attribute_sites(model, pairs, sites, mode="noise").frame()
        np.testing.assert_allclose(fixed["raw"], exact["raw"], atol=1e-3)
        assert plain["raw"].abs().max() < 1e-6 and exact["raw"].abs().max() > 19
    ranking = atp_star(model, pairs, model.sites("k") | model.sites("q"), qk_fix="nodes")
    assert ranking["score"].iloc[0] > 100 * max(ranking["score"].iloc[1], 1e-9)
    assert str(ranking["component"].iloc[0]) == "k" and ranking["head"].iloc[0] == 2


def test_carried_on_the_fix_finds_what_lies_before_saturated_attention() -> None:
    known = zoo.induction()
    model, pairs = known.model, known.pairs(3)
    previous = [
        attribute_sites(model, pairs, "z.L0H1", mode="noise", method=m).frame()["raw"]
        for m in ("atp-qk", "atp-carried")
    ]
    exact = interp.patch(model, pairs, "z.L0H1", mode="noise").frame()["raw"]
    assert previous[0].abs().max() < 1e-6 and exact.abs().min() > 19
    np.testing.assert_allclose(previous[1], exact, atol=1e-3)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_what_a_key_reads_adds_up_to_its_exact_effect(tiny, kind: str) -> None:
    """The turned gradient times the change of all queries, or keys, is the sum of what each does exactly."""
    model = tiny(kind)
    job = dict(mode="noise", method="atp-carried")
    own = attribute_sites(model, PAIR, model.sites("q", layers=0) | model.sites("k", layers=0, positions="each"), **job)
    base, source = calls(model, PAIR.clean, PAIR.corrupt)
    assert own.frame()["raw"].abs().max() > 1e-4
    rerun = Rerun("auto", base, source)
    names = [f"blocks.{layer}.attn.hook_{c}" for layer in range(model.n_layers) for c in "qk"]
    acts = [capture(model, [model.coder.encode(t)], names) for t in (PAIR.corrupt, PAIR.clean)]
    change = {n: acts[0][n] - acts[1][n] for n in names}
    secants, kept = Secants(rerun, change), {}

    def keep(name: str):
        def hook(x, hook):
            kept[name] = x.clone()
            return kept[name]

        return name, hook

    with torch.enable_grad(), hooks(model, *map(keep, names), *secants.hooks()):
        logits = model.last_logits(ids(model, PAIR.clean))[0]
        answer, foil = (model.coder.continuation(w)[0] for w in (PAIR.answer, PAIR.foil))
        grads = torch.autograd.grad(logits[answer] - logits[foil], list(kept.values()))
    found = [float((change[n] * g).sum()) for n, g in zip(kept, grads, strict=True) if ".0." in n]
    frame = own.frame()
    want = [frame[frame["component"] == c]["raw"].sum() for c in ("q", "k")]
    assert found == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("kind", ["llama", "neox"])
def test_dropped_gradients_equal_detached_layers(tiny, kind: str) -> None:
    model = tiny(kind)
    sites = [Site("z", 0, 1), Site("z", 1, 3), Site("mlp_out", 1), Site("resid_pre", 1), Site("mlp_post", 2, 5)]
    found = atp_star(model, PAIR, sites, mode="noise", qk_fix=False).set_index(["component", "layer"])["score"]

    def estimates(detached: int) -> list[float]:
        kept: dict[str, Tensor] = {}

        def keep(name: str):
            return name, lambda x, hook: kept.__setitem__(name, x) or x

        def stop(x, hook):
            return x.detach()

        names = list(dict.fromkeys(s.hook_name for s in sites))
        late = [(f"blocks.{detached}.hook_{c}_out", stop) for c in ("attn", "mlp")] * (detached >= 0)
        start = (first_hook(model), lambda x, hook: x.detach().requires_grad_())
        with torch.enable_grad():
            acts = []
            for text in (PAIR.corrupt, PAIR.clean):
                with hooks(model, start, *map(keep, names), *late):
                    logits = model.last_logits(ids(model, text))[0]
                acts.append(dict(kept))
            answer, foil = (model.coder.continuation(w)[0] for w in (PAIR.answer, PAIR.foil))
            grads = torch.autograd.grad(logits[answer] - logits[foil], [kept[n] for n in names], allow_unused=True)
        out = []
        for site in sites:
            g = grads[names.index(site.hook_name)]
            product = torch.zeros(1) if g is None else (acts[0][site.hook_name] - acts[1][site.hook_name]) * g
            at = product if site.head is None or g is None else product[:, :, site.head]
            out.append(float(at.detach().sum()))
        return out

    dropped = np.abs([estimates(layer) for layer in range(model.n_layers)])
    for i, site in enumerate(sites):
        n = model.n_layers + (site.component == "resid_pre")
        want = (dropped[:, i].sum() + abs(estimates(-1)[i])) / n
        assert found[site.component, site.layer] == pytest.approx(want, rel=1e-6), str(site)


def test_integrated_gradients_add_up_and_tend_to_the_slope(tiny) -> None:
    model = tiny("llama")
    pair = [PAIR, interp.PromptPair("w1 w2 w3 w4 w5 w6 w7", "w1 w9 w3 w7 w5 w6 w7", "w95", "w96")]
    whole = interp.patch(model, pair, "resid_pre.L0").frame()["raw"].to_numpy()
    inputs = attribute_sites(model, pair, model.sites("embed", positions="each"), method="ig-inputs", steps=40).frame()
    np.testing.assert_allclose(inputs.groupby("example")["raw"].sum(), whole, atol=2e-3)
    for component in ("resid_pre", "z", "mlp_post"):
        sites = model.sites(component, layers=[1], positions="each" if component == "resid_pre" else "all")
        group = {"all": list(model.sites(component, layers=[1], positions="all"))}
        want = interp.patch(model, pair, groups=group).frame()["raw"].to_numpy()
        found = attribute_sites(model, pair, sites, method="ig-activations", steps=40).frame()
        np.testing.assert_allclose(found.groupby("example")["raw"].sum(), want, atol=2e-3)
    # the first of the published sums, by hand: one step is the slope half way
    a, b = (model.coder.encode(t) for t in (PAIR.corrupt, PAIR.clean))
    leaf = torch.zeros(1, len(a), model.d_model, dtype=model.dtype)
    embed = {}
    with hooks(model, ("hook_embed", lambda x, hook: embed.__setitem__("x", x.detach()))), torch.no_grad():
        for name, prompt in (("a", a), ("b", b)):
            model.last_logits(torch.tensor([prompt]))
            embed[name] = embed["x"]
    leaf = torch.lerp(embed["a"], embed["b"], 0.5).requires_grad_()
    with torch.enable_grad(), hooks(model, ("hook_embed", lambda x, hook: leaf)):
        logits = model.last_logits(torch.tensor([a]))[0]
        answer, foil = (model.coder.continuation(w)[0] for w in (PAIR.answer, PAIR.foil))
        (slope,) = torch.autograd.grad(logits[answer] - logits[foil], leaf)
    want = ((embed["b"] - embed["a"]) * slope).sum((0, 2))
    found = attribute_sites(model, PAIR, model.sites("embed"), method="ig-inputs", steps=1).frame()["raw"]
    np.testing.assert_allclose(found, want, atol=1e-9)


def test_neither_batches_nor_lengths_nor_order_matter(tiny, monkeypatch) -> None:
    model = tiny("llama")
    more = interp.PromptPair("w1 w2 w3 w4 w5 w6 w7", "w1 w9 w3 w7 w5 w6 w7", "w95", "w96")
    pairs = [PAIR, more, interp.PromptPair("w8 w2 w3 w4 w6", "w8 w2 w1 w4 w6", "w90", "w91")]
    sites = model.sites("z") | model.sites("q") | model.sites("k") | model.sites("resid_pre", positions=-1)
    alone = [atp_star(model, p, sites).sort_values(["component", "layer", "head"])["score"] for p in pairs]
    together = atp_star(model, pairs, sites).sort_values(["component", "layer", "head"])["score"]
    np.testing.assert_allclose(together, np.mean(alone, axis=0), rtol=1e-6)
    monkeypatch.setattr("interp.circuits.attribution.nodes.TOKENS", 1)
    again = atp_star(model, pairs[::-1], sites).sort_values(["component", "layer", "head"])["score"]
    np.testing.assert_allclose(again, together, rtol=1e-6)


def test_a_pair_without_a_difference_has_no_effect(tiny) -> None:
    model = tiny("llama")
    same = interp.PromptPair(PAIR.clean, PAIR.clean, PAIR.answer, PAIR.foil)
    ranking = atp_star(model, same, model.sites("z") | model.sites("k", positions="each"))
    assert ranking["score"].max() < 1e-12 and ranking["estimate"].abs().max() < 1e-12


def test_what_cannot_be_estimated_is_refused(tiny) -> None:
    model = tiny("llama")
    with pytest.raises(InterpError, match="unknown method 'x'"):
        attribute_sites(model, PAIR, method="x")  # type: ignore[arg-type]
    for bad in (0, True, 1.5):
        with pytest.raises(InterpError, match="steps="):
            attribute_sites(model, PAIR, method="ig-inputs", steps=bad)  # type: ignore[arg-type]
    with pytest.raises(InterpError, match="qk_fix='x'"):
        atp_star(model, PAIR, qk_fix="x")  # type: ignore[arg-type]
    with pytest.raises(InterpError, match="has no gradient"):
        atp_star(model, PAIR, metric=interp.metrics.rank)
    with pytest.raises(ModelError, match="does not reach that head's attention alone"):
        atp_star(tiny("olmo2"), PAIR, tiny("olmo2").sites("q"))
    assert len(atp_star(tiny("olmo2"), PAIR, qk_fix=False)) == tiny("olmo2").n_layers * tiny("olmo2").n_heads
    assert all(p.requires_grad for p in model.bridge.parameters())


def test_the_screen_bounds_what_it_passed_over() -> None:
    known = zoo.one_head()
    model, pairs = known.model, known.pairs(4)
    table = screen(model, pairs, k=1, method="atp*", sample=5)
    assert table["evidence"].value_counts().to_dict() == {"estimate": 6, "exact, drawn": 5, "exact": 1}
    assert table["exact"].notna().equals(table["evidence"] != "estimate")
    bound = table.attrs["missed"]
    assert (bound.population, bound.sampled, bound.found) == (11, 5, 0) and bound.largest < 1e-3
    assert bound.threshold == pytest.approx(2, abs=1e-3) and 0 < bound.at_most < 11 and "95% confidence" in str(bound)
    every = screen(model, pairs, k=1, sample=99).attrs["missed"]
    assert every.sampled == every.population == 11 and every.at_most == 0
    assert "nothing was passed over" in str(screen(model, pairs, k=99, sample=3).attrs["missed"])
    assert "missed" not in screen(model, pairs, k=1).attrs
