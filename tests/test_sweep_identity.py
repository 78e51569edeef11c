"""Parts of one run belong together: merge, resume, table and verify compare weights, dtype, prompts and config."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import sweep_light as light

import interp
from interp.cli import main as cli
from interp.doctor.families.text import tiny_hf
from interp.errors import InterpError
from interp.jobs.audit import Audit
from interp.jobs.driver import Options, drive
from interp.jobs.merge import merge
from interp.jobs.store import Store

CONFIG = {
    "name": "tiny", "examples_per_part": 1, "models": [{"load": "m", "name": "m"}],
    "tasks": [{"pairs": "pairs.jsonl", "require": 0}], "recipes": [{"recipe": "patch"}], "sites": [{"sites": "z"}],
}  # fmt: skip
PAIRS = [(f"w1 w{i} w3", f"w1 w{i + 40} w3") for i in range(2, 6)]


@pytest.fixture(scope="module")
def models(word_tokenizer):
    """The same architecture with its weights, other weights, and the same weights in float32."""
    import torch

    first, other, single = tiny_hf("llama"), tiny_hf("llama"), tiny_hf("llama")
    with torch.no_grad():
        next(iter(other.parameters())).mul_(1.5)
    loaded = {"first": first.double(), "other": other.double(), "single": single.float()}
    return {name: interp.load(hf, tokenizer=word_tokenizer) for name, hf in loaded.items()}


@pytest.fixture
def make(tmp_path, models, monkeypatch):
    """Runs of the config, by folder and model."""
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"clean": c, "corrupt": d, "answer": "w95", "foil": "w96"}) for c, d in PAIRS]
    Path("pairs.jsonl").write_text("\n".join(lines))

    def sweep(folder: str, model: str = "first", **changes) -> interp.Sweep:
        return interp.Sweep({**CONFIG, **changes}, folder, models={"m": models[model]})

    return sweep


def run(one: interp.Sweep, **options):
    return one.run(**{"executor": "in-process", "show": "none", **options})


def command(capsys, monkeypatch, *words: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["interp", "sweep", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    caught = capsys.readouterr()
    return int(ended.value.code or 0), caught.out + caught.err


@pytest.mark.parametrize(("model", "words"), [("other", "other weights"), ("single", "another dtype")])
def test_shards_of_different_models_are_not_merged(make, model, words, capsys, monkeypatch) -> None:
    a, b = make("a"), make("b", model)
    assert run(a, shard=(0, 2)).code == run(b, shard=(1, 2)).code == 0
    code, text = command(capsys, monkeypatch, "merge", "a", "b")
    assert code == 2 and words in text and "Nothing was copied" in text
    assert sorted(a.status().present) == [0, 2]
    with pytest.raises(InterpError, match=words):
        merge(Store.open(shutil.copytree("a", "c")), [b.store])
    shutil.rmtree("c/parts")
    shutil.rmtree("c/prompts")  # an empty copy that has neither is given both
    with pytest.raises(InterpError, match=words):
        merge(Store.open("c"), [a.store, b.store])
    assert not Path("c/parts").exists()


@pytest.mark.parametrize(("model", "words"), [("other", "other weights"), ("single", "another dtype")])
def test_a_run_that_holds_parts_of_two_models_is_reported_and_mended(make, model, words, capsys, monkeypatch) -> None:
    whole, a, b = make("whole"), make("a"), make("b", model)
    assert [run(x).code for x in (whole, a, b)] == [0, 0, 0]
    for folder in ("parts", "receipts"):  # as the merge of an earlier version did
        for path in Path("a", folder).glob("000001*"):
            path.unlink()
        for path in Path("b", folder).glob("000001*"):
            shutil.copy(path, Path("a", folder))
    assert a.status().damaged == {}
    code, text = command(capsys, monkeypatch, "status", "a", "--verify")
    assert code == 1 and "part 1 is damaged" in text and words in text
    for read in (a.table, a.dataset, a.effects, a.failures, lambda: a.export("t.csv")):
        with pytest.raises(InterpError, match=f"000001.parquet does not belong to this run: .*{words}"):
            read()
    outcome = run(a)
    assert outcome.code == 0 and list(outcome.damaged) == [1]
    assert light.contents(a.store) == light.contents(whole.store)


def test_a_run_is_not_resumed_in_another_dtype(make) -> None:
    one = make("one")
    run(one)
    one.store.path(2).unlink()
    outcome = run(make("one", "single"))
    assert outcome.code == 4 and "is loaded in float32, and was in float64 when this run began" in str(outcome)
    Path(next(Path("one/prompts").glob("*.json"))).unlink()  # without the prompts, what the parts say decides
    outcome = run(make("one", "other"))
    assert outcome.code == 4 and "other weights" in str(outcome) and "finished parts were computed with" in str(outcome)
    assert not list(Path("one/prompts").glob("*.json"))
    assert run(make("one")).code == 0 and not list(Audit(one.store).failures(range(4)))


def test_other_tokens_of_the_same_prompts_are_refused(make, models, monkeypatch) -> None:
    from dataclasses import replace

    one = make("one")
    run(one)
    one.store.path(2).unlink()
    coder = models["first"].coder
    monkeypatch.setattr(
        type(models["first"]), "coder", property(lambda self: replace(coder, encode=lambda t: [1, *coder.encode(t)]))
    )
    outcome = run(make("one"))
    assert outcome.code == 4 and "turns the prompts into other token ids" in str(outcome)


@pytest.mark.parametrize("how", ["altered", "torn", "a link"])
def test_frozen_prompts_that_were_changed_are_not_used(make, how) -> None:
    whole, one = make("whole"), make("one")
    assert run(whole).code == run(one).code == 0
    (path,) = Path("one/prompts").glob("*.json")
    content = path.read_bytes()
    if how == "a link":
        path.rename("elsewhere.json")
        path.symlink_to(Path("elsewhere.json").resolve())
    else:
        path.write_bytes(content.replace(b"w42", b"w77") if how == "altered" else content[:100])
    one.store.path(2).unlink()
    outcome = run(one)
    assert outcome.code == 0 and not outcome.damaged and "is put aside as damaged/" in str(outcome)
    assert light.contents(one.store) == light.contents(whole.store) and path.read_bytes() == content


def test_an_altered_prompt_file_of_a_complete_run_is_reported(make, capsys, monkeypatch) -> None:
    one = make("one")
    run(one)
    (path,) = Path("one/prompts").glob("*.json")
    altered = path.read_bytes().replace(b"w42", b"w77")
    path.write_bytes(altered)
    code, text = command(capsys, monkeypatch, "status", "one", "--verify")
    assert code == 1 and f"prompts/{path.name} cannot be used: its contents do not match their checksum" in text
    assert path.read_bytes() == altered and len(one.table()) == 12  # the parts are good
    outcome = run(one)
    assert outcome.code == 0 and not outcome.damaged and "put aside" in str(outcome)


@pytest.mark.parametrize("how", ["run", "resume"])
def test_a_torn_config_and_a_torn_copy_of_prompts_are_mended(make, how) -> None:
    whole, one = make("whole"), make("one")
    assert run(whole).code == run(one).code == 0
    header = json.loads(Path("one/run.json").read_text())
    Path("one/run.json").write_text('{"kind": "sweep", "sch')
    (copy,) = Path("one/inputs").iterdir()
    (frozen,) = Path("one/prompts").glob("*.json")
    one.store.path(2).unlink()
    if how == "run":  # the prompts have to be made again, from the file next to the config
        frozen.unlink()
        copy.write_bytes(copy.read_bytes()[:50])
        again = make("one")
    else:
        again = interp.Sweep.open("one", models=one.models)
    outcome = run(again)
    assert outcome.code == 0 and not outcome.damaged and light.contents(again.store) == light.contents(whole.store)
    assert {**json.loads(Path("one/run.json").read_text()), "created": header["created"]} == header
    assert list(Path("one/damaged").glob(".run.json.*"))


def test_parts_of_other_runs_and_copies_of_parts_are_refused(make) -> None:
    whole, one, other = make("whole"), make("one"), make("other", recipes=[{"recipe": "patch", "mode": "noise"}])
    for each in (whole, one, other):
        run(each)
    for path in Path("one/receipts").glob("000001*"):
        path.unlink()
    for folder in ("parts", "receipts"):
        for path in Path("other", folder).glob("000001*"):  # of another config, with its receipt
            shutil.copy(path, Path("one", folder))
    two, three = one.store.inventory().present[2], one.store.path(3)
    shutil.copy(one.store.path(2), three)  # another part of this run
    for path in Path("one/receipts").glob("000003*"):
        path.unlink()
    Path("one/receipts", two.file.replace("000002", "000003")).write_text("{}")
    assert one.status().damaged == {}
    why = dict(one.store.verify(range(4)))
    assert list(why) == [1, 3] and "by a run of another config" in why[1] and "a copy of another part (2)" in why[3]
    for read in (one.table, one.dataset, one.effects):
        with pytest.raises(InterpError, match=r"000001.parquet was computed by a run of another config"):
            read()
    assert list(run(one).damaged) == [1, 3]
    assert light.contents(one.store) == light.contents(whole.store)
    one.store.path(2).write_bytes(one.store.content(3))
    with pytest.raises(InterpError, match=r"000002.parquet is damaged"):
        one.table()


def test_a_stray_file_is_put_aside_once_and_spoils_no_part(tmp_path) -> None:
    store = light.make(tmp_path / "run", parts=5)
    assert drive(store, Options(executor="in-process", show="none")).code == 0
    whole = light.contents(store)
    for name in ("0000003.parquet", "000005.parquet", "000003 (copy).parquet"):
        shutil.copy(store.path(3), store.root / "parts" / name)
    inventory = store.inventory()
    assert len(inventory.strays) == 3 and not inventory.damaged and len(inventory.present) == 5
    outcome = drive(store, Options(executor="in-process", show="none"))
    assert outcome.code == 0 and not outcome.damaged and "it is the file of no part" in str(outcome)
    assert light.contents(store) == whole and not store.inventory().strays
    assert not drive(store, Options(executor="in-process", show="none")).notes


def test_other_versions_are_told(make, monkeypatch, capsys) -> None:
    from interp.sweep import effects_job

    one = make("one")
    run(one, shard=(0, 2))
    monkeypatch.setattr(effects_job, "code_hash", lambda: "9.9.9+abc")
    outcome = run(one)
    assert (
        outcome.code == 0 and "parts were computed with different code" in str(outcome) and "9.9.9+abc" in str(outcome)
    )
    code, text = command(capsys, monkeypatch, "status", "one", "--verify")
    assert code == 0 and "different code" in text


def test_a_run_of_an_earlier_version_is_checked_by_what_it_holds(tmp_path) -> None:
    source = Path(__file__).parent / "data" / "run_v1"
    old = Store.open(shutil.copytree(source, tmp_path / "old"))
    audit = Audit(old)
    assert not list(audit.failures(range(2))) and "2 part(s) of an earlier interp" in audit.notes()[0]
    (prompts,) = (old.root / "prompts").glob("*.json")
    good = prompts.read_text()
    prompts.write_text(good.replace("w3", "w8"))
    audit = Audit(old)
    assert not list(audit.failures(range(2)))  # no part agrees with the file, so the file is wrong
    assert "the parts that are finished were computed with other prompts" in next(iter(audit.bad_files.values()))
    prompts.write_text(good)
    for folder, text in (("parts", "000000.parquet"), ("receipts", "000000-*")):
        for path in (old.root / folder).glob(text):
            shutil.copy(path, path.with_name(path.name.replace("000000", "000001")))
    next((old.root / "receipts").glob("000001-5580*")).unlink()
    assert "a copy of another part (0)" in dict(Audit(old).failures(range(2)))[1]


def test_reading_many_parts_lists_the_receipts_once(tmp_path, monkeypatch) -> None:
    import os

    store = light.make(tmp_path / "run", parts=60)
    assert drive(store, Options(executor="in-process", show="none")).code == 0
    listed, scandir, listdir = [], os.scandir, os.listdir
    monkeypatch.setattr(os, "scandir", lambda path=".": listed.append(path) or scandir(path))
    monkeypatch.setattr(os, "listdir", lambda path=".": listed.append(path) or listdir(path))
    store = Store.open(store.root)
    assert not list(Audit(store).failures(range(60))) and not list(store.verify(range(60)))
    assert len([store.about(p) for p in range(60)]) == 60 and len(listed) <= 3
    merge(light.make(tmp_path / "empty", parts=60), [store])
    assert len(listed) < 30  # of 60 parts


def test_what_is_read_agrees_with_arithmetic(make) -> None:
    """The table, the Effects and the export hold the numbers of the recipe itself, after all that checking."""
    one = make("one")
    run(one)
    pairs = [interp.PromptPair(clean=c, corrupt=d, answer="w95", foil="w96") for c, d in PAIRS]
    want = interp.patch(one.models["m"], pairs, one.models["m"].sites("z")).frame()
    (effects,) = one.effects().values()
    np.testing.assert_allclose(effects.frame()["patched"], want["patched"], rtol=1e-9)
    table = one.table(by=["layer", "head"])
    means = want.groupby(["layer", "head"])["effect"].mean().to_numpy()
    np.testing.assert_allclose(table["effect"].to_numpy(), means, rtol=1e-5)
