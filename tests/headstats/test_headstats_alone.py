"""headstats as a distribution of its own: torch and triton are all it needs, and the wheel holds all of it."""

import importlib.util
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "kernels"
PROJECT = tomllib.loads((KERNELS / "pyproject.toml").read_text())
BLOCKED = ("jaxtyping", "numpy", "pandas", "transformers", "transformer_lens", "interp", "typer", "hypothesis")
PROGRAM = f"""
import sys, warnings
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}: this test forbids it", name=name)
sys.meta_path.insert(0, Blocker())
warnings.filterwarnings("ignore", "Failed to initialize NumPy")
import torch, headstats
q, k, v = (torch.randn(1, h, 40, 8, requires_grad=True) for h in (4, 2, 2))
for backend in ("blocked", "reference"):
    r = headstats.attend(q, k, v, spec=headstats.StatSpec.all(), backend=backend)
    r.out.sum().backward()
import headstats.bench.run
assert not set({BLOCKED!r}) & {{name.split(".")[0] for name in sys.modules}}
print(headstats.__file__)
"""


def run_alone(path: Path) -> str:
    env = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"} | {"PYTHONPATH": str(path)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, cwd=path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_runs_where_nothing_else_can_be_imported():
    assert run_alone(KERNELS) == str(KERNELS / "headstats" / "__init__.py")


def test_needs_torch_and_triton_alone():
    project = PROJECT["project"]
    assert project["name"] == "headstats"
    assert [re.match(r"\w+", x).group() for x in project["dependencies"]] == ["torch", "triton"]
    both = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(project["dependencies"]) <= set(both["dependencies"]) and project["version"] == both["version"]
    assert PROJECT["build-system"]["build-backend"] == "hatchling.build"
    assert PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == ["headstats"]
    assert not (KERNELS / "__init__.py").exists()  # a package named kernels is what transformers looks for


@pytest.mark.skipif(importlib.util.find_spec("hatchling") is None, reason="needs hatchling, which builds the wheel")
def test_the_wheel_holds_every_file_and_runs(tmp_path):
    command = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path), str(KERNELS)]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("headstats-*.whl")
    with zipfile.ZipFile(wheel) as z:
        held = {name for name in z.namelist() if ".dist-info/" not in name}
        z.extractall(tmp_path / "site")
    tracked = subprocess.run(["git", "ls-files", "headstats"], cwd=KERNELS, capture_output=True, text=True)
    assert tracked.returncode == 0, tracked.stderr
    assert held >= set(tracked.stdout.split()) and {name.split("/")[0] for name in held} == {"headstats"}
    assert run_alone(tmp_path / "site").startswith(str(tmp_path))
