"""Masks over segments and ALiBi, by cases that can be written down; the random ones are in test_headstats_blocked."""

import headstats
import pytest
import torch
from headstats import StatSpec
from headstats.blocked import tiles
from headstats_cases import inputs


@pytest.fixture(params=["reference", "blocked", "blocked in small tiles", "compiled"])
def attend(request, monkeypatch):
    if "small" in request.param:
        monkeypatch.setattr(tiles, "CELLS", 8)
        monkeypatch.setattr(tiles, "ROWS", 2)
    if request.param == "compiled":
        return request.getfixturevalue("attend_compiled")
    return lambda q, k, v, **o: headstats.attend(q, k, v, backend=request.param.split()[0], **o)


def seen(attend, n, **options):
    """Which cells are visible: zero queries, and values that name their key."""
    q, v = torch.zeros(1, 1, n, 2), torch.eye(n)[None, None]
    return (attend(q, torch.randn(1, 1, n, 2), v, **options).out[0, 0] > 0).int().tolist()


def table(*rows):
    return torch.tensor([[bool(x) for x in row] for row in rows])


def test_images_that_see_the_question_but_not_the_answer(attend):
    """Modality-mutual attention: allowed if j <= i, or i is of the image and j of the question."""
    ids = torch.tensor([0, 0, 1, 1, 2])  # image, question, answer
    opened = table([0, 1, 0], [0, 0, 0], [0, 0, 0])
    want = ["10110", "11110", "11100", "11110", "11111"]
    assert seen(attend, 5, q_segments=ids, k_segments=ids, segment_open=opened) == [[int(c) for c in r] for r in want]


def test_frames_that_are_causal_as_blocks(attend):
    ids = torch.tensor([0, 0, 1, 1, -1])  # two frames of two, and text in no segment
    got = seen(attend, 5, q_segments=ids, k_segments=ids, segment_open=torch.eye(2).bool())
    assert got == [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


def test_causal_cross_attention_of_blocks(attend):
    queries, keys = torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1, 1, 2])
    r = attend(
        torch.zeros(1, 1, 3, 2), torch.randn(1, 1, 5, 2), torch.eye(5)[None, None], causal=False,
        q_segments=queries, k_segments=keys, segment_mask=table([1, 0, 0], [1, 1, 0]),
    )  # fmt: skip
    want = [[0.5, 0.5, 0, 0, 0], *[[0.25, 0.25, 0.25, 0.25, 0]] * 2]
    torch.testing.assert_close(r.out[0, 0], torch.tensor(want))
    torch.testing.assert_close(r.stats.segments[0, 0], torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0], [0.5, 0.5, 0]]))


def test_an_opened_cell_stays_hidden_by_mask_and_padding(attend):
    ids = torch.tensor([0, 1, 1])
    opened, real = table([0, 1], [0, 0]), torch.tensor([[True, False, True]])
    common = {"q_segments": ids, "k_segments": ids, "segment_open": opened}
    assert seen(attend, 3, **common)[0] == [1, 1, 1]
    assert seen(attend, 3, **common, key_padding=real)[0] == [1, 0, 1]
    assert seen(attend, 3, **common, segment_mask=table([1, 0], [1, 1]))[0] == [1, 0, 0]


def test_packed_sequences_are_apart(attend):
    """Two sequences in one row, against each alone."""
    (q, k, v), _ = inputs(b=1, m=15, n=15)
    ids = torch.arange(15).ge(9).long()
    whole = attend(q, k, v, q_segments=ids, k_segments=ids, segment_mask=torch.eye(2).bool())
    for part in (slice(0, 9), slice(9, 15)):
        one = attend(q[:, :, part], k[:, :, part], v[:, :, part])
        torch.testing.assert_close(one.out, whole.out[:, :, part])
        torch.testing.assert_close(one.stats.entropy, whole.stats.entropy[:, :, part])
        torch.testing.assert_close(one.stats.distance, whole.stats.distance[:, :, part])


def test_each_row_and_head_may_have_its_own_table(attend):
    (q, k, v), _ = inputs(b=2, h=4, m=6, n=6)
    ids = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 0, 1, 0, 1]])
    mask = torch.ones(2, 4, 2, 2, dtype=torch.bool)
    mask[1, 3, 1, 0] = False
    r = attend(q, k, v, q_segments=ids, k_segments=ids, segment_mask=mask)
    plain = attend(q, k, v, k_segments=ids)
    torch.testing.assert_close(r.out[0], plain.out[0])
    torch.testing.assert_close(r.out[1, :3], plain.out[1, :3])
    assert (r.stats.segments[1, 3, 1::2, 0] == 0).all() and (plain.stats.segments[1, 3, 1::2, 0] > 0).all()


def test_alibi_is_a_penalty_on_distance(attend):
    q, k, v = torch.zeros(1, 2, 5, 4), torch.randn(1, 1, 5, 4), torch.eye(5)[None, None]
    slopes = torch.tensor([0.5, 0.0])
    r = attend(q, k, v, alibi=slopes, causal=False)
    away = (torch.arange(5)[:, None] - torch.arange(5)).abs()
    torch.testing.assert_close(r.out[0, 0], (-0.5 * away).softmax(-1))
    torch.testing.assert_close(r.out[0, 1], torch.full((5, 5), 0.2))


def test_alibi_equals_its_bias(attend):
    (q, k, v), _ = inputs(m=7, n=12)
    slopes = torch.rand(4)
    bias = -slopes[:, None, None] * (torch.arange(5, 12)[:, None] - torch.arange(12)).abs()
    a, b = (
        attend(q, k, v, **o, softcap=3.0, spec=StatSpec(received=True)) for o in ({"alibi": slopes}, {"bias": bias})
    )
    torch.testing.assert_close(a.out, b.out)
    torch.testing.assert_close(a.stats.received, b.stats.received)


def test_received_counts_opened_and_masked_cells(attend):
    """Zero queries: the mean over the queries that see a key is the mean of 1 / their number of keys."""
    ids = torch.tensor([0, 0, 1, 1, 2])
    opened, mask = table([0, 1, 0], [0, 0, 0], [0, 0, 0]), table([1, 1, 1], [1, 1, 1], [0, 1, 1])
    common = {"q_segments": ids, "k_segments": ids, "segment_open": opened, "segment_mask": mask}
    cells = torch.tensor(seen(attend, 5, **common)).double()
    r = attend(torch.zeros(1, 1, 5, 2), torch.randn(1, 1, 5, 2), torch.eye(5)[None, None], **common,
               spec=StatSpec(received=True))  # fmt: skip
    p = cells / cells.sum(-1, keepdim=True)
    torch.testing.assert_close(r.stats.received[0, 0].double(), p.sum(0) / cells.sum(0), atol=1e-6, rtol=0)
