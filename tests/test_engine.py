"""The fast engine equals one full forward per cell: on every architecture, for any plan."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, OTHERS
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import interp
from interp.doctor.families.text import FAMILIES, tiny_hf
from interp.doctor.matrix import WORDS
from interp.engine import Cell, CellWrite, Engine
from interp.engine.verified import VERIFIED, Verified
from interp.errors import InterpError, ModelError
from interp.sites import COMPONENTS, Site
from interp.zoo.tokenizer import word_tokenizer

COMPONENTS_SWEPT = sorted(set(COMPONENTS) - {"result", "embed"})
# float64 throughout on our side; eager's float32 softmax plays no part, since both engines run through headstats
EXACT = {"atol": 1e-9, "rtol": 1e-9}


def words(ids: list[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


@st.composite
def pair_sets(draw) -> list[interp.PromptPair]:
    pairs = []
    for _ in range(draw(st.integers(1, 2))):
        n = draw(st.integers(1, 9))
        clean = draw(st.lists(st.integers(0, 90), min_size=n, max_size=n))
        corrupt = list(clean)
        for i in draw(st.lists(st.integers(0, n - 1), max_size=3)):
            corrupt[i] = draw(st.integers(0, 90))
        pairs.append(interp.PromptPair(words(clean), words(corrupt), "w95", "w96"))
    return pairs


@st.composite
def site_lists(draw) -> list[Site]:
    def one() -> Site:
        component = draw(st.sampled_from(COMPONENTS_SWEPT))
        spec = COMPONENTS[component]
        n_heads = {"query": 4, "kv": 2, "neuron": 48, None: 0}[spec.heads]
        return Site(
            component,
            draw(st.integers(0, 2)) if spec.per_layer else None,
            draw(st.integers(0, n_heads - 1)) if n_heads else None,
            draw(st.sampled_from([None, 0, -1])),
        )

    return [one() for _ in range(draw(st.integers(1, 5)))]


def available(model: interp.Model, sites: list[Site]) -> list[Site]:
    return [s for s in sites if s.hook_name in model.bridge.hook_dict]


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("mode", ["denoise", "noise"])
@settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],  # shrinking would re-run the slow oracle hundreds of times
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(pairs=pair_sets(), sites=site_lists())
def test_fast_equals_naive(tiny, kind: str, mode: str, pairs, sites) -> None:
    model = tiny(kind)
    sites = available(model, sites)
    if not sites:
        return
    fast, naive = (interp.patch(model, pairs, sites, mode=mode, engine=e) for e in ("fast", "naive"))
    a, b = fast.frame(), naive.frame()
    computed = ["clean", "corrupt", "patched", "raw", "effect"]
    assert a.drop(columns=computed).equals(b.drop(columns=computed))
    for column in computed[:-1]:
        np.testing.assert_allclose(a[column], b[column], **EXACT)


@pytest.mark.parametrize("kind", OTHERS)
def test_every_family_runs_packed_and_equals_naive(tiny, kind: str) -> None:
    model = tiny(kind)
    pairs = [
        interp.PromptPair(words([1, 2, 3, 4, 5, 6, 7]), words([1, 9, 3, 4, 5, 8, 7]), "w95", "w96"),
        interp.PromptPair(words([4, 4, 4]), words([4, 4, 9]), "w95", "w96"),
    ]
    sites = model.sites("z", layers=[0, -1]) | model.sites("resid_pre", layers=[1, -1], positions=[1, -1])
    sites = sites | model.sites("mlp_out", layers=1, positions=[-1]) | model.sites("v", layers=1, heads=0)
    chosen = available(model, list(sites))
    fast, naive = (interp.patch(model, pairs, chosen, engine=e) for e in ("auto", "naive"))
    # other layers than attention carry information between positions; Falcon folds its ALiBi into a dense mask
    full = FAMILIES[kind].kind == "hybrid" or kind in ("falcon_alibi", "opt_post_norm")
    assert fast.provenance["engine"].startswith("one full forward" if full else "packed, exact")
    np.testing.assert_allclose(
        fast.frame()["patched"], naive.frame()["patched"], atol=1e-8 if model.dtype == torch.float64 else 1e-4
    )


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("using", ["zero", "mean", "resample"])
def test_ablation_fast_equals_naive(tiny, kind: str, using: str) -> None:
    model = tiny(kind)
    pairs = [interp.PromptPair(words([i, 5, 9, i + 1]), words([i, 6, 9, 2]), "w95", "w96") for i in (10, 20, 30)]
    pairs.append(interp.PromptPair("w1 w2 w3", "w1 w9 w3", "w95", "w96"))  # its donor has another length
    sites = model.sites("z") | model.sites("mlp_out", positions=[-1]) | model.sites("attn_out", positions="all")
    fast, naive = (interp.ablate(model, pairs, sites, using=using, engine=e, seed=3).frame() for e in ("fast", "naive"))
    np.testing.assert_allclose(fast["patched"], naive["patched"], **EXACT)
    assert fast["raw"].abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2"])
def test_the_first_sweep_of_a_model_has_the_same_bits_as_later_ones(word_tokenizer, kind: str) -> None:
    model = interp.load(tiny_hf(kind).to(torch.float32), tokenizer=word_tokenizer)
    pairs = [interp.PromptPair(words([i, 5, 9, i + 1]), words([i, 6, 9, 2]), "w95", "w96") for i in (10, 20, 30)]
    first, second = (interp.ablate(model, pairs, model.sites("z"), using="zero").frame() for _ in range(2))
    for column in ("clean", "corrupt", "patched"):
        np.testing.assert_array_equal(first[column], second[column])


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("component", ["resid_post", "mlp_out", "attn_out"])
def test_tracing_fast_equals_naive(tiny, kind: str, component: str) -> None:
    model = tiny(kind)
    facts = [interp.Fact("w1 w2 w3 w4", "w2 w3", "w95"), interp.Fact("w7 w8 w9 w1 w2", "w8", "w90")]
    fast, naive = (
        interp.trace(model, facts, component, window=2, samples=3, metric="logprob", engine=e).frame()
        for e in ("fast", "naive")
    )
    np.testing.assert_allclose(fast["patched"], naive["patched"], atol=1e-5)  # log-softmax is taken in float32
    assert (fast["clean"] - fast["corrupt"]).abs().min() > 1e-4  # the noise did something


def test_result_sites_equal_naive_and_leave_the_switch_off(tiny) -> None:
    model = tiny("llama")
    pair = interp.PromptPair("w1 w2 w3 w4", "w1 w9 w3 w4", "w95", "w96")
    fast, naive, z = (
        interp.patch(model, pair, sites, engine=e).frame()["patched"]
        for sites, e in ((model.sites("result"), "fast"), (model.sites("result"), "naive"), (model.sites("z"), "fast"))
    )
    np.testing.assert_allclose(fast, naive, **EXACT)
    np.testing.assert_allclose(fast, z, **EXACT)  # a head's result is linear in its z
    assert not model.bridge.cfg.use_attn_result


def test_embedding_sites_take_full_forwards_and_say_so(tiny) -> None:
    model = tiny("gpt2")
    pair = interp.PromptPair("w1 w2 w3 w4", "w1 w9 w3 w4", "w95", "w96")
    e = interp.patch(model, pair, model.sites("embed"))
    same = interp.patch(model, pair, model.sites("resid_pre", layers=0))  # nothing but a position vector in between
    np.testing.assert_allclose(e.frame()["patched"], same.frame()["patched"], **EXACT)
    assert "full forwards" in e.provenance["engine"]
    with pytest.raises(InterpError, match="not exact here"):
        interp.patch(model, pair, model.sites("embed"), engine="fast")


def test_resid_mid_is_the_residual_stream_and_not_the_mlp_branch(tiny) -> None:
    """Patching resid_mid everywhere in the last layer must carry everything over; the MLP branch alone does not."""
    model = tiny("llama")
    pair = interp.PromptPair("w1 w2 w3 w4", "w1 w9 w3 w4", "w95", "w96")
    for engine in ("fast", "naive"):
        e = interp.patch(model, pair, Site("resid_mid", 2, position=None), engine=engine).frame()
        assert e.loc[0, "effect"] == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_patching_everything_is_one_and_nothing_is_zero(tiny, kind: str) -> None:
    model = tiny(kind)
    pair = interp.PromptPair("w1 w2 w3 w4", "w1 w9 w3 w5", "w95", "w96")
    for mode in ("denoise", "noise"):
        everything = interp.patch(model, pair, model.sites("resid_pre", positions="all"), mode=mode).frame()
        assert (everything["effect"] - 1).abs().max() < 1e-9
        nothing = interp.patch(model, pair, model.sites("resid_pre", positions=[0]), mode=mode).frame()
        assert (nothing["raw"] == 0).all() and (nothing["effect"] == 0).all()


def test_swapping_a_pair_swaps_the_modes(tiny) -> None:
    """Denoising (clean, corrupt) is noising (corrupt, clean): the same forwards, read the other way round."""
    model = tiny("gpt2")
    a = interp.PromptPair("w1 w2 w3 w4", "w1 w9 w3 w5", "w95", "w96")
    b = interp.PromptPair(a.corrupt, a.clean, "w95", "w96")
    one = interp.patch(model, a, model.sites("z")).frame()
    two = interp.patch(model, b, model.sites("z"), mode="noise").frame()
    np.testing.assert_allclose(one["patched"], two["patched"], **EXACT)
    np.testing.assert_allclose(one["effect"], two["effect"], **EXACT)


def test_groups_of_writes_in_several_layers(tiny) -> None:
    model = tiny("mistral")
    runner, oracle = Engine(model, "fast"), Engine(model, "naive")
    ids = [model.coder.encode(words([3, 1, 4, 1, 5])), model.coder.encode(words([9, 2, 6]))]
    generator = torch.Generator().manual_seed(0)
    for engine in (runner, oracle):
        engine.runs = engine.record(ids)
    cells = []
    for run, length in enumerate(map(len, ids)):
        for _ in range(6):
            sites = [Site("resid_pre", 2), Site("mlp_out", 0), Site("z", 1, 3), Site("resid_post", 2), Site("k", 1, 1)]
            chosen = [sites[i] for i in torch.randperm(5, generator=generator)[:3].tolist()]
            writes = []
            for site in chosen:
                start = int(torch.randint(0, length, (), generator=generator))
                width = {"z": 8, "k": 8}.get(site.component, 32)
                value = torch.randn(1, width, generator=generator, dtype=torch.float64)
                writes.append(CellWrite(site, start, length, value))
            cells.append(Cell(run, tuple(writes)))
    out = [e.score(e.runs, cells, lambda logits, _: logits[:, 7], lambda n: None) for e in (runner, oracle)]
    torch.testing.assert_close(*out, **EXACT)


def test_batches_do_not_change_results(tiny, monkeypatch) -> None:
    import interp.engine.core as core

    model = tiny("llama")
    pairs = [interp.PromptPair(words([i, 2, 3, i]), words([i, 9, 3, 5]), "w95", "w96") for i in range(4)]
    whole = interp.patch(model, pairs, model.sites("resid_pre")).frame()
    monkeypatch.setattr(core, "ROWS_PER_BATCH", 7)
    monkeypatch.setattr("interp.recipes.example_batches.RUN_BYTES", 1)  # one example at a time
    pieces = interp.patch(model, pairs, model.sites("resid_pre")).frame()
    np.testing.assert_allclose(pieces["patched"], whole["patched"], **EXACT)


def test_a_wrong_fast_path_is_noticed_and_left(tiny, monkeypatch, caplog) -> None:
    """Negative control of the self-check: break the packed attention, and auto must fall back to naive, saying so."""
    import interp.engine.packed_attention as joint

    model = tiny("llama")
    pair = interp.PromptPair("w1 w2 w3 w4", "w1 w9 w3 w5", "w95", "w96")
    right = interp.patch(model, pair, model.sites("z")).frame()["patched"]
    monkeypatch.setitem(VERIFIED, model, Verified())  # as it was loaded, and for this test alone
    real = joint.attend
    monkeypatch.setattr(joint, "attend", lambda call, **k: _scaled(real(call, **k)))
    e = interp.patch(model, pair, model.sites("z"))
    np.testing.assert_allclose(e.frame()["patched"], right, **EXACT)
    assert "differ from the naive path" in e.provenance["engine"] and "naive path" in caplog.text
    with pytest.raises(InterpError, match="not exact here"):
        interp.patch(model, pair, model.sites("z"), engine="fast")


def test_a_prompt_of_two_tokens_vouches_for_no_other(tiny, monkeypatch) -> None:
    """With next to nothing to read, a packed path that read it wrongly would pass: longer prompts are checked anew."""
    model = tiny("gpt2")
    monkeypatch.setitem(VERIFIED, model, Verified())
    calls: list[int] = []
    check = Engine._gap
    monkeypatch.setattr(Engine, "_gap", lambda self, runs, *a: calls.append(len(runs[0])) or check(self, runs, *a))
    for text, other in (("w1", "w2"), ("w1 w2 w3 w4", "w1 w9 w3 w5"), ("w1 w2 w3 w6", "w1 w9 w3 w5")):
        interp.patch(model, interp.PromptPair(text, other, "w95", "w96"), model.sites("q"), engine="fast")
    assert calls == [2, 5]


def test_a_branch_beside_attention_is_known_for_what_it_is(tiny) -> None:
    """Falcon-H1's state-space branch carries rows to later ones, and adds to the residual stream what no hook shows."""
    model = tiny("falcon_h1")
    pairs = [interp.PromptPair(a, b, "w95", "w96") for a, b in (("w1", "w2"), ("w1 w2 w3 w4", "w1 w9 w3 w4"))]
    for pair in pairs:
        assert "beside attention" in interp.patch(model, pair, model.sites("resid_pre")).provenance["engine"]
    for wrong in (lambda: interp.patch(model, pairs, "resid_mid.L0@0"), lambda: interp.peek(model, pairs)):
        with pytest.raises(InterpError, match=r"adds more than attention|other means than softmax attention"):
            wrong()


@pytest.mark.parametrize("family", ["llama", "qwen2", "neox"])
def test_changed_rotary_frequencies_are_noticed(family: str) -> None:
    """What was recorded about a model is not used after its buffers have changed: clean scores are Hugging Face's."""
    model = interp.load(tiny_hf(family, torch.float32), tokenizer=word_tokenizer(WORDS))
    hf = tiny_hf(family, torch.float32)
    pair = interp.PromptPair("w1 w2 w3 w4", "w1 w9 w3 w5", "w95", "w94")
    interp.patch(model, pair, model.sites("z"))  # records and verifies
    before = model.fingerprint()
    base = "gpt_neox" if family == "neox" else "model"
    with torch.no_grad():
        for whole in (hf, model.bridge.original_model):
            getattr(whole, base).rotary_emb.inv_freq.mul_(3)
        (answer, foil) = (model.coder.encode(word)[-1] for word in ("w95", "w94"))
        logits = hf(torch.tensor([model.coder.encode(pair.clean)])).logits[0, -1]
        expected = float(logits[answer] - logits[foil])
    fast, naive = (interp.patch(model, pair, model.sites("z"), engine=kind).frame() for kind in ("auto", "naive"))
    assert fast["clean"].to_numpy() == pytest.approx(expected, abs=1e-4)
    np.testing.assert_allclose(fast["patched"], naive["patched"], atol=1e-4)
    assert model.fingerprint() != before
    with torch.no_grad():
        model.bridge.original_model.get_submodule(f"{base}.rotary_emb").inv_freq.div_(3)
    assert model.fingerprint() == before


def test_a_hook_that_mixes_positions_is_noticed_even_after_a_sweep_without_it(tiny) -> None:
    """The packed path shows a user's hook rows of many cells in one sequence: it must be checked anew, and left."""
    model = tiny("llama")
    pair = interp.PromptPair("w1 w2 w3 w4", "w1 w9 w3 w5", "w95", "w96")
    interp.patch(model, pair, model.sites("resid_pre"))  # checked and found exact
    point = model.bridge.hook_dict["blocks.1.hook_resid_pre"]
    handle = point.add_hook(lambda x, hook: x + x.mean(1, keepdim=True))
    try:
        auto, naive = (interp.patch(model, pair, model.sites("resid_pre"), engine=e) for e in ("auto", "naive"))
    finally:
        handle.hook.remove()
        point.fwd_hooks.remove(handle)
    np.testing.assert_allclose(auto.frame()["patched"], naive.frame()["patched"], **EXACT)
    assert "one full forward per cell" in auto.provenance["engine"]


def test_hooks_by_which_libraries_only_look_do_not_slow_the_engine(tiny) -> None:
    """transformers wires its capture of attentions at the first forward that asks for them, and never removes it."""
    model = tiny("llama")
    model.bridge.original_model(torch.tensor([[3, 4]]), output_attentions=True, output_hidden_states=True)
    assert not model.hooks_added()
    pair = interp.PromptPair("w1 w2 w3 w4", "w1 w9 w3 w5", "w95", "w96")
    assert "full forward" not in interp.patch(model, pair, model.sites("resid_pre")).provenance["engine"]


def test_training_mode_with_dropout_is_refused(tiny) -> None:
    model = tiny("gpt2")
    pair = interp.PromptPair("w1 w2 w3", "w1 w9 w3", "w95", "w96")
    model.bridge.train()
    try:
        with pytest.raises(ModelError, match="training mode"):
            interp.patch(model, pair, model.sites("z", layers=0))
    finally:
        model.bridge.eval()


def _scaled(result):
    result.out.mul_(1.3)
    return result


def test_bidirectional_models_go_the_naive_way(word_tokenizer) -> None:
    import copy

    import transformers as tf

    tokenizer = copy.deepcopy(word_tokenizer)
    tokenizer.add_special_tokens({"mask_token": "w50"})  # a word of its vocabulary, so that the model has a row for it

    config = tf.BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=64, pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = interp.load(tf.BertForMaskedLM(config).eval(), tokenizer=tokenizer)
    pair = interp.PromptPair("w1 w2 w3 w50", "w1 w9 w3 w50", "w5", "w6")
    e = interp.patch(model, pair, Site("resid_pre", 0, position="each"))
    assert "not causal" in e.provenance["engine"]
    # every position sees every other one: even a patch before the difference may not be skipped as a no-op
    assert len(e) == len(model.coder.encode(pair.clean))


def test_custom_metrics_and_all_built_in_ones(tiny) -> None:
    model = tiny("llama")
    pairs = [interp.PromptPair(words([i, 2, 3]), words([i, 9, 3]), "w95", "w96") for i in range(3)]
    for metric in ("logit_diff", "prob", "logprob", "rank", "kl", lambda logits, r: logits[:, 5] - logits[:, 6]):
        fast, naive = (
            interp.patch(model, pairs, model.sites("z", layers=1), metric, engine=e).frame() for e in ("fast", "naive")
        )
        np.testing.assert_allclose(fast["patched"], naive["patched"], atol=1e-5)
    assert (interp.patch(model, pairs, model.sites("z", layers=1), "kl").frame()["clean"].abs() < 1e-6).all()


def test_rotary_angles_that_depend_on_the_length_are_noticed(word_tokenizer) -> None:
    """Phi-3's long contexts take other rotary factors: what was seen of a long prompt is wrong for a short one."""
    import transformers as tf

    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 6,
        "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0],
    }  # fmt: skip
    config = tf.Phi3Config(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=64, original_max_position_embeddings=6, pad_token_id=1,
        bos_token_id=0, eos_token_id=1, rope_parameters=rope,
    )  # fmt: skip
    torch.manual_seed(0)
    model = interp.load(tf.Phi3ForCausalLM(config).double().eval(), tokenizer=word_tokenizer)
    short = interp.PromptPair("w1 w2 w3", "w1 w9 w3", "w95", "w96")
    long = interp.PromptPair(words(list(range(1, 12))), words([1, 40, *range(3, 12)]), "w95", "w96")
    sites = model.sites("z") | model.sites("resid_pre", positions=[1, -1])
    alone = interp.patch(model, short, sites).frame()["patched"]
    for pairs in ([short, long], [long, short]):
        auto, naive = (interp.patch(model, pairs, sites, engine=e) for e in ("auto", "naive"))
        np.testing.assert_allclose(auto.frame()["patched"], naive.frame()["patched"], atol=1e-7)
        assert "with their length" in auto.provenance["engine"]
        mine = auto.frame()[auto.frame()["example"] == pairs.index(short)]["patched"]
        np.testing.assert_allclose(mine, alone, atol=1e-7)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_resid_mid_in_a_group_wins_over_what_comes_before_it(tiny, kind: str) -> None:
    """It is the residual stream after attention: what else of its block is set before makes no difference there."""
    model = tiny(kind)
    pair = interp.PromptPair("w1 w2 w3 w4", "w1 w9 w3 w5", "w95", "w96")
    groups = {"alone": ["resid_mid.L1"], "more": ["resid_mid.L1", "attn_out.L1", "resid_pre.L1@2", "z.L1H0"]}
    for engine in ("fast", "naive"):
        raw = interp.patch(model, pair, groups=groups, engine=engine).frame()["raw"]
        assert raw[1] == pytest.approx(raw[0], abs=1e-9) and abs(raw[0]) > 1e-3
