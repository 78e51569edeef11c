"""What is asked for is computed, and nothing else."""

import pathlib
import re
from dataclasses import fields, replace

import headstats
import pytest
import torch
from headstats import STATISTICS, AttentionStats, StatSpec, reference
from headstats.blocked import backend as blocked
from headstats.blocked import tiles
from headstats.cpu.arguments import COMPUTED
from headstats.stats import ARGUMENT, BY_NAME, table, tensors
from headstats_cases import assert_same, extras, inputs, oracle
from torch.utils._python_dispatch import TorchDispatchMode

NAMES = [s.name for s in STATISTICS]


class Operations(TorchDispatchMode):
    """Names of the operators that run, in order."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def operations(spec, n=60, **options):
    qkv, options = inputs(b=8, m=n, n=n, softcap=2.0, **options)
    with Operations() as seen:
        headstats.attend(*qkv, **options, spec=spec, backend="blocked")
    return seen.names


def only(name):
    full = {s.name: True if s.full is None else s.full for s in STATISTICS}
    return StatSpec(**{n: full[n] if n == name else False for n in NAMES})


def argument(name, m, n, b=2):
    """The argument that a statistic needs, if it needs one."""
    needed = ARGUMENT.get(name)
    return {needed: extras(m, n, b)[needed]} if needed else {}


def test_one_table():
    assert [f.name for f in fields(StatSpec)] == [f.name for f in fields(AttentionStats)] == NAMES
    for s in STATISTICS:
        assert getattr(StatSpec(), s.name) == s.default and s.definition and s.unit and s.range


def test_the_readme_shows_the_table():
    readme = pathlib.Path(headstats.__file__).with_name("README.md").read_text(encoding="utf-8")
    assert table() in readme, "put the output of headstats.stats.table() there"


def test_default_none_all():
    assert list(StatSpec().requested()) == ["entropy", "max_prob", "argmax", "distance", "sink"]
    assert StatSpec().sink == 4
    assert StatSpec.none().requested() == {}
    assert [*StatSpec.all().requested(), *ARGUMENT] == [n for n in NAMES if n not in ARGUMENT] + list(ARGUMENT)
    (q, k, v), _ = inputs(m=9, n=15)
    assert list(headstats.attend(q, k, v, **extras(9, 15), spec=StatSpec.all()).stats.as_dict()) == NAMES
    unasked = {"segment_value_norms", "segment_outputs"}  # these cost more: k_segments alone does not ask for them
    assert {*headstats.attend(q, k, v, **extras(9, 15)).stats.as_dict()} & {*ARGUMENT} == {*ARGUMENT} - unasked


@pytest.mark.parametrize("backend", ["reference", "blocked", "compiled"])
@pytest.mark.parametrize("name", NAMES)
def test_each_alone_is_the_same_as_with_all_others(name, backend, request):
    everything = StatSpec.all()
    if backend == "compiled":
        request.getfixturevalue("compiled_library")
        if name not in COMPUTED:
            pytest.skip(f"the compiled backend does not compute {name}")
        everything = replace(everything, **dict.fromkeys(everything.requested().keys() - set(COMPUTED), False))
    qkv, options = inputs(m=9, n=15, padding="left")
    alone = headstats.attend(*qkv, **options, **argument(name, 9, 15), spec=only(name), backend=backend)
    together = headstats.attend(*qkv, **options, **extras(9, 15), spec=everything, backend=backend)
    assert list(alone.stats.as_dict()) == [name]
    last = {"N": 15, "M": 9, "k": 8, "S": 4, "T": 3, "F": 2, "Dv": 16}
    a, b = tensors(getattr(alone.stats, name)), tensors(getattr(together.stats, name))
    for one, other in zip(a, b, strict=True):
        torch.testing.assert_close(one, other)
        assert one.shape == (2, 4, *(last[x] for x in BY_NAME[name].shape.split()[2:]))


def test_unasked_statistics_run_no_operator():
    """Attention alone: two products, and one exponential, sum and maximum, in place where possible."""
    off = operations(StatSpec.none())
    once = ("exp2_.default", "sum.dim_IntList", "amax.default", "log2.default")
    assert [off.count(name) for name in once] == [1] * len(once) and off.count("bmm.default") + off.count(
        "bmm.out"
    ) == 2
    assert not {"exp2.default", "max.dim", "diagonal.default", "cumsum.default", "mv.default"} & set(off)
    for name in NAMES:
        assert len(operations(only(name), **argument(name, 60, 60, b=8))) > len(off), name


def test_off_runs_the_same_operators_as_bare_attention(monkeypatch):
    """With the statistics code made unreachable, stats-off runs the very same operators."""
    before = operations(StatSpec.none())
    monkeypatch.setattr(blocked.statistics, "statistic", None)
    monkeypatch.setattr(blocked.statistics, "mean_over_queries", None)
    assert operations(StatSpec.none()) == before


@pytest.mark.parametrize("shared", [True, False])
def test_a_new_statistic_needs_only_its_definition(shared, monkeypatch):
    """blocked computes each from its definition in the table when it has no faster form."""
    monkeypatch.setattr(blocked.statistics, "FAST", {})
    monkeypatch.setattr(tiles, "CELLS", 64)
    monkeypatch.setattr(tiles, "ROWS", 2)
    qkv, options = inputs(m=9, n=15, window=4, padding="left")
    options |= extras(9, 15, shared=shared)
    got = headstats.attend(*qkv, **options, spec=StatSpec.all(), backend="blocked")
    assert_same(got, oracle(qkv, **options, spec=StatSpec.all()))


def test_sink_size():
    (q, k, v), _ = inputs(n=15)
    for backend in ("reference", "blocked"):
        whole = headstats.attend(q, k, v, spec=StatSpec(sink=99), backend=backend)
        torch.testing.assert_close(whole.stats.sink, torch.ones_like(whole.lse))
        assert headstats.attend(q, k, v, spec=StatSpec(sink=0), backend=backend).stats.sink is None


@pytest.mark.parametrize(
    "bad",
    [
        {"sink": -1},
        {"sink": True},
        {"sink": 1.5},
        {"entropy": 1},
        {"received": None},
        {"topk": True},
        {"local": -2},
        {"waad": 2.5},
        {"fai": True},
        {"fai": (3, 2)},
        {"fai": (-1, 2)},
        {"fai": [1, 2]},
        {"targets": 3},
    ],
    ids=str,
)
def test_wrong_spec(bad):
    ((name, value),) = bad.items()
    with pytest.raises(ValueError, match=re.escape(f"StatSpec({name}={value!r})")):
        StatSpec(**bad)


def test_printing():
    r = headstats.attend(*inputs()[0])
    assert repr(r.stats).startswith("AttentionStats(entropy[2, 4, 15]")


def test_reference_keeps_float64():
    qkv = [x.double() for x in inputs()[0]]
    for backend in ("reference", "blocked"):
        r = headstats.attend(*qkv, spec=StatSpec.all(), backend=backend)
        assert r.out.dtype == r.lse.dtype == r.stats.entropy.dtype == torch.float64
        assert r.stats.argmax.dtype == torch.int64
    assert reference.unsupported.__doc__


def test_the_picture_shows_every_statistic():
    text = (pathlib.Path(headstats.__file__).parent / "statistics.svg").read_text()
    assert [s.name for s in headstats.STATISTICS if s.name not in text] == []
