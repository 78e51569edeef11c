"""The compiled CPU backend against the float64 reference."""

from dataclasses import dataclass, fields, replace

import headstats
import pytest
import torch
from headstats import StatSpec
from headstats.call import Call
from headstats.cpu import backend as cpu
from headstats.cpu import build, library
from headstats.cpu import self_test as trial
from headstats.cpu.arguments import COMPUTED
from headstats.validate.call import make_call
from headstats_cases import (
    CELLS,
    CHANGED,
    EDITED,
    OPTIONS,
    PREFIX,
    SEGMENTED,
    WITH_BIAS,
    assert_same,
    extras,
    in_double,
    inputs,
    oracle,
)
from hypothesis import given, settings
from hypothesis import strategies as st

ALL = replace(StatSpec.all(), **dict.fromkeys(StatSpec.all().requested().keys() - set(COMPUTED), False))
EVERY = OPTIONS | WITH_BIAS | SEGMENTED | PREFIX | EDITED | CELLS
EDITS_TOO = ("logit factor and raise", "phase beside tables, not renormalised", "redistribution of what random left",
             "reversed, all before it", "all but counterfactuals")  # fmt: skip
TYPICAL = ("causal", "GPT-OSS", "everything", "opened and hidden", "prefix, everything", "all edits, not renormalised")
pytestmark = pytest.mark.usefixtures("compiled_library")


def check(qkv, options, spec=ALL, **tolerance):
    if spec is ALL:
        n = qkv[1].shape[2] + (options["prefix"][0].shape[2] if "prefix" in options else 0)
        options = extras(qkv[0].shape[2], n, len(qkv[0]), shared=len(qkv[0]) == 2) | options
    got = headstats.attend(*qkv, **options, spec=spec, backend="compiled")
    assert got.backend == "compiled" and got.out.dtype == qkv[0].dtype
    assert_same(got, oracle(qkv, **options, spec=spec), **tolerance)
    return got


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("shape", [(15, 15), (1, 63), (13, 63), (9, 4)], ids=str)
def test_options(name, shape):
    m, n = shape
    check(*inputs(m=m, n=n, **EVERY[name]))


@pytest.mark.parametrize("level", library.LEVELS)
@pytest.mark.parametrize("name", [*TYPICAL, *EDITS_TOO])
def test_every_instruction_set(level, name, monkeypatch):
    found, _ = library.find()
    if found.level < library.LEVELS.index(level):
        pytest.skip(f"this processor has no {level}")
    monkeypatch.setattr(found, "level", library.LEVELS.index(level))
    check(*inputs(m=41, n=111, d=20, dv=37, **EVERY[name]))


@pytest.mark.parametrize("n", [1, 15, 63, 111, 257])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_ragged_sizes_and_head_layouts(n, heads, causal):
    h, hk = heads
    check(*inputs(b=1, h=h, hk=hk, m=n, n=n, d=20, dv=12, causal=causal))


@pytest.mark.parametrize("name", [*TYPICAL, "window", "prefix, window", "window, bidirectional", "knockout"])
@pytest.mark.parametrize("shape", [(257, 1100), (600, 600)], ids=str)
def test_more_keys_and_rows_than_one_block(name, shape):
    m, n = shape
    options = EVERY[name] | ({"prefix": 700} if "prefix" in EVERY[name] else {})
    check(*inputs(b=2, h=3, hk=1, m=m, n=n, d=16, dv=16, **options), tolerance=2e-5, distance=2e-3)


@pytest.mark.parametrize("name", EDITS_TOO)
def test_edits_over_more_keys_and_rows_than_one_block(name):
    """In float64: reversed weights of a long row differ by less than float32 can tell, the largest too."""
    options = EVERY[name] | ({"prefix": 700} if "prefix" in EVERY[name] else {})
    qkv, options = inputs(b=2, h=3, hk=1, m=257, n=700, d=16, dv=16, **options)
    check(tuple(x.double() for x in qkv), in_double(options), tolerance=1e-11, distance=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    b=st.integers(1, 3), hk=st.integers(1, 3), g=st.integers(1, 3), m=st.integers(1, 20), n=st.integers(1, 20),
    d=st.integers(1, 9), dv=st.integers(1, 9), name=st.sampled_from(sorted(EVERY)), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape(b, hk, g, m, n, d, dv, name, seed):
    qkv, options = inputs(b, hk * g, hk, m, n, d, dv, seed, **EVERY[name])
    if name in CELLS:  # whose weights may come as near to each other as float32 can tell
        check(tuple(x.double() for x in qkv), in_double(options), tolerance=1e-11, distance=1e-9)
    else:
        check(qkv, options)


@pytest.mark.parametrize("name", [*TYPICAL, *CELLS])
def test_float64_is_exact(name):
    qkv, options = inputs(m=33, n=63, **EVERY[name])
    check(tuple(x.double() for x in qkv), in_double(options), tolerance=1e-12, distance=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["contiguous", "tokens first", "columns apart"])
def test_half_precision_loses_only_the_output_cast(dtype, layout):
    qkv, options = inputs(m=33, n=63, padding="left", gate=True)
    qkv = strided(tuple(x.to(dtype) for x in qkv), layout)
    got = headstats.attend(*qkv, **options, spec=ALL, backend="compiled")
    want = oracle(qkv, **options, spec=ALL)
    assert got.out.dtype == dtype and got.lse.dtype == torch.float32
    torch.testing.assert_close(got.out.double(), want.out, atol=1e-6, rtol=torch.finfo(dtype).eps)
    got.out = want.out
    assert_same(got, want)


def test_every_number_of_float16():
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    v = bits[bits.isfinite()][:, None].expand(-1, 2)[None, None]
    q, k = torch.zeros(1, 1, 1, 1, dtype=torch.float16), torch.zeros(1, 1, 1, 1, dtype=torch.float16)
    for at in range(0, v.shape[2], 1 << 14):  # each value is its own batch row's only key
        some = v[0, 0, at : at + (1 << 14)][:, None, None]
        b = len(some)
        r = headstats.attend(q.expand(b, -1, -1, -1), k.expand(b, -1, -1, -1), some, spec=StatSpec.none(),
                             backend="compiled")  # fmt: skip
        assert torch.equal(r.out, some)


def strided(qkv, layout):
    if layout == "tokens first":
        return tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv)
    if layout == "columns apart":
        return tuple(x.mT.contiguous().mT for x in qkv)
    return qkv


@pytest.mark.parametrize("layout", ["tokens first", "columns apart"])
@pytest.mark.parametrize("sizes", [{}, {"m": 130, "n": 130, "d": 32, "dv": 32}], ids=["short", "long"])
def test_strided_inputs(layout, sizes):
    qkv, options = inputs(**sizes)
    check(strided(qkv, layout), options)


def test_bias_in_every_layout():
    """Broadcast along each axis, in half precision too, whose lowest number hides."""
    qkv, _ = inputs(m=9, n=15)
    for shape in [(2, 4, 9, 15), (1, 1, 9, 15), (2, 1, 1, 15), (4, 1, 1), (9, 1), (1,)]:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            bias = torch.randn(shape).to(dtype)
            bias.view(-1)[0] = torch.finfo(dtype).min
            check(qkv, {"bias": bias})
    check(qkv, {"bias": torch.randn(15, 9).mT})


def test_large_logits():
    (q, k, v), _ = inputs(n=63, m=63)
    q = 80 * q / q.norm(dim=-1, keepdim=True)
    k = k / k.norm(dim=-1, keepdim=True)
    k[:, :, 5] = q[:, ::2, 40] / 80  # some q.k are exactly 80, and -80 for the opposite key
    k[:, :, 6] = -k[:, :, 5]
    # float32 holds a logit of 80 to 4e-6 and its weight to as much, whatever the backend does
    check((q, k, v), {"scale": 1.0}, tolerance=4e-5, distance=1e-3)


@pytest.mark.parametrize("at", [0, 511, 512, 1999])
def test_a_single_spike_in_a_long_row(at):
    k = torch.zeros(1, 1, 2000, 4)
    k[:, :, at, 0] = 60.0
    q = torch.tensor([1.0, 0, 0, 0]).expand(1, 1, 3, 4)
    v = torch.randn(1, 1, 2000, 4)
    r = check((q, k, v), {"scale": 1.0, "causal": False}, distance=1e-3)
    assert (r.stats.argmax == at).all() and (r.stats.max_prob == 1).all()


def test_ties_go_to_the_leftmost_key():
    q, v = torch.zeros(1, 2, 700, 8), torch.randn(1, 2, 700, 8)
    k = torch.randn(1, 2, 700, 8)
    s = headstats.attend(q, k, v, spec=StatSpec(topk=3), window=520, backend="compiled").stats
    first = (torch.arange(700) - 519).clamp_min(0)
    assert torch.equal(s.argmax[0, 0], first)
    assert torch.equal(s.topk.indices[0, 1, 2:], first[2:, None] + torch.arange(3))


@pytest.mark.parametrize("name", ["causal", "GPT-OSS", "prefix, everything"])
def test_threads_do_not_change_a_bit(name):
    qkv, options = inputs(b=2, h=6, hk=2, m=300, n=700, **EVERY[name])
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        r = headstats.attend(*qkv, **options, spec=ALL, backend="compiled")
        found.append([r.out, r.lse, *(x for x in r.stats.as_dict().values() if isinstance(x, torch.Tensor))])
    torch.set_num_threads(1)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_what_is_no_number_passes_through():
    """A query that is none spoils its own row; a key that is none the rows that see it."""
    (q, k, v), _ = inputs(m=15, n=15)
    q[0, 1, 3] = torch.nan
    k[1, 0, 12] = torch.nan
    r = headstats.attend(q, k, v, backend="compiled")
    spoilt = torch.zeros(2, 4, 15, dtype=torch.bool)
    spoilt[0, 1, 3] = spoilt[1, :2, 12:] = True
    for x in (r.lse, r.stats.entropy, r.stats.max_prob, r.stats.distance, r.out[..., 0]):
        assert torch.equal(x.isnan(), spoilt)


@pytest.mark.parametrize("name", [*TYPICAL, *EDITS_TOO])
def test_gradients_are_those_of_blocked(name):
    grads = []
    for backend in ("compiled", "blocked"):
        qkv, options = inputs(m=9, n=15, **EVERY[name])
        options = in_double(options)
        leaves = [x.double().requires_grad_() for x in qkv]
        r = headstats.attend(*leaves, **options, backend=backend)
        loss = r.out.square().sum() + r.lse.clamp_min(-9).sum()
        grads.append(torch.autograd.grad(loss, leaves))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_what_is_not_asked_for_is_not_there():
    qkv, _ = inputs()
    for name, value in (("entropy", True), ("received", True), ("topk", 3)):
        spec = StatSpec(**{**{s.name: False for s in headstats.STATISTICS}, name: value})
        assert set(check(qkv, {}, spec).stats.as_dict()) == {name}


def test_it_computes_every_statistic_and_reads_the_whole_call():
    """What this backend does not do yet stands here, so that a new statistic or field is not forgotten."""
    not_computed_yet: set[str] = set()  # names of statistics that the C++ lacks
    assert set(cpu.COMPUTED) | not_computed_yet == {s.name for s in headstats.STATISTICS}
    assert {f.name for f in fields(Call)} >= cpu.READ


def test_a_field_it_does_not_know_is_refused():
    @dataclass(eq=False, kw_only=True)
    class Later(Call):
        phase: str | None = None

    qkv, _ = inputs()
    call = make_call(*qkv)
    known = {f.name: getattr(call, f.name) for f in fields(call)}
    assert cpu.unsupported(Later(**known)) is None
    assert "phase" in cpu.unsupported(Later(**known, phase="prompt"))


def test_a_statistic_it_does_not_know_is_refused(monkeypatch):
    monkeypatch.setattr(cpu, "COMPUTED", ("entropy", "max_prob", "distance", "sink"))
    qkv, _ = inputs()
    with pytest.raises(NotImplementedError, match=r"backend='compiled' cannot .* does not compute argmax"):
        headstats.attend(*qkv, backend="compiled")
    assert headstats.attend(*qkv).backend == "blocked"


@pytest.mark.parametrize("name", CHANGED)
def test_auto_takes_it_for_every_edit_but_the_one_it_refuses(name):
    qkv, options = inputs(**CHANGED[name])
    refused = options["edit"].counterfactual == "shuffled"
    assert refused == (cpu.unsupported(make_call(*qkv, **options)) is not None)
    assert headstats.attend(*qkv, **options).backend == ("blocked" if refused else "compiled")


def test_auto_takes_it():
    qkv, _ = inputs()
    assert headstats.attend(*qkv).backend == "compiled"


def test_without_a_library_blocked_runs_and_an_explicit_choice_says_how_to_build(monkeypatch, tmp_path):
    monkeypatch.setenv("HEADSTATS_CACHE", str(tmp_path))
    library.find.cache_clear()
    trial.cached_failure.cache_clear()
    try:
        qkv, _ = inputs()
        assert headstats.attend(*qkv).backend == "blocked"
        with pytest.raises(NotImplementedError, match=f"it is not built \\({build.COMMAND} does that"):
            headstats.attend(*qkv, backend="compiled")
    finally:
        library.find.cache_clear()
        trial.cached_failure.cache_clear()


def test_a_library_that_gives_other_numbers_is_not_used(monkeypatch):
    monkeypatch.setattr(library.find()[0], "attend", lambda arguments: None)  # writes nothing
    trial.cached_failure.cache_clear()
    try:
        assert "does not reproduce" in trial.failure(torch.float32)
    finally:
        trial.cached_failure.cache_clear()
