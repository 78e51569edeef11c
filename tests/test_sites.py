from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interp.errors import SiteError
from interp.sites import COMPONENTS, Site, Sites, enumerate_sites

SIZES = dict(n_layers=3, n_heads=4, n_kv_heads=2)


def test_enumeration_is_the_product_in_order() -> None:
    z = enumerate_sites("z", **SIZES)
    assert len(z) == 12 and z[0] == Site("z", 0, 0) and z[-1] == Site("z", 2, 3)
    assert len(enumerate_sites("k", **SIZES)) == 6  # key/value heads are counted as such
    resid = enumerate_sites("resid_pre", **SIZES, layers=[0, -1], positions=[2, -1])
    assert [str(s) for s in resid] == ["resid_pre.L0@2", "resid_pre.L0@-1", "resid_pre.L2@2", "resid_pre.L2@-1"]


def test_habits_of_positions() -> None:
    assert enumerate_sites("resid_pre", **SIZES)[0].position == "each"
    assert enumerate_sites("z", **SIZES)[0].position is None
    assert enumerate_sites("z", **SIZES, positions="each")[0].position == "each"
    assert enumerate_sites("resid_pre", **SIZES, positions="all")[0].position is None


def test_union_keeps_order_and_drops_repeats() -> None:
    a = enumerate_sites("z", **SIZES, layers=0)
    b = enumerate_sites("resid_pre", **SIZES, layers=0)
    assert list(a | b | a) == [*a, *b]
    assert len(Sites(["z.L0H1", "z.L0H1"])) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(component="zz"), "unknown component"),
        (dict(component="z", layers=3), "layer 3 is out of range: this model has 3 layers, 0 to 2"),
        (dict(component="z", heads=[0, 4]), "head 4 is out of range"),
        (dict(component="k", heads=2), "head 2 is out of range: this model has 2 heads"),
        (dict(component="resid_pre", heads=0), "has no heads"),
        (dict(component="embed", layers=0), "before the first layer"),
        (dict(component="z", layers=[]), "no layers were chosen"),
        (dict(component="z", positions=[]), "no positions were chosen"),
        (dict(component="z", layers=1.5), "layer"),
    ],
)
def test_bad_sites_teach(arguments: dict, words: str) -> None:
    if isinstance(arguments.get("layers"), float):
        arguments = {**arguments, "layers": [arguments["layers"]]}
    with pytest.raises(SiteError, match=words):
        enumerate_sites(**arguments, **SIZES)


@given(
    st.sampled_from(sorted(COMPONENTS)),
    st.integers(0, 99),
    st.integers(0, 99),
    st.one_of(st.none(), st.integers(-99, 99), st.sampled_from(["each", "S2", "S1+1"])),
)
def test_text_form_round_trips(component: str, layer: int, head: int, position) -> None:
    spec = COMPONENTS[component]
    site = Site(component, layer if spec.per_layer else None, head if spec.heads else None, position)
    assert Site.parse(str(site)) == site


@pytest.mark.parametrize("text", ["", "z", "z.L1", "resid_pre", "resid_pre.L1H2", "nope.L1", "z.LxH1"])
def test_unreadable_text_is_refused(text: str) -> None:
    with pytest.raises(SiteError):
        Site.parse(text)
