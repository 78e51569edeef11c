"""The Triton backend on a GPU: every test that its interpreter runs, on larger tensors. Skipped where there is none."""

import importlib
import inspect

import pytest

PASSES = {"Forward": "headstats_interpreted", "Columns": "headstats_interpreted_columns",
          "Largest": "headstats_interpreted_largest", "Backward": "headstats_interpreted_backward"}  # fmt: skip
pytest.register_assert_rewrite(*PASSES.values())

for name, file in PASSES.items():
    bodies = inspect.getmembers(importlib.import_module(file), inspect.isfunction)
    tests = {test: staticmethod(body) for test, body in bodies if test.startswith("test_")}
    globals()[f"Test{name}"] = pytest.mark.gpu(type(f"Test{name}", (), tests))
