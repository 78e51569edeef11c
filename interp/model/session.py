"""One door to a model: what must hold while a public function runs it.

`in_session` marks every public function and method that runs a model. Inside, one thread at a time uses the model, no
module drops activations at random, and numbers do not depend on settings of PyTorch that surround the call.
"""

from __future__ import annotations

import inspect
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, TypeVar, cast

import torch

from interp.errors import ModelError

log = logging.getLogger("interp")

Function = TypeVar("Function", bound=Callable[..., Any])
IN_SESSION = "_interp_in_session"  # attribute of the functions that `in_session` marks
# parts of the names of attributes and config fields that make a forward random, and of those that belong to other heads
_RANDOM, _OTHER_HEADS = ("drop", "jitter"), ("classifier", "summary")
_LOCKS: weakref.WeakSet[ModelLock] = weakref.WeakSet()
_WARNED: set[str] = set()  # names of models of which it was said that autocast is off


class ModelLock:
    """A re-entrant lock: one thread at a time runs a model or holds hooks on it.

    A copy of it is a new, free lock. A forked process starts with free locks, since the thread that held one is not in
    it.
    """

    def __init__(self) -> None:
        self._lock: Any = threading.RLock()
        self.entries: list[ExitStack | None] = []  # one for each `Session` entered
        _LOCKS.add(self)

    def try_to_enter(self) -> bool:
        """Take the lock if nobody else holds it; returns whether it was taken."""
        return self._lock.acquire(blocking=False)

    def __enter__(self) -> ModelLock:
        self._lock.acquire()
        return self

    def __exit__(self, *_exc: Any) -> None:
        self._lock.release()

    def free(self) -> None:
        """Become free, unless this thread holds the lock."""
        if not self._lock._is_owned():
            self._lock, self.entries = threading.RLock(), []

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelLock:
        return ModelLock()

    def __reduce__(self) -> tuple[type[ModelLock], tuple[()]]:
        return ModelLock, ()


def _free_all() -> None:
    for lock in list(_LOCKS):
        lock.free()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_free_all)


class Session:
    """The door to one model. ``with session:`` is what `in_session` enters; it nests.

    ``root`` returns the model's torch module, and raises ModelError once the model is released.
    """

    def __init__(self, name: str, lock: ModelLock, root: Callable[[], torch.nn.Module]):
        self.name, self.lock, self.root = name, lock, root

    def __enter__(self) -> Session:
        self.lock.__enter__()
        try:
            settings = None
            if not self.lock.entries:
                refuse_random_modules(self.name, self.root())
                settings = ExitStack()
                settings.enter_context(plain_settings(self.name))
            self.lock.entries.append(settings)
        except BaseException:
            self.lock.__exit__()
            raise
        return self

    def __exit__(self, *exc: Any) -> None:
        try:
            settings = self.lock.entries.pop()
            if settings is not None:
                settings.__exit__(*exc)
        finally:
            self.lock.__exit__()


def in_session(function: Function) -> Function:
    """Run a function of a model inside that model's `Session`.

        @in_session
        def patch(model, pairs, …): …

    The model is the function's ``model`` argument; of a method without one, the object itself or its ``model``. The
    function must not be a generator. Raises ModelError if the model has random modules (see
    `refuse_random_modules`).
    """
    if inspect.isgeneratorfunction(function):
        raise TypeError(f"{function.__qualname__} is a generator: it would leave the session before its first value")
    names = list(inspect.signature(function).parameters)
    position = names.index("model") if "model" in names else 0

    @wraps(function)
    def inside(*args: Any, **kwargs: Any) -> Any:
        holder: Any = args[position] if position < len(args) else kwargs.get("model")
        session = getattr(holder, "session", None)
        if not isinstance(session, Session):
            session = getattr(getattr(holder, "model", None), "session", None)
        if not isinstance(session, Session):  # no model: the function itself says what it expects
            return function(*args, **kwargs)
        with session:
            return function(*args, **kwargs)

    setattr(inside, IN_SESSION, True)
    return cast(Function, inside)


# ---------------------------------------------------------------- modules that are random


def refuse_random_modules(name: str, root: torch.nn.Module) -> None:
    """Raise ModelError if a module in training mode makes forwards random or changes itself.

    That is dropout of every kind, with p > 0, as a module or as a number that the module's forward reads; noise of a
    router; and batch normalisation, which updates its averages.
    """
    modules, visited = [root], set()
    while modules:  # like root.modules(), but several times faster: every call of a model does this
        module = modules.pop()
        if module is None or id(module) in visited:
            continue
        visited.add(id(module))
        attributes = module.__dict__
        modules += attributes["_modules"].values()
        if attributes["training"] and (cause := _why_random(module)):
            path = next((path for path, other in root.named_modules() if other is module), "")
            raise ModelError(
                f"{name}: {path.replace('._original_component', '') or 'the model itself'} is in training mode and "
                f"has {cause}, so two equal calls would give different numbers: call model.bridge.eval(), or .eval() "
                "on the model object that you loaded"
            )


def _why_random(module: torch.nn.Module) -> str | None:
    """What makes a module in training mode random, in words; None if nothing does."""
    if isinstance(module, torch.nn.modules.dropout._DropoutNd):
        return f"dropout (p = {module.p:g})" if module.p > 0 else None
    if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
        return "batch normalisation"
    attributes = module.__dict__
    fields = [*attributes.items(), *vars(attributes.get("config", None) or _NO_CONFIG).items()]
    for name, value in fields:
        is_random = any(part in name for part in _RANDOM) and not name.startswith(_OTHER_HEADS)
        if is_random and isinstance(value, float) and value > 0:
            return f"{name} = {value:g}"
    return None


class _NoConfig:
    pass


_NO_CONFIG = _NoConfig()


# ---------------------------------------------------------------- settings of PyTorch


@contextmanager
def plain_settings(name: str) -> Iterator[None]:
    """Undo, inside the block, settings of PyTorch that would change numbers or their dtype.

    `torch.autocast` is off, with a warning. `torch.inference_mode` is off, since tensors made in it have no gradients;
    gradients stay off where nothing asks for them. Anomaly detection is off. The default dtype is float32, the default
    device the CPU.
    """
    with ExitStack() as stack:
        for kind in _autocast_kinds():
            if name not in _WARNED:
                _WARNED.add(name)
                log.warning(
                    "%s: torch.autocast is off inside interp: numbers are computed in the dtype of the weights, which "
                    "provenance names; load the model with dtype=… for another one (shown once)", name,
                )  # fmt: skip
            stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.set_grad_enabled(False))  # leaving inference mode turns them on
        if torch.is_anomaly_enabled():  # its checks do not work on batched gradients
            stack.enter_context(torch.autograd.set_detect_anomaly(False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if torch.get_default_dtype() != torch.float32 or _DEFAULT_DTYPE.users:
            stack.enter_context(_DEFAULT_DTYPE)
        yield


def _autocast_kinds() -> list[str]:
    """Device types for which autocast is on in this thread."""
    kinds = {"cpu", torch._C._get_accelerator().type}
    return [kind for kind in sorted(kinds) if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)]


class _DefaultDtype:
    """Makes float32 the default dtype while anybody is inside.

    The default dtype belongs to the process, not to a thread: the first to enter changes it, the last to leave
    restores it.
    """

    def __init__(self) -> None:
        self.users, self._lock, self._before = 0, threading.Lock(), torch.float32

    def __enter__(self) -> None:
        with self._lock:
            if self.users == 0:
                self._before = torch.get_default_dtype()
                torch.set_default_dtype(torch.float32)
            self.users += 1

    def __exit__(self, *_exc: Any) -> None:
        with self._lock:
            self.users -= 1
            if self.users == 0:
                torch.set_default_dtype(self._before)


_DEFAULT_DTYPE = _DefaultDtype()
