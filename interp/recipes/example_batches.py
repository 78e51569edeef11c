"""The examples of a set that are run, and those whose base runs are held at one time."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from interp.engine import Engine
from interp.prompts.coder import Encoded

RUN_BYTES = 600 * 2**20  # activations of base runs held at one time


@dataclass(frozen=True)
class Subset:
    """How `interp.sweep` runs a part of a set of examples. The numbers of an example do not depend on it.

    ``examples``: which to run, of a set whose means, donors and noise depend on all of it (None: all).
    ``keep_nan``: return rows whose metric is NaN, where a recipe would raise InterpError.  ``means``: mean activations
    computed for earlier parts, to be used again.  ``together``: most examples whose cells run together, so that an
    interruption loses no more than these (None: as many as fit into memory).  ``lengths_differ``: whether prompts of
    the whole set differ in length, where a recipe is given a part of it (None: it is given all).
    """

    examples: range | None = None
    keep_nan: bool = False
    means: dict[Any, Any] | None = None
    together: int | None = None
    lengths_differ: bool | None = None

    def selected(self, n: int) -> range:
        """Return the numbers of the examples to run, of ``n``."""
        return range(n) if self.examples is None else self.examples


WHOLE_SET = Subset()


def batches(
    prompts: Sequence[Encoded], selected: range, runner: Engine, components: Sequence[str], runs_per_example: int,
    most: int | None = None, strings: Collection[int] = (),
) -> Iterator[range]:  # fmt: skip
    """Yield ranges of examples whose base runs fit into `RUN_BYTES` together, or into half of the engine's budget.

    ``most``: examples of a range.  ``strings``: examples that are never in one range with others.

    Cuts the engine's batches of cells to what is left of the budget. Raises InterpError, before anything is run, if not
    one cell fits next to the base runs of one example.
    """
    budget = runner.budget
    held = [runs_per_example * budget.run(p.longest, components) for p in prompts]
    # while it is recorded, a run needs a forward's rows too
    sizes = [h + runs_per_example * budget.row * p.longest for h, p in zip(held, prompts, strict=True)]
    limit = RUN_BYTES if budget.limit is None else min(RUN_BYTES, budget.limit / 2)
    for size, run_bytes, prompt in zip(sizes, held, prompts, strict=True):
        budget.check(prompt.longest, max(run_bytes, size - budget.cell(prompt.longest)))
    ranges, start, used = [], selected.start, 0.0
    for i in selected:
        is_full = used + sizes[i] > limit or i - start == most
        if i > start and (is_full or (i in strings) != (start in strings)):
            ranges.append(range(start, i))
            start, used = i, 0
        used += sizes[i]
    for numbers in [*ranges, range(start, selected.stop)]:
        runner.fit_batches_to_memory(max(prompts[i].longest for i in numbers), sum(held[i] for i in numbers))
        yield numbers
