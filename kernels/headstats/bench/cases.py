"""The cases of the benchmark: inputs, paths through them, and targets."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from headstats import probes
from headstats.api import attend
from headstats.bench import peers
from headstats.edit import Edit
from headstats.spec import StatSpec
from headstats.stats import ARGUMENT, BY_NAME, STATISTICS
from headstats.triton import backend as triton

if TYPE_CHECKING:
    from torch import Tensor

OFF, DEFAULT, CORE, ONE_PASS, COLUMNS = "off", "default", "core", "one pass", "columns"


@dataclass(frozen=True)
class SpeedTarget:
    """A bound on (path - minus) / per of the medians.

    If `per` is None, it bounds the path's own number.
    """

    path: str
    per: str | None = None
    most: float | None = None
    least: float | None = None
    minus: str | None = None
    of: str = "seconds"  # or "mib"


@dataclass(frozen=True)
class KernelCase:
    """Inputs of one kind and size, and the paths that run on them in turn.

    The first path is the baseline.
    """

    name: str
    paths: tuple[str, ...]
    n: int
    d: int = 64
    heads: tuple[int, int] = (9, 3)
    rows: int = 1  # batch
    prefix: int = 0  # shared keys before the n of each row
    device: str = "cpu"
    memory: bool = False  # also measure peak memory, in separate processes
    targets: tuple[SpeedTarget, ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        """float32 on CPU, bfloat16 on GPUs."""
        return torch.float32 if self.device == "cpu" else torch.bfloat16

    def inputs(self) -> tuple[Tensor, ...]:
        """Return q, k, v, and with a prefix k0, v0.

        They are normal random numbers, the same in each process.
        """
        g = torch.Generator().manual_seed(0)
        (h, hk), own = self.heads, (self.rows, self.n, self.d)
        sizes = [(b, x, n, d) for x in (h, hk, hk) for b, n, d in (own,)]
        if self.prefix:
            sizes += [(1, hk, self.prefix, self.d)] * 2
        return tuple(torch.randn(s, generator=g).to(self.device, self.dtype) for s in sizes)


def cpu_cases(lengths: tuple[int, ...]) -> list[KernelCase]:
    """Return cases of one layer's causal attention.

    They compare with SDPA without statistics and with eager attention with the same statistics.
    """
    return [_cpu_case(n) for n in lengths]


def _cpu_case(n: int) -> KernelCase:
    blocked, compiled = f"blocked:{DEFAULT}", f"compiled:{DEFAULT}"
    targets = [SpeedTarget(blocked, "sdpa", most=2.0), SpeedTarget(compiled, "sdpa", most=1.0)]
    if n >= 2048:
        targets += [SpeedTarget("eager", blocked, least=7.0), SpeedTarget("eager", compiled, least=15.0)]
    if n == 8192:
        targets += [SpeedTarget(blocked, most=80, of="mib"), SpeedTarget(compiled, most=64, of="mib")]
    paths = ("sdpa", blocked, f"blocked:{OFF}", compiled, f"compiled:{OFF}", "flex", "eager", "eager, lean")
    return KernelCase(f"causal n={n}", paths, n, memory=n in (2048, 8192), targets=tuple(targets))


def prefix_case(suffixes: int = 64, n: int = 16, prefix: int = 2048) -> KernelCase:
    """Return a case of short suffixes that share a prefix.

    It compares with whole sequences and with written-out keys.
    """
    ours = f"auto:{DEFAULT}"
    targets = (SpeedTarget("sdpa, whole", ours, least=8.0), SpeedTarget("sdpa, whole", ours, least=20.0, of="mib"))
    targets = targets if prefix >= 2048 else ()
    paths = ("sdpa, whole", "sdpa, keys written out", ours, f"auto:{OFF}")
    name = f"shared prefix {suffixes} x {n} on {prefix}"
    return KernelCase(name, paths, n, rows=suffixes, prefix=prefix, memory=True, targets=targets)


def costs_case(backend: str, n: int = 2048) -> KernelCase:
    """Return a case of each statistic alone, against none."""
    names = [f"{backend}:only {s.name}" for s in STATISTICS]
    return KernelCase(f"costs {backend} n={n}", (f"{backend}:{OFF}", *names, f"{backend}:{DEFAULT}"), n)


def gpu_cases(lengths: tuple[int, ...]) -> list[KernelCase]:
    """Return causal bfloat16 cases for GPUs.

    They compare Triton with PyTorch's flash backend, and statistics with none.
    """
    off, cases = f"triton:{OFF}", []
    for d, core in ((64, 1.25), (128, 1.15)):
        for n in lengths:
            paths = ("sdpa", off, *(f"triton:{x}" for x in (CORE, ONE_PASS, COLUMNS)), "flex")
            targets = (
                SpeedTarget("sdpa", off, least=0.9), SpeedTarget(f"triton:{CORE}", off, most=core),
                SpeedTarget(f"triton:{ONE_PASS}", off, most=1.5),
                SpeedTarget(f"triton:{COLUMNS}", off, most=1.0, minus=off),
            )  # fmt: skip
            paths += ("eager",) if n <= 8192 else ()
            name, memory = f"gpu D={d} n={n}", n == 8192
            cases.append(KernelCase(name, paths, n, d, (16, 4), device="cuda", memory=memory, targets=targets))
    long = (off, f"triton:{ONE_PASS}")
    ran = tuple(SpeedTarget(path, most=float("inf")) for path in long)
    return [
        *cases,
        KernelCase("gpu D=128 n=131072", long, 131072, 128, (16, 4), device="cuda", memory=True, targets=ran),
    ]


def ready(case: KernelCase, path: str, inputs: tuple[Tensor, ...]) -> Callable[[], Any]:
    """Prepare a path and return the call to measure.

    Raises if the path cannot do the case.
    """
    backend, _, what = path.partition(":")
    if what:
        return _ours(backend, what, inputs)
    q, k, v, *prefix = inputs
    if path.startswith("eager"):
        _check_memory_for_eager(q)
        peer = peers.eager if path == "eager" else peers.eager_lean
        return lambda: peer(q, k, v)
    if path == "flex":
        return peers.flex(q, k, v)
    if path == "sdpa":
        return lambda: peers.sdpa(q, k, v)
    k, v = (torch.cat([x.expand(len(own), -1, -1, -1), own], 2) for x, own in zip(prefix, (k, v), strict=True))
    if path == "sdpa, whole":  # all tokens of each sequence are queries, as when nothing is shared
        q = torch.randn(*q.shape[:2], k.shape[2], q.shape[3])
        return lambda: peers.sdpa(q, k, v)
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril_(case.prefix)
    return lambda: scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)


def _check_memory_for_eager(q: Tensor) -> None:
    """Raise MemoryError if the pattern of eager attention does not fit."""
    need = 4 * 4 * q.shape[0] * q.shape[1] * q.shape[2] ** 2  # scores, weights, and two results of them; float32
    if q.is_cuda:
        free = torch.cuda.mem_get_info()[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if need > free:
        raise MemoryError(
            f"the pattern and its intermediate results take {need / 2**30:.1f} GiB, {free / 2**30:.1f} are free"
        )


def _ours(backend: str, what: str, inputs: tuple[Tensor, ...]) -> Callable[[], Any]:
    q, k, v, *prefix = inputs
    spec, more = spec_of(what), {}
    if prefix:
        more["prefix"] = tuple(prefix)
    if what == CORE:
        more["edit"] = Edit(gate=torch.full(q.shape[:2], 0.5, device=q.device))
    m, n = q.shape[2], k.shape[2]
    arguments = {
        "k_segments": torch.arange(n, device=q.device).mul(8) // n,
        "targets": torch.arange(m, device=q.device)[:, None] // 2,
        "key_features": torch.ones(n, 4, device=q.device),
    }
    more |= {x: arguments[x] for name, x in ARGUMENT.items() if getattr(spec, name)}

    def run() -> Any:
        with torch.no_grad():
            return attend(q, k, v, spec=spec, backend=backend, **more)

    return run


def spec_of(what: str) -> StatSpec:
    """Return the statistics that a path's name stands for."""
    if what.startswith("only "):
        return _only(what.removeprefix("only "))
    all_names = [s.name for s in STATISTICS if s.full is not None]
    return {
        OFF: StatSpec.none(),
        DEFAULT: StatSpec(),
        CORE: _only("entropy", "max_prob", "sink", "diagonal", "previous"),
        ONE_PASS: _only(*(n for n in all_names if n in (*triton.IN_KERNEL, *probes.PROBED))),
        COLUMNS: _only("received", "received_max"),
    }[what]


def _only(*names: str) -> StatSpec:
    return replace(StatSpec.none(), **{name: BY_NAME[name].full or True for name in names})
