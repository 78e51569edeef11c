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

if TYPE_CHECKING:
    from interp import metrics, tasks, zoo
    from interp.ablation import ablate
    from interp.attention import AttentionStats
    from interp.effects import Effects
    from interp.errors import InterpError
    from interp.metrics import Metric, kl, logit_diff, logprob, prob, rank
    from interp.model import Model, load
    from interp.patching import patch
    from interp.plots.report import Report, report
    from interp.prompts import Fact, PairSet, PromptPair
    from interp.sites import Site, Sites
    from interp.tracing import trace

_HOMES = {
    "ablate": "ablation", "AttentionStats": "attention", "Effects": "effects", "InterpError": "errors",
    "Metric": "metrics", "kl": "metrics", "logit_diff": "metrics", "logprob": "metrics", "prob": "metrics",
    "rank": "metrics", "Model": "model", "load": "model", "patch": "patching", "Report": "plots.report",
    "report": "plots.report", "Fact": "prompts", "PairSet": "prompts", "PromptPair": "prompts", "Site": "sites",
    "Sites": "sites", "trace": "tracing",
}  # fmt: skip
_MODULES = ("metrics", "tasks", "zoo")

__version__ = "0.1.0"
__all__ = [
    "AttentionStats", "Effects", "Fact", "InterpError", "Metric", "Model", "PairSet", "PromptPair", "Report",
    "Site", "Sites", "ablate", "kl", "load", "logit_diff", "logprob", "metrics", "patch", "prob", "rank",
    "report", "tasks", "trace", "zoo",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(f"interp.{_HOMES[name]}"), name)
    elif name in _MODULES:
        value = import_module(f"interp.{name}")
    else:
        raise AttributeError(f"module 'interp' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(__all__) | set(globals()))
