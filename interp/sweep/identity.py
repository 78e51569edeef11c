"""What determines the numbers of a sweep's part, and whether a finished part agrees with the run's frozen prompts.

Weights, dtype, prompts and their token ids must be the same in all parts of one model, task and seed. They are frozen
with the prompts, and stored in each part. Parts of earlier versions hold less; what they hold is compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from interp.errors import InterpError, ModelError
from interp.jobs.job import RunFiles
from interp.jobs.parquet import PartFile
from interp.sweep.config import SweepPart, parse
from interp.sweep.prompt_sets import PromptSet, file_name, identity_of_model
from interp.sweep.table import LABELS

WORDS = {
    "weights": "other weights", "dtype": "another dtype", "tokens": "other token ids of the prompts",
    "prompts": "other prompts", "frozen": "other prompts",
}  # fmt: skip


def frozen_name(part: SweepPart) -> str:
    """Return the name of the file that holds the part's prompts in the run."""
    return f"prompts/{file_name(part.model.name, part.task.name, part.seed)}"


def groups(parts: Sequence[SweepPart]) -> dict[str, list[int]]:
    """Return the numbers of the parts that share each file of frozen prompts."""
    numbers: dict[str, list[int]] = {}
    for part in parts:
        numbers.setdefault(frozen_name(part), []).append(part.number)
    return numbers


def recorded_identity(about: dict[str, Any]) -> dict[str, str]:
    """Return what a part's metadata says about its weights, dtype, prompts and tokens.

    ``frozen``, of earlier versions: the first half of the digest of the file with the prompts.
    """
    if isinstance(about.get("identity"), dict):
        return {key: str(value) for key, value in about["identity"].items()}
    provenance = about.get("provenance")
    if not isinstance(provenance, dict):
        return {}
    names = {"weights": "weights", "dtype": "dtype", "prompts": "frozen"}
    return {name: str(provenance[key]) for key, name in names.items() if key in provenance}


def conflicts(prompts: PromptSet, about: dict[str, Any], where: str = "in the run's frozen prompts") -> list[str]:
    """Return in what a part differs from a set of prompts, in words; empty if they agree."""
    expected, recorded = {**prompts.identity, "frozen": prompts.digest[:16]}, recorded_identity(about)
    return [
        f"{WORDS.get(key, key)} ({recorded[key]}, and {expected[key]} {where})"
        for key in recorded
        if key in expected and recorded[key] != expected[key]
    ]


def trusted_set(files: RunFiles, name: str, parts: Sequence[int]) -> PromptSet | None:
    """Return the frozen prompts of some parts; None if the run has none that can be trusted.

    A file that is torn, or that no finished part agrees with, is put aside with a message.
    """
    content = files.get(name)
    if content is None:
        return None
    try:
        prompts = PromptSet.decoded(content)
    except InterpError as error:
        files.put_aside(name, str(error))
        return None
    words, n_finished = contradiction(prompts, files.recorded(parts))
    if words:
        files.put_aside(name, f"the parts that are finished were computed with {', '.join(words)}")
        return None
    if not n_finished and not files.has_checksum(name):
        files.report(f"{name} was written by an earlier interp without a checksum: its contents could not be verified")
    return prompts


def contradiction(
    prompts: PromptSet, recorded: Iterable[dict[str, Any]], where: str = "in the run's frozen prompts"
) -> tuple[list[str], int]:
    """Return in what the first of some parts differs from prompts, if none of the parts agrees with them.

    Also how many parts were looked at, which is 0 if there is none.
    """
    first: list[str] = []
    n = 0
    for n, about in enumerate(recorded, start=1):
        words = conflicts(prompts, about, where)
        if not words:
            return [], n
        first = first or words
    return first, n


class SweepPartCheck:
    """Compares a part with the run's frozen prompts, and with its place in the config."""

    def __init__(self, document: dict[str, Any], files: RunFiles):
        self.parts, self.files = parse(document).parts, files
        self.groups = groups(self.parts)
        self.sets: dict[str, PromptSet | None] = {}
        self.seen: dict[tuple[str, str], tuple[str, int]] = {}  # where the frozen prompts do not say it

    def __call__(self, part: int, file: PartFile) -> str | None:
        """Return what is wrong with a part, or None."""
        about, name = file.about, frozen_name(self.parts[part])
        if "config" not in about and (why := self._wrong_labels(part, file)):
            return why
        if name not in self.sets:
            self.sets[name] = trusted_set(self.files, name, self.groups[name])
        prompts = self.sets[name]
        if prompts is not None and (words := conflicts(prompts, about)):
            return f"it was computed with {', '.join(words)}"
        for key, value in recorded_identity(about).items():
            if prompts is None or (key not in prompts.identity and key != "frozen"):
                seen, first = self.seen.setdefault((name, key), (value, part))
                if value != seen:
                    return f"it was computed with {WORDS.get(key, key)} ({value}, and {seen} in part {first})"
        return None

    def _wrong_labels(self, part: int, file: PartFile) -> str | None:
        """Compare the labels of a part that does not say which config it was computed from.

        They are the same in every row, so the statistics of the columns show them.
        """
        expected: dict[str, Any] = dict(zip(LABELS, (*self.parts[part].combination, part), strict=True))
        metadata = file.file_metadata
        columns = {metadata.schema.column(i).name: i for i in range(len(metadata.schema))}
        if missing := [name for name in expected if name not in columns]:
            return f"it has no column {missing[0]!r}"
        for group in range(metadata.num_row_groups):
            for name, value in expected.items():
                statistics = metadata.row_group(group).column(columns[name]).statistics
                if (
                    statistics is not None
                    and statistics.has_min_max
                    and not (statistics.min == value == statistics.max)
                ):
                    return f"its column {name!r} has {statistics.max!r}, and {value!r} is expected"
        return None


def check_model(prompts: PromptSet, model: Any, what: str) -> None:
    """Raise ModelError if a model is not the one that the frozen prompts were made for.

    Weights, dtype and the prompts' token ids are compared.
    """
    frozen = prompts.identity
    words = {
        "weights": "has other weights than when this run began",
        "dtype": "is loaded in {}, and was in {} when this run began",
        "tokens": "turns the prompts into other token ids than when this run began (another tokenizer, or another BOS)",
    }
    for key, value in identity_of_model(model, prompts.prompts, prompts.usable).items():
        if frozen.get(key, value) != value:
            text = words[key].format(value, frozen[key])
            raise ModelError(f"{what} {text}: its numbers would not belong together. Make a new run")
