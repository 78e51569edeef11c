"""Make what the engine knows about a model independent of earlier work."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from interp.engine.core import Engine, EngineKind
from interp.engine.verified import Verified
from interp.errors import InterpError
from interp.model.model import Model
from interp.prompts.pairs import encode_any


def warm_up(
    model: Model,
    prompts: Sequence[Any],
    engine: EngineKind = "auto",
    memory: int | str | None = None,
    anew: bool = False,
) -> None:
    """Record the longest prompt, so that results do not depend on earlier work.

    Which matrix products compute a base run depends on what was recorded before, and with it the last bits of the
    result. This is no longer so once the longest prompt has been recorded. That packed cells agree with full forwards
    follows from the model's structure and is checked once. ``anew``: forget earlier checks, so that they are made
    again; NaN in one example can look like a failed check. ``prompts``: in any form that recipes take.
    """
    if anew or Verified.of(model).plain_blocks_differ:
        Verified.forget(model)
    Verified.of(model).plain_base_runs = None
    if prompts:
        encoded, _ = encode_any(prompts, model.coder, "declared", strings=True)
        with contextlib.suppress(InterpError):  # recipes report models that no engine can run
            Engine(model, engine, memory).record([max((ids for e in encoded for ids in (e.clean, e.corrupt)), key=len)])
