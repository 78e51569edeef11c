"""Published interventions by numbers that can be written down, and where edits act."""

from dataclasses import fields, replace

import headstats
import pytest
import torch
from headstats import Edit, StatSpec
from headstats.blocked import tiles
from headstats.edits import hash_noise as noise
from headstats_cases import CHANGED, in_double, inputs

N = 6
SEEN = torch.ones(N, N).tril().bool()


@pytest.fixture(params=["reference", "blocked", "blocked in small tiles", "compiled"])
def attend(request, monkeypatch):
    if request.param == "compiled":
        request.getfixturevalue("compiled_library")
        return compiled_or_told
    if "small" in request.param:
        monkeypatch.setattr(tiles, "CELLS", 32)
        monkeypatch.setattr(tiles, "ROWS", 2)
    return lambda q, k, v, **o: headstats.attend(q, k, v, backend=request.param.split()[0], **o)


def compiled_or_told(q, k, v, edit=None, **options):
    """The compiled backend; what it says it cannot do goes to the backend that it names."""
    if edit is None or edit.counterfactual != "shuffled":
        return headstats.attend(q, k, v, edit=edit, **options, backend="compiled")
    with pytest.raises(NotImplementedError, match=r"'shuffled' needs whole rows, which backends 'blocked' and"):
        headstats.attend(q, k, v, edit=edit, **options, backend="compiled")
    r = headstats.attend(q, k, v, edit=edit, **options)
    assert r.backend == "blocked"
    return r


def pattern(attend, scores, **options):
    """p of rows of logits, read off as the output: k and v are the identity."""
    n = scores.shape[-1]
    eye = torch.eye(n, dtype=scores.dtype)[None, None]
    return attend(scores[None, None], eye, eye, scale=1.0, **options).out[0, 0]


def close(a, b):
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=a.dtype).expand_as(a), atol=1e-3, rtol=0)


def test_scaled_logits_of_image_tokens_may_move_mass_either_way(attend):
    """AdaptVis, alpha = 1.5 on z = (2, 1 | 3, 3) and on the same less 5: .201 to .380, and to .048."""
    ids = {"q_segments": torch.zeros(1).long(), "k_segments": torch.tensor([0, 0, 1, 1])}
    edit = Edit(logit_factor=torch.tensor([[1.5, 1.0]]), report_mass=True)
    for shift, want in ((0, 0.380), (-5, 0.048)):
        z = torch.tensor([[2.0, 1, 3, 3]]) + shift
        r = attend(z[None, None], *[torch.eye(4)[None, None]] * 2, scale=1.0, causal=False, **ids, edit=edit)
        close(r.mass_before[..., 0], 0.201)
        close(r.mass_after[..., 0], want)
        torch.testing.assert_close(r.out[..., 0] / r.out[..., 1], torch.tensor(1.5).exp().expand(1, 1, 1))


def test_raised_logits(attend):
    """PAINT and PAI: z > 0 becomes (1 + a) z, z < 0 becomes (1 - a) z."""
    z, ids = (
        torch.tensor([[2.0, -1, 0.5]]),
        {"q_segments": torch.zeros(1).long(), "k_segments": torch.tensor([0, 0, 1])},
    )
    p = pattern(attend, z, causal=False, **ids, edit=Edit(logit_raise=torch.tensor([[0.3, 0.0]])))
    close(p, torch.tensor([[2.6, -0.7, 0.5]]).softmax(-1))


@pytest.mark.parametrize("renormalise", [True, False])
def test_gain_both_ways(attend, renormalise):
    """LocoRE: weights times 1 + beta; renormalised it is a log gain."""
    z, ids = torch.randn(1, 4), {"q_segments": torch.zeros(1).long(), "k_segments": torch.tensor([0, 1, 1, -1])}
    gain = torch.tensor([[1.0, 1.15]])
    p = pattern(attend, z, causal=False, **ids, edit=Edit(gain=gain, renormalise=renormalise))
    want = z.softmax(-1) * torch.tensor([1, 1.15, 1.15, 1])
    close(p, want / want.sum() if renormalise else want)


def test_redistribution_of_visual_sinks(attend):
    """VAR: image {2 ... 6}, sinks {0, 4}: sinks keep 0.6, image tokens that are no sinks get the rest."""
    z = torch.randn(2, 8, dtype=torch.float64)
    ids = {"q_segments": torch.zeros(2).long(), "k_segments": torch.tensor([0, 2, 1, 1, 0, 1, 1, 2])}
    take, give = torch.tensor([[True, False, False]]), torch.tensor([[False, True, False]])
    keep = torch.tensor([[[0.6, 1.0]]])  # the second row's head is left alone
    p = pattern(attend, z, causal=False, **ids, edit=Edit(take=take, give=give, keep_fraction=keep))
    a = z.softmax(-1)
    sink, image = a[0, [0, 4]].sum(), a[0, [2, 3, 5, 6]].sum()
    gain = torch.ones(8).double()
    gain[[0, 4]], gain[[2, 3, 5, 6]] = 0.6, 1 + 0.4 * sink / image
    torch.testing.assert_close(p[0], a[0] * gain, atol=1e-7, rtol=0)
    torch.testing.assert_close(p[1], a[1])
    nothing = Edit(take=take, give=torch.zeros_like(give), keep_fraction=0.0)
    torch.testing.assert_close(pattern(attend, z, causal=False, **ids, edit=nothing), a)


def test_redistribution_to_keys_whose_weight_underflows(attend):
    z, ids = torch.tensor([[200.0, 1, 2, 0]]), {"q_segments": torch.zeros(1).long()}
    edit = Edit(take=torch.tensor([[True, False]]), give=torch.tensor([[False, True]]), keep_fraction=0.25)
    p = pattern(attend, z, causal=False, k_segments=torch.tensor([0, 1, 1, -1]), **ids, edit=edit)
    close(p[0, [0, 3]], [0.25, 0])
    close(p[0, 1:3], 0.75 * torch.tensor([1.0, 2]).softmax(-1))


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("kind", ["uniform", "reversed", "random", "identity", "shuffled"])
def test_counterfactuals(attend, kind, renormalise):
    """CausalMM's forms, causal-aware; not renormalised they are (rowmax - A) C, rand / rowsum C and C / T."""
    z = torch.randn(N, N)
    a = z.masked_fill(~SEEN, -torch.inf).softmax(-1)
    p = pattern(attend, z, edit=Edit(counterfactual=kind, renormalise=renormalise, seed=3))
    assert (p[~SEEN] == 0).all()
    if kind == "shuffled":
        close(p.sort(-1).values, a.sort(-1).values)
        assert not torch.allclose(p, a)
        return
    u = noise.uniform(noise.words(3, *(torch.arange(x) for x in (1, 1, N, N))), torch.float32)[0, 0]
    want = {
        "uniform": SEEN / N, "reversed": (a.amax(-1, keepdim=True) - a) * SEEN,
        "random": u / u.sum(-1, keepdim=True) * SEEN, "identity": torch.eye(N),
    }[kind]  # fmt: skip
    if renormalise:
        want = want / want.sum(-1, keepdim=True).clamp_min(1e-9)
    if kind == "reversed":
        assert (p.gather(-1, a.argmax(-1, keepdim=True))[1:] == 0).all()
        p, want = p[1:], want[1:]  # a single key stays
    close(p, want)


def test_noise_is_the_same_for_a_query_decoded_alone(attend):
    (q, k, v), _ = inputs(m=9, n=9)
    for kind in ("random", "shuffled"):
        edit = Edit(counterfactual=kind, seed=5)
        whole = attend(q, k, v, edit=edit).out
        torch.testing.assert_close(attend(q[:, :, -1:], k, v, edit=edit).out, whole[:, :, -1:])
        assert not torch.allclose(whole, attend(q, k, v, edit=replace(edit, seed=6)).out)


def test_words_are_those_of_unsigned_arithmetic():
    def mix(x):
        x = (x + 0x9E3779B9) % 2**32
        x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
        x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
        return x ^ (x >> 16)

    found = noise.words(2**32 - 1, torch.arange(2), torch.arange(3), torch.arange(-2, 3), torch.arange(4))
    for b, h, i, j in torch.cartesian_prod(*map(torch.arange, found.shape)).tolist():
        state = mix(b ^ mix(2**32 - 1))
        state = mix(h ^ state)
        state = mix((i - 2) % 2**32 ^ state)
        assert found[b, h, i, j] == mix(mix(j) ^ state)
    u = noise.uniform(noise.words(0, *(torch.arange(x) for x in (2, 2, 64, 64))), torch.float32)
    assert u.min() > 0 and u.max() < 1 and abs(u.mean() - 0.5) < 0.01 and abs(u.var() - 1 / 12) < 0.01


def test_pattern_of_another_run(attend):
    """Chosen heads attend as the other run does, and read this run's values."""
    (q, k, v), _ = inputs(m=N, n=N)
    (q2, k2, _), _ = inputs(m=N, n=N, seed=1)
    heads = torch.tensor([True, False, False, True])
    plain, other = attend(q, k, v), attend(q2, k2, v)
    r = attend(q, k, v, edit=Edit(pattern_from=(q2, k2), pattern_heads=heads))
    for x, y, z in ((r.out, other.out, plain.out), (r.lse, other.lse, plain.lse)):
        assert torch.equal(x[:, heads], y[:, heads]) and torch.equal(x[:, ~heads], z[:, ~heads])


@pytest.mark.parametrize("name", CHANGED)
def test_other_rows_are_left_alone_to_the_last_bit(attend, name):
    qkv, options = inputs(m=9, n=9, **CHANGED[name])
    rows = torch.zeros(2, 9, dtype=torch.bool)
    rows[0, 3:], rows[1, 6:8] = True, True
    edit = replace(options.pop("edit"), rows=rows, phase=None, prompt_length=None)
    ids = {x: options[x] for x in ("q_segments", "k_segments") if x in options}
    plain_options = {x: y for x, y in options.items() if x not in ids or "segment_mask" in options}
    if "segment_open" in options:
        plain_options |= ids
    r = attend(*qkv, **options, edit=edit, spec=replace(StatSpec(), segments=False))
    plain = headstats.attend(*qkv, **plain_options, backend=r.backend)
    away = ~rows[:, None].expand(-1, 4, -1)
    assert torch.equal(r.out[away], plain.out[away]) and torch.equal(r.lse[away], plain.lse[away])
    assert torch.equal(r.stats.entropy[away], plain.stats.entropy[away])
    assert not torch.equal(r.out, plain.out)


def test_phases(attend):
    (q, k, v), _ = inputs(m=N, n=N)
    hot = Edit(temperature=torch.tensor(3.0))
    plain, edited = attend(q, k, v).out, attend(q, k, v, edit=hot).out
    last = (q[:, :, -1:], k, v)
    assert torch.equal(attend(q, k, v, edit=replace(hot, phase="prompt")).out, edited)
    assert torch.equal(attend(q, k, v, edit=replace(hot, phase="decoding")).out, plain)
    assert torch.equal(attend(*last, edit=replace(hot, phase="prompt")).out, attend(*last).out)
    assert torch.equal(attend(*last, edit=replace(hot, phase="decoding")).out, attend(*last, edit=hot).out)
    r = attend(q, k, v, edit=replace(hot, phase="decoding", prompt_length=torch.tensor([2, 4])))
    assert torch.equal(r.out[0, :, :2], plain[0, :, :2]) and torch.equal(r.out[0, :, 2:], edited[0, :, 2:])
    assert torch.equal(r.out[1, :, :4], plain[1, :, :4]) and torch.equal(r.out[1, :, 4:], edited[1, :, 4:])


def leaves_of(name, m=3, n=4, zeros=False, **sizes):
    """A function of q, k, v and every floating tensor of the edit, in float64, and those tensors."""
    qkv, options = inputs(**({"b": 2, "h": 2, "hk": 1, "m": m, "n": n, "d": 3, "dv": 2} | sizes), **CHANGED[name])
    options = in_double(options)
    edit = options.pop("edit")
    if edit.gain is not None and (edit.renormalise or not zeros):
        edit = replace(edit, gain=edit.gain + 0.1)  # a renormalised gain of 0 has no gradient, and is refused
    if edit.keep_fraction is not None:
        edit = replace(edit, keep_fraction=0.2 + 0.6 * edit.keep_fraction)
    given = {f.name: getattr(edit, f.name) for f in fields(edit)}
    moved = {x: y for x, y in given.items() if isinstance(y, torch.Tensor) and y.is_floating_point()}
    pair = edit.pattern_from or ()

    def f(q, k, v, *more, backend="blocked"):
        changed = dict(zip(moved, more[len(pair) :], strict=True))
        if pair:
            changed["pattern_from"] = more[:2]
        r = headstats.attend(q, k, v, **options, edit=replace(edit, **changed), spec=StatSpec.none(), backend=backend)
        return r.out, r.lse.masked_fill(r.lse == -torch.inf, 0)

    return f, [x.double().clone().requires_grad_() for x in (*qkv, *pair, *moved.values())]


@pytest.mark.parametrize("name", CHANGED)
def test_gradcheck(name, monkeypatch):
    monkeypatch.setattr(tiles, "CELLS", 16)
    monkeypatch.setattr(tiles, "ROWS", 2)
    f, leaves = leaves_of(name)
    assert torch.autograd.gradcheck(f, leaves, fast_mode=True)


@pytest.mark.parametrize("name", CHANGED)
def test_gradients_are_those_of_the_reference(name):
    f, leaves = leaves_of(name, m=7, n=9, zeros=True, h=4, hk=2)
    got, want = (
        torch.autograd.grad([x.sin().sum() for x in f(*leaves, backend=b)], leaves) for b in ("blocked", "reference")
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["uniform", "reversed", "shuffled", "identity", "pattern_from"])
def test_counterfactuals_of_some_rows_of_some_heads_leave_the_others_alone(attend, kind):
    """Heads given as [B, H, M]: every row is that of the whole counterfactual, or that of no edit."""
    g = torch.Generator().manual_seed(0)
    q, k, v, q2, k2 = (torch.randn(2, 3, N, 8, generator=g, dtype=torch.float64).float() for _ in range(5))
    here = torch.rand(2, 3, N, generator=g) < 0.5
    if kind == "pattern_from":
        whole, some = Edit(pattern_from=(q2, k2)), Edit(pattern_from=(q2, k2), pattern_heads=here)
    else:
        whole, some = Edit(counterfactual=kind), Edit(counterfactual=kind, counterfactual_heads=here)
    changed, own = attend(q, k, v, edit=whole).out, attend(q, k, v).out
    assert not torch.allclose(changed[..., 1:, :], own[..., 1:, :], atol=1e-2)
    out = attend(q, k, v, edit=some).out
    torch.testing.assert_close(out, torch.where(here[..., None], changed, own), atol=1e-6, rtol=1e-5)
