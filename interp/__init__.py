"""interp: activation patching, causal tracing and head ablation, on attention that reports itself."""

from __future__ import annotations
