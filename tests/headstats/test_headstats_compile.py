"""`attend` under torch.compile and torch.export, and the operators that stand for it there."""

import headstats
import pytest
import torch
from headstats import Edit, StatSpec
from headstats.call import LEAVES
from headstats.stats import tensors
from headstats_cases import EDITED, OPTIONS, PREFIX, SEGMENTED, WITH_BIAS, choice_on_cpu, extras, inputs
from torch._subclasses.fake_tensor import FakeTensorMode

EVERY = OPTIONS | WITH_BIAS | SEGMENTED | PREFIX | EDITED
QUICK = ("causal", "GPT-OSS", "everything", "packed", "prefix, everything", "all edits, not renormalised")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def compiled(f, backend="aot_eager", **options):
    return torch.compile(f, fullgraph=True, backend=backend, **options)


def flat(r):
    return [r.out, r.lse, *(x for result in r.stats.as_dict().values() for x in tensors(result))]


def case(name, leaves=True, **sizes):
    """A function of floating tensors, and those tensors, which want gradients."""
    qkv, options = inputs(**({"b": 2, "h": 4, "hk": 2, "m": 7, "n": 9, "d": 8, "dv": 5} | sizes), **EVERY[name])
    edit = options.pop("edit", None)
    given = {name: x for name, x in options.items() if isinstance(x, torch.Tensor) and x.is_floating_point()}
    fields = {} if edit is None else {name: x for name, x in vars(edit).items() if isinstance(x, torch.Tensor)}
    moved = {name: x for name, x in fields.items() if x.is_floating_point()}
    rest = {} if edit is None else {name: x for name, x in vars(edit).items() if name not in moved}
    prefix = options.pop("prefix", ())

    def f(tensors, backend="auto", spec=headstats.api.DEFAULT_SPEC):
        after = 3 + len(prefix) + len(given)
        arguments = options | dict(zip(given, tensors[3 + len(prefix) : after], strict=True))
        if edit is not None:
            arguments["edit"] = Edit(**rest | dict(zip(moved, tensors[after:], strict=True)))
        if prefix:
            arguments["prefix"] = tensors[3:5]
        return headstats.attend(*tensors[:3], **arguments, spec=spec, backend=backend)

    found = [*qkv, *prefix, *given.values(), *moved.values()]
    return f, [x.requires_grad_(leaves) for x in found]


def chosen(name: str) -> str:
    """Cells that are cut after the softmax: only their values tell the C++ backend, and a tracer has none."""
    return "blocked" if "not renormalised" in name else "auto"


@pytest.mark.parametrize("name", [x if x in QUICK else pytest.param(x, marks=pytest.mark.slow) for x in EVERY])
def test_same_bits_and_same_gradients(name):
    f, leaves = case(name)
    backend = chosen(name)
    results = f(leaves, backend), compiled(f)(leaves, backend)
    assert results[0].backend == results[1].backend == (choice_on_cpu() if backend == "auto" else backend)
    for a, b in zip(*map(flat, results), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    weight = torch.randn_like(results[0].out)
    grads = [
        torch.autograd.grad(
            (r.out * weight).sum() + r.lse.masked_fill(r.lse == -torch.inf, 0).sin().sum(), leaves, allow_unused=True
        )
        for r in results
    ]
    for a, b in zip(*grads, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


@pytest.mark.parametrize("name", ["GPT-OSS", "all edits", "all edits, not renormalised"])
def test_without_gradients(name):
    f, leaves = case(name, leaves=False)
    backend = chosen(name)
    for a, b in zip(flat(f(leaves, backend)), flat(compiled(f)(leaves, backend)), strict=True):
        assert not b.requires_grad and torch.equal(a, b)


def test_every_statistic():
    qkv, _ = inputs(m=7, n=9)
    more = extras(7, 9) | {"segment_mask": torch.ones(4, 4).bool(), "q_segments": torch.zeros(7).long()}

    def f(q, k, v):
        return headstats.attend(q, k, v, **more, spec=StatSpec.all())

    want, got = f(*qkv), compiled(f)(*qkv)
    assert list(want.stats.as_dict()) == list(got.stats.as_dict())
    for a, b in zip(flat(want), flat(got), strict=True):
        assert torch.equal(a, b)


def test_report_mass():
    qkv, options = inputs(m=7, n=9, **EDITED["knockout"])
    edit = Edit(knockout=options.pop("edit").knockout, report_mass=True)

    def f(q, k, v):
        r = headstats.attend(q, k, v, **options, edit=edit)
        return r.mass_before, r.mass_after

    for a, b in zip(f(*qkv), compiled(f)(*qkv), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["GPT-OSS", "all edits"])
def test_with_inductor(name):
    f, leaves = case(name)
    results = f(leaves), compiled(f, "inductor")(leaves)
    for a, b in zip(*map(flat, results), strict=True):
        torch.testing.assert_close(a, b)
    grads = [torch.autograd.grad(r.out.sin().sum(), leaves, allow_unused=True) for r in results]
    for a, b in zip(*grads, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a - b).abs().max() < 1e-5


def test_sizes_may_vary_without_compiling_again():
    frames = torch._dynamo.testing.CompileCounter()
    f = torch.compile(lambda q, k, v: headstats.attend(q, k, v).out, fullgraph=True, backend=frames, dynamic=True)
    for n in (15, 63, 111):
        qkv, _ = inputs(m=n, n=n)
        torch.testing.assert_close(f(*qkv), headstats.attend(*qkv).out)
    assert frames.frame_count == 1


def test_the_reference_is_traced_itself():
    """Its statistics stay differentiable."""
    qkv, _ = inputs(m=7, n=9)
    q = qkv[0].requires_grad_()

    def f(q):
        return headstats.attend(q, *qkv[1:], backend="reference").stats.entropy.sum()

    got, want = (torch.autograd.grad(g(q), q)[0] for g in (compiled(f), f))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k_segments": torch.tensor([0, 0, 1, 1, 9])}, "k_segments holds ids from 0 to 9: -1 .none. to 1 allowed"),
        ({"targets": torch.tensor([[5]] * 5)}, "targets holds ids from 5 to 5"),
        ({"edit": {"temperature": torch.tensor([-1.0])}}, "Edit.temperature goes down to -1"),
        ({"edit": {"bias": torch.full((2, 2), torch.inf)}}, "Edit.bias holds numbers that are not finite"),
    ],
    ids=str,
)
def test_numbers_are_checked_when_the_graph_runs(change, message):
    ids = torch.tensor([0, 0, 1, 1, -1])
    options = {"q_segments": ids, "k_segments": ids, "segment_mask": torch.eye(2).bool()} | change
    edit = Edit(**options.pop("edit", {}))
    qkv, _ = inputs(m=5, n=5, h=1, hk=1)
    with pytest.raises(ValueError, match=message):
        compiled(lambda q, k, v: headstats.attend(q, k, v, **options, edit=edit).out)(*qkv)


def test_the_number_of_segments_must_be_known():
    qkv, _ = inputs(m=5, n=5)
    ids = torch.tensor([0, 0, 1, 1, 2])
    with pytest.raises(torch._dynamo.exc.Unsupported, match="k_segments without a table over segments"):
        compiled(lambda q, k, v: headstats.attend(q, k, v, k_segments=ids).out)(*qkv)


def test_a_wrong_argument_is_named():
    qkv, _ = inputs(m=5, n=5)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="window=0: an int >= 1 expected"):
        compiled(lambda q, k, v: headstats.attend(q, k, v, window=0).out)(*qkv)


def test_no_second_derivative():
    f, leaves = case("causal")
    (dq,) = torch.autograd.grad(compiled(f, "eager")(leaves).out.sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="use backend='reference' for second derivatives"):
        dq.sum().backward()


def test_export():
    class Attention(torch.nn.Module):
        def forward(self, q, k, v):
            r = headstats.attend(q, k, v, window=5)
            return r.out, r.stats.entropy, r.stats.argmax

    qkv, _ = inputs(m=9, n=9)
    exported = torch.export.export(Attention(), qkv)
    assert "headstats.attend.default" in exported.graph_module.code
    for a, b in zip(exported.module()(*qkv), Attention()(*qkv), strict=True):
        assert torch.equal(a, b)


def test_fake_tensors():
    """Shapes alone, as tools that plan memory ask for them."""
    with FakeTensorMode():
        q, k = torch.empty(2, 4, 9, 8, dtype=torch.bfloat16), torch.empty(2, 2, 9, 8, dtype=torch.bfloat16)
        r = headstats.attend(q, k, k, edit=Edit(temperature=torch.empty(4)), spec=StatSpec(topk=3, received=True))
    assert r.out.shape == q.shape and r.out.dtype == q.dtype and r.stats.received.shape == (2, 4, 9)
    assert r.stats.topk.values.shape == (2, 4, 9, 3) and r.stats.topk.indices.dtype == torch.int64


@pytest.mark.parametrize("name", ["causal", "everything", "prefix, everything", "all edits"])
def test_opcheck(name, monkeypatch):
    """Schema, fake implementation, autograd registration and AOT dispatch, as PyTorch checks them."""
    calls = []
    attend = torch.ops.headstats.attend.default
    f, leaves = case(name, leaves=False, m=5, n=6)
    monkeypatch.setattr(headstats.api, "is_tracing", lambda x: True)
    with monkeypatch.context() as patch:
        patch.setattr(torch.ops.headstats, "attend", lambda *a: calls.append(a) or attend(*a))
        f(leaves, spec=StatSpec(topk=2, received=True))
    (arguments,) = calls
    wanted = {headstats.torch_ops.INDEX[n] for n in LEAVES}
    arguments = tuple(
        x.detach().clone().requires_grad_() if i in wanted and x is not None else x for i, x in enumerate(arguments)
    )
    torch.library.opcheck(attend, arguments)
