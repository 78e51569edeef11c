"""Compiles Triton's passes beside the forward one for GPUs that need not be present; one JSON line for each variant.

Run as a script, in a process without TRITON_INTERPRET: the interpreter replaces @triton.jit altogether. Kernels are
swapped for something that notes what a launch would pass, so that exactly that is compiled.
"""

import json
from dataclasses import replace

import torch
from headstats import Edit, StatSpec
from headstats.call import LEAVES
from headstats.triton import backward, columns, launch_backward
from headstats.triton import topk as largest
from headstats.validate.call import make_call
from headstats_aot import TYPES, compiled, resources
from triton.backends.compiler import GPUTarget

# Head size, dtype, everything on, targets.
VARIANTS = (
    (64, torch.bfloat16, False, ("sm80", "sm90", "gfx942")), (128, torch.bfloat16, False, ("sm80", "sm90", "gfx942")),
    (80, torch.float16, False, ("sm90",)), (256, torch.bfloat16, False, ("sm80", "sm90")),
    (64, torch.float32, False, ("sm90",)), (128, torch.float32, False, ("sm80",)),
    (256, torch.float32, False, ("sm90",)),
    (64, torch.bfloat16, True, ("sm90",)), (128, torch.bfloat16, True, ("sm80",)),
)  # fmt: skip
TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class Noted:
    """Stands for a kernel and keeps what it is launched with."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, []

    def __getitem__(self, grid):
        return lambda *given, **meta: self.launches.append((self.kernel, given, meta))


def call(d, dtype, full, spec, n=300):
    """Plain causal attention, or everything that is shaped inside the kernels."""
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, h, n, d, generator=g).to(dtype) for h in (2, 1))
    if not full:
        return make_call(q, k, k, spec=spec)
    ids = torch.zeros(n, dtype=torch.int64)
    prefix = torch.zeros(1, 1, 40, d, dtype=dtype)
    tables = {"q_segments": ids, "k_segments": torch.zeros(n + 40).long(), "segment_open": torch.eye(2).bool()}
    edit = Edit(temperature=torch.ones(2), bias=torch.zeros(2, 2), knockout=torch.eye(2).bool(), renormalise=False)
    return make_call(
        q, k, k, spec=replace(spec, segments=False), window=200, softcap=20.0, sinks=torch.zeros(2),
        alibi=torch.zeros(2), bias=torch.zeros(n + 40), key_padding=torch.ones(2, n + 40).bool(),
        prefix=(prefix, prefix), edit=edit, **tables,
    )  # fmt: skip


def launches(d, dtype, full):
    """(name, kernel, arguments, compile-time arguments) of all passes of a call."""
    spec = StatSpec(received=True, received_max=True, column_norm=True, fai=(10, 100), topk=8)
    places = {"columns": (columns, "columns_kernel"), "largest": (largest, "largest_kernel"),
              "dk, dv": (backward, "keys_gradient_kernel"), "dq": (backward, "queries_gradient_kernel")}  # fmt: skip
    noted = {}
    for name, (module, kernel) in places.items():
        noted[name] = Noted(getattr(module, kernel))
        setattr(module, kernel, noted[name])
    c = call(d, dtype, full, spec)
    norm = torch.zeros(2, *c.q.shape[:3])
    columns.statistics(c, norm)
    largest.topk(c, norm)
    wanted = {name for name in LEAVES if name in launch_backward.COMPUTED and getattr(c, name) is not None}
    launch_backward.backward(c, wanted, c.q, norm, c.q, norm[0])
    for name, (module, kernel) in places.items():
        setattr(module, kernel, noted[name].kernel)
    return [(name, *launch) for name, x in noted.items() for launch in x.launches[:1]]


def main():
    """Every tile shape plain; everything on in the common ones."""
    for d, dtype, full, targets in VARIANTS:
        for name, kernel, given, meta in launches(d, dtype, full):
            for target in targets:
                binary = compiled(kernel, given, meta, TARGETS[target])
                line = {"pass": name, "d": d, "dtype": TYPES[dtype], "full": full, "target": target}
                line["shared"] = binary.metadata.shared
                print(json.dumps(line | resources(binary)), flush=True)


if __name__ == "__main__":
    main()
