"""``python -m headstats.cpu``: build the compiled CPU backend and test it."""

from __future__ import annotations

import argparse
import sys

from headstats.cpu import build, library, self_test


def main() -> int:
    """Build and test.

    If that fails: a message and exit status 1, or with --if-possible only the message.
    """
    parser = argparse.ArgumentParser(prog=build.COMMAND, description="Build the compiled CPU backend of headstats.")
    parser.add_argument("--if-possible", action="store_true", help="exit with status 0 even if it cannot be built")
    parser.add_argument("--if-missing", action="store_true", help="do nothing if it is already built and whole")
    parser.add_argument("--time-limit", type=float, default=build.TIME_LIMIT, metavar="S", help="for the compiler")
    options = parser.parse_args()
    try:
        if options.if_missing and _is_built():
            print(f"headstats: the CPU backend is already built: {build.library_path()}")
        else:
            build.build(time_limit=options.time_limit)
        print(f"headstats: {self_test.report()}")
    except build.BuildError as error:
        print(f"headstats: the compiled CPU backend was not built: {error}", file=sys.stderr)
        print("headstats: everything works without it, more slowly on CPU (backend 'blocked')", file=sys.stderr)
        return 0 if options.if_possible else 1
    return 0


def _is_built() -> bool:
    """Return whether the library is there and may be loaded; say so if it is damaged."""
    try:
        library.check(build.library_path())
        return True
    except FileNotFoundError:
        return False
    except OSError as error:
        print(f"headstats: {error}; it is built again")
        return False


if __name__ == "__main__":
    sys.exit(main())
