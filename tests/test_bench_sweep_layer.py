"""The bench of the sweep layer works, on a thousandth of its sizes."""

from __future__ import annotations

import json

import pytest

from interp.bench import sweep_layer
from interp.errors import InterpError


def test_rows_and_resume(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sweep_layer, "ROWS", 20_000)
    monkeypatch.setattr(sweep_layer, "ROWS_PER_PART", 10_000)
    monkeypatch.setattr(sweep_layer, "PARTS", 20)
    said: list[str] = []
    sweep_layer.run(["rows"], tmp_path / "x.json", said.append)
    sweep_layer.run(["resume"], tmp_path / "x.json", said.append)
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["rows"]["bytes"] < 20 * 20_000 and found["rows"]["table_rows"] == 270
    assert 0 < found["resume"]["seconds_to_first"] <= found["resume"]["seconds_with_checksums"]
    assert len(said) == 2
    with pytest.raises(InterpError, match="no such cases: speed"):
        sweep_layer.run(["speed"], None)
