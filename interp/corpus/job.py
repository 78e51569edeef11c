"""The work of a run over a corpus: one stretch of one file in, one table of mergeable statistics out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from interp.corpus.moments import Moments, table_of
from interp.corpus.reading import TOKENS, described, documents
from interp.errors import InterpError, ModelError, PromptError
from interp.jobs.job import PartResult, RunFiles
from interp.utils.out_of_memory import is_out_of_memory

BUFFER = 8192  # tokens that wait to be batched
WEIGHTS = "prompts/weights.json"


def stretches(document: dict[str, Any]) -> list[tuple[dict[str, Any], int, int]]:
    """The run's parts: file and byte range."""
    size = document["bytes_per_part"]
    return [(f, at, min(at + size, f["size"])) for f in document["files"] for at in range(0, f["size"], size)]


def spec_of(statistics: dict[str, Any] | None) -> Any:
    """A StatSpec of what was asked for: statistics with one number for a position, which have a mean."""
    import headstats

    from interp.model.collect_statistics import one_number_each

    try:
        spec = headstats.StatSpec() if statistics is None else headstats.StatSpec(**{**_off(), **statistics})
    except (TypeError, ValueError) as error:
        raise InterpError(f"--statistics: {error}") from None
    spec, left_out = one_number_each(replace(spec, argmax=False))
    if statistics is not None and left_out:
        raise InterpError(f"--statistics: {', '.join(left_out)} has more than one number for a position, and no mean")
    return spec


def _off() -> dict[str, Any]:
    import headstats

    return dict.fromkeys(headstats.StatSpec().requested(), False)


class CorpusJob:
    """Computes stretches of a corpus."""

    def __init__(self, document: dict[str, Any], shelf: RunFiles, models: dict[str, Any] | None = None):
        self.document, self.shelf = document, shelf
        self.model: Any = (models or {}).get("model")
        self.ready = False
        self.known: dict[str, bool] = {}

    def compute(self, part: int) -> PartResult:
        """One stretch. ModelError for a model or a file that is not there or no longer the same."""
        model = self._model()
        file, start, stop = stretches(self.document)[part]
        self._same(file)
        moments: dict[str, Moments] = {}
        counts = {"documents": 0, "tokens": 0}
        try:
            for batch in _batches(self._windows(Path(file["path"]), start, stop, counts)):
                self._add(model, batch, moments)
        except ModelError:
            raise
        except InterpError as error:
            return PartResult(table_of({}, f"{error}"), 1, {"counts": counts})
        return PartResult(table_of(moments), 0, {"counts": counts, "provenance": model.provenance()})

    def _model(self) -> Any:
        if not self.ready:
            if self.model is None:
                from interp.model.model import load

                self.model = load(self.document["load"], **self.document["options"])
            weights = self.model.fingerprint().encode()
            if self.shelf.keep(WEIGHTS, weights) != weights:
                raise ModelError(f"{self.document['load']} has other weights than when this run began: make a new run")
            self.ready = True
        return self.model

    def _same(self, file: dict[str, Any]) -> None:
        if file["path"] not in self.known:
            try:
                self.known[file["path"]] = described(Path(file["path"])) == file
            except InterpError as error:
                raise ModelError(str(error)) from None
        if not self.known[file["path"]]:
            raise ModelError(f"{file['path']} is not the file that this run began with: make a new run")

    def _windows(self, path: Path, start: int, stop: int, counts: dict[str, int]) -> Iterator[list[int]]:
        """Token ids of each document, cut to the context; a rest of one token sees only itself, and is left out.

        Every window of a text begins with the special tokens that the model's prompts begin with; token files are read
        as they are.
        """
        first: list[int] = [] if path.suffix.lower() in TOKENS else self._first()
        step = self.document["context"] - len(first)
        n_known = int(self.model.bridge.cfg.d_vocab)
        for text in documents(path, start, stop):
            ids = text if isinstance(text, list) else list(self._bare(text))
            if isinstance(text, list) and (min(ids) < 0 or max(ids) >= n_known):
                alien = next(i for i in ids if not 0 <= i < n_known)
                raise PromptError(f"{path}: {alien} is no token of this model, which has {n_known:,}, from 0")
            counts["documents"] += 1
            for i in range(0, len(ids), step):
                window = [*first, *ids[i : i + step]]
                if len(window) > 1:
                    counts["tokens"] += len(window)
                    yield window

    def _bare(self, text: str) -> list[int]:
        return list(self.model.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _first(self) -> list[int]:
        """The special tokens before the first word of a prompt."""
        whole, bare = self.model.coder.encode("a"), self._bare("a")
        return whole[: len(whole) - len(bare)] if whole[len(whole) - len(bare) :] == bare else []

    def _add(self, model: Any, windows: list[list[int]], moments: dict[str, Moments]) -> None:
        """One buffer of windows through the model."""
        import torch

        from interp.model.batching import equal_length_batches

        with torch.no_grad():
            for batch in equal_length_batches(windows):
                self._forward(model, [windows[i] for i in batch], moments)

    def _forward(self, model: Any, ids: list[list[int]], moments: dict[str, Moments]) -> None:
        """One batch; out of memory, its halves."""
        try:
            found = _collected(model, ids, self.document["statistics"])
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if len(ids) == 1:
                raise InterpError(
                    f"a window of {len(ids[0])} tokens does not fit into memory: --context less"
                ) from None
            found = None
        if found is None:
            self._forward(model, ids[: len(ids) // 2], moments)
            self._forward(model, ids[len(ids) // 2 :], moments)
            return
        for name, values in found.items():
            if name not in moments:
                moments[name] = Moments(model.n_layers, model.n_heads)
            seen = values[..., 1:]  # the first token sees only itself, which says nothing of a head
            moments[name].add(seen.transpose(1, 2, 0, 3).reshape(*seen.shape[1:3], -1))


def _collected(model: Any, ids: list[list[int]], statistics: dict[str, Any] | None) -> dict[str, Any]:
    """Statistics of windows of one length: arrays [window, layers, heads, position]."""
    from interp.model.collect_statistics import stack_layers

    with model.instrument.collecting(spec_of(statistics)) as collected:
        model.forward(ids)
    return stack_layers(collected, model.n_layers)


def _batches(windows: Iterator[list[int]]) -> Iterator[list[list[int]]]:
    """Windows by the buffer, so that those of equal length can go together."""
    waiting: list[list[int]] = []
    tokens = 0
    for window in windows:
        waiting.append(window)
        tokens += len(window)
        if tokens >= BUFFER:
            yield waiting
            waiting, tokens = [], 0
    if waiting:
        yield waiting
