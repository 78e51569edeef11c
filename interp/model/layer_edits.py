"""Edits of one layer's attention, on token rows, as arguments of headstats.

A `LayerEdit` is an `AttentionEdit` whose tokens, layers and heads have been resolved for one prompt. Each batch row of
a call has its own list of them. `interp.model.edit_tables` merges those lists into what one call of headstats takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from interp.errors import InterpError
from interp.interventions import OF_WEIGHTS, AttentionEdit
from interp.model.layer_masks import LayerMask

Rows = Sequence[int]  # token rows of a prompt: a range, or their numbers in ascending order
KNOCK_OUT = AttentionEdit(knockout=True)
OF_TOKENS = ("queries", "keys", "take", "give", "targets")  # fields of a `LayerEdit` that hold token rows


@dataclass(frozen=True, eq=False)
class LayerEdit:
    """What ``edit`` does in one layer: to the queries in rows ``queries``, of ``heads`` (None: all).

    ``keys``: the rows that fields on pairs of a query and a key act on; None: all. ``take`` and ``give``: rows.
    ``targets`` and ``shares``: the rows on which ``edit.weights`` lie, and the weight of each; they sum to 1.
    ``queries`` is None only for an edit of every forward, whose prompts have any length.
    """

    layer: int
    edit: AttentionEdit = KNOCK_OUT
    queries: Rows | None = None
    keys: Rows | None = None
    heads: Rows | None = None
    take: Rows = ()
    give: Rows = ()
    targets: Rows = ()
    shares: Sequence[float] = ()

    @property
    def start(self) -> int:
        """The first query that changes."""
        return 0 if self.queries is None else self.queries[0]

    @property
    def stop(self) -> int:
        """The row after the last query that changes."""
        assert self.queries is not None  # it is a change of one prompt
        return self.queries[-1] + 1

    @property
    def is_random(self) -> bool:
        """Whether it depends on a hash of the batch row and of token positions, padding included."""
        return self.edit.counterfactual in ("shuffled", "random")

    @property
    def counts_keys(self) -> bool:
        """Whether it depends on how many keys there are, also on those that a query does not see."""
        return not self.edit.renormalise and self.edit.counterfactual in ("uniform", "random")

    @property
    def is_neutral(self) -> bool:
        """Whether every field that it sets leaves attention as it is."""
        edit = self.edit
        values = {name: getattr(edit, name) for name in edit.changes if name != "take"}
        if edit.gate is not None:
            values["gate"] = edit.single_gate
        if edit.keep_fraction is not None:
            values["keep_fraction"] = edit.keep_fraction
        if edit.single_gate == 1:
            values.pop("replacement", None)  # of which the gate leaves nothing
        return all(name in NEUTRAL and value == NEUTRAL[name] for name, value in values.items())

    @property
    def silences(self) -> bool:
        """Whether the output of its heads becomes 0 in its rows, whatever else it sets."""
        return self.edit.silences

    @property
    def kind(self) -> tuple[Any, ...]:
        """What one call of headstats has once: edits that differ in it need a call each."""
        edit = self.edit
        flags = edit.renormalise if edit.knockout or edit.gain is not None or edit.counterfactual else None
        return flags, edit.counterfactual, edit.seed if edit.counterfactual else 0


@dataclass(frozen=True)
class EditGroup:
    """Edits, for each batch row, that one call of headstats can hold.

    ``own``: those for which the call is made; its results count in their rows and heads, before earlier groups' ones.
    ``edits``: these and all others that the call can hold, so that the results of those rows are complete.
    """

    edits: list[list[LayerEdit]]
    own: list[list[LayerEdit]]


def compatible_groups(by_row: Sequence[Sequence[LayerEdit]]) -> list[EditGroup]:
    """Share edits out among calls of headstats, each with one `LayerEdit.kind`.

    Raises InterpError for two edits of one row of a head that no single call can hold.
    """
    for edits in by_row:
        refuse_clashes(edits)
    kinds = list(dict.fromkeys(e.kind for edits in by_row for e in edits if e.kind != NO_KIND))
    merged: list[tuple[Any, ...]] = []
    place: dict[tuple[Any, ...], int] = {NO_KIND: 0}
    for kind in kinds:
        for i, other in enumerate(merged):
            if (both := _merge(kind, other)) is not None:
                merged[i], place[kind] = both, i
                break
        else:
            place[kind] = len(merged)
            merged.append(kind)
    merged = merged or [NO_KIND]
    return [
        EditGroup(
            [[e for e in edits if _merge(e.kind, kind) == kind] for edits in by_row],
            [[e for e in edits if place[e.kind] == i and e.kind != NO_KIND] for edits in by_row],
        )
        for i, kind in enumerate(merged)
    ]


def refuse_clashes(edits: Sequence[LayerEdit]) -> None:
    """Raise InterpError for two edits of one row of a head that cannot act together."""
    earlier: dict[int | None, list[LayerEdit]] = {None: []}  # by the heads that they name
    for b in edits:
        if b.heads is None:
            alike = [e for of_head in earlier.values() for e in of_head]
        else:
            alike = [e for head in (None, *b.heads) for e in earlier.get(head, ())]
        for head in (None,) if b.heads is None else b.heads:
            earlier.setdefault(head, []).append(b)
        for a in alike:
            if a.layer == b.layer and _share(a.queries, b.queries) and (why := _clash(a, b)):
                raise InterpError(
                    f"two edits {why} of the same tokens and heads in layer {a.layer}: ({a.edit}) and ({b.edit}). "
                    "Combine them, or part their tokens or heads"
                )


def _clash(a: LayerEdit, b: LayerEdit) -> str:
    """Why two edits cannot act on one row of a head, in words; '' if they can."""
    used = fields_used(a), fields_used(b)
    for name, why in EXCLUSIVE.items():
        if all(name in names for names in used):
            return why
    if any("weights" in names for names in used) and all(names & {*OF_WEIGHTS, "weights"} for names in used):
        return "change the weights, which one of them overwrites,"
    if any("replacement" in names for names in used) and all("gate" in names for names in used):
        return "replace and gate the output"
    return "" if _merge(a.kind, b.kind) else "act before (renormalise=True) and after the softmax on the weights"


def hidden_weight(e: LayerEdit, query: int, key: int) -> InterpError:
    """The error of an edit whose weights lie on a key that a query does not see."""
    return InterpError(
        f"layer {e.layer}: the edit ({e.edit}) puts weight on the key at position {key}, which the query at position "
        f"{query} does not see. Name queries that see it, or other keys"
    )


def _share(a: Rows | None, b: Rows | None) -> bool:
    """Whether two sets of rows or heads have a member in common; None is all."""
    if a is None or b is None:
        return True
    if isinstance(a, range) and isinstance(b, range) and a.step == b.step == 1:
        return max(a.start, b.start) < min(a.stop, b.stop)
    rows, other = (b, a) if isinstance(a, range) else (a, b)
    return any(row in other for row in rows)


def shifted(edits: Sequence[LayerEdit | LayerMask], by: int) -> tuple[LayerEdit | LayerMask, ...]:
    """Return edits and masks whose tokens stand ``by`` rows further on."""
    if not by:
        return tuple(edits)
    return tuple(
        e.shifted(by)
        if isinstance(e, LayerMask)
        else replace(e, **{name: _shift(getattr(e, name), by) for name in OF_TOKENS})
        for e in edits
    )


def _shift(rows: Rows | None, by: int) -> Rows | None:
    if isinstance(rows, range):
        return range(rows.start + by, rows.stop + by, rows.step)
    return None if rows is None else tuple(row + by for row in rows)


NO_KIND = (None, None, 0)


def _merge(a: tuple[Any, ...], b: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The kind of a call that does edits of both kinds; None if no call does."""
    if None not in (a[0], b[0]) and a[0] != b[0]:
        return None
    if None not in (a[1], b[1]) and a[1:] != b[1:]:
        return None
    return b[0] if a[0] is None else a[0], *(b[1:] if a[1] is None else a[1:])


NEUTRAL = {"logit_factor": 1.0, "logit_raise": 0.0, "bias": 0.0, "gain": 1.0, "temperature": 1.0, "gate": 1.0,
           "keep_fraction": 1.0, "knockout": False, "take": False, "give": False}  # fmt: skip
EXCLUSIVE = {"take": "redistribute the weights", "replacement": "replace the output",
             "counterfactual": "replace the weights", "weights": "overwrite the weights"}  # fmt: skip


def fields_used(e: LayerEdit) -> set[str]:
    """The fields of headstats' Edit by which an edit acts."""
    names = set(e.edit.changes)
    if "take" in names:
        names |= {"give", "keep_fraction"}
    if "replacement" in names:
        names.add("gate")
    if "weights" in names:
        names |= {"temperature", "bias"}
    return names
