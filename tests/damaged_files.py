"""Damaged copies of every kind of file that interp reads; run as a process whose memory is limited.

    python tests/damaged_files.py FOLDER N

For every file it prints nothing if the reader returns or raises InterpError, and one line otherwise. The last line is
a JSON object: how many files were read, how many refused, seconds and MiB.
"""

from __future__ import annotations

import base64
import json
import random
import re
import resource
import signal
import struct
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parent / "plots"))
import plots_synthetic as synthetic

from interp.circuits import Circuit
from interp.circuits.learned.head_gates import HeadGates
from interp.circuits.weights.channels import Channels
from interp.corpus.checked import CheckedFile
from interp.corpus.reading import describe_file, documents
from interp.errors import InterpError
from interp.plots.report import Report, embedded_json, report
from interp.prompts.files import read_prompts, read_texts
from interp.results.attention_patterns import AttentionPatterns
from interp.results.attention_stats import AttentionStats
from interp.results.effects import Effects
from interp.sweep.config import read_config

GIB = 2**30
SECONDS = 5  # that one file may take
ODD: list[Any] = [
    10**12, 2**63, -1, 0, 1e308, float("nan"), float("inf"), None, True, "", "x", "9" * 5000, [], {}, [[]], [10**9] * 3,
    {"dtype": "float64", "store": "uint8", "shape": [10**9], "data": ""}, "\ud800",
]  # fmt: skip
NUMBERS = ["9" * 5000, "1e999", "NaN", "-1", str(2**63), "1" + "0" * 12, "0.5", "null", '"x"', "[" * 50_000, "{}"]


def read_corpus(path: Path) -> None:
    record = describe_file(path)
    with CheckedFile(path, record.size, record.blocks) as file:
        for _ in documents(file, 0, record.size):
            pass


READERS: dict[str, Callable[[Path], Any]] = {
    "effects.parquet": Effects.read,
    "attention.parquet": AttentionStats.read,
    "patterns.parquet": AttentionPatterns.read,
    "gates.parquet": HeadGates.read,
    "channels.parquet": Channels.read,
    "circuit.json": Circuit.read,
    "page.html": Report.read,
    "sweep.toml": read_config,
    "pairs.csv": read_prompts,
    "facts.jsonl": read_prompts,
    "texts.txt": read_texts,
    "corpus.jsonl": read_corpus,
    "tokens.npy": read_corpus,
}


def write_files(folder: Path) -> None:
    """Write one good file of each kind."""
    effects = Effects(synthetic.head_effects(1).frame().head(40), synthetic.PROVENANCE)
    stats, patterns = synthetic.attention(1), synthetic.patterns(1, layers=2, heads=2)
    stats = AttentionStats(stats.tokens, {k: [a[:2, :2] for a in v] for k, v in stats.values.items()}, {0: "blocked"})
    effects.write(folder / "effects.parquet")
    stats.write(folder / "attention.parquet")
    patterns.write(folder / "patterns.parquet")
    gates = np.linspace(0, 1, 24).reshape(2, 3, 4)
    HeadGates({"start": gates, "plus": gates, "minus": gates}, [0, 1, 2], {"model": "m"}).write(
        folder / "gates.parquet"
    )
    firings = pd.DataFrame({"layer": [0, 1], "head": [1, 0], "channel": ["q", "k"], "score": [0.5, np.nan]})
    Channels(firings, {"model": "m"}).write(folder / "channels.parquet")
    circuit = synthetic.circuit(20)
    circuit.write(folder / "circuit.json")
    report(effects, stats, patterns, circuit, synthetic.curve(), "prose").write(folder / "page.html")
    (folder / "sweep.toml").write_text(
        'name = "first"\nseeds = [0, 1]\nexamples_per_part = 4\n[[models]]\nload = "m"\n[[tasks]]\ntask = "ioi"\n'
        'n = 8\nrequire = 0.5\n[[recipes]]\nrecipe = "patch"\nmode = "noise"\n[[sites]]\nsites = "z"\nlayers = "0-1"\n'
    )
    (folder / "pairs.csv").write_text('clean,corrupt,answer,foil\n"a, b",c, d, e\nf,g, h,\n' * 2)
    fact = {"prompt": "The Eiffel Tower is in", "subject": "The Eiffel Tower", "answer": " Paris"}
    pair = {"clean": "a b", "corrupt": "a c", "answer": " d", "spans": {"x": "b"}}
    (folder / "facts.jsonl").write_text(f"{json.dumps(fact)}\n{json.dumps(pair)}\n")
    (folder / "texts.txt").write_text("one\ntwo\n")
    (folder / "corpus.jsonl").write_text('{"text": "one", "n": 1}\n{"text": "two", "m": [1, {"a": 2}]}\n' * 5)
    np.save(folder / "tokens.npy", np.arange(200, dtype=np.uint16))


# ---- mutations -------------------------------------------------------------------------------------------


def flip(content: bytes, rng: random.Random) -> bytes:
    out = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def cut(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content))
    return content[:at] if rng.random() < 0.7 else content[at:]


def splice(content: bytes, rng: random.Random) -> bytes:
    a, b, c = (rng.randrange(len(content)) for _ in range(3))
    n = rng.choice((1, 4, 16, 256))
    return content[:a] + content[b : b + n] + content[a + (0 if rng.random() < 0.5 else n) :][: 4 * len(content) + c]


def blow_up(content: bytes, rng: random.Random) -> bytes:
    """Replace a number: of digits in a text, or of four or eight bytes."""
    digits = list(re.finditer(rb"\d+", content))
    if digits and rng.random() < 0.7:
        match = rng.choice(digits)
        return content[: match.start()] + rng.choice(NUMBERS).encode() + content[match.end() :]
    at, n = rng.randrange(len(content)), rng.choice((4, 8))
    return content[:at] + rng.choice((b"\xff" * n, b"\xff" * (n - 1) + b"\x7f", bytes(n))) + content[at + n :]


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The path of every value inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(p for k, v in items for p in places(v, (*path, k)))]


def odd_value(data: Any, rng: random.Random, paths: list[tuple] | None = None) -> str:
    """A JSON text in which one value is replaced, left out or there twice."""
    path = rng.choice(places(data)[1:] if paths is None else paths)
    data = json.loads(json.dumps(data))
    parent = data
    for step in path[:-1]:
        parent = parent[step]
    way = rng.random()
    if way < 0.1:
        del parent[path[-1]]
    elif way < 0.15:
        return json.dumps(data).replace(f'"{path[-1]}":', f'"{path[-1]}": 1, "{path[-1]}":', 1)
    elif way < 0.2:
        parent[path[-1]] = "DEEP"
        return json.dumps(data).replace('"DEEP"', "[" * 50_000 + "]" * 50_000)
    else:
        parent[path[-1]] = rng.choice(ODD)
    return json.dumps(data)


BYTES = (flip, cut, splice, blow_up)
JSON = ("circuit.json", "page.html", ".parquet")


class Damage:
    """Makes damaged copies of the files of a folder."""

    def __init__(self, folder: Path):
        self.good = {name: (folder / name).read_bytes() for name in READERS}
        page = self.good["page.html"].decode()
        self.data = json.loads(text := embedded_json(page))
        self.before, self.after = page.split(text)
        self.page_places = places(self.data)[1:]
        self.tables = {name: pq.read_table(folder / name) for name in READERS if name.endswith(".parquet")}

    def damaged(self, name: str, rng: random.Random, target: Path) -> None:
        """Write a damaged copy of one file to ``target``."""
        by_value = rng.random() < 0.6
        if name == "page.html":
            if by_value:
                inner = odd_value(self.data, rng, self.page_places)
            else:
                inner = rng.choice(BYTES)(json.dumps(self.data).encode(), rng).decode("latin-1")
            target.write_text(self.before + inner + self.after, encoding="utf-8", errors="surrogatepass")
        elif name == "circuit.json" and by_value:
            target.write_text(odd_value(json.loads(self.good[name]), rng), encoding="utf-8", errors="surrogatepass")
        elif name.endswith(".parquet") and by_value:
            self._table(name, rng, target)
        else:
            target.write_bytes(rng.choice(BYTES)(self.good[name], rng))

    def _table(self, name: str, rng: random.Random, target: Path) -> None:
        """Write a good Parquet file with odd contents: its header, a column, or its rows."""
        table = self.tables[name]
        metadata = dict(table.schema.metadata)
        way = rng.random()
        if way < 0.5:
            key = rng.choice([k for k in metadata if k != b"ARROW:schema"])
            metadata[key] = odd_value(json.loads(metadata[key]), rng).encode("utf-8", "surrogatepass")
        else:
            column = rng.randrange(table.num_columns)
            label = table.column_names[column]
            if way < 0.6:
                table = table.drop_columns([label])
            elif way < 0.8:
                odd = rng.choice([[None], [2**62], ["x"], [b"\xff\x00"], [[1, 2]], [1e308], [True]])
                table = table.set_column(column, label, [odd * table.num_rows])
            elif way < 0.9:
                table = table.take(np.array([rng.randrange(table.num_rows) for _ in range(rng.choice((0, 1, 7)))], int))
            else:
                table = table.append_column(label, table.column(column))
        pq.write_table(table.replace_schema_metadata(metadata), target)


def read_all(folder: Path, n: int) -> dict[str, Any]:
    """Read ``n`` damaged files; print those that end otherwise than well or with InterpError."""
    damage = Damage(folder)
    for name, reader in READERS.items():
        reader(folder / name)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    counts = {"read": 0, "refused": 0, "wrong": 0}
    used, longest = time.process_time(), 0.0
    for number in range(n):
        name = list(READERS)[number % len(READERS)]
        rng = random.Random(number)
        target = folder / f"damaged{Path(name).suffix}"
        damage.damaged(name, rng, target)
        signal.alarm(SECONDS)
        start = time.process_time()
        try:
            READERS[name](target)
            counts["read"] += 1
        except InterpError as error:
            counts["refused"] += 1
            if target.name not in str(error):
                print(f"{number} {name}: the message lacks the file's name: {error!s:.300}")
        except Exception as error:
            counts["wrong"] += 1
            print(f"{number} {name}: {type(error).__name__}: {error!s:.300}")
        finally:
            signal.alarm(0)
        longest = max(longest, time.process_time() - start)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    return {**counts, "seconds": time.process_time() - used, "longest": longest, "MiB": grown // 1024}


def zeros(n_bytes: int, dtype: str = "uint8") -> dict[str, Any]:
    """A packed array of zeros."""
    packer, blocks = zlib.compressobj(9), []
    blocks += [packer.compress(bytes(2**20)) for _ in range(n_bytes // 2**20)]
    data = base64.b64encode(b"".join([*blocks, packer.flush()])).decode()
    return {"dtype": dtype, "store": "uint8", "shape": [n_bytes], "data": data}


def bombs(folder: Path) -> Iterator[Path]:
    """Write small files whose contents are large, one after the other under the same names."""
    damage = Damage(folder)

    def page(change: Callable[[dict[str, Any]], None]) -> Path:
        data = json.loads(json.dumps({r["kind"]: r for r in damage.data["results"]}))
        change(data)
        results = json.dumps({**damage.data, "results": list(data.values())})
        (folder / "bomb.html").write_text(damage.before + results + damage.after)
        return folder / "bomb.html"

    n = 2**28
    yield page(lambda r: r["curve"]["arrays"].update(values=zeros(n)))
    yield page(lambda r: r["curve"]["arrays"].update(values=zeros(2**25, "float64")))
    yield page(lambda r: r["curve"]["arrays"]["values"].update(shape=[10**12]))
    yield page(lambda r: r["circuit"]["architecture"].update(n_layers=100_000))
    yield page(lambda r: r["effects"].update(rows=10**12))
    yield page(lambda r: r["effects"]["table"]["clean"].update(shape=[]) or r["effects"].update(rows=10**9))
    long = {"values": ["x" * 10**6], "index": zeros(2**24)}
    yield page(lambda r: r["effects"]["table"].update(token=long))
    yield page(lambda r: r["patterns"]["examples"][0].update(edges=zeros(2**20)))
    header = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sIIBBBBB", 13, b"IHDR", 2**14 - 1, 2**14, 8, 0, 0, 0, 0) + bytes(4)
    body = base64.b64decode(zeros(n)["data"])
    png = base64.b64encode(header + struct.pack(">I", len(body)) + b"IDAT" + body).decode()
    yield page(lambda r: r["patterns"]["examples"][0]["runs"]["clean"]["maps"][0].update(sheets=[png]))
    yield page(lambda r: r["patterns"]["examples"][0]["runs"]["clean"]["received"].update(data=zeros(2**25), top=[1]))

    effects = damage.tables["effects.parquet"]
    target = folder / "bomb.parquet"
    many = effects.take(np.zeros(3_000_000, int))
    pq.write_table(many, target, compression="zstd")
    yield target
    del many
    token = effects.column_names.index("token")
    rows = effects.take(np.zeros(100_000, int))
    pq.write_table(rows.set_column(token, "token", _repeated(len(rows))), target)
    yield target
    circuit = json.loads(damage.good["circuit.json"])
    circuit["architecture"]["n_layers"] = 100_000
    (folder / "bomb.json").write_text(json.dumps(circuit))
    yield folder / "bomb.json"
    with open(folder / "bomb.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": (10**12,)})
    yield folder / "bomb.npy"


def _repeated(n: int) -> pa.Array:
    """One text of a million letters, n times, without its being in memory n times."""
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(n, np.int32)), pa.array(["x" * 10**6]))


def read_bombs(folder: Path) -> dict[str, Any]:
    """Read every bomb; print those that are not refused. Returns how many there were, and MiB."""
    readers = {".html": Report.read, ".parquet": Effects.read, ".json": Circuit.read, ".npy": read_corpus}
    n, most = 0, 0
    for n, path in enumerate(bombs(folder), 1):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            readers[path.suffix](path)
            print(f"bomb {n} {path.name} of {path.stat().st_size:,} bytes was read")
        except InterpError as error:
            if path.name not in str(error):
                print(f"bomb {n}: the message lacks the file's name: {error!s:.300}")
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
        most = max(most, grown)
    return {"bombs": n, "bombs_MiB": most}


def virtual_memory() -> int:
    """Bytes of address space of this process."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    write_files(Path(sys.argv[1]))
    most = virtual_memory() + 2 * GIB
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    found = read_all(Path(sys.argv[1]), int(sys.argv[2]))
    print(json.dumps({**found, **read_bombs(Path(sys.argv[1]))}))
