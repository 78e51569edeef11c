"""Several circuits run at once on several prompts, by the engine: only rows and layers that can differ are computed.

What `interp.circuits.evaluation.ablated_forward` does, with three things saved, each of them exact for causal decoders:

* positions at which clean and ablated activations are the same, before the first token in which the prompts differ, are
  those of the clean run in any circuit: its keys and values are read, and no rows computed;
* a circuit with the edges of another into all receivers of the first layers does the same there: it goes on from the
  first layer in which they differ, from what the other's run has come to (`Recorded`). What earlier senders send is
  then the same for all such circuits, and is summed once for those that read it alike;
* all circuits and prompts, of any length, lie packed in one hidden state (`interp.engine.packed_forward`).

Rows are packed prompt by prompt, and within a prompt circuit by circuit; what senders change is held circuit by
circuit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.circuits.evaluation import ablated_forward as running
from interp.circuits.evaluation.ablated_forward import Forward
from interp.circuits.wiring import Wiring
from interp.engine import Run
from interp.engine.packed_forward import PackedForward, compute_final_logits
from interp.engine.packing import Group, Piece, lay_out
from interp.engine.runs import Frame
from interp.model.hooks import hooks


@dataclass(frozen=True)
class Prompts:
    """Clean runs of some prompts, and what senders send along ablated edges in their rows from ``starts`` on.

    ``ablated``: by hook [rows of all prompts, …], or alike for all rows.
    """

    runs: Sequence[Run]
    starts: Sequence[int]
    ablated: dict[str, Tensor]
    frame: Frame

    @property
    def lengths(self) -> list[int]:
        """Rows of each prompt that can differ."""
        return [len(run) - start for run, start in zip(self.runs, self.starts, strict=True)]


@dataclass(frozen=True)
class Recorded:
    """What one circuit's run has come to: ``streams`` enter each block, the last one leaves them; ``held`` is ablated −
    current of what every sender adds."""

    streams: list[Float[Tensor, "rows d_model"]]
    held: Float[Tensor, "senders rows*d_model"]


def slim(run: Run, start: int) -> Run:
    """What is read of a clean run: what enters block 0 from a row on, and keys and values before it."""
    keys, values = ([x[:, :start].clone() for x in kept] for kept in (run.keys, run.values))
    return replace(run, resid=run.resid[:1, start:].clone(), keys=keys, values=values, acts={})


def rows_that_fit(wiring: Wiring, first: int, most: int, times: int = 1) -> int:
    """How many rows of circuits × prompts go through together from layer ``first`` on: ``most``, or as many as leave
    what senders change within `HELD_BYTES` (or so many ``times`` that)."""
    width = len(wiring.graph.senders) - senders_before(wiring, first)
    size = width * wiring.model.bridge.cfg.d_model * torch.finfo(wiring.model.dtype).bits // 8
    return min(most, times * running.HELD_BYTES // max(size, 1))


def senders_before(wiring: Wiring, layer: int) -> int:
    """How many senders are computed before a layer; layer n_layers is that of the logits."""
    graph = wiring.graph
    return len(graph.senders) if layer == graph.n_layers else graph.columns(layer, "z").start if layer else 0


@torch.no_grad()
def record_circuit(wiring: Wiring, prompts: Prompts, kept: Bool[Tensor, "receivers senders"]) -> Recorded:
    """A circuit's run, for others to go on from."""
    forward = _Packed(wiring, prompts, kept[None], None, 0, record=True)
    forward.logits()
    assert forward.held is not None
    return Recorded(forward.streams, forward.held)


@torch.no_grad()
def run_circuits(
    wiring: Wiring,
    prompts: Prompts,
    kept: Bool[Tensor, "circuits receivers senders"],
    since: Recorded | None = None,
    first: int = 0,
) -> Float[Tensor, "circuits prompts vocab"]:
    """`run_circuit` for every circuit in ``kept`` and every prompt, in one forward.

    ``since``: the run of a circuit that has the same edges into all receivers before layer ``first`` (n_layers: before
    the logits). Only as many rows as `rows_that_fit` says may be asked for.
    """
    return _Packed(wiring, prompts, kept, since, first).logits()


class _Packed(Forward):
    """``cut`` and ``kept`` have circuits on their last axis. ``known``: senders whose outputs ``since`` holds."""

    def __init__(
        self,
        wiring: Wiring,
        prompts: Prompts,
        kept: Bool[Tensor, "circuits receivers senders"],
        since: Recorded | None,
        first: int,
        record: bool = False,
    ) -> None:
        super().__init__(wiring, kept[0], prompts.ablated)
        allowed = torch.from_numpy(self.graph.allowed)
        self.cut, self.kept = ((allowed & mask).permute(1, 2, 0) for mask in (~kept, kept))
        self.prompts, self.since, self.first, self.record = prompts, since, first, record
        self.known = 0 if since is None else senders_before(wiring, first)
        self.n, self.streams = len(kept), []
        device = wiring.model.device
        blocks: Iterable[Tensor] = torch.arange(self.n * sum(prompts.lengths), device=device).split(
            [self.n * rows for rows in prompts.lengths]
        )
        # numbers of packed rows, circuit by circuit; and where each packed row stands there
        self.order: Int[Tensor, " rows"] = torch.cat([b.view(self.n, -1) for b in blocks], 1).flatten()
        self.place = torch.argsort(self.order)

    def logits(self) -> Float[Tensor, "circuits prompts vocab"]:
        """Of the last position."""
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
        self._hold(packed)
        forward = PackedForward(model, self.prompts.runs, (), self.prompts.frame)
        with hooks(model, *self._hooks(range(self.first, last + 1))):
            for layer in range(self.first, last + 1):
                packed = forward.run_block(layer, pieces, packed, lambda call: forward.attend(call, pieces))
        if self.record:
            self.streams.append(packed)
        read = self._logits_read(packed[None])[0]
        ends = self.place.new_tensor(lengths).cumsum(0) - 1
        by_circuit = read[self.order].view(self.n, -1, read.shape[-1])[:, ends]
        return compute_final_logits(model, by_circuit.flatten(0, 1)).unflatten(0, (self.n, len(lengths)))

    # ------------------------------------------------------------ what senders send

    def _hold(self, packed: Tensor) -> None:
        self.held = packed.new_zeros(len(self.graph.senders) - self.known, packed.numel())
        self.sum = packed.new_zeros(packed.numel())

    def _enter(self, layer: int) -> Any:
        keep = self._keep("blocks.0.hook_resid_pre", slice(0, 1), None)

        def hook(x: Tensor, hook: Any) -> None:
            if layer == 0 and not self.known:
                keep(x, hook)
            if self.record:
                self.streams.append(x[0])
            self.now[f"blocks.{layer}.hook_resid_pre"], self.reads, self.sum_before = x, None, self.sum

        return hook

    def _keep(self, name: str, columns: slice, layer: int | None) -> Any:
        here = slice(columns.start - self.known, columns.stop - self.known)

        def hook(x: Tensor, hook: Any) -> None:
            self.now[name] = x
            if self.held is not None and (self.record or self.cut[:, columns].any()):
                self.held[here] = self._change(name, layer).flatten(1)
                self.sum = self.sum + self.held[here].sum(0)

        return hook

    def _change(self, name: str, layer: int | None) -> Float[Tensor, "senders circuits rows d_model"]:
        now = self.now[name][0][self.order]
        change = self.ablated[name] - now.unflatten(0, (self.n, -1))
        return change[None] if layer is None else self.wiring.contributions(layer, change)

    # ------------------------------------------------------------ what receivers read

    def _add(self, x: Tensor, rows: slice, upto: int, total: Tensor) -> Float[Tensor, "rows 1 packed d_model"]:
        assert self.held is not None
        stop = 1 if upto < 0 else self.graph.columns(upto, "mlp_out" if self.graph.mlps else "z").stop
        more = self._of_all(rows, slice(self.known, stop), self.held, total)
        if self.since is not None and self.known:
            more = more + self._of_known(rows)
        by_row = more.view(len(more), len(self.order), -1)[:, self.place]
        return x + by_row[:, None]

    def _of_all(self, rows: slice, columns: slice, held: Tensor, total: Tensor) -> Float[Tensor, "rows numbers"]:
        """For each receiver, the sum of what the cut ones among some senders change: ``total`` is that of all."""
        if columns.stop <= columns.start:
            return total.expand(rows.stop - rows.start, -1)
        here, cut = self.kept[rows, columns], self.cut[rows, columns]
        some = here.transpose(0, 1).flatten(1).any(1).nonzero()[:, 0]
        if 2 * len(some) > here.shape[1]:
            return self._sum(cut, held[: here.shape[1]])
        if len(some) == 0:
            return total.expand(len(here), -1)
        return total - self._sum(here[:, some], held[some.to(held.device)])

    def _of_known(self, rows: slice) -> Float[Tensor, "rows numbers"]:
        """The same of senders before the first layer, which send the same in all circuits."""
        assert self.since is not None
        held, cut = self.since.held[: self.known], self.cut[rows, : self.known]
        if self.n > 1 and bool((cut == cut[..., :1]).all()):
            cut = cut[..., :1]
        found = cut.transpose(1, 2).flatten(0, 1).to(held) @ held
        return found.view(len(cut), -1, held.shape[1]).expand(-1, self.n, -1).flatten(1)

    def _sum(
        self, cut: Bool[Tensor, "rows senders circuits"], change: Float[Tensor, "senders ..."]
    ) -> Float[Tensor, "rows numbers"]:
        by_circuit = change.reshape(change.shape[0], self.n, -1).transpose(0, 1)
        return torch.bmm(cut.permute(2, 0, 1).to(change), by_circuit).transpose(0, 1).flatten(1)
