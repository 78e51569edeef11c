"""Attention masks of a model, against a 4-D mask handed to an untouched Hugging Face model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from architectures import EVERY
from test_edit import OWN_ATTENTION
from torch import Tensor

import interp
from interp import AttentionMask
from interp.doctor.families.text import tiny_hf
from interp.errors import InterpError

IDS = [[5, 9, 3, 7, 2, 11, 4, 8]]
N = len(IDS[0])
Q, K = torch.arange(N)[:, None], torch.arange(N)[None]  # query, key
CAUSAL = K <= Q
HALVES = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
SAME_HALF = HALVES[:, None] == HALVES
CASES = {
    "open later keys": (AttentionMask(open=[([1, 2], [4, 5])]), CAUSAL | ((Q >= 1) & (Q <= 2) & (K >= 4) & (K <= 5))),
    "close": (AttentionMask(close=[(range(5, 8), [0, 2])]), CAUSAL & ~((Q >= 5) & ((K == 0) | (K == 2)))),
    "prefix": (AttentionMask(prefix=range(4)), CAUSAL | ((Q < 4) & (K < 4))),
    "blocks": (AttentionMask(blocks=3), CAUSAL | (Q // 3 == K // 3)),
    "segments": (AttentionMask(segments=[range(4), range(4, 8)]), CAUSAL & SAME_HALF),
    "numbers": (AttentionMask(segments=HALVES.tolist()), CAUSAL & SAME_HALF),
    "sees": (AttentionMask(segments=HALVES.tolist(), sees=[(1, 0)]), CAUSAL),
    "window": (AttentionMask(window=3), CAUSAL & (Q - K < 3)),
    "stride": (AttentionMask(stride=3), CAUSAL & ((Q - K) % 3 == 0)),
    "stride with a window": (AttentionMask(stride=3, window=2), CAUSAL & (((Q - K) % 3 == 0) | (Q - K < 2))),
    "sinks under a window": (
        AttentionMask(window=2, open=[(None, [0, 1, 2])]), CAUSAL & ((Q - K < 2) | (K < 3)),
    ),
    "middle sinks": (AttentionMask(window=2, open=[(None, [1, 2])]), CAUSAL & ((Q - K < 2) | (K == 1) | (K == 2))),
}  # fmt: skip


# The last word is -1; rows are counted from the end, since not all prompts begin with <bos>.
BY_ROW: dict[str, tuple[AttentionMask, Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "open": (AttentionMask(open=[(-6, -2)]), lambda own, q, k: own | ((q == len(k.T) - 6) & (k == len(k.T) - 2))),
    "prefix": (
        AttentionMask(prefix=[-6, -5, -4]),
        lambda own, q, k: own | (((q - len(k.T)).abs() > 3) & ((k - len(k.T)).abs() > 3) & (q > len(k.T) - 7)
                                 & (k > len(k.T) - 7)),
    ),
    "close": (
        AttentionMask(close=[([-3, -1], [-6, -4])]),
        lambda own, q, k: own & ~(((q == len(k.T) - 3) | (q == len(k.T) - 1))
                                  & ((k == len(k.T) - 6) | (k == len(k.T) - 4))),
    ),
    "sinks under a window": (
        AttentionMask(window=2, open=[(None, [0, 1, 2])]),
        lambda own, q, k: ((q - k >= 0) & (q - k < 2)) | ((k < 3) & (k <= q)),
    ),
    "blocks": (AttentionMask(blocks=2), lambda own, q, k: own | (q // 2 == k // 2)),
    "stride": (AttentionMask(stride=2), lambda own, q, k: own & ((q - k) % 2 == 0)),
}  # fmt: skip
PAIRS = [
    interp.PromptPair(f"w{a} w5 w{b} w6 w7 w2", "w8 w5 w9 w6 w7 w2", "w95", "w96", {"start": (0, 5)})
    for a, b in ((1, 3), (2, 4))
]


@contextmanager
def masked_by_hand(hf: Any, see: Callable[[Tensor, Tensor, Tensor], Tensor], layer: int) -> Iterator[None]:
    """Replace what the queries of one layer see; everything else as eager attention does it."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    smallest = torch.finfo(torch.float32).min

    def attend(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None = None,
        softcap: float | None = None, s_aux: Tensor | None = None, **rest: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        n, groups = q.shape[2], q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        z = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
        softcap = getattr(module, "attn_logit_softcapping", None) if softcap is None else softcap
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        seen = torch.ones(n, n).tril().bool().expand(q.shape[0], 1, n, n)
        if mask is not None:
            seen = seen & (mask[..., :n, :n] > smallest / 2)
        if getattr(module, "layer_idx", None) == layer:
            seen = see(seen, torch.arange(n)[:, None], torch.arange(n)[None])
        z = z.masked_fill(~seen, smallest)
        if s_aux is not None:
            z = torch.cat([z, s_aux.view(1, -1, 1, 1).expand(*z.shape[:3], 1)], -1)
        return (z.softmax(-1)[..., :n] @ v).transpose(1, 2).contiguous(), None

    AttentionInterface.register("masked_by_hand", attend)
    AttentionMaskInterface.register("masked_by_hand", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    hf.set_attn_implementation("masked_by_hand")
    yield


WITH_ONE_INTERFACE = [f for f in EVERY if (f if isinstance(f, str) else f.values[0]) not in OWN_ATTENTION]


@pytest.mark.parametrize("family", WITH_ONE_INTERFACE)
def test_cells_of_masks_in_one_layer_equal_those_by_hand(word_tokenizer, family: str) -> None:
    """Also under the windows, caps and sinks of a family's own attention."""
    model, hf = interp.load(tiny_hf(family), tokenizer=word_tokenizer), tiny_hf(family)
    try:
        hf.set_attn_implementation("eager")
    except (ValueError, NotImplementedError):
        pytest.skip(f"{family} does not use transformers' attention interface")
    layer = model.attention_layers[0]
    masks = {name: replace(mask, layers=layer) for name, (mask, _) in BY_ROW.items()}
    later = {name: masks.pop(name) for name in ("open", "prefix", "blocks")}  # these take full forwards, others do not
    frames: list[Any] = [interp.edit(model, PAIRS, part, show_progress=False).frame() for part in (later, masks)]
    frame = pd.concat(frames).sort_values("example")
    answer, foil = (model.coder.continuation(x)[0] for x in ("w95", "w96"))
    ids = torch.tensor([model.coder.encode(p.clean) for p in PAIRS])
    for name, (_, see) in BY_ROW.items():
        with torch.no_grad(), masked_by_hand(hf, see, layer):
            logits = hf(input_ids=ids).logits[:, -1]
        expected = (logits[:, answer] - logits[:, foil]).numpy()
        got = frame[frame["component"] == name]["patched"]
        np.testing.assert_allclose(got, expected, atol=1e-5, err_msg=f"{family} {name}")


def test_masks_and_edits_of_one_name_act_at_once(tiny) -> None:
    model = tiny("llama")
    both = [AttentionMask(window=2), interp.AttentionEdit(queries=-1, keys=0, gain=0.5)]
    cells = interp.edit(model, PAIRS, {"both": both, "alone": AttentionMask(window=2)}, at=[-2, -1])
    with model.edited(*both):
        inside = interp.edit(model, PAIRS, {"nothing": interp.AttentionEdit(gain=1.0)}, at=[-2, -1]).frame()
    got: Any = cells.frame()
    np.testing.assert_allclose(got[got["component"] == "both"]["patched"], inside["clean"], atol=1e-6)
    assert cells.provenance["engine"] == "packed, exact"
    with pytest.raises(InterpError, match="acts on all heads"):
        interp.edit(model, PAIRS, {"window": AttentionMask(window=2)}, each="head")
    assert len(interp.edit(model, PAIRS, AttentionMask(window=2), each="layer").frame()) == 2 * model.n_layers


def all_logits(model: interp.Model) -> torch.Tensor:
    with torch.no_grad():
        return model.bridge.original_model(input_ids=torch.tensor(IDS)).logits


def logits_by_hand(hf, visible: torch.Tensor) -> torch.Tensor:
    mask = torch.zeros(1, 1, N, N).masked_fill(~visible, torch.finfo(torch.float32).min)
    with torch.no_grad():
        return hf(input_ids=torch.tensor(IDS), attention_mask=mask).logits


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox", "gptj", "gpt_neo", "mpt", "falcon", "falcon_grouped"])
def test_every_rule_equals_a_mask_handed_to_an_untouched_model(word_tokenizer, family: str) -> None:
    model, hf = interp.load(tiny_hf(family), tokenizer=word_tokenizer), tiny_hf(family)
    if family not in OWN_ATTENTION:
        hf.set_attn_implementation("eager")
    for name, (mask, visible) in CASES.items():
        if family == "gpt_neo" and bool((visible & ~CAUSAL).any() or "sinks" in name):
            continue  # its layers hide by buffers of their own too, which no mask handed to it opens
        with model.edited(mask):
            ours = all_logits(model)
        torch.testing.assert_close(ours, logits_by_hand(hf, visible), atol=1e-5, rtol=0, msg=f"{family} {name}")


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_stays_hidden(word_tokenizer, side: str) -> None:
    model = interp.load(tiny_hf("llama"), tokenizer=word_tokenizer)
    pad, real = [1, 1], [1] * N
    ids = [*pad, *IDS[0]] if side == "left" else [*IDS[0], *pad]
    padding = [0, 0, *real] if side == "left" else [*real, 0, 0]
    rows = slice(2, None) if side == "left" else slice(0, N)
    positions = torch.arange(N + 2)[None] - (2 if side == "left" else 0)
    for name, (mask, _) in CASES.items():
        with model.edited(mask), torch.no_grad():
            alone = all_logits(model)[0]
            padded = model.bridge.original_model(
                input_ids=torch.tensor([ids]),
                attention_mask=torch.tensor([padding]),
                position_ids=positions.clamp(min=0),
            ).logits[0, rows]
        torch.testing.assert_close(padded, alone, atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("mask", [
    AttentionMask(window=N), AttentionMask(blocks=1), AttentionMask(open=[(range(4, 8), range(4))]),
    AttentionMask(segments=[range(8)]), AttentionMask(open=[(None, [0, 1, 2])]), AttentionMask(stride=1),
    AttentionMask(close=[([0, 1], [5, 6])]),
])  # fmt: skip
def test_a_mask_equal_to_the_models_own_changes_no_bit(word_tokenizer, mask: AttentionMask) -> None:
    model = interp.load(tiny_hf("llama"), tokenizer=word_tokenizer)
    plain = all_logits(model)
    with model.edited(mask):
        assert torch.equal(all_logits(model), plain)


def test_a_query_that_sees_no_key_gives_zero(word_tokenizer) -> None:
    model = interp.load(tiny_hf("llama"), tokenizer=word_tokenizer)
    with model.edited(AttentionMask(close=[([3], None)])):
        _, cache = model.run_with_cache(torch.tensor(IDS))
    assert not cache["blocks.0.attn.hook_z"][0, 3].any()
    assert cache["blocks.0.attn.hook_z"][0, 4].any()


@pytest.mark.parametrize("engine", ["auto", "naive"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_patch_under_a_mask_that_opens_the_future_equals_hooks(word_tokenizer, family: str, engine: Any) -> None:
    """The patched token comes after the token that reads it, and the metric is read before and after both."""
    model, hf = interp.load(tiny_hf(family), tokenizer=word_tokenizer), tiny_hf(family)
    hf.set_attn_implementation("eager")
    pair = interp.PromptPair("w1 w5 w2 w6 w7 w2", "w1 w5 w2 w6 w9 w2", "w95", "w96")
    clean, corrupt = (torch.tensor([model.coder.encode(text)]) for text in (pair.clean, pair.corrupt))
    n = clean.shape[1]
    with model.edited(AttentionMask(open=[([1], [n - 2])])):
        effects: Any = interp.patch(model, pair, [f"resid_pre.L1@{n - 2}"], engine=engine, at="each").frame()
    visible = torch.ones(n, n).tril().bool().triu(1 - (getattr(hf.config, "sliding_window", None) or n))
    visible[1, n - 2] = True
    mask = torch.zeros(1, 1, n, n).masked_fill(~visible, torch.finfo(torch.float32).min)
    with torch.no_grad():
        source = hf(clean, attention_mask=mask, output_hidden_states=True).hidden_states[1][:, n - 2]

        def put(_module: Any, args: Any) -> Any:
            x = args[0].clone()
            x[:, n - 2] = source
            return (x, *args[1:])

        handle = hf.model.layers[1].register_forward_pre_hook(put)
        logits = hf(corrupt, attention_mask=mask).logits[0]
        handle.remove()
    answer, foil = (model.coder.continuation(x)[0] for x in ("w95", "w96"))
    got = effects.sort_values("read_at", key=lambda x: x.astype(int))["patched"]
    np.testing.assert_allclose(got, (logits[:, answer] - logits[:, foil]).numpy(), atol=1e-5)
    assert effects.set_index("read_at")["raw"]["1"] != 0


@pytest.mark.parametrize("text", [
    "open=image>question,*>0+1 layers=0-3", "segments=doc1,doc2,0-3 sees=1>0", "segments=0/0/1/1 window=4",
    "prefix=image future=true open=*>1", "blocks=4 stride=2", "close=a:last>*",
])  # fmt: skip
def test_text_is_read_back(text: str) -> None:
    mask = AttentionMask.parse(text)
    assert AttentionMask.parse(mask.text).text == mask.text
    assert str(mask).endswith("layers 0–3" if "layers" in text else "layers all")


@pytest.mark.parametrize(("fields", "message"), [
    ({}, "changes nothing"), ({"window": 0}, "at least 1"), ({"open": "image"}, "pairs"),
    ({"sees": [(0, 1)], "window": 2}, "segments= is not set"), ({"segments": [0, "a"]}, "either spans"),
    ({"segments": ["a", "b"], "sees": [(0, 2)]}, "0 to 1"), ({"window": 2, "future": True}, "future"),
])  # fmt: skip
def test_bad_masks_are_refused(fields, message: str) -> None:
    with pytest.raises(interp.InterpError, match=message):
        AttentionMask(**fields)
