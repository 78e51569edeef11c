from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from interp.errors import InterpError
from interp.results.effects import COLUMNS, Effects
from interp.utils.provenance import weights_hash


def table(values: np.ndarray, **fixed) -> Effects:
    """values [example, head] as z effects with clean 2, corrupt 0."""
    rows = [
        {
            "example": i, "component": "z", "layer": 0, "head": h, "position": None, "token": "", "role": "",
            "intervention": "patch", "mode": "denoise", "metric": "logit_diff", "clean": 2.0, "corrupt": 0.0,
            "patched": 2 * x, "effect": x, "raw": 2 * x, **fixed,
        }
        for i, row in enumerate(values)
        for h, x in enumerate(row)
    ]  # fmt: skip
    return Effects(pd.DataFrame(rows), {"model": "toy", "seed": 1})


def test_summary_is_the_mean_and_its_interval_covers_at_the_nominal_rate() -> None:
    """Coverage of the bootstrap over repeated draws from a known distribution (n = 40)."""
    rng = np.random.default_rng(0)
    values = rng.normal(0.3, 1.0, size=(40, 400))
    s = table(values).summary().set_index("head").sort_index()
    np.testing.assert_allclose(s["effect"], values.mean(0), atol=1e-12)
    np.testing.assert_allclose(s["raw"], 2 * s["effect"], atol=1e-12)
    np.testing.assert_allclose(s["pooled"], s["effect"], atol=1e-12)  # equal gaps: both recoveries agree
    covered = ((s["lo"] <= 0.3) & (s["hi"] >= 0.3)).mean()
    assert 0.92 <= covered <= 0.98  # 95% within three standard errors of a share of 400


@pytest.mark.parametrize(("n", "normal", "skewed"), [(24, 0.95, 0.94), (8, 0.94, 0.93), (4, 0.95, 0.88)])
def test_coverage_with_few_examples_is_what_the_docstring_says(n: int, normal: float, skewed: float) -> None:
    rng = np.random.default_rng(1)
    for draw, said in ((rng.normal(0, 1, (n, 1500)), normal), (rng.exponential(1, (n, 1500)) - 1, skewed)):
        s = table(draw).summary()
        covered = ((s["raw_lo"] <= 0) & (s["raw_hi"] >= 0)).mean()
        assert abs(covered - said) < 0.02  # three standard errors of a share of 1,500


def test_pooled_is_the_ratio_of_means() -> None:
    e = table(np.array([[1.0], [0.5]]))
    frame = e.frame()
    frame["clean"] = [2.0, 10.0]
    frame["raw"] = [2.0, 5.0]
    s = Effects(frame).summary().iloc[0]
    assert s["effect"] == pytest.approx(0.75) and s["pooled"] == pytest.approx(7 / 12)


def test_undefined_recovery_stays_nan_and_raw_speaks() -> None:
    frame = table(np.ones((3, 1))).frame().assign(clean=0.0, effect=np.nan, raw=[1.0, 2.0, 3.0])
    s = Effects(frame).summary().iloc[0]
    assert np.isnan(s["effect"]) and np.isnan(s["pooled"]) and s["raw"] == 2.0
    assert s["n"] == 0 and s["n_raw"] == 3  # of no example is there a recovery


def test_one_example_has_no_interval() -> None:
    s = table(np.array([[0.5]])).summary().iloc[0]
    assert s["effect"] == 0.5 and np.isnan(s["lo"]) and np.isnan(s["hi"])


def test_grouping_averages_rows_of_one_example_first() -> None:
    frame = pd.concat([table(np.array([[0.0]])).frame(), table(np.array([[1.0]])).frame()]).assign(position=[3, 4])
    s = Effects(frame).summary(by=["layer"])
    assert len(s) == 1 and s.loc[0, "n"] == 1 and s.loc[0, "effect"] == 0.5


def test_parquet_round_trip_keeps_types_missing_values_and_provenance(tmp_path) -> None:
    e = table(np.random.default_rng(0).normal(size=(3, 2)))
    back = Effects.read(e.write(tmp_path / "deep" / "e.parquet"))
    pd.testing.assert_frame_equal(back.frame(), e.frame())
    assert back.provenance == e.provenance
    assert back.frame()["position"].isna().all() and dict(back.frame().dtypes.astype(str)) == COLUMNS
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["e.parquet"]  # no temporary file is left
    (tmp_path / "ordinary").touch()
    assert (tmp_path / "deep" / "e.parquet").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_reading_anything_else_is_refused(tmp_path) -> None:
    with pytest.raises(InterpError, match="does not exist"):
        Effects.read(tmp_path / "no.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(InterpError, match="not a readable Parquet"):
        Effects.read(tmp_path / "bad.parquet")
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(InterpError, match="does not hold effects"):
        Effects.read(tmp_path / "other.parquet")


def test_unwritable_target_leaves_nothing(tmp_path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InterpError, match="cannot write"):
        table(np.ones((1, 1))).write(tmp_path / "file" / "e.parquet")


def test_where_concat_and_errors() -> None:
    e = table(np.ones((2, 3)))
    assert len(e.where(head=1)) == 2 and len(e.where(position=None)) == 6 and len(e.where(head=9)) == 0
    assert len(Effects.concat([e, e])) == 12
    merged = Effects.concat([e, Effects(e.frame(), {"model": "toy", "seed": 2})])
    assert merged.provenance == {"model": "toy", "seed": [1, 2]}
    for bad, words in [
        (lambda: e.where(nope=1), "no column 'nope'"),
        (lambda: Effects.concat([]), "nothing to concatenate"),
        (lambda: e.where(head=9).summary(), "empty"),
        (lambda: Effects(pd.DataFrame({"example": [0]})), "lacks the column"),
    ]:
        with pytest.raises(InterpError, match=words):
            bad()


def several_layers() -> Effects:
    """Two examples of three layers, some rows with a position."""
    values = np.random.default_rng(0).normal(size=(2, 4))
    parts = [table(values + layer, layer=layer, position=position) for layer in range(3) for position in (None, 3, 4)]
    return Effects.concat(parts)


def test_conditions_take_lists_and_refuse_what_no_row_can_equal() -> None:
    effects = several_layers()
    frame = effects.frame()
    for layers in ([1, 2], range(1, 3), np.array([1, 2]), (1, 2)):
        assert effects.where(layer=layers).frame().equals(frame[frame["layer"].isin([1, 2])].reset_index(drop=True))
    either = effects.where(position=[None, 3]).frame()
    assert len(either) == (frame["position"].isna() | (frame["position"] == 3).fillna(False)).sum()
    assert len(effects.where(layer=[])) == 0
    for wrong, words in (
        ({"layer": "1"}, "holds numbers"), ({"component": 3}, "holds text"), ({"layer": [[1]]}, "holds numbers"),
        ({"layer": True}, "holds numbers"), ({"lyr": 1}, "no column 'lyr'"), ({"layer": slice(2)}, "holds numbers"),
    ):  # fmt: skip
        with pytest.raises(InterpError, match=words):
            effects.where(**wrong)


def test_a_summary_by_example_is_that_examples_mean() -> None:
    effects = several_layers()
    summary = effects.summary(by="example").set_index("example").sort_index()
    frame = effects.frame()
    np.testing.assert_allclose(summary["raw"], [frame[frame["example"] == i]["raw"].mean() for i in summary.index])
    assert (summary["n"] == 1).all() and len(summary) == frame["example"].nunique()
    both = effects.summary(by=["layer", "example", "layer"])
    assert len(both) == len(frame[["layer", "example"]].drop_duplicates())
    for wrong in ({"by": []}, {"by": 3}, {"by": [["layer"]]}, {"n_boot": 1.5}, {"seed": -1}, {"level": "a"}):
        with pytest.raises(InterpError):
            effects.summary(**wrong)


@pytest.mark.parametrize("name", ["x.csv", "x.json", "x.html", "x", "x.parquet.gz"])
def test_a_table_is_written_as_parquet_or_not_at_all(tmp_path, name: str) -> None:
    effects = several_layers()
    with pytest.raises(InterpError, match=r"\.parquet file is expected, as in .*to_csv"):
        effects.write(tmp_path / name)
    assert not list(tmp_path.iterdir())
    assert Effects.read(effects.write(tmp_path / "x.parquet")).frame().equals(effects.frame())
    effects.frame().to_csv(tmp_path / "x.csv", index=False)
    again = Effects(pd.read_csv(tmp_path / "x.csv")).frame()
    assert again["patched"].equals(effects.frame()["patched"])


def test_the_hash_of_weights_reads_their_whole_length() -> None:
    """At every size, also where 4,096 values are no whole fraction of it, a change of the last half is seen."""
    for size in (1, 4096, 4097, 5120, 8191, 8192, 12_287, 30_000):
        weight = torch.zeros(size)
        changed = weight.clone()
        changed[size // 2 :] = 1
        assert weights_hash([("w", weight)]) != weights_hash([("w", changed)]), size
        assert weights_hash([("w", weight)]) == weights_hash([("w", weight.clone())])
        changed = weight.clone()
        changed[-max(1, size // 100) :] = 1  # the last hundredth holds a sampled value if 4,096 of them are spread out
        assert size < 4097 or weights_hash([("w", weight)]) != weights_hash([("w", changed)]), size
