"""Take over the finished parts of other copies of a run."""

from __future__ import annotations

from interp.errors import InterpError
from interp.jobs.store import Receipt, Store, differences
from interp.utils.files import publish_file, write_file


def merge(store: Store, others: list[Store]) -> dict[str, int]:
    """Copy parts that other run directories of the same config have.

    Parts that this one has already are skipped; every copied part is checked.

    Returns how many parts were copied (``taken``), existed already (``there``), and are still ``missing``.
    """
    for other in others:
        if other.header["digest"] != store.header["digest"]:
            changed = "\n".join(differences(store.document, other.document))
            raise InterpError(f"{other.root} is a run of another config than {store.root}; they differ in\n{changed}")
    counts = {"taken": 0, "there": 0}
    for other in others:
        receipts: dict[int, Receipt] = other.inventory().present
        for part in sorted(receipts):
            if store.has(part):
                counts["there"] += 1
                continue
            content = other.content(part)
            for prompts in (other.root / "prompts").glob("*.json"):
                publish_file(store.root / "prompts" / prompts.name, prompts.read_bytes())
            for receipt in (other.root / "receipts").glob(f"{part:06d}-*.json"):
                write_file(store.root / "receipts" / receipt.name, receipt.read_bytes())
            counts["taken" if publish_file(store.path(part), content) else "there"] += 1
    counts["missing"] = store.n_parts - len(store.inventory().present)
    return counts
