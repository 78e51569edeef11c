"""Compiles the Triton forward for GPUs that need not be present and prints one JSON line for each variant.

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
from headstats import StatSpec, forward, launch
from headstats.edit import Edit
from headstats.validate import make_call
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

POINTERS = {"p_lse": "*fp32", "p_pad": "*u8", "p_gate": "*fp32", "p_sinks": "*fp32", "p_argmax": "*i64"}
ONES = ("H", "M", "N", "window")
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def variant(d: int, dtype: torch.dtype, spec: StatSpec, full: bool):
    """A validated call that asks for everything (full) or for plain causal attention."""
    q, k = torch.zeros(1, 2, 4, d, dtype=dtype), torch.zeros(1, 1, 4, d, dtype=dtype)
    more = (
        {"window": 3, "softcap": 1.0, "sinks": torch.zeros(2), "key_padding": torch.ones(1, 4).bool()} if full else {}
    )
    arguments = {"window": None, "softcap": None, "sinks": None, "key_padding": None} | more
    edit = Edit(gate=torch.zeros(1)) if full else None
    return make_call(q, k, k, spec=spec, edit=edit, **arguments)


def source(call, decode: bool = False) -> tuple[ASTSource, dict]:
    """What the launcher would compile for ordinary tensors; `decode`: for one query and one key."""
    meta = launch.constants(call)
    options = {name: meta.pop(name) for name in ("num_warps", "num_stages", "enable_fp_fusion")}
    asked = call.spec.requested()
    absent = {"p_sinks": call.sinks, "p_pad": call.key_padding, "p_gate": call.gate}
    absent = {n for n, x in absent.items() if x is None}
    fields = {"p_max": "max_prob", "p_entropy": "entropy", "p_argmax": "argmax", "p_distance": "distance",
              "p_participation": "participation"}  # fmt: skip
    absent |= {p for p, name in fields.items() if name not in asked}
    signature, constexprs, attrs = {}, dict(meta), {}
    for index, name in enumerate(forward.attend_kernel.arg_names):
        if name in ONES and decode:
            signature[name], constexprs[name] = "constexpr", 1  # the launcher makes a constant of an integer 1
        elif name in meta or name in absent:
            signature[name] = "constexpr"
            constexprs.setdefault(name, None)
        elif name in ("p_q", "p_k", "p_v", "p_out"):
            signature[name] = "*" + TYPES[call.q.dtype]
        elif name.startswith("p_"):
            signature[name] = POINTERS.get(name, "*fp32")
        else:
            signature[name] = "fp32" if name in ("softcap", "scale") else "i32"
        if (name.startswith("p_") and name not in absent) or re.fullmatch("s_[qkv].", name):
            attrs[(index,)] = [["tt.divisibility", 16]]  # what the launcher finds for ordinary tensors
    return ASTSource(forward.attend_kernel, signature, constexprs, attrs), options


def resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and bytes of its stack, which is where spilled registers go."""
    tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        command = [tool, "--dump-resource-usage", f.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"Function attend_kernel:\s+REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", report)
    registers, stack, local = map(int, found.groups())
    return {"registers": registers, "spilled": stack + local}


def variants() -> list[tuple[int, torch.dtype, str, StatSpec, bool]]:
    """Plain attention and everything at once in each tile shape, then each statistic alone."""
    everything = StatSpec(participation=True)
    full = [
        (d, dtype, "all", everything, True)
        for d, dtype in ((64, torch.bfloat16), (80, torch.bfloat16), (128, torch.float16), (256, torch.bfloat16),
                         (64, torch.float32), (128, torch.float32))
    ]  # fmt: skip
    alone = [(64, torch.bfloat16, name, replace(StatSpec.none(), **{name: True}), False) for name in launch.IN_KERNEL]
    off = [(d, torch.bfloat16, "off", StatSpec.none(), False) for d in (64, 128)]
    ones = [(64, torch.bfloat16, "one query, one key", everything, True)]
    return off + alone + full + ones


def main(capabilities: list[int]) -> None:
    """Every statistic alone needs one target only; the rest is compiled for each."""
    for d, dtype, name, spec, full in variants():
        src, options = source(variant(d, dtype, spec, full), decode=name.startswith("one"))
        for capability in capabilities if name in ("off", "all") else capabilities[-1:]:
            kernel = triton.compile(src, target=GPUTarget("cuda", capability, 32), options=options)
            line = {"d": d, "dtype": TYPES[dtype], "stats": name, "sm": capability, "shared": kernel.metadata.shared}
            line |= {op: kernel.asm["ttir"].count(op) for op in ("tt.store", 'tt.reduce"', "math.exp2")}
            print(json.dumps(line | resources(kernel.asm["cubin"])), flush=True)


if __name__ == "__main__":
    main([int(x) for x in sys.argv[1].split(",")])
