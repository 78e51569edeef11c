"""Causal tracing's own parts; recipes on known circuits are in tests/zoo."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import interp
from interp.prompts.pairs import encode_facts
from interp.recipes.corruption import subject_noise, subject_std
from interp.recipes.targets import window_layers

FACTS = [interp.Fact("w1 w2 w3 w4", "w2 w3", "w95"), interp.Fact("w7 w8 w9 w1", "w8", "w90")]


@pytest.mark.parametrize(
    ("layer", "window", "n", "expected"),
    [
        (5, 1, 12, [5]),
        (5, 10, 12, [*range(10)]),
        (11, 10, 12, [*range(6, 12)]),
        (0, 10, 12, [*range(5)]),
        (3, 3, 12, [2, 3, 4]),
    ],
)
def test_windows_are_centred_and_clipped_as_published(layer: int, window: int, n: int, expected: list[int]) -> None:
    assert list(window_layers(layer, window, n)) == expected


def test_noise_falls_on_the_subject_with_the_asked_spread_and_follows_the_seed(tiny) -> None:
    model = tiny("llama")
    (prompt, _) = encode_facts(FACTS, model.coder)
    start, stop = prompt.spans["subject"]
    draws = torch.stack([subject_noise(model, prompt, 0.7, seed=0, example=0, sample=s) for s in range(400)])
    assert draws[:, :start].abs().sum() == 0 and draws[:, stop:].abs().sum() == 0
    assert draws[:, start:stop].std().item() == pytest.approx(0.7, rel=0.02)
    assert torch.equal(draws[3], subject_noise(model, prompt, 0.7, 0, 0, 3))
    assert not torch.equal(draws[3], subject_noise(model, prompt, 0.7, 1, 0, 3))
    assert not torch.equal(draws[3], subject_noise(model, prompt, 0.7, 0, 1, 3))


def test_sigma_is_the_spread_of_subject_embeddings(tiny) -> None:
    model = tiny("llama")
    prompts = encode_facts([*FACTS, FACTS[0]], model.coder)
    ids = [i for p in prompts for i in p.clean[slice(*p.spans["subject"])]]  # as published: as often as they occur
    table = model.bridge.original_model.get_input_embeddings().original_component.weight
    assert subject_std(model, prompts) == pytest.approx(table[ids].float().std().item())


def by_hand(hf: Any, ids: torch.Tensor) -> tuple[torch.Tensor, Any, float]:
    """What enters an untouched model's blocks where noise is added, the module that gives it, and its later factor."""
    base = getattr(hf, "model", None) or hf.transformer
    if hasattr(base, "word_embeddings_layernorm"):  # BLOOM
        return base.word_embeddings_layernorm(base.word_embeddings(ids)), base.word_embeddings_layernorm, 1.0
    embed = hf.get_input_embeddings()
    factor = float(getattr(hf.config, "embedding_multiplier", 1.0))
    if hf.config.model_type == "granite":  # noise is added behind the multiplier
        return embed(ids) * factor, embed, factor
    return embed(ids), embed, 1.0


@pytest.mark.parametrize("family", ["granite", "gemma", "gemma2", "gemma3", "bloom", "falcon_h1", "cohere", "gpt2"])
def test_sigma_is_measured_where_the_noise_is_added(family: str) -> None:
    """Against hooks on the untouched model: σ, and the corrupted scores that follow from it."""
    from interp.doctor.families.text import tiny_hf
    from interp.doctor.matrix import WORDS
    from interp.zoo.tokenizer import word_tokenizer

    model = interp.load(tiny_hf(family, torch.float32), tokenizer=word_tokenizer(WORDS))
    hf = tiny_hf(family, torch.float32)
    effects = interp.trace(model, FACTS, positions="subject", layers=1, samples=2, metric="logprob")
    prompts = encode_facts(FACTS, model.coder)
    with torch.no_grad():
        embedded = [by_hand(hf, torch.tensor([p.clean])) for p in prompts]
        subjects = torch.cat([x[0][slice(*p.spans["subject"])] for (x, _, _), p in zip(embedded, prompts, strict=True)])
        sigma = float(subjects.std())
        assert effects.provenance["sigma"] == pytest.approx(sigma, rel=1e-5)
        for i, (prompt, (_, module, factor)) in enumerate(zip(prompts, embedded, strict=True)):
            scores = []
            for sample in range(2):
                noise = subject_noise(model, prompt, 3.0 * sigma, 0, i, sample) / factor
                handle = module.register_forward_hook(lambda _m, _args, out, noise=noise: out + noise)
                scores.append(float(hf(torch.tensor([prompt.clean])).logits[0, -1].log_softmax(-1)[prompt.answer]))
                handle.remove()
            assert effects.frame()["corrupt"][i] == pytest.approx(np.mean(scores), abs=1e-3)


def test_restoring_the_embedding_output_everywhere_restores_everything(tiny) -> None:
    """resid_post of layer 0 at all positions is the whole state: effect 1; before the subject nothing changes: 0."""
    model = tiny("llama")
    whole = interp.trace(model, FACTS, layers=0, positions="all", samples=3, metric="logprob").frame()
    assert (whole["effect"] - 1).abs().max() < 1e-5
    before = interp.trace(model, FACTS, layers=[0, 1], positions=[0], samples=3, metric="logprob").frame()
    assert (before["raw"] == 0).all()


def test_rows_are_means_over_noise_samples(tiny) -> None:
    model = tiny("gpt2")
    many = interp.trace(model, FACTS[0], layers=1, positions=[2], samples=4, metric="logprob").frame()
    singles = []
    for s in range(4):
        prompt = encode_facts(FACTS[0], model.coder)[0]
        from interp.engine import Engine

        noise = subject_noise(model, prompt, 3.0 * subject_std(model, [prompt]), 0, 0, s)
        (run,) = Engine(model).record([prompt.clean], (), [noise])
        singles.append(run.logits.float().log_softmax(-1)[prompt.answer].item())
    assert many.loc[0, "corrupt"] == pytest.approx(np.mean(singles), abs=1e-6)


@pytest.mark.model
def test_facts_are_recalled_at_the_subject_early_and_at_the_end_late(smollm2) -> None:
    """The published shape (Meng et al. 2022): an early site at the subject's last token, a late one at the end."""
    facts = interp.tasks.facts(smollm2, n=4, seed=0)
    e = interp.trace(smollm2, facts, layers=[0, 2, 28], samples=2)
    frame = e.frame()
    last = frame.groupby("example")["position"].transform("max")
    by = frame.assign(end=frame["position"] == last).groupby(["layer", "end", "role"])["effect"].mean()
    assert by[0, False, "subject"] > 0.3 > abs(by[28, False, "subject"])
    assert by[28, True, ""] > 0.8 > 0.2 > abs(by[0, True, ""])


# ------------------------------------------------------------------ severed paths, replacement, tables

PAIR = interp.PromptPair("w1 w2 w3 w4", "w1 w7 w8 w4", "w95", "w96").span("subject", "w2 w3")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox"])
@pytest.mark.parametrize("sever", ["mlp", "attn"])
def test_severed_paths_equal_two_hooked_forwards(tiny, kind: str, sever: str) -> None:
    """Restore one state while later outputs of that token keep the values of the corrupted run."""
    model = tiny(kind)
    e = interp.trace(model, PAIR, sever=sever, metric="logit_diff").frame()
    naive = interp.trace(model, PAIR, sever=sever, metric="logit_diff", engine="naive").frame()
    np.testing.assert_allclose(e["patched"], naive["patched"], atol=1e-9)
    layer, position = 0, 2
    out = [f"blocks.{i}.hook_{sever}_out" for i in range(layer + 1, model.n_layers)]
    state = f"blocks.{layer}.hook_resid_post"
    clean, corrupt = (seen(model, t, [state, *out]) for t in (PAIR.clean, PAIR.corrupt))

    def put(name: str, source: dict):
        def hook(x, hook):
            x = x.clone()
            x[0, position] = source[name][0, position]
            return x

        return name, hook

    from interp.model.hooks import hooks

    with torch.no_grad(), hooks(model, put(state, clean), *(put(n, corrupt) for n in out)):
        logits = model.last_logits(torch.tensor([model.coder.encode(PAIR.corrupt)]))[0]
    answer, foil = (model.coder.continuation(w)[0] for w in ("w95", "w96"))
    row = e[(e["layer"] == layer) & (e["position"] == position)]
    assert row["patched"].item() == pytest.approx(float(logits[answer] - logits[foil]), abs=1e-8)
    whole = interp.trace(model, PAIR, metric="logit_diff").frame()
    assert (whole["patched"] - e["patched"]).abs().max() > 1e-6  # something went that way
    last = e[e["layer"] == model.n_layers - 1]["patched"].to_numpy()
    np.testing.assert_allclose(last, whole[whole["layer"] == model.n_layers - 1]["patched"], atol=1e-12)


def seen(model, text: str, names: list[str]) -> dict:
    from interp.model.hooks import hooks

    found: dict = {}
    keep = [(n, lambda x, hook, n=n: found.update({n: x.detach()})) for n in names]
    with torch.no_grad(), hooks(model, *keep):
        model.last_logits(torch.tensor([model.coder.encode(text)]))
    return found


def test_replacement_is_denoising(tiny) -> None:
    model = tiny("gpt2")
    for positions in ("each", "subject", "subject:last"):
        traced = interp.trace(model, PAIR, "mlp_out", window=2, positions=positions, metric="logit_diff")
        sites = model.sites("mlp_out", positions=positions)
        patched = interp.patch(model, PAIR, sites, window=2)
        np.testing.assert_allclose(traced.frame()["patched"], patched.frame()["patched"], atol=1e-9)
    assert traced.provenance["samples"] == 1 and "replacement" in traced.provenance["corruption"]
    with pytest.raises(interp.InterpError, match="are for Facts"):
        interp.trace(model, PAIR, samples=3)


def test_a_given_sigma_is_used(tiny) -> None:
    model = tiny("gpt2")
    own = interp.trace(model, FACTS, layers=1, samples=2, metric="logprob")
    given = interp.trace(model, FACTS, layers=1, samples=2, metric="logprob", sigma=own.provenance["sigma"])
    assert (own.frame()["patched"] == given.frame()["patched"]).all()
    other = interp.trace(model, FACTS, layers=1, samples=2, metric="logprob", sigma=1e-6).frame()
    assert (other["clean"] - other["corrupt"]).abs().max() < 1e-4  # next to no noise
    for wrong in ({"sever": "mlp", "component": "mlp_out"}, {"sever": "norm"}):
        with pytest.raises(interp.InterpError, match="sever="):
            interp.trace(model, FACTS, **wrong)


def test_tables_of_two_models_or_components_are_not_averaged(tiny) -> None:
    """A joined table has the rows of the tables that it was joined from, total effects too."""
    facts = [interp.Fact("w1 w2 w3 w4", "w2 w3", "w15"), interp.Fact("w7 w8 w3", "w8", "w16")]
    llama, gpt2 = tiny("llama"), tiny("gpt2")
    for column, parts in {
        "model": [interp.trace(m, facts, samples=1) for m in (llama, gpt2)],
        "intervention": [interp.trace(llama, facts, c, samples=1) for c in ("resid_post", "mlp_out")],  # type: ignore[arg-type]
    }.items():
        joined = interp.trace_table(interp.Effects.concat(parts))
        names = [parts[0].provenance[column], parts[1].provenance[column]]
        for name, part in zip(names, parts, strict=True):
            rows = joined[joined[column] == name].drop(columns=column).reset_index(drop=True)
            pd.testing.assert_frame_equal(rows, interp.trace_table(part), check_exact=False)


def test_tables_average_over_facts_by_kind_of_token(tiny) -> None:
    model = tiny("llama")
    facts = [interp.Fact("w1 w2 w3 w5 w6 w4 w7", "w2 w3 w5", "w95"), interp.Fact("w7 w8 w9 w1", "w8", "w90")]
    e = interp.trace(model, facts, samples=2, metric="logprob")
    table = interp.trace_table(e)
    f = e.frame()
    # tokens: <bos> w1 | w2 w3 w5 | w6 w4 w7 and <bos> w7 | w8 | w9 w1
    places = {
        "before the subject": [(0, 0), (0, 1), (1, 0), (1, 1)], "first subject token": [(0, 2)],
        "middle subject tokens": [(0, 3)], "last subject token": [(0, 4), (1, 2)],
        "first subsequent token": [(0, 5), (1, 3)], "further tokens": [(0, 6)], "last token": [(0, 7), (1, 4)],
    }  # fmt: skip
    for row in table.itertuples():
        at = [f.query(f"example == {i} and position == {p} and layer == {row.layer}") for i, p in places[row.category]]
        by_fact = [
            np.mean([x["raw"].item() for x in at if x["example"].item() == i])
            for i in {int(x["example"].item()) for x in at}
        ]
        assert pytest.approx(np.mean(by_fact), abs=1e-12) == row.AIE and row.n == len(by_fact)
    assert len(table) == len(places) * model.n_layers
    one = f.drop_duplicates("example")
    assert table["ATE"][0] == pytest.approx((one["clean"] - one["corrupt"]).mean())
    with pytest.raises(interp.InterpError, match="positions='each'"):
        interp.trace_table(interp.trace(model, facts, layers=1, positions="subject", samples=1))
    with pytest.raises(interp.InterpError, match="every token must be traced"):
        interp.trace_table(interp.trace(model, facts, layers=1, positions=[0, 2], samples=1))
