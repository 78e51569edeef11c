"""Statistics over a corpus: the numbers of `attention_stats`, whichever way files are cut, in bounded memory."""

from __future__ import annotations

import json
import sys
import tracemalloc

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from interp import corpus
from interp.cli import main as cli
from interp.corpus.checked import BLOCK, CheckedFile, record_file
from interp.corpus.moments import StreamedMoments, merge_tables, table_of
from interp.corpus.reading import Piece, Refused, documents
from interp.errors import InterpError, ModelError

QUIET = {"executor": "in-process", "show": "none"}


@pytest.fixture
def texts(tmp_path):
    rng = np.random.default_rng(0)
    lines = [" ".join(f"w{k}" for k in rng.integers(90, size=rng.integers(1, 30))) for _ in range(40)]
    (tmp_path / "a.txt").write_text("\n".join(lines[:25]) + "\n\n")
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in lines[25:]))
    return lines


def items(path, start=0, stop=None) -> list[Piece | Refused]:
    """What is read from a range of a file."""
    record = record_file(path)
    with CheckedFile(path, record.size, record.blocks) as file:
        return list(documents(file, start, record.size if stop is None else stop))


def contents(path, start=0, stop=None) -> list:
    pieces = items(path, start, stop)
    assert all(isinstance(p, Piece) for p in pieces)
    return [p.content for p in pieces if isinstance(p, Piece)]


def test_documents_of_all_cuts_are_those_of_the_file(tmp_path) -> None:
    text = "one\n\ntwo words\nthrée\n" + "x" * 50 + "\nlast"
    path = tmp_path / "a.txt"
    path.write_text(text)
    n = path.stat().st_size
    want = [line for line in text.split("\n") if line]
    for step in (1, 2, 3, 7, 50, n):
        assert [d for at in range(0, n, step) for d in contents(path, at, min(at + step, n))] == want
        numbers = [p.number for at in range(0, n, step) for p in items(path, at, min(at + step, n))]
        assert numbers == [1, 3, 4, 5, 6]
    np.save(tmp_path / "t.npy", np.arange(100, dtype=np.uint16))
    size = (tmp_path / "t.npy").stat().st_size
    for step in (1, 64, 100, 1000):
        cut = [d for at in range(0, size, step) for d in contents(tmp_path / "t.npy", at, min(at + step, size))]
        assert [i for piece in cut for i in piece] == list(range(100))


def test_long_lines_come_in_pieces(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("interp.corpus.reading.PIECE", 16)
    text = "aaa bbbb cc dddddd eeeeeeeeeeeeeeeeeeeeeeee ff g\nnext one here and more\n"
    (tmp_path / "a.txt").write_text(text)
    found = contents(tmp_path / "a.txt")
    assert "".join(found).replace(" ", "") == text.replace(" ", "").replace("\n", "")
    assert max(map(len, found)) <= 32
    assert [p.number for p in items(tmp_path / "a.txt") if isinstance(p, Piece) and p.is_first] == [1, 2]
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    found = contents(tmp_path / "a.jsonl")
    assert "".join(found) == text and max(map(len, found)) <= 16


def test_pieces_are_cut_between_characters(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("interp.corpus.reading.PIECE", 16)
    text = "語" * 40 + "é" * 9
    (tmp_path / "a.txt").write_text(text + "\n", encoding="utf-8")
    assert "".join(contents(tmp_path / "a.txt")) == text


def test_moments_merge_to_those_of_the_whole() -> None:
    rng = np.random.default_rng(0)
    x = rng.lognormal(size=(2, 3, 5000)) + 1e4
    x[1, 2] = np.nan
    parts = []
    for piece in np.split(x, [10, 11, 3000], axis=-1):
        m = StreamedMoments(2, 3)
        m.add(piece)
        parts.append(table_of({"s": m}))
    found, errors = merge_tables([*parts[:2], table_of({}, ["lost"]), *parts[2:]])
    m = found["s"]
    assert errors == ["lost"] and m.count[0, 0] == 5000 and m.count[1, 2] == 0
    np.testing.assert_allclose(m.mean[0], x[0].mean(-1), rtol=1e-13)
    np.testing.assert_allclose(m.m2[0] / 4999, x[0].var(-1, ddof=1), rtol=1e-9)
    np.testing.assert_array_equal(m.max[0], x[0].max(-1))
    for q in (0.01, 0.5, 0.99):  # a t-digest is off by little in rank
        rank = (x[0, 0] <= m.sketch[0][0].get_quantile(q)).mean()
        assert abs(rank - q) < 0.03 * min(1, 10 * min(q, 1 - q))


def test_a_part_that_names_heads_without_rows_is_refused() -> None:
    """A row of head 10⁹ asked for 10⁹ sketches."""
    m = StreamedMoments(1, 1)
    table = table_of({"s": m})
    table = table.set_column(1, "head", [pa.array([10**9], pa.int32())])
    with pytest.raises(InterpError, match="it is damaged"):
        merge_tables([table])


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
    monkeypatch.setattr(sys, "argv", ["interp", "stats", "m.pt", "--data", str(tmp_path / "a.txt")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2 and "pickled weights" in capsys.readouterr().err


BAD = {
    b'{"text": "a", "text": "b"}': "the key 'text' is there twice",
    b'{"txt": 1}': "it has no such key",
    b'{"text": null}': "a text expected there",
    b"[1]": "it is no object",
    b'{"text": "w1': "it is not JSON",
    b'{"text": "\\ud800 w1"}': "half of a character",
    b'{"text": "w1 \xff"}': "not UTF-8",
    b'{"text": "w1", "n": ' + b"9" * 5000 + b"}": "digits",
    b'{"text": ' + b"[" * 100_000: "nested too deeply",
    b'{"text": "w1", "x": "' + b"x" * 2**24 + b'"}': "16 MiB in one line",
}


def test_a_bad_document_costs_itself_alone(tmp_path, tiny) -> None:
    """Whatever stands between two good documents, they are counted, and it is named by its line."""
    model = tiny("llama")
    good = b'{"text": "w1 w2 w3 w4"}'
    (tmp_path / "good.jsonl").write_bytes(b"\n".join([good] * (len(BAD) + 1)))
    (tmp_path / "bad.jsonl").write_bytes(b"\n".join([b"".join((good, b"\n", bad)) for bad in BAD] + [good]))
    want = corpus.statistics(model, tmp_path / "good.jsonl", tmp_path / "want", **QUIET)
    found = corpus.statistics(model, tmp_path / "bad.jsonl", tmp_path / "run", **QUIET)
    assert found.outcome is not None and found.outcome.code == 3
    assert (found.documents, found.tokens, found.left_out) == (want.documents, want.tokens, len(BAD))
    pd.testing.assert_frame_equal(found.frame(), want.frame(), rtol=1e-6)  # other parts, so another order of sums
    for number, (error, reason) in enumerate(zip(found.errors, BAD.values(), strict=True), 1):
        assert f"bad.jsonl, line {2 * number}: " in error and reason in error
    (tmp_path / "bad.txt").write_bytes(b"w1 w2 w3 w4\n" * 3 + b"w1 \xff w2\nw1 \0\n" + b"w1 w2 w3 w4\n" * 8)
    found = corpus.statistics(model, tmp_path / "bad.txt", tmp_path / "text", bytes_per_part=30, **QUIET)
    assert found.documents == 11 and [e.split(": ")[0][-6:] for e in found.errors] == ["line 4", "line 5"]
    np.testing.assert_allclose(found.frame()["mean"], want.frame()["mean"], rtol=1e-6)


def test_a_token_that_the_model_lacks_costs_its_window(tmp_path, tiny) -> None:
    ids = np.arange(5, 85)
    np.save(tmp_path / "want.npy", np.concatenate([ids[:20], ids[30:]]))
    ids[25] = -7
    np.save(tmp_path / "alien.npy", ids)
    model = tiny("llama")
    want, found = (
        corpus.statistics(model, tmp_path / f"{n}.npy", tmp_path / n, context=10, **QUIET) for n in ("want", "alien")
    )
    assert found.left_out == 1 and "token 25: -7 is not a token of this model" in found.errors[0]
    assert found.tokens == 70
    pd.testing.assert_frame_equal(found.frame(), want.frame(), rtol=1e-6)


def test_many_bad_documents_are_counted_and_some_named(tmp_path, tiny, monkeypatch, capsys) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "w1 w2"}\n' + "{}\n" * 250)
    found = corpus.statistics(tiny("llama"), tmp_path / "a.jsonl", tmp_path / "run", **QUIET)
    assert (found.documents, found.left_out, len(found.errors)) == (1, 250, 100)


@pytest.mark.parametrize("change", ["truncated", "replaced", "one byte", "longer", "gone"])
def test_a_file_that_changes_during_the_run_ends_it(tmp_path, tiny, change) -> None:
    """The parts that were read before the change stay; the others are left undone, with exit code 4."""
    model, path = tiny("llama"), tmp_path / "a.txt"
    line = f"{'w1 w2 w3':1023}\n"
    content = line * (2 * BLOCK // len(line))
    path.write_text(content)
    forward, n_forwards = type(model).forward, 0
    half = len(content) // 2

    def changing(self, ids):
        nonlocal n_forwards
        n_forwards += 1
        if n_forwards == 2:  # in the second of four parts
            if change == "truncated":
                path.write_text(content[:half])
            elif change == "replaced":
                (tmp_path / "new").write_text(content.replace("w1", "w8"))
                (tmp_path / "new").replace(path)
            elif change == "one byte":
                path.write_text(content[:-2] + "8\n")
            elif change == "longer":
                path.write_text(content + "w1")
            else:
                path.unlink()
        return forward(self, ids)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "forward", changing)
        found = corpus.statistics(model, path, tmp_path / "run", context=8, bytes_per_part=BLOCK // 2, **QUIET)
    assert found.outcome is not None and found.outcome.code == 4
    words = "cannot read" if change == "gone" else "is not the file that this run began with"
    assert words in str(found.outcome)
    assert 1 <= found.outcome.present <= 2 and found.documents * len(line) == found.outcome.present * BLOCK // 2
    path.write_text(content)
    again = corpus.statistics(model, path, tmp_path / "run", context=8, bytes_per_part=BLOCK // 2, **QUIET)
    assert again.outcome is not None and again.outcome.code == 0 and again.documents == len(content) // len(line)


def test_a_part_is_compared_with_the_checksums_before_it_is_used(tmp_path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n" * BLOCK)
    record = record_file(path)
    with open(path, "r+b") as file:
        file.seek(5 * BLOCK + 7)
        file.write(b"X")
    with CheckedFile(path, record.size, record.blocks) as checked:
        assert checked.read(10, 3 * BLOCK) == path.read_bytes()[10 : 3 * BLOCK]
        assert checked.line_number(4 * BLOCK) == BLOCK + 1
        with pytest.raises(ModelError, match="is not the file that this run began with"):
            checked.read(5 * BLOCK - 1, 5 * BLOCK + 1)


def test_one_long_line_takes_little_memory(tmp_path, tiny) -> None:
    """16 MiB in one line: what is held at one time are its bytes, its text and one piece."""
    text = "w1 w2 w3 " * (2**24 // 9 - 10)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    tracemalloc.start()
    pieces = items(tmp_path / "a.jsonl")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "".join(p.content for p in pieces if isinstance(p, Piece)) == text and len(pieces) > 60  # type: ignore[misc]
    assert most < 7 * 2**24, most
