"""Edits: by cases that can be written down, by identities, and their gradients."""

from dataclasses import replace

import headstats
import pytest
import torch
from headstats import Edit, StatSpec
from headstats.blocked import tiles
from headstats_cases import EDITED, extras, inputs

N = 6
HALVES = torch.tensor([0, 0, 0, 1, 1, 1])
IDS = {"q_segments": HALVES, "k_segments": HALVES}
CUT = torch.tensor([[False, False], [True, False]])  # what the second half reads from the first
SECOND = slice(3, 6)


@pytest.fixture(params=["reference", "blocked", "blocked in small tiles", "compiled"])
def attend(request, monkeypatch):
    if "small" in request.param:
        monkeypatch.setattr(tiles, "CELLS", 32)
        monkeypatch.setattr(tiles, "ROWS", 2)
    if request.param == "compiled":
        return request.getfixturevalue("attend_compiled")
    return lambda q, k, v, **o: headstats.attend(q, k, v, backend=request.param.split()[0], **o)


def uniform():
    """Zero queries: every visible key gets the same weight; each value names its key."""
    return torch.zeros(1, 1, N, 4), torch.randn(1, 1, N, 4), torch.eye(N)[None, None]


def close(a, b):
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=a.dtype).expand_as(a))


def test_knockout_renormalised_or_not(attend):
    seen = torch.arange(1.0, N + 1)
    gone = attend(*uniform(), **IDS, edit=Edit(knockout=CUT))
    left = attend(*uniform(), **IDS, edit=Edit(knockout=CUT, renormalise=False))
    rows = torch.ones(N, N).tril()
    rows[SECOND, :3] = 0
    close(gone.out[0, 0], rows / rows.sum(-1, keepdim=True))
    close(left.out[0, 0], rows / seen[:, None])
    close(left.lse[0, 0], seen.log())  # of the uncut row
    close(gone.lse[0, 0], rows.sum(-1).log())
    close(left.stats.segments[0, 0, SECOND], [[0, 1 / 4], [0, 2 / 5], [0, 3 / 6]])
    close(gone.stats.segments[0, 0, SECOND, 1], 1.0)
    assert left.stats.argmax[0, 0].tolist() == gone.stats.argmax[0, 0].tolist() == [0, 0, 0, 3, 3, 3]


@pytest.mark.parametrize("renormalise", [True, False])
def test_a_row_that_is_cut_off_altogether(attend, renormalise):
    everything = torch.tensor([[True, True], [False, False]])
    r = attend(*uniform(), **IDS, edit=Edit(knockout=everything, renormalise=renormalise), spec=StatSpec.all())
    assert (r.out[0, 0, :3] == 0).all() and (r.stats.argmax[0, 0, :3] == -1).all()
    assert (r.stats.topk.indices[0, 0, :3] == -1).all() and (r.stats.entropy[0, 0, :3] == 0).all()
    assert (r.lse[0, 0, :3] == -torch.inf).all() == renormalise


def test_tokens_in_no_segment_are_left_alone(attend):
    """Their rows stay as they are, and others go on reading from them."""
    (q, k, v), _ = inputs(m=N, n=N)
    ids = torch.tensor([0, -1, 0, 1, -1, 1])
    edit = Edit(knockout=torch.tensor([[False, False], [True, True]]), bias=torch.ones(2, 2))
    plain = attend(q, k, v)
    r = attend(q, k, v, q_segments=ids, k_segments=ids, edit=edit, spec=StatSpec(topk=2))
    close(r.out[:, :, [1, 4]], plain.out[:, :, [1, 4]])
    assert (r.stats.topk.indices[:, :, 5].sort().values == torch.tensor([1, 4])).all()


def test_log_gain_multiplies_weights_before_they_are_normalised(attend):
    (q, k, v), _ = inputs(m=N, n=N)
    plain = attend(q, k, v, k_segments=HALVES)
    r = attend(q, k, v, **IDS, edit=Edit(bias=torch.tensor([[1.0, 1.0], [3.0, 0.5]]).log()))
    a, b = plain.stats.segments[..., SECOND, :].unbind(-1)
    close(r.stats.segments[..., SECOND, 0], 3 * a / (3 * a + 0.5 * b))
    close(r.out[..., :3, :], plain.out[..., :3, :])


def test_redistribution_from_sinks_to_content(attend):
    """Keep p of the sink's mass and give the rest to the content, in proportion: the same gains on every row."""
    q, k, v = uniform()
    ids = torch.tensor([0, 0, 1, 1, 1, 2])  # sink, content, other
    keep = 0.6
    gain = torch.tensor([keep, 1 + (1 - keep) * 2 / 3, 1.0]).log()[None]  # the row has mass 2/6 and 3/6
    r = attend(q, k, v, causal=False, q_segments=torch.zeros(N).long(), k_segments=ids, edit=Edit(bias=gain))
    close(r.stats.segments[0, 0], [2 / 6 * keep, 3 / 6 + 2 / 6 * (1 - keep), 1 / 6])


def test_temperature_divides_logits(attend):
    (q, k, v), more = inputs(m=N, n=N, sinks=True)
    hot = torch.tensor([0.5, 1.0, 2.0, 4.0])
    r = attend(q, k, v, **more, edit=Edit(temperature=hot))
    want = attend(q / hot[:, None, None], k, v, sinks=more["sinks"] / hot)
    close(r.out, want.out)
    close(r.lse, want.lse)
    only_last = torch.ones(1, 1, N)
    only_last[..., -1] = 3.0
    r, plain = attend(q, k, v, edit=Edit(temperature=only_last)), attend(q, k, v)
    assert torch.equal(r.out[:, :, :-1], plain.out[:, :, :-1]) and not torch.allclose(
        r.out[:, :, -1], plain.out[:, :, -1]
    )


@pytest.mark.parametrize("shape", [(4, 5), (2, 4, 5), (2, 1, 5), (5,), (), (2, 4, N, 5), (1, 1, N, 1)], ids=str)
def test_gate_and_replacement_mix(attend, shape):
    (q, k, v), _ = inputs(m=N, n=N, dv=5)
    gate, other = torch.rand(2, 4), torch.randn(shape)
    whole = other if other.dim() == 4 else other[..., None, :] if other.dim() else other
    plain = attend(q, k, v)
    g = gate[..., None, None]
    close(attend(q, k, v, edit=Edit(gate=gate, replacement=other)).out, g * plain.out + (1 - g) * whole)
    close(attend(q, k, v, edit=Edit(replacement=other)).out, whole.expand_as(plain.out))


def test_order(attend):
    """Temperature does not touch the log gain, and statistics see both but not the gate."""
    (q, k, v), _ = inputs(m=N, n=N)
    gain, hot = torch.randn(2, 2), torch.tensor(2.0)
    r = attend(q, k, v, **IDS, edit=Edit(bias=gain, temperature=hot, gate=torch.tensor(0.0)))
    want = attend(q / 2, k, v, **IDS, edit=Edit(bias=gain))
    close(r.stats.segments, want.stats.segments)
    close(r.lse, want.lse)
    assert (r.out == 0).all()


@pytest.mark.parametrize("name", EDITED)
def test_each_batch_row_carries_its_own_edit(attend, name):
    """One call with three edits, against three calls."""
    options = {x: y for x, y in EDITED[name].items() if x not in ("runs", "tables")}
    (q, k, v), options = inputs(b=3, m=7, n=7, **options)
    options |= {"k_segments": options.get("k_segments", torch.zeros(1, 7).long()), "spec": StatSpec.all()}
    whole = attend(q, k, v, **options)

    def row(x, i):
        return (
            x[i : i + 1] if isinstance(x, torch.Tensor) and x.dim() > 1 and x.shape[0] == 3 and x.shape != (3, 3) else x
        )

    for i in range(3):
        fields = {
            f: row(getattr(options["edit"], f), i) for f in ("gate", "replacement", "temperature", "bias", "knockout")
        }
        one = {x: row(y, i) for x, y in options.items() if x != "edit"}
        r = attend(*(row(x, i) for x in (q, k, v)), **one, edit=replace(options["edit"], **fields))
        torch.testing.assert_close(r.out[0], whole.out[i])
        torch.testing.assert_close(r.stats.entropy[0], whole.stats.entropy[i])
        torch.testing.assert_close(r.stats.received[0], whole.stats.received[i])


def test_mass_before_and_after(attend):
    q, k, v = uniform()
    edit = Edit(knockout=CUT, temperature=torch.tensor(2.0), report_mass=True)
    r = attend(q, k, v, **IDS, edit=edit, spec=StatSpec.none())
    close(r.mass_before[0, 0, SECOND], [[3 / 4, 1 / 4], [3 / 5, 2 / 5], [1 / 2, 1 / 2]])
    close(r.mass_after[0, 0, SECOND], [0.0, 1.0])
    assert r.stats.segments is None
    assert torch.equal(attend(q, k, v, **IDS, edit=edit).stats.segments, r.mass_after)
    assert attend(q, k, v, **IDS, edit=Edit(knockout=CUT)).mass_before is None


FIELDS = ("gate", "replacement", "temperature", "bias")
SHAPES = {
    "of each row": {"gate": (2, 2, 3), "replacement": (2, 2, 3, 2), "temperature": (2, 2, 3), "bias": (2, 2, 3, 3)},
    "of heads": {"gate": (2,), "replacement": (2, 2), "temperature": (2,), "bias": (2, 3, 3)},
    "of all": {"gate": (), "replacement": (), "temperature": (), "bias": (3, 3)},
}


def edited(shapes, renormalise, seed=0, **options):
    """A function of q, k, v, k0, v0 and the four fields, with arguments in float64."""
    sizes = {"b": 2, "h": 2, "hk": 1, "m": 3, "n": 3, "d": 3, "dv": 2, "prefix": 3, "seed": seed}
    qkv, options = inputs(**sizes, sinks=True, table=("segment_open",), **options)
    leaves = [x.double().requires_grad_() for x in (*qkv, *options.pop("prefix"))]
    g = torch.Generator().manual_seed(seed)
    for name in FIELDS:
        x = torch.randn(SHAPES[shapes][name], generator=g, dtype=torch.float64)
        leaves.append((x.abs() + 0.5 if name == "temperature" else x).requires_grad_())
    knockout = torch.rand(2, 2, 3, 3, generator=g) < 0.4

    def f(q, k, v, k0, v0, *fields, backend="blocked"):
        edit = Edit(**dict(zip(FIELDS, fields, strict=True)), knockout=knockout, renormalise=renormalise)
        r = headstats.attend(q, k, v, prefix=(k0, v0), **options, edit=edit, spec=StatSpec.none(), backend=backend)
        return r.out, r.lse.masked_fill(r.lse == -torch.inf, 0)

    return f, leaves


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("cells", [8, 1 << 19])
def test_gradcheck(shapes, renormalise, cells, monkeypatch):
    monkeypatch.setattr(tiles, "CELLS", cells)
    monkeypatch.setattr(tiles, "ROWS", 2)
    f, leaves = edited(shapes, renormalise, softcap=2.0)
    assert torch.autograd.gradcheck(f, leaves)


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("options", [{}, {"window": 2, "padding": "left"}], ids=str)
def test_gradients_are_those_of_the_reference(shapes, renormalise, options):
    for seed in range(3):
        f, leaves = edited(shapes, renormalise, seed, **options)
        got, want = (
            torch.autograd.grad([x.sin().sum() for x in f(*leaves, backend=b)], leaves)
            for b in ("blocked", "reference")
        )
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


def test_a_gate_alone_needs_no_recomputation():
    (q, k, v), _ = inputs()
    gate = torch.zeros(4, requires_grad=True)
    headstats.attend(q, k, v, edit=Edit(gate=gate, replacement=torch.ones(16))).out.sum().backward()
    plain = headstats.attend(q, k, v).out
    close(gate.grad, (plain - 1).sum((0, 2, 3)))


def test_segments_and_edits_beside_all_statistics(attend):
    qkv, options = inputs(m=9, n=15, edits=("knockout", "leave", "bias"))
    r = attend(*qkv, **(extras(9, 15) | options), spec=StatSpec.all())
    torch.testing.assert_close(r.stats.topk.values.sum(-1) <= 1 + 1e-6, torch.ones(2, 4, 9).bool())
