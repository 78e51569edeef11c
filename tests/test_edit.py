"""Attention edits of a model, against dense attention inside an untouched Hugging Face model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from architectures import EVERY
from torch import Tensor

import interp
from interp import AttentionEdit
from interp.doctor.families.text import tiny_hf

PAIRS = [
    interp.PromptPair(f"w{a} w5 w{b} w6 w7 w2", "w8 w5 w9 w6 w7 w2", "w95", "w96", {"start": (0, 5)})
    for a, b in ((1, 3), (2, 4))
]
KEYS, QUERIES = ["start", -4], [-3, -1]  # of the six words: keys 0, 1, 2, queries 3, 5
SMALLEST = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class Dense:
    """One edit by hand. Each function gets a tensor [batch, heads, queries, keys], and where the edit acts."""

    fields: dict[str, Any]
    logits: Callable[[Tensor], Tensor] | None = None  # before masks
    scores: Callable[[Tensor], Tensor] | None = None  # after masks
    weights: Callable[[Tensor, Tensor], Tensor] | None = None  # of (weights, visible cells); whole rows
    cells: Callable[[Tensor], Tensor] | None = None  # weights of the edit's cells
    row: Callable[[Tensor], Tensor] | None = None  # whole rows, which sum to 1 even beside a learned sink
    tempered: Callable[[Tensor], Tensor] | None = None  # whole rows of masked scores, and learned sinks
    output: Callable[[Tensor], Tensor] | None = None


def uniform(p: Tensor, seen: Tensor) -> Tensor:
    return seen / seen.sum(-1, keepdim=True)


def reverse(p: Tensor, seen: Tensor) -> Tensor:
    new = (p.amax(-1, keepdim=True) - p) * seen
    total = new.sum(-1, keepdim=True)
    return torch.where(total > 0, new / total.clamp_min(1e-30), p)


def look_at_itself(p: Tensor, seen: Tensor) -> Tensor:
    return torch.eye(p.shape[-1], dtype=p.dtype).expand_as(p)


def give_to_the_last_two(p: Tensor, seen: Tensor) -> Tensor:
    """Words 0 and 1 keep a quarter; words 3 and 4 get the rest in proportion, where they are seen."""
    new, take, give = p.clone(), slice(-6, -4), slice(-3, -1)
    new[..., take] *= 0.25
    received = p[..., give].sum(-1, keepdim=True)
    new[..., give] += 0.75 * p[..., take].sum(-1, keepdim=True) * p[..., give] / received.clamp_min(1e-30)
    return torch.where(received > 0, new, p)


def given_row(p: Tensor) -> Tensor:
    """Word 2 has 0.7, word 3 has 0.3: both queries see them in every window."""
    new = torch.zeros_like(p)
    new[..., -4:-2] = torch.tensor([0.7, 0.3])
    return new


def gate_by_query(z: Tensor) -> Tensor:
    gates = torch.ones(z.shape[2], 1)
    gates[[-3, -1], 0] = torch.tensor([0.25, -0.5])
    return gates * z


def mix(x: int) -> int:
    """MurmurHash3's finaliser of x + 0x9E3779B9, in 32 bits."""
    x = (x + 0x9E3779B9) % 2**32
    x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
    x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
    return x ^ (x >> 16)


def hashes(heads: int, n: int, seed: int) -> Tensor:
    """The documented hash of (seed, batch row 0, head, query, key)."""
    of_head = [mix(head ^ mix(0 ^ mix(seed))) for head in range(heads)]
    return torch.tensor(
        [[[mix(mix(key) ^ mix(query ^ state)) for key in range(n)] for query in range(n)] for state in of_head]
    )


def at_random(p: Tensor, seen: Tensor) -> Tensor:
    u = seen * ((hashes(p.shape[1], p.shape[-1], seed=5) // 2**9).to(p) + 0.5) / 2**23
    return u / u.sum(-1, keepdim=True)


def shuffle(p: Tensor, seen: Tensor) -> Tensor:
    """Of the visible keys, the k-th gets the weight of the one with the k-th smallest hash."""
    new, word = torch.zeros_like(p), hashes(p.shape[1], p.shape[-1], seed=6)
    for b, h, i in np.ndindex(*p.shape[:3]):
        keys = seen[b, h, i].nonzero()[:, 0].tolist()
        new[b, h, i, keys] = p[b, h, i, sorted(keys, key=lambda j: word[h, i, j].item())]
    return new


VECTOR = 0.3
CASES = {
    "knockout": Dense({"keys": KEYS, "knockout": True}, scores=lambda z: torch.full_like(z, SMALLEST)),
    "gain 0": Dense({"keys": KEYS, "gain": 0.0}, scores=lambda z: torch.full_like(z, SMALLEST)),
    "gain": Dense({"keys": KEYS, "gain": 2.5}, scores=lambda z: z + np.log(2.5)),
    "gain after": Dense({"keys": KEYS, "gain": 2.5, "renormalise": False}, cells=lambda p: 2.5 * p),
    "knockout after": Dense({"keys": KEYS, "knockout": True, "renormalise": False}, cells=lambda p: 0 * p),
    "bias": Dense({"keys": KEYS, "bias": -1.5}, scores=lambda z: z - 1.5),
    "factor": Dense({"keys": KEYS, "logit_factor": 2.0}, logits=lambda z: 2 * z),
    "raise": Dense({"keys": KEYS, "logit_raise": 0.5}, logits=lambda z: z + 0.5 * z.abs()),
    "gate": Dense({"gate": 0.25}, output=lambda z: 0.25 * z),
    "replacement": Dense({"replacement": VECTOR, "gate": 0.5}, output=lambda z: 0.5 * z + 0.5 * VECTOR),
    "uniform": Dense({"counterfactual": "uniform"}, weights=uniform),
    "reversed": Dense({"counterfactual": "reversed"}, weights=reverse),
    "temperature": Dense({"temperature": 2.5}, tempered=lambda z: z / 2.5),
    "random": Dense({"counterfactual": "random", "seed": 5}, weights=at_random),
    "shuffled": Dense({"counterfactual": "shuffled", "seed": 6}, weights=shuffle),
    "identity": Dense({"counterfactual": "identity"}, weights=look_at_itself),
    "weights": Dense({"weights": {-4: 0.7, -3: 0.3}}, row=given_row),
    "gates of heads": Dense({"gate": torch.tensor([[0.25]])}, output=lambda z: 0.25 * z),
    "gates of queries": Dense({"gate": torch.tensor([[0.25, -0.5]])}, output=gate_by_query),
    "redistribution": Dense(
        {"take": "start", "give": [-3, -2], "keep_fraction": 0.25}, weights=give_to_the_last_two
    ),
}  # fmt: skip


@contextmanager
def attention_by_hand(hf: Any, case: Dense, layer: int, head: int) -> Iterator[None]:
    """Compute one head's attention with the edit, in the queries of `QUERIES`; everything else as eager does."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    def attend(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None = None,
        softcap: float | None = None, s_aux: Tensor | None = None, **rest: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        n, groups = q.shape[2], q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        z = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
        softcap = getattr(module, "attn_logit_softcapping", None) if softcap is None else softcap
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        rows = torch.zeros(q.shape[1], n, 1, dtype=torch.bool)
        rows[head, [n - 3, n - 1]] = getattr(module, "layer_idx", None) == layer
        columns = torch.zeros(n, dtype=torch.bool)
        columns[[n - 6, n - 5, n - 4]] = True
        acts = rows & columns
        z = z if case.logits is None else torch.where(acts, case.logits(z), z)
        visible = torch.ones(n, n).tril().bool() if mask is None else mask[..., :n] > SMALLEST / 2
        z = (z if mask is None else z + mask[..., :n]).masked_fill(~visible, SMALLEST)
        z = z if case.scores is None else torch.where(acts, case.scores(z), z)
        columns_and_sink = z if s_aux is None else torch.cat([z, s_aux.view(1, -1, 1, 1).expand(*z.shape[:3], 1)], -1)
        if case.tempered is not None:
            columns_and_sink = torch.where(rows, case.tempered(columns_and_sink), columns_and_sink)
        p = columns_and_sink.softmax(-1)[..., :n]
        if case.weights is not None:
            total = p.sum(-1, keepdim=True)
            p = torch.where(rows, total * case.weights(p / total, visible.to(p).expand_as(p)), p)
        p = p if case.cells is None else torch.where(acts, case.cells(p), p)
        p = p if case.row is None else torch.where(rows, case.row(p), p)
        out = p @ v
        out = out if case.output is None else torch.where(rows, case.output(out), out)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("by_hand", attend)
    AttentionMaskInterface.register("by_hand", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    hf.set_attn_implementation("by_hand")
    yield


OWN_ATTENTION = {"gpt_neo": ".attn.attention", "gptj": ".attn", "bloom": ".self_attention", "mpt": ".attn",
                 "falcon": ".self_attention", "falcon_grouped": ".self_attention",
                 "falcon_alibi": ".self_attention"}  # fmt: skip


@contextmanager
def softmax_by_hand(hf: Any, case: Dense, layer: int, head: int, attention: str) -> Iterator[None]:
    """Change what enters and leaves one attention module's own softmax: families that compute attention themselves."""
    functional: Any = torch.nn.functional
    inside: list[Any] = []
    softmax, attention_of_torch = functional.softmax, functional.scaled_dot_product_attention

    def edited(z: Tensor, dim: int | None = None, dtype: torch.dtype | None = None, **rest: Any) -> Tensor:
        if not inside:
            return softmax(z, dim=dim, dtype=dtype, **rest)
        inside.append(z)
        n = z.shape[-1]
        rows = torch.zeros(z.shape[1], n, 1, dtype=torch.bool)
        rows[head, [n - 3, n - 1]] = True
        columns = torch.zeros(n, dtype=torch.bool)
        columns[[n - 6, n - 5, n - 4]] = True
        seen = ((z > SMALLEST / 2) & torch.ones(n, n).tril().bool()).to(z)
        z = z if case.scores is None else torch.where(rows & columns, case.scores(z), z)
        z = z if case.tempered is None else torch.where(rows, case.tempered(z), z)
        p = softmax(z, dim=-1)
        if case.weights is not None:
            p = torch.where(rows, case.weights(p, seen), p)
        p = p if case.row is None else torch.where(rows, case.row(p), p)
        return p if case.cells is None else torch.where(rows & columns, case.cells(p), p)

    def attend(
        q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *, is_causal: bool, **_: Any
    ) -> Tensor:
        z = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        hidden = ~torch.ones(z.shape[-2:]).tril().bool() if is_causal else torch.zeros(z.shape[-2:]).bool()
        z = z.masked_fill(hidden, SMALLEST) + (0 if attn_mask is None else attn_mask)
        return edited(z, dim=-1) @ v

    (module,) = (m for name, m in hf.named_modules() if name.endswith(f".{layer}{attention}"))
    handles = [
        module.register_forward_pre_hook(lambda *_: inside.append(None)),
        module.register_forward_hook(lambda *_: inside.clear()),
    ]
    functional.softmax, functional.scaled_dot_product_attention = edited, attend
    try:
        yield
    finally:
        functional.softmax, functional.scaled_dot_product_attention = softmax, attention_of_torch
        for handle in handles:
            handle.remove()


def edit_of(case: Dense, layer: int, head: int, n_heads: int = 4) -> AttentionEdit:
    fields = dict(case.fields)
    if isinstance(gate := fields.get("gate"), Tensor):  # those of other heads do not act
        fields["gate"] = torch.full((n_heads, gate.shape[1]), 9.0)
        fields["gate"][head] = gate[0]
        fields["gate"] = fields["gate"][:, 0] if gate.shape[1] == 1 else fields["gate"]
    if "replacement" in fields:
        fields["replacement"] = torch.full((1,), fields["replacement"])  # every channel
    return AttentionEdit(queries=QUERIES, layers=layer, heads=[head], **fields)


@pytest.mark.parametrize("family", EVERY)
def test_every_field_equals_dense_attention_in_an_untouched_model(word_tokenizer, family: str) -> None:
    model, hf = interp.load(tiny_hf(family), tokenizer=word_tokenizer), tiny_hf(family)
    try:
        if family not in OWN_ATTENTION:
            hf.set_attn_implementation("eager")
    except (ValueError, NotImplementedError):
        pytest.skip(f"{family} does not use transformers' attention interface")
    layer, head = model.attention_layers[-1], model.n_heads - 1
    own = OWN_ATTENTION.get(family)
    cases = {k: c for k, c in CASES.items() if own is None or not (c.logits or c.output)}
    edits = {name: edit_of(case, layer, head, model.n_heads) for name, case in cases.items()}
    for engine in ("auto", "naive"):
        frame = interp.edit(model, PAIRS, edits, engine=engine, show_progress=False).frame()
        frame = frame.sort_values("example")
        for name, case in cases.items():
            by_hand = attention_by_hand(hf, case, layer, head)
            if own is not None:
                by_hand = softmax_by_hand(hf, case, layer, head, own)
            rows: Any = frame[frame["component"] == name]
            with torch.no_grad(), by_hand:
                ids = torch.tensor([model.coder.encode(p.clean) for p in PAIRS])
                logits = hf(input_ids=ids).logits[:, -1]
            answer, foil = (model.coder.continuation(x)[0] for x in ("w95", "w96"))
            expected = (logits[:, answer] - logits[:, foil]).numpy()
            np.testing.assert_allclose(rows["patched"], expected, atol=1e-5, err_msg=f"{family} {name} {engine}")
            if (family, name) != ("gpt_neo", "redistribution"):  # its window hides the words that lose weight
                assert bool((rows["raw"].abs() > 1e-7).any()), (family, name)


def patched(effects: interp.Effects) -> np.ndarray:
    frame = effects.frame().sort_values(["example", "layer", "head", "component"], kind="stable")
    return frame["patched"].to_numpy()


@pytest.mark.parametrize("family", EVERY)
def test_extreme_edits_are_ablations_and_neutral_ones_nothing_to_the_bit(word_tokenizer, family: str) -> None:
    model = interp.load(tiny_hf(family).to(torch.float32), tokenizer=word_tokenizer)
    layer = model.attention_layers[-1]
    sites = model.sites("z", layers=layer)
    in_rows = [f"z.L{layer}H1@{row}" for row in (2, 3, -1)]
    closed = AttentionEdit(layers=layer, gate=0.0)
    with_another = AttentionEdit(layers=layer, heads=[1], queries=[2, 3, -1], gate=0.0, gain=2.0)
    neutral: Any = {name: {name: 1.0} for name in ("gain", "logit_factor", "temperature", "gate")}
    neutral |= {name: {name: 0.0} for name in ("bias", "logit_raise")}
    neutral["moves nothing"] = {"take": 1, "give": 2, "keep_fraction": 1.0}
    neutral["after"] = {"gain": 1.0, "renormalise": False}
    neutral["replaces nothing"] = {"gate": 1.0, "replacement": torch.ones(1)}
    for engine in ("auto", "naive"):
        options: Any = {"engine": engine, "show_progress": False}
        ablated = interp.ablate(model, PAIRS, sites, using="zero", **options)
        np.testing.assert_array_equal(
            patched(interp.edit(model, PAIRS, closed, each="head", **options)), patched(ablated)
        )
        ablated = interp.ablate(model, PAIRS, groups={"rows": in_rows}, using="zero", **options)
        np.testing.assert_array_equal(
            patched(interp.edit(model, PAIRS, {"rows": with_another}, **options)), patched(ablated)
        )
        cut = interp.knock_out(model, PAIRS, "start", layers=layer, window=1, metric="logit_diff", **options)
        cuts: Any = ({"knockout": True}, {"gain": 0.0})
        for fields in cuts:
            cells = AttentionEdit(queries=-1, keys="start", layers=layer, **fields)
            np.testing.assert_array_equal(patched(interp.edit(model, PAIRS, cells, **options)), patched(cut))
        edits = {name: AttentionEdit(**fields) for name, fields in neutral.items()}
        frame = interp.edit(model, PAIRS, edits, **options).frame()
        np.testing.assert_array_equal(frame["patched"], frame["clean"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_of_half_precision_have_the_same_edits_within_their_rounding(word_tokenizer, dtype: torch.dtype) -> None:
    model, hf = interp.load(tiny_hf("llama").to(dtype), tokenizer=word_tokenizer), tiny_hf("llama").to(dtype).float()
    layer, head = model.attention_layers[0], 1
    edits = {name: edit_of(case, layer, head) for name, case in CASES.items()}
    ids = torch.tensor([model.coder.encode(p.clean) for p in PAIRS])
    answer, foil = (model.coder.continuation(x)[0] for x in ("w95", "w96"))
    allowed = 8 * torch.finfo(dtype).eps  # of logits that are smaller than 2
    for engine in ("auto", "naive"):
        options: Any = {"engine": engine, "show_progress": False}
        frame: Any = interp.edit(model, PAIRS, edits, **options).frame().sort_values("example")
        kl: Any = interp.edit(model, PAIRS, edits, metric="token_kl", at="each", **options).frame()
        before = kl["patched"][kl["read_at"].astype(int) < 4]  # no edit reaches it
        assert 0 <= before.max() < 1e-3 < kl["patched"].max()
        for name, case in CASES.items():
            with torch.no_grad(), attention_by_hand(hf, case, layer, head):
                logits = hf(input_ids=ids).logits[:, -1]
            rows = frame[frame["component"] == name]["patched"]
            np.testing.assert_allclose(rows, logits[:, answer] - logits[:, foil], atol=allowed, err_msg=name)
