"""Tensors without memory, with lazy properties, of other layouts; numbers beyond 64 bits."""

import subprocess
from pathlib import Path

import headstats
import pytest
import torch
from headstats import Edit, StatSpec
from headstats_jobs import process
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

CALLS = 2000


def qkv():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, 5, 8, generator=generator) for _ in range(3)]


def test_calls_with_odd_tensors_are_right_or_refused_by_name(compiled_library):
    done: subprocess.CompletedProcess[str] = process(
        ["-X", "faulthandler", str(Path(__file__).parent / "headstats_fuzz.py"), str(CALLS)], OMP_NUM_THREADS="1"
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert f"{CALLS} calls" in done.stdout


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_forward_mode_tangent_is_carried_on(backend):
    q, k, v = (x.double() for x in qkv())
    change = torch.ones_like(q)
    with forward_ad.dual_level():
        r = headstats.attend(forward_ad.make_dual(q, change), k, v, backend=backend)
        tangent = forward_ad.unpack_dual(r.out).tangent
    assert r.backend == "reference"
    step = 1e-6
    by_difference = [headstats.attend(q + s * change, k, v, backend="reference").out for s in (step, -step)]
    torch.testing.assert_close(tangent, (by_difference[0] - by_difference[1]) / (2 * step), atol=1e-8, rtol=1e-6)


def test_transforms_of_torch_func():
    q, k, v = qkv()
    grad = torch.func.grad(lambda x: headstats.attend(x, k, v).out.sum())(q)
    leaf = q.clone().requires_grad_()
    headstats.attend(leaf, k, v).out.sum().backward()
    torch.testing.assert_close(grad, leaf.grad)
    with pytest.raises(NotImplementedError, match="q is inside torch"):
        torch.vmap(lambda x: headstats.attend(x, k, v).out)(q[None])


def test_real_tensors_under_fake_mode_and_a_default_device(compiled_library):
    tensors = qkv()
    want = headstats.attend(*tensors, backend="reference")
    with FakeTensorMode(), pytest.raises(TypeError, match="FakeTensorMode is on"):
        headstats.attend(*tensors)
    for backend in ("compiled", "blocked", "reference"):
        with torch.device("meta"):
            got = headstats.attend(*tensors, backend=backend, spec=StatSpec.all())
        torch.testing.assert_close(got.out, want.out)


HUGE = 2**64 + 1


@pytest.mark.parametrize("make", [
    lambda: StatSpec(waad=HUGE), lambda: StatSpec(local=HUGE), lambda: StatSpec(sink=HUGE), lambda: StatSpec(topk=HUGE),
    lambda: StatSpec(fai=(0, HUGE)), lambda: headstats.attend(*qkv(), scale=10**400),
    lambda: headstats.attend(*qkv(), softcap=10**400),
    lambda: headstats.attend(*qkv(), edit=Edit(gate=torch.ones(2), phase="prompt", prompt_length=HUGE)),
    lambda: headstats.attend(*qkv(), edit=Edit(
        gate=torch.ones(2), phase="prompt", prompt_length=torch.tensor([3], dtype=torch.uint64))),
], ids=["waad", "local", "sink", "topk", "fai", "scale", "softcap", "prompt_length", "uint64"])  # fmt: skip
def test_numbers_beyond_64_bits_are_refused(make):
    with pytest.raises(ValueError, match=r"StatSpec\(|scale=|softcap=|prompt_length"):
        make()


@pytest.mark.parametrize("backend", ["compiled", "blocked", "reference"])
def test_a_window_beyond_64_bits_is_no_window(backend, compiled_library):
    got, want = (headstats.attend(*qkv(), window=w, backend=backend).out for w in (HUGE, None))
    assert torch.equal(got, want)
