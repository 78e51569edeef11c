"""The trained models do what was measured of them, and are what was shipped."""

from __future__ import annotations

import shutil

import pytest
import torch

import interp
from interp import tasks, zoo
from interp.errors import ModelError, TaskError
from interp.sites import Site
from interp.zoo import trained
from interp.zoo.shipped import WEIGHTS

MODELS = ("trained_induction", "modular_addition")


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return getattr(zoo, request.param)()


@pytest.fixture(scope="module")
def learned():
    return zoo.trained_induction()


def flat(measured: dict, where: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in measured.items():
        found |= flat(value, f"{where}/{key}") if isinstance(value, dict) else {f"{where}/{key}": value}
    return found


def test_what_was_measured_is_measured_again(model):
    want, found = flat(dict(model.measured)), flat(model.measure())
    assert set(want) == set(found) and len(want) > 5
    for key, value in want.items():
        assert found[key] == (value if isinstance(value, str) else pytest.approx(value, abs=0.005)), key


def test_they_solve_their_pairs(model):
    assert tasks.check(model.model, model.pairs(64, seed=3)).accuracy == 1.0
    assert list(model.pairs(5, 1)) == list(model.pairs(5, 1)) != list(model.pairs(5, 2))
    with pytest.raises(TaskError, match="n=0"):
        model.pairs(0)


def test_induction_was_learned(learned):
    loss = learned.measured["loss"]
    uniform = torch.tensor(float(len(trained.INDUCTION_WORDS))).log().item()
    assert loss["first pass"] > uniform - 0.1 and loss["second pass"] < 0.3
    roles = learned.measured["roles"]
    assert {roles[h] for h in roles if h.startswith("z.L1")} == {"induction"}
    assert {roles[h] for h in roles if h.startswith("z.L0")} == {"previous token"}
    assert sum(role == "induction" for role in roles.values()) == 2
    assert tasks.check(learned.model, tasks.induction(learned.model, 32)).accuracy > 0.95  # on other prompts too


def test_patching_points_at_the_heads_named_by_their_attention(learned):
    """Evidence of another kind: the induction heads are the two of layer 1 that patching moves most."""
    sites = learned.model.sites("z", layers=1)
    table = interp.patch(learned.model, learned.pairs(24), sites, show_progress=False).summary(by=["layer", "head"])
    strongest = table.sort_values("effect", ascending=False).head(2)
    found = {Site("z", int(r.layer), int(r.head)) for r in strongest.itertuples()}
    assert found == {site for site, role in learned.roles.items() if role == "induction"}


def test_addition_lives_on_a_few_frequencies():
    measured = zoo.modular_addition().measured
    assert measured["accuracy"] == measured["only_key"] == 1.0 and measured["without_key"] < 0.05
    assert len(measured["key"]) <= 6 and sum(measured["key"].values()) > 0.9


def test_fourier_is_orthogonal():
    numbers = torch.randn(trained.MODULUS, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    centred = numbers - numbers.mean(0)
    assert trained.fourier(numbers).square().sum() == pytest.approx(centred.square().sum().item())
    whole = sum(trained._project(numbers, k) for k in range(1, trained.MODULUS // 2 + 1))
    torch.testing.assert_close(whole, centred)


def test_random_weights_have_none_of_this():
    """The null control: the same measurements on models of the same shape, untrained."""
    for name in MODELS:
        untrained = getattr(zoo, name)()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in untrained.bridge.original_model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        found = untrained.measure()
        if name == "trained_induction":
            assert not found["roles"] and found["loss"]["second pass"] > 4
        else:
            assert found["accuracy"] < 0.1


def test_the_files_are_small_and_verified(tmp_path):
    assert sum(p.stat().st_size for p in WEIGHTS.iterdir()) < 3e6
    for path in WEIGHTS.iterdir():
        shutil.copy(path, tmp_path)
    path = tmp_path / "modular_addition.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ModelError, match=r"modular_addition: its weights have the checksum .* damaged"):
        zoo.modular_addition(folder=tmp_path)
    path.unlink()
    with pytest.raises(ModelError, match="is missing; reinstall interp"):
        zoo.modular_addition(folder=tmp_path)
    assert zoo.trained_induction(folder=tmp_path).roles
