"""The prompts of a sweep, made once for each model, task and seed, and frozen in the run: what is resumed is the same.

As JSON, nothing in it is ever executed. A prompt that cannot be encoded keeps its number, and the reason stands beside.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from interp.errors import InterpError, ModelError
from interp.prompts.pairs import Fact, PairSet, PromptPair, encode_any
from interp.sweep.config import TaskSpec
from interp.sweep.config_sections import makers
from interp.utils.files import digest_of

Prompts = list[PromptPair | Fact]


@dataclass(frozen=True)
class PromptSet:
    """Prompts in order; ``failed``: number and reason of those the model cannot read; ``error``: why none is used."""

    prompts: Prompts
    failed: dict[int, str]
    error: str | None
    weights: str
    behaviour: str

    @property
    def usable(self) -> list[int]:
        """Numbers of the prompts that can be encoded."""
        return [i for i in range(len(self.prompts)) if i not in self.failed]

    def encoded(self) -> bytes:
        """As JSON."""
        kind = {PromptPair: "pair", Fact: "fact"}
        listed = [{"kind": kind[type(p)], **vars(p)} for p in self.prompts]
        failed = {str(k): v for k, v in self.failed.items()}
        found = {"prompts": listed, "failed": failed, "error": self.error}
        found |= {"weights": self.weights, "behaviour": self.behaviour}
        return json.dumps(found, indent=0, sort_keys=True).encode()

    @cached_property
    def digest(self) -> str:
        """A hash of all of it."""
        return digest_of(self.encoded())

    @classmethod
    def decoded(cls, content: bytes) -> PromptSet:
        """Reads what `encoded` wrote."""
        try:
            found = json.loads(content)
            prompts: Prompts = []
            for raw in found["prompts"]:
                if raw.pop("kind") == "fact":
                    prompts.append(Fact(**raw))
                else:
                    spans = {name: (int(a), int(b)) for name, (a, b) in raw.pop("spans").items()}
                    prompts.append(PromptPair(**raw, spans=spans))
            failed = {int(k): v for k, v in found["failed"].items()}
            return cls(prompts, failed, found["error"], found["weights"], found["behaviour"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InterpError(f"the run's frozen prompts cannot be read ({error!r}): make the run anew") from None


def file_name(model: str, task: str, seed: int) -> str:
    """Under which a set is kept in the run's ``prompts``."""
    return digest_of(json.dumps([model, task, seed]).encode())[:16] + ".json"


def make_set(model: Any, task: TaskSpec, seed: int, own: bytes | None, ask: Callable[[Prompts], str]) -> PromptSet:
    """The prompts of a task for one model. ``own``: contents of the file, of a task of one's own.

    ``ask``: says how well the model does it on prompts. What the model lacks for the task, and whether it does it at
    all, ends up in ``error``.
    """
    weights = model.fingerprint()
    try:
        if own is None:
            made: Any = makers()[str(task.task)](model, task.n, seed, **task.options)
            prompts: Prompts = list(made)
        else:
            prompts = _read(task, own)[: task.n]
    except ModelError:
        raise
    except InterpError as error:
        return PromptSet([], {}, f"{type(error).__name__}: {error}", weights, "")
    failed: dict[int, str] = {}
    for i, prompt in enumerate(prompts):
        try:
            encode_any([prompt], model.coder)
        except InterpError as error:
            failed[i] = f"{type(error).__name__}: {error}".replace("pair 0", f"example {i}").replace(
                "fact 0", f"example {i}"
            )
    good = [p for i, p in enumerate(prompts) if i not in failed]
    if not good:
        return PromptSet(prompts, failed, None, weights, "")
    try:
        return PromptSet(prompts, failed, None, weights, ask(good))
    except InterpError as error:
        return PromptSet(prompts, failed, f"{type(error).__name__}: {error}", weights, "")


def as_task(prompts: Sequence[PromptPair | Fact], task: TaskSpec, seed: int) -> Any:
    """Prompts as a recipe takes them, with the task's name in the provenance."""
    if prompts and isinstance(prompts[0], PromptPair):
        pairs = [p for p in prompts if isinstance(p, PromptPair)]
        return PairSet(pairs, task=task.task or f"{task.pairs} ({task.pairs_digest})", seed=seed)
    return prompts


def _read(task: TaskSpec, content: bytes) -> Prompts:
    from interp.prompts.files import read_prompts

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("prompts" + Path(str(task.pairs)).suffix)
        path.write_bytes(content)
        return read_prompts(path)
