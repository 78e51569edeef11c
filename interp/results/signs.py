"""The sign that scores and effects share: positive where a component or an edge helps the metric."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def helpful_direction(provenance: Mapping[str, Any]) -> int:
    """Return 1 if scores of this provenance are positive where an edge helps the metric, −1 if negative.

    Scores of ``mode="noise"`` measure what corrupting an edge does to the metric; ``metric_direction`` is −1 for a
    metric of which less is better.
    """
    if "mode" not in provenance:
        return 1
    return int(provenance.get("metric_direction", 1)) * (-1 if provenance["mode"] == "noise" else 1)
