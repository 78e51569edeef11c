"""Compiles what Triton launches for calls with an edit, for GPUs that need not be present; a JSON line for each kernel.

Run as a script, in a process without TRITON_INTERPRET: the interpreter replaces @triton.jit altogether. Kernels are
swapped for something that notes what a launch would pass, so that exactly that is compiled: the passes that an edit
takes before the main one too.
"""

import json
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from unittest import mock

import torch
from headstats import StatSpec
from headstats.triton import backend as launch
from headstats.triton import columns, forward
from headstats.triton import probe_kernel as known_cells
from headstats.triton import topk as largest
from headstats_aot import TARGETS, call_of, compiled, resources
from headstats_aot_passes import Noted
from headstats_cases import COUNTERFACTUALS, REDISTRIBUTION

KERNELS = {"forward": (forward, "attend_kernel"), "cells": (known_cells, "weigh_cells_kernel"),
           "columns": (columns, "columns_kernel"), "largest": (largest, "largest_kernel")}  # fmt: skip
# Together these turn every switch of `arguments.Cells` that belongs to an edit.
EDITS = {
    "logits": {"edits": ("logit_factor", "logit_raise", "temperature", "bias")},
    "gain": {"edits": ("gain", "knockout", "leave")},
    "redistribution": {"edits": REDISTRIBUTION},
    "pattern": {"edits": ("pattern_from", "pattern_heads")},
    "rows": {"edits": ("knockout", "gate", "replacement", "rows"), "table": ("segment_mask", "segment_open")},
    **{kind: {"edits": (kind, "counterfactual_heads")} for kind in COUNTERFACTUALS},
}
WITH_PASSES = ("logits", "rows", "identity", "reversed", "random")  # all that the other passes may have to do
USUAL = replace(StatSpec(sink=0), segments=False)  # the forward kernel's part of StatSpec()
PASSES = replace(USUAL, sink=4, received=True, received_max=True, column_norm=True, fai=(10, 100), topk=100)


def launches(call, target):
    """(kernel's name, kernel, arguments, compile-time arguments) of a call, in order; none if it is refused."""
    noted = {name: Noted(getattr(module, kernel)) for name, (module, kernel) in KERNELS.items()}
    with ExitStack() as patched:
        patched.enter_context(mock.patch.object(launch, "_interpreted", lambda: True))  # as if a GPU were there
        if launch.unsupported(call) is not None:
            return []
        amd = TARGETS[target].backend == "hip"
        patched.enter_context(mock.patch.object(launch, "prepare", partial(launch.prepare, amd=amd)))
        for name, (module, kernel) in KERNELS.items():
            patched.enter_context(mock.patch.object(module, kernel, noted[name]))
        patched.enter_context(mock.patch.object(launch.lowering, "_level", lambda norm: norm[0]))  # nothing has run
        launch.forward(call)
    return [(name, *one) for name, x in noted.items() for one in x.launches]


def variants():
    """(edit, target, call): the forward pass of every edit on every target; of some the other passes too."""
    for name, options in EDITS.items():
        for target in TARGETS:
            spec = PASSES if target == "sm_90" and name in WITH_PASSES else USUAL
            yield name, target, call_of(spec, 64, torch.bfloat16, **options)


def main() -> None:
    """Each kernel once: passes of one call that differ in their numbers alone are one."""
    for edit, target, call in variants():
        seen = set()
        for name, kernel, given, meta in launches(call, target):
            binary = compiled(kernel, given, meta, TARGETS[target])
            if binary.hash in seen:
                continue
            seen.add(binary.hash)
            line = {"edit": edit, "pass": name, "target": target, "shared": binary.metadata.shared}
            print(json.dumps(line | resources(binary)), flush=True)


if __name__ == "__main__":
    main()
