"""What loading changes in a model object, and how it is put back.

TransformerLens replaces modules of a Hugging Face model by its bridges, and interp routes their attention through
headstats. `Wiring` records the state of every module and config before and after, so that both can be chosen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any

import torch

from interp.errors import ModelError
from interp.model.session import ModelLock

WIRING = "_interp_wiring"  # attribute of a wired model's root modules
LOCK = "_interp_lock"  # attribute of the modules whose calls take the model's lock


class Missing:
    """Stands for the value of a key that a dict lacks."""


@dataclass(repr=False)
class _Change:
    """One value that loading changed: ``vars(owner)[key]``, or ``vars(owner)[table][key]``; the class without key."""

    owner: Any
    table: str | None
    key: Any
    before: Any
    after: Any

    def holder(self) -> dict[Any, Any] | None:
        """The dict that holds the value; None if it is gone."""
        return vars(self.owner) if self.table is None else vars(self.owner).get(self.table)

    def apply(self, is_undo: bool) -> None:
        """Put one value in the place of the other. A value that somebody else has set since then stays."""
        old, new = (self.after, self.before) if is_undo else (self.before, self.after)
        if self.key is None:
            if type(self.owner) is old:
                object.__setattr__(self.owner, "__class__", new)
            return
        holder = self.holder()
        if holder is None or holder.get(self.key, Missing) is not old:
            return
        if new is Missing:
            del holder[self.key]
        else:
            holder[self.key] = new


@dataclass
class _State:
    """Class, attributes and tables (dicts among the attributes) of an object at one moment."""

    owner: Any
    kind: type
    attributes: dict[str, Any]
    tables: dict[str, dict[Any, Any]]

    @classmethod
    def of(cls, owner: Any) -> _State:
        """The state of an object now."""
        tables = {name: dict(value) for name, value in vars(owner).items() if isinstance(value, dict)}
        return cls(owner, type(owner), dict(vars(owner)), tables)


def _owners(roots: Iterable[Any]) -> list[Any]:
    """Every module under the roots, and the configs that they hold; a root that is no module is taken as it is."""
    owners: dict[int, Any] = {}
    for root in roots:
        for module in root.modules() if isinstance(root, torch.nn.Module) else (root,):
            owners[id(module)] = module
            todo = list(vars(module).values()) if isinstance(module, torch.nn.Module) else []
            while todo:
                value = todo.pop()
                if hasattr(value, "to_dict") and hasattr(value, "__dict__") and id(value) not in owners:
                    owners[id(value)] = value
                    todo += vars(value).values()
    return list(owners.values())


class Wiring:
    """The difference between a model object as it was and as it was made.

        wiring = Wiring([hf, tokenizer])      # before anything is changed
        …                                     # TransformerLens changes it
        wiring.finish()
        wiring.undo()

    ``base``: the wiring of an earlier stage. TransformerLens' bridges are one, `install` is the next. A stage can be
    undone while its base stays. Values that the caller has set since `finish` are left as they are. Weights keep their
    values.
    """

    def __init__(self, roots: Iterable[Any], base: Wiring | None = None, lock: ModelLock | None = None):
        self.roots = [root for root in roots if root is not None]
        self.base, self.above = base, None
        self.lock = lock or ModelLock()
        self.user: weakref.ref[Any] | None = None  # the Model, which is told when another one takes its place
        self._before: list[_State] | None = [_State.of(owner) for owner in _owners(self.roots)]
        self._changes: list[_Change] = []
        self._orders: list[tuple[Any, str, list[Any], list[Any]]] = []

    def finish(self, *callers: torch.nn.Module) -> None:
        """Record what was changed.  ``callers``: modules whose calls take the lock from now on."""
        assert self._before is not None
        for caller in callers:
            vars(caller)[LOCK] = self.lock
            caller.__class__ = _locked(type(caller))
        for root in self.roots:
            if isinstance(root, torch.nn.Module):
                vars(root)[WIRING] = self
        if self.base is not None:
            self.base.above = self
        for state in self._before:
            if type(state.owner) is not state.kind:
                self._changes.append(_Change(state.owner, None, None, state.kind, type(state.owner)))
            self._compare(state.owner, None, state.attributes)
            for name, table in state.tables.items():
                if vars(state.owner).get(name) is state.attributes[name]:
                    self._compare(state.owner, name, table)
        self._before = None

    def _compare(self, owner: Any, table: str | None, before: dict[Any, Any]) -> None:
        now = vars(owner) if table is None else vars(owner)[table]
        changed = [k for k in {**before, **now} if before.get(k, Missing) is not now.get(k, Missing)]
        self._changes += [_Change(owner, table, k, before.get(k, Missing), now.get(k, Missing)) for k in changed]
        if changed and table is not None and list(before) != list(now):
            self._orders.append((owner, table, list(before), list(now)))

    def undo(self) -> None:
        """Put the object back as it was before this stage."""
        if self._before is not None:  # the stage was not completed
            self.finish()
        self._apply(is_undo=True)
        _forget_recorders(self.roots)
        if self.base is not None:
            self.base.above = None

    def _apply(self, is_undo: bool) -> None:
        for change in self._changes:
            change.apply(is_undo)
        for owner, table, before, after in self._orders:
            holder = vars(owner)[table]
            order = [k for k in (before if is_undo else after) if k in holder]
            ordered = {k: holder[k] for k in order} | holder
            holder.clear()
            holder.update(ordered)

    def stages(self) -> list[Wiring]:
        """All stages of the object, the last one first."""
        top: Wiring = self
        while top.above is not None:
            top = top.above
        stages: list[Wiring] = [top]
        while (base := stages[-1].base) is not None:
            stages.append(base)
        return stages

    def hand_over(self, why: str) -> None:
        """Tell the Model that uses the last stage ``why`` it may no longer do so."""
        top = self.stages()[0]
        model = None if top.user is None else top.user()
        if model is not None and model.wiring is top:  # of a deep copy of the object it is another one
            model.retire(why)

    def release(self, why: str) -> None:
        """Undo all stages. The Model that uses them is told ``why`` it may no longer."""
        stages = self.stages()
        with stages[0].lock:
            self.hand_over(why)
            for stage in stages:
                stage.undo()

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Put the object back for the time of the block; nobody else may run it meanwhile."""
        stages = self.stages()
        with stages[0].lock:
            for stage in stages:
                stage._apply(is_undo=True)
            try:
                yield
            finally:
                for stage in reversed(stages):
                    stage._apply(is_undo=False)


def _forget_recorders(roots: Iterable[Any]) -> None:
    """Let transformers install its recorders of attentions and hidden states anew.

    It does so once, at the first forward that asks for them. If that happened while the model was wired, recorders are
    missing where bridges stood.
    """
    modules = [m for root in roots if isinstance(root, torch.nn.Module) for m in root.modules()]
    for module in modules:
        vars(module).pop("_output_capturing_hooks_installed", None)
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__module__", "") == "transformers.utils.output_capturing":
                del module._forward_hooks[key]


# ---------------------------------------------------------------- objects that are wired already


def wiring_of(model: Any) -> Wiring | None:
    """The wiring of a model object or bridge that `interp.load` has wired; None if there is none.

    Raises ModelError if parts of the object belong to another wired model, or to a bridge that is not given.
    """
    wiring = vars(model).get(WIRING)
    if wiring is not None:
        return wiring
    for path, module in model.named_modules():
        if WIRING in vars(module):
            raise ModelError(
                f"{type(model).__name__} shares its module {path!r} with a model that is loaded already: call "
                "release() on that one first"
            )
        if type(module).__module__.startswith("transformer_lens."):
            raise ModelError(
                f"{type(model).__name__} has a bridge of TransformerLens at {path!r}: it is, or shares modules with, "
                "a model that is wrapped already. Pass its TransformerBridge, or call release() on its Model first."
            )
    return None


# ---------------------------------------------------------------- calls that take the lock

_CALLS = ("__call__", "run_with_cache", "run_with_hooks", "generate", "hf_generate")


@cache
def _locked(kind: type) -> type:
    """A subclass whose calls, and hooks on a bridge, take the model's lock.

    It has the name of its base, which transformers and users read.
    """
    is_bridge = hasattr(kind, "run_with_hooks")
    names = [name for name in _CALLS if hasattr(kind, name)] if is_bridge else ["__call__"]
    methods: dict[str, Any] = {name: _taking_lock(getattr(kind, name)) for name in names}
    if is_bridge:
        methods["hooks"] = _holding_lock(kind.hooks)  # type: ignore[attr-defined]
    return type(kind.__name__, (kind,), {**methods, "__module__": kind.__module__, "__qualname__": kind.__qualname__})


def _taking_lock(method: Any) -> Any:
    @wraps(method)
    def locked(self: Any, *args: Any, **kwargs: Any) -> Any:
        with vars(self)[LOCK]:
            return method(self, *args, **kwargs)

    return torch.compiler.disable(locked, recursive=False)


def _holding_lock(method: Any) -> Any:
    """The lock is held as long as the hooks are set."""

    @wraps(method)
    @contextmanager
    def locked(self: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        with vars(self)[LOCK], method(self, *args, **kwargs) as value:
            yield value

    return locked
