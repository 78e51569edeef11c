"""The prompts of a sweep, made once and frozen in the run.

There is one set for each model, task and seed.

A resumed run therefore uses the same prompts. They are stored as JSON; nothing in it is ever executed. A prompt that
cannot be encoded keeps its number, and the reason is stored with it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from interp.errors import InterpError, ModelError
from interp.prompts.pair_set import PairSet
from interp.prompts.pairs import Fact, PromptPair, encode_any
from interp.sweep.config import TaskSpec
from interp.sweep.config_sections import makers
from interp.utils.files import digest_of

Prompts = list[PromptPair | Fact]


@dataclass(frozen=True)
class PromptSet:
    """Prompts in order.

    ``failed``: the numbers of prompts that the model cannot encode, with the reason. ``error``: why no prompt is used.
    ``weights``: fingerprint of the model. ``behaviour``: how well the model does the task, in words. ``dtype`` of the
    model and ``tokens``, a hash of the prompts' token ids, are empty in sets that an earlier version froze.
    """

    prompts: Prompts
    failed: dict[int, str]
    error: str | None
    weights: str
    behaviour: str
    dtype: str = ""
    tokens: str = ""

    @property
    def usable(self) -> list[int]:
        """Numbers of the prompts that can be encoded."""
        return [i for i in range(len(self.prompts)) if i not in self.failed]

    def encoded(self) -> bytes:
        """Return the set as JSON."""
        kind = {PromptPair: "pair", Fact: "fact"}
        prompts = [{"kind": kind[type(p)], **_fields(p)} for p in self.prompts]
        failed = {str(k): v for k, v in self.failed.items()}
        fields = {"prompts": prompts, "failed": failed, "error": self.error}
        fields |= {"weights": self.weights, "behaviour": self.behaviour}
        fields |= {key: value for key, value in (("dtype", self.dtype), ("tokens", self.tokens)) if value}
        return json.dumps(fields, indent=0, sort_keys=True).encode()

    @cached_property
    def digest(self) -> str:
        """Hash of the whole set."""
        return digest_of(self.encoded())

    @cached_property
    def identity(self) -> dict[str, str]:
        """What determines the numbers of the parts that use the set: the model, the prompts and their tokens.

        How well the model does the task is not part of it: the last digits of that depend on the device.
        """
        fields = json.loads(self.encoded())
        texts = json.dumps([fields["prompts"], fields["failed"], fields["error"]], sort_keys=True)
        known = {"weights": self.weights, "dtype": self.dtype, "tokens": self.tokens}
        return {"prompts": digest_of(texts.encode()), **{key: value for key, value in known.items() if value}}

    @classmethod
    def decoded(cls, content: bytes) -> PromptSet:
        """Read what `encoded` returned."""
        try:
            fields = json.loads(content)
            prompts: Prompts = []
            for raw in fields["prompts"]:
                if raw.pop("kind") == "fact":
                    prompts.append(Fact(**raw))
                else:
                    spans, others = _as_spans(raw.pop("spans")), _as_spans(raw.pop("corrupt_spans", {}))
                    prompts.append(PromptPair(**raw, spans=spans, corrupt_spans=others))
            failed = {int(k): v for k, v in fields["failed"].items()}
            more = fields.get("dtype", ""), fields.get("tokens", "")
            return cls(prompts, failed, fields["error"], fields["weights"], fields["behaviour"], *more)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InterpError(f"the run's frozen prompts cannot be read ({error!r:.200})") from None


def _fields(prompt: PromptPair | Fact) -> dict[str, Any]:
    """Return what a prompt holds; spans of the corrupt prompt only where there are any, as in sets made before them."""
    return {name: value for name, value in vars(prompt).items() if name != "corrupt_spans" or value}


def _as_spans(spans: dict[str, Any]) -> dict[str, tuple[int, int]]:
    return {name: (int(a), int(b)) for name, (a, b) in spans.items()}


def file_name(model: str, task: str, seed: int) -> str:
    """Return the file name of a set in the run's ``prompts`` folder."""
    return digest_of(json.dumps([model, task, seed]).encode())[:16] + ".json"


def make_set(model: Any, task: TaskSpec, seed: int, own: bytes | None, ask: Callable[[Prompts], str]) -> PromptSet:
    """Make the prompts of a task for one model.

    ``own``: contents of the file, for a task with custom prompts. ``ask``: reports how well the model does the task on
    prompts; it raises TaskError if the model does not do it. Whatever prevents the task for this model is recorded in
    ``error``.
    """
    made = partial(_set_of, model)
    try:
        if own is None:
            task_prompts: Any = makers()[str(task.task)](model, task.n, seed, **task.options)
            prompts: Prompts = list(task_prompts)
        else:
            prompts = _read(task, own)[: task.n]
    except ModelError:
        raise
    except InterpError as error:
        return made([], {}, f"{type(error).__name__}: {error}", "")
    failed: dict[int, str] = {}
    for i, prompt in enumerate(prompts):
        try:
            encode_any([prompt], model.coder, "declared", strings=True)
        except InterpError as error:
            failed[i] = f"{type(error).__name__}: {error}".replace("pair 0", f"example {i}").replace(
                "fact 0", f"example {i}"
            )
    usable = [p for i, p in enumerate(prompts) if i not in failed]
    if not usable:
        return made(prompts, failed, None, "")
    try:
        return made(prompts, failed, None, ask(usable))
    except InterpError as error:
        return made(prompts, failed, f"{type(error).__name__}: {error}", "")


def _set_of(model: Any, prompts: Prompts, failed: dict[int, str], error: str | None, behaviour: str) -> PromptSet:
    """Return a set with what determines its numbers under a model."""
    usable = [i for i in range(len(prompts)) if i not in failed]
    return PromptSet(prompts, failed, error, behaviour=behaviour, **identity_of_model(model, prompts, usable))


def identity_of_model(model: Any, prompts: Prompts, usable: Sequence[int]) -> dict[str, str]:
    """Return weights, dtype and a hash of the prompts' token ids, with BOS, as this model's tokenizer gives them.

    A prompt that cannot be encoded now counts by its reason.
    """
    coder, ids = model.coder, []
    for i in usable:
        try:
            ids.append(encode_any([prompts[i]], coder, "declared", strings=True)[0][0].ids)
        except InterpError as error:
            ids.append([str(error)])
    tokens = digest_of(json.dumps(ids, default=str).encode()) if ids else ""
    dtype = str(model.dtype).removeprefix("torch.")
    return {"weights": model.fingerprint(), "dtype": dtype, "tokens": tokens}


def as_task(prompts: Sequence[PromptPair | Fact], task: TaskSpec, seed: int) -> Any:
    """Return prompts as a recipe takes them, with the task's name and seed for the provenance."""
    if prompts and isinstance(prompts[0], PromptPair):
        pairs = [p for p in prompts if isinstance(p, PromptPair)]
        return PairSet(pairs, task=task.task or f"{task.pairs} ({task.pairs_digest})", seed=seed)
    return prompts


def _read(task: TaskSpec, content: bytes) -> Prompts:
    """Read the contents of a file of custom prompts."""
    from interp.prompts.files import read_prompts

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("prompts" + Path(str(task.pairs)).suffix)
        path.write_bytes(content)
        return read_prompts(path)
