"""Calls with tensors that are not plain and dense, in a process of its own: a crash is then a failure of one test.

Every call must give the reference's numbers on the plain tensors, or an error that names the argument. Prints the
number of calls, how many were refused, and the first wrong ones.
"""

import random
import sys
import warnings

import headstats
import torch
from headstats import Edit, StatSpec
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

warnings.simplefilter("ignore")
torch.set_num_threads(1)


class Subclass(torch.Tensor):
    """Ordinary memory under another name."""


class Wrapper(torch.Tensor):
    """No memory at all, as in DTensor."""

    @staticmethod
    def __new__(cls, x):
        return torch.Tensor._make_wrapper_subclass(cls, x.shape, dtype=x.dtype)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError("no operator of a wrapper may run")


def freed(x):
    y = x.clone()
    y.untyped_storage().resize_(0)
    return y


def shortened(x):
    y = x.clone()
    y.untyped_storage().resize_(max(0, y.untyped_storage().nbytes() // 2))
    return y


def fake(x):
    with FakeTensorMode() as mode:
        return mode.from_tensor(x)


def strided(x):
    return torch.stack([x, x + 1 if x.dtype != torch.bool else ~x], -1)[..., 0]


def offset(x):
    return torch.cat([x.flatten()[:3], x.flatten()])[x.flatten()[:3].numel() :].view(x.shape)


REFUSED = {
    "freed": freed, "shortened": shortened, "fake": fake, "meta": lambda x: x.to("meta"), "wrapper": Wrapper,
    "sparse": lambda x: x.to_sparse(),
    "nested": lambda x: torch.nested.nested_tensor(list(x)) if x.dim() > 1 else freed(x),
    "quantized": lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),
    "uninitialised": lambda x: torch.nn.parameter.UninitializedParameter(),
}  # fmt: skip
EQUAL = {
    "plain": lambda x: x, "parameter": lambda x: torch.nn.Parameter(x, requires_grad=x.is_floating_point()),
    "subclass": lambda x: x.as_subclass(Subclass), "strided": strided, "offset": offset,
    "negative": lambda x: torch.complex(-x.float(), -x.float()).conj().imag.to(x.dtype) if x.dtype == torch.float64
    else torch.complex(torch.zeros_like(x), x.neg()).conj().imag if x.dtype == torch.float32 else x,
    "transposed": lambda x: x.mT.contiguous().mT if x.dim() > 1 else x,
    "zero": lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype) if x.dtype == torch.float32 else x,
    "tangent": lambda x: forward_ad.make_dual(x, torch.ones_like(x)) if x.dtype == torch.float32 else x,
}  # fmt: skip


def arguments(draw: random.Random) -> tuple[dict, dict]:
    """Tensors by name, and other options, of one call."""
    b, hk, g, n, d = (
        draw.choice([1, 2]),
        draw.choice([1, 2]),
        draw.choice([1, 2]),
        draw.choice([3, 17]),
        draw.choice([4, 16]),
    )
    m, h = draw.choice([1, min(3, n), n]), hk * g
    tensors = {"q": torch.randn(b, h, m, d), "k": torch.randn(b, hk, n, d), "v": torch.randn(b, hk, n, d)}
    total = n
    if draw.random() < 0.2:
        total = n + 4
        tensors |= {"prefix.0": torch.randn(1, hk, 4, d), "prefix.1": torch.randn(1, hk, 4, d)}
    more = {
        "bias": torch.randn(1, 1, m, total), "alibi": torch.rand(h), "sinks": torch.randn(h),
        "key_padding": torch.rand(b, total) < 0.8, "key_features": torch.randn(total, 2),
        "targets": torch.randint(-1, total, (m, 2)), "edit.gate": torch.rand(b, h),
        "edit.temperature": 0.5 + torch.rand(h),
    }  # fmt: skip
    tensors |= {name: more[name] for name in draw.sample(sorted(more), draw.choice([0, 1, 2]))}
    if draw.random() < 0.3:
        tensors |= {"q_segments": torch.randint(-1, 2, (m,)), "k_segments": torch.randint(-1, 2, (total,)),
                    "segment_mask": torch.rand(2, 2) < 0.8, "edit.gain": 0.5 + torch.rand(2, 2)}  # fmt: skip
    spec = draw.choice([StatSpec(), StatSpec.all(), StatSpec.none()])
    if spec == StatSpec.none() and {"targets", "key_features", "k_segments"} & set(tensors):
        spec = StatSpec()
    return tensors, {"causal": draw.random() < 0.7, "window": draw.choice([None, None, 2, 2**70]), "spec": spec}


def attend(tensors: dict, options: dict, backend: str):
    """Call `attend` with pairs and edits put together."""
    plain = {name: x for name, x in tensors.items() if "." not in name}
    edit = {name[5:]: x for name, x in tensors.items() if name.startswith("edit.")}
    if "prefix.0" in tensors:
        plain["prefix"] = tensors["prefix.0"], tensors["prefix.1"]
    return headstats.attend(**plain, **options, edit=Edit(**edit) if edit else None, backend=backend)


def is_same(got, want) -> bool:
    """Whether two results agree."""
    pairs = [(got.out, want.out), (got.lse, want.lse)]
    for name, x in want.stats.as_dict().items():
        y = getattr(got.stats, name)
        pairs += zip(y, x, strict=True) if name == "topk" else [(y, x)]
    return all(torch.allclose(x.detach(), y.detach().to(x.dtype), rtol=1e-3, atol=1e-4) for x, y in pairs)


def one_call(draw: random.Random) -> tuple[str, str]:
    """Run one call: its outcome ("right", "refused" or what was wrong) and what it was."""
    tensors, options = arguments(draw)
    name = draw.choice(sorted(tensors))
    kind = draw.choice(sorted(REFUSED)) if draw.random() < 0.4 else draw.choice(sorted(EQUAL))
    backend = draw.choice(["auto", "compiled", "compiled", "blocked", "reference"])
    what = f"{name} {kind} {backend} {sorted(tensors)} {options}"
    plain = dict(tensors)
    try:
        odd = (REFUSED | EQUAL)[kind](tensors[name])
    except (RuntimeError, NotImplementedError, TypeError):
        return "right", what  # torch itself makes no such tensor
    if kind == "zero" and tensors[name].dtype == torch.float32:
        plain[name] = torch.zeros_like(tensors[name])
    try:
        got = attend(tensors | {name: odd}, options, backend)
    except (TypeError, ValueError, NotImplementedError) as error:
        public = name.split(".")[0 if name.startswith("prefix") else -1]
        named = public in str(error) or f"backend={backend!r}" in str(error)
        return ("refused" if named and (kind not in EQUAL or kind in ("tangent", "zero")) else f"error: {error}"), what
    if kind in REFUSED:
        return "was not refused", what
    if kind == "tangent" and got.backend != "reference" and tensors[name].dtype == torch.float32:
        return "the tangent was dropped", what
    return ("right" if is_same(got, attend(plain, options, "reference")) else "wrong numbers"), what


def main(count: int) -> int:
    """Run the calls, and return how many were wrong."""
    draw = random.Random(0)
    torch.manual_seed(0)
    outcomes: dict[str, int] = {}
    with forward_ad.dual_level():
        for _ in range(count):
            outcome, what = one_call(draw)
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
            if outcome not in ("right", "refused") and outcomes[outcome] <= 3:
                print(outcome, what)
    print(f"{count} calls: {outcomes.pop('right', 0)} right, {outcomes.pop('refused', 0)} refused, {outcomes}")
    return sum(outcomes.values())


if __name__ == "__main__":
    sys.exit(min(main(int(sys.argv[1])), 100))
