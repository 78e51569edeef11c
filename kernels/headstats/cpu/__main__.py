"""``python -m headstats.cpu``: builds the compiled CPU backend and tries it."""

from __future__ import annotations

import argparse
import sys

from headstats.cpu import build
from headstats.cpu import self_test as trial


def main() -> int:
    """Exit status 1 and a message if it cannot be built; with --if-possible the message alone."""
    parser = argparse.ArgumentParser(prog=build.COMMAND, description="Build the compiled CPU backend of headstats.")
    parser.add_argument("--if-possible", action="store_true", help="exit with status 0 even if it cannot be built")
    parser.add_argument("--if-missing", action="store_true", help="do nothing if it is there")
    parser.add_argument("--time-limit", type=float, default=build.TIME_LIMIT, metavar="S", help="of the compiler")
    asked = parser.parse_args()
    try:
        if asked.if_missing and build.library_path().exists():
            print(f"headstats: the CPU backend is there: {build.library_path()}")
        else:
            build.build(time_limit=asked.time_limit)
        print(f"headstats: {trial.report()}")
    except build.BuildError as error:
        print(f"headstats: the compiled CPU backend was not built: {error}", file=sys.stderr)
        print("headstats: everything works without it, more slowly on CPU (backend 'blocked')", file=sys.stderr)
        return 0 if asked.if_possible else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
