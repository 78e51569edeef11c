"""What `headstats.bench` measures: inputs, the ways through them that run in turn, and the targets."""

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
from headstats.triton import backend as launch

if TYPE_CHECKING:
    from torch import Tensor

OFF, DEFAULT, CORE, ONE_PASS, COLUMNS = "off", "default", "core", "one pass", "columns"


@dataclass(frozen=True)
class Target:
    """A bound on (path - minus) / per of medians, or on the path's own number where `per` is None."""

    path: str
    per: str | None = None
    most: float | None = None
    least: float | None = None
    minus: str | None = None
    of: str = "seconds"  # or "mib"


@dataclass(frozen=True)
class Case:
    """Inputs of one kind and size, and the paths that run on them in turn, the first being what others are put to."""

    name: str
    paths: tuple[str, ...]
    n: int
    d: int = 64
    heads: tuple[int, int] = (9, 3)
    rows: int = 1  # batch
    prefix: int = 0  # shared keys before the n of each row
    device: str = "cpu"
    memory: bool = False  # measure peak memory too, in processes of their own
    targets: tuple[Target, ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        """float32 on CPU, bfloat16 on GPUs."""
        return torch.float32 if self.device == "cpu" else torch.bfloat16

    def inputs(self) -> tuple[Tensor, ...]:
        """q, k, v, and with a prefix k0, v0; normal, the same in each process."""
        g = torch.Generator().manual_seed(0)
        (h, hk), own = self.heads, (self.rows, self.n, self.d)
        sizes = [(b, x, n, d) for x in (h, hk, hk) for b, n, d in (own,)]
        if self.prefix:
            sizes += [(1, hk, self.prefix, self.d)] * 2
        return tuple(torch.randn(s, generator=g).to(self.device, self.dtype) for s in sizes)


def cpu_cases(lengths: tuple[int, ...]) -> list[Case]:
    """One layer's attention, causal, against SDPA without statistics and eager with the same."""
    return [_cpu_case(n) for n in lengths]


def _cpu_case(n: int) -> Case:
    blocked, compiled = f"blocked:{DEFAULT}", f"compiled:{DEFAULT}"
    targets = [Target(blocked, "sdpa", most=2.0), Target(compiled, "sdpa", most=1.0)]
    if n >= 2048:
        targets += [Target("eager", blocked, least=7.0), Target("eager", compiled, least=15.0)]
    if n == 8192:
        targets += [Target(blocked, most=80, of="mib"), Target(compiled, most=64, of="mib")]
    paths = ("sdpa", blocked, f"blocked:{OFF}", compiled, f"compiled:{OFF}", "flex", "eager", "eager, lean")
    return Case(f"causal n={n}", paths, n, memory=n in (2048, 8192), targets=tuple(targets))


def prefix_case(suffixes: int = 64, n: int = 16, prefix: int = 2048) -> Case:
    """Short suffixes that share a prefix, against whole sequences and against written-out keys."""
    ours = f"auto:{DEFAULT}"
    targets = (Target("sdpa, whole", ours, least=8.0), Target("sdpa, whole", ours, least=20.0, of="mib"))
    targets = targets if prefix >= 2048 else ()
    paths = ("sdpa, whole", "sdpa, keys written out", ours, f"auto:{OFF}")
    return Case(f"shared prefix {suffixes} x {n} on {prefix}", paths, n, rows=suffixes, prefix=prefix, memory=True,
                targets=targets)  # fmt: skip


def costs_case(backend: str, n: int = 2048) -> Case:
    """Each statistic alone, against none."""
    names = [f"{backend}:only {s.name}" for s in STATISTICS]
    return Case(f"costs {backend} n={n}", (f"{backend}:{OFF}", *names, f"{backend}:{DEFAULT}"), n)


def gpu_cases(lengths: tuple[int, ...]) -> list[Case]:
    """bfloat16, causal: Triton against PyTorch's flash backend, and statistics against none."""
    off, cases = f"triton:{OFF}", []
    for d, core in ((64, 1.25), (128, 1.15)):
        for n in lengths:
            paths = ("sdpa", off, *(f"triton:{x}" for x in (CORE, ONE_PASS, COLUMNS)), "flex")
            targets = (
                Target("sdpa", off, least=0.9), Target(f"triton:{CORE}", off, most=core),
                Target(f"triton:{ONE_PASS}", off, most=1.5), Target(f"triton:{COLUMNS}", off, most=1.0, minus=off),
            )  # fmt: skip
            paths += ("eager",) if n <= 8192 else ()
            cases.append(Case(f"gpu D={d} n={n}", paths, n, d, (16, 4), device="cuda", memory=n == 8192,
                              targets=targets))  # fmt: skip
    long = (off, f"triton:{ONE_PASS}")
    ran = tuple(Target(path, most=float("inf")) for path in long)
    return [*cases, Case("gpu D=128 n=131072", long, 131072, 128, (16, 4), device="cuda", memory=True, targets=ran)]


def ready(case: Case, path: str, inputs: tuple[Tensor, ...]) -> Callable[[], Any]:
    """Does what comes before the measured call, and returns that call. Raises where the path cannot do the case."""
    backend, _, what = path.partition(":")
    if what:
        return _ours(backend, what, inputs)
    q, k, v, *prefix = inputs
    if path.startswith("eager"):
        _room_for_eager(q)
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


def _room_for_eager(q: Tensor) -> None:
    need = 4 * 4 * q.shape[0] * q.shape[1] * q.shape[2] ** 2  # scores, weights, and what is made of them; float32
    if q.is_cuda:
        free = torch.cuda.mem_get_info()[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if need > free:
        raise MemoryError(
            f"the pattern and what is made of it take {need / 2**30:.1f} GiB, {free / 2**30:.1f} are free"
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
    """The statistics that a path's name stands for."""
    if what.startswith("only "):
        return _only(what.removeprefix("only "))
    query_side = [s.name for s in STATISTICS if s.full is not None]
    return {
        OFF: StatSpec.none(),
        DEFAULT: StatSpec(),
        CORE: _only("entropy", "max_prob", "sink", "diagonal", "previous"),
        ONE_PASS: _only(*(n for n in query_side if n in (*launch.IN_KERNEL, *probes.PROBED))),
        COLUMNS: _only("received", "received_max"),
    }[what]


def _only(*names: str) -> StatSpec:
    return replace(StatSpec.none(), **{name: BY_NAME[name].full or True for name in names})
