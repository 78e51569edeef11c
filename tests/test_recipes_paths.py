"""Path patching, knock-out and mediation, against slow hook-based versions and in known circuits."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES

import interp
from interp.engine import Engine
from interp.engine.block_probe import Probe
from interp.errors import InterpError, PromptError, SiteError
from interp.model.hooks import hooks
from interp.sites import Site
from interp.zoo.known import INDUCTION, PREVIOUS_TOKEN

PAIR = interp.PromptPair("w1 w2 w3 w4 w5", "w1 w9 w3 w7 w5", "w95", "w96")


def cached(model: interp.Model, text: str) -> dict[str, Any]:
    tokens = torch.tensor([model.coder.encode(text)])
    found: dict[str, Any] = {}
    names = [n for n in model.bridge.hook_dict if n.endswith(("hook_z", "hook_attn_out", "hook_mlp_out"))]

    def keep(name: str):
        return name, lambda x, hook: found.__setitem__(name, x.detach())

    with torch.no_grad(), hooks(model, *map(keep, names)):
        found["logits"] = model.last_logits(tokens)[0]
    return found


def slow_path(
    model: interp.Model, sender: Site, receiver: Site, recompute: bool, mode: str, using: str = "patch"
) -> float:
    """Two full forwards with TransformerLens hooks, as the publications describe them."""
    texts = (PAIR.clean, PAIR.corrupt) if mode == "noise" else (PAIR.corrupt, PAIR.clean)
    base, source = (cached(model, t) for t in texts)
    if using == "zero":
        source = {name: torch.zeros_like(x) for name, x in source.items()}
    elif using == "mean":
        source = {name: x.mean(1, keepdim=True).expand_as(x) for name, x in base.items() if x.ndim > 1}
    tokens = torch.tensor([model.coder.encode(texts[0])])
    got: dict[str, torch.Tensor] = {}
    pairs: list[tuple[str, Any]] = []
    out = {"z": "attn_out", "attn_out": "attn_out", "mlp_out": "mlp_out"}[sender.component]
    for layer in range(model.n_layers):
        for component in ("attn_out", "mlp_out"):
            name = f"blocks.{layer}.hook_{component}"
            mine = layer == sender.layer and component == out
            if mine and sender.component != "z":
                pairs.append((name, lambda x, hook, name=name: source[name]))
            elif not mine and (component == "attn_out" or not recompute):
                pairs.append((name, lambda x, hook, name=name: base[name]))
    if sender.component == "z":
        name = sender.hook_name

        def send(x, hook):
            x = base[name].clone()
            x[:, :, sender.head] = source[name][:, :, sender.head]
            return x

        pairs.append((name, send))
    reading = receiver.hook_name
    # the receiver's own output must not be frozen while it is read
    pairs = [p for p in pairs if p[0] != reading] + [(reading, lambda x, hook: got.__setitem__("x", x.detach()))]
    with torch.no_grad(), hooks(model, *pairs):
        model.last_logits(tokens)

    def receive(x, hook):
        x = x.clone()
        if receiver.head is None:
            x[:] = got["x"]
        else:
            x[:, :, receiver.head] = got["x"][:, :, receiver.head]
        return x

    with torch.no_grad(), hooks(model, (reading, receive)):
        logits = model.last_logits(tokens)[0]
    answer, foil = (model.coder.continuation(w)[0] for w in (PAIR.answer, PAIR.foil))
    return float(logits[answer] - logits[foil])


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("mlps", ["frozen", "recomputed"])
def test_paths_equal_two_hooked_forwards(tiny, kind: str, mlps: str) -> None:
    model = tiny(kind)
    senders = [Site("z", 0, 1), Site("z", 1, 3), Site("attn_out", 1), Site("mlp_out", 0)]
    receivers = [Site("q", 2, 0), Site("k", 2, 1), Site("v", 1, 0), Site("mlp_out", 2), Site("resid_post", 2)]
    receivers = [r for r in receivers if r.hook_name in model.bridge.hook_dict]
    for mode in ("noise", "denoise"):
        e = interp.path_patch(model, PAIR, senders, receivers, mode=mode, mlps=mlps).frame()
        for row in e.itertuples():
            head = None if row.head is None or str(row.head) == "<NA>" else int(row.head)
            receiver = Site(row.component, int(row.layer), head)
            want = slow_path(model, Site.parse(row.sender), receiver, mlps == "recomputed", mode)
            assert row.patched == pytest.approx(want, abs=1e-8), (row.sender, str(receiver), mode)
    assert e["raw"].abs().max() > 1e-3


@pytest.mark.parametrize("using", ["zero", "mean"])
def test_edges_are_ablated_as_two_hooked_forwards_do(tiny, using: str) -> None:
    model = tiny("llama")
    senders = [Site("z", 0, 1), Site("attn_out", 1), Site("mlp_out", 0)]
    receivers = [Site("q", 2, 0), Site("v", 1, 0), Site("resid_post", 2)]
    for mlps in ("frozen", "recomputed"):
        e = interp.path_patch(model, PAIR, senders, receivers, mlps=mlps, using=using).frame()
        for row in e.itertuples():
            head = None if str(row.head) == "<NA>" else int(row.head)
            receiver = Site(row.component, int(row.layer), head)
            want = slow_path(model, Site.parse(row.sender), receiver, mlps == "recomputed", "noise", using)
            assert row.patched == pytest.approx(want, abs=1e-8), (row.sender, str(receiver))
        assert e["raw"].abs().min() > 0 and set(e["intervention"]) == {f"ablate {using}, path, MLPs {mlps}"}
    with pytest.raises(InterpError, match="with mode='noise' expected"):
        interp.path_patch(model, PAIR, "z.L0H1", mode="denoise", using=using)


def test_mediators_can_be_neurons_groups_and_windows(tiny) -> None:
    model = tiny("gpt2")
    groups = {"pair": ["z.L0H1", "z.L1H2"], "all": [Site("resid_pre", 0)]}
    f = interp.mediate(model, PAIR, ["mlp_post.L1N5", "mlp_out.L1"], groups=groups).frame()
    assert f["intervention"].tolist()[:4] == [
        "total effect", "natural direct effect", "natural indirect effect", "interaction",
    ]  # fmt: skip
    by = f.set_index(["component", "intervention"])["raw"]
    for mediator in ("mlp_post", "mlp_out", "pair", "all"):
        parts = [by[mediator, n] for n in ("natural direct effect", "natural indirect effect", "interaction")]
        assert by[mediator, "total effect"] == pytest.approx(sum(parts), abs=1e-12)
    assert by["all", "natural indirect effect"] == pytest.approx(by["all", "total effect"], abs=1e-9)
    wide = interp.mediate(model, PAIR, "mlp_out.L1", window=2).frame()
    grouped = interp.mediate(model, PAIR, groups={"w": ["mlp_out.L0", "mlp_out.L1"]}).frame()
    np.testing.assert_allclose(wide["raw"], grouped["raw"], atol=1e-12)


@pytest.mark.parametrize("mlps", ["frozen", "recomputed"])
def test_paths_by_full_forwards_are_the_same(tiny, mlps: str) -> None:
    model = tiny("llama")
    edges = ["z.L0H1", "mlp_out.L0", "attn_out.L1@-1"], ["q.L2H0@-1", "k.L1H1", "mlp_out.L2", "logits"]
    other = interp.PromptPair("w7 w8 w9", "w7 w8 w1", "w95", "w96")
    fast, naive = (
        interp.path_patch(model, [PAIR, other], *edges, mlps=mlps, engine=e).frame() for e in ("fast", "naive")
    )
    np.testing.assert_allclose(fast["patched"], naive["patched"], atol=1e-9)
    point = model.bridge.hook_dict["blocks.1.hook_resid_pre"]
    handle = point.add_hook(lambda x, hook: x + x.mean(1, keepdim=True))
    try:
        for e in ("auto", "naive"):
            with pytest.raises(InterpError, match="hooks were added"):
                interp.path_patch(model, PAIR, *edges, mlps=mlps, engine=e)
    finally:
        handle.hook.remove()
        point.fwd_hooks.remove(handle)


def test_all_positions_or_some(tiny) -> None:
    """A path that starts at one position and ends at another is the part of the whole that its rows carry."""
    model = tiny("llama")
    whole = interp.path_patch(model, PAIR, "z.L0H1", "q.L1H0").frame()
    last = interp.path_patch(model, PAIR, "z.L0H1@-1", "q.L1H0@-1").frame()
    nowhere = interp.path_patch(model, PAIR, "z.L0H1@3", "q.L1H0@-1").frame()  # a query reads its own row only
    before = interp.path_patch(model, PAIR, "z.L0H1@0", "q.L1H0").frame()  # where the prompts agree
    assert abs(last.loc[0, "raw"]) > 1e-6 and whole.loc[0, "raw"] != last.loc[0, "raw"]
    assert nowhere.loc[0, "raw"] == 0 and before.loc[0, "raw"] == 0
    same = interp.PromptPair("w1 w2", "w1 w2", "w95", "w96")
    assert interp.path_patch(model, same, "z.L0H1", "logits").frame().loc[0, "raw"] == 0


def test_paths_refuse_what_they_cannot_answer(tiny) -> None:
    model = tiny("llama")
    with pytest.raises(SiteError, match="cannot be a sender"):
        interp.path_patch(model, PAIR, "resid_pre.L0", "q.L2H0")
    with pytest.raises(SiteError, match="cannot be a receiver"):
        interp.path_patch(model, PAIR, "z.L0H1", "z.L2H0")
    with pytest.raises(SiteError, match="no paths"):
        interp.path_patch(model, PAIR, "z.L2H1", "q.L1H0")
    with pytest.raises(SiteError, match="are parallel: no MLP reads the heads of its own layer"):
        interp.path_patch(tiny("phi"), PAIR, "z.L1H0", "mlp_out.L1")
    with pytest.raises(SiteError, match="only resid_post of the last layer"):
        interp.path_patch(model, PAIR, "z.L0H1", "resid_post.L1")
    with pytest.raises(InterpError, match="'noise' or 'denoise'"):
        interp.path_patch(model, PAIR, "z.L0H1", mode="both")  # type: ignore[arg-type]


def test_a_residual_stream_that_is_no_plain_sum_is_refused(tiny) -> None:
    model = tiny("llama")
    runner = Engine(model)
    run = runner.record([model.coder.encode(PAIR.clean)], ("attn_out", "mlp_out"))[0]
    probe = Probe(model, runner.frame, run, 0)
    probe.check_sums()
    run.acts["mlp_out"][1] = run.acts["mlp_out"][1] * 0.5  # as if the model scaled it before adding it
    with pytest.raises(InterpError, match="normed or scaled before they are added"):
        probe.check_sums()


def test_a_path_edge_in_a_known_circuit() -> None:
    """The induction head's key reads the previous-token head; nothing else reads it, and no other head matters."""
    known = interp.zoo.induction()
    model, pairs = known.model, known.pairs(4)
    receivers = model.sites("q", layers=1) | model.sites("k", layers=1) | model.sites("v", layers=1)
    table = interp.path_patch(model, pairs, model.sites("z", layers=0), receivers).summary()
    on_path = (table["component"] == "k") & (table["head"] == INDUCTION.head) & (table["sender"] == str(PREVIOUS_TOKEN))
    assert on_path.sum() == 1 and len(table) == 3 * model.n_heads**2
    np.testing.assert_allclose(table.loc[on_path, "effect"], 1, atol=1e-4)
    np.testing.assert_allclose(table.loc[~on_path, "effect"], 0, atol=1e-4)
    logits = interp.path_patch(model, pairs, model.sites("z")).summary().set_index("sender")["effect"]
    assert logits[str(INDUCTION)] == pytest.approx(1, abs=1e-4) and logits.drop(str(INDUCTION)).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_knock_out_fast_equals_masked_scores(tiny, kind: str) -> None:
    model = tiny(kind)
    other = interp.PromptPair("w7 w8 w9", "w7 w1 w9", "w95", "w96")
    for options in (
        {"keys": 1, "queries": -1, "window": 1},
        {"keys": 1, "queries": -1, "window": 3, "heads": [0, 3]},
        {"keys": 0, "queries": 2, "window": 2},
    ):
        fast, naive = (
            interp.knock_out(model, [PAIR, other], metric="logit_diff", engine=e, **options).frame()
            for e in ("fast", "naive")
        )
        np.testing.assert_allclose(fast["patched"], naive["patched"], atol=1e-9)
        assert fast["raw"].abs().max() > 1e-4 and fast["effect"].notna().all()


@pytest.mark.parametrize("engine", ["auto", "naive"])
def test_knock_out_refuses_a_query_that_a_sliding_window_leaves_nothing(tiny, engine) -> None:
    model = tiny("mistral")  # every layer sees the query's own token and four before it
    pair = interp.PromptPair("w1 w2 w3 w4 w5 w6 w7 w8", "w1 w2 w9 w4 w5 w6 w7 w8", "w95", "w96")
    last = len(model.coder.encode(pair.clean)) - 1
    options: dict[str, Any] = {"layers": [0, 1], "window": 1, "metric": "logit_diff", "engine": engine}
    assert last == 8  # <bos> stands first
    words = {n: dataclasses.replace(pair, spans={"cut": (3 * n - 3, len(pair.clean))}) for n in (4, 5)}
    with pytest.raises(PromptError, match=f"query at token {last} .* nothing to read in layer 0, which shows"):
        interp.knock_out(model, words[4], "cut", -1, **options)
    left = interp.knock_out(model, words[5], "cut", -1, **options).frame()["raw"]
    assert (left.abs() > 1e-4).all()


def test_knock_out_of_a_fact_and_its_spans(tiny) -> None:
    model = tiny("llama")
    fact = interp.Fact("w1 w2 w3 w4", "w2 w3", "w95")
    e = interp.knock_out(model, fact, "subject", layers=[0, 1], window=3).frame()
    assert len(e) == 2 and e["effect"].isna().all() and e["raw"].abs().min() > 0
    assert set(e["position"]) == {-1} and set(e["token"]) == {"w4"}  # the last token, in a prompt of any length
    with pytest.raises(PromptError, match="nothing to read"):
        interp.knock_out(model, fact, 0, 0)
    with pytest.raises(PromptError, match="not both in one call"):
        interp.knock_out(model, [fact, PAIR], 1)
    with pytest.raises(InterpError, match="window"):
        interp.knock_out(model, fact, 1, window=0)


def test_cutting_nothing_that_is_read_changes_nothing(tiny) -> None:
    """Placebo: keys that stand after the query are not read anyway."""
    e = interp.knock_out(tiny("llama"), PAIR, 4, 2, window=3).frame()
    np.testing.assert_allclose(e["raw"], 0, atol=1e-12)


def test_mediation_adds_up_and_equals_patching(tiny) -> None:
    model = tiny("llama")
    sites = model.sites("z", layers=1) | model.sites("mlp_out", layers=0, positions="all")
    f = interp.mediate(model, PAIR, sites).frame()
    by = {name: part.reset_index(drop=True) for name, part in f.groupby("intervention")}
    total, direct, indirect, crossed = (
        by[n]["raw"] for n in ("total effect", "natural direct effect", "natural indirect effect", "interaction")
    )
    np.testing.assert_allclose(total, direct + indirect + crossed, atol=1e-12)
    np.testing.assert_allclose(by["total effect"]["effect"], 1, atol=1e-12)
    noised = interp.patch(model, PAIR, sites, mode="noise").frame().sort_values(["component", "layer", "head"])
    np.testing.assert_allclose(np.sort(indirect), np.sort(noised["raw"]), atol=1e-12)
    everything = interp.mediate(model, PAIR, Site("resid_pre", 1, position=None)).frame().set_index("intervention")
    assert everything.loc["natural indirect effect", "effect"] == pytest.approx(1, abs=1e-9)
    assert everything.loc["natural direct effect", "effect"] == pytest.approx(0, abs=1e-9)


def test_steering_adds_and_equals_naive(tiny) -> None:
    model = tiny("llama")
    direction = torch.linspace(-1, 1, model.d_model, dtype=torch.float64)
    sites = model.sites("resid_pre", positions=[1, -1]) | model.sites("mlp_out", layers=1, positions="all")
    fast, naive = (interp.steer(model, PAIR, sites, direction, 3.0, engine=e).frame() for e in ("fast", "naive"))
    np.testing.assert_allclose(fast["patched"], naive["patched"], atol=1e-9)
    assert fast["raw"].abs().min() > 0
    nothing = interp.steer(model, PAIR, sites, direction, 0.0).frame()
    np.testing.assert_allclose(nothing["raw"], 0, atol=1e-12)
    with pytest.raises(SiteError, match="has width"):
        interp.steer(model, PAIR, sites, direction[:3])


def test_steering_by_the_difference_of_two_prompts_is_patching(tiny) -> None:
    model = tiny("llama")
    site = Site("resid_pre", 1, position=-1)
    direction = interp.mean_difference(model, [PAIR.corrupt], [PAIR.clean], site)
    steered = interp.steer(model, PAIR, site, direction).frame()["patched"]
    np.testing.assert_allclose(steered, interp.patch(model, PAIR, site, mode="noise").frame()["patched"], atol=1e-9)
    whole = interp.mean_difference(model, ["w1 w2", "w3"], ["w1 w2", "w3"], "resid_pre.L1")
    assert whole.shape == (model.d_model,) and whole.abs().max() == 0
    with pytest.raises(PromptError, match="negative texts expected"):
        interp.mean_difference(model, ["w1"], [], site)


def test_leaving_a_span_out_is_the_shorter_prompt(tiny) -> None:
    model = tiny("llama")
    pair = PAIR.span("name", "w2 w3").span("end", "w5")
    f = interp.leave_out(model, pair, metric="logit_diff").frame().set_index("role")
    short = interp.PromptPair("w1 w4 w5", "w1 w4 w5", "w95", "w96")
    want = interp.patch(model, short, "resid_pre.L0@0").frame()["clean"][0]
    assert f.loc["name", "patched"] == pytest.approx(want, abs=1e-4) and set(f.index) == {"name", "end"}
    other = interp.leave_out(model, pair, ["name"], instead={"name": " w9 w3"}, metric="logit_diff").frame()
    swapped = interp.PromptPair("w1 w9 w3 w4 w5", "w1 w9 w3 w4 w5", "w95", "w96")
    want = interp.patch(model, swapped, "resid_pre.L0@0").frame()["clean"][0]
    assert other["patched"][0] == pytest.approx(want, abs=1e-4)
    with pytest.raises(PromptError, match="not left out: 'verb'"):
        interp.leave_out(model, pair, instead={"verb": " w9"})
    with pytest.raises(PromptError, match="more than 64"):
        interp.leave_out(model, pair, instead={"name": " w9" * 500})
    with pytest.raises(PromptError, match="no span 'verb'"):
        interp.leave_out(model, pair, ["verb"])
    with pytest.raises(PromptError, match="no prompt has a named span"):
        interp.leave_out(model, PAIR)
