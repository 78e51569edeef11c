"""Base runs by plain blocks: prompts of all lengths in one packed state."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from interp.engine.final_logits import compute_final_logits
from interp.engine.packed_forward import PackedForward
from interp.engine.packing import Group, Piece, lay_out
from interp.engine.plain_blocks import PlainBlock, WriterOf
from interp.engine.runs import Frame, ReadRows, Run
from interp.model.batching import TOKENS_PER_FORWARD
from interp.model.model import Model
from interp.prompts.embeddings import Embeddings
from interp.prompts.model_input import as_hashable

_Input = tuple[tuple[int, ...], Tensor | None, tuple[int, ...] | None]  # token ids, noise, and the rows that are read
# token ids; for a run with noise also its number, so that it is unique; the rows that are read
_RunKey = tuple[tuple[int, ...], int | None, tuple[int, ...] | None]


def record_with_plain_blocks(
    model: Model,
    blocks: Sequence[PlainBlock],
    frame: Frame,
    prompts: Sequence[Sequence[int]],
    components: Sequence[str] = (),
    noise: Sequence[Tensor | None] | None = None,
    read: ReadRows | None = None,
) -> list[Run]:
    """Record base runs with plain blocks, as `interp.engine.runs.record` does.

    ``frame``: recorded on prompts at least as long.  ``components``: some of `interp.engine.plain_blocks.WRITABLE`.
    """
    noises = [None] * len(prompts) if noise is None else noise
    reads: ReadRows = [None] * len(prompts) if read is None else read
    inputs = [(as_hashable(p), n, rows) for p, n, rows in zip(prompts, noises, reads, strict=True)]
    runs: dict[_RunKey, Run] = {}
    keys = [(ids, None if n is None else i, rows) for i, (ids, n, rows) in enumerate(inputs)]
    distinct = dict(zip(keys, inputs, strict=True))
    for batch in _batches(list(distinct), TOKENS_PER_FORWARD):
        batch_runs = _forward(model, blocks, frame, [distinct[key] for key in batch], components)
        runs |= dict(zip(batch, batch_runs, strict=True))
    return [runs[key] for key in keys]


def _batches(keys: list[_RunKey], rows: int) -> Iterator[list[_RunKey]]:
    """Cut prompts, in order of length, into batches of about ``rows`` tokens."""
    batch: list[_RunKey] = []
    used = 0
    for key in sorted(keys, key=lambda key: len(key[0])):
        if batch and used + len(key[0]) > rows:
            yield batch
            batch, used = [], 0
        batch.append(key)
        used += len(key[0])
    if batch:
        yield batch


def _forward(
    model: Model,
    blocks: Sequence[PlainBlock],
    frame: Frame,
    prompts: Sequence[_Input],
    components: Sequence[str],
) -> list[Run]:
    """Run one packed forward of prompts that are in order of length."""
    pieces = _pieces(model, prompts)
    forward, store = PackedForward(model, (), (), frame, blocks), _ComponentStore(components)
    packed = lay_out(pieces, forward.layout)
    resid = packed.new_empty(len(blocks) + 1, *packed.shape)
    keys, values = [], []
    for layer, block in enumerate(blocks):
        resid[layer] = packed
        q, k, v = block.project(packed, "qkv", forward.rotation(layer, pieces), store.of(layer))
        block.finish(packed, forward.attention(layer, q, k, v, pieces, pieces), store.of(layer))
        keys.append(k)
        values.append(v)
    resid[-1] = packed
    spans = [slice(p.offset + n * p.rows, p.offset + (n + 1) * p.rows) for p in pieces for n in range(len(p.cells))]
    rows = [
        [span.stop - 1] if read is None else [span.start + r for r in read]
        for (_, _, read), span in zip(prompts, spans, strict=True)
    ]
    logits = compute_final_logits(model, packed[[r for of_run in rows for r in of_run]]).split([*map(len, rows)])
    return [
        Run(
            ids, resid[:, span], logits[i] if read else logits[i][0], [k[span].transpose(0, 1) for k in keys],
            [v[span].transpose(0, 1) for v in values],
            {c: {layer: x[span] for layer, x in layers.items()} for c, layers in store.activations.items()}, noise,
            read,
        )
        for i, ((ids, noise, read), span) in enumerate(zip(prompts, spans, strict=True))
    ]  # fmt: skip


def _pieces(model: Model, prompts: Sequence[_Input]) -> list[Piece]:
    """One piece for each length: embedded tokens with their noise."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for i, (ids, _, _) in enumerate(prompts):
        by_length[len(ids)].append(i)
    pieces = []
    for length, members in by_length.items():
        hidden = _embedded(model, [prompts[i][0] for i in members])
        noises = [prompts[i][1] for i in members]
        if any(n is not None for n in noises):
            hidden = hidden + torch.stack([torch.zeros_like(hidden[0]) if n is None else n.to(hidden) for n in noises])
        no_prefix = Run((), hidden[0, :0], hidden[0, 0, :0])
        pieces.append(Piece(Group(no_prefix, 0), members, 0, length, [hidden]))
    return pieces


def _embedded(model: Model, prompts: Sequence[tuple[int, ...]]) -> Float[Tensor, "prompts position d_model"]:
    """The output of the token embedding; vectors stand there as they are."""
    if not any(isinstance(ids, Embeddings) for ids in prompts):
        return model.bridge.embed(torch.tensor([list(ids) for ids in prompts], device=model.device))
    each = [
        ids.vectors.to(model.device, model.dtype) if isinstance(ids, Embeddings) else _embedded(model, [ids])[0]
        for ids in prompts
    ]
    return model.bridge.embed.hook_out(torch.stack(each))


class _ComponentStore:
    """Stores the activations that a plain block shows to its writers.

    It takes the place of writes.
    """

    def __init__(self, components: Sequence[str]):
        self.activations: dict[str, dict[int, Float[Tensor, "rows ..."]]] = {
            c: {} for c in components if c not in ("resid_pre", "resid_post")
        }

    def of(self, layer: int) -> WriterOf:
        """The writers of one layer, as `PlainBlock` takes them."""

        def writer_of(component: str) -> _StoringWriter | None:
            by_layer = self.activations.get(component)
            return None if by_layer is None else _StoringWriter(by_layer, layer)

        return writer_of


class _StoringWriter:
    def __init__(self, by_layer: dict[int, Tensor], layer: int):
        self.by_layer, self.layer = by_layer, layer

    def put_(self, x: Tensor, headed: bool) -> None:
        """Store ``x``.

        What is not ``headed`` is copied, since the block may add to it in place.
        """
        self.by_layer[self.layer] = x if headed else x.clone()
