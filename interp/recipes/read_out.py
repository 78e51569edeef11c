"""Read-outs: at which positions of a prompt a metric is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.errors import InterpError, PromptError
from interp.metrics import Metric, Readout
from interp.prompts.coder import Encoded
from interp.prompts.embeddings import refuse_vectors
from interp.prompts.positions import row_range

LAST, EACH, ALL, MEAN = "last", "each", "all", ":mean"
At = int | str | Sequence[int | str]
Evaluate = Callable[[Tensor, Readout], Tensor]


@dataclass(frozen=True)
class ReadOut:
    """One number that is read of a run: its name in the column ``read_at``, and the rows whose logits it depends on.

    ``tokens``: the token of the prompt at each of the positions, or of the answer.
    """

    label: str | None
    rows: tuple[int, ...]
    tokens: tuple[int, ...]


def check_at(at: Any) -> tuple[int | str, ...]:
    """Return ``at=`` as a tuple of positions and names of spans. Raises InterpError for anything else."""
    items = at if isinstance(at, Iterable) and not isinstance(at, str) else [at]
    places = tuple(items)
    if not places:
        raise InterpError("at= is an empty list of positions: nothing would be read")
    for place in places:
        if isinstance(place, bool) or not isinstance(place, int | str) or place == "":
            raise InterpError(
                f"at={at!r:.60}: 'last', a position, the name of a span ('subject', 'subject:last', 'subject:mean'), "
                "'each', or a list of these expected"
            )
    return tuple(dict.fromkeys(places))


def read_outs(
    places: Sequence[int | str], metric: Metric, prompts: Sequence[Encoded], lengths_differ: bool | None = None
) -> list[list[ReadOut]]:
    """Return what is read of each prompt.

    Positions of "each" count from the last token (-1) if the prompts differ in length, so that equal names mean equal
    places. ``lengths_differ``: whether they do in the set of which these are a part (None: these are all). Raises
    PromptError for a position that a prompt does not have, and where nothing is left to read.
    """
    from_end = len({len(p.tokens) for p in prompts}) > 1 if lengths_differ is None else lengths_differ
    out = []
    for i, prompt in enumerate(prompts):
        by_label: dict[str | None, ReadOut] = {}
        for place in places:
            for label, rows in _places(place, metric, prompt, f"at={place!r} of prompt {i}", from_end):
                by_label[label] = _read_out(label, rows, metric, prompt, f"at={place!r} of prompt {i}")
        out.append(list(by_label.values()))
    return out


def _places(
    place: int | str, metric: Metric, prompt: Encoded, what: str, from_end: bool
) -> list[tuple[str | None, range]]:
    """Return the names and the positions of the numbers that one item of ``at=`` asks for."""
    n = len(prompt.tokens)
    if place == LAST:
        return [(None, range(n - 1, n))]
    if isinstance(place, int):
        return [(str(place), range(*row_range(place, prompt, what)))]
    is_mean = place.endswith(MEAN) and place not in prompt.spans
    name = place.removesuffix(MEAN) if is_mean else place
    rows = range(n) if name in (EACH, ALL) and name not in prompt.spans else range(*row_range(name, prompt, what))
    if not len(rows):
        raise PromptError(f"{what}: the span has no tokens, so that there is nothing to read")
    if metric.over == "positions":
        if is_mean or name == EACH:
            raise InterpError(
                f"at={place!r}: metric {metric.name!r} reads all positions together and gives one number: use at='all' "
                "or the name of a span"
            )
        return [(place, rows)]
    if name == ALL:
        raise InterpError(
            f"at='all': metric {metric.name!r} reads one position at a time: use at='each', or at='each:mean' for the "
            "mean over all positions"
        )
    if is_mean or (len(rows) == 1 and name != EACH):
        return [(place, rows)]
    if name == EACH:
        return [(str(r - n if from_end else r), range(r, r + 1)) for r in rows]
    return [(f"{name}[{k}]", range(r, r + 1)) for k, r in enumerate(rows)]


def _read_out(label: str | None, rows: range, metric: Metric, prompt: Encoded, what: str) -> ReadOut:
    places = [r for r in rows if r > 0] if metric.predicts else list(rows)
    if not places:
        raise PromptError(
            f"{what}: metric {metric.name!r} reads how a token is predicted by those before it, and nothing stands "
            "before the first token"
        )
    if metric.predicts:
        refuse_vectors([prompt.clean], f"metric {metric.name!r} reads the prompt's own tokens")
    tokens = tuple(prompt.clean[r] for r in places)
    return ReadOut(label, tuple(r - metric.predicts for r in places), tokens)


def rows_of_all(outs: Sequence[ReadOut]) -> tuple[int, ...]:
    """Return the rows of a run that any of its read-outs needs, in ascending order."""
    return tuple(sorted({row for out in outs for row in out.rows}))


@dataclass(frozen=True)
class RunsReadout:
    """How a metric is read of several runs at the positions of ``at=``.

    It stands in place of a `Readout`, which is of one position. ``outs``: the read-outs of each run. ``clean``,
    ``unchanged``: logits of the rows that they need, in the clean run and in the run that is changed.
    """

    outs: Sequence[Sequence[ReadOut]]
    answer: Int[Tensor, " runs"]
    foil: Int[Tensor, " runs"] | None
    clean: Sequence[Float[Tensor, "read vocab"]]
    unchanged: Sequence[Float[Tensor, "read vocab"]]

    @property
    def width(self) -> int:
        """Most read-outs of a run; values of runs with fewer end in zeros."""
        return max(map(len, self.outs))

    def rows(self, index: Int[Tensor, " rows"]) -> RunsReadout:
        """Return the readout of the runs in ``index``, which may repeat runs."""
        numbers = index.tolist()
        outs, clean, unchanged = ([x[i] for i in numbers] for x in (self.outs, self.clean, self.unchanged))
        index = index.to(self.answer.device)
        return RunsReadout(outs, self.answer[index], None if self.foil is None else self.foil[index], clean, unchanged)

    def moved(self, run: int, number: int, out: ReadOut) -> RunsReadout:
        """Return the readout of one read-out of a run whose tokens stand at other rows, those of ``out``."""
        place = {row: k for k, row in enumerate(rows_of_all(self.outs[run]))}
        rows = [place[row] for row in self.outs[run][number].rows]
        of_run = self.rows(torch.tensor([run]))
        return replace(of_run, outs=[[out]], clean=[self.clean[run][rows]], unchanged=[self.unchanged[run][rows]])

    @staticmethod
    def joined(parts: Sequence[RunsReadout]) -> RunsReadout:
        """Return the readout of all runs of several."""
        answer = torch.cat([part.answer for part in parts])
        foils = [part.foil for part in parts if part.foil is not None]
        outs, clean, unchanged = (
            [x for part in parts for x in getattr(part, n)] for n in ("outs", "clean", "unchanged")
        )
        return RunsReadout(outs, answer, torch.cat(foils) if foils else None, clean, unchanged)

    def changing(self, unchanged: Sequence[Float[Tensor, "read vocab"]]) -> RunsReadout:
        """Return the same readout for cells in other runs, with these logits."""
        return replace(self, unchanged=unchanged)

    def values(
        self, metric: Metric, logits: Float[Tensor, "rows vocab"], runs: Sequence[int],
        evaluate: Evaluate | None = None, is_pair: bool = False,
    ) -> Float[Tensor, "cells width"]:  # fmt: skip
        """Return the metric of every read-out, zeros after the last one of a run.

        ``logits``: of the rows that the runs read, one run after the other. ``runs``: the run of each cell.
        ``evaluate``: computed in place of the metric. ``is_pair``: there are two columns, of the answer and the foil.
        """
        evaluate = evaluate or metric
        items: list[tuple[int, int, list[int], ReadOut]] = []  # cell, number of the read-out, rows of logits
        first = 0
        for cell, run in enumerate(runs):
            place = {row: first + k for k, row in enumerate(rows_of_all(self.outs[run]))}
            items += [(cell, k, [place[r] for r in out.rows], out) for k, out in enumerate(self.outs[run])]
            first += len(place)
        values = torch.zeros(len(runs), self.width, dtype=torch.float64)  # on the CPU: MPS has no float64
        if metric.over == "positions":
            by_size: dict[int, list[tuple[int, int, list[int], ReadOut]]] = {}
            for item in items:
                by_size.setdefault(len(item[2]), []).append(item)
            for same in by_size.values():
                index = torch.tensor([rows for _, _, rows, _ in same], device=logits.device)
                read = self._readout([runs[c] for c, *_ in same], [out for *_, out in same], is_pair, several=True)
                values[[c for c, *_ in same], [k for _, k, *_ in same]] = evaluate(logits[index], read).cpu().double()
            return values
        flat = [(c, k, row, out, j) for c, k, rows, out in items for j, row in enumerate(rows)]
        single = [replace(out, rows=(out.rows[j],), tokens=(out.tokens[j],)) for *_, out, j in flat]
        read = self._readout([runs[c] for c, *_ in flat], single, is_pair)
        of_rows = evaluate(logits[[row for _, _, row, *_ in flat]], read).cpu().double()
        share = torch.tensor([1 / len(out.rows) for *_, out, _ in flat], dtype=torch.float64)
        at = tuple(torch.tensor([x[i] for x in flat]) for i in (0, 1))
        return values.index_put(at, of_rows * share, accumulate=True)

    def _readout(self, runs: Sequence[int], outs: Sequence[ReadOut], is_pair: bool, several: bool = False) -> Readout:
        """Return what the metric may read besides the logits of some read-outs, one per row."""
        device = self.answer.device
        if is_pair:
            return Readout(zeros := torch.zeros(len(runs), dtype=torch.long, device=device), zeros + 1)
        index = torch.tensor(list(runs), device=device)
        logits = []
        for of_runs in (self.clean, self.unchanged):
            picked = []
            for run, out in zip(runs, outs, strict=True):
                place = {row: k for k, row in enumerate(rows_of_all(self.outs[run]))}
                picked.append(of_runs[run][[place[r] for r in out.rows]])
            logits.append(torch.stack(picked) if several else torch.cat(picked))
        tokens = torch.tensor([out.tokens for out in outs], device=device) if several else None
        return Readout(
            self.answer[index], None if self.foil is None else self.foil[index], logits[0], logits[1], tokens
        )
