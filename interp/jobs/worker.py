"""A worker process: ``python -m interp.jobs.worker RUN OPTIONS``, started by the local executor.

It reports events as JSON lines on its standard output. The line "stop" on its standard input ends it after the current
part. When standard input is closed, because the driver died, it ends at once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from typing import Any

from interp.errors import InterpError


def main(arguments: list[str]) -> int:
    """Compute parts until none is left.

    Returns exit code 0, or 2 after a "fatal" event.
    """
    root, options = arguments[0], json.loads(arguments[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of the terminal; the driver handles it
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print goes to the log
    lock, stop = threading.Lock(), threading.Event()

    def emit(event: dict[str, Any]) -> None:
        with lock:
            events.write(json.dumps(event) + "\n")
            events.flush()

    threading.Thread(target=_listen, args=(stop,), daemon=True).start()
    try:
        _work(root, options, emit, stop)
    except InterpError as error:
        emit({"event": "fatal", "reason": str(error)})
        return 2
    except BrokenPipeError:
        return 1
    return 0


def _listen(stop: threading.Event) -> None:
    """Wait for "stop"; end the process when standard input is closed."""
    for line in sys.stdin:
        if line.strip() == "stop":
            stop.set()
    os._exit(3)  # the driver died: the leases end with this process


def _work(root: str, options: dict[str, Any], emit: Any, stop: threading.Event) -> None:
    from interp.jobs.store import Store
    from interp.jobs.work import Work, job_of

    store = Store.open(root)
    store.report = lambda message: emit({"event": "note", "reason": message})
    leases = store.leases()
    work = Work(store, job_of(store), leases, emit, stop.is_set)
    work.left.update(dict.fromkeys(options.get("left", ()), ""))
    work.compute_parts(range(*options["parts"]))
    leases.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
