"""Exact rows, pooled maps and segment masses against the pattern that the float64 reference holds."""

import subprocess
import sys
from itertools import pairwise

import headstats
import pytest
import torch
from headstats import StatSpec
from headstats.blocked import tiles
from headstats.reference import build_pattern
from headstats.validate.call import make_call
from headstats_cases import EDITED, OPTIONS, PREFIX, SEGMENTED, WITH_BIAS, inputs

EVERY = OPTIONS | WITH_BIAS | SEGMENTED | PREFIX | EDITED
SHAPES = [(7, 33), (9, 4)]


@pytest.fixture(params=["one tile", "small tiles"])
def tiling(request, monkeypatch):
    if request.param == "small tiles":
        monkeypatch.setattr(tiles, "CELLS", 64)
        monkeypatch.setattr(tiles, "ROWS", 2)


def case(name, m, n):
    """q, k, lse and options of a call, its pattern in float64, and which queries count."""
    (q, k, v), options = inputs(m=m, n=n, d=8, dv=5, **EVERY[name])
    r = headstats.attend(q, k, v, **options, spec=StatSpec.none())
    double = {**options, "prefix": tuple(x.double() for x in options["prefix"])} if "prefix" in options else options
    call = make_call(q.double(), k.double(), v.double(), **double, spec=StatSpec.none())
    real = torch.ones(2, m).bool() if call.query_padding is None else call.query_padding
    pattern, _ = build_pattern(call)
    visible = pattern.visible & real[:, None, :, None]
    return (q, k, r.lse), options, pattern.p, real, visible.expand(pattern.p.shape)


def close(got, want, tolerance=1e-5):
    torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows(name, shape, tiling):
    given, options, p, _, _ = case(name, *shape)
    shared = torch.tensor([3, 4, 5, 0, 3, 6])
    close(headstats.pattern_rows(*given, shared, **options), p[:, :, shared])
    own = torch.tensor([[1, 2, -1], [6, -1, 5]])
    got = headstats.pattern_rows(*given, own, **options)
    for b in range(2):
        close(got[b], p[b][:, own[b]] * (own[b] >= 0)[:, None])


def cut(n, bins):
    """Edges of bins: numpy.array_split's rule."""
    sizes = [n // bins + (i < n % bins) for i in range(bins)]
    return [sum(sizes[:i]) for i in range(bins + 1)]


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("resolution", [(4, 5), (99, 1)], ids=str)
def test_pooled_maps(name, resolution, tiling):
    m, n = 13, 23
    given, options, p, real, visible = case(name, m, n)
    p, n = p * real[:, None, :, None], p.shape[3]
    rows, columns = cut(m, min(resolution[0], m)), cut(n, min(resolution[1], n))
    blocks = [[(slice(*i), slice(*j)) for j in pairwise(columns)] for i in pairwise(rows)]

    def pooled(f):
        return torch.stack([torch.stack([f(i, j) for i, j in line], -1) for line in blocks], -2)

    wants = {
        "sum": pooled(lambda i, j: p[..., i, j].sum((2, 3))),
        "mean": pooled(lambda i, j: p[..., i, j].mean((2, 3))),
        "max": pooled(lambda i, j: p[..., i, j].amax((2, 3))),
        "mean_visible": pooled(lambda i, j: p[..., i, j].sum((2, 3)) / visible[..., i, j].sum((2, 3)).clamp_min(1)),
    }
    for reduce, want in wants.items():
        got = headstats.pooled_pattern(*given, resolution=resolution, reduce=reduce, **options)
        close(got.values, want, 1e-4 if reduce == "sum" else 1e-5)
        assert got.query_edges.tolist() == rows and got.key_edges.tolist() == columns


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("shared", [True, False])
def test_segment_mass(name, shared, tiling):
    given, options, p, real, _ = case(name, 13, 23)
    n, g = p.shape[3], torch.Generator().manual_seed(0)
    rows = torch.randint(-1, 3, (1 if shared else 2, 13), generator=g)
    columns = torch.randint(-1, 4, (1 if shared else 2, n), generator=g)
    columns[columns == 1] = 0  # segment 1 has no member
    counted = (real[:, None] & (p.sum(-1) > 0)).double()
    inside = (rows[..., None] == torch.arange(3)).double()
    to = (columns[..., None] == torch.arange(4)).double()
    total = inside[:, None].mT @ (p * real[:, None, :, None]) @ to[:, None]
    mass = total / (counted[:, :, None] @ inside[:, None]).mT.clamp_min(1)
    ids = (rows[0], columns[0]) if shared else (rows, columns)
    close(headstats.segment_mass(*given, *ids, **options), mass)
    keys = to if options.get("key_padding") is None else to * options["key_padding"][..., None]
    got = headstats.segment_mass(*given, *ids, reduce="mean", **options)
    close(got, mass / keys.sum(1).clamp_min(1)[:, None, None])


def test_masses_are_those_of_the_segments_statistic():
    """Aggregated over queries: also where q_segments and k_segments belong to a mask and are others."""
    (q, k, v), options = inputs(m=20, n=20, table=("segment_mask",), packed=True)
    columns, rows = torch.arange(20) % 3, torch.arange(20) // 7
    r = headstats.attend(q, k, v, **options, spec=StatSpec.none())
    packs = options.pop("k_segments")
    same = packs[:, None] == packs
    s = headstats.attend(q, k, v, bias=torch.where(same, 0.0, -torch.inf), k_segments=columns).stats.segments
    want = torch.stack([s[:, :, rows == i].mean(2) for i in range(3)], 2)
    got = headstats.segment_mass(
        q, k, r.lse, rows, columns, q_segments=packs, k_segments=packs, segment_mask=torch.eye(3).bool()
    )
    close(got, want.double())
    close(got.sum(-1), torch.ones(2, 4, 3).double())


def test_block_means_of_thought_anchors():
    """A planted column, which all later sentences read: its vertical score is a spike."""
    p = torch.eye(12).double()
    p[3:] = p[3:] / 2
    p[3:, 1] += 0.5
    sentences = torch.arange(12) // 3
    q, k = p.log().clamp_min(-1e4)[None, None], torch.eye(12).double()[None, None]
    lse = headstats.attend(q, k, k, scale=1.0).lse
    got = headstats.segment_mass(q, k, lse, sentences, sentences, reduce="mean", scale=1.0)[0, 0]
    want = p.view(4, 3, 4, 3).mean((1, 3))
    close(got, want)
    assert got[1:, 0].tolist() == pytest.approx([0.5 / 3] * 3)


def test_rows_sum_to_one_and_pooled_means_to_the_number_of_queries():
    (q, k, v), _ = inputs(m=40, n=57, causal=False)
    lse = headstats.attend(q, k, v, causal=False).lse
    rows = headstats.pattern_rows(q, k, lse, torch.arange(40), causal=False)
    close(rows.sum(-1), torch.ones(2, 4, 40).double())
    pooled = headstats.pooled_pattern(q, k, lse, resolution=(6, 11), causal=False)
    cells = pooled.query_edges.diff()[:, None] * pooled.key_edges.diff()
    close((pooled.values * cells).sum(-1), pooled.query_edges.diff().double().expand(2, 4, -1), 1e-4)


def test_without_lse_and_in_float64_and_half():
    (q, k, v), _ = inputs(m=9, n=9)
    want = headstats.pattern_rows(q.double(), k.double(), None, torch.arange(9))
    assert want.dtype == torch.float64
    close(headstats.pattern_rows(q, k, None, torch.arange(9)), want)
    half = [x.bfloat16() for x in (q, k, v)]
    lse = headstats.attend(*half).lse
    got = headstats.pattern_rows(*half[:2], lse, torch.arange(9))
    want = headstats.pattern_rows(*(x.double() for x in half[:2]), lse.double(), torch.arange(9))
    assert got.dtype == torch.float32
    close(got, want)


def test_what_is_wrong_is_said():
    (q, k, v), _ = inputs(m=9, n=12)
    lse, rows = headstats.attend(q, k, v).lse, torch.tensor([0])
    for message, f in {
        r"lse is not that of these q, k and arguments: it differs by up to": lambda: headstats.pattern_rows(
            q, k, lse, torch.arange(9), causal=False
        ),
        r"lse has shape \[2, 4, 8\]: \[B, H, M\] = \[2, 4, 9\]": lambda: headstats.pattern_rows(
            q, k, lse[:, :, 1:], rows
        ),
        "queries holds ids from 9 to 9": lambda: headstats.pattern_rows(q, k, lse, rows + 9),
        r"queries has shape \[3, 1\]": lambda: headstats.pattern_rows(q, k, lse, rows.expand(3, 1)),
        r"resolution=\(0, 3\): two ints >= 1": lambda: headstats.pooled_pattern(q, k, lse, resolution=(0, 3)),
        "reduce='median': one of": lambda: headstats.pooled_pattern(q, k, lse, resolution=(2, 2), reduce="median"),
        "reduce='max': 'mass' or 'mean'": lambda: headstats.segment_mass(
            q, k, lse, torch.zeros(9).long(), torch.zeros(12).long(), reduce="max"
        ),
        r"to_segments has shape \[9\]: \[N\] = \[12\]": lambda: headstats.segment_mass(
            q, k, lse, torch.zeros(9).long(), torch.zeros(9).long()
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            f()
    with pytest.raises(TypeError, match="from_segments is a NoneType: a torch"):
        headstats.segment_mass(q, k, lse, None, None)
    with pytest.raises(TypeError, match=r"spec, targets: of attend's arguments these shape its weights: causal"):
        headstats.pattern_rows(q, k, lse, rows, targets=rows, spec=StatSpec())


MEASURE = """
import resource, torch, headstats
torch.set_num_threads(1)
n, peak = 4096, lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
q, k, v = torch.randn(1, 4, n, 32), torch.randn(1, 2, n, 32), torch.randn(1, 2, n, 32)
def all_of_them(m):
    x = [t[:, :, :m] for t in (q, k, v)]
    lse = headstats.attend(*x, spec=headstats.StatSpec.none()).lse
    for reduce in ("max", "mean", "mean_visible"):
        headstats.pooled_pattern(*x[:2], lse, resolution=(256, 256), reduce=reduce)
    ids = torch.arange(m) // 64
    headstats.segment_mass(*x[:2], lse, ids, ids)
    headstats.pattern_rows(*x[:2], lse, torch.arange(m - 5, m))
    headstats.saliency(*x, lse, torch.ones(1, 4, m, 32), from_segments=ids, to_segments=ids, head_norm=True)
all_of_them(512)
before = peak()
all_of_them(n)
print(peak() - before)
"""


@pytest.mark.slow
def test_memory_is_that_of_a_tile():
    """Peak resident memory in a process of its own, beyond that of the same functions at 512 tokens."""
    out = subprocess.run([sys.executable, "-c", MEASURE], env={"PYTHONPATH": ":".join(p for p in sys.path if p),
                         "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True)  # fmt: skip
    assert float(out.stdout) < 4 * 4096**2 * 4 / 2**20 / 4  # a pattern of 4 heads takes 256 MiB
