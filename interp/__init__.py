"""interp: activation patching, causal tracing and head ablation, with attention that reports per-head statistics.

    import interp
    model   = interp.load("smollm2")
    pairs   = interp.tasks.ioi(model, n=8)
    effects = interp.patch(model, pairs, model.sites("z"), metric=interp.logit_diff)
    stats   = model.attention_stats(pairs)
    interp.report(effects, stats).write("ioi.html")

Names are imported on first use, so that ``import interp`` is quick.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from interp.utils.lazy import lazy_exports
from interp.utils.progress import import_tqdm_quietly

if TYPE_CHECKING:
    from interp import circuits, corpus, doctor, metrics, prompts, spans, tasks, zoo
    from interp.engine.plan import Plan, explain
    from interp.errors import InterpError
    from interp.interventions import AttentionEdit, AttentionMask, Write
    from interp.metrics import Metric, kl, logit_diff, logprob, prob, rank, seq_logprob, token_kl
    from interp.model.load_model import load
    from interp.model.model import Model
    from interp.plots.report import Report, report
    from interp.prompts.embeddings import Embeddings
    from interp.prompts.images import ImagePair
    from interp.prompts.pair_set import PairSet
    from interp.prompts.pairs import Fact, Prompt, PromptPair
    from interp.recipes.ablation import ablate
    from interp.recipes.editing import edit
    from interp.recipes.knockout import knock_out
    from interp.recipes.leave_one_out import leave_out
    from interp.recipes.mediation import mediate
    from interp.recipes.patching import patch
    from interp.recipes.path_patching import path_patch
    from interp.recipes.peeking import peek
    from interp.recipes.steering import mean_difference, steer
    from interp.recipes.tracing import trace, trace_table
    from interp.results.attention_stats import AttentionStats
    from interp.results.effects import Effects
    from interp.results.span_stats import SpanStats
    from interp.sites import Site, Sites
    from interp.sweep.api import Sweep

_EXPORTS = {
    "engine.plan": ("Plan", "explain"),
    "errors": ("InterpError",),
    "interventions": ("AttentionEdit", "AttentionMask", "Write"),
    "metrics": ("Metric", "kl", "logit_diff", "logprob", "prob", "rank", "seq_logprob", "token_kl"),
    "model.load_model": ("load",),
    "model.model": ("Model",),
    "plots.report": ("Report", "report"),
    "prompts.embeddings": ("Embeddings",),
    "prompts.images": ("ImagePair",),
    "prompts.pair_set": ("PairSet",),
    "prompts.pairs": ("Fact", "Prompt", "PromptPair"),
    "recipes.ablation": ("ablate",),
    "recipes.editing": ("edit",),
    "recipes.knockout": ("knock_out",),
    "recipes.leave_one_out": ("leave_out",),
    "recipes.mediation": ("mediate",),
    "recipes.patching": ("patch",),
    "recipes.path_patching": ("path_patch",),
    "recipes.peeking": ("peek",),
    "recipes.steering": ("mean_difference", "steer"),
    "recipes.tracing": ("trace", "trace_table"),
    "results.attention_stats": ("AttentionStats",),
    "results.effects": ("Effects",),
    "results.span_stats": ("SpanStats",),
    "sites": ("Site", "Sites"),
    "sweep.api": ("Sweep",),
}
_MODULES = ("circuits", "corpus", "doctor", "metrics", "model", "prompts", "spans", "tasks", "zoo")

import_tqdm_quietly()

__version__ = "0.1.0"
__all__ = [
    "AttentionEdit", "AttentionMask", "AttentionStats", "Effects", "Embeddings", "Fact", "ImagePair", "InterpError",
    "Metric", "Model", "PairSet", "Plan", "Prompt", "PromptPair", "Report", "Site", "Sites", "SpanStats", "Sweep",
    "Write", "ablate", "circuits", "corpus", "doctor", "edit", "explain", "kl", "knock_out", "leave_out", "load",
    "logit_diff", "logprob", "mean_difference", "mediate", "metrics", "patch", "path_patch", "peek", "prob", "prompts",
    "rank", "report", "seq_logprob", "spans", "steer", "tasks", "token_kl", "trace", "trace_table", "zoo",
]  # fmt: skip

__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS, _MODULES)
