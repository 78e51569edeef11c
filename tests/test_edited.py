"""Edits of every forward inside `model.edited`, against dense attention inside an untouched Hugging Face model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import headstats
import numpy as np
import pytest
import torch
from test_edit import CASES, PAIRS, attention_by_hand, edit_of
from torch import Tensor

import interp
from interp import AttentionEdit
from interp.circuits.evaluation.evaluator import Evaluator
from interp.doctor.families.text import tiny_hf
from interp.errors import InterpError, PromptError, SiteError

LAYER, HEAD = 0, 1
SPANS = ["start", -4]  # as test_edit names keys


@pytest.fixture(scope="module")
def llama(word_tokenizer: Any) -> interp.Model:
    return interp.load(tiny_hf("llama"), tokenizer=word_tokenizer)


@pytest.fixture
def hf() -> Any:
    """The same model, untouched."""
    model = tiny_hf("llama")
    model.set_attn_implementation("eager")
    return model


@contextmanager
def z_set(hf: Any, layer: int, head: int, values: Tensor) -> Iterator[None]:
    """Set one head's output, values [batch, position, d_head]."""
    width = values.shape[-1]

    def hook(module: Any, args: Any) -> Any:
        x = args[0].clone()
        x[..., head * width : (head + 1) * width] = values
        return (x,)

    handle = hf.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(hook)
    yield
    handle.remove()


@torch.no_grad()
def patched_by_hand(hf: Any, model: interp.Model, case: Any, layer: int, head: int) -> np.ndarray:
    """Logit differences of corrupt prompts with a head's output from the clean run, all under an edit."""
    clean, corrupt = (torch.tensor([model.coder.encode(getattr(p, n)) for p in PAIRS]) for n in ("clean", "corrupt"))
    seen: list[Tensor] = []
    project = hf.model.layers[layer].self_attn.o_proj
    with attention_by_hand(hf, case, LAYER, HEAD):
        handle = project.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        hf(input_ids=clean)
        handle.remove()
        values = seen[0].unflatten(-1, (hf.config.num_attention_heads, -1))[:, :, head]
        with z_set(hf, layer, head, values):
            logits = hf(input_ids=corrupt).logits[:, -1]
    answer, foil = (model.coder.continuation(x)[0] for x in ("w95", "w96"))
    return (logits[:, answer] - logits[:, foil]).numpy()


@pytest.mark.parametrize("name", ["knockout", "uniform", "gate", "knockout after", "redistribution", "weights"])
def test_a_patch_under_an_edit_is_a_patch_of_the_edited_model(llama: interp.Model, hf: Any, name: str) -> None:
    case, sites = CASES[name], llama.sites("z", layers=[0, 1], heads=[0, 1])
    unedited = interp.patch(llama, PAIRS, sites, show_progress=False).frame()
    for engine in ("auto", "naive"):
        with llama.edited(edit_of(case, LAYER, HEAD)):
            effects = interp.patch(llama, PAIRS, sites, engine=engine, show_progress=False)
        frame = effects.frame().sort_values("example")
        assert effects.provenance["edited"] == [edit_of(case, LAYER, HEAD).text]
        assert engine == "naive" or effects.provenance["engine"] == "packed, exact"
        for layer, head in ((0, 0), (0, 1), (1, 0), (1, 1)):
            rows = frame[(frame["layer"] == layer) & (frame["head"] == head)]
            by_hand = patched_by_hand(hf, llama, case, layer, head)
            np.testing.assert_allclose(rows["patched"], by_hand, atol=1e-5, err_msg=f"{name} {engine} L{layer}H{head}")
    again = interp.patch(llama, PAIRS, sites, show_progress=False).frame()
    np.testing.assert_array_equal(again["patched"], unedited["patched"])  # nothing is left behind
    assert (frame["patched"].to_numpy() != unedited["patched"].to_numpy()).any()


def test_spans_are_known_to_recipes_statistics_patterns_and_circuits() -> None:
    known = interp.zoo.one_head()  # head 2 of layer 1 reads the marked word
    model, pairs = known.model, known.pairs(8, seed=0)
    cut = AttentionEdit(queries=-1, keys="marked", knockout=True)
    with model.edited(cut):
        frame = interp.patch(model, pairs, model.sites("z"), show_progress=False).frame()
        np.testing.assert_array_equal(frame["clean"], frame["corrupt"])  # the only mover does not see what differs
        stats = model.attention_stats([interp.Prompt(p.clean, p.spans) for p in pairs])
        patterns = model.attention_patterns(interp.Prompt(pairs[0].clean, pairs[0].spans))
        for provenance in (stats.provenance, patterns.provenance):
            assert provenance["edited"] == [cut.text]
        with pytest.raises(PromptError, match=r"names the span 'marked', but the prompt's spans are: none"):
            model.attention_stats(pairs[0].clean)
        with pytest.raises(PromptError, match="names a span"):
            model(torch.tensor([[3, 4, 5]]))
    assert not model.coder.name


def test_the_same_tokens_with_other_spans_are_refused(llama: interp.Model) -> None:
    first = PAIRS[0]
    other = interp.PromptPair(first.clean, first.corrupt, first.answer, first.foil, {"start": (3, 5)})
    also = interp.PromptPair(first.clean, first.corrupt, first.answer, first.foil, {**first.spans, "end": (9, 11)})
    with llama.edited(AttentionEdit(keys="start", queries=-1, knockout=True)):
        interp.patch(llama, [first, also], llama.sites("z"), show_progress=False)  # the edit reads the same tokens
        with pytest.raises(PromptError, match=r"same tokens .* spans at different places"):
            interp.patch(llama, other, llama.sites("z"), show_progress=False)
        interp.patch(llama, first, llama.sites("z"), show_progress=False)
    with llama.edited(AttentionEdit(keys="start", queries=-1, knockout=True)):
        interp.patch(llama, other, llama.sites("z"), show_progress=False)


SEVERAL_KINDS = (
    AttentionEdit(gain=2.0, renormalise=False, keys="start", queries=-1),
    AttentionEdit(queries=-2, counterfactual="uniform"),
    AttentionEdit(queries=-3, counterfactual="reversed", heads=[0]),
    AttentionEdit(keys=0, bias=1.0),  # acts on all of these rows
)
RANDOM = (AttentionEdit(counterfactual="random", seed=1, heads=[0, 2]),)
ROWS = (
    AttentionEdit(queries=[-2, -1], heads=[1], weights={1: 0.25, 2: 0.5, 3: 0.25}),
    AttentionEdit(gate=torch.linspace(-1, 1, 4 * 7).view(4, 7), layers=1),
    AttentionEdit(gain=2.0, renormalise=False, heads=[0]),
)  # of 7 tokens
COUNTING = (AttentionEdit(counterfactual="uniform", renormalise=False, heads=[1]),)  # 1 / number of all keys


@pytest.mark.parametrize(
    "edits",
    [(edit_of(CASES["knockout"], 0, 1),), (edit_of(CASES["redistribution"], 1, 0),), SEVERAL_KINDS, RANDOM, ROWS],
)
def test_statistics_are_those_of_the_edited_attention(llama: interp.Model, edits: tuple[AttentionEdit, ...]) -> None:
    prompts = [interp.Prompt(p.clean, p.spans) for p in PAIRS]
    spec = headstats.StatSpec(entropy=True, max_prob=True, argmax=True, sink=2, diagonal=True)
    with llama.edited(*edits):
        stats = llama.attention_stats(prompts, spec)
        for row, pair in enumerate(PAIRS):
            ids = torch.tensor([llama.coder.encode(pair.clean)])
            _, cache = llama.run_with_cache(ids, names_filter=lambda name: name.endswith("hook_pattern"))
            for layer in llama.attention_layers:
                p = cache[f"blocks.{layer}.attn.hook_pattern"][0].double()  # by interp.model.dense_edits
                expected = {
                    "entropy": -torch.special.xlogy(p, p).sum(-1), "max_prob": p.amax(-1), "argmax": p.argmax(-1),
                    "sink": p[..., :2].sum(-1), "diagonal": p.diagonal(dim1=-2, dim2=-1),
                }  # fmt: skip
                for name, values in expected.items():
                    np.testing.assert_allclose(stats.values[name][row][layer], values, atol=1e-6, err_msg=name)
        received = headstats.StatSpec(received=True)
        if edits is SEVERAL_KINDS:
            with pytest.raises(InterpError, match=r"more than one call of the kernel .* received"):
                llama.attention_stats(prompts, received)
    assert llama.backend_report()["dense_because"].str.contains("hook_pattern").all()


@pytest.mark.parametrize("edits", [RANDOM, COUNTING, SEVERAL_KINDS, ROWS])
def test_packed_cells_equal_full_forwards(llama: interp.Model, edits: tuple[AttentionEdit, ...]) -> None:
    sites = llama.sites("z", heads=1, positions=[1, 3, -1]) | llama.sites("k", layers=0, positions=2)
    patched = []
    with llama.edited(*edits):
        for engine in ("auto", "naive"):
            effects = interp.patch(llama, PAIRS, sites, engine=engine, show_progress=False)
            patched.append(effects.frame()["patched"])
    np.testing.assert_allclose(*patched, atol=1e-6)


@pytest.mark.parametrize("edits", [RANDOM, COUNTING, ROWS])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_prompt_has_the_same_numbers_in_any_batch(llama: interp.Model, edits: Any, side: str) -> None:
    ids = torch.tensor([llama.coder.encode(p.clean) for p in PAIRS])
    n, pad = ids.shape[1], torch.full((1, 3), 1)
    padded = torch.cat([pad, ids[1:]] if side == "left" else [ids[1:], pad], 1)
    mask, width = (padded != 1).long(), slice(3, n + 3) if side == "left" else slice(0, n)
    nothing = ("blocks.0.attn.hook_pattern", lambda x, hook: x)  # computes that layer densely
    with llama.edited(*edits):
        alone = llama.bridge(ids[1:])
        torch.testing.assert_close(llama.bridge(ids)[1:], alone)
        torch.testing.assert_close(llama.bridge.run_with_hooks(ids, fwd_hooks=[nothing])[1:], alone)
        torch.testing.assert_close(llama.bridge.run_with_hooks(ids[1:], fwd_hooks=[nothing]), alone)
        logits = llama.bridge.original_model(input_ids=padded, attention_mask=mask).logits
        torch.testing.assert_close(logits[:, width], alone, atol=1e-5, rtol=1e-5)  # positions are rounded


@pytest.mark.parametrize(
    "name",
    ["knockout", "uniform", "reversed", "redistribution", "factor", "replacement", "weights", "gates of queries"],
)
def test_gradients_are_those_of_the_edited_attention(llama: interp.Model, hf: Any, name: str) -> None:
    case, ids = CASES[name], torch.tensor([llama.coder.encode(p.clean) for p in PAIRS])
    with attention_by_hand(hf, case, LAYER, HEAD):
        embeddings = hf.get_input_embeddings()(ids).detach().requires_grad_()
        logits = hf(inputs_embeds=embeddings).logits[:, -1]
        (by_hand,) = torch.autograd.grad((logits[:, 5] - logits[:, 6]).sum(), embeddings)
    leaves: list[Tensor] = []

    def as_leaf(x: Tensor, hook: Any) -> Tensor:
        leaves.append(x.detach().requires_grad_())
        return leaves[-1]

    with llama.edited(edit_of(case, LAYER, HEAD)):
        llama.attention_stats([interp.Prompt(p.clean, p.spans) for p in PAIRS])  # tells the spans
        logits = llama.bridge.run_with_hooks(ids, fwd_hooks=[("blocks.0.hook_resid_pre", as_leaf)])[:, -1]
        (grads,) = torch.autograd.grad((logits[:, 5] - logits[:, 6]).sum(), leaves[0])
    torch.testing.assert_close(grads, by_hand, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "mistral"])  # mistral's window is shorter than what is decoded
@torch.no_grad()
def test_decoding_with_a_cache_equals_a_forward_of_everything(word_tokenizer: Any, family: str) -> None:
    model = interp.load(tiny_hf(family), tokenizer=word_tokenizer)
    hf, ids = model.bridge.original_model, torch.tensor([model.coder.encode(PAIRS[0].clean)])
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "output_scores": True, "pad_token_id": 1,
                               "return_dict_in_generate": True, "attention_mask": torch.ones_like(ids)}  # fmt: skip
    hf.generation_config.eos_token_id = None
    plain = hf.generate(ids, **options)
    with model.edited(AttentionEdit(keys=[2, 5], gain=0.2), AttentionEdit(keys=3, bias=2.0, heads=[1])):
        edited = hf.generate(ids, **options)
        whole = hf(edited.sequences[:, :-1]).logits[0, ids.shape[1] - 1 :]
        torch.testing.assert_close(torch.cat(edited.scores), whole.float(), atol=1e-5, rtol=1e-5)
    assert not torch.equal(torch.cat(plain.scores), torch.cat(edited.scores))
    with model.edited(AttentionEdit(keys=5, knockout=True, phase="decoding")):
        decoding = hf.generate(ids, **options)
    assert torch.equal(decoding.scores[0], plain.scores[0]) and not torch.equal(decoding.scores[1], plain.scores[1])
    cache = hf(ids, use_cache=True).past_key_values
    with (
        model.edited(AttentionEdit(keys=1, knockout=True)),
        pytest.raises(InterpError, match="filled under other edits or none"),
    ):
        hf(ids[:, :1], past_key_values=cache)


def test_circuits_are_those_of_the_edited_model(llama: interp.Model) -> None:
    with llama.edited(*SEVERAL_KINDS):
        scores = interp.circuits.attribute_edges(llama, PAIRS, show_progress=False)
        assert scores.provenance["edited"] == [e.text for e in SEVERAL_KINDS]
        evaluators = [Evaluator(llama, PAIRS, "logit_diff", "counterfactual", 0, e) for e in ("auto", "naive")]
        assert evaluators[0].packed is not None
        mask = scores.graph.allowed & (np.random.default_rng(0).random(scores.graph.allowed.shape) < 0.7)
        np.testing.assert_allclose(*(evaluate(mask) for evaluate in evaluators), atol=1e-6)
        np.testing.assert_allclose(evaluators[0](scores.graph.allowed), evaluators[0].whole, atol=1e-6)
        with pytest.raises(InterpError, match="QK fix"):
            interp.circuits.atp_star(llama, PAIRS)
    with pytest.raises(InterpError, match="under other attention edits"):
        evaluators[0](mask)


def test_routes_do_not_pass_a_cut(llama: interp.Model) -> None:
    def importance(*edits: AttentionEdit) -> float:
        """The largest of the edges from tokens 1 and 2 to the last one."""
        with llama.edited(*edits):
            table = interp.circuits.flow_routes(llama, interp.Prompt(PAIRS[0].clean, PAIRS[0].spans), 0.0)
        rows = table[(table["kind"] == "attention") & (table["target"] == 6) & table["source"].isin([1, 2])]
        return max(rows["importance"].tolist())

    assert importance() > 0.01
    assert importance(AttentionEdit(keys="start", queries=-1, knockout=True)) < 1e-4


def test_uniform_attention_of_the_only_mover_leaves_the_share_of_one_token() -> None:
    known = interp.zoo.one_head()
    model, pairs = known.model, known.pairs(16, seed=0)
    uniform = AttentionEdit(layers=1, heads=[2], counterfactual="uniform")
    with model.edited(uniform):
        frame = interp.patch(model, pairs, model.sites("z", layers=0, heads=0), show_progress=False).frame()
        read = model.attention_stats([p.clean for p in pairs], headstats.StatSpec(max_prob=True)).values["max_prob"]
    clean = interp.patch(model, pairs, model.sites("z", layers=0, heads=0), show_progress=False).frame()["clean"]
    n = len(model.coder.encode(pairs[0].clean))  # the marked word is one of n tokens, and the only one with a value
    np.testing.assert_allclose(frame["clean"], clean / n, rtol=1e-5)
    np.testing.assert_allclose([x[1, 2, -1] for x in read], 1 / n, rtol=1e-5)
    with model.edited(uniform, AttentionEdit(keys="marked", knockout=True)):
        cut = interp.patch(model, pairs, model.sites("z", layers=0, heads=0), show_progress=False).frame()["clean"]
    np.testing.assert_allclose(cut, 0, atol=1e-5)


def test_neutral_edits_change_no_bit_and_extreme_ones_are_ablations(llama: interp.Model) -> None:
    ids, sites = torch.tensor([llama.coder.encode(p.clean) for p in PAIRS]), llama.sites("z", layers=1, heads=2)
    neutral: Any = {
        **dict.fromkeys(("gain", "logit_factor", "temperature", "gate"), 1.0),
        "bias": 0.0,
        "logit_raise": 0.0,
    }
    plain, stats = llama(ids), llama.attention_stats("w1 w2 w3").values
    for fields in ({name: value} for name, value in neutral.items()):
        with llama.edited(AttentionEdit(**fields)):
            assert torch.equal(llama(ids), plain), fields
            for name, values in llama.attention_stats("w1 w2 w3").values.items():
                np.testing.assert_array_equal(values, stats[name], err_msg=f"{fields} {name}")

    def silent(z: Tensor, hook: Any) -> Tensor:
        return z.index_fill(2, torch.tensor([2]), 0.0)

    by_hook = llama.bridge.run_with_hooks(ids, fwd_hooks=[("blocks.1.attn.hook_z", silent)])
    ablated = interp.ablate(llama, PAIRS, sites, using="zero", show_progress=False).frame()["patched"]
    with llama.edited(AttentionEdit(layers=1, heads=[2], gate=0.0)):
        assert torch.equal(llama(ids), by_hook)
        gated = interp.patch(llama, PAIRS, sites, show_progress=False).frame()["clean"]
    np.testing.assert_allclose(gated, ablated, atol=1e-6)  # a whole forward, and packed rows
    with llama.edited(AttentionEdit(keys=[1, 2], queries=-1, gain=0.0)):
        gain = llama(ids)
    with llama.edited(AttentionEdit(keys=[1, 2], queries=-1, knockout=True)):
        assert torch.equal(llama(ids), gain)


def test_bad_edits_are_refused_before_a_forward(llama: interp.Model) -> None:
    wrong: Any = (
        ([AttentionEdit(heads=[99], gate=0.0)], SiteError, "the model has heads 0 to"),
        ([AttentionEdit(layers=17, gate=0.0)], SiteError, "the model has layers 0 to"),
        (["cut"], InterpError, "takes AttentionEdits"),
    )
    for edits, error, message in wrong:
        with pytest.raises(error, match=message), llama.edited(*edits):
            pass
    clashing: Any = (
        ({"keys": 1, "gain": 0.5}, {"keys": 1, "gain": 0.5, "renormalise": False}, "before .* and after the softmax"),
        ({"counterfactual": "uniform"}, {"counterfactual": "reversed", "queries": -1}, "replace the weights"),
        ({"gate": 0.5}, {"replacement": torch.zeros(1)}, "replace and gate the output"),
    )
    for first, second, message in clashing:
        with pytest.raises(InterpError, match=message), llama.edited(AttentionEdit(**first), AttentionEdit(**second)):
            interp.patch(llama, PAIRS, llama.sites("z"))
        for engine in ("auto", "naive"):
            with pytest.raises(InterpError, match=message), llama.edited(AttentionEdit(**first)):
                interp.edit(llama, PAIRS, AttentionEdit(**second), engine=engine, show_progress=False)
    hooks = dict(llama.bridge.original_model._forward_pre_hooks)
    with llama.edited(AttentionEdit(queries=50, gate=0.0)), pytest.raises(PromptError, match=r"pair 0: .* position 50"):
        interp.patch(llama, PAIRS, llama.sites("z"))
    assert llama.instrument.edited is None and llama.bridge.original_model._forward_pre_hooks == hooks


def test_blocks_nest_and_leave_nothing_behind(llama: interp.Model) -> None:
    ids = torch.tensor([llama.coder.encode(PAIRS[0].clean)])
    a, b = AttentionEdit(keys=1, gain=0.5), AttentionEdit(queries=-1, temperature=2.0)
    plain = llama(ids)
    with llama.edited(a, b):
        both = llama(ids)
    with llama.edited(a):
        outer = llama(ids)
        with pytest.raises(ZeroDivisionError), llama.edited(b):
            assert torch.equal(llama(ids), both)
            assert llama.provenance()["edited"] == [a.text, b.text]
            raise ZeroDivisionError
        assert torch.equal(llama(ids), outer)
        assert llama.provenance()["edited"] == [a.text]
    assert torch.equal(llama(ids), plain) and "edited" not in llama.provenance()


def test_edits_that_count_all_keys_are_exact_where_an_earlier_row_is_read(llama: interp.Model) -> None:
    sites = llama.sites("z", heads=1, positions=[1, 2])

    def both(recipe: Any, *arguments: Any) -> list[Any]:
        options: Any = {"metric": "logprob", "at": 3, "show_progress": False}
        return [recipe(llama, PAIRS, *arguments, engine=e, **options).frame()["patched"] for e in ("auto", "naive")]

    np.testing.assert_allclose(*both(interp.edit, *COUNTING), atol=1e-6)
    with llama.edited(*COUNTING):
        np.testing.assert_allclose(*both(interp.patch, sites), atol=1e-6)


def test_queries_of_the_prompt_are_refused_for_decoding_alone() -> None:
    with pytest.raises(InterpError, match="leave queries out"):
        AttentionEdit(queries=-1, keys=0, knockout=True, phase="decoding")
