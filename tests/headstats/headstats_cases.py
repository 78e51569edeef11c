"""Inputs and comparisons shared by the tests of headstats."""

from dataclasses import fields, replace

import headstats
import torch
from headstats import reference
from headstats.cpu import self_test as trial
from headstats.edits.lowering import LAYOUTS
from headstats.stats import BY_NAME, tensors
from headstats.validate.call import make_call

# Every way to shape attention, alone and in the combinations that have met in one model.
OPTIONS = {
    "causal": {},
    "bidirectional": {"causal": False},
    "window": {"window": 5},
    "window, bidirectional": {"window": 4, "causal": False},
    "softcap": {"softcap": 1.5},
    "scale": {"scale": 0.7},
    "sinks": {"sinks": True},
    "left padding": {"padding": "left"},
    "right padding": {"padding": "right", "causal": False},
    "gate": {"gate": True},
    "Gemma 2": {"window": 7, "softcap": 2.0, "scale": 0.3, "padding": "left"},
    "GPT-OSS": {"window": 6, "sinks": True, "padding": "left", "gate": True},
}
# What Triton does not do.
SEGMENTED = {
    "alibi": {"alibi": True},
    "alibi, bidirectional": {"alibi": True, "causal": False, "padding": "left"},
    "segment mask": {"table": ("segment_mask",)},
    "segment mask of heads and rows": {"table": ("segment_mask",), "tables": (2, 4), "causal": False},
    "opened segments": {"table": ("segment_open",), "window": 4},
    "opened and hidden": {
        "table": ("segment_mask", "segment_open"),
        "tables": (1, 4),
        "padding": "left",
        "sinks": True,
    },
    "packed": {"table": ("segment_mask",), "packed": True, "tables": (2, 1)},
}
EDITED = {
    "temperature": {"edits": ("temperature",), "softcap": 2.0, "sinks": True},
    "log gain": {"edits": ("bias",), "causal": False},
    "knockout": {"edits": ("knockout",)},
    "knockout, not renormalised": {"edits": ("knockout", "leave"), "sinks": True},
    "replacement": {"edits": ("gate", "replacement")},
    "replacement alone": {"edits": ("replacement",)},
    "all edits": {
        "edits": ("gate", "replacement", "temperature", "bias", "knockout"), "prefix": 6, "padding": "left",
        "window": 8, "bias": True, "hide": 0.2, "alibi": True, "table": ("segment_open",),
    },
    "all edits, not renormalised": {
        "edits": ("gate", "replacement", "temperature", "bias", "knockout", "leave"), "prefix": 5, "runs": 2,
        "table": ("segment_mask", "segment_open"), "tables": (2, 4), "sinks": True,
    },
}  # fmt: skip
COUNTERFACTUALS = ("uniform", "reversed", "shuffled", "random", "identity")
TABLES = ("bias", "knockout", "gain", "logit_factor", "logit_raise", "take", "give")
REDISTRIBUTION = ("take", "give", "keep_fraction")
CHANGED = {
    "logit factor": {"edits": ("logit_factor",), "softcap": 2.0},
    "logit raise": {"edits": ("logit_raise",), "alibi": True},
    "logit factor and raise": {"edits": ("logit_factor", "logit_raise"), "window": 6},
    "gain": {"edits": ("gain",), "padding": "left"},
    "gain, bias and knockout": {"edits": ("gain", "bias", "knockout")},
    "gain, not renormalised": {"edits": ("gain", "leave"), "sinks": True},
    "gain and knockout, not renormalised": {"edits": ("gain", "knockout", "leave"), "causal": False},
    "redistribution": {"edits": REDISTRIBUTION},
    "redistribution with sinks": {"edits": REDISTRIBUTION, "sinks": True, "window": 5, "padding": "left"},
    "pattern": {"edits": ("pattern_from",), "softcap": 2.0},
    "pattern of some heads": {"edits": ("pattern_from", "pattern_heads"), "prefix": 5, "runs": 2},
    "rows": {"edits": ("gate", "replacement", "temperature", "knockout", "rows")},
    "phase": {"edits": ("temperature", "gain", "leave", "phase", "prompt_length")},
    **{kind: {"edits": (kind,), "sinks": kind == "uniform"} for kind in COUNTERFACTUALS},
    **{f"{kind} of some heads, not renormalised": {
        "edits": (kind, "leave", "counterfactual_heads"), "causal": kind == "random", "padding": "left"
    } for kind in COUNTERFACTUALS},
    "everything changed": {
        "edits": (*TABLES, "keep_fraction", "temperature", "gate", "replacement", "pattern_from", "pattern_heads",
                  "shuffled", "counterfactual_heads", "rows", "phase", "prompt_length"),
        "prefix": 6, "padding": "left", "window": 8, "bias": True, "hide": 0.2, "alibi": True, "table":
        ("segment_open",), "softcap": 3.0,
    },
    "everything changed, not renormalised": {
        "edits": (*TABLES, "keep_fraction", "temperature", "gate", "pattern_from", "random", "counterfactual_heads",
                  "rows", "leave"),
        "prefix": 5, "runs": 2, "table": ("segment_mask", "segment_open"), "tables": (2, 4), "sinks": True,
    },
}  # fmt: skip
# Edits of logits and of weights that know their cell alone; some act on some rows only, beside tables of the call.
RESHAPED = {
    **{name: x for name, x in CHANGED.items() if name.startswith(("logit", "gain")) or name in ("rows", "phase")},
    "rows beside tables": {
        "edits": ("knockout", "bias", "logit_factor", "rows"), "table": ("segment_mask", "segment_open"),
    },
    "phase beside tables, not renormalised": {
        "edits": ("gain", "logit_raise", "phase", "prompt_length", "leave"), "table": ("segment_mask",),
        "tables": (2, 4), "prefix": 5, "sinks": True,
    },
}  # fmt: skip
# Edits that need to know whole rows, or other queries and keys.
MOVED = {
    **{name: x for name, x in CHANGED.items() if name.startswith(("redistribution", "pattern", *LAYOUTS))},
    "uniform and gain, in some rows": {
        "edits": ("uniform", "gain", "temperature", "leave", "rows"), "table": ("segment_mask",), "prefix": 5,
        "sinks": True, "alibi": True, "bias": True, "hide": 0.2,
    },
    **{f"redistribution of what {kind} left": {
        # Gains and fractions are few round numbers: with weights that are equal, they would tie but for rounding.
        "edits": (*REDISTRIBUTION, kind, "counterfactual_heads", "leave", *(("gain",) if kind == "random" else ())),
        "sinks": kind == "random", "prefix": 4,
    } for kind in LAYOUTS},
    "random beside tables, in some rows": {
        "edits": ("random", "knockout", "bias", "gain", "leave", "rows"), "table": ("segment_mask", "segment_open"),
        "tables": (2, 4), "prefix": 5, "runs": 2, "sinks": True, "window": 6,
    },
    "reversed, all before it": {
        "edits": ("reversed", "knockout", "temperature", "pattern_from", "pattern_heads"), "prefix": 5, "softcap": 1.0,
        "sinks": True, "padding": "left",
    },
    "redistribution of what gains left": {
        "edits": (*REDISTRIBUTION, "gain", "bias", "knockout", "leave", "temperature"), "prefix": 5, "runs": 2,
    },
    "redistribution in some rows": {"edits": (*REDISTRIBUTION, "rows", "knockout"), "table": ("segment_mask",)},
    "all but counterfactuals": {
        "edits": (*TABLES, "keep_fraction", "temperature", "gate", "replacement", "pattern_from", "pattern_heads",
                  "rows", "phase", "prompt_length"),
        "prefix": 6, "padding": "left", "window": 8, "bias": True, "hide": 0.2, "alibi": True, "table":
        ("segment_open",), "softcap": 3.0,
    },
    "all but counterfactuals, not renormalised": {
        "edits": (*TABLES, "keep_fraction", "temperature", "gate", "pattern_from", "rows", "leave"),
        "table": ("segment_mask", "segment_open"), "tables": (2, 4), "sinks": True,
    },
}  # fmt: skip
CELLS = RESHAPED | MOVED
PREFIX = {
    "prefix": {"prefix": 9},
    "prefix for each row": {"prefix": 5, "runs": 2, "causal": False},
    "prefix, window": {"prefix": 7, "window": 6, "softcap": 2.0},
    "prefix, everything": {
        "prefix": 6, "runs": 2, "padding": "left", "alibi": True, "bias": True, "sinks": True, "gate": True,
        "table": ("segment_mask", "segment_open"),
    },
}  # fmt: skip
WITH_BIAS = {
    "bias": {"bias": True},
    "bias that hides": {"bias": True, "hide": 0.4, "causal": False},
    "everything": {
        "bias": True,
        "hide": 0.3,
        "window": 9,
        "softcap": 2.0,
        "sinks": True,
        "padding": "left",
        "gate": True,
    },
}


def choice_on_cpu():
    """What backend="auto" takes there."""
    return "blocked" if trial.failure(torch.float32) else "compiled"


def extras(m, n, b=2, seed=0, shared=False):
    """Arguments that ask for statistics: segments with a gap and a key in none, targets with a hole, features."""
    g = torch.Generator().manual_seed(seed)
    batch = () if shared else (b,)
    segments = torch.randint(0, 4, (*batch, n), generator=g)
    segments[segments == 1] = -1
    targets = torch.randint(-1, n, (*batch, m, 3), generator=g)
    return {"k_segments": segments, "targets": targets, "key_features": torch.randn(*batch, n, 2, generator=g)}


def inputs(b=2, h=4, hk=2, m=15, n=15, d=16, dv=16, seed=0, **options):
    """(q, k, v) and the keyword arguments of attend that the options stand for."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(b, *s, generator=g) for s in ((h, m, d), (hk, n, d), (hk, n, dv)))
    if p := options.pop("prefix", 0):
        runs = options.pop("runs", 1)
        runs = runs if b % runs == 0 else 1
        options["prefix"] = tuple(torch.randn(runs, hk, p, x, generator=g) for x in (d, dv))
        n += p
    if options.pop("alibi", False):
        options["alibi"] = torch.rand(h, generator=g) / 4
    edits = options.pop("edits", ())
    by_segment = bool(set(TABLES) & set(edits))
    options |= segment_options(options, b, h, m, n, g, by_segment)
    if edits:
        options["edit"] = edit_of(edits, (q, k, v), n, g)
    if options.pop("sinks", False):
        options["sinks"] = torch.randn(h, generator=g)
    if side := options.pop("padding", None):
        count = torch.arange(b) * n // max(b, 1)  # row 0 has none
        place = torch.arange(n) if side == "left" else torch.arange(n).flip(0)
        options["key_padding"] = place >= count[:, None]
    if options.pop("gate", False):
        options["edit"] = headstats.Edit(gate=torch.randn(b, h, m, generator=g))
    if options.pop("bias", False):
        bias = torch.randn(1, h, m, n, generator=g)
        hidden = torch.rand(bias.shape, generator=g) < options.pop("hide", 0.0)
        options["bias"] = bias.masked_fill(hidden, -torch.inf)
    return (q, k, v), options


def segment_options(options, b, h, m, n, g, always=False):
    """Random segments, some tokens in none; random tables over pairs of them."""
    names, (rows, heads) = options.pop("table", ()), options.pop("tables", (1, 1))
    packed = options.pop("packed", False)
    if not names and not always:
        return {}
    shape = (b if rows > 1 else 1, h if heads > 1 else 1, 3, 3)
    k_segments = torch.randint(-1, 3, (b, n), generator=g)
    if packed:
        k_segments = torch.arange(n).mul(3) // n
    q_segments = torch.nn.functional.pad(k_segments, (m - n if m > n else 0, 0), value=-1)[..., -m:]
    made = {"segment_mask": torch.rand(shape, generator=g) < 0.7, "segment_open": torch.rand(shape, generator=g) < 0.3}
    if packed:
        made["segment_mask"] = torch.eye(3).bool()
    return {"q_segments": q_segments, "k_segments": k_segments} | {name: made[name] for name in names}


def edit_of(names, qkv, n, g):
    """A random edit; each batch row and head has its own."""
    (b, h, m, _), dv = qkv[0].shape, qkv[2].shape[3]
    made = {
        "gate": torch.randn(b, h, m, generator=g),
        "replacement": torch.randn(b, h, dv, generator=g),
        "temperature": torch.rand(b, h, m, generator=g) + 0.5,
        "bias": torch.randn(b, h, 3, 3, generator=g),
        "knockout": torch.rand(b, h, 3, 3, generator=g) < 0.4,
        "logit_factor": torch.randn(b, h, 3, 3, generator=g),
        "logit_raise": torch.randn(b, h, 3, 3, generator=g),
        "gain": torch.randint(0, 4, (b, h, 3, 3), generator=g) / 2,
        "keep_fraction": torch.randint(0, 5, (b, h, m), generator=g) / 4,
        "pattern_from": tuple(torch.randn(x.shape, generator=g).to(x.dtype) for x in qkv[:2]),
        "pattern_heads": torch.rand(b, h, generator=g) < 0.5,
        "counterfactual_heads": torch.rand(b, h, generator=g) < 0.5,
        "rows": torch.rand(b, m, generator=g) < 0.7,
        "phase": "decoding",
        "prompt_length": torch.randint(n - m, n, (b,), generator=g).clamp_min(0),
    }
    part = torch.randint(0, 3, (b, h, 3, 3), generator=g)
    made |= {"take": part == 1, "give": part == 2}
    fields = {name: x for name, x in made.items() if name in names}
    kind = next((x for x in COUNTERFACTUALS if x in names), None)
    return headstats.Edit(**fields, counterfactual=kind, renormalise="leave" not in names, seed=7)


def in_double(options):
    """The same arguments with floating tensors in float64, those of an edit too."""

    def double(x):
        if isinstance(x, tuple):
            return tuple(map(double, x))
        return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    options = {name: double(x) for name, x in options.items()}
    if edit := options.get("edit"):
        options["edit"] = replace(edit, **{f.name: double(getattr(edit, f.name)) for f in fields(edit)})
    return options


def oracle(qkv, **options):
    """The float64 reference; `weights()` of the result gives its pattern."""
    qkv, options = [x.double() for x in qkv], in_double(options)
    r = headstats.attend(*qkv, **options, backend="reference")
    r.weights = lambda: reference.build_pattern(make_call(*qkv, **options))[0].p
    return r


# Statistics that are no probability or mean grow with the sizes at hand: these are held relatively.
LOOSE = {"distance": 3e-6, "distance_var": 1e-4, "effective_keys": 1e-5, "segment_value_norms": 1e-5}


def assert_same(got, want, tolerance=1e-5, distance=1e-4):
    """Compares out, lse and all statistics; every number must be finite but lse, which is -inf in empty rows.

    In float32, places of the largest weights may be other ones if these weigh the same but for rounding.
    """
    torch.testing.assert_close(got.out.double(), want.out, atol=tolerance, rtol=0)
    torch.testing.assert_close(got.lse.double(), want.lse, atol=tolerance, rtol=tolerance)
    assert set(got.stats.as_dict()) == set(want.stats.as_dict())
    for name, value in want.stats.as_dict().items():
        for mine, one in zip(tensors(getattr(got.stats, name)), tensors(value), strict=True):
            assert mine.shape == one.shape and not mine.isnan().any(), name
            atol = distance if BY_NAME[name].unit.startswith("tokens") else tolerance
            if not one.is_floating_point():
                assert_same_weights(name, mine, one, want, 0 if got.lse.dtype == want.lse.dtype else tolerance / 10)
                continue
            close = {"atol": atol, "rtol": LOOSE.get(name, 1e-6)}
            torch.testing.assert_close(mine.to(one.dtype), one, **close, msg=lambda m, n=name: f"{n}: {m}")


def assert_same_weights(name, mine, places, want, tolerance):
    """That places of keys are those wanted, or that their weights differ by no more than part of the row's largest."""
    if tolerance == 0 or torch.equal(mine, places):
        assert torch.equal(mine, places), name
        return
    assert torch.equal(mine < 0, places < 0), name
    p = want.weights()
    a, b = (p.gather(-1, x.reshape(*p.shape[:3], -1).clamp_min(0)) for x in (mine, places))
    assert ((a - b).abs() <= tolerance * p.amax(-1, keepdim=True)).all(), name
    if name == "topk":
        order = mine.sort(-1).values
        assert ((order[..., 1:] > order[..., :-1]) | (order[..., 1:] < 0)).all(), name  # no key twice
