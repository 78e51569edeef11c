"""The statistics beyond the first set: answers known in closed form, on the reference and on blocked."""

import math

import headstats
import pytest
import torch
from headstats import StatSpec
from headstats.blocked import tiles
from headstats_cases import inputs, oracle

N = 12


@pytest.fixture(params=["reference", "blocked", "blocked in small tiles", "compiled"])
def attend(request, monkeypatch):
    if "small" in request.param:
        monkeypatch.setattr(tiles, "CELLS", 32)
        monkeypatch.setattr(tiles, "ROWS", 2)
    if request.param == "compiled":
        run = request.getfixturevalue("attend_compiled")
        return lambda q, k, v, spec, **options: run(q, k, v, spec=spec, **options).stats
    backend = request.param.split()[0]
    return lambda q, k, v, spec, **options: headstats.attend(q, k, v, spec=spec, backend=backend, **options).stats


def uniform(n=N, m=None):
    """Zero queries: every visible key gets the same weight."""
    k = torch.randn(1, 1, n, 4, dtype=torch.float64)
    return torch.zeros(1, 1, m or n, 4, dtype=torch.float64), k, torch.randn(1, 1, n, 3, dtype=torch.float64)


def chosen(p):
    """q, k, v whose pattern, not causal, is the matrix p (rows sum to 1)."""
    eye = torch.eye(p.shape[1], dtype=torch.float64)[None, None]
    return p.double().log().clamp_min(-1e4)[None, None], eye, eye.clone()


def close(a, b):
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=a.dtype).expand_as(a))


def test_uniform(attend):
    s = attend(*uniform(), StatSpec(entropy_normalised=True, effective_keys=True, distance_var=True, waad=3, local=3))
    seen = torch.arange(1.0, N + 1, dtype=torch.float64)
    close(s.entropy_normalised[0, 0], (seen > 1).double())
    close(s.effective_keys[0, 0], seen)
    close(s.distance_var[0, 0], (seen**2 - 1) / 12)  # of a discrete uniform distribution
    close(s.local[0, 0], (3 / seen).clamp(max=1))
    t = seen[3:] - 1
    close(s.waad[0, 0, 3:], (3 * 4 / 2 + (t - 3) * 3) / (t + 1))  # the card's closed form for t >= W
    close(s.waad[0, 0, :3], torch.arange(3) / 2)


def test_identity_has_no_distance(attend):
    eye = 500 * torch.eye(N, dtype=torch.float64)[None, None]
    s = attend(eye, eye / 500, eye, StatSpec(distance_var=True, waad=10, fai=(1, 5), effective_keys=True, topk=2))
    for x in (s.distance_var, s.waad, s.fai, s.topk.values[..., 1]):
        close(x, 0.0)
    close(s.effective_keys, 1.0)
    assert s.topk.indices[0, 0, :, 0].tolist() == list(range(N))
    assert s.topk.indices[0, 0, :, 1].tolist() == [-1, *[0] * (N - 1)]  # the first query sees one key; ties go left


def test_fai_of_a_uniform_head_is_a_mean_over_the_horizon(attend):
    s = attend(*uniform(), StatSpec(fai=(2, 5)))
    want = [[1 / (t + 1) for t in range(j + 2, min(N - 1, j + 5) + 1)] for j in range(N)]
    close(s.fai[0, 0], [sum(x) / len(x) if x else 0.0 for x in want])


def test_fai_leaves_out_queries_that_are_not_of_the_response(attend):
    """query_padding names the rows that count: the paper's R, positions of the response."""
    response = torch.arange(N)[None] >= 6
    s = attend(*uniform(), StatSpec(fai=(2, 5)), query_padding=response)
    want = [[1 / (t + 1) for t in range(max(6, j + 2), min(N - 1, j + 5) + 1)] for j in range(N)]
    close(s.fai[0, 0], [sum(x) / len(x) if x else 0.0 for x in want])


def test_columns_of_a_chosen_pattern(attend):
    p = torch.tensor([[0.5, 0.5, 0.0], [0.1, 0.2, 0.7], [0.0, 0.0, 1.0], [0.3, 0.3, 0.4]])
    q, k, v = chosen(p)
    s = attend(q, k, v, StatSpec(received_max=True, topk=2, value_norm=True), causal=False, scale=1.0)
    close(s.received_max[0, 0], [0.5, 0.5, 1.0])
    close(s.topk.values[0, 0], [[0.5, 0.5], [0.7, 0.2], [1.0, 0.0], [0.4, 0.3]])
    assert s.topk.indices[0, 0].tolist() == [[0, 1], [2, 1], [2, 0], [2, 0]]
    close(s.value_norm[0, 0], p.double().square().sum(-1).sqrt())  # v is the identity
    real = torch.tensor([[True, True, False, True]])
    s = attend(q, k, v, StatSpec(received_max=True), causal=False, scale=1.0, query_padding=real)
    close(s.received_max[0, 0], [0.5, 0.5, 0.7])


@pytest.mark.parametrize("batched", [False, True])
def test_segments_targets_and_features(attend, batched):
    p = torch.tensor([[0.5, 0.4, 0.1, 0.0], [0.1, 0.2, 0.3, 0.4]])
    segments, targets = torch.tensor([2, 0, 2, -1], dtype=torch.int32), torch.tensor([[0, -1], [3, 3]])
    features = torch.tensor([[1.0, 0], [2, 1], [3, 0], [4, 0]]).double()
    more = {"k_segments": segments, "targets": targets, "key_features": features}
    q, k, v = chosen(p)
    if batched:
        q, k, v = (x.expand(3, -1, -1, -1) for x in (q, k, v))
        more = {name: x[None].repeat(3, *[1] * x.dim()) for name, x in more.items()}
        more["k_segments"][1] = 1
    s = attend(q, k, v, StatSpec(), causal=False, scale=1.0, **more)
    close(s.segments[0, 0], [[0.4, 0.0, 0.6], [0.2, 0.0, 0.4]])  # segment 1 is empty; the last key is in none
    close(s.targets[0, 0], [[0.5, 0.0], [0.4, 0.4]])
    close(s.key_features[0, 0], p.double() @ features)
    if batched:
        close(s.segments[1, 0], [[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]])


def test_hidden_targets_weigh_nothing(attend):
    s = attend(*uniform(), StatSpec(), targets=torch.full((N, 1), 5))
    seen = torch.arange(1.0, N + 1, dtype=torch.float64)
    close(s.targets[0, 0, :, 0], torch.where(seen > 5, 1 / seen, 0.0))


def test_identities(attend):
    (q, k, v), more = inputs(m=9, n=15, padding="left")
    q, k, v = (x.double() for x in (q, k, v))
    segments = torch.arange(15) % 3
    count = torch.ones(15, 1).double()
    s = attend(q, k, v, StatSpec(topk=15, waad=99, local=15, effective_keys=True, participation=True),
               k_segments=segments, key_features=count, **more)  # fmt: skip
    seen = s.segments.sum(-1)  # 1, or 0 in a row without keys
    close(s.key_features[..., 0], seen)
    close(s.local, seen)
    close(s.topk.values.sum(-1), seen)
    close(s.waad, s.distance)
    assert torch.equal(s.topk.indices[..., 0], s.argmax)
    close(s.effective_keys * s.participation, seen)


def test_fewer_keys_than_k(attend):
    s = attend(*uniform(n=3), StatSpec(topk=5))
    assert s.topk.indices[0, 0].tolist() == [[0, -1, -1, -1, -1], [0, 1, -1, -1, -1], [0, 1, 2, -1, -1]]
    close(s.topk.values[0, 0, 1], [0.5, 0.5, 0, 0, 0])


def test_effective_keys_beside_a_strong_learned_sink():
    """Two equal keys, each 2^-80 of the sink: their squares are lost in float32, their number is not."""
    q, k, v = torch.zeros(1, 1, 2, 4), torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4)
    sinks = torch.tensor([80 * math.log(2)])
    r = headstats.attend(q, k, v, sinks=sinks, spec=StatSpec(effective_keys=True), backend="blocked")
    close(r.stats.effective_keys[0, 0], [1.0, 2.0])


@pytest.mark.parametrize("spread", [1.0, 30.0, 1000.0])
def test_variance_of_distance_on_long_rows(spread):
    """A narrow bump far away: raw moments in float32 would be off by the square of the distance."""
    n = 16384
    where = torch.arange(n, dtype=torch.float32)
    k = torch.stack([-(((where - 3000) / spread) ** 2) / 2, torch.zeros(n)], -1)[None, None]
    q = torch.tensor([1.0, 0.0]).expand(1, 1, 4, 2)
    spec = StatSpec(distance_var=True)
    got = headstats.attend(q, k, k, scale=1.0, spec=spec, backend="blocked").stats.distance_var
    want = oracle((q, k, k), scale=1.0, spec=spec).stats.distance_var
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=0)
    assert want[0, 0, 0].item() == pytest.approx(spread**2, rel=0.02)


def test_gradients_flow_beside_all_statistics():
    (q, k, v), _ = inputs()
    q = q.requires_grad_()
    r = headstats.attend(q, k, v, spec=StatSpec.all(), backend="blocked")
    assert r.stats.topk.indices.dtype == torch.int64 and not r.stats.topk.values.requires_grad
    r.out.sum().backward()
    assert q.grad.abs().sum() > 0


def test_column_norms_of_the_hardness_measure(attend):
    """n times the largest squared norm: 1 for uniform attention, n for the identity, n^2 for one sink column."""
    eye = 500 * torch.eye(N, dtype=torch.float64)[None, None]
    sink = torch.zeros(1, 1, N, N, dtype=torch.float64)
    sink[..., 0] = 500
    for q, want in ((torch.zeros_like(eye), 1), (eye, N), (sink, N**2)):
        s = attend(q, eye / 500, eye, StatSpec(column_norm=True), causal=False, scale=1.0)
        close(N * s.column_norm.square().amax(-1), want)


def test_column_norm_counts_real_queries_and_rows_with_keys(attend):
    p = torch.tensor([[0.5, 0.5, 0.0], [0.6, 0.3, 0.1], [0.0, 0.0, 1.0]])
    q, k, v = chosen(p)
    real, nothing = torch.tensor([[False, True, True]]), torch.zeros(3, 3).double()
    nothing[2] = -torch.inf
    s = attend(q, k, v, StatSpec(column_norm=True), causal=False, scale=1.0, query_padding=real, bias=nothing)
    close(s.column_norm[0, 0], [0.6, 0.3, 0.1])


def test_partial_outputs_and_their_norms(attend):
    p = torch.tensor([[0.5, 0.4, 0.1, 0.0], [0.1, 0.2, 0.3, 0.4]])
    q, k, _ = chosen(p)
    v = torch.tensor([[3.0, 4], [-3, -4], [0, 1], [5, 12]]).double()[None, None]
    spec = StatSpec(segment_outputs=True, segment_value_norms=True)
    s = attend(q, k, v, spec, causal=False, scale=1.0, k_segments=torch.tensor([2, 2, 0, -1]))
    close(s.segment_outputs[0, 0], [[[0, 0.1], [0, 0], [0.3, 0.4]], [[0, 0.3], [0, 0], [-0.3, -0.4]]])
    close(s.segment_value_norms[0, 0], [[0.1, 0, 4.5], [0.3, 0, 1.5]])
    none = attend(q, k, v, spec, causal=False, k_segments=torch.full((4,), -1))
    assert none.segment_outputs.shape == (1, 1, 2, 0, 2) and none.segment_value_norms.shape == (1, 1, 2, 0)


@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_partial_outputs_add_up_to_the_output_before_the_gate(backend):
    (q, k, v), more = inputs(m=9, n=15, padding="left", gate=True, sinks=True, prefix=4)
    ids = torch.randint(0, 5, (2, 19))
    r = headstats.attend(
        q, k, v, **more, k_segments=ids, spec=StatSpec(segment_outputs=True, value_norm=True), backend=backend
    )
    z = r.stats.segment_outputs.sum(-2)
    torch.testing.assert_close(z * more["edit"].gate[..., None], r.out)
    torch.testing.assert_close(z.norm(dim=-1), r.stats.value_norm)
