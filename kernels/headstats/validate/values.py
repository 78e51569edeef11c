"""Checks of values, where the other checks need only shapes and dtypes.

While a compiler traces, values do not exist yet: the check becomes an operator of the graph and raises when that runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch._subclasses.fake_tensor import FakeTensor

if TYPE_CHECKING:
    from torch import Tensor


def is_tracing(x: Tensor) -> bool:
    """Whether a compiler traces or tensors are fake: values do not exist yet."""
    return torch.compiler.is_compiling() or isinstance(x, FakeTensor)


def check_values(x: Tensor, name: str, rule: str, limit: int | None = None) -> Tensor:
    """Return x if its values obey the rule; else raise ValueError.

    The message names the argument.
    """
    if is_tracing(x):
        return torch.ops.headstats.checked(x, name, rule, limit)
    RULES[rule](x, name, limit)
    return x


def _ids(x: Tensor, name: str, limit: int | None) -> None:
    if x.numel() and (int(x.min()) < -1 or (limit is not None and int(x.max()) >= limit)):
        allowed = "-1 (none) or more" if limit is None else f"-1 (none) to {limit - 1}"
        raise ValueError(f"{name} holds ids from {int(x.min())} to {int(x.max())}: {allowed} allowed")


def _positive(x: Tensor, name: str, _) -> None:
    if not bool(((x > 0) & x.isfinite()).all()):
        raise ValueError(f"{name} goes down to {float(x.min())}: finite numbers > 0 expected")


def _finite(x: Tensor, name: str, _) -> None:
    if not bool(x.isfinite().all()):
        raise ValueError(f"{name} holds numbers that are not finite: use Edit.knockout to cut a pair of segments")


def _not_negative(x: Tensor, name: str, _) -> None:
    if bool((x < 0).any()):
        raise ValueError(f"{name} goes down to {x.min().item()}: numbers >= 0 expected")


def _has_a_logarithm(x: Tensor, name: str, _) -> None:
    if not bool((x > 0).all()):
        raise ValueError(
            f"{name} requires grad and is 0 somewhere, where log(gain) has no gradient: use small numbers, "
            "Edit.knockout for cells that shall be 0, or renormalise=False"
        )


def _fraction(x: Tensor, name: str, _) -> None:
    if not bool(((x >= 0) & (x <= 1)).all()):
        raise ValueError(f"{name} goes from {float(x.min())} to {float(x.max())}: 0 to 1 expected")


def _apart(x: Tensor, name: str, _) -> None:
    if bool(x.any()):
        raise ValueError(f"{name} overlap: a pair of segments cannot do both")


RULES: dict[str, Callable[[Tensor, str, int | None], None]] = {
    "ids": _ids, "positive": _positive, "finite": _finite, "not negative": _not_negative,
    "has a logarithm": _has_a_logarithm, "fraction": _fraction, "apart": _apart,
}  # fmt: skip


def _checked(x: Tensor, name: str, rule: str, limit: int | None) -> Tensor:
    RULES[rule](x, name, limit)
    return x.clone()  # an operator must not return its own input


library = torch.library.Library("headstats", "FRAGMENT")
library.define("checked(Tensor x, str name, str rule, SymInt? limit) -> Tensor")
library.impl("checked", _checked, "CompositeExplicitAutograd")
torch.library.register_fake("headstats::checked", lambda x, name, rule, limit: torch.empty_like(x), lib=library)
torch.library.register_autograd("headstats::checked", lambda ctx, grad: (grad, None, None, None), lib=library)
