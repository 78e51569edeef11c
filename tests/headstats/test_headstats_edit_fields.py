"""Every field of Edit on every backend: it does what the reference says, or the backend refuses it by name."""

from dataclasses import fields, replace

import headstats
import pytest
import torch
from headstats import Edit, StatSpec, call
from headstats.backends import BACKENDS
from headstats.blocked import sdpa as cpu_flash
from headstats.blocked import tiles
from headstats.triton import backend as launch
from headstats.validate.call import make_call
from headstats_cases import CHANGED, REDISTRIBUTION, assert_same, extras, in_double, inputs, oracle

# What a field needs beside it to be a whole edit.
COMPANIONS = {
    **dict.fromkeys(REDISTRIBUTION, REDISTRIBUTION),
    "renormalise": ("knockout", "leave"),
    "seed": ("random",),
    "counterfactual": ("reversed",),
    "counterfactual_heads": ("reversed", "counterfactual_heads"),
    "pattern_heads": ("pattern_from", "pattern_heads"),
    "rows": ("temperature", "rows"),
    "phase": ("temperature", "phase", "prompt_length"),
    "prompt_length": ("temperature", "phase", "prompt_length"),
    "report_mass": ("temperature",),
}
# Fields of Call that Triton takes, which headstats_interpreted.py tests.
IN_TRITON = {
    "edit_q_segments", "pattern_q", "pattern_k", "pattern_rows", "logit_factor", "logit_raise", "temperature",
    "edit_bias", "knockout", "counterfactual", "counterfactual_rows", "gain", "take", "give", "keep_fraction", "gate",
    "replacement",
}  # fmt: skip
FIELDS = [f.name for f in fields(Edit)]


def one_field(name, m=9, n=17):
    """A call that uses this field, with heads of a size that all backends take."""
    qkv, options = inputs(b=2, h=4, hk=2, m=m, n=n, d=16, dv=16, edits=COMPANIONS.get(name, (name,)))
    if name == "report_mass":
        options |= {"edit": replace(options["edit"], report_mass=True), "k_segments": torch.arange(n) % 3}
    return qkv, options


@pytest.mark.parametrize("spec", [StatSpec.none(), StatSpec(segments=False)], ids=["alone", "statistics"])
@pytest.mark.parametrize("name", FIELDS)
def test_no_backend_ignores_a_field(name, spec, monkeypatch):
    """Triton is asked as if a GPU were there: what it does not refuse is tested in its interpreter."""
    qkv, options = one_field(name)
    with_field = oracle(qkv, **options, spec=spec)
    plain = oracle(qkv, spec=StatSpec.none())
    if name != "report_mass":
        assert not torch.allclose(with_field.out, plain.out, atol=1e-3)  # the field has an effect to be missed
    for backend in ("auto", "reference", "blocked"):
        assert_same(headstats.attend(*qkv, **options, spec=spec, backend=backend), with_field)
    monkeypatch.setattr(launch, "_interpreted", lambda: True)
    made = make_call(*qkv, **options, spec=spec)
    reason = launch.unsupported(made)
    edited = {x for x in call.EDITS if isinstance(getattr(made, x), torch.Tensor | str)}
    assert edited and (reason is not None or edited <= IN_TRITON), f"triton neither refuses nor is tested: {name}"


def test_every_edit_field_of_a_call_is_known_to_fall_away():
    """`Call.unedited`, which mass_before rests on, resets all that an edit can set."""
    for case in CHANGED.values():
        qkv, options = inputs(**case)
        made = make_call(*qkv, **options, spec=StatSpec.none())
        without = {x: y for x, y in options.items() if x != "edit"}
        if made.q_segments is not None and not {"segment_mask", "segment_open"} & set(without):
            continue  # without the edit nothing reads the segments, which is refused
        plain, back = make_call(*qkv, **without, spec=StatSpec.none()), made.unedited()
        for f in fields(call.Call):
            assert getattr(back, f.name) is getattr(plain, f.name) or f.name not in call.EDITS, f.name


def test_flash_attention_of_pytorch_gets_no_edit_but_the_gate():
    for name in FIELDS:
        if name in ("gate", "replacement"):
            continue
        qkv, options = one_field(name, m=64, n=64)
        assert not cpu_flash.is_faster(make_call(*qkv, **options, spec=StatSpec.none())), name


@pytest.mark.parametrize("name", CHANGED)
@pytest.mark.parametrize("shape", [(15, 15), (1, 33), (7, 21), (9, 4)], ids=str)
@pytest.mark.parametrize("cells", [64, 1 << 19])
def test_blocked_in_double_precision(name, shape, cells, monkeypatch):
    """To 1e-10, places of maxima included: no rounding to hide behind."""
    monkeypatch.setattr(tiles, "CELLS", cells)
    monkeypatch.setattr(tiles, "ROWS", 2)
    m, n = shape
    qkv, options = inputs(m=m, n=n, d=8, dv=5, **CHANGED[name])
    options = in_double(options)
    options = in_double(extras(m, n + (options["prefix"][0].shape[2] if "prefix" in options else 0))) | options
    qkv = tuple(x.double() for x in qkv)
    got, want = (headstats.attend(*qkv, **options, spec=StatSpec.all(), backend=b) for b in ("blocked", "reference"))
    assert_same(got, want, tolerance=1e-10, distance=1e-9)
    assert BACKENDS["blocked"].unsupported(make_call(*qkv, **options)) is None
