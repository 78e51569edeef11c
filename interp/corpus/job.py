"""Compute one part of a corpus run.

A part has the mergeable statistics of every head on one byte range of one file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from interp.corpus.checked import CheckedFile
from interp.corpus.moments import StreamedMoments, table_of
from interp.corpus.reading import TOKENS, Refused, documents
from interp.errors import InterpError, ModelError
from interp.jobs.job import PartResult, RunFiles
from interp.utils.files import digest_of
from interp.utils.out_of_memory import is_out_of_memory

BUFFER = 8192  # tokens that are collected before they are batched
WEIGHTS = "prompts/weights.json"
MOST_REASONS = 100  # of documents that were left out, kept for each part


def blocks_name(digest: str) -> str:
    """Return the name, among the run's inputs, of the checksums of a data file."""
    return f"{digest}.blocks"


def stretches(document: dict[str, Any]) -> list[tuple[dict[str, Any], int, int]]:
    """Return the run's parts: file, first byte and end."""
    size = document["bytes_per_part"]
    return [(f, at, min(at + size, f["size"])) for f in document["files"] for at in range(0, f["size"], size)]


def spec_of(statistics: dict[str, Any] | None) -> Any:
    """Return the StatSpec of the requested statistics.

    Only statistics with one number per position have a mean, and are allowed.
    """
    from interp.model.collect_statistics import one_number_each

    spec, left_out = one_number_each(replace(requested_spec(statistics), argmax=False))
    if statistics is not None and left_out:
        raise InterpError(f"--statistics: {', '.join(left_out)} has more than one number per position, and no mean")
    return spec


def requested_spec(statistics: dict[str, Any] | None) -> Any:
    """Return the StatSpec of some fields, without the default statistics; None: the default ones.

    Raises InterpError for what is no field, or no value of it.
    """
    import headstats

    try:
        return headstats.StatSpec() if statistics is None else headstats.StatSpec(**{**_off(), **statistics})
    except (TypeError, ValueError) as error:
        raise InterpError(f"--statistics: {error}") from None


def _off() -> dict[str, Any]:
    """Return the fields of a StatSpec that turn every statistic off."""
    import headstats

    return dict.fromkeys(headstats.StatSpec().requested(), False)


@dataclass
class Tally:
    """What was counted in a part, and which documents were left out and why."""

    documents: int = 0
    tokens: int = 0
    left_out: int = 0
    reasons: list[str] = field(default_factory=list)

    def leave_out(self, path: Path, unit: str, number: int, reason: str) -> None:
        """Count a document (or piece) that cannot be used."""
        self.left_out += 1
        if len(self.reasons) < MOST_REASONS:
            self.reasons.append(f"{path}, {unit} {number}: {reason}")

    def counts(self) -> dict[str, int]:
        """Return the three numbers by name."""
        return {"documents": self.documents, "tokens": self.tokens, "left_out": self.left_out}


class CorpusJob:
    """Computes byte ranges of a corpus.

    ``models``: ``{"model": object}`` to use instead of loading.
    """

    def __init__(self, document: dict[str, Any], files: RunFiles, models: dict[str, Any] | None = None):
        self.document, self.files = document, files
        self.model: Any = (models or {}).get("model")
        self.ready = False

    @cached_property
    def _stretches(self) -> list[tuple[dict[str, Any], int, int]]:
        return stretches(self.document)

    @cached_property
    def _blocks(self) -> dict[str, bytes]:
        """The checksums of each data file, by its digest."""
        blocks = {}
        for file in self.document["files"]:
            content = self.files.get(f"inputs/{blocks_name(file['digest'])}")
            if content is None or digest_of(content) != file["digest"]:
                raise ModelError(f"the run directory lacks the checksums of {file['path']}: make a new run")
            blocks[file["digest"]] = content
        return blocks

    def compute(self, part: int) -> PartResult:
        """Compute one part.

        ModelError for a model or a file that is missing or has changed since the run began, or for lack of memory. A
        document that cannot be read is left out, and has a row with the reason.
        """
        model = self._model()
        file, start, stop = self._stretches[part]
        moments: dict[str, StreamedMoments] = {}
        tally = Tally()
        with CheckedFile(Path(file["path"]), file["size"], self._blocks[file["digest"]]) as data:
            for batch in _batches(self._windows(data, start, stop, tally)):
                self._add(model, batch, moments)
        about = {"counts": tally.counts(), "provenance": model.provenance()}
        return PartResult(table_of(moments, tally.reasons), len(tally.reasons), about)

    def _model(self) -> Any:
        """Return the model, loaded once.

        ModelError if its weights are not those that the run began with.
        """
        if self.model is not None:
            from interp.model.edited import refuse_edited

            refuse_edited(self.model)
        if not self.ready:
            if self.model is None:
                from interp.model.load_model import load

                self.model = load(self.document["load"], **self.document["options"])
            weights = self.model.fingerprint().encode()
            if self.files.keep(WEIGHTS, weights) != weights:
                raise ModelError(f"{self.document['load']} has other weights than when this run began: make a new run")
            self.ready = True
        return self.model

    def _windows(self, file: CheckedFile, start: int, stop: int, tally: Tally) -> Iterator[list[int]]:
        """Yield the token ids of each document, cut to the context.

        A remainder of one token is left out.

        Every window of a text begins with the special tokens that the model's prompts begin with; token files are read
        as they are. ``tally`` is updated.
        """
        is_tokens = file.path.suffix.lower() in TOKENS
        first: list[int] = [] if is_tokens else list(self.model.special_tokens.before)
        step = self.document["context"] - len(first)
        d_vocab = int(self.model.bridge.cfg.d_vocab)
        for item in documents(file, start, stop):
            if isinstance(item, Refused):
                tally.leave_out(file.path, "line", item.number, item.reason)
                continue
            ids = item.content if isinstance(item.content, list) else self._bare(item.content)
            tally.documents += item.is_first
            for i in range(0, len(ids), step):
                window = [*first, *ids[i : i + step]]
                if is_tokens and (min(window) < 0 or max(window) >= d_vocab):
                    at, wrong = next((k, x) for k, x in enumerate(window) if not 0 <= x < d_vocab)
                    reason = f"{wrong} is not a token of this model (0 to {d_vocab - 1}); its window is left out"
                    tally.leave_out(file.path, "token", item.number + i + at, reason)
                elif len(window) > 1:
                    tally.tokens += len(window)
                    yield window

    def _bare(self, text: str) -> list[int]:
        """Return the tokens of a text without special tokens."""
        return list(self.model.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _add(self, model: Any, windows: list[list[int]], moments: dict[str, StreamedMoments]) -> None:
        """Run a buffer of windows through the model, and add their statistics."""
        import torch

        from interp.model.batching import equal_length_batches

        with torch.no_grad():
            for batch in equal_length_batches(windows):
                self._forward(model, [windows[i] for i in batch], moments)

    def _forward(self, model: Any, ids: list[list[int]], moments: dict[str, StreamedMoments]) -> None:
        """Run one batch; if memory runs out, its halves."""
        try:
            statistics = _collect(model, ids, self.document["statistics"])
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if len(ids) == 1:
                raise ModelError(
                    f"a window of {len(ids[0])} tokens does not fit into memory: use a smaller --context"
                ) from None
            statistics = None
        if statistics is None:
            self._forward(model, ids[: len(ids) // 2], moments)
            self._forward(model, ids[len(ids) // 2 :], moments)
            return
        for name, values in statistics.items():
            if name not in moments:
                moments[name] = StreamedMoments(model.n_layers, model.n_heads)
            later = values[..., 1:]  # the first token sees only itself, which says nothing about a head
            moments[name].add(later.transpose(1, 2, 0, 3).reshape(*later.shape[1:3], -1))


def _collect(model: Any, ids: list[list[int]], statistics: dict[str, Any] | None) -> dict[str, Any]:
    """Return statistics of windows of one length: arrays [window, layers, heads, position]."""
    from interp.model.collect_statistics import stack_layers

    with model.instrument.collecting(spec_of(statistics)) as collector:
        model.forward(ids)
    return stack_layers(collector, model.n_layers)


def _batches(windows: Iterator[list[int]]) -> Iterator[list[list[int]]]:
    """Yield windows in buffers, so that those of equal length can be batched together."""
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
