"""The recipes as verbs: run in this process on a tiny model in a folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import interp
from interp.cli import main as cli
from interp.cli.messages import spoken
from interp.doctor.families.text import tiny_hf
from interp.engine.planner import PLANNING
from interp.errors import InterpError, PromptError
from interp.prompts.files import read_prompts, read_texts
from interp.tasks import task

PAIRS = [
    {"clean": "w1 w2 w3 w4", "corrupt": "w1 w9 w3 w4", "answer": "w95", "foil": "w96", "spans": {"name": "w2"}},
    {"clean": "w5 w6 w7", "corrupt": "w5 w6 w8", "answer": "w95", "foil": "w96", "spans": {"name": "w7"}},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, word_tokenizer):
    path = tmp_path_factory.mktemp("model")
    tiny_hf("llama").float().save_pretrained(path / "m")
    word_tokenizer.save_pretrained(path / "m")
    (path / "pairs.jsonl").write_text("\n".join(map(json.dumps, PAIRS)))
    rows = [
        "clean,corrupt,answer,foil",
        *(",".join(p[c] for c in ("clean", "corrupt", "answer", "foil")) for p in PAIRS),
    ]
    (path / "pairs.csv").write_text("\n".join(rows))
    (path / "facts.csv").write_text("prompt,subject,answer\nw1 w2 w3 w4,w2 w3,w95\n")
    (path / "up.txt").write_text("w1 w2\nw3 w2\n")
    (path / "down.txt").write_text("w9\n")
    return path


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """run("patch …") -> (exit code, stdout, stderr); {f} in it is the folder."""

    def call(line: str) -> tuple[int, str, str]:
        words = [w.format(f=folder) for w in line.split()]
        monkeypatch.setattr(sys, "argv", ["interp", *words])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        caught = capsys.readouterr()
        return code, caught.out, caught.err

    return call


VERBS = {
    "patch": "--sites resid_pre,z@each,mlp_post.L0N3 --mode noise --pairs {f}/pairs.csv",
    "patch ": "--group both=z.L0H1,mlp_out.L1 --pairs {f}/pairs.csv",
    "ablate": "--sites z --layers 0-1 --using zero --schedule cumulative --pairs {f}/pairs.jsonl",
    "trace": "--pairs {f}/facts.csv --component mlp_out --window 2 --samples 2 --positions subject:last",
    "trace ": "--pairs {f}/pairs.jsonl --sever mlp --metric logit_diff",
    "mediate": "--sites attn_out@-1 --window 2 --pairs {f}/pairs.csv",
    "path-patch": "--senders z,mlp_out --receivers q,k,v --mlps recomputed --pairs {f}/pairs.csv",
    "knock-out": "--keys name --queries -1 --window 1 --pairs {f}/pairs.jsonl --heads 0,2",
    "peek": "--context keep --full 1 --layers 0-1 --pairs {f}/pairs.csv",
    "steer": "--positive {f}/up.txt --negative {f}/down.txt --scale 2 --pairs {f}/pairs.csv",
    "leave-out": "--spans name --pairs {f}/pairs.jsonl --metric logit_diff",
    "leave-out ": "--instead name=w40 --pairs {f}/pairs.jsonl",
}


@pytest.mark.parametrize("verb", VERBS)
def test_every_recipe_is_a_verb(run, tmp_path, verb: str) -> None:
    out = tmp_path / "new" / "x.parquet"
    code, text, err = run(f"{verb} --model {{f}}/m {VERBS[verb]} --out {out}")
    assert code == 0, text + err
    effects = interp.Effects.read(out)
    assert len(effects) > 0 and f"wrote {out}" in text and "effect" in text
    code, text, _ = run(f"{verb} --model {{f}}/m {VERBS[verb]} --explain")
    assert code == 0 and "cells" in text and "FLOP" in text


def test_a_verb_does_what_its_function_does(run, tmp_path, folder) -> None:
    run(f"patch --model {{f}}/m --sites z --pairs {{f}}/pairs.csv --metric logit_diff --out {tmp_path}/x.parquet")
    got = interp.Effects.read(tmp_path / "x.parquet").frame()
    model = interp.load(str(folder / "m"))
    want = interp.patch(model, read_prompts(folder / "pairs.csv"), model.sites("z")).frame()
    np.testing.assert_allclose(got["patched"], want["patched"], atol=1e-6)


def test_long_sweeps_are_asked_about(run, monkeypatch) -> None:
    line = "patch --model {f}/m --sites z --pairs {f}/pairs.csv"
    monkeypatch.setattr("interp.cli.options.ASK_FROM", 0.0)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    code, text, err = run(line)
    assert code == 2 and "--yes" in err and "FLOP" in err and not text
    assert run(line + " --yes")[0] == 0
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    for answer, ending in ((False, 1), (True, 0)):
        monkeypatch.setattr("typer.confirm", lambda *a, answer=answer, **k: answer)
        assert run(line)[0] == ending


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("patch --task chess", "unknown task 'chess'"),
        ("patch --task ioi --pairs x.csv", "not both"),
        ("patch --n 0", "--n must be at least 1"),
        ("patch --out x.csv", "a .parquet file expected"),
        ("patch --out {f}/up.txt/x.parquet", "is not a folder"),
        ("steer --model {f}/m", "--positive FILE --negative FILE"),
        ("ablate --model {f}/m --pairs {f}/pairs.csv --layers 0-x", "ranges like 0-5,9"),
        ("patch --model {f}/m --pairs {f}/pairs.csv --sites zz", "unknown component"),
        ("patch --model {f}/m --pairs {f}/pairs.csv --group z.L0H1", "name=site,site expected"),
        ("patch --model {f}/m --pairs {f}/facts.csv", "expected PromptPair objects"),
        ("patch --model {f}/m --pairs {f}/pairs.csv --memory 3kB", "too small for one cell"),
        ("patch --model {f}/m --pairs {f}/pairs.csv --memory lots", "a size like '4GiB'"),
        ("patch --model nowhere --memory 3foo", "--memory 3foo: a number of bytes is expected"),
        ("patch --model nowhere --dtype float31", "--dtype float31: did you mean float32? one of float32, float64"),
        ("patch --model {f}/none --pairs {f}/nowhere.csv", "cannot read"),  # before the model is looked for
        ("patch --model {f}/none --pairs {f}/pairs.csv --metric foo", "unknown metric 'foo'"),
        ("patch --model {f}/m --pairs {f}/pairs.csv --group a=z.L0H0 --group a=z.L0H1", "given twice"),
        ("trace --model {f}/m --pairs {f}/facts.csv --seed -1", "from 0 on"),
        ("patch --model {f}/m --pairs {f}/pairs.csv --device foo", "cannot use device 'foo'"),
        ("leave-out --model {f}/m --pairs {f}/pairs.jsonl --memory 3kB", "too small for one cell"),
        ("leave-out --model {f}/m --pairs {f}/pairs.jsonl --engine fast", "full forward per cell"),
        ("leave-out --model {f}/m --pairs {f}/pairs.jsonl --instead w40", "name=words expected"),
        ("ablate --model {f}/m --pairs {f}/pairs.csv --using resample --seed -1", "from 0 on"),
        ("patch --model {f}/m --pairs {f}/pairs.csv --sites z@", "names the span ''"),
        ("patch --model {f}/m --pairs {f}/pairs.csv --sites z@²", "names the span '²'"),
        ("patch --model {f}/m --pairs {f}/pairs.csv --out {f}", "expected"),
        ("patch --engine foo", "--engine foo: one of auto, fast, naive"),
        ("path-patch --using zero --mode denoise", "--using zero needs --mode noise"),
        ("steer --model {f}/m --positive {f}/it's.txt --negative {f}/down.txt", "it's.txt"),
        (
            "steer --model {f}/m --pairs {f}/pairs.csv --positive {f}/up.txt --negative {f}/down.txt --sites ,",
            "a component or sites expected",
        ),
        ("leave-out --model {f}/m --pairs {f}/pairs.jsonl --instead name=a --instead name=b", "each name once"),
        ("bench sweeps --cases z,foo", "no such cases: foo; there are"),
        ("bench sweeps --json {f}/pairs.csv", "a new file"),
        ("bench sweeps --rounds 0", "--rounds 0, --threads 2"),
    ],
)
def test_bad_options_end_with_a_message_and_exit_code_2(run, line: str, words: str) -> None:
    code, _, err = run(line)
    assert code == 2 and words in err and "Traceback" not in err


def test_what_is_said_is_said_once(run, tmp_path, caplog) -> None:
    (tmp_path / "same.csv").write_text("clean,corrupt,answer,foil\nw1 w2,w1 w2,w95,w96\n")
    code, _, _ = run(f"mediate --model {{f}}/m --pairs {tmp_path}/same.csv --sites z.L0H1@all")
    assert code == 0 and caplog.text.count("no recovery") == 1
    code, out, _ = run("path-patch --model {f}/m --pairs {f}/pairs.csv --senders z.L0H0 --receivers logits,q")
    assert code == 0 and "q×16, resid_post×2" in out


def test_prompt_files(tmp_path, folder) -> None:
    pairs = read_prompts(folder / "pairs.jsonl")
    assert pairs[0] == interp.PromptPair("w1 w2 w3 w4", "w1 w9 w3 w4", "w95", "w96").span("name", "w2")
    assert read_prompts(folder / "facts.csv") == [interp.Fact("w1 w2 w3 w4", "w2 w3", "w95")]
    assert read_texts(folder / "up.txt") == ["w1 w2", "w3 w2"]
    quoted = tmp_path / "q.csv"
    quoted.write_text('clean,corrupt,answer,foil\n"When John, and Mary",b," Mary",\n')
    assert read_prompts(quoted) == [interp.PromptPair("When John, and Mary", "b", " Mary")]
    long = "w\u2028" * 100_000  # no line ends there, and longer than the csv module likes
    quoted.write_text(f"clean,corrupt,answer\n{long},b,c\n", encoding="utf-8")
    (tmp_path / "q.jsonl").write_text(f'{{"clean": "{long}", "corrupt": "b", "answer": "c"}}\n', encoding="utf-8")
    for name in ("q.csv", "q.jsonl"):
        assert read_prompts(tmp_path / name) == [interp.PromptPair(long, "b", "c")]
    for name, text, words in (
        ("a.csv", "clean,corrupt\nx,y\n", "line 2 lacks answer"),
        ("a.jsonl", '{"clean": "x"\n', "line 1 is not JSON"),
        ("b.jsonl", "[1]\n", "line 1: an object"),
        ("c.jsonl", "\n", "holds no prompts"),
        ("d.txt", "x", "a .csv or .jsonl"),
        ("f.csv", "clean,corrupt,answer\nOne, two,One, six, a\n", "line 2 has more fields"),
        ("g.csv", "clean,clean,answer\nx,y,z\n", "'clean' twice"),
        ("h.csv", "clean;corrupt;answer\nx;y;z\n", "it has 'clean;corrupt;answer'"),
        ("i.jsonl", '{"clean": "x", "corrupt": "y", "answer": "z", "spans": ["x"]}', '"spans" must name words'),
        ("j.jsonl", "[" * 100_000, "line 1 is not JSON"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(PromptError, match=words):
            read_prompts(tmp_path / name)
    (tmp_path / "e.txt").write_text("\n")
    with pytest.raises(InterpError, match="holds no text"):
        read_texts(tmp_path / "e.txt")


def test_gates(run, folder) -> None:
    from interp.circuits import HeadGates

    code, out, err = run("gates --model {f}/m --pairs {f}/pairs.csv --steps 2 --seeds 2 --out {f}/gates.parquet")
    assert code == 0 and "facilitation" in out and "12 heads" not in err
    found = HeadGates.read(folder / "gates.parquet")
    assert found.values["plus"].shape == (2, 3, 4) and found.provenance["steps"] == 2
    code, out, _ = run("gates --model {f}/m --pairs {f}/pairs.csv --explain")
    assert code == 0 and "12 gates × 5 seeds; 1500 updates of 10 prompts" in out
    code, _, err = run("gates --model {f}/m --pairs {f}/pairs.csv --lam -1")
    assert code == 2 and "--lam -1" in err
    for wrong, said in (("--steps 0 --explain", "--steps 0"), ("--start 0.9", "--start 0.9"), ("--start 1,0", "start")):
        code, _, err = run("gates --model {f}/nowhere --pairs {f}/pairs.csv " + wrong)  # before the model is loaded
        assert code == 2 and said in err
    code, _, err = run("trace --model {f}/m --task facts:split=test")
    assert code == 2 and "fact_pairs:split=test" in err
    code, _, err = run("gates --model {f}/m --pairs {f}/pairs.csv --metric prob")
    assert code == 2 and "--metric" in err


def test_n_takes_the_first_of_a_file(run, folder, tmp_path) -> None:
    out = tmp_path / "x.parquet"
    code, _, err = run(f"patch --model {{f}}/m --sites z --pairs {{f}}/pairs.csv --n 1 --out {out}")
    assert code == 0, err
    one = interp.Effects.read(out)
    assert set(one.frame()["example"]) == {0} and one.provenance["n_prompts"] == 1
    code, _, err = run("patch --model {f}/nowhere --sites z --pairs {f}/pairs.csv --n 3")
    assert code == 2 and "--n 3" in err and "holds 2 prompts" in err


def test_version_and_completion(run) -> None:
    code, text, _ = run("--version")
    assert code == 0 and text.splitlines()[0] == f"interp {interp.__version__}" and "torch" in text
    code, text, _ = run("--help")
    assert code == 0 and "--install-completion" in text


@pytest.mark.parametrize(
    ("words", "wanted"),
    [("interp patch --metric lo", {"logit_diff", "logprob"}), ("interp ablate --schedule all", {"all-but-one"}),
     ("interp patch --task key", {"key_value"}), ("interp circuit --method ac", {"acdc"}),
     ("interp kno", {"knock-out"})],
)  # fmt: skip
def test_the_shell_completes_commands_and_values(words: str, wanted: set[str]) -> None:
    env = {
        **os.environ,
        "_INTERP_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    env["COMP_CWORD"] = str(len(words.split()) - 1)
    code = "import sys; sys.argv = ['interp']; from interp.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert set(done.stdout.split()) == wanted, done.stderr


@pytest.mark.parametrize(
    ("line", "words"),
    [
        # all of these are said before the model is looked for
        ("patch --model {f}/none --sites resid_per", "did you mean resid_pre?"),
        ("patch --model {f}/none --sites z.L1", "a z site needs a head"),
        ("patch --model {f}/none --group a=zz.L0H1", "unknown component zz"),
        ("patch --model {f}/none --sites z.L0H1 --layers 1", "--layers does not apply to z.L0H1"),
        ("patch --model {f}/none --group a=z.L0H1 --layers 1", "there is only --group"),
        ("patch --model {f}/none --metric logitdiff", "did you mean 'logit_diff'?"),
        ("patch --model {f}/none --task iio", "did you mean 'ioi'?"),
        ("patch --model {f}/none --engine fats", "did you mean fast?"),
        ("ablate --model {f}/none --using meen", "did you mean mean?"),
        ("circuit --model {f}/none --method eap-ig-input", "did you mean eap-ig-inputs?"),
        ("circuit --model {f}/none --pairs {f}/pairs.csv --n 1 --split", "at least two"),
        ("circuit --model {f}/none --task ioi:split=test --split", "names a split already"),
        ("trace --model {f}/none --component resid_port", "did you mean resid_post?"),
        # said by functions, in the words of the command line
        ("patch --model {f}/m --pairs {f}/bare.csv", "give every pair a foil, or use --metric logprob"),
        ("ablate --model {f}/m --pairs {f}/one.csv --using resample", "give --reference"),
    ],
)
def test_messages_speak_the_words_of_the_command_line(run, folder, line: str, words: str) -> None:
    (folder / "bare.csv").write_text("clean,corrupt,answer\nw1 w2,w1 w3,w95\n")
    (folder / "one.csv").write_text("clean,corrupt,answer,foil\nw1 w2,w1 w3,w95,w96\n")
    code, _, err = run(line)
    assert code == 2 and words in err and "Traceback" not in err, err


def test_spoken() -> None:
    options = {"mode": "--mode", "split": "--split", "n_boot": "--n-boot", "metric": "--metric"}
    for message, wanted in (
        ("use mode='noise'", "use --mode noise"), ("or leave split=None.", "or leave --split out."),
        ("n_boot=0: a whole number", "--n-boot 0: a whole number"), ("give mode= words", "give --mode words"),
        ("use metric=interp.logprob", "use --metric logprob"),
        ("window=1, mode=…", "window=1, --mode"), ("f(mode='noise')", "f(mode='noise')"), ("x.mode=3", "x.mode=3"),
    ):  # fmt: skip
        assert spoken(message, options) == wanted
    assert spoken("mode='noise'", {}) == "mode='noise'"


def test_underscores_and_tasks_of_the_config(run, tmp_path) -> None:
    line = "ablate --model {f}/m --pairs {f}/pairs.csv --sites z.L0H0,z.L1H1 --schedule "
    for name in ("all_but_one", "all-but-one"):
        assert run(f"{line}{name}")[0] == 0
    assert task("puzzles:kind=recall").options == {"kind": "recall"}


def test_a_circuit_states_its_recipe_and_can_be_measured_on_other_pairs(run, folder) -> None:
    rows = [f"w{i} w2 w3,w{i} w9 w3,w95,w96" for i in range(10, 16)]
    (folder / "six.csv").write_text("\n".join(["clean,corrupt,answer,foil", *rows]))
    code, text, err = run("circuit --model {f}/m --pairs {f}/six.csv --edges 40")
    assert code == 0, err
    assert "logit_diff; edges outside the circuit carry" in text and "6 prompt(s), the same on which" in text
    code, text, err = run("circuit --model {f}/m --pairs {f}/six.csv --edges 40 --split")
    assert code == 0 and "3 prompt(s), held out" in text, err
    code, text, err = run("circuit --model {f}/m --pairs {f}/six.csv")  # a small model has fewer than 200 edges
    assert code == 0 and "Circuit(95 of 190 edges" in text, err


@pytest.mark.parametrize("verb", ["patch", "ablate", "mediate", "trace", "knock-out", "path-patch"])
def test_ctrl_c_keeps_the_examples_that_are_finished(run, folder, tmp_path, monkeypatch, verb: str) -> None:
    import interp.recipes.sweep_loop as loop_module

    out, whole = tmp_path / "part.parquet", tmp_path / "whole.parquet"
    takes_facts = verb in ("trace", "knock-out")
    rows = ["clean,corrupt,answer,foil", *(f"w{i} w2 w3,w{i} w9 w3,w95,w96" for i in range(10, 13))]
    if takes_facts:
        rows = ["prompt,subject,answer", *(f"w{i} w2 w3 w4,w2 w3,w95" for i in range(10, 13))]
    (folder / "three.csv").write_text("\n".join(rows))
    line = f"{verb} --model {{f}}/m --pairs {{f}}/three.csv" + (" --metric logprob" if verb == "knock-out" else "")
    assert run(f"{line} --out {whole}")[0] == 0
    monkeypatch.setattr("interp.cli.options.AT_RISK", 0.0)  # one example at a time
    real, calls = loop_module.SweepLoop._add_batch, []
    stop_at = 5 if verb == "mediate" else 2  # mediation patches every pair twice

    def interrupted(self, table, source, numbers, advance):
        if PLANNING.get() is None:
            calls.append(numbers)
            if len(calls) > stop_at:
                real(self, table, source, numbers, advance)  # its rows are there, but the batch does not end
                raise KeyboardInterrupt
        return real(self, table, source, numbers, advance)

    monkeypatch.setattr(loop_module.SweepLoop, "_add_batch", interrupted)
    code, text, err = run(f"{line} --out {out}")
    assert code == 130 and "2 of 3 examples were finished" in err and f"wrote {out}" in text, text + err
    part, full = interp.Effects.read(out), interp.Effects.read(whole)
    expected = full.where(example=[0, 1]).frame()
    np.testing.assert_allclose(part.frame()["patched"], expected["patched"], atol=1e-5)
    assert part.frame()["example"].tolist() == expected["example"].tolist()
    assert part.provenance["interrupted"] == "2 of 3 examples were finished"
    calls.clear()
    stop_at = 0
    code, text, err = run(f"{line} --out {tmp_path}/none.parquet")
    assert code == 130 and "nothing was written" in err and not (tmp_path / "none.parquet").exists()


def test_a_file_of_pairs_is_read_once(run, tmp_path, caplog) -> None:
    twice = {**PAIRS[0], "clean": "w1 w2 w2 w4", "corrupt": "w1 w9 w2 w4"}
    (tmp_path / "p.jsonl").write_text(json.dumps(twice))
    code, _, _ = run(f"ablate --model {{f}}/m --pairs {tmp_path}/p.jsonl")
    said = [r.getMessage() for r in caplog.records if "stands 2 times" in r.getMessage()]
    assert code == 0 and len(said) == 1 and '["w2", -1]' in said[0]
    (tmp_path / "p.jsonl").write_text(json.dumps({**twice, "spans": {"name": ["w2", -1]}}))
    caplog.clear()
    assert run(f"ablate --model {{f}}/m --pairs {tmp_path}/p.jsonl")[0] == 0 and not caplog.records
