"""Check that the parts of a run belong together: everything that determines a number is compared.

Each part is compared with its receipt, its number and the run's config (`Store.read`), and by its kind of run with the
frozen files: a sweep compares weights, dtype, prompts and their tokens. What may change a number's last digits only, or
cannot be judged (the versions of interp and of libraries, the device, the backend), is told, not refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from interp.errors import InterpError
from interp.jobs.kinds import part_check
from interp.jobs.parquet import PartFile
from interp.jobs.store import Store, refuse_damaged
from interp.jobs.work import StoreFiles

TOLD = ("device", "backend", "code", "interp", "torch", "transformers", "transformer-lens", "triton")


class Audit:
    """Reads parts of a run, each checked, and notes what differs between them.

        audit = Audit(store)
        damaged = dict(audit.failures(store.inventory().present))
        audit.notes()       # "parts were computed with different torch: 2.12.0 (part 0), 2.13.0 (part 7). …"

    ``only_reads``: leave frozen files that cannot be trusted where they are; ``bad_files`` has them, and why.
    """

    def __init__(self, store: Store, only_reads: bool = True):
        self.store, self.files = store, StoreFiles(store, only_reads)
        self._check = part_check(store.kind, store.document, self.files)
        self.first: dict[str, dict[str, int]] = {}  # of each circumstance: its values, and a part of each
        self.without_config: list[int] = []

    @property
    def bad_files(self) -> dict[str, str]:
        """Frozen files that cannot be trusted, and why."""
        return self.files.bad

    def read(self, part: int) -> PartFile:
        """Return a part. InterpError, naming it, if it does not belong to the run."""
        file = self.store.read(part)
        if why := self.compare(part, file):
            raise InterpError(f"{file.path} does not belong to this run: {why}. Resume the run to compute it anew")
        return file

    @property
    def is_checked_by_kind(self) -> bool:
        """Whether this kind of run compares what its parts were made of."""
        return self._check is not None

    def compare(self, part: int, file: PartFile) -> str | None:
        """Return why a part, of this run or of a copy of it, does not belong to the run; None if it does."""
        if self._check is not None and (why := self._check(part, file)):
            return why
        self._note(part, file.about)
        return None

    def failures(self, parts: Iterable[int]) -> Iterator[tuple[int, str]]:
        """Yield the parts that do not belong to the run, and why."""
        for part in parts:
            try:
                self.read(part)
            except (InterpError, OSError) as error:
                yield part, str(error)

    def all(self) -> Iterator[tuple[int, PartFile]]:
        """Yield every finished part in order. InterpError for one that is damaged or does not belong to the run."""
        inventory = self.store.inventory()
        refuse_damaged(self.store, inventory)
        for part in sorted(inventory.present):
            yield part, self.read(part)

    def _note(self, part: int, about: dict[str, Any]) -> None:
        """Note the circumstances in which a part was computed."""
        if "config" not in about:
            self.without_config.append(part)
        for key, value in circumstances(about).items():
            self.first.setdefault(key, {}).setdefault(value, part)

    def notes(self) -> list[str]:
        """Return, in words, what differs between the parts that were read, and what could not be compared."""
        lines = []
        for key, values in self.first.items():
            if len(values) > 1:
                shown = ", ".join(f"{value} (part {part})" for value, part in values.items())
                lines.append(
                    f"parts were computed with different {key}: {shown}. Numbers may differ in their last digits, and "
                    "by more if a release changed what is computed"
                )
        if self.without_config:
            n, first = len(self.without_config), self.without_config[0]
            lines.append(
                f"{n:,} part(s) of an earlier interp (the first is {first}) do not say which config they were computed "
                "from: their number, labels, prompts and weights were compared instead"
            )
        return lines


def circumstances(about: dict[str, Any]) -> dict[str, str]:
    """Return what a part says about device, backend and versions; empty for a part without any measurement."""
    made_with = about.get("made_with")
    if not isinstance(made_with, dict):
        provenance = about.get("provenance")
        if not isinstance(provenance, dict) or "versions" not in provenance:
            return {}
        versions = provenance["versions"] if isinstance(provenance["versions"], dict) else {}
        device = str(provenance.get("device", "")).partition(":")[0]
        made_with = {"device": device, "backend": provenance.get("backend"), "code": "an earlier interp", **versions}
    return {key: str(made_with[key]) for key in TOLD if made_with.get(key) is not None}
