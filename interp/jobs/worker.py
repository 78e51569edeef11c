"""A worker process: ``python -m interp.jobs.worker RUN``. Started by the local executor, which it does not outlive.

It says what it does as JSON lines on its standard output. Its standard input is a line to its driver: "stop" ends it
after the part in hand; when the line is cut, because the driver died, it ends at once.
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
    """Runs to the end of the work; exit code 0, or 2 with a "fatal" event."""
    root, options = arguments[0], json.loads(arguments[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C reaches the whole terminal; the driver decides what it means
    said = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever libraries print goes to the log
    lock, stop = threading.Lock(), threading.Event()

    def emit(event: dict[str, Any]) -> None:
        with lock:
            said.write(json.dumps(event) + "\n")
            said.flush()

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
    for line in sys.stdin:
        if line.strip() == "stop":
            stop.set()
    os._exit(3)  # the driver is gone: leases go with this process


def _work(root: str, options: dict[str, Any], emit: Any, stop: threading.Event) -> None:
    from interp.jobs.store import Store
    from interp.jobs.work import Work, job_of

    store = Store.open(root)
    leases = store.leases()
    parts = options["parts"]
    work = Work(store, job_of(store), leases, emit, stop.is_set)
    work.left.update(dict.fromkeys(options.get("left", ()), ""))
    work.through(range(*parts))
    leases.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
