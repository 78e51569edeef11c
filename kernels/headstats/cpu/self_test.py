"""Test of the compiled library against the reference on this machine."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from headstats import reference
from headstats.call import Call
from headstats.cpu import build, library
from headstats.cpu.arguments import COMPUTED, CallArguments
from headstats.spec import StatSpec
from headstats.stats import Result, tensors

M, N = 9, 21


def small_case(dtype: torch.dtype) -> Call:
    """Return a small call with many options and every statistic that the library computes.

    It has grouped heads, a window, softcap, padding, a bias and a sink.
    """
    x = torch.linspace(-3, 3, 2 * 4 * N * 20, dtype=torch.float64).mul(17).sin().view(2, 4, N, 20).to(dtype)
    by_segment = dict.fromkeys(("segments", "segment_value_norms", "segment_outputs"), True)
    not_computed = dict.fromkeys(StatSpec.all().requested().keys() - set(COMPUTED), False)
    spec = replace(StatSpec.all(), **by_segment, **not_computed, targets=False, key_features=False)
    return Call(
        q=x[:, :, :M], k=x[:, 1:3], v=x[:, 2:, :, :13], causal=True, window=17, softcap=2.0, scale=0.5, spec=spec,
        bias=x[:1, :, :M, :1], sinks=x[0, :, 0, 0], key_padding=(torch.arange(N) > 2).expand(2, N),
        k_segments=(torch.arange(N) % 3)[None], n_segments=3,
    )  # fmt: skip


def failure(dtype: torch.dtype) -> str | None:
    """Return why the library must not be used for a dtype, or None."""
    with unset_fake_temporarily():  # the test needs values, not only shapes
        return cached_failure(dtype)


# The attribute that torch.compiler.assume_constant_result sets; calling it would import the compiler and triton.
failure._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


@lru_cache
def cached_failure(dtype: torch.dtype) -> str | None:
    """Do the same, with one test per process and dtype."""
    compiled, reason = library.find()
    if compiled is None:
        return reason
    call = small_case(dtype)
    arguments = CallArguments(call, compiled.structure)
    actual: dict[str, Result] = {"out": arguments.out, "norm": arguments.norm, **arguments.stats}
    for x in (x for result in actual.values() for x in tensors(result)):
        x.fill_(-7)  # new memory may still hold the results of an earlier test
    compiled.attend(arguments.c)
    exact = replace(call, **{n: getattr(call, n).double() for n in ("q", "k", "v", "bias", "sinks")})
    out, norm, stats = reference.run(exact)
    for name, expected in {"out": out, "norm": norm, **stats}.items():
        for x, y in zip(tensors(actual[name]), tensors(expected), strict=True):
            if not torch.allclose(x.to(y.dtype), y, rtol=1e-4, atol=1e-5):
                return f"its library at {build.library_path()} does not reproduce {name} of a small case here"
    return None


def report() -> str:
    """Return one line about the installed library.

    Raises BuildError if it must not be used.
    """
    for dtype in (torch.float32, torch.float64):
        if reason := failure(dtype):
            raise build.BuildError(reason)
    compiled, _ = library.find()
    assert compiled is not None  # `failure` returned None
    return f"backend 'compiled' is ready ({library.LEVELS[compiled.level]}); a small case agrees with the reference"
