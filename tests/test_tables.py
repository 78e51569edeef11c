"""What a table of effects may average: never examples, positions, models or pairs that do not belong together."""

from __future__ import annotations

import logging

import numpy as np
import pandas as pd
import pytest
import torch

import interp
from interp.doctor.families.text import tiny_hf
from interp.plots.panels import split
from interp.plots.payload import decode_effects, encode_effects
from interp.results.effects import ADDED, COLUMNS, Effects
from interp.utils.damage import Budget

WORDS = [f"w{i}" for i in range(10, 60)]


def pairs(lengths: list[int], seed: int = 0) -> list[interp.PromptPair]:
    """Pairs of random words whose third word from the end differs, of the given lengths."""
    rng = np.random.default_rng(seed)
    out = []
    for n in lengths:
        clean = list(rng.choice(WORDS, n))
        corrupt = [*clean[:-3], f"w{60 + n % 30}", *clean[-2:]]
        out.append(interp.PromptPair(" ".join(clean), " ".join(corrupt), "w95", "w96"))
    return out


ROUNDING = 5e-5  # of a mean of recoveries in float32, where the smallest gap is 0.01
UNEQUAL = pairs([4, 5, 6, 7] * 3)


def recoveries_by_hooks(prompts: list[interp.PromptPair], layer: int, model: interp.Model) -> list[float]:
    """Recovery of the stream that enters a layer at the last token, by hooks on an untouched Hugging Face model."""
    hf = tiny_hf("llama").eval()
    block, out = hf.model.layers[layer], []
    for pair in prompts:
        ids = [torch.tensor([model.coder.encode(text)]) for text in (pair.clean, pair.corrupt)]
        answer, foil = (model.tokenizer.convert_tokens_to_ids(t) for t in (pair.answer, pair.foil))
        kept: list[torch.Tensor] = []

        def keep(module, args, kwargs, kept=kept):
            kept.append((args[0] if args else kwargs["hidden_states"]).clone())

        def write(module, args, kwargs, kept=kept):
            hidden = (args[0] if args else kwargs["hidden_states"]).clone()
            hidden[0, -1] = kept[0][0, -1]
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        scores = []
        for hook, tokens in ((keep, ids[0]), (None, ids[1]), (write, ids[1])):
            handle = block.register_forward_pre_hook(hook, with_kwargs=True) if hook else None
            with torch.no_grad():
                logits = hf(tokens).logits[0, -1]
            scores.append(float(logits[answer] - logits[foil]))
            if handle:
                handle.remove()
        clean, corrupt, patched = scores
        out.append((patched - corrupt) / (clean - corrupt))
    return out


# ---------------------------------------------------------------- positions


def test_a_relative_position_is_one_address_in_prompts_of_any_length(tiny) -> None:
    model = tiny("llama")
    effects = interp.patch(model, UNEQUAL, model.sites("resid_pre", positions=-1))
    summary = effects.summary()
    assert len(summary) == model.n_layers and set(summary["n"]) == {len(UNEQUAL)} and set(summary["position"]) == {-1}
    for layer in range(model.n_layers):
        expected = recoveries_by_hooks(UNEQUAL, layer, model)
        row = summary[summary["layer"] == layer].iloc[0]
        assert row["effect"] == pytest.approx(np.mean(expected), abs=ROUNDING)
    frame = effects.frame()
    assert list(frame["token"][frame["layer"] == 0]) == [p.clean.split()[-1] for p in UNEQUAL]


def test_groups_and_knocked_out_queries_at_the_end_are_one_address(tiny) -> None:
    model = tiny("llama")
    group = interp.patch(model, UNEQUAL, groups={"ends": ["z.L0H0@-1", "z.L1H1@-1"]}).summary()
    assert len(group) == 1 and group["n"][0] == len(UNEQUAL) and group["position"][0] == -1
    cut = interp.knock_out(model, UNEQUAL, 1, metric="logit_diff").summary()
    assert len(cut) == model.n_layers and set(cut["n"]) == {len(UNEQUAL)}
    ranked = interp.circuits.atp_star(model, UNEQUAL, model.sites("resid_pre", positions=-1))
    assert len(ranked) == model.n_layers  # estimates are filed under the same address


def test_a_relative_position_survives_page_and_file(tiny, tmp_path) -> None:
    model = tiny("llama")
    effects = interp.patch(model, UNEQUAL, model.sites("resid_pre", positions=[0, -2, -1]))
    (panel,) = split(effects)
    assert panel.columns.values == [0, -2, -1] and not panel.note
    assert set(panel.cells(panel.variants[0])["n"].ravel()) == {12}
    pd.testing.assert_frame_equal(Effects.read(effects.write(tmp_path / "e.parquet")).frame(), effects.frame())
    back = decode_effects(encode_effects(effects, effects.provenance), Budget("page", 2**20, 64))
    pd.testing.assert_frame_equal(back.frame(), effects.frame())
    interp.report(effects).write(tmp_path / "page.html")


def test_a_file_without_the_newer_columns_is_read(tiny, tmp_path) -> None:
    model = tiny("llama")
    effects = interp.patch(model, UNEQUAL[:2], model.sites("z"))
    file = effects.write(tmp_path / "e.parquet")
    import pyarrow.parquet as pq

    pq.write_table(pq.read_table(file).drop_columns(list(ADDED)), file)
    old = Effects.read(file)
    assert list(old.frame().columns) == list(COLUMNS)
    pd.testing.assert_frame_equal(old.summary(), effects.summary())


def test_sweeps_over_unequal_prompts_are_aligned_at_the_last_token(tiny) -> None:
    model = tiny("llama")
    effects = interp.patch(model, UNEQUAL, model.sites("resid_pre"))
    frame = effects.frame()
    length = frame.groupby("example")["position"].transform("max") + 1
    by_hand = frame.assign(position=frame["position"] - length).groupby(["layer", "position"])["effect"].mean()
    summary = effects.summary().set_index(["layer", "position"])["effect"]
    pd.testing.assert_series_equal(summary.sort_index(), by_hand.sort_index(), check_index_type=False)
    last = effects.summary().query("position == -1")
    assert set(last["n"]) == {len(UNEQUAL)}
    row = last[last["layer"] == 1].iloc[0]
    assert row["effect"] == pytest.approx(np.mean(recoveries_by_hooks(UNEQUAL, 1, model)), abs=ROUNDING)
    some = effects.where(layer=1).summary()  # a part is aligned as the whole
    pd.testing.assert_frame_equal(
        some[["position", "effect", "n"]].sort_values("position", ignore_index=True),
        effects.summary().query("layer == 1")[["position", "effect", "n"]].sort_values("position", ignore_index=True),
    )
    (panel,) = split(effects)
    assert panel.columns.values == list(range(-8, 0)) and "aligned at the last one" in panel.note
    one = panel.at_example(0)  # of one example, positions are its own
    assert one.columns.values == list(range(5)) and np.isfinite(one.cells(one.variants[0])["raw"]).all()


def test_prompts_of_one_length_and_chosen_positions_are_left_as_they_are(tiny) -> None:
    model = tiny("llama")
    equal = interp.patch(model, pairs([5, 5, 5]), model.sites("resid_pre"))
    assert set(equal.summary()["position"]) == set(range(6)) and split(equal)[0].note == ""
    chosen = interp.patch(model, UNEQUAL, model.sites("resid_pre", positions=[0, 1, 2]))
    assert set(chosen.summary()["position"]) == {0, 1, 2}  # as asked for


# ---------------------------------------------------------------- counts and intervals


def test_a_row_of_one_example_has_no_interval_beside_rows_of_more() -> None:
    values = np.array([[0.1, 0.9], [0.3, np.nan], [0.2, np.nan]])
    summary = table(values).summary().set_index("head")
    assert summary.loc[1, "n"] == 1 and summary.loc[1, "effect"] == 0.9
    for end in ("lo", "hi", "raw_lo", "raw_hi", "pooled_lo", "pooled_hi"):
        assert np.isnan(summary.loc[1, end]) and np.isfinite(summary.loc[0, end])
    (panel,) = split(table(values))
    cells = panel.cells(panel.variants[0])
    assert np.isnan(cells["lo"][0, 0, 1]) and np.isfinite(cells["lo"][0, 0, 0])


def test_n_counts_examples_with_a_recovery() -> None:
    frame = table(np.ones((4, 1))).frame()
    frame.loc[0, ["corrupt", "effect"]] = [2.0, np.nan]
    row = Effects(frame).summary().iloc[0]
    assert row["n"] == 3 and row["n_raw"] == 4


def table(values: np.ndarray, gap: np.ndarray | float = 2.0, **provenance) -> Effects:
    """values [example, head] as recoveries of z patches; NaN leaves the row out."""
    gaps = np.broadcast_to(gap, len(values))
    rows = [
        {"example": i, "component": "z", "layer": 0, "head": h, "position": None, "token": "", "role": "",
         "intervention": "patch", "mode": "denoise", "metric": "logit_diff", "clean": gaps[i], "corrupt": 0.0,
         "patched": x * gaps[i], "effect": x, "raw": x * gaps[i]}
        for i, row in enumerate(values) for h, x in enumerate(row) if np.isfinite(x)
    ]  # fmt: skip
    return Effects(pd.DataFrame(rows), {"model": "toy", **provenance})


# ---------------------------------------------------------------- joined tables


def test_two_halves_are_as_the_whole(tiny) -> None:
    model, prompts = tiny("llama"), pairs([4, 5] * 8)
    sites = model.sites("z")
    whole = interp.patch(model, prompts, sites)
    halves = Effects.concat([interp.patch(model, part, sites) for part in (prompts[:8], prompts[8:])])
    assert set(halves.summary()["n"]) == {16}
    pd.testing.assert_frame_equal(halves.summary(), whole.summary(), rtol=1e-9)
    overlapping = Effects.concat([interp.patch(model, part, sites) for part in (prompts[:10], prompts[4:])])
    pd.testing.assert_frame_equal(overlapping.summary(), whole.summary(), rtol=1e-9)
    twice = interp.patch(model, [prompts[0], prompts[0]], sites)
    assert twice.frame()["example"].nunique() == Effects.concat([twice, twice]).frame()["example"].nunique() == 2


def test_parts_on_the_same_prompts_keep_their_numbers(tiny) -> None:
    model = tiny("llama")
    parts = [interp.patch(model, UNEQUAL, model.sites("z", layers=layer)) for layer in (0, 1)]
    joined = Effects.concat(parts)
    assert list(joined.frame()["example"]) == [e for p in parts for e in p.frame()["example"]]
    reordered = Effects.concat([parts[0], interp.patch(model, UNEQUAL[::-1], model.sites("z", layers=1))]).frame()
    assert reordered.groupby("example")["prompt"].nunique().eq(1).all()


def test_two_models_or_tasks_are_never_averaged(tiny) -> None:
    llama, gpt2 = tiny("llama"), tiny("gpt2")
    parts = [interp.patch(m, UNEQUAL, m.sites("attn_out", positions=-1)) for m in (llama, gpt2)]
    joined = Effects.concat(parts)
    for by in (None, ["layer"]):
        summary = joined.summary(by=by)
        assert set(summary["model"]) == {llama.name, gpt2.name} and set(summary["n"]) == {len(UNEQUAL)}
    of_one = joined.where(model=llama.name).summary()
    np.testing.assert_allclose(of_one["effect"], parts[0].summary()["effect"])
    (panel,) = split(joined)
    assert [v.model for v in panel.variants] == [llama.name, gpt2.name]
    with pytest.raises(interp.InterpError, match="several values of model"):
        from interp.plots import heatmap

        heatmap(joined)
    with pytest.raises(interp.InterpError, match=r"one report is about one model.*effects\.where\(model=…\)"):
        interp.report(joined)
    assert interp.report(joined.where(model=gpt2.name)).html
    tasks = Effects.concat([table(np.full((3, 1), x), task=t, prompts=t) for x, t in ((0.2, "ioi"), (0.8, "capitals"))])
    assert sorted(tasks.summary()["effect"]) == pytest.approx([0.2, 0.8])
    assert sorted(tasks.summary(by="layer")["effect"]) == pytest.approx([0.2, 0.8])


def test_one_name_with_other_weights_is_another_model() -> None:
    parts = [table(np.full((2, 1), x), weights=w, prompts="p") for x, w in ((0.2, "aaaa"), (0.8, "bbbb"))]
    joined = Effects.concat(parts)
    assert set(joined.summary()["model"]) == {"toy (weights aaaa)", "toy (weights bbbb)"}
    again = Effects.concat([joined, table(np.full((2, 1), 0.5), weights="aaaa", prompts="p")])
    assert len(again.summary()) >= 2  # joining a joined table averages no two models either


def test_modes_and_metrics_are_kept_apart_when_grouped() -> None:
    frame = table(np.full((3, 1), 0.5)).frame()
    both = Effects(pd.concat([frame, frame.assign(mode="noise", raw=-frame["raw"])]))
    assert set(both.summary(by="layer")["mode"]) == {"denoise", "noise"} and len(both.summary(by="layer")) == 2


# ---------------------------------------------------------------- pairs without a gap


def small() -> Effects:
    """Half of the pairs at a gap of 0.03 to 0.33 beside 14: head 1 moves only these, by noise."""
    gap = np.array([14.0] * 8 + list(np.linspace(0.03, 0.33, 8)))
    strong = np.full(16, 0.5)
    noise = np.where(gap > 1, 0.0, 0.4 / gap)  # the same small change of the metric everywhere
    return table(np.stack([strong, noise], 1), gap)


def test_pairs_with_almost_no_gap_do_not_rule_the_ranking() -> None:
    effects = small()
    gaps = effects.small_gaps()
    assert (gaps.n, gaps.n_pairs) == (8, 16) and gaps.least == pytest.approx(0.03) and gaps.most == pytest.approx(0.33)
    summary = effects.summary()
    assert summary["head"][0] == 0 and summary.set_index("head").loc[1, "effect"] > 1  # the mean is theirs
    assert split(effects)[0].variants[0].default_value == "pooled"
    data = encode_effects(effects, {})["panels"][0]["variants"][0]
    assert data["value"] == "pooled" and "8 of 16 pairs have almost no difference" in data["caution"]
    assert not table(np.ones((4, 2)), np.array([1.0, 2.0, 3.0, 0.5])).small_gaps()  # ordinary spread is no reason


def test_pairs_with_almost_no_gap_are_told(tiny, caplog, monkeypatch) -> None:
    model = tiny("llama")

    def odd(logits, read):  # a metric that hardly sees the difference on every other pair
        scores = logits[:, 3] - logits[:, 4]
        return scores * torch.where(read.answer % 2 == 0, 1.0, 1e-3).to(scores)

    prompts = [interp.PromptPair(p.clean, p.corrupt, f"w{90 + i % 2}", "w96") for i, p in enumerate(UNEQUAL)]
    monkeypatch.setattr(logging.getLogger("interp"), "propagate", True)
    with caplog.at_level("WARNING", logger="interp"):
        interp.patch(model, prompts, "z.L0H0", metric=odd)
    assert "6 of 12 pairs have almost no difference in odd between clean and corrupt" in caplog.text


def test_parts_with_other_settings_are_told(tiny, caplog, monkeypatch) -> None:
    """A noise level, a seed or a direction has no column, so that its rows would be averaged in silence."""
    model, facts = tiny("llama"), [interp.Fact("w1 w2 w3 w4", "w2 w3", "w15")]
    monkeypatch.setattr(logging.getLogger("interp"), "propagate", True)
    traces = [interp.trace(model, facts, samples=1, noise=noise) for noise in (1.0, 3.0)]
    Effects.concat(traces)
    assert "15 of 15 joined effects have the same address" in caplog.text
    assert "differ in corruption, noise," in caplog.text
    caplog.clear()
    directions = [torch.ones(model.d_model), torch.ones(model.d_model)]
    directions[1][0] = -1  # as long as the other
    Effects.concat([interp.steer(model, UNEQUAL[:2], "resid_post.L1@-1", d) for d in directions])
    assert "differ in direction," in caplog.text
    caplog.clear()
    sites = model.sites("z", layers=0)
    Effects.concat([interp.patch(model, part, sites) for part in (UNEQUAL[:8], UNEQUAL[4:])])
    Effects.concat([interp.ablate(model, UNEQUAL[:2], sites, using=using) for using in ("zero", "mean")])
    assert "same address" not in caplog.text


def test_rows_are_chosen_by_any_kind_of_number() -> None:
    effects = table(np.ones((2, 3)))
    for value in (1, np.int64(1), torch.tensor(1), np.array(1), [torch.tensor(1)], torch.tensor([1])):
        assert len(effects.where(head=value)) == 2


def test_only_effects_are_joined() -> None:
    for wrong in (None, ["x"], [table(np.ones((1, 1))).frame()]):
        with pytest.raises(interp.InterpError, match="a list of Effects is expected"):
            Effects.concat(wrong)  # type: ignore[arg-type]
    assert len(Effects.concat(table(np.ones((2, 1))))) == 2  # type: ignore[arg-type]
