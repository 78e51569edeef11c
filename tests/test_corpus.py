"""Statistics over a corpus: the numbers of `attention_stats`, whichever way files are cut, in bounded memory."""

from __future__ import annotations

import json
import sys
import tracemalloc

import numpy as np
import pytest

from interp import corpus
from interp.cli import main as cli
from interp.corpus.moments import StreamedMoments, merge_tables, table_of
from interp.corpus.reading import documents
from interp.errors import InterpError

QUIET = {"executor": "in-process", "show": "none"}


@pytest.fixture
def texts(tmp_path):
    rng = np.random.default_rng(0)
    lines = [" ".join(f"w{k}" for k in rng.integers(90, size=rng.integers(1, 30))) for _ in range(40)]
    (tmp_path / "a.txt").write_text("\n".join(lines[:25]) + "\n\n")
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in lines[25:]))
    return lines


def test_documents_of_all_cuts_are_those_of_the_file(tmp_path) -> None:
    text = "one\n\ntwo words\nthrée\n" + "x" * 50 + "\nlast"
    path = tmp_path / "a.txt"
    path.write_text(text)
    n = path.stat().st_size
    want = [line for line in text.split("\n") if line]
    for step in (1, 2, 3, 7, 50, n):
        assert [d for at in range(0, n, step) for d in documents(path, at, min(at + step, n))] == want
    np.save(tmp_path / "t.npy", np.arange(100, dtype=np.uint16))
    size = (tmp_path / "t.npy").stat().st_size
    for step in (1, 64, 100, 1000):
        cut = [d for at in range(0, size, step) for d in documents(tmp_path / "t.npy", at, min(at + step, size))]
        assert [i for piece in cut for i in piece] == list(range(100))


def test_long_lines_come_in_pieces(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("interp.corpus.reading.PIECE", 16)
    text = "aaa bbbb cc dddddd eeeeeeeeeeeeeeeeeeeeeeee ff g\nnext one here and more\n"
    (tmp_path / "a.txt").write_text(text)
    found = list(documents(tmp_path / "a.txt", 0, len(text)))
    assert "".join(found).replace(" ", "") == text.replace(" ", "").replace("\n", "")
    assert max(map(len, found)) <= 32


def test_pieces_are_cut_between_characters(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("interp.corpus.reading.PIECE", 16)
    text = "語" * 40 + "é" * 9
    (tmp_path / "a.txt").write_text(text + "\n", encoding="utf-8")
    assert "".join(documents(tmp_path / "a.txt", 0, 3 * len(text))) == text


def test_moments_merge_to_those_of_the_whole() -> None:
    rng = np.random.default_rng(0)
    x = rng.lognormal(size=(2, 3, 5000)) + 1e4
    x[1, 2] = np.nan
    parts = []
    for piece in np.split(x, [10, 11, 3000], axis=-1):
        m = StreamedMoments(2, 3)
        m.add(piece)
        parts.append(table_of({"s": m}))
    found, errors = merge_tables([*parts[:2], table_of({}, "lost"), *parts[2:]])
    m = found["s"]
    assert errors == ["lost"] and m.count[0, 0] == 5000 and m.count[1, 2] == 0
    np.testing.assert_allclose(m.mean[0], x[0].mean(-1), rtol=1e-13)
    np.testing.assert_allclose(m.m2[0] / 4999, x[0].var(-1, ddof=1), rtol=1e-9)
    np.testing.assert_array_equal(m.max[0], x[0].max(-1))
    for q in (0.01, 0.5, 0.99):  # a t-digest is off by little in rank
        rank = (x[0, 0] <= m.sketch[0][0].get_quantile(q)).mean()
        assert abs(rank - q) < 0.03 * min(1, 10 * min(q, 1 - q))


def test_the_numbers_are_those_of_attention_stats(tmp_path, texts, tiny) -> None:
    model = tiny("llama")
    files = [tmp_path / "a.txt", tmp_path / "b.jsonl"]
    found = corpus.statistics(model, files, tmp_path / "run", context=64, bytes_per_part=300, **QUIET)
    assert found.outcome is not None and found.outcome.code == 0 and found.outcome.parts > 5
    stats = model.attention_stats(texts)
    assert found.documents == 40 and found.tokens == sum(len(t) for t in stats.tokens)
    frame = found.frame()
    for name in ("entropy", "sink"):
        values = np.concatenate([v[..., 1:] for v in stats.values[name]], axis=-1).astype(float)
        mine = frame[frame["statistic"] == name]
        shape = values.shape[:2]
        np.testing.assert_allclose(mine["mean"].to_numpy().reshape(shape), values.mean(-1), rtol=1e-5)
        np.testing.assert_allclose(mine["variance"].to_numpy().reshape(shape), values.var(-1, ddof=1), rtol=1e-4)
        assert (mine["count"] == values.shape[-1]).all()
    assert "argmax" not in set(frame["statistic"])


def test_resumed_and_in_other_cuts_it_is_the_same(tmp_path, texts, tiny) -> None:
    model = tiny("llama")
    first = corpus.statistics(model, tmp_path / "a.txt", tmp_path / "one", bytes_per_part=200, **QUIET)
    half = corpus.statistics(model, tmp_path / "a.txt", tmp_path / "two", bytes_per_part=200, shard=(1, 2), **QUIET)
    assert 0 < half.documents < first.documents
    again = corpus.statistics(model, tmp_path / "a.txt", tmp_path / "two", bytes_per_part=200, **QUIET)
    assert again.frame().equals(first.frame())
    whole = corpus.statistics(model, tmp_path / "a.txt", tmp_path / "three", **QUIET)
    np.testing.assert_allclose(whole.frame()["mean"], first.frame()["mean"], rtol=1e-6)
    with pytest.raises(InterpError, match="context: 512 → 64"):
        corpus.statistics(model, tmp_path / "a.txt", tmp_path / "two", bytes_per_part=200, context=64, **QUIET)
    (tmp_path / "a.txt").write_text("w1 w2")
    with pytest.raises(InterpError, match=r"files\[0\]"):
        corpus.statistics(model, tmp_path / "a.txt", tmp_path / "two", bytes_per_part=200, **QUIET)


def test_out_of_memory_halves_the_batch(tmp_path, texts, tiny, monkeypatch) -> None:
    model = tiny("llama")
    want = corpus.statistics(model, tmp_path / "a.txt", tmp_path / "one", context=4, **QUIET)
    forward = type(model).forward

    def little(self, ids):
        if len(ids) > 3:
            raise RuntimeError("can't allocate memory")
        return forward(self, ids)

    monkeypatch.setattr(type(model), "forward", little)
    found = corpus.statistics(model, tmp_path / "a.txt", tmp_path / "two", context=4, **QUIET)
    np.testing.assert_allclose(found.frame()["mean"], want.frame()["mean"], rtol=1e-6)


def test_memory_does_not_grow_with_the_corpus(tmp_path, tiny) -> None:
    model = tiny("llama")

    def peak(n: int) -> int:
        (tmp_path / f"{n}.txt").write_text("w1 w2 w3 w4 w5 w6 w7 w8\n" * n)
        options = {"bytes_per_part": 2000, "statistics": {"entropy": True}, **QUIET}
        tracemalloc.start()
        corpus.statistics(model, tmp_path / f"{n}.txt", tmp_path / f"run{n}", **options)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(10)
    small, large = peak(100), peak(3000)
    assert large < 1.5 * small + 500_000, (small, large)


def test_bad_data(tmp_path, texts, tiny, monkeypatch, capsys) -> None:
    model = tiny("llama")
    np.save(tmp_path / "o.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "f.npy", np.zeros((2, 2)))
    (tmp_path / "e.txt").write_text("")
    (tmp_path / "x.pkl").write_text("x")
    (tmp_path / "u.txt").write_bytes("w1 w2".encode("utf-16"))
    (tmp_path / "l.txt").write_bytes("w1 é w2".encode("latin-1"))
    (tmp_path / "b.jsonl").write_bytes(b"a\0")
    (tmp_path / "s.txt").write_text("\n \n")
    for name, words in (
        ("o.npy", "pickled objects are refused"), ("f.npy", "one dimension of whole numbers"), ("e.txt", "is empty"),
        ("x.pkl", "pickled data can run code"), ("n.txt", "cannot read"), ("u.txt", r"not UTF-8 text \(byte 3"),
        ("l.txt", r"not UTF-8 text \(byte 3"), ("b.jsonl", r"not UTF-8 text \(byte 1"), ("s.txt", "nothing to count"),
    ):  # fmt: skip
        with pytest.raises(InterpError, match=words):
            corpus.statistics(model, tmp_path / name, tmp_path / name[0], **QUIET)
    with pytest.raises(InterpError, match="given twice"):
        corpus.statistics(model, [tmp_path / "a.txt", tmp_path / "r" / ".." / "a.txt"], tmp_path / "r", **QUIET)
    for given, words in (({"sinks": 4}, "sinks"), ({"topk": 4}, "topk"), ({"sink": -1}, "sink")):
        with pytest.raises(InterpError, match=words):
            corpus.statistics(model, tmp_path / "a.txt", tmp_path / "r", statistics=given, **QUIET)
    (tmp_path / "bad.jsonl").write_text('{"text": "w1 w2 w3"}\n{"txt": 1}\n')
    found = corpus.statistics(model, tmp_path / "bad.jsonl", tmp_path / "bad", **QUIET)
    assert found.outcome is not None and found.outcome.code == 3 and "key 'text' expected" in found.errors[0]
    np.save(tmp_path / "alien.npy", np.array([5, 6, -7, 8]))
    (tmp_path / "null.jsonl").write_text('{"text": null}\n')
    for name, words in (("alien.npy", "-7 is not a token of this model"), ("null.jsonl", "key 'text' expected")):
        found = corpus.statistics(model, tmp_path / name, tmp_path / name[:2], **QUIET)
        assert found.outcome is not None and found.outcome.code == 3 and words in found.errors[0]
        assert words in str(found.outcome)
    monkeypatch.setattr(sys, "argv", ["interp", "stats", "m.pt", "--data", str(tmp_path / "a.txt")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2 and "pickled weights" in capsys.readouterr().err
