"""Checks of an Edit, and the fields of `Call` that it sets."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headstats.edit import TABLES, Edit
from headstats.validate.keys import Sizes, check_bool_table, check_tensor, to_four_dimensions, widen
from headstats.validate.rows import acting_rows
from headstats.validate.values import check_values, is_tracing

KINDS = ("uniform", "reversed", "shuffled", "random", "identity")
ACTING = (*TABLES, "gate", "replacement", "temperature", "counterfactual", "pattern_from")


def edit_fields(edit: Edit, sizes: Sizes, q: Tensor, k: Tensor, q_ids: Tensor | None, k_ids: Any) -> dict[str, Any]:
    """Return the fields of `Call` that an edit sets.

    These are all of `call.EDITS`, or none if the edit acts on no row.
    """
    _check_flags(edit, k_ids)
    heads, rows = sizes.rows[:2], acting_rows(edit, sizes, q)
    gate = _check_row_numbers("gate", edit.gate, sizes.rows, q)
    if gate is None and edit.replacement is not None:
        gate = torch.zeros(1, 1, 1, device=q.device)
    temperature = _check_row_numbers("temperature", edit.temperature, sizes.rows, q)
    if temperature is not None:
        temperature = check_values(temperature, "Edit.temperature", "positive")
    tables = {name: t for name in TABLES if (t := getattr(edit, name)) is not None}
    if len({t.shape[-2:] for t in tables.values()}) > 1:
        shapes = ", ".join(f"Edit.{name} {list(t.shape)}" for name, t in tables.items())
        raise ValueError(f"tables of one edit have different numbers of segments [Sq, Sk]: {shapes}")
    pattern_q, pattern_k = _check_pattern(edit.pattern_from, q, k)
    values = {
        "edit_q_segments": _restrict_to_rows(q_ids, rows, -1) if tables else None,
        "pattern_q": pattern_q,
        "pattern_k": pattern_k,
        "pattern_rows": _check_heads(edit, "pattern_heads", heads, q, rows),
        "logit_factor": _check_number_table("logit_factor", edit.logit_factor, heads, q, neutral=1),
        "logit_raise": _check_number_table("logit_raise", edit.logit_raise, heads, q, neutral=0),
        "temperature": _restrict_to_rows(temperature, rows, 1),
        "counterfactual": edit.counterfactual,
        "counterfactual_rows": _check_heads(edit, "counterfactual_heads", heads, q, rows),
        "counterfactual_renormalise": edit.counterfactual is None or edit.renormalise,
        "counterfactual_seed": 0 if edit.counterfactual is None else edit.seed,
        **_resolve_gains(edit, heads, q),
        **_resolve_redistribution(edit, sizes, q),
        "gate": _restrict_to_rows(gate, rows, 1),
        "replacement": _check_replacement(edit.replacement, (*sizes.rows, sizes.dv), q),
    }
    if rows is None or is_tracing(q) or bool(rows.any()) or any(_requires_grad(x) for x in values.values()):
        return values
    return {}


def _check_flags(edit: Edit, k_ids: Any) -> None:
    for name in ("renormalise", "report_mass"):
        if not isinstance(getattr(edit, name), bool):
            raise TypeError(f"Edit.{name}={getattr(edit, name)!r}: True or False expected")
    if not edit.renormalise and edit.knockout is None and edit.gain is None and edit.counterfactual is None:
        raise ValueError(
            "Edit.renormalise=False says how to change weights, but Edit.knockout, Edit.gain and Edit.counterfactual "
            "are None"
        )
    if edit.report_mass and k_ids is None:
        raise ValueError("Edit.report_mass=True reports the mass on key segments and needs k_segments=, which is None")
    if edit.counterfactual is not None and edit.counterfactual not in KINDS:
        raise ValueError(f"Edit.counterfactual={edit.counterfactual!r}: one of {', '.join(map(repr, KINDS))} expected")
    if isinstance(edit.seed, bool) or not isinstance(edit.seed, int) or not 0 <= edit.seed < 1 << 32:
        raise ValueError(f"Edit.seed={edit.seed!r}: an int from 0 to 2**32 - 1 expected")
    for heads, what in (("counterfactual_heads", "counterfactual"), ("pattern_heads", "pattern_from")):
        if getattr(edit, heads) is not None and getattr(edit, what) is None:
            raise ValueError(f"Edit.{heads} is given, but Edit.{what} is None")
    where = (edit.rows, edit.phase, edit.prompt_length)
    if any(x is not None for x in where) and all(getattr(edit, name) is None for name in ACTING):
        raise ValueError("Edit.rows and Edit.phase say where to act, but no field of Edit says what to do")


def _requires_grad(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


def _restrict_to_rows(x: Tensor | None, rows: Tensor | None, neutral: float) -> Tensor | None:
    """Set rows on which the edit does not act to the neutral number.

    x: [#B, M] or [#B, #H, #M].
    """
    if x is None or rows is None:
        return x
    return torch.where(rows if x.dim() == 2 else rows[:, None], x, neutral)


def _check_heads(edit: Edit, name: str, heads: tuple[int, int], q: Tensor, rows: Tensor | None) -> Tensor | None:
    """Return the heads and rows that change, [#B, #H, #M].

    None = all (or the field is not used).
    """
    used = (edit.pattern_from if name == "pattern_heads" else edit.counterfactual) is not None
    t: Any = getattr(edit, name)
    acting = None if rows is None or not used else rows[:, None]
    if t is None:
        return acting
    check_tensor(f"Edit.{name}", t, q, floating=False)
    if t.dtype != torch.bool:
        raise TypeError(f"Edit.{name} has dtype {t.dtype}: bool expected")
    shapes = heads[1:], heads, (*heads, q.shape[2])
    if tuple(t.shape) not in shapes:
        raise ValueError(
            f"Edit.{name} has shape {list(t.shape)}: [H] = {list(shapes[0])}, [B, H] = {list(shapes[1])} or "
            f"[B, H, M] = {list(shapes[2])} expected"
        )
    t = t if t.dim() == 3 else t.reshape(-1, heads[1], 1)
    return t if acting is None else t & acting


def _resolve_gains(edit: Edit, heads: tuple[int, int], q: Tensor) -> dict[str, Tensor | None]:
    """Express Edit.bias, gain and knockout by fields of `Call`.

    These are log gains and hidden cells before the softmax, and gains after it.
    """
    bias = _check_number_table("bias", edit.bias, heads, q, neutral=0)
    gain = _check_number_table("gain", edit.gain, heads, q, neutral=1)
    cut = check_bool_table("Edit.knockout", edit.knockout, heads, q, neutral=False)
    if gain is not None:
        gain = check_values(gain, "Edit.gain", "not negative")
    if not edit.renormalise:
        if cut is not None:
            gain = torch.where(cut, 0, widen(q.new_ones(()), q) if gain is None else gain)
        return {"edit_bias": bias, "knockout": None, "gain": gain}
    if gain is not None:
        gain = check_values(gain, "Edit.gain", "has a logarithm") if gain.requires_grad else gain
        zero = gain == 0
        if is_tracing(gain) or bool(zero.any()):
            cut = zero if cut is None else cut | zero
        log_gain = torch.where(zero, 1, gain).log()
        bias = log_gain if bias is None else bias + log_gain
    return {"edit_bias": bias, "knockout": cut, "gain": None}


def _resolve_redistribution(edit: Edit, sizes: Sizes, q: Tensor) -> dict[str, Tensor | None]:
    names = ("take", "give", "keep_fraction")
    if missing := [f"Edit.{x}" for x in names if getattr(edit, x) is None]:
        if len(missing) < len(names):
            raise ValueError(f"Edit.take, Edit.give and Edit.keep_fraction go together, but {missing[0]} is None")
        return dict.fromkeys(names)
    take, give = (check_bool_table(f"Edit.{x}", getattr(edit, x), sizes.rows[:2], q, neutral=False) for x in names[:2])
    assert take is not None and give is not None  # not None, as their fields are not
    take = take & ~check_values(take & give, "Edit.take and Edit.give", "apart")
    keep = edit.keep_fraction
    if isinstance(keep, (int, float)) and not isinstance(keep, bool):
        keep = torch.tensor(float(keep), device=q.device)
    keep = _check_row_numbers("keep_fraction", keep, sizes.rows, q)
    assert keep is not None  # not None, as its field is not
    return {"take": take, "give": give, "keep_fraction": check_values(keep, "Edit.keep_fraction", "fraction")}


def _check_number_table(name: str, t: Any, heads: tuple[int, int], q: Tensor, neutral: float) -> Tensor | None:
    """Check a table of finite numbers over pairs of segments.

    A neutral row and column are added for tokens in no segment.
    """
    if t is None:
        return None
    check_tensor(f"Edit.{name}", t, q)
    t = check_values(to_four_dimensions(f"Edit.{name}", widen(t, q), heads), f"Edit.{name}", "finite")
    return torch.nn.functional.pad(t, (0, 1, 0, 1), value=neutral)


def _check_pattern(pair: Any, q: Tensor, k: Tensor) -> tuple[Tensor | None, Tensor | None]:
    if pair is None:
        return None, None
    if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(isinstance(x, Tensor) for x in pair):
        raise TypeError(f"Edit.pattern_from is a {type(pair).__name__}: a pair of tensors (q2, k2) expected, or None")
    for name, x, own in (("q2", pair[0], q), ("k2", pair[1], k)):
        if x.shape != own.shape or x.dtype != own.dtype or x.device != own.device:
            raise ValueError(
                f"Edit.pattern_from: {name} is {x.dtype} {list(x.shape)} on {x.device}, but {name[0]} is {own.dtype} "
                f"{list(own.shape)} on {own.device}: the same expected"
            )
    return pair[0], pair[1]


def _check_row_numbers(name: str, t: Any, shape: tuple[int, ...], q: Tensor) -> Tensor | None:
    """Check a number for each head, or for each head and query.

    It is returned as [#B, #H, #M].
    """
    if t is None:
        return None
    check_tensor(f"Edit.{name}", t, q)
    t = widen(t, q)
    whole = t if t.dim() == 3 else t[..., None]
    if not _can_broadcast(whole, shape):
        raise ValueError(
            f"Edit.{name} has shape {list(t.shape)}: broadcastable to [B, H] = {list(shape[:2])} or, with three "
            f"dimensions, to [B, H, M] = {list(shape)} expected"
        )
    return whole.reshape((1,) * (3 - whole.dim()) + tuple(whole.shape))


def _check_replacement(t: Any, shape: tuple[int, int, int, int], q: Tensor) -> Tensor | None:
    """Check a vector for each head, or for each head and query.

    It is returned as [#B, #H, #M, #Dv].
    """
    if t is None:
        return None
    check_tensor("Edit.replacement", t, q)
    b, h, m, dv = shape
    t = widen(t, q)
    whole = t if t.dim() == 4 else t[..., None, :] if t.dim() else t.reshape(1, 1)
    if not _can_broadcast(whole, shape):
        raise ValueError(
            f"Edit.replacement has shape {list(t.shape)}: broadcastable to [B, H, Dv] = {[b, h, dv]} or, with four "
            f"dimensions, to [B, H, M, Dv] = {[b, h, m, dv]} expected"
        )
    return whole.reshape((1,) * (4 - whole.dim()) + tuple(whole.shape))


def _can_broadcast(t: Tensor, shape: tuple[int, ...]) -> bool:
    short = shape[len(shape) - t.dim() :]
    return t.dim() <= len(shape) and all(s in (1, w) for s, w in zip(t.shape, short, strict=True))
