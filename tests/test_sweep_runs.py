"""Sweeps of real (tiny, float64) models: what recipes give, whichever way a sweep is cut, carried out and disturbed."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import sweep_light as light

import interp
from interp.cli import main as cli
from interp.doctor.families.text import tiny_hf
from interp.errors import InterpError
from interp.metrics import METRICS, Metric
from interp.prompts.files import read_prompts
from interp.sweep.table import as_frame

CONFIG = """
name = "tiny"
examples_per_part = {size}
[[models]]
load = "{folder}/m"
name = "m"
dtype = "float64"
[[tasks]]
pairs = "pairs.jsonl"
require = 0
{recipes}
[[sites]]
sites = "z,resid_pre@1"
"""
ALL = {
    "patch": 'mode = "noise"', "mediate": "", "ablate": 'using = "mean"',
    "path_patch": "senders = 'z.L0H1,mlp_out.L0'\nreceivers = 'q.L1H0, logits'",
    "peek": 'context = "mean"\nlayers = "0"', "leave_out": "", "knock_out": 'keys = "name"', "trace": "window = 2",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory, word_tokenizer):
    path = tmp_path_factory.mktemp("sweeps")
    tiny_hf("llama").save_pretrained(path / "m")
    word_tokenizer.save_pretrained(path / "m")
    rng = np.random.default_rng(0)
    pairs = []
    for i in range(7):
        words = [f"w{k}" for k in (1, *rng.integers(90, size=4 if i % 3 else 5))]
        other = [words[0], words[1], f"w{rng.integers(90)}", *words[3:]]
        answers = {"answer": f"w{95 + i % 2}", "foil": "w94"}
        pairs.append({"clean": " ".join(words), "corrupt": " ".join(other), **answers, "spans": {"name": words[2]}})
    (path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    facts = ["prompt,subject,answer", *(f"w1 w{i} w{i + 30} w8,w{i},w95" for i in range(2, 6))]
    (path / "facts.csv").write_text("\n".join(facts))
    return path


@pytest.fixture(scope="module")
def model(folder):
    return interp.load(str(folder / "m"), dtype="float64")


def sweep(
    folder, root, model=None, size: int = 3, recipes: dict[str, str] | None = None, **replace: str
) -> interp.Sweep:
    chosen = ALL if recipes is None else recipes
    tables = "\n".join(f'[[recipes]]\nname = "{n}"\nrecipe = "{n.split()[0]}"\n{o}' for n, o in chosen.items())
    text = CONFIG.format(size=size, folder=folder, recipes=tables)
    for old, new in replace.items():
        text = text.replace({"prompts": 'pairs = "pairs.jsonl"', "sites": '"z,resid_pre@1"'}[old], new)
    if not ({"patch", "mediate", "ablate"} & {n.split()[0] for n in chosen}):
        text = text.partition("[[sites]]")[0]
    (folder / f"{root.name}.toml").write_text(text)
    return interp.Sweep(folder / f"{root.name}.toml", root, models=None if model is None else {"m": model})


def run(one: interp.Sweep, **options):
    return one.run(**{"executor": "in-process", "show": "none", **options})


def test_parts_give_what_the_recipe_gives_on_the_whole_set(folder, tmp_path, model) -> None:
    pairs = read_prompts(folder / "pairs.jsonl")
    sites = model.sites("z") | model.sites("resid_pre", positions=1)
    # no ablation by "position_mean" or "peek" with means: these need prompts of one template
    recipes = {**ALL, "ablate r": 'using = "resample"', "peek": 'context = "keep"'}
    one = sweep(folder, tmp_path / "whole", model, recipes=recipes)
    assert run(one).code == 0
    want = {
        "patch": interp.patch(model, pairs, sites, mode="noise"),
        "mediate": interp.mediate(model, pairs, sites),
        "ablate": interp.ablate(model, pairs, sites, using="mean"),
        "ablate r": interp.ablate(model, pairs, sites, using="resample"),
        "path_patch": interp.path_patch(model, pairs, ["z.L0H1", "mlp_out.L0"], ["q.L1H0", "logits"]),
        "peek": interp.peek(model, pairs, context="keep"),
        "leave_out": interp.leave_out(model, pairs),
        "knock_out": interp.knock_out(model, pairs, "name"),
        "trace": interp.trace(model, pairs, window=2),
    }
    got = {title.split(" · ")[2]: effects for title, effects in one.effects().items()}
    assert set(got) == set(want)
    for name, effects in want.items():
        a, b = got[name].frame(), effects.frame()
        keys = ["example", "component", "layer", "head", "position", "sender", "token", "role", "intervention"]
        assert a[keys].equals(b[keys]), name
        for column in ("clean", "corrupt", "patched", "effect", "raw"):
            np.testing.assert_allclose(a[column], b[column], rtol=1e-9, atol=1e-11, err_msg=name)
        assert got[name].provenance["weights"] == model.fingerprint() and got[name].provenance["dtype"] == "float64"


def test_noise_on_facts_does_not_depend_on_the_cut(folder, tmp_path, model) -> None:
    facts = {"trace": "samples = 2"}
    frames = []
    for size in (1, 3):
        one = sweep(folder, tmp_path / f"cut{size}", model, size, facts, prompts='pairs = "facts.csv"')
        assert run(one).code == 0
        (effects,) = one.effects().values()
        frames.append(effects.frame())
    want = interp.trace(model, read_prompts(folder / "facts.csv"), samples=2).frame()
    for frame in frames:
        np.testing.assert_allclose(frame["patched"], want["patched"], rtol=1e-9)


def test_executors_agree_to_the_bit_and_in_float32_nearly(folder, tmp_path, model, monkeypatch) -> None:
    from interp.engine import matmul as products

    recipes = {"patch": "", "ablate": 'using = "resample"'}
    sweep(folder, tmp_path / "both", recipes=recipes)
    text = (folder / "both.toml").read_text()
    second_model = f'[[models]]\nload = "{folder}/m"\nname = "single"\ndtype = "float32"\n[[tasks]]'
    (folder / "both.toml").write_text(text.replace("[[tasks]]", second_model))
    first, second, third = (interp.Sweep(folder / "both.toml", tmp_path / n) for n in ("in", "local", "other"))
    assert run(first).code == 0
    assert run(second, executor="local", workers=2, shard=(0, 2)).code == 0
    assert run(second, shard=(1, 2)).code == 0
    monkeypatch.setattr(products, "is_onednn_faster", lambda threads: False)
    assert run(third, threads=2).code == 0  # another number of threads, and perhaps another library's products
    tables = [as_frame(one.dataset().to_table()) for one in (first, second, third)]
    half = len(tables[0]) // 2
    assert (tables[0]["model"][:half] == "m").all() and (tables[0]["model"][half:] == "single").all()
    want = light.contents(first.store)
    assert len(want) == 12
    doubles = list(want)[:6]
    assert [light.contents(second.store)[n] for n in doubles] == [want[n] for n in doubles]
    for other in tables[1:]:
        for column in ("clean", "corrupt", "patched"):  # what the documentation promises in float32
            np.testing.assert_allclose(other[column][half:], tables[0][column][half:], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_ray_agrees_to_the_bit_and_survives_the_loss_of_an_actor_and_of_a_node(folder, tmp_path, model) -> None:
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'interp[ray]'")
    from ray.cluster_utils import Cluster as Nodes

    recipes = {"patch": "", "ablate": 'using = "resample"'}
    want = sweep(folder, tmp_path / "in", model, size=1, recipes=recipes)
    assert run(want).code == 0
    one = sweep(folder, tmp_path / "ray", size=1, recipes=recipes)
    nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    spot = nodes.add_node(num_cpus=1)
    try:
        from interp.jobs.executors.ray import Cluster

        ray.init(address=nodes.address, log_to_driver=False)
        done, events = [], []
        store = one.create()

        def watch(event: dict) -> None:
            events.append(event)
            if event["event"] == "done":
                done.append(event["part"])
                if len(done) == 2:
                    ray.kill(cluster.actors[event["worker"]])
                if len(done) == 4:  # taken back; another one comes
                    nodes.remove_node(spot, allow_graceful=False)
                    nodes.add_node(num_cpus=1)

        cluster = Cluster(ray, store, watch, lambda: False, 1, 0)
        assert cluster.run(range(store.n_parts), 2) == {}  # of two workers one never has room, and gets no part
        assert sorted(done) == list(range(store.n_parts)) and sum(e["event"] == "died" for e in events) >= 2
        ray.shutdown()
        store.path(3).unlink()
        assert run(one, executor="ray", address=nodes.address, workers=1).code == 0  # joins the cluster that is there
    finally:
        ray.shutdown()
        nodes.shutdown()
    assert light.contents(one.store) == light.contents(want.store)


def test_cells_that_fail_are_recorded_and_the_rest_goes_on(folder, tmp_path, model, monkeypatch) -> None:
    lines = (folder / "pairs.jsonl").read_text().splitlines()
    bad = json.loads(lines[1])
    bad["corrupt"] += " w3 w4"
    (folder / "some.jsonl").write_text("\n".join([lines[0], json.dumps(bad), *lines[2:]]))
    answer = model.coder.continuation("w96")[0]
    calls = []

    def odd(logits, read):
        calls.append(len(logits))
        if bool((read.answer == answer).any()) and len(calls) % 2:
            raise ValueError("a metric with a flaw")
        values = logits[:, 3].clone()
        values[logits[:, 3] > logits[:, 4]] = float("nan")
        return values

    monkeypatch.setitem(METRICS, "rank", Metric("rank", odd))
    recipes = {"patch": 'metric = "rank"', "mediate": 'metric = "logprob"'}
    one = sweep(folder, tmp_path / "odd", model, recipes=recipes, prompts='pairs = "some.jsonl"')
    outcome = run(one)
    failures = one.failures()
    assert outcome.code == 3 and outcome.failed == len(failures) > 0 and outcome.present == outcome.parts
    whole = failures[failures["component"].isna()]
    assert set(whole[whole["recipe"] == "mediate"]["example"]) == {1}
    assert whole[whole["example"] == 1]["error"].str.contains("different lengths").all()
    assert failures["error"].str.contains("flaw").any() and failures["error"].str.contains("is NaN").any()
    good = next(e for t, e in one.effects().items() if "mediate" in t)
    assert set(good.frame()["example"]) == {0, 2, 3, 4, 5, 6}
    monkeypatch.setitem(METRICS, "rank", interp.metrics.rank)
    assert run(one, retry_failed=True).failed == len(whole[whole["example"] == 1])


def test_out_of_memory_halves_the_examples(folder, tmp_path, model, monkeypatch) -> None:
    def greedy(logits, read):
        if len(logits) > 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 bytes")
        return METRICS["logprob"](logits, read)

    want, one = (sweep(folder, tmp_path / n, model, recipes={"patch": 'metric = "prob"'}) for n in ("all", "halved"))
    with monkeypatch.context() as patched:
        patched.setitem(METRICS, "prob", Metric("prob", METRICS["logprob"].fn))
        assert run(want).code == 0
        patched.setitem(METRICS, "prob", Metric("prob", greedy))
        assert run(one).code == 0
    notes = [json.loads(p.read_text()) for p in (one.root / "receipts").iterdir()]
    assert max(n.get("halved", 0) for n in notes) == 2
    a, b = (as_frame(s.dataset().to_table()) for s in (one, want))
    np.testing.assert_allclose(a["patched"], b["patched"], rtol=1e-10)


def test_a_model_that_does_not_do_the_task_is_marked(folder, tmp_path, model) -> None:
    one = sweep(folder, tmp_path / "ioi", model, recipes={"patch": ""}, prompts='task = "ioi"\nn = 4')
    outcome = run(one)
    assert outcome.code == 3 and outcome.failed == 4
    assert one.failures()["error"].str.contains("ioi needs at least 4 first names").all()
    assert "will be marked as failed" in str(one.plan())
    undone = sweep(folder, tmp_path / "undone", model, recipes={"patch": ""})
    text = (folder / "undone.toml").read_text().replace("require = 0", "require = 1.0")
    undone = interp.Sweep(text.replace("pairs.jsonl", str(folder / "pairs.jsonl")), tmp_path / "u", models={"m": model})
    assert run(undone).code == 3 and undone.failures()["error"].str.contains("does not do the task").all()
    missing = sweep(folder, tmp_path / "missing", recipes={"patch": ""})
    missing.config.models[0].__dict__["load"] = str(folder / "nowhere")
    outcome = run(missing)
    assert outcome.code == 4 and "left undone" in str(outcome)


def test_other_weights_are_refused(folder, tmp_path, model) -> None:
    import torch

    one = sweep(folder, tmp_path / "w", model, recipes={"patch": ""})
    run(one)
    one.store.path(1).unlink()
    hf = tiny_hf("llama")
    with torch.no_grad():
        next(iter(hf.parameters())).mul_(1.5)
    other = interp.load(hf, tokenizer=model.tokenizer)
    outcome = run(interp.Sweep.open(tmp_path / "w", models={"m": other}))
    assert outcome.code == 4 and "has other weights than when this run began" in str(outcome)


def test_the_verbs(folder, tmp_path, model, monkeypatch, capsys) -> None:
    one = sweep(folder, tmp_path / "v", model, recipes={"patch": ""})
    run(one)
    root, config = str(tmp_path / "v"), str(folder / "v.toml")

    def call(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["interp", "sweep", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        caught = capsys.readouterr()
        return int(ended.value.code or 0), caught.out + caught.err

    code, said = call("resume", root, "--executor", "in-process", "--log", "json")
    assert code == 0 and json.loads(said.splitlines()[-1])["event"] == "end"
    code, said = call("status", root, "--verify")
    assert code == 0 and "3 of 3 parts" in said
    one.store.path(1).write_bytes(b"PAR1")
    code, said = call("status", root, "--json")
    assert code == 1 and "1" in json.loads(said)["damaged"]
    unraisable: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    code, said = call("export", root, str(tmp_path / "damaged.parquet"))
    gc.collect()  # a writer that was left open would now write to the closed file
    assert code == 2 and "part" in said and not unraisable and not (tmp_path / "damaged.parquet").exists()
    assert run(one).damaged
    for name in ("t.parquet", "t.csv", "t.html"):
        code, said = call("export", root, str(tmp_path / name))
        assert code == 0 and (tmp_path / name).stat().st_size > 1000
    import pandas as pd

    assert len(pd.read_csv(tmp_path / "t.csv")) == len(pd.read_parquet(tmp_path / "t.parquet")) == one.status().rows
    assert call("export", root, str(tmp_path / "t.xls"))[0] == 2
    (folder / "v.toml").write_text(
        (folder / "v.toml").read_text().replace("examples_per_part = 3", "examples_per_part = 2")
    )
    code, said = call("run", config, "-o", root)
    assert code == 2 and "examples_per_part: 3 → 2" in said
    code, said = call("plan", config)
    assert code == 0 and "cells in 4 parts" in said and "memory about" in said
    for words, wanted in (
        (("run", config, "--shard", "3"), "i/n expected"),
        (("run", config, "-o", str(tmp_path / "x"), "--executor", "slurm"), "unknown executor"),
        (("run", config, "-o", str(tmp_path / "x"), "--address", "a:1"), "belongs to executor 'ray'"),
        (("run", config, "-o", config), "is not a folder"),
        (("resume", str(tmp_path)), "not a run directory"),
    ):
        code, said = call(*words)
        assert code == 2 and wanted in said
    with pytest.raises(InterpError, match="no column 'heads'"):
        one.table(by=["heads"])


def test_the_table_is_read_lazily_by_duckdb_and_pyarrow(folder, tmp_path, model) -> None:
    one = sweep(folder, tmp_path / "q", model, recipes={"patch": ""})
    run(one)
    table = one.table(by=["layer", "head"])
    (effects,) = one.effects().values()
    want = effects.frame().groupby(["layer", "head"], dropna=False)["effect"].mean().reset_index()
    got = table.merge(want, on=["layer", "head"], suffixes=("", "_want"))
    np.testing.assert_allclose(got["effect"], got["effect_want"], rtol=1e-5)
    duckdb = pytest.importorskip("duckdb", reason="DuckDB is not installed")
    line = f"SELECT layer, head, avg(effect) FROM '{one.root}/parts/*.parquet' GROUP BY ALL ORDER BY ALL"
    assert len(duckdb.sql(line).fetchall()) == len(table)


def test_half_precision_and_a_device_map(folder, tmp_path) -> None:
    """On the CPU; the same path leads to several GPUs."""
    for options in ('dtype = "bfloat16"', 'dtype = "float64"\ndevice_map = {"" = "cpu"}'):
        sweep(folder, tmp_path / f"d{len(options)}", recipes={"patch": ""})
        text = (folder / f"d{len(options)}.toml").read_text().replace('dtype = "float64"', options)
        (folder / "map.toml").write_text(text)
        one = interp.Sweep(folder / "map.toml", tmp_path / f"d{len(options)}")
        assert run(one).code == 0
        (effects,) = one.effects().values()
        assert effects.provenance["dtype"] == options.split('"')[1]


def test_a_run_of_the_first_schema_still_opens() -> None:
    """Made when that schema was new, and kept: `tests/data/run_v1`."""
    one = interp.Sweep.open(Path(__file__).parent / "data" / "run_v1")
    assert not list(one.store.verify(range(2)))
    (effects,) = one.effects().values()
    assert len(effects) == 24 and effects.provenance["dtype"] == "float64"
    assert one.table(by=["layer"])["n"].sum() == 24
