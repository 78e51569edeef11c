"""Tiles of the blocked backend side by side: one thread runs a whole tile, in place of every operator cut in pieces.

An operator takes well under a millisecond on a tile. Threads that meet at the end of each lose much of what they
gain, and nearly all of it while another process holds a core.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

Item = TypeVar("Item")
Room = TypeVar("Room")
Found = TypeVar("Found")

MOST = 8  # tiles at a time, since each has its own memory; beyond it every thread has some threads of torch
CELLS = 1 << 20  # of attention that are worth a thread


def worth(cells: int) -> int:
    """How many threads should share a call with so many cells."""
    return max(1, min(MOST, torch.get_num_threads(), cells // CELLS))


def each(
    items: Sequence[Item],
    prepare: Callable[[], Room],
    do: Callable[[Room, Item], Found],
    put: Callable[[Item, Found], None],
    threads: int | None,
) -> None:
    """put(item, do(room, item)) for every item, on so many threads; None: on this one, as it is.

    `put` is called by one thread at a time and in the order of items, so that sums come out the same in every run.
    prepare() makes the room that a thread keeps for itself. What `do` raises on any thread is raised here.
    """
    if threads is None or watched():
        room = prepare()
        for item in items:
            put(item, do(room, item))
    else:
        _Crew(items, prepare, do, put).work(min(len(items), threads))


def watched() -> bool:
    """Whether the calling thread carries what must see every operator, and other threads lack: a mode, autocast."""
    modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)()
    functions = getattr(torch._C, "_len_torch_function_stack", lambda: 0)()
    return bool(modes or functions) or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu")


class _Crew:
    def __init__(self, items: Sequence, prepare: Callable, do: Callable, put: Callable):
        self.items, self.prepare, self.do, self.put = items, prepare, do, put
        self.lock = threading.Lock()
        self.taken = self.turn = 0  # items begun, and items put
        self.found: dict[int, object] = {}  # done, and waiting for their turn
        self.failure: BaseException | None = None

    def work(self, count: int) -> None:
        """Runs all items on the calling thread and count - 1 others; alone, it needs no help with each operator."""
        before = torch.get_num_threads()
        share = before // count if count > 1 else 1
        state = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        others = [threading.Thread(target=self._run, args=(share, *state), daemon=True) for _ in range(count - 1)]
        try:
            for thread in others:
                thread.start()
            self._run(share, *state)
        except BaseException as error:  # such as ctrl-C, which only the main thread meets
            self.failure = error
        finally:
            for thread in others:
                thread.join()
            torch.set_num_threads(before)
        if self.failure is not None:
            raise self.failure

    def _run(self, share: int, grad: bool, inference: bool) -> None:
        torch.set_num_threads(share)  # of this thread; what new threads start with is put right by `work`
        try:
            with torch.inference_mode(inference), torch.set_grad_enabled(grad):
                room = self.prepare()
                while (i := self._next()) is not None:
                    self._done(i, self.do(room, self.items[i]))
        except BaseException as error:
            self.failure = error

    def _next(self) -> int | None:
        with self.lock:
            if self.failure is not None or self.taken == len(self.items):
                return None
            self.taken += 1
            return self.taken - 1

    def _done(self, i: int, found: object) -> None:
        with self.lock:
            self.found[i] = found
            while self.turn in self.found:
                self.put(self.items[self.turn], self.found.pop(self.turn))
                self.turn += 1
