"""Every wrong argument gets a message that names it, says what was given and what is allowed."""

import subprocess
import sys

import headstats
import pytest
import torch
from headstats import Edit, StatSpec

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
    "backend": ({"backend": "flash"}, ValueError, "backend='flash': one of 'auto', 'triton', 'blocked', 'reference'"),
    "triton here": ({"backend": "triton"}, NotImplementedError, "backend='triton' cannot .*: it needs CUDA tensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_argument(name):
    wrong, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        headstats.attend(**({"q": Q, "k": K, "v": V} | wrong))


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
    assert r.backend == "blocked" and r.out.shape == (2, 4, 5, 6) and r.lse.shape == (2, 4, 5)
    assert list(r.stats.as_dict()) == list(StatSpec().requested())
