"""Patching role for role between prompts of different lengths, against hooks on untouched Hugging Face models."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pandas as pd
import pytest
import torch
from pictured import cut

import interp
from interp.doctor.families.text import tiny_hf
from interp.errors import InterpError, PromptError
from interp.prompts.files import read_prompts

PAIR = (
    interp.PromptPair("w1 w2 w3 w4 w5", "w1 w7 w4 w8 w9 w10 w5", "w6", "w11")
    .span("who", "w2 w3", corrupt="w7")
    .span("what", "w4", corrupt="w8 w9 w10")
)
SPANS = {"who": ((2, 4), (2, 3)), "what": ((4, 5), (4, 7))}  # tokens of the clean and the corrupt prompt, after <bos>
POSITIONS = ["who", "who:last", "what", "what:first", "what:last"]


def rows(position: str, side: int) -> slice:
    name, _, end = position.partition(":")
    start, stop = SPANS[name][side]
    return slice(start, stop) if not end else slice(start, start + 1) if end == "first" else slice(stop - 1, stop)


def by_hand(kind: str, model: interp.Model, component: str, layer: int, position: str, mode: str) -> float:
    """The logit difference of a run whose span gets the mean of the other run's span, by hooks alone."""
    hf = tiny_hf(kind)
    block = hf.transformer.h[layer] if kind == "gpt2" else hf.model.layers[layer]
    module = block if component == "resid_post" else block.attn if kind == "gpt2" else block.self_attn
    prompts = [PAIR.clean, PAIR.corrupt] if mode == "denoise" else [PAIR.corrupt, PAIR.clean]
    sides = (0, 1) if mode == "denoise" else (1, 0)
    source, target = (torch.tensor([model.coder.encode(text)]) for text in prompts)
    kept: list[torch.Tensor] = []

    def keep(_module, _args, out):
        kept.append((out[0] if isinstance(out, tuple) else out)[0, rows(position, sides[0])].mean(0))

    def put(_module, _args, out):
        changed = (out[0] if isinstance(out, tuple) else out).clone()
        changed[0, rows(position, sides[1])] = kept[0]
        return (changed, *out[1:]) if isinstance(out, tuple) else changed

    with torch.no_grad():
        for ids, hook in ((source, keep), (target, put)):
            handle = module.register_forward_hook(hook)
            logits = hf(ids).logits[0, -1]
            handle.remove()
    answer, foil = (model.coder.continuation(w)[0] for w in ("w6", "w11"))
    return (logits[answer] - logits[foil]).item()


@pytest.mark.parametrize("mode", ["denoise", "noise"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_spans_are_patched_as_by_hooks_on_an_untouched_model(tiny, kind: str, mode: str) -> None:
    model = tiny(kind)
    sites = [f"{c}.L{i}@{p}" for c in ("resid_post", "attn_out") for i in (0, 1) for p in POSITIONS]
    effects = interp.patch(model, PAIR, sites, mode=mode, align="span")  # type: ignore[arg-type]
    frame = effects.frame()
    for row in frame.to_dict("records"):
        want = by_hand(kind, model, row["component"], row["layer"], row["role"], mode)
        assert row["patched"] == pytest.approx(want, abs=1e-5), row
    naive = interp.patch(model, PAIR, sites, mode=mode, align="span", engine="naive")  # type: ignore[arg-type]
    pd.testing.assert_frame_equal(frame, naive.frame(), rtol=1e-6, atol=1e-8)
    assert (
        effects.provenance["engine"].startswith("packed")
        and "mean over the source's span" in effects.provenance["align"]
    )
    assert not frame["effect"].isna().any() and len(set(frame["patched"])) > 10


def test_every_component_is_the_same_packed_and_naive(tiny) -> None:
    model = tiny("llama")
    sites = [s for c in ("z", "q", "k", "v", "resid_mid", "mlp_out") for s in model.sites(c, layers=1, positions="who")]
    sites += list(model.sites("mlp_post", layers=1, heads=[0, 5], positions="what"))
    pairs, groups = [PAIR, PAIR], {"two": ["z.L0H1@who", "z.L1H2@what:last"]}
    options: dict[str, Any] = {"groups": groups, "align": "span"}
    packed = interp.patch(model, pairs, sites, **options).frame()
    naive = interp.patch(model, pairs, sites, engine="naive", **options).frame()
    pd.testing.assert_frame_equal(packed, naive, rtol=1e-6, atol=1e-8)


def test_sources_and_mediation(tiny) -> None:
    model = tiny("llama")
    other = interp.PromptPair("w9 w8 w8 w8 w2 w5", "w9 w5", "w6").span("who", "w8 w8 w8", corrupt="w9")
    from_other = interp.patch(model, PAIR, ["resid_post.L1@who"], sources=other, align="span").frame()
    state = model.run_with_cache(torch.tensor([model.coder.encode(other.clean)]))[1]["blocks.1.hook_resid_post"]
    with model.bridge.hooks(fwd_hooks=[
        ("blocks.1.hook_resid_post", lambda x, hook: torch.cat([x[:, :2], state[:, 2:5].mean(1, True), x[:, 3:]], 1))
    ]):  # fmt: skip
        logits = model(torch.tensor([model.coder.encode(PAIR.corrupt)]))[0, -1]
    answer, foil = (model.coder.continuation(w)[0] for w in ("w6", "w11"))
    assert from_other["patched"].item() == pytest.approx((logits[answer] - logits[foil]).item(), abs=1e-6)
    effects = interp.mediate(model, PAIR, ["z.L0H1@who"], align="span").frame().set_index("intervention")
    noised = interp.patch(model, PAIR, ["z.L0H1@who"], mode="noise", align="span").frame()
    assert effects.loc["natural indirect effect", "patched"] == noised["patched"].item()


def test_what_has_no_common_position_is_refused(tiny) -> None:
    model = tiny("llama")
    with pytest.raises(PromptError, match=r"different lengths .* or patch named spans with align='span'"):
        interp.patch(model, PAIR, ["resid_pre.L0@who"])
    for positions in ("each", "all", -1, 2):
        with pytest.raises(PromptError, match="compares named spans of two prompts"):
            interp.patch(model, PAIR, model.sites("resid_pre", positions=positions), align="span")
    with pytest.raises(InterpError, match="positions do not correspond: leave at="):
        interp.patch(model, PAIR, ["resid_pre.L0@who"], align="span", at="each")
    unnamed = interp.PromptPair("w1 w2", "w1 w2 w3", "w5", "w6").span("s", "w2")
    with pytest.raises(PromptError, match=r"the corrupt prompt: .*span 's'.*corrupt=words"):
        interp.patch(model, unnamed, ["resid_pre.L0@s"], align="span")
    with pytest.raises(PromptError, match=r"the clean prompt: .*span 't'"):
        interp.patch(model, PAIR, ["resid_pre.L0@t"], align="span", mode="noise")
    with pytest.raises(InterpError, match="align='spans'"):
        interp.patch(model, PAIR, ["resid_pre.L0@who"], align="spans")  # type: ignore[arg-type]
    with pytest.raises(PromptError, match="'w3'"):
        interp.PromptPair("w1", "w2", "w5").span("s", "w1", corrupt="w3")


def test_spans_of_the_corrupt_prompt_in_files_and_ids(tiny, tmp_path) -> None:
    pairs = interp.PairSet([PAIR])
    frame = pairs.frame()
    assert frame["corrupt_span:what"].tolist() == ["w8 w9 w10"]
    frame.to_csv(tmp_path / "pairs.csv", index=False)
    assert list(interp.PairSet.from_frame(frame)) == [PAIR] == read_prompts(tmp_path / "pairs.csv")
    model = tiny("llama")
    encode = model.coder.encode
    (answer,), (foil,) = encode("w6")[1:], encode("w11")[1:]
    ids = interp.PromptPair(
        encode(PAIR.clean),
        encode(PAIR.corrupt),
        answer,
        foil,
        {"who": (2, 4)},
        {"who": (2, 3)},  # type: ignore[arg-type]
    )
    one, two = (interp.patch(model, p, ["z.L1H1@who"], align="span").frame()["patched"].item() for p in (PAIR, ids))
    assert one == two


@pytest.mark.parametrize("change", [
    interp.AttentionEdit(queries=-1, keys="what", knockout=True), interp.AttentionMask(close=[(-1, "what")]),
])  # fmt: skip
def test_edits_of_a_block_name_each_prompts_own_spans(tiny, change: Any) -> None:
    model, hf = tiny("llama"), tiny_hf("llama")
    hf.set_attn_implementation("eager")
    answer, foil = (model.coder.continuation(w)[0] for w in ("w6", "w11"))
    with model.edited(change):
        for engine in ("auto", "naive"):
            options: Any = {"align": "span", "engine": engine, "show_progress": False}
            frame = interp.patch(model, PAIR, ["resid_pre.L1@who"], metric="logit_diff", **options).frame()
            for side, name in enumerate(("clean", "corrupt")):
                ids = torch.tensor([model.coder.encode(getattr(PAIR, name))])
                with torch.no_grad(), ExitStack() as stack:
                    for block in hf.model.layers:
                        stack.enter_context(cut(block, slice(-1, None), slice(*SPANS["what"][side])))
                    logits = hf(ids).logits[0, -1]
                assert frame[name].item() == pytest.approx((logits[answer] - logits[foil]).item(), abs=1e-5)


def test_the_hash_of_pairs_does_not_depend_on_empty_spans_of_the_corrupt_prompt(tiny) -> None:
    model = tiny("llama")
    pairs = [interp.PromptPair("w1 w2 w3", "w1 w9 w3", "w6", "w11", {"who": (0, 5)}, {}),
             interp.PromptPair("w1 w2 w3", "w1 w9 w3", "w6", "w11", {"who": (0, 5)})]  # fmt: skip
    spanned = interp.PromptPair("w1 w2 w3", "w1 w9 w3", "w6", "w11", {"who": (0, 5)}, {"who": (0, 5)})
    hashes = [interp.patch(model, p, "z.L1H0").provenance["prompts"] for p in (*pairs, spanned)]
    assert hashes[0] == hashes[1] == "1ec48c64a58cf068" != hashes[2]  # as before pairs had them


def test_a_sweep_patches_span_by_span(tiny, tmp_path) -> None:
    model, file = tiny("llama"), tmp_path / "mine.csv"
    interp.PairSet([PAIR, PAIR]).frame().to_csv(file, index=False)
    document = {
        "name": "spans", "models": [{"name": "tiny", "load": "tiny"}], "sites": [{"sites": "resid_pre@who"}],
        "tasks": [{"name": "own", "pairs": str(file), "require": 0}],
        "recipes": [{"recipe": "patch", "align": "span"}, {"recipe": "mediate", "align": "span"}],
    }  # fmt: skip
    sweep = interp.Sweep(document, tmp_path / "run", models={"tiny": model})
    assert sweep.run().failed == 0
    patched, mediated = sweep.effects().values()
    want = interp.patch(model, [PAIR, PAIR], model.sites("resid_pre", positions="who"), align="span").frame()
    got = patched.frame()
    assert got["patched"].tolist() == pytest.approx(want["patched"].tolist(), abs=1e-5)
    assert "mean over the source's span" in patched.provenance["align"] and len(mediated.frame()) == 4 * len(got)
