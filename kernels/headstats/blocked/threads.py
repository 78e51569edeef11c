"""Tiles of the blocked backend in parallel.

Each thread runs whole tiles, and operators are not split between threads.

An operator takes well under a millisecond on a tile. Threads that synchronise after each operator lose much of what
they gain, and nearly all of it while another process uses a core.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

Item = TypeVar("Item")
Room = TypeVar("Room")
ResultT = TypeVar("ResultT")

MOST = 8  # most tiles at a time, since each has its own memory; beyond it, torch's threads are divided among them
CELLS = 1 << 20  # cells of attention per thread


def thread_count(cells: int) -> int:
    """Return how many threads should share a call with this many cells."""
    return max(1, min(MOST, torch.get_num_threads(), cells // CELLS))


def run_all(
    items: Sequence[Item],
    prepare: Callable[[], Room],
    do: Callable[[Room, Item], ResultT],
    put: Callable[[Item, ResultT], None],
    threads: int | None,
) -> None:
    """Call put(item, do(room, item)) for every item, on this many threads.

    threads=None: on the calling thread.

    `put` is called by one thread at a time and in the order of items, so that sums are the same in every run.
    prepare() allocates the memory that a thread keeps for itself. An error of `do` on any thread is raised here.
    """
    if threads is None or is_observed():
        room = prepare()
        for item in items:
            put(item, do(room, item))
    else:
        _Crew(items, prepare, do, put).work(min(len(items), threads))


def is_observed() -> bool:
    """Whether a mode or autocast of the calling thread must see every operator.

    Other threads do not have it.
    """
    modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)()
    functions = getattr(torch._C, "_len_torch_function_stack", lambda: 0)()
    return bool(modes or functions) or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu")


class _Crew:
    """Threads that run the items, and put the results in order."""

    def __init__(self, items: Sequence, prepare: Callable, do: Callable, put: Callable):
        self.items, self.prepare, self.do, self.put = items, prepare, do, put
        self.lock = threading.Lock()
        self.n_started = self.n_put = 0
        self.results: dict[int, object] = {}  # done, and waiting for their turn
        self.failure: BaseException | None = None

    def work(self, count: int) -> None:
        """Run all items on the calling thread and count - 1 others."""
        before = torch.get_num_threads()
        share = before // count if count > 1 else 1
        state = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        others = [threading.Thread(target=self._run, args=(share, *state), daemon=True) for _ in range(count - 1)]
        try:
            for thread in others:
                thread.start()
            self._run(share, *state)
        except BaseException as error:  # such as ctrl-C, which only the main thread receives
            self.failure = error
        finally:
            for thread in others:
                thread.join()
            torch.set_num_threads(before)
        if self.failure is not None:
            raise self.failure

    def _run(self, share: int, grad: bool, inference: bool) -> None:
        torch.set_num_threads(share)  # of this thread; `work` restores what new threads start with
        try:
            with torch.inference_mode(inference), torch.set_grad_enabled(grad):
                room = self.prepare()
                while (i := self._next()) is not None:
                    self._done(i, self.do(room, self.items[i]))
        except BaseException as error:
            self.failure = error

    def _next(self) -> int | None:
        with self.lock:
            if self.failure is not None or self.n_started == len(self.items):
                return None
            self.n_started += 1
            return self.n_started - 1

    def _done(self, i: int, result: object) -> None:
        with self.lock:
            self.results[i] = result
            while self.n_put in self.results:
                self.put(self.items[self.n_put], self.results.pop(self.n_put))
                self.n_put += 1
