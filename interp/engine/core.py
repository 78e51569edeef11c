"""Engine: runs a sweep's cells in batches, packed or one by one.

It checks itself first.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.engine import naive
from interp.engine import packed_forward as packed
from interp.engine.base_runs import record_with_plain_blocks
from interp.engine.budget import Budget, as_bytes
from interp.engine.cells import Cell, CellWrite
from interp.engine.matmul import redirect_products
from interp.engine.plain_blocks import WRITABLE, PlainBlock, has_fixed_rotary, read_plain_blocks
from interp.engine.planner import PLANNING
from interp.engine.runs import Frame, ReadRows, ReadRun, Run, join_logits, read_logits, record, small_enough
from interp.engine.site_checks import ResultHooks, check_sites
from interp.engine.verified import Verified, VerifiedFrame, kinds_of
from interp.errors import InterpError, SiteError
from interp.model.batching import TOKENS_PER_FORWARD
from interp.model.buffers import buffer_state
from interp.model.layer_edits import LayerEdit
from interp.model.layer_progress import Share, by_layer
from interp.model.model import Model
from interp.model.session import in_session
from interp.sites import Site
from interp.utils.out_of_memory import is_out_of_memory
from interp.utils.progress import Advance

log = logging.getLogger("interp")

EngineKind = Literal["auto", "fast", "naive"]
Score = Callable[[Tensor, Sequence[int]], Tensor]  # (logits [cells, vocab or columns], cell numbers) -> [cells]

ROWS_PER_BATCH = 4096  # packed token rows per forward: fills the matrix products, keeps memory at ~100 MB
LOGITS_PER_BATCH = 256  # cells whose full logits exist at the same time
ENOUGH_TOKENS = 4  # a check on a prompt of so many tokens holds for all prompts
OPENS_LATER = "an attention mask shows tokens what comes after them"
CHECK_TOLERANCE = 1e-3  # relative to the logits' scale; float32 rounding is far below


class Engine:
    """Runs cells on one model.

    ``kind``: ``"fast"`` (packed); ``"naive"`` (one full forward per cell: the oracle); or ``"auto"``, which is fast
    where that is exact and else naive, with the cause in ``reason`` and in the log. ``memory``: bytes (or ``"4GiB"``)
    that a sweep may take besides the model's weights; batches are cut to fit.
    """

    def __init__(self, model: Model, kind: EngineKind = "auto", memory: int | str | None = None):
        if kind not in ("auto", "fast", "naive"):
            raise InterpError(f"unknown engine {kind!r}: use 'auto', 'fast' or 'naive'")
        if model.stacks:
            raise SiteError(
                f"{model.name} is an encoder–decoder: a site names a layer and a position of one stack, and it has "
                "three, on two sequences. Patch it by hooks: model.bridge.hooks(fwd_hooks=[('decoder_blocks.1."
                "cross_attn.hook_z', edit)]) around model.bridge.original_model(…)"
            )
        self.model, self.kind = model, kind
        self.frame = Frame()
        self.reason: str | None = "asked for" if kind == "naive" else None
        self.budget = Budget(model, as_bytes(memory))
        self.rows_per_batch, self.cells_per_batch = ROWS_PER_BATCH, LOGITS_PER_BATCH
        self.plain_blocks: list[PlainBlock] | None = None
        self.written: set[str] = set()  # components that cells have changed
        self.needs_full_forwards: str | None = None  # why a recipe's cells cannot be packed
        self.planner = PLANNING.get()  # inside `explain`, cells are recorded instead of run

    @property
    def fast(self) -> bool:
        """Whether cells run packed (final after the first `record`)."""
        return self.reason is None

    def describe(self) -> str:
        """How cells are run, for provenance."""
        return "packed, exact" if self.fast else f"one full forward per cell ({self.reason})"

    def provenance(self) -> dict[str, str]:
        """How cells were run, and what a reader must know of the components that they changed."""
        return {"engine": self.describe(), **self.model.head_axes.told(self.written)}

    def count_answered(self, n: int) -> int:
        """Count cells that a recipe answers from base runs by itself.

        Returns their number.
        """
        if self.planner is not None:
            self.planner.unasked += n
        return n

    def fit_batches_to_memory(self, longest: int, held: float) -> None:
        """Limit batches to the budget, next to ``held`` bytes of base runs.

        ``longest``: tokens of the longest base run. Raises InterpError if not even one cell fits.
        """
        self.budget.check(longest, held)
        self.rows_per_batch, self.cells_per_batch = self.budget.batch(held, ROWS_PER_BATCH, LOGITS_PER_BATCH)

    def check_sites(self, sites: Sequence[Site]) -> None:
        """Raise SiteError, before any work, for sites that this model lacks."""
        check_sites(self.model, sites)
        if self.fast and any(s.component == "embed" for s in sites):
            self._decide("what lies between the embedding and block 0 (norms, scales) is run only by full forwards")

    @in_session
    @torch.no_grad()
    def record(
        self,
        prompts: Sequence[Sequence[int]],
        components: Sequence[str] = (),
        noise: Sequence[Tensor | None] | None = None,
        keep_kv: bool = False,
        read: ReadRows | None = None,
    ) -> list[Run]:
        """Record base runs of the prompts, with the components that are needed.

        ``keep_kv``: store keys and values even where cells are full forwards, which do not need them. ``read``: the
        rows of each prompt whose logits are read, of the run and of cells in it (None: the last).
        """
        if (edited := self.model.instrument.edited) is not None and edited.opens_later(prompts):
            self.needs_full_forwards = OPENS_LATER
        if self.fast:
            self._decide(self._obstacle())
        if self.fast:
            self.plain_blocks = None if Verified.of(self.model).plain_blocks_differ else read_plain_blocks(self.model)
            if self.plain_blocks and self._can_use_plain_runs(max(map(len, prompts)), components):
                plain = self.plain_blocks
                return record_with_plain_blocks(self.model, plain, self.frame, prompts, components, noise, read)
        with self._extra_hooks(components):
            if self.kind == "naive":
                return record(self.model, prompts, components, noise, self.frame, keep_kv, read)
            with redirect_products(self.model.dtype, self.model.device):
                runs = record(self.model, prompts, components, noise, self.frame, read=read)
        if self.fast:
            self._decide(packed.why_not_packed(self.model, self.frame))
        if self.fast and self.plain_blocks:
            self._check_base(max(runs, key=len))
            if self.plain_blocks and self._can_use_plain_runs(max(map(len, prompts)), components):
                del runs  # these would differ from those of later calls by rounding
                return record_with_plain_blocks(
                    self.model, self.plain_blocks, self.frame, prompts, components, noise, read
                )
        return runs

    def _obstacle(self) -> str | None:
        """Why the model's current state, not its structure, rules out packed forwards.

        Returns None if it does not.
        """
        if self.needs_full_forwards is not None:
            return self.needs_full_forwards
        if self.model.hooks_added():
            return "hooks were added to the model, which may read or change other positions"
        return None

    def unpackable(self) -> str | None:
        """Why this model cannot be run packed; None if it can.

        The answer does not depend on ``kind``; it is final after a `record`.
        """
        if self.kind != "naive":
            return self.reason
        return self._obstacle() or packed.why_not_packed(self.model, self.frame)

    def _can_use_plain_runs(self, longest: int, components: Sequence[str]) -> bool:
        """Whether plain blocks can compute base runs.

        They can if they were verified on this model with a frame of prompts as long.
        """
        verified = Verified.of(self.model).plain_base_runs
        if self.model.instrument.edited is not None:
            return False  # its prompts do not know their edits
        if verified is None or verified.setting != self._setting() or verified.frame.length < longest:
            return False
        self.frame = verified.frame
        return set(components) <= WRITABLE

    def _setting(self) -> str:
        """What a recorded frame depends on: buffers (rotary frequencies), the config, and where the model is."""
        model = self.model
        hf = model.bridge.original_model
        return f"{model.device} {model.dtype} {buffer_state(hf)} {vars(hf.config)}"

    def _check_base(self, run: Run) -> None:
        """Allow plain blocks for later base runs if they reproduce this one.

        The model itself has computed ``run``.
        """
        assert self.plain_blocks is not None
        if not has_fixed_rotary(self.model) or self.model.instrument.edited is not None:
            return
        (plain_run,) = record_with_plain_blocks(
            self.model, self.plain_blocks, self.frame, [run.ids], (), [run.noise], [run.read]
        )
        pairs = zip(plain_run.tensors(), replace(run, acts={}).tensors(), strict=True)
        if all((a - b).abs().max().item() <= CHECK_TOLERANCE * max(b.abs().max().item(), 1.0) for a, b in pairs):
            Verified.of(self.model).plain_base_runs = VerifiedFrame(self._setting(), self.frame)
        else:
            self.plain_blocks = None
            Verified.of(self.model).plain_blocks_differ = True

    @in_session
    @torch.no_grad()
    def score(
        self,
        runs: Sequence[Run],
        cells: Sequence[Cell],
        score: Score,
        advance: Advance,
        columns: Int[Tensor, "runs k"] | None = None,
        width: int | None = None,
    ) -> Float[Tensor, "cells ..."]:
        """Compute ``score`` of the logits of every cell's rows that are read, in order.

        Calls ``advance(n)`` as layers of a batch of cells are finished, with shares of the cells. ``columns``: for each
        run, the token ids of the only logits that ``score`` reads; it then receives only those. ``width``: how many
        values ``score`` gives for a cell (None: one, without an axis). The rows of a run that holds several
        (`Run.read`) come one after the other, cell after cell.
        """
        shape = (len(cells),) if width is None else (len(cells), width)
        if self.planner is not None:
            self.planner.add(self, runs, cells, None if columns is None else columns.shape[1])
            return torch.zeros(shape, dtype=torch.float64)
        values = torch.full(shape, float("nan"), dtype=torch.float64)
        components = {w.site.component for c in cells for w in c.writes}
        self.written |= components
        with self._extra_hooks(tuple(components)):
            if self.fast and self._counts_keys_after_read(runs, cells):
                self._decide("edits that divide by the number of all keys read rows before the last one")
            if self.fast and not all(self.cannot_reach_logits(runs, c) for c in cells):
                self._check(runs, cells)
            for batch in self.batches(runs, cells, None if columns is None else columns.shape[1]):
                share = Share(advance, len(batch))
                values[batch] = self._run(runs, cells, batch, score, columns, share)
                share.to(1.0)
        return values

    def _counts_keys_after_read(self, runs: Sequence[Run], cells: Sequence[Cell]) -> bool:
        """Whether an edit depends on the number of all keys, and packed cells only hold those before a row read."""
        edited = self.model.instrument.edited
        for cell in cells:
            run = runs[cell.run]
            if run.read_rows[-1] + 1 < len(run):
                base = [] if edited is None else [e for edits in edited.of_prompt(run.ids).values() for e in edits]
                if any(isinstance(e, LayerEdit) and e.counts_keys for e in (*cell.edits, *base)):
                    return True
        return False

    @in_session
    @torch.no_grad()
    def score_prompts(
        self, runs: Sequence[Run], prompts: Sequence[tuple[int, ...]], score: Score, advance: Advance,
        read: ReadRows | None = None, width: int | None = None,
    ) -> Tensor:  # fmt: skip
        """Compute ``score`` of prompts that are cells by themselves, in order: [prompts], or [prompts, width].

        Each takes a full forward. ``runs``: the base runs with which they are compared.  ``read``: the rows of each
        whose logits are read (None: the last).
        """
        shape, reads = (len(prompts),) if width is None else (len(prompts), width), read or [None] * len(prompts)
        values = torch.full(shape, float("nan"), dtype=torch.float64)
        if self.planner is not None:
            self.planner.add(self, runs, (), None)
            self.planner.whole += map(len, prompts)
            self.planner.more_read += sum(len(rows) - 1 for rows in reads if rows is not None)
            return values.zero_()
        for same_length in self.prompt_batches([len(p) for p in prompts]):
            for batch in small_enough(same_length, prompts, reads):
                with by_layer(self.model, advance, len(batch)):
                    logits = read_logits(self.model, [prompts[i] for i in batch], [reads[i] for i in batch])
                    values[batch] = score(join_logits(logits), batch).cpu().double()
        return values

    def prompt_batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Cut prompts of equal length into batches, unpadded, within the budget.

        Yields the prompts' numbers.
        """
        by_length: dict[int, list[int]] = {}
        for i, n in enumerate(lengths):
            by_length.setdefault(n, []).append(i)
        for n, numbers in by_length.items():
            step = max(1, min(self.rows_per_batch, TOKENS_PER_FORWARD) // n)
            step = min(step, self.cells_per_batch)
            yield from (numbers[i : i + step] for i in range(0, len(numbers), step))

    def _run(
        self, runs: Sequence[Run], cells: Sequence[Cell], batch: list[int], score: Score, columns: Tensor | None,
        share: Share,
    ) -> Tensor:  # fmt: skip
        """Scores of one batch; when memory runs out, of its halves one after the other."""
        batch_cells = [cells[i] for i in batch]
        cell_columns = None
        if columns is not None:
            cell_columns = columns[torch.tensor([c.run for c in batch_cells], device=columns.device)]
        try:
            if self.fast and not all(self.cannot_reach_logits(runs, c) for c in batch_cells):
                logits = self._forward(runs, batch_cells).logits(cell_columns, share.to)
            else:
                unchanged = [runs[c.run].logits for c in batch_cells]
                logits = join_logits(unchanged if self.fast else naive.run_cells(self.model, runs, batch_cells))
                if cell_columns is not None:
                    n_read = torch.tensor([len(runs[c.run].read_rows) for c in batch_cells], device=logits.device)
                    logits = logits.gather(1, cell_columns.repeat_interleave(n_read, 0))
            return score(logits, batch).cpu().double()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        if len(batch) == 1:
            raise InterpError(
                f"one cell on a prompt of {len(runs[batch_cells[0].run])} tokens does not fit into memory: use a "
                "shorter prompt, a smaller dtype or another device"
            )
        log.warning("engine: out of memory with %d cells in a batch; continuing with half as many", len(batch))
        self.rows_per_batch = max(1, self.rows_per_batch // 2)
        half = len(batch) // 2
        halves = batch[:half], batch[half:]
        return torch.cat([self._run(runs, cells, part, score, columns, share) for part in halves])

    def cannot_reach_logits(self, runs: Sequence[ReadRun], cell: Cell) -> bool:
        """Whether a cell changes nothing that is read, so that the base run answers it."""
        run = runs[cell.run]
        return self.fast and cell.cannot_reach_logits(self.model.n_layers, len(run), run.read_rows)

    def _forward(self, runs: Sequence[Run], cells: Sequence[Cell]) -> packed.PackedForward:
        is_writable = all(w.site.component in WRITABLE for c in cells for w in c.writes)
        return packed.PackedForward(self.model, runs, cells, self.frame, self.plain_blocks if is_writable else None)

    def batches(
        self, runs: Sequence[ReadRun], cells: Sequence[Cell], columns: int | None = None
    ) -> Iterator[list[int]]:
        """Cut the cells into batches within the limits on rows and logits.

        Cells are in order of (run, start). ``columns``: how many logits of a cell are read; None: all. Cells that
        cannot change anything come first, together: the base runs answer them.
        """
        most_logits = self.cells_per_batch if columns is None else float("inf")
        changing = [i for i in range(len(cells)) if not self.cannot_reach_logits(runs, cells[i])]
        unchanging = sorted(set(range(len(cells))) - set(changing))
        most_read = max((len(run.read_rows) for run in runs), default=1)
        step = max(1, self.cells_per_batch // most_read)
        for i in range(0, len(unchanging), step):
            yield unchanging[i : i + step]
        if not self.fast:
            yield from ([i] for i in changing)
            return
        batch: list[int] = []
        rows = logits = 0
        reads = [run.read_rows for run in runs]
        for i in sorted(changing, key=lambda i: (cells[i].run, cells[i].first_row)):
            read = reads[cells[i].run]
            n = read[-1] + 1 - cells[i].first_row
            if batch and (rows + n > self.rows_per_batch or logits + len(read) > most_logits):
                yield batch
                batch, rows, logits = [], 0, 0
            batch.append(i)
            rows += n
            logits += len(read)
        if batch:
            yield batch

    def _check(self, runs: Sequence[Run], cells: Sequence[Cell]) -> None:
        """Compare an unpatched run and two cells with the naive path before a sweep.

        Packing is turned off if they differ. This is done once for each model and set of components. What makes the
        packed path exact is the model's structure. A prompt of a few tokens shows all of that structure, a prompt of a
        single token shows nothing.
        """
        components = {name for cell in cells for c in cell.changes for name in kinds_of(c)}
        edited = self.model.instrument.edited
        kind = frozenset(components if edited is None else components | {f"under {name}" for name in edited.changes})
        if kind in Verified.of(self.model).packed_changes:
            return
        run = max((c.run for c in cells), key=lambda i: len(runs[i]))
        site = Site("resid_pre", 0, position=0)
        middle = (runs[run].read_rows[-1] + 1) // 2
        unpatched = Cell(run, (CellWrite(site, middle, middle + 1, runs[run].resid[0][middle : middle + 1]),))
        sample = random.Random(len(cells)).sample(list(cells), min(2, len(cells)))
        naive_logits = join_logits([runs[run].logits, *naive.run_cells(self.model, runs, sample)])
        allowed = CHECK_TOLERANCE * max(naive_logits.abs().max().item(), 1.0)
        gap = self._gap(runs, [unpatched, *sample], naive_logits)
        if self.plain_blocks and not gap <= allowed:
            self.plain_blocks = None  # e.g. bridges hold processed weights, used by its own blocks
            gap = self._gap(runs, [unpatched, *sample], naive_logits)
            Verified.of(self.model).plain_blocks_differ = True
        if not gap <= allowed:
            self._decide(f"its logits differ from the naive path by {gap:.1e} on this model")
            return
        if len(runs[run]) >= ENOUGH_TOKENS:
            Verified.of(self.model).packed_changes.add(kind)

    def _gap(self, runs: Sequence[Run], cells: Sequence[Cell], logits: Tensor) -> float:
        return (self._forward(runs, cells).logits() - logits).abs().max().item()

    def _decide(self, reason: str | None) -> None:
        self.reason = reason
        if reason is None:
            return
        if self.kind == "fast":
            raise InterpError(f"the fast engine is not exact here: {reason}. Use engine='naive' or 'auto'.")
        log.warning("engine: one full forward per cell, because %s", reason)

    def _extra_hooks(self, components: Sequence[str]) -> ResultHooks:
        return ResultHooks(self.model, "result" in components)
