"""The exceptions that users see: a clear message, raised before long work begins."""

from __future__ import annotations

from typing import Any


class InterpError(ValueError):
    """Bad input: what was wrong and what to do about it. The CLI prints the message and exits with code 2."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a sweep of which some examples are finished: ``effects`` holds their rows."""

    def __init__(self, effects: Any):
        super().__init__(f"interrupted; finished: {effects!r}. They are in the exception's .effects")
        self.effects = effects


class SiteError(InterpError):
    """A site that the model lacks: an unknown component, or a layer or head out of range."""


class PromptError(InterpError):
    """Prompts that cannot be run or compared: lengths differ, the answer is not one token, …"""


class TaskError(InterpError):
    """A task that the model does not do, or that cannot be built for its tokenizer."""


class ModelError(InterpError):
    """A model that cannot be loaded, or whose attention cannot be routed through headstats."""
