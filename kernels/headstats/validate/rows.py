"""Checks of the queries on which an Edit acts: rows and phase."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headstats.edit import Edit
from headstats.validate.keys import INTEGERS, Sizes, check_tensor
from headstats.validate.values import check_values


def acting_rows(edit: Edit, sizes: Sizes, q: Tensor) -> Tensor | None:
    """Return the queries on which the edit acts, bool [#B, M]; None = all."""
    rows, phase = _check_rows(edit.rows, sizes, q), _rows_of_phase(edit, sizes, q)
    return phase if rows is None else rows if phase is None else rows & phase


def _check_rows(rows: Any, sizes: Sizes, q: Tensor) -> Tensor | None:
    if rows is None:
        return None
    check_tensor("Edit.rows", rows, q, floating=False)
    if rows.dtype != torch.bool:
        raise TypeError(f"Edit.rows has dtype {rows.dtype}: bool expected, True = the edit acts on this query")
    if tuple(rows.shape) not in ((sizes.m,), (sizes.b, sizes.m)):
        raise ValueError(
            f"Edit.rows has shape {list(rows.shape)}: [M] = [{sizes.m}] or [B, M] = [{sizes.b}, {sizes.m}] expected"
        )
    return rows.reshape(-1, sizes.m)


def _rows_of_phase(edit: Edit, sizes: Sizes, q: Tensor) -> Tensor | None:
    phase, length = edit.phase, edit.prompt_length
    if phase is None:
        if length is not None:
            raise ValueError("Edit.prompt_length is given, but Edit.phase is None, which reads it")
        return None
    if phase not in ("prompt", "decoding"):
        raise ValueError(f"Edit.phase={phase!r}: 'prompt', 'decoding' or None expected")
    if length is None:
        if sizes.prefix or sizes.m > sizes.n:
            why = "there is a shared prefix" if sizes.prefix else f"there are more queries ({sizes.m}) than keys"
            raise ValueError(f"Edit.phase={phase!r} needs Edit.prompt_length, since {why}")
        return torch.full((1, sizes.m), (sizes.m == sizes.n) == (phase == "prompt"), device=q.device)
    positions = torch.arange(sizes.n - sizes.m, sizes.n, device=q.device)
    return (positions < _check_prompt_lengths(length, sizes, q)) == (phase == "prompt")


def _check_prompt_lengths(value: Any, sizes: Sizes, q: Tensor) -> Tensor:
    """Check Edit.prompt_length and return it as [#B, 1]."""
    is_int = isinstance(value, int) and not isinstance(value, bool)
    if is_int and not -(1 << 63) <= value < 1 << 63:
        raise ValueError(f"Edit.prompt_length={value!r}: an int from 0 to 2**63 - 1 expected")
    length: Any = torch.tensor([value], device=q.device) if is_int else value
    check_tensor("Edit.prompt_length", length, q, floating=False)
    if length.dtype not in INTEGERS or tuple(length.shape) not in ((1,), (sizes.b,)):
        raise ValueError(
            f"Edit.prompt_length is {length.dtype} {list(length.shape)}: an int, or integers [B] = [{sizes.b}] expected"
        )
    return check_values(length, "Edit.prompt_length", "not negative")[:, None]
