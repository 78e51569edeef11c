"""The one exception users meet: a clear message, raised before long work begins."""

from __future__ import annotations


class InterpError(ValueError):
    """Bad input, explained: what was wrong and what to do. The CLI prints it and exits with code 2."""


class SiteError(InterpError):
    """A site that the model does not have (unknown component, layer or head out of range)."""


class PromptError(InterpError):
    """A prompt pair that cannot be compared (lengths differ, answer is not one token, …)."""


class TaskError(InterpError):
    """The model does not do the task, or a task cannot be built for its tokenizer."""


class ModelError(InterpError):
    """A model that cannot be loaded or whose attention cannot be routed through headstats."""
