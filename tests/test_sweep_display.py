"""How a running sweep is seen."""

from __future__ import annotations

import io
import json
import sys

from interp.jobs.status import Display, Live, Tally, display, duration

EVENTS = [
    {"event": "worker", "worker": 0, "pid": 5},
    {"event": "started", "worker": 0, "part": 3},
    {"event": "done", "worker": 0, "part": 3, "rows": 50, "failed": 2, "seconds": 1.0, "memory": 2**30},
    {"event": "died", "worker": 0, "part": 4, "reason": "was killed by SIGKILL"},
    {"event": "left", "part": 4, "reason": "no such [model]"},
    {"event": "damaged", "part": 1, "reason": "it has 3 bytes"},
    {"event": "stopping"},
]


def test_plain_lines_say_what_happened_and_how_far_it_is() -> None:
    out = io.StringIO()
    shown = Display(Tally(10, 4, 200, 0), out, every=0)
    for event in EVENTS:
        shown(event)
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("5/10 parts, 250 cells, 2 failed, ") and "cells/s" in lines[0] and "GiB" in lines[0]
    assert lines[1:] == [
        "worker 0 was killed by SIGKILL; its part is taken over",
        "part 4 is left undone: no such [model]",
        "part 1 is damaged and will be computed anew: it has 3 bytes",
        "finishing the current parts; press Ctrl-C again to drop them",
    ]


def test_json_lines(capsys) -> None:
    with display("json", Tally(10, 4, 200, 0), "title") as shown:
        for event in EVENTS:
            shown(event)
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [s["event"] for s in said] == [e["event"] for e in EVENTS]
    assert said[2]["parts_done"] == 5 and said[2]["cells"] == 250 and said[2]["seconds_left"] >= 0


def test_the_live_display_is_one_bar_with_events_above(capsys) -> None:
    with display("live", Tally(10, 4, 200, 0), "a title") as shown:
        assert isinstance(shown, Live)
        for event in EVENTS:
            shown(event)
        assert shown.bar.tasks[0].completed == 5
    err = capsys.readouterr().err
    assert "no such [model]" in err and "a title" in err


def test_without_a_terminal_lines_are_plain(capsys) -> None:
    assert not sys.stderr.isatty()
    with display("auto", Tally(1, 0, 0, 0), "t") as shown:
        assert type(shown) is Display
    with display("none", Tally(1, 0, 0, 0), "t") as shown:
        shown(EVENTS[-1])
    assert capsys.readouterr().err == ""


def test_durations() -> None:
    assert [duration(s) for s in (3.9, 65, 3720)] == ["3 s", "1 min 05 s", "1 h 02 min"]
