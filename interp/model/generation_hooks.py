"""Tell which forwards belong to one run of ``generate``: without a cache each of them repeats the prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from typing import Any

Watch = Callable[[], AbstractContextManager[Any]]
METHODS = ("generate", "generate_stream")


@contextmanager
def watched(modules: list[Any], watch: Callable[[], Watch]) -> Iterator[None]:
    """Run the generation of modules inside a context while the block lasts.

    ``watch()`` is called once for each call of a method of `METHODS`. It returns a function that makes the context of a
    stretch of that generation: all of ``generate``, or the time between two tokens of ``generate_stream``.
    """
    before = []
    for module in modules:
        for name in METHODS:
            method = getattr(module, name, None)
            if method is not None:
                before.append((module, name, vars(module).get(name)))
                wrap = _watched_stream if name == "generate_stream" else _watched_call
                vars(module)[name] = wrap(method, watch)
    try:
        yield
    finally:
        for module, name, own in reversed(before):
            if own is None:
                del vars(module)[name]
            else:
                vars(module)[name] = own


def _watched_call(method: Any, watch: Callable[[], Watch]) -> Any:
    @wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        with watch()():
            return method(*args, **kwargs)

    return call


def _watched_stream(method: Any, watch: Callable[[], Watch]) -> Any:
    @wraps(method)
    def stream(*args: Any, **kwargs: Any) -> Iterator[Any]:
        stretch, tokens = watch(), iter(method(*args, **kwargs))
        while True:
            with stretch():
                try:
                    token = next(tokens)
                except StopIteration:
                    return
            yield token

    return stream
