"""Every wrong argument gets a message that names it, says what was given and what is allowed."""

import subprocess
import sys

import headstats
import pytest
import torch
from headstats import Edit, StatSpec
from headstats.triton import backend as launch
from headstats_cases import choice_on_cpu
from torch._subclasses.fake_tensor import FakeTensorMode

Q, K, V = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 6)
SEGMENTS = torch.tensor([0, 0, 0, 1, 1, 1, 1])
IDS = {"q_segments": torch.tensor([0, 0, 1, 1, 1]), "k_segments": SEGMENTS}
LATER = torch.ones(2, 7, dtype=torch.bool)

WRONG = {
    "q dims": ({"q": Q[0]}, ValueError, r"q has shape \[4, 5, 8\]: four dimensions \[B, H, M, D\]"),
    "q type": ({"q": Q.tolist()}, TypeError, "q is a list: a torch.Tensor"),
    "q dtype": ({"q": Q.int()}, TypeError, "q has dtype torch.int32: float32"),
    "mixed dtype": ({"k": K.double()}, TypeError, "k has dtype torch.float64 but q has torch.float32"),
    "device": ({"v": V.to("meta")}, ValueError, "v is on meta but q is on cpu"),
    "batch": ({"k": K[:1]}, ValueError, "k has batch size 1 but q has 2"),
    "keys": ({"v": V[:, :, :6]}, ValueError, r"k is \[2, 2, 7, 8\] and v is \[2, 2, 6, 6\]"),
    "head size": ({"k": K[..., :7]}, ValueError, "q has head size 8 but k has 7"),
    "heads": ({"q": Q[:, :3]}, ValueError, "q has 3 heads and k has 2: .* multiple"),
    "empty": ({"q": Q[:, :, :0]}, ValueError, r"q has shape \[2, 4, 0, 8\]: every size must be at least 1"),
    "no keys": ({"k": K[:, :, :0], "v": V[:, :, :0]}, ValueError, r"k has shape \[2, 2, 0, 8\]: every size must be"),
    "no batch": ({"q": Q[:0], "k": K[:0], "v": V[:0]}, ValueError, r"q has shape \[0, 4, 5, 8\]: every size must be"),
    "no head size": ({"q": Q[..., :0], "k": K[..., :0]}, ValueError, r"q has shape \[2, 4, 5, 0\]: every size must be"),
    "no value size": ({"v": V[..., :0]}, ValueError, r"v has shape \[2, 2, 7, 0\]: every size must be at least 1"),
    "complex": ({"q": Q + 0j}, TypeError, "q has dtype torch.complex64: float32, bfloat16, float16 or float64"),
    "half values": ({"v": V.half()}, TypeError, "v has dtype torch.float16 but q has torch.float32: one dtype"),
    "heads of v": ({"v": V[:, :1]}, ValueError, r"k is \[2, 2, 7, 8\] and v is \[2, 1, 7, 6\]"),
    "window bool": ({"window": True}, ValueError, "window=True: an int >= 1"),
    "scale bool": ({"scale": True}, ValueError, "scale=True: a finite number"),
    "scale nan": ({"scale": float("nan")}, ValueError, "scale=nan: a finite number"),
    "bias device": ({"bias": torch.zeros(5, 7, device="meta")}, ValueError, "bias is on meta but q is on cpu"),
    "padding device": ({"key_padding": LATER.to("meta")}, ValueError, "key_padding is on meta but q is on cpu"),
    "targets below": ({"targets": torch.full((5, 1), -2)}, ValueError, r"targets holds ids from -2 to -2: -1 \(none\)"),
    "targets dtype": ({"targets": torch.zeros(5, 1)}, TypeError, "targets has dtype torch.float32: an integer"),
    "queries' segments above": (
        {**IDS, "q_segments": torch.full((5,), 2), "segment_mask": torch.ones(2, 2).bool()}, ValueError,
        r"q_segments holds ids from 2 to 2: -1 \(none\) to 1",
    ),
    "sinks dtype": ({"sinks": torch.zeros(4).int()}, TypeError, "sinks has dtype torch.int32: a floating dtype"),
    "gate dtype": ({"edit": Edit(gate=torch.ones(4).int())}, TypeError, "Edit.gate has dtype torch.int32: a floating"),
    "causal": ({"causal": 1}, TypeError, "causal=1: True or False"),
    "window zero": ({"window": 0}, ValueError, "window=0: an int >= 1"),
    "window negative": ({"window": -3}, ValueError, "window=-3: an int >= 1"),
    "window float": ({"window": 2.0}, ValueError, "window=2.0: an int >= 1"),
    "softcap": ({"softcap": 0}, ValueError, "softcap=0: a finite number > 0"),
    "softcap nan": ({"softcap": float("nan")}, ValueError, "softcap=nan"),
    "scale": ({"scale": float("inf")}, ValueError, "scale=inf: a finite number"),
    "bias shape": ({"bias": torch.zeros(3, 7)}, ValueError, r"bias has shape \[3, 7\]: .* \[2, 4, 5, 7\]"),
    "bias bool": ({"bias": torch.ones(5, 7).bool()}, TypeError, "bias has dtype torch.bool: an additive floating bias"),
    "bias int": ({"bias": torch.ones(5, 7).int()}, TypeError, "bias has dtype torch.int32: a floating dtype"),
    "sinks": ({"sinks": torch.zeros(3)}, ValueError, r"sinks has shape \[3\]: .* \[4\]"),
    "padding shape": ({"key_padding": LATER[:, :5]}, ValueError, r"key_padding has shape \[2, 5\]: \[2, 7\] expected"),
    "padding dtype": ({"key_padding": LATER.long()}, TypeError, "key_padding has dtype torch.int64: bool expected"),
    "query padding": ({"query_padding": LATER}, ValueError, r"query_padding has shape \[2, 7\]: \[2, 5\] expected"),
    "segments shape": (
        {"k_segments": torch.zeros(5).long()}, ValueError,
        r"k_segments has shape \[5\]: \[N\] = \[7\] or \[B, N\] = \[2, 7\]",
    ),
    "segments dtype": ({"k_segments": torch.zeros(7)}, TypeError, "k_segments has dtype torch.float32: an integer"),
    "segments below": ({"k_segments": torch.full((7,), -2)}, ValueError, r"k_segments holds ids from -2 .* -1"),
    "alibi": ({"alibi": torch.zeros(3)}, ValueError, r"alibi has shape \[3\]: one slope for each query head, \[4\]"),
    "prefix type": ({"prefix": K}, TypeError, "prefix is Tensor: a pair of tensors"),
    "prefix dtype": ({"prefix": (K.half(), V)}, TypeError, "prefix k0 is torch.float16 on cpu: torch.float32 on cpu"),
    "prefix rows": (
        {"prefix": (torch.randn(3, 2, 4, 8), V)}, ValueError, r"prefix k0 has shape \[3, 2, 4, 8\]: .* divisor of .* 2"
    ),
    "prefix sizes": ({"prefix": (K, V[:, :, :3])}, ValueError, r"k0 is \[2, 2, 7, 8\] and v0 is \[2, 2, 3, 6\]"),
    "mask without segments": (
        {"segment_mask": torch.ones(2, 2).bool(), "k_segments": SEGMENTS}, ValueError, "segment_mask needs q_segments="
    ),
    "mask dtype": ({**IDS, "segment_mask": torch.ones(2, 2)}, TypeError, "segment_mask has dtype torch.float32: bool"),
    "mask shape": (
        {**IDS, "segment_open": torch.ones(3, 2, 2).bool()}, ValueError, r"segment_open has shape \[3, 2, 2\]: .* H = 4"
    ),
    "mask type": ({**IDS, "segment_mask": [[True]]}, TypeError, "segment_mask is a list: a tensor"),
    "mask too small": (
        {**IDS, "segment_mask": torch.ones(2, 1).bool()}, ValueError, "k_segments holds ids from 0 to 1"
    ),
    "queries' segments unread": (IDS, ValueError, "q_segments is given, but nothing reads it"),
    "segments unread": ({"k_segments": SEGMENTS, "spec": StatSpec.none()}, ValueError, "k_segments is given, but"),
    "replacement shape": (
        {"edit": Edit(replacement=torch.zeros(5))}, ValueError, r"Edit.replacement has shape \[5\]: .*\[2, 4, 6\]"
    ),
    "temperature shape": ({"edit": Edit(temperature=torch.ones(3))}, ValueError, r"Edit.temperature has shape \[3\]"),
    "temperature zero": ({"edit": Edit(temperature=torch.zeros(4))}, ValueError, "Edit.temperature goes down to 0.0"),
    "knockout without segments": (
        {"edit": Edit(knockout=torch.ones(2, 2).bool())}, ValueError, "Edit.knockout needs q_segments="
    ),
    "knockout dtype": ({**IDS, "edit": Edit(knockout=torch.ones(2, 2))}, TypeError, "Edit.knockout has dtype"),
    "knockout too small": ({**IDS, "edit": Edit(knockout=torch.ones(1, 2).bool())}, ValueError, "q_segments holds"),
    "gain dtype": ({**IDS, "edit": Edit(bias=torch.ones(2, 2).int())}, TypeError, "Edit.bias has dtype torch.int32"),
    "gain infinite": (
        {**IDS, "edit": Edit(bias=torch.full((2, 2), -torch.inf))}, ValueError, "Edit.bias holds .* use Edit.knockout"
    ),
    "renormalise alone": ({"edit": Edit(renormalise=False)}, ValueError, "Edit.renormalise=False says how"),
    "renormalise type": ({"edit": Edit(renormalise=1)}, TypeError, "Edit.renormalise=1: True or False"),
    "mass without segments": ({"edit": Edit(report_mass=True)}, ValueError, "Edit.report_mass=True .*k_segments="),
    "edit's table dtype": (
        {**IDS, "edit": Edit(logit_factor=torch.ones(2, 2).int())}, TypeError, "Edit.logit_factor has dtype torch.int32"
    ),
    "edit's table infinite": (
        {**IDS, "edit": Edit(logit_raise=torch.full((2, 2), torch.nan))}, ValueError, "Edit.logit_raise holds numbers"
    ),
    "edit's table without segments": (
        {"edit": Edit(gain=torch.ones(2, 2))}, ValueError, "Edit.gain needs q_segments="
    ),
    "edit's table shape": (
        {**IDS, "edit": Edit(gain=torch.ones(3, 2, 2))}, ValueError, r"Edit.gain has shape \[3, 2, 2\]: .* H = 4"
    ),
    "edit's tables differ": (
        {**IDS, "edit": Edit(gain=torch.ones(2, 2), bias=torch.ones(3, 2))}, ValueError,
        r"different numbers of segments \[Sq, Sk\]: Edit.bias \[3, 2\], Edit.gain \[2, 2\]",
    ),
    "gain below 0": ({**IDS, "edit": Edit(gain=-torch.ones(2, 2))}, ValueError, "Edit.gain goes down to -1.0: .* >= 0"),
    "gain 0 with gradient": (
        {**IDS, "edit": Edit(gain=torch.zeros(2, 2, requires_grad=True))}, ValueError, "Edit.gain requires grad and"
    ),
    "take alone": ({**IDS, "edit": Edit(take=torch.eye(2).bool())}, ValueError, "go together, but Edit.give is None"),
    "take dtype": (
        {**IDS, "edit": Edit(take=torch.eye(2), give=torch.eye(2).bool(), keep_fraction=0.5)}, TypeError,
        "Edit.take has dtype torch.float32: bool",
    ),
    "take and give overlap": (
        {**IDS, "edit": Edit(take=torch.eye(2).bool(), give=torch.eye(2).bool(), keep_fraction=0.5)}, ValueError,
        "Edit.take and Edit.give overlap",
    ),
    "keep too much": (
        {**IDS, "edit": Edit(take=torch.eye(2).bool(), give=~torch.eye(2).bool(), keep_fraction=1.5)}, ValueError,
        "Edit.keep_fraction goes from 1.5 to 1.5: 0 to 1",
    ),
    "keep shape": (
        {**IDS, "edit": Edit(take=torch.eye(2).bool(), give=~torch.eye(2).bool(), keep_fraction=torch.ones(3))},
        ValueError, r"Edit.keep_fraction has shape \[3\]",
    ),
    "keep type": (
        {**IDS, "edit": Edit(take=torch.eye(2).bool(), give=~torch.eye(2).bool(), keep_fraction="half")}, TypeError,
        "Edit.keep_fraction is a str",
    ),
    "counterfactual": ({"edit": Edit(counterfactual="shuffle")}, ValueError, "'shuffle': one of 'uniform', 'reversed'"),
    "seed": ({"edit": Edit(counterfactual="random", seed=-1)}, ValueError, "Edit.seed=-1: an int from 0 to"),
    "counterfactual heads alone": (
        {"edit": Edit(counterfactual_heads=torch.ones(4).bool())}, ValueError,
        "Edit.counterfactual_heads is given, but Edit.counterfactual is None",
    ),
    "counterfactual heads shape": (
        {"edit": Edit(counterfactual="uniform", counterfactual_heads=torch.ones(3).bool())}, ValueError,
        r"Edit.counterfactual_heads has shape \[3\]: \[H\] = \[4\], \[B, H\] = \[2, 4\] or \[B, H, M\] = \[2, 4, 5\]",
    ),
    "pattern type": ({"edit": Edit(pattern_from=Q)}, TypeError, "Edit.pattern_from is a Tensor: a pair"),
    "pattern shape": (
        {"edit": Edit(pattern_from=(Q, K[:, :, :6]))}, ValueError, r"k2 is torch.float32 \[2, 2, 6, 8\] on cpu, but k"
    ),
    "pattern dtype": ({"edit": Edit(pattern_from=(Q.half(), K))}, ValueError, "q2 is torch.float16"),
    "pattern heads alone": (
        {"edit": Edit(pattern_heads=torch.ones(4).bool())}, ValueError, "Edit.pattern_heads is given, but"
    ),
    "pattern heads dtype": (
        {"edit": Edit(pattern_from=(Q, K), pattern_heads=torch.ones(4))}, TypeError, "Edit.pattern_heads has dtype"
    ),
    "rows alone": ({"edit": Edit(rows=torch.ones(5).bool())}, ValueError, "say where to act, but no field"),
    "rows shape": (
        {"edit": Edit(gate=torch.ones(4), rows=torch.ones(7).bool())}, ValueError, r"Edit.rows has shape \[7\]: \[M\]"
    ),
    "rows dtype": ({"edit": Edit(gate=torch.ones(4), rows=torch.ones(5))}, TypeError, "Edit.rows has dtype"),
    "phase": ({"edit": Edit(gate=torch.ones(4), phase="decode")}, ValueError, "Edit.phase='decode': 'prompt', 'dec"),
    "prompt length unread": (
        {"edit": Edit(gate=torch.ones(4), prompt_length=3)}, ValueError, "Edit.prompt_length is given, but Edit.phase"
    ),
    "prompt length type": (
        {"edit": Edit(gate=torch.ones(4), phase="prompt", prompt_length=torch.ones(2))}, ValueError,
        "Edit.prompt_length is torch.float32",
    ),
    "prompt length negative": (
        {"edit": Edit(gate=torch.ones(4), phase="prompt", prompt_length=-2)}, ValueError, "Edit.prompt_length goes down"
    ),
    "phase of a suffix": (
        {"prefix": (K, V), "edit": Edit(gate=torch.ones(4), phase="prompt")}, ValueError,
        "needs Edit.prompt_length, since there is a shared prefix",
    ),
    "phase of cross-attention": (
        {"k": K[:, :, :3], "v": V[:, :, :3], "edit": Edit(gate=torch.ones(4), phase="prompt")}, ValueError,
        r"needs Edit.prompt_length, since there are more queries \(5\)",
    ),
    "targets shape": (
        {"targets": torch.zeros(2, 4, 1).long()}, ValueError, r"targets has shape \[2, 4, 1\]: \[M, T\] = \[5, any\]"
    ),
    "targets above": ({"targets": torch.full((5, 1), 7)}, ValueError, r"ids from 7 to 7: -1 \(none\) to 6"),
    "targets unread": ({"targets": torch.zeros(5, 1).long(), "spec": StatSpec.none()}, ValueError,
                       r"targets is given, but StatSpec\(targets=False\)"),
    "targets missing": ({"spec": StatSpec(targets=True)}, ValueError, r"StatSpec\(targets=True\) needs targets="),
    "segments missing": ({"spec": StatSpec(segments=True)}, ValueError, "needs k_segments="),
    "features shape": ({"key_features": torch.zeros(5, 2)}, ValueError, r"key_features has shape \[5, 2\]: .*N = 7"),
    "features dtype": ({"key_features": torch.zeros(7, 2).int()}, TypeError, "key_features has dtype torch.int32"),
    "spec": ({"spec": "all"}, TypeError, "spec='all': a headstats.StatSpec"),
    "edit": ({"edit": torch.ones(4)}, TypeError, "a headstats.Edit expected"),
    "gate shape": ({"edit": Edit(gate=torch.ones(5, 4))}, ValueError, r"Edit.gate has shape \[5, 4\]: .*\[2, 4, 5\]"),
    "gate type": ({"edit": Edit(gate=0.5)}, TypeError, "Edit.gate is a float: a torch.Tensor"),
    "gate dims": ({"edit": Edit(gate=torch.ones(1, 2, 4, 5))}, ValueError, r"Edit.gate has shape \[1, 2, 4, 5\]"),
    "backend": (
        {"backend": "flash"}, ValueError,
        "backend='flash': one of 'auto', 'triton', 'compiled', 'blocked', 'reference'",
    ),
    "triton here": ({"backend": "triton"}, NotImplementedError, "backend='triton' cannot .*: it needs CUDA tensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_argument(name):
    wrong, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        headstats.attend(**({"q": Q, "k": K, "v": V} | wrong))


BAD = {
    "q": ({"q": Q.clone().index_put_((torch.tensor(1), torch.tensor(3), torch.tensor(2)), torch.tensor(torch.nan))},
          r"q holds nan at \[1, 3, 2, 0\] of \[2, 4, 5, 8\], the first of 8 such numbers: finite numbers expected"),
    "v": ({"v": V.clone().fill_(torch.inf)}, r"v holds inf at \[0, 0, 0, 0\] .* the first of 168"),
    "bias": ({"bias": torch.zeros(5, 7).fill_diagonal_(torch.nan)}, r"bias holds nan .* or -inf \(hides the cell\)"),
    "bias up": ({"bias": torch.full((5, 7), torch.inf)}, "bias holds inf at"),
    "prefix": ({"prefix": (K[:1], V[:1] * torch.nan)}, r"prefix\[1\] holds nan at \[0, 0, 0, 0\]"),
    "sinks": ({"sinks": torch.tensor([0.0, -torch.inf, 0, 0])}, r"sinks holds -inf at \[1\]"),
    "features": ({"key_features": torch.full((7, 1), torch.nan)}, r"key_features holds nan at \[0, 0, 0\]"),
    "gate": ({"edit": Edit(gate=torch.tensor([1.0, torch.nan, 1, 1]))}, r"Edit.gate holds nan at \[0, 1, 0\]"),
    "replacement": ({"edit": Edit(replacement=torch.full((6,), torch.inf))}, "Edit.replacement holds inf"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_numbers_that_are_not_finite_are_found_on_request(name):
    wrong, message = BAD[name]
    arguments = {"q": Q, "k": K, "v": V} | wrong
    with pytest.raises(ValueError, match=message):
        headstats.attend(**arguments, check_finite=True)
    headstats.attend(**arguments)


def test_finite_numbers_pass():
    bias = torch.zeros(5, 7).fill_diagonal_(-torch.inf)
    more = {**IDS, "segment_mask": torch.ones(2, 2).bool(), "targets": torch.zeros(5, 1).long()}
    found = headstats.attend(Q, K, V, bias=bias, **more, edit=Edit(gate=torch.ones(4)), check_finite=True)
    assert found.out.isfinite().all()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(x) for x in (Q, K, V)]
        with pytest.raises(NotImplementedError, match="check_finite=True reads numbers"):
            headstats.attend(*fake, check_finite=True)


@pytest.mark.parametrize(("d", "dv"), [(512, 64), (64, 257)])
def test_head_sizes_that_triton_has_no_room_for(d, dv, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(launch, "_interpreted", lambda: True)
    q, k, v = torch.randn(1, 1, 3, d), torch.randn(1, 1, 3, d), torch.randn(1, 1, 3, dv)
    with pytest.raises(NotImplementedError, match=f"head sizes up to 256 fit, given D={d}, Dv={dv}.*'auto' picks one"):
        headstats.attend(q, k, v, backend="triton")
    assert headstats.attend(q, k, v).out.shape == (1, 1, 3, dv)


def test_needs_torch_alone():
    """Importing headstats brings in neither triton nor numpy-only helpers nor interp."""
    code = "import sys, headstats; print({'triton', 'jaxtyping', 'interp', 'transformers'} & set(sys.modules))"
    paths = ":".join(p for p in sys.path if p)
    out = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": paths}, capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "set()"


def test_defaults_are_the_smallest_call():
    r = headstats.attend(Q, K, V)
    assert r.backend == choice_on_cpu() and r.out.shape == (2, 4, 5, 6) and r.lse.shape == (2, 4, 5)
    assert list(r.stats.as_dict()) == list(StatSpec().requested())
