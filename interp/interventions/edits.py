"""AttentionEdit: a change of how queries read keys, by heads of a model and tokens of a prompt.

Its fields are those of `headstats.Edit`, where each is defined.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from interp.errors import InterpError
from interp.interventions.distributions import as_gate, as_weights, by_name
from interp.interventions.words import (
    parse_fields,
    read_flag,
    read_items,
    read_shares,
    read_tokens,
    say,
    shortened,
    written,
)

if TYPE_CHECKING:
    from torch import Tensor

    from interp.sites import Tokens

Counterfactual = Literal["uniform", "reversed", "shuffled", "random", "identity"]
COUNTERFACTUALS = ("uniform", "reversed", "shuffled", "random", "identity")
RANGES = {"gain": (0.0, math.inf), "temperature": (0.0, math.inf), "keep_fraction": (0.0, 1.0)}
ON_CELLS = ("logit_factor", "logit_raise", "bias", "gain")  # scalars that act on pairs of a query and a key
OF_WEIGHTS = frozenset({*ON_CELLS, "temperature", "knockout", "counterfactual", "take"})  # change attention weights


@dataclass(frozen=True, eq=False, repr=False)
class AttentionEdit:
    """A change of attention weights or of heads' outputs, for some tokens, heads and layers.

        interp.AttentionEdit(queries="question", keys="image", layers=range(8, 20), heads=["L9H6"], logit_factor=1.5)
        interp.AttentionEdit(heads=["L5H1"], counterfactual="uniform")          # at all tokens
        interp.AttentionEdit(queries=-1, keys="subject", knockout=True)         # cut, in all layers and heads

    ``queries``: the tokens whose attention changes; None: all. ``keys``: what those read differently; None: every key
    that they see. ``layers``: default all layers with attention. ``heads``: numbers (in each of the layers), names such
    as ``"L9H6"`` or (layer, head); default all.

    Fields, as `headstats.Edit` defines them. On pairs of a query and a key: ``logit_factor`` (z → factor · z),
    ``logit_raise`` (z → z + raise · |z|), ``bias`` (added to the logit, in nats), ``gain`` (≥ 0; multiplies the weight)
    and ``knockout``. ``renormalise``: whether gain, knockout and counterfactual act before the softmax, so that the row
    keeps its sum. On rows: ``temperature`` (> 0), ``counterfactual`` (another distribution over the visible keys, for
    ``seed``), ``weights`` (the row becomes this distribution), ``gate`` (multiplies the head's output) and
    ``replacement`` ([d_v] or [heads, d_v]; takes the place of the output, mixed by the gate). ``take``, ``give``,
    ``keep_fraction``: tokens whose weight is kept to that fraction; what they lose goes to the tokens of ``give``.
    ``phase``: only while the prompt is read, or only while decoding.

    ``weights`` are numbers of at least 0 that sum to 1: by position or span (``{"S1": 0.5, -4: 0.5}``, spread evenly
    over a span's tokens), or one for each token of the prompt. A learned sink then takes nothing. They are refused on
    keys that a query does not see. ``gate`` is a number, or a tensor (used without its gradient): [heads of the layer],
    or [heads of the layer, queries] with a column for each token of ``queries`` (None: of the prompt), in the order of
    the prompt. Tokens decoded later have no column and are not gated.

    Raises InterpError for a field out of range, fields that exclude each other, and an edit that changes nothing.
    """

    queries: Tokens | None = None
    keys: Tokens | None = None
    layers: Iterable[int] | int | None = None
    heads: Iterable[Any] | int | str | None = None
    knockout: bool = False
    gain: float | None = None
    bias: float | None = None
    logit_factor: float | None = None
    logit_raise: float | None = None
    renormalise: bool = True
    temperature: float | None = None
    counterfactual: Counterfactual | None = None
    seed: int = 0
    take: Tokens | None = None
    give: Tokens | None = None
    keep_fraction: float | None = None
    weights: Mapping[int | str, float] | Sequence[float] | Tensor | None = None
    gate: float | Tensor | None = None
    replacement: Tensor | None = None
    phase: Literal["prompt", "decoding"] | None = None

    def __post_init__(self) -> None:
        for name in ("queries", "keys", "layers", "heads", "take", "give"):
            value = getattr(self, name)
            if isinstance(value, Iterable) and not isinstance(value, str | range | tuple):
                object.__setattr__(self, name, tuple(value))  # an iterator can be read once
        object.__setattr__(self, "weights", as_weights(self.weights))
        object.__setattr__(self, "gate", as_gate(self.gate))
        for name in (*ON_CELLS, "temperature", "keep_fraction", "gate"):
            if name != "gate" or not self.has_gates:
                _check_number(name, getattr(self, name))
        if self.counterfactual is not None and self.counterfactual not in COUNTERFACTUALS:
            raise InterpError(
                f"AttentionEdit(counterfactual={self.counterfactual!r}): one of "
                f"{', '.join(map(repr, COUNTERFACTUALS))} expected"
            )
        if self.phase not in (None, "prompt", "decoding"):
            raise InterpError(f"AttentionEdit(phase={self.phase!r}): 'prompt' or 'decoding' expected")
        if self.phase == "decoding" and self.queries is not None:
            raise InterpError(
                f"AttentionEdit(queries={self.queries!r}, phase='decoding'): queries name tokens of the prompt, and "
                "only tokens decoded later change: leave queries out"
            )
        self._check_rows()
        redistribution = [name for name in ("take", "give", "keep_fraction") if getattr(self, name) is None]
        if 0 < len(redistribution) < 3:
            raise InterpError(
                "AttentionEdit: take, give and keep_fraction go together, and "
                f"{' and '.join(redistribution)} {'is' if len(redistribution) == 1 else 'are'} missing"
            )
        if not self.changes:
            raise InterpError(
                "AttentionEdit changes nothing: set a field, e.g. knockout=True, gain=0.5 or counterfactual='uniform'"
            )
        if not self.renormalise and not (self.knockout or self.gain is not None or self.counterfactual):
            raise InterpError(
                "AttentionEdit(renormalise=False) says how knockout, gain and counterfactual act, and none is set"
            )
        if self.keys is not None and not any(name in self.changes for name in (*ON_CELLS, "knockout")):
            raise InterpError(
                f"AttentionEdit: keys={self.keys!r} is set, but {' and '.join(self.changes)} act on whole rows"
            )

    def _check_rows(self) -> None:
        """Raise InterpError for weights beside other changes of weights, and gates of tokens that are not known."""
        if self.weights is not None and (others := [name for name in self.changes if name in OF_WEIGHTS]):
            raise InterpError(
                f"AttentionEdit: weights overwrites whole rows, so {' and '.join(others)} would have no effect: give "
                "one of them"
            )
        if self.phase == "decoding" and getattr(self.gate, "ndim", 0) == 2:
            raise InterpError(
                "AttentionEdit(gate=…, phase='decoding'): gates by query belong to tokens of the prompt; give a number "
                "or [heads of the layer]"
            )

    @property
    def has_gates(self) -> bool:
        """Whether ``gate`` is a tensor, by head and perhaps by query."""
        return hasattr(self.gate, "shape")

    @property
    def single_gate(self) -> float | None:
        """The gate, if it is a number or a tensor of equal numbers."""
        if not self.has_gates:
            return self.gate  # pyright: ignore[reportReturnType]
        gates: Any = self.gate
        return float(gates.flatten()[0]) if bool((gates == gates.flatten()[0]).all()) else None

    @property
    def silences(self) -> bool:
        """Whether the output of its heads becomes 0 in its rows, whatever else it sets."""
        return self.single_gate == 0 and self.replacement is None

    @classmethod
    def parse(cls, text: str) -> AttentionEdit:
        """Read an edit as it is written on the command line and in configs; ``text`` of an edit is read back.

            interp.AttentionEdit.parse("knockout queries=-1 keys=subject layers=8-19 heads=0-3")
            interp.AttentionEdit.parse("logit_factor=1.5 queries=question keys=image,S2:last heads=L9H6,L10H0")

        Fields are separated by spaces, the items of a list by commas. Raises InterpError for anything else.
        """
        return cls(**parse_fields(text, READERS, "attention edit", bare=("knockout",)))

    @property
    def text(self) -> str:
        """The edit in the form that `parse` reads; a tensor is written as its shape and a hash."""
        words = []
        for field in fields(self):
            value = getattr(self, field.name)
            if value is field.default or (field.name == "seed" and value == 0):
                continue
            value = by_name(value) if field.name == "weights" else value
            words.append("knockout" if field.name == "knockout" else f"{field.name}={written(value)}")
        return " ".join(words)

    def __repr__(self) -> str:
        return f"AttentionEdit({self.text})"

    @cached_property
    def changes(self) -> tuple[str, ...]:
        """Names of the fields that this edit sets, in the order in which they act."""
        order = ("logit_factor", "logit_raise", "temperature", "bias", "gain", "knockout", "counterfactual", "take")
        values = {name: getattr(self, name) for name in (*order, "weights", "gate", "replacement")}
        return tuple(name for name, value in values.items() if value is not None and value is not False)

    def __str__(self) -> str:
        words = []
        for name in self.changes:
            value = getattr(self, name)
            if name == "take":
                words.append(f"moves weight from {say(self.take)} to {say(self.give)}, keeping {self.keep_fraction:g}")
            elif name == "replacement":
                words.append(f"replaces the output by a vector of {list(value.shape)}")
            elif name == "knockout":
                words.append("cuts")
            elif name == "weights":
                shares = ", ".join(f"{share:g} on {name}" for name, share in by_name(value).items())
                words.append(f"sets weights to {shortened(shares)}")
            elif name == "gate" and self.has_gates:
                words.append(f"gates by {'head' if value.ndim == 1 else 'head and query'}")
            else:
                words.append(f"{name.replace('_', ' ')} {value if isinstance(value, str) else format(value, 'g')}")
        where = f"queries {say(self.queries)}" + ("" if self.keys is None else f" → keys {say(self.keys)}")
        return f"{', '.join(words)}; {where}; layers {say(self.layers)}, heads {say(self.heads)}" + (
            "" if self.phase is None else f"; {self.phase} only"
        )


READERS = {
    "queries": read_tokens, "keys": read_tokens, "layers": read_items, "heads": read_items, "knockout": read_flag,
    "gain": float, "bias": float, "logit_factor": float, "logit_raise": float, "renormalise": read_flag,
    "temperature": float, "counterfactual": str, "seed": int, "take": read_tokens, "give": read_tokens,
    "keep_fraction": float, "weights": read_shares, "gate": float, "phase": str,
}  # fmt: skip


def _check_number(name: str, value: Any) -> None:
    """Raise InterpError unless a field is None or a number in its range."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InterpError(f"AttentionEdit({name}={value!r}): a finite number expected")
    low, high = RANGES.get(name, (-math.inf, math.inf))
    if not low <= value <= high or (name == "temperature" and value == 0):
        bounds = "between 0 and 1" if high == 1 else "greater than 0" if name == "temperature" else "not negative"
        raise InterpError(f"AttentionEdit({name}={value!r}): a number {bounds} expected")
