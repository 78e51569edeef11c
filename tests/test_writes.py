"""Writes of activations as cells of `interp.edit`, against hooks on an untouched Hugging Face model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch
from architectures import of_kind
from test_edit import CASES, OWN_ATTENTION, PAIRS, attention_by_hand, edit_of, softmax_by_hand
from torch import Tensor

import interp
from interp import AttentionEdit, AttentionMask, Write
from interp.doctor.families.text import tiny_hf
from interp.errors import InterpError

Change = Callable[[Tensor], Tensor]


@pytest.fixture(scope="module")
def llama(word_tokenizer: Any) -> interp.Model:
    return interp.load(tiny_hf("llama"), tokenizer=word_tokenizer)


def into_block(hf: Any, layer: int, change: Change) -> Any:
    """Change the residual stream in front of a block, [batch, position, d_model]."""
    (blocks,) = (m for m in hf.modules() if isinstance(m, torch.nn.ModuleList) and len(m) > 1)

    def hook(module: Any, args: Any, kwargs: Any) -> Any:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    return blocks[layer].register_forward_pre_hook(hook, with_kwargs=True)


def at_rows(rows: list[int], make: Change) -> Change:
    """A change of some positions."""

    def change(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, rows] = make(x[:, rows])
        return x

    return change


def differences(model: interp.Model, hf: Any, prompts: list[str]) -> np.ndarray:
    with torch.no_grad():
        logits = hf(input_ids=torch.tensor([model.coder.encode(p) for p in prompts])).logits[:, -1]
    answer, foil = (model.coder.continuation(x)[0] for x in ("w95", "w96"))
    return (logits[:, answer] - logits[:, foil]).numpy()


@pytest.mark.parametrize("family", of_kind("decoder", "hybrid"))
def test_writes_and_edits_of_one_name_equal_hooks(word_tokenizer: Any, family: str) -> None:
    model, hf = interp.load(tiny_hf(family), tokenizer=word_tokenizer), tiny_hf(family)
    if family not in OWN_ATTENTION:
        hf.set_attn_implementation("eager")
    layer, head, width = model.attention_layers[-1], model.n_heads - 1, model.d_model
    row, rows = torch.linspace(-1, 1, width), torch.linspace(-2, 1, 2 * width).view(2, width)
    site, end = f"resid_pre.L{layer}", f"resid_post.L{layer - 1}"
    writes = {
        "set": (Write(site, "start", set=row), at_rows([-6, -5], lambda x: row.to(x).expand_as(x))),
        "add": (Write(f"{end}@-2", add=row), at_rows([-2], lambda x: x + row.to(x))),
        "apart": (Write(site, [-1, -4], add=rows), at_rows([-4, -1], lambda x: x + rows.to(x))),
    }
    case, own = CASES["weights"], OWN_ATTENTION.get(family)
    edit = edit_of(case, layer, head, model.n_heads)
    edits = {**{name: [w] for name, (w, _) in writes.items()}, "with an edit": [writes["apart"][0], edit]}
    changes = {**{name: c for name, (_, c) in writes.items()}, "with an edit": writes["apart"][1]}
    for engine in ("auto", "naive"):
        frame: Any = interp.edit(model, PAIRS, edits, engine=engine, show_progress=False).frame()
        for name, change in changes.items():
            with ExitStack() as stack:
                stack.callback(into_block(hf, layer, change).remove)
                if name == "with an edit":
                    by_hand = attention_by_hand(hf, case, layer, head)
                    stack.enter_context(by_hand if own is None else softmax_by_hand(hf, case, layer, head, own))
                expected = differences(model, hf, [p.clean for p in PAIRS])
            if own is None:
                hf.set_attn_implementation("eager")
            patched = frame[frame["component"] == name].sort_values("example")
            np.testing.assert_allclose(patched["patched"], expected, atol=1e-5, err_msg=f"{family} {name} {engine}")
            if (family, name) != ("gpt_neo", "set"):  # its window hides the first words
                assert bool((patched["raw"].abs() > 1e-7).any()), (family, name)


HEADS = {"z": "self_attn.o_proj", "mlp_post": "mlp.down_proj"}  # whose input is set
OUTPUTS = {"k": "self_attn.k_proj", "v": "self_attn.v_proj", "mlp_out": "mlp"}  # whose output is set


@pytest.mark.parametrize("mode", ["noise", "denoise"])
def test_writes_inside_a_block_equal_hooks(llama: interp.Model, mode: Any) -> None:
    hf = tiny_hf("llama")
    hf.set_attn_implementation("eager")
    block, size = hf.model.layers[1], llama.d_model // 4
    vector, token = torch.linspace(-1, 1, size), [-1, -3]
    writes = {
        "a z": Write("z.L1H2", token, set=vector), "a k": Write("k.L1H1", token, add=vector),
        "a v": Write("v.L1H0", token, set=0.25), "a mlp_out": Write("mlp_out.L1", token, add=-0.5),
        "a mlp_post": Write("mlp_post.L1N3", token, set=2.0),
    }  # fmt: skip

    def by_hand(write: Write) -> Any:
        component, first = write.address.component, 3 if write.address.head == 3 else size * (write.address.head or 0)
        last = {"mlp_post": 4, "mlp_out": None}.get(component, first + size)

        def change(x: Tensor) -> Tensor:
            x = x.clone()
            value: Any = write.value
            part = x[:, sorted(token), first:last]
            x[:, sorted(token), first:last] = value + (part if write.how == "add" else 0 * part)
            return x

        if component in HEADS:
            return block.get_submodule(HEADS[component]).register_forward_pre_hook(lambda m, a: (change(a[0]),))
        return block.get_submodule(OUTPUTS[component]).register_forward_hook(lambda m, a, out: change(out))

    for engine in ("auto", "naive"):
        frame: Any = interp.edit(llama, PAIRS, writes, mode=mode, engine=engine, show_progress=False).frame()
        for name, write in writes.items():
            handle = by_hand(write)
            expected = differences(llama, hf, [p.clean if mode == "noise" else p.corrupt for p in PAIRS])
            handle.remove()
            patched = frame[frame["component"] == name].sort_values("example")
            np.testing.assert_allclose(patched["patched"], expected, atol=1e-5, err_msg=f"{name} {engine}")
            assert (patched["raw"].abs() > 1e-7).any(), name
            assert set(patched["layer"]) == {1}


def test_an_activation_set_to_its_own_value_changes_no_bit(llama: interp.Model) -> None:
    pair = PAIRS[0]
    _, cache = llama.run_with_cache(torch.tensor([llama.coder.encode(pair.clean)]))
    writes: dict[str, Any] = {"nothing added": Write("mlp_out.L1", add=0.0)}
    for text in ("resid_pre.L1", "resid_post.L2", "q.L1H3", "v.L1H1", "z.L0H2", "mlp_post.L1N5"):
        site = interp.Site.parse(text)
        value = cache[site.hook_name][0]
        own = value if site.head is None else value[:, site.head]  # of a neuron: one number for each token
        writes[f"own {site}"] = Write(site, set=own[:, None] if own.ndim == 1 else own)
    for engine in ("auto", "naive"):
        frame = interp.edit(llama, pair, writes, engine=engine, show_progress=False).frame()
        np.testing.assert_array_equal(frame["raw"], 0, err_msg=engine)


def test_a_write_acts_with_a_mask_and_under_other_edits(llama: interp.Model) -> None:
    write, mask = Write("z.L1H2", "start", set=0.0), AttentionMask(close=[(-1, 0)])
    with llama.edited(AttentionEdit(keys=1, gain=0.5)):
        frames = [
            interp.edit(llama, PAIRS, {"a": [write, mask], "b": write}, engine=e, show_progress=False).frame()
            for e in ("auto", "naive")
        ]
        ablated = interp.ablate(llama, PAIRS, "z.L1H2@start", using="zero", show_progress=False).frame()
        masked = interp.edit(llama, PAIRS, {"b": write}, show_progress=False)
    np.testing.assert_allclose(frames[0]["patched"], frames[1]["patched"], atol=1e-6)
    np.testing.assert_array_equal(masked.frame()["patched"], ablated["patched"])
    assert masked.provenance["intervention"] == "write" and masked.provenance["engine"] == "packed, exact"
    assert masked.provenance["edits"] == {"b": ["site=z.L1H2 tokens=start set=0"]}


def test_different_tensors_have_different_provenance(llama: interp.Model) -> None:
    hashes = []
    for x in (1.0, 2.0):
        effects = interp.edit(llama, PAIRS[0], Write("z.L1H2", set=torch.full((8,), x)), show_progress=False)
        hashes.append(effects.provenance["edits"]["edit"])
    assert hashes[0] != hashes[1] and hashes[0][0].startswith("site=z.L1H2 set=<8:")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "give one of set=… .* and add=…"),
        ({"set": 0, "add": 1}, "give one of set=… .* and add=…"),
        ({"site": "z.L1H2@1", "tokens": 2, "set": 0}, "names a position, and tokens=2 too"),
        ({"tokens": "each", "set": 0}, "'each' is a sweep"),
        ({"set": "a"}, "a number, or a tensor"),
        ({"set": True}, "a number, or a tensor"),
        ({"add": float("nan")}, "a finite number expected"),
        ({"add": torch.tensor([1.0, torch.inf])}, "finite numbers expected"),
        ({"set": torch.ones(1, 2, 3)}, r"of shape \[1, 2, 3\]"),
        ({"set": []}, r"of shape \[0\]"),
        ({"site": 3, "set": 1}, "one site expected"),
        ({"site": "zz.L1", "set": 1}, "unknown component"),
    ],
)
def test_bad_writes_are_refused(fields: Any, message: str) -> None:
    with pytest.raises(InterpError, match=message):
        Write(**{"site": "z.L1H2", **fields})


def test_writes_that_do_not_fit_are_refused(llama: interp.Model) -> None:
    wrong: Any = (
        (Write("z.L9H2", set=0), "the model has layers 0 to"),
        (Write("z.L1H2", set=torch.ones(3)), "has shape .3., and the activation at z.L1H2 has width 8"),
        (Write("resid_pre.L1", set=torch.ones(3)), "has width 32"),
        (Write("resid_pre.L1", [0, 1], set=torch.ones(3, 32)), "values of 3 tokens, and the write acts on 2"),
        (Write("resid_pre.L1", "nothing", set=0), "names the span 'nothing'"),
        ([Write("resid_post.L0", set=0), Write("resid_pre.L1", 2, add=1)], "two writes act on resid_pre.L1 at token 2"),
        ([Write("z.L1H2", add=1)] * 2, "two writes act on z.L1H2 at token 0"),
        ("z", "Writes expected"),
    )
    for engine in ("auto", "naive"):
        for writes, message in wrong:
            with pytest.raises(InterpError, match=message):
                interp.edit(llama, PAIRS, {"a": writes}, engine=engine, show_progress=False)
    with pytest.raises(InterpError, match="a write acts at its own site alone"):
        interp.edit(llama, PAIRS, Write("z.L1H2", set=0), each="head", show_progress=False)
    write: Any = Write("z.L1H2", set=0)
    with pytest.raises(InterpError, match=r"interp\.edit takes writes"), llama.edited(write):
        pass


@pytest.mark.parametrize(
    "text", ["site=z.L1H2@-1 set=0", "site=resid_pre.L1 tokens=start,-1 add=0.5", "site=embed set=1"]
)
def test_text_is_read_back(text: str) -> None:
    assert Write.parse(text).text == text
    with pytest.raises(InterpError, match="tensors are given in Python alone"):
        Write.parse(Write("z.L1H2", set=torch.ones(3)).text)


def test_writes_are_said_in_words() -> None:
    assert str(Write("z.L1H2", ["END", 3], set=0)) == "sets z.L1H2 at tokens END, 3 to 0"
    assert str(Write("resid_pre.L1@-1", add=torch.ones(3))) == "adds a tensor of [3] to resid_pre.L1 at tokens -1"
    assert repr(Write("embed", add=1)) == "Write(site=embed add=1)"
