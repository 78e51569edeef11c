"""What it costs to add a statistic: one row of the table, in a copy of the package."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

PACKAGE = pathlib.Path(__file__).parents[2] / "kernels" / "headstats"
LAST_ROW = ")  # fmt: skip\nBY_NAME = "
ROW = """\
    Statistic(
        "odd_mass", "query", "probability", "[0, 1]", "sum of p_ij over odd j", "a toy",
        lambda a, _: (a.p * ((torch.arange(a.p.shape[-1]) + a.first_key) % 2)).sum(-1),
    ),
"""
CHECK = """\
import torch, headstats
from headstats import StatSpec

assert "odd_mass" in StatSpec.all().requested() and not StatSpec().odd_mass
q, k, v = torch.randn(3, 2, 4, 37, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
weights = (q @ k.transpose(-1, -2) / 8**0.5).masked_fill(torch.ones(37, 37).tril() == 0, -torch.inf).softmax(-1)
for backend in ("reference", "blocked", "auto"):
    for spec in (StatSpec(odd_mass=True), StatSpec.all()):
        found = headstats.attend(q, k, v, spec=spec, backend=backend).stats.odd_mass
        torch.testing.assert_close(found, weights[..., 1::2].sum(-1))
assert headstats.attend(q, k, v).stats.odd_mass is None  # the null: nothing is computed that is not requested
try:
    headstats.attend(q, k, v, spec=StatSpec(odd_mass=True), backend="compiled")
except NotImplementedError as error:
    print("compiled:", error)
print("done")
"""


def test_a_statistic_is_one_row(tmp_path: pathlib.Path) -> None:
    copy = tmp_path / "headstats"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    table = (copy / "stats.py").read_text(encoding="utf-8")
    assert table.count(LAST_ROW) == 1
    (copy / "stats.py").write_text(table.replace(LAST_ROW, ROW + LAST_ROW), encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert run.returncode == 0 and run.stdout.endswith("done\n"), run.stdout + run.stderr
