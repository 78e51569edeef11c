"""Compiles the Triton forward for GPUs that need not be present and prints one JSON line for each kernel.

Run as a script, in a process without TRITON_INTERPRET: the interpreter replaces @triton.jit altogether.
"""

import json
import pathlib
import re
import subprocess
import sys
import tempfile
from dataclasses import replace

import torch
import triton
from headstats import StatSpec
from headstats.stats import BY_NAME
from headstats.triton import backend as launch
from headstats.triton import forward
from headstats.triton import per_key_values as carried
from headstats.validate.call import make_call
from headstats_cases import EDITED, WITH_BIAS, inputs
from headstats_plain import plain_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
TARGETS = {"sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32),
           "gfx942": GPUTarget("hip", "gfx942", 64)}  # fmt: skip
NVIDIA = ("sm_80", "sm_90")
FULL = replace(StatSpec.none(), **{name: BY_NAME[name].full for name in launch.IN_KERNEL})


def call_of(spec: StatSpec, d: int, dtype: torch.dtype, n: int = 48, **options):
    """A validated call with four heads on two key heads."""
    qkv, given = inputs(m=n, n=n, d=d, dv=d, **options)
    if "prefix" in given:
        given["prefix"] = tuple(x.to(dtype) for x in given["prefix"])
    if "edit" in given and (pattern := given["edit"].pattern_from) is not None:
        given["edit"] = replace(given["edit"], pattern_from=tuple(x.to(dtype) for x in pattern))
    return make_call(*(x.to(dtype) for x in qkv), **given, spec=spec)


def compiled(kernel, given, meta, target: GPUTarget):
    """What the launcher would compile for these arguments."""
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*given, **meta)
    options, signature, constexprs, attrs = kernel._pack_args(backend, options, bound, specialization, options)
    source = ASTSource(kernel, signature, constexprs, attrs)
    return triton.compile(source, target=target, options=options.__dict__)


def kernel_of(call, target: GPUTarget):
    """The forward kernel of a call."""
    _, given, meta, _ = launch.prepare(call, carried.features(call), amd=target.backend == "hip")
    return compiled(forward.attend_kernel, given, meta, target)


def plain_of(call, target: GPUTarget):
    """Plain causal attention with the same tiles."""
    _, given, meta, _ = launch.prepare(call, None)
    q, q_strides, own, _, out, shift, log, cells, *_ = given
    meta = {name: x for name, x in meta.items() if name in plain_kernel.arg_names or name.islower()}
    given = (q, *q_strides, own.k, own.v, *own.k_strides, *own.v_strides, own.n, out, shift, log, cells.scale,
             cells.offset, q.shape[1], q.shape[2])  # fmt: skip
    return compiled(plain_kernel, given, meta, target)


def tool(name: str, *arguments: str, cubin: bytes) -> str:
    """What one of NVIDIA's tools in Triton's wheel prints about a binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        command = [pathlib.Path(triton.__file__).parent / "backends/nvidia/bin" / name, *arguments, f.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resources(kernel) -> dict[str, int]:
    """Registers of a thread, machine instructions, and bytes of stack, which is where spilled registers go."""
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        registers, spilled = (int(re.search(rf"\.{x}:\s+(\d+)", text)[1]) for x in ("vgpr_count", "vgpr_spill_count"))
        return {"registers": registers, "spilled": spilled, "instructions": len(re.findall(r"^\t[vs]_", text, re.M))}
    cubin = kernel.asm["cubin"]
    report = tool("cuobjdump", "--dump-resource-usage", cubin=cubin)
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", report).groups())
    instructions = len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", tool("nvdisasm", "-c", cubin=cubin), re.M))
    return {"registers": registers, "spilled": stack + local, "instructions": instructions}


def variants():
    """(name, head size, dtype, targets, call): attention alone, default and full statistics, each alone, options."""
    none, usual, half = StatSpec.none(), StatSpec(), torch.bfloat16
    for d in (64, 128):
        yield "off", d, half, tuple(TARGETS), call_of(none, d, half)
        yield "default", d, half, tuple(TARGETS), call_of(usual, d, half)
        yield "full", d, half, NVIDIA, call_of(FULL, d, half)
    for name in launch.IN_KERNEL:
        yield name, 64, half, ("sm_90",), call_of(replace(none, **{name: BY_NAME[name].full}), 64, half)
    yield "features", 64, half, ("sm_90",), call_of(usual, 64, half, key_features=torch.ones(48, 9))
    for name, options in {
        "window": {"window": 9}, "everything": WITH_BIAS["everything"], "prefix": {"prefix": 9},
        "edits": EDITED["all edits"], "edits, not renormalised": EDITED["all edits, not renormalised"],
    }.items():  # fmt: skip
        spec = replace(usual, segments=False) if "edits" in name else usual
        yield name, 64, half, ("sm_90",), call_of(spec, 64, half, **options)
    for d, dtype in ((80, half), (128, torch.float16), (256, half), (64, torch.float32), (128, torch.float32)):
        yield "default", d, dtype, ("sm_80",), call_of(usual, d, dtype)
    yield "default, one query, one key", 64, half, ("sm_90",), call_of(usual, 64, half, n=1)


def main() -> None:
    """Compiles all variants, and plain attention for each that is off."""
    for name, d, dtype, targets, call in variants():
        for target in targets:
            kernels = {name: kernel_of(call, TARGETS[target])}
            if name == "off" and target in NVIDIA:
                kernels["plain"] = plain_of(call, TARGETS[target])
            for label, kernel in kernels.items():
                line = {"d": d, "dtype": TYPES[dtype], "stats": label, "target": target}
                line |= {"shared": kernel.metadata.shared, "stores": kernel.asm["ttir"].count("tt.store")}
                print(json.dumps(line | resources(kernel)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
