"""interp: activation patching, causal tracing and head ablation, on attention that reports itself.

    import interp
    model   = interp.load("smollm2")
    pairs   = interp.tasks.ioi(model, n=8)
    effects = interp.patch(model, pairs, model.sites("z"), metric=interp.logit_diff)
    stats   = model.attention_stats(pairs)
    interp.report(effects, stats).write("ioi.html")

Names are imported on first use, so that ``import interp`` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from interp.collector import collector_paused

if TYPE_CHECKING:
    from interp import circuits, corpus, doctor, metrics, spans, tasks, zoo
    from interp.ablation import ablate
    from interp.attention import AttentionStats
    from interp.effects import Effects
    from interp.engine.plan import Plan, explain
    from interp.errors import InterpError
    from interp.knockout import knock_out
    from interp.mediation import mediate
    from interp.metrics import Metric, kl, logit_diff, logprob, prob, rank
    from interp.model import Model, load
    from interp.omission import leave_out
    from interp.patching import patch
    from interp.paths import path_patch
    from interp.peeking import peek
    from interp.pictures import ImagePair
    from interp.plots.report import Report, report
    from interp.prompts import Fact, PairSet, Prompt, PromptPair
    from interp.sites import Site, Sites
    from interp.steering import mean_difference, steer
    from interp.sweep.api import Sweep
    from interp.tracing import trace, trace_table

_HOMES = {
    "ablate": "ablation", "AttentionStats": "attention", "Effects": "effects", "InterpError": "errors",
    "ImagePair": "pictures", "Metric": "metrics", "kl": "metrics", "logit_diff": "metrics", "logprob": "metrics",
    "prob": "metrics", "rank": "metrics", "Model": "model", "load": "model", "patch": "patching",
    "Report": "plots.report", "report": "plots.report", "Fact": "prompts", "PairSet": "prompts", "Prompt": "prompts",
    "PromptPair": "prompts",
    "Site": "sites", "Sites": "sites", "trace": "tracing", "knock_out": "knockout", "mediate": "mediation",
    "leave_out": "omission", "path_patch": "paths", "explain": "engine.plan", "Plan": "engine.plan",
    "mean_difference": "steering", "steer": "steering", "trace_table": "tracing", "peek": "peeking",
    "Sweep": "sweep.api",
}  # fmt: skip
_MODULES = ("circuits", "corpus", "doctor", "metrics", "spans", "tasks", "zoo")

__version__ = "0.1.0"
__all__ = [
    "AttentionStats", "Effects", "Fact", "ImagePair", "InterpError", "Metric", "Model", "PairSet", "Plan", "Prompt",
    "PromptPair", "Report", "Site", "Sites", "Sweep", "ablate", "circuits", "corpus", "doctor", "explain", "kl",
    "knock_out",
    "leave_out", "load", "logit_diff", "logprob", "mean_difference", "mediate", "metrics", "patch", "path_patch",
    "peek", "prob", "rank", "report", "spans", "steer", "tasks", "trace", "trace_table", "zoo",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        with collector_paused():
            value = getattr(import_module(f"interp.{_HOMES[name]}"), name)
    elif name in _MODULES:
        with collector_paused():
            value = import_module(f"interp.{name}")
    else:
        raise AttributeError(f"module 'interp' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(__all__) | set(globals()))
