"""Whether the library does on this machine what the reference says."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from headstats import reference
from headstats.call import Call
from headstats.cpu import build, library
from headstats.cpu.arguments import Arguments
from headstats.spec import StatSpec
from headstats.stats import Result, tensors

M, N = 9, 21


def small_case(dtype: torch.dtype) -> Call:
    """Grouped heads, a window, softcap, padding, a bias, a sink, and every statistic."""
    x = torch.linspace(-3, 3, 2 * 4 * N * 20, dtype=torch.float64).mul(17).sin().view(2, 4, N, 20).to(dtype)
    by_segment = dict.fromkeys(("segments", "segment_value_norms", "segment_outputs"), True)
    spec = replace(StatSpec.all(), **by_segment, targets=False, key_features=False)
    return Call(
        q=x[:, :, :M], k=x[:, 1:3], v=x[:, 2:, :, :13], causal=True, window=17, softcap=2.0, scale=0.5, spec=spec,
        bias=x[:1, :, :M, :1], sinks=x[0, :, 0, 0], key_padding=(torch.arange(N) > 2).expand(2, N),
        k_segments=(torch.arange(N) % 3)[None], n_segments=3,
    )  # fmt: skip


def failure(dtype: torch.dtype) -> str | None:
    """Why the library is not to be used for a dtype, or None."""
    with unset_fake_temporarily():  # shapes alone would not do
        return tried(dtype)


# What torch.compiler.assume_constant_result sets; calling it would import the compiler, and triton with it.
failure._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


@lru_cache
def tried(dtype: torch.dtype) -> str | None:
    """The same, tried once in a process."""
    found, reason = library.find()
    if found is None:
        return reason
    call = small_case(dtype)
    arguments = Arguments(call, found.structure)
    got: dict[str, Result] = {"out": arguments.out, "lse": arguments.lse, **arguments.stats}
    for x in (x for result in got.values() for x in tensors(result)):
        x.fill_(-7)  # what stands in new memory may be the answer to the trial before
    found.attend(arguments.c)
    whole = replace(call, **{n: getattr(call, n).double() for n in ("q", "k", "v", "bias", "sinks")})
    out, lse, stats = reference.run(whole)
    for name, want in {"out": out, "lse": lse, **stats}.items():
        for mine, one in zip(tensors(got[name]), tensors(want), strict=True):
            if not torch.allclose(mine.to(one.dtype), one, rtol=1e-4, atol=1e-5):
                return f"its library at {build.library_path()} does not reproduce {name} of a small case here"
    return None


def report() -> str:
    """One line on the library in place. Raises BuildError if it is not to be used."""
    for dtype in (torch.float32, torch.float64):
        if reason := failure(dtype):
            raise build.BuildError(reason)
    found, _ = library.find()
    assert found is not None  # there is no failure
    return f"backend 'compiled' is ready ({library.LEVELS[found.level]}); a small case agrees with the reference"
