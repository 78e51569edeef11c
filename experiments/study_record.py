"""What studies share: the option --json, and the record that they write to it."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from resource_meter import ResourceMeter

import interp
from interp.utils.provenance import now, versions


def study_parser(docstring: str | None) -> argparse.ArgumentParser:
    """Return the parser of a study's options, with --json; ``docstring``: that of its module."""
    parser = argparse.ArgumentParser(description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the raw numbers")
    return parser


def study_record(model: interp.Model | dict[str, str], meter: ResourceMeter, numbers: dict[str, Any]) -> dict[str, Any]:
    """Return a study's numbers, with the command, the date, the model, the versions and what the run took.

    Of several models: the hashes of their weights, by name.
    """
    of_model = model if isinstance(model, dict) else model.provenance()
    about = {"command": " ".join(["python", *sys.argv]), "made": now(), "model": of_model, "versions": versions()}
    return {**about, **numbers, **meter.facts()}


def write_record(record: dict[str, Any], path: Path | None) -> dict[str, Any]:
    """Write a record, if a path is set, and return it."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record
