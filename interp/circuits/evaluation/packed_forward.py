"""Run several circuits on several prompts at once, with the engine.

Only the rows and layers that can differ are computed. The computation is that of
`interp.circuits.evaluation.ablated_forward`, with three savings, each of them exact for causal decoders:

* Before the first token in which the prompts differ, clean and ablated activations are the same, and so are those of
  any circuit. For these positions the keys and values of the clean run are read, and no rows are computed.
* Two circuits with the same edges into all receivers of the first layers compute the same there. A circuit can continue
  the recorded run of another (`RecordedRun`) from the first layer in which they differ. The outputs of earlier senders
  are then the same for all such circuits, and are summed once for circuits that read them through the same edges.
* All circuits and prompts, of any length, are packed in one hidden state (`interp.engine.packed_forward`).

Rows are packed prompt by prompt, and within a prompt circuit by circuit. The senders' changes (ablated − current) are
ordered circuit by circuit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.circuits.evaluation import ablated_forward
from interp.circuits.evaluation.ablated_forward import Forward
from interp.circuits.wiring import Wiring
from interp.engine import Run
from interp.engine.final_logits import compute_final_logits
from interp.engine.packed_forward import PackedForward
from interp.engine.packing import Group, Piece, lay_out
from interp.engine.runs import Frame
from interp.model.hooks import hooks


@dataclass(frozen=True)
class Prompts:
    """Clean runs of prompts, and senders' ablated outputs in their rows.

    The rows are those from ``starts`` on. ``ablated``: by hook, [rows of all prompts, …], or the same for all rows.
    """

    runs: Sequence[Run]
    starts: Sequence[int]
    ablated: dict[str, Tensor]
    frame: Frame

    @property
    def lengths(self) -> list[int]:
        """Number of rows of each prompt that can differ."""
        return [len(run) - start for run, start in zip(self.runs, self.starts, strict=True)]


@dataclass(frozen=True)
class RecordedRun:
    """The run of one circuit, which others can continue.

    ``streams``: the inputs of all blocks and the output of the last; ``changes``: those of every sender.
    """

    streams: list[Float[Tensor, "rows d_model"]]
    changes: Float[Tensor, "senders rows*d_model"]


def slim(run: Run, start: int) -> Run:
    """The parts of a clean run that circuits read.

    These are block 0's input from a row on, and keys and values before that row.
    """
    keys, values = ([x[:, :start].clone() for x in by_layer] for by_layer in (run.keys, run.values))
    return replace(run, resid=run.resid[:1, start:].clone(), keys=keys, values=values, acts={})


def rows_that_fit(wiring: Wiring, first: int, most: int, times: int = 1) -> int:
    """Number of rows of circuits × prompts that can run together.

    ``first``: the layer from which on they run. At most ``most``, and as many as keep the senders' changes within
    ``times`` × `HELD_BYTES`.
    """
    width = len(wiring.graph.senders) - senders_before(wiring, first)
    size = width * wiring.model.bridge.cfg.d_model * torch.finfo(wiring.model.dtype).bits // 8
    return min(most, times * ablated_forward.HELD_BYTES // max(size, 1))


def senders_before(wiring: Wiring, layer: int) -> int:
    """Number of senders that are computed before a layer.

    Layer n_layers stands for the logits.
    """
    graph = wiring.graph
    return len(graph.senders) if layer == graph.n_layers else graph.columns(layer, "z").start if layer else 0


@torch.no_grad()
def record_circuit(wiring: Wiring, prompts: Prompts, mask: Bool[Tensor, "receivers senders"]) -> RecordedRun:
    """Run a circuit, and record the run for others to continue."""
    forward = _CircuitsForward(wiring, prompts, mask[None], None, 0, record=True)
    forward.logits()
    assert forward.changes is not None
    return RecordedRun(forward.block_streams, forward.changes)


@torch.no_grad()
def run_circuits(
    wiring: Wiring,
    prompts: Prompts,
    masks: Bool[Tensor, "circuits receivers senders"],
    since: RecordedRun | None = None,
    first: int = 0,
) -> Float[Tensor, "circuits prompts vocab"]:
    """`run_circuit` for every circuit in ``masks`` and every prompt, in one forward.

    ``since``: the run of a circuit with the same edges into all receivers before layer ``first`` (n_layers: before the
    logits). The number of rows must not exceed `rows_that_fit`.
    """
    return _CircuitsForward(wiring, prompts, masks, since, first).logits()


class _CircuitsForward(Forward):
    """A `Forward` of several circuits and prompts.

    ``cut`` and ``uncut`` have circuits on their last axis. ``n_recorded``: how many senders come before layer
    ``first``; their changes are read from ``since``.
    """

    def __init__(
        self,
        wiring: Wiring,
        prompts: Prompts,
        masks: Bool[Tensor, "circuits receivers senders"],
        since: RecordedRun | None,
        first: int,
        record: bool = False,
    ) -> None:
        super().__init__(wiring, masks[0], prompts.ablated)
        allowed = torch.from_numpy(self.graph.allowed)
        self.cut, self.uncut = ((allowed & mask).permute(1, 2, 0) for mask in (~masks, masks))
        self.prompts, self.since, self.first, self.record = prompts, since, first, record
        self.n_recorded = 0 if since is None else senders_before(wiring, first)
        self.n, self.block_streams = len(masks), []
        device = wiring.model.device
        blocks: Iterable[Tensor] = torch.arange(self.n * sum(prompts.lengths), device=device).split(
            [self.n * rows for rows in prompts.lengths]
        )
        # packed rows in the order circuit by circuit, and the place of each packed row in that order
        self.order: Int[Tensor, " rows"] = torch.cat([b.view(self.n, -1) for b in blocks], 1).flatten()
        self.place = torch.argsort(self.order)

    def logits(self) -> Float[Tensor, "circuits prompts vocab"]:
        """Run the forward; logits of the last position."""
        model, last = self.wiring.model, self.graph.n_layers - 1
        lengths = self.prompts.lengths
        if self.since is None:
            entering = torch.cat([run.resid[0] for run in self.prompts.runs])
        else:
            entering = self.since.streams[self.first]
        hidden = [part.expand(self.n, -1, -1) for part in entering.split(lengths)]
        pieces = [
            Piece(Group(run, start), list(range(self.n)), start, len(run), [part])
            for run, start, part in zip(self.prompts.runs, self.prompts.starts, hidden, strict=True)
        ]
        packed = lay_out(pieces)
        self.changes = packed.new_zeros(len(self.graph.senders) - self.n_recorded, packed.numel())
        self.sum = packed.new_zeros(packed.numel())
        forward = PackedForward(model, self.prompts.runs, (), self.prompts.frame)
        with hooks(model, *self._hooks(range(self.first, last + 1))):
            for layer in range(self.first, last + 1):
                packed = forward.run_block(layer, pieces, packed, lambda call: forward.attend(call, pieces))
        if self.record:
            self.block_streams.append(packed)
        read = self._final_stream(packed[None])[0]
        ends = self.place.new_tensor(lengths).cumsum(0) - 1
        by_circuit = read[self.order].view(self.n, -1, read.shape[-1])[:, ends]
        return compute_final_logits(model, by_circuit.flatten(0, 1)).unflatten(0, (self.n, len(lengths)))

    # ------------------------------------------------------------ outputs of senders

    def _enter(self, layer: int) -> Any:
        embed = self._sender("blocks.0.hook_resid_pre", slice(0, 1), None)

        def hook(x: Tensor, hook: Any) -> None:
            if layer == 0 and not self.n_recorded:
                embed(x, hook)
            if self.record:
                self.block_streams.append(x[0])
            self.current[f"blocks.{layer}.hook_resid_pre"], self.streams, self.sum_before = x, None, self.sum

        return hook

    def _sender(self, name: str, columns: slice, layer: int | None) -> Any:
        shifted = slice(columns.start - self.n_recorded, columns.stop - self.n_recorded)

        def hook(x: Tensor, hook: Any) -> None:
            self.current[name] = x
            if self.changes is not None and (self.record or self.cut[:, columns].any()):
                self.changes[shifted] = self._change(name, layer).flatten(1)
                self.sum = self.sum + self.changes[shifted].sum(0)

        return hook

    def _change(self, name: str, layer: int | None) -> Float[Tensor, "senders circuits rows d_model"]:
        current = self.current[name][0][self.order]
        change = self.ablated[name] - current.unflatten(0, (self.n, -1))
        return change[None] if layer is None else self.wiring.contributions(layer, change)

    # ------------------------------------------------------------ inputs of receivers

    def _add_changes(
        self, x: Tensor, rows: slice, last_layer: int, total: Tensor
    ) -> Float[Tensor, "rows 1 packed d_model"]:
        assert self.changes is not None
        stop = 1 if last_layer < 0 else self.graph.columns(last_layer, "mlp_out" if self.graph.mlps else "z").stop
        added = self._sum_own(rows, slice(self.n_recorded, stop), self.changes, total)
        if self.since is not None and self.n_recorded:
            added = added + self._sum_recorded(rows)
        by_row = added.view(len(added), len(self.order), -1)[:, self.place]
        return x + by_row[:, None]

    def _sum_own(self, rows: slice, columns: slice, changes: Tensor, total: Tensor) -> Float[Tensor, "rows numbers"]:
        """For each receiver, the sum of the changes of its cut senders in this run.

        ``total``: the sum for all senders.
        """
        if columns.stop <= columns.start:
            return total.expand(rows.stop - rows.start, -1)
        uncut, cut = self.uncut[rows, columns], self.cut[rows, columns]
        senders = uncut.transpose(0, 1).flatten(1).any(1).nonzero()[:, 0]
        if 2 * len(senders) > uncut.shape[1]:
            return self._sum(cut, changes[: uncut.shape[1]])
        if len(senders) == 0:
            return total.expand(len(uncut), -1)
        return total - self._sum(uncut[:, senders], changes[senders.to(changes.device)])

    def _sum_recorded(self, rows: slice) -> Float[Tensor, "rows numbers"]:
        """The same for the recorded senders, whose outputs are the same in all circuits."""
        assert self.since is not None
        changes, cut = self.since.changes[: self.n_recorded], self.cut[rows, : self.n_recorded]
        if self.n > 1 and bool((cut == cut[..., :1]).all()):
            cut = cut[..., :1]
        sums = cut.transpose(1, 2).flatten(0, 1).to(changes) @ changes
        return sums.view(len(cut), -1, changes.shape[1]).expand(-1, self.n, -1).flatten(1)

    def _sum(
        self, cut: Bool[Tensor, "rows senders circuits"], change: Float[Tensor, "senders ..."]
    ) -> Float[Tensor, "rows numbers"]:
        by_circuit = change.reshape(change.shape[0], self.n, -1).transpose(0, 1)
        return torch.bmm(cut.permute(2, 0, 1).to(change), by_circuit).transpose(0, 1).flatten(1)
