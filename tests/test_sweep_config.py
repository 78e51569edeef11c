"""Configs: what is read, and what is refused, with key and line."""

from __future__ import annotations

import json
import sys
import time
import tomllib

import pytest
from headstats.backends import BACKENDS

from interp.cli import main as cli
from interp.errors import InterpError
from interp.jobs.store import differences
from interp.sweep.config import parse, parse_toml, read_config
from interp.sweep.template import sweep_template
from interp.sweep.toml_lines import key_lines

SMALL = """\
name = "small"
seeds = [0, 1]
[[models]]
load = "m"
[[tasks]]
task = "ioi"
n = 20
[[tasks]]
task = "facts"
n = 5
[[recipes]]
recipe = "patch"
tasks = ["ioi"]
[[recipes]]
recipe = "trace"
tasks = ["facts"]
[[sites]]
sites = "z"
[[sites]]
name = "late"
sites = "resid_pre"
layers = "2-3"
"""


def test_the_template_is_a_config_and_its_frozen_form_reads_back() -> None:
    config = parse_toml(sweep_template())
    assert str(config.parts[0]) == "part 0 (smollm2 × ioi × patch × heads, seed 0, examples 0–7)"
    again = parse(json.loads(json.dumps(config.document)))
    assert again.digest == config.digest and again.parts == config.parts
    assert parse_toml(sweep_template().replace("# ", "#  ")).digest == config.digest  # comments decide nothing


def test_a_model_takes_any_backend_of_headstats() -> None:
    for backend in ("auto", *BACKENDS):
        config = parse_toml(SMALL.replace('load = "m"', f'load = "m"\nbackend = "{backend}"'))
        assert config.models[0].options["backend"] == backend
    with pytest.raises(InterpError, match="one of auto, triton, compiled, blocked, reference expected"):
        parse_toml(SMALL.replace('load = "m"', 'load = "m"\nbackend = "cpu"'))


@pytest.mark.parametrize("load", ["modèle", "_m", "a..b", ".hidden-", "模型", "é" * 80])
def test_names_made_of_folders_read_back(load: str) -> None:
    config = parse_toml(SMALL.replace('load = "m"', f'load = "{load}"'))
    assert parse(json.loads(json.dumps(config.document))).digest == config.digest


def test_what_an_older_run_froze_still_opens() -> None:
    """Also what is refused today when it is new."""
    document = json.loads(json.dumps(parse_toml(SMALL).document))
    document["memory"], document["sites"][0]["sites"] = "lots", "zz"
    document["models"][0]["backend"] = "cpu"
    assert parse(document).sites[0].sites == "zz"


def test_parts_are_the_product_cut_by_examples() -> None:
    config = parse_toml(SMALL)
    seen = {(p.combination, p.examples.start, p.examples.stop) for p in config.parts}
    assert len(seen) == len(config.parts) == 2 * (2 * 3 + 1)
    assert [p.number for p in config.parts] == list(range(14))
    for recipe, sites in (("patch", "z"), ("patch", "late"), ("trace", "")):
        covered = [i for p in config.parts if p.combination[2:4] == (recipe, sites) and p.seed == 1 for i in p.examples]
        assert covered == list(range(20 if recipe == "patch" else 5))


def test_tasks_go_by_the_names_of_the_command_line_too() -> None:
    from interp.sweep.config_sections import makers
    from interp.tasks import TASKS, facts

    named = parse_toml(SMALL.replace('"ioi"', '"reasoning"')).tasks[0]
    assert named.name == "reasoning" and makers()["reasoning"].options == {"kind": "reasoning"}
    assert set(TASKS) <= set(makers()) and makers()["facts"].make is facts  # single prompts, for tracing
    with pytest.raises(InterpError, match="'kind' is no option of reasoning"):
        parse_toml(SMALL.replace('"ioi"', '"reasoning"').replace("n = 20", 'n = 20\noptions = {kind = "recall"}'))


def test_key_lines() -> None:
    text = (
        'a = 1\n\n[b]\n"c d" = "x # = [\\"]"\ne.f = """\n]\n"" = 1"""\n[[g]]\nh = [1,\n  {i = 2, j = [3]}, # k\n]\n'
        "[[g]]\nl = '''\n'''\n[g.m]\nn = 1e3\n"
    )
    tomllib.loads(text)
    assert key_lines(text) == {
        ("a",): 1, ("b",): 3, ("b", "c d"): 4, ("b", "e"): 5, ("b", "e", "f"): 5, ("g",): 8, ("g", 0): 8,
        ("g", 0, "h"): 9, ("g", 0, "h", 0): 9, ("g", 0, "h", 1): 10, ("g", 0, "h", 1, "i"): 10,
        ("g", 0, "h", 1, "j"): 10, ("g", 0, "h", 1, "j", 0): 10, ("g", 1): 12, ("g", 1, "l"): 13, ("g", 1, "m"): 15,
        ("g", 1, "m", "n"): 16,
    }  # fmt: skip


BAD = [
    ('recipe = "patch"', 'recipe = "pach"', "line 12: recipes[0].recipe = 'pach': did you mean 'patch'?"),
    ("n = 20", "requires = 0", "line 7: tasks[0].requires is not a known key; did you mean 'require'?"),
    ("n = 20", 'n = "20"', "line 7: tasks[0].n = '20': a whole number from 1 to 10000000 expected"),
    ("n = 20", "n = 0", "line 7: tasks[0].n = 0: a whole number from 1"),
    ("n = 20", "require = 2", "a number from 0 to 1 expected"),
    ("n = 20", 'options = {swap = "abc"}', "'swap' is no option of ioi; options: corruption"),
    ('tasks = ["ioi"]', 'tasks = ["ioi", "facts"]', "use the task fact_pairs"),
    ('tasks = ["ioi"]', 'tasks = ["iou"]', "line 13: recipes[0].tasks = ['iou']: did you mean 'ioi'?"),
    ('tasks = ["ioi"]', 'tasks = ["ioi"]\nnoise = 3', "recipes[0].noise is not a known key"),
    ('tasks = ["facts"]', 'metric = "logit_diff"\ntasks = ["facts"]', "needs a foil, and facts ('facts') have none"),
    ('tasks = ["facts"]', 'sever = "mlp"\ncomponent = "mlp_out"\ntasks = ["facts"]', "needs component = 'resid_post'"),
    ('tasks = ["facts"]', 'sites = ["z"]\ntasks = ["facts"]', "trace takes no [[sites]]"),
    ('name = "late"', 'name = "z"', "line 19: sites[1]: a second one named 'z'"),
    ('layers = "2-3"', 'layers = "3-2"', "numbers and ranges like '0-5,9' expected"),
    ('layers = "2-3"', 'layer = "2-3"', "did you mean 'layers'?"),
    ("seeds = [0, 1]", "seeds = [1, 1]", "the same value twice"),
    ("seeds = [0, 1]", "seeds = 1", "a list of at least 1 expected"),
    ("seeds = [0, 1]", "version = 99", "written for a newer interp"),
    ("seeds = [0, 1]", "examples_per_part = true", "a whole number from 1 to 100000 expected"),
    (
        "seeds = [0, 1]",
        'memory = "lots"',
        "line 2: memory = 'lots': a number of bytes is expected, or a size like '4GiB'",
    ),
    ("n = 20", "options = {corruption = [2020-01-01]}", "a table of plain values expected"),
    ("n = 20", "n = 1000000000000", "line 7: tasks[0].n = 1000000000000: a whole number from 1 to 10000000 expected"),
    ('sites = "z"', 'sites = "zz"', "line 18: sites[0].sites = 'zz': unknown component 'zz'; did you mean 'z'? known"),
    ('sites = "z"', 'name = "z"\ngroups = {a = "z.1"}', "sites[0].groups.a = 'z.1': cannot read 'z.1' as a site"),
    ('recipe = "patch"', 'recipe = "path_patch"\nreceivers = "zz"', "recipes[0].receivers = 'zz': unknown component"),
    ('recipe = "patch"', 'recipe = "path_patch"\nsenders = "logits"', "recipes[0].senders = 'logits': unknown"),
    ('task = "ioi"\n', 'pairs = "a\\u0000.csv"\n', "cannot read"),
    ('name = "small"', 'name = "../out"', "a plain name expected"),
    ('name = "small"', "", "the key 'name' is missing"),
    ('load = "m"', 'load = "m.pt"', "pickled weights can run code"),
    ('load = "m"', 'load = "m"\ndevice = "cuda"\ndevice_map = "auto"', "leave one out"),
    ('load = "m"', 'load = "m"\ndtype = "int8"', "one of float32, float64"),
    ('[[models]]\nload = "m"', "models = []", "one or more tables expected"),
    ('[[models]]\nload = "m"', "models = [1]", "models[0] must be a table, got 1"),
    ('task = "ioi"\n', 'pairs = "p.pkl"\n', "pickled data can run code"),
    ('task = "ioi"\n', 'task = "ioi"\npairs = "p.csv"\n', "give task or pairs, not both"),
    ('task = "ioi"\n', 'pairs = "nowhere.csv"\n', "cannot read"),
    ('[[sites]]\nsites = "z"', '[[sites]]\nname = "z"', "sites = … (a component or sites, as for --sites)"),
    ('tasks = ["ioi"]', 'sites = ["z"]\ntasks = ["ioi"]', "no recipe sweeps over 'late'"),
    ('tasks = ["facts"]', 'tasks = ["ioi"]', "no recipe takes 'facts'"),
    ("[[models]]", "[[models]", "is not valid TOML"),
    ("n = 20", "n = 9000000", "parts, and a run has at most 1000000"),
]


@pytest.mark.parametrize(("old", "new", "words"), BAD, ids=[w[2][:40] for w in BAD])
def test_bad_configs_name_key_and_line(tmp_path, old: str, new: str, words: str) -> None:
    assert old in SMALL
    (tmp_path / "sweep.toml").write_text(SMALL.replace(old, new, 1))
    with pytest.raises(InterpError) as caught:
        read_config(tmp_path / "sweep.toml")
    assert words in str(caught.value) and "sweep.toml" in str(caught.value)


def test_huge_and_deep_files_are_refused_quickly(tmp_path) -> None:
    path = tmp_path / "sweep.toml"
    with open(path, "wb") as file:
        file.truncate(100_000_000)
    with pytest.raises(InterpError, match="longer than a config may be, 1 MB"):
        read_config(path)
    path.write_text("x = " + "[" * 5000 + "]" * 5000)
    with pytest.raises(InterpError, match="not valid TOML"):
        read_config(path)


def test_prompts_of_ones_own_are_part_of_the_digest(tmp_path) -> None:
    (tmp_path / "mine.csv").write_text("clean,corrupt,answer\na b,a c,d\ne f,e g,h\n")
    text = SMALL.replace('task = "ioi"\nn = 20', 'pairs = "mine.csv"\nname = "ioi"').replace("[0, 1]", "[0]")
    text = text.replace('recipe = "patch"', 'recipe = "patch"\nmetric = "prob"')
    (tmp_path / "sweep.toml").write_text(text)
    before = read_config(tmp_path / "sweep.toml")
    assert before.tasks[0].n == 2
    (tmp_path / "mine.csv").write_text("clean,corrupt,answer\na b,a c,d\ne f,e g,i\n")
    after = read_config(tmp_path / "sweep.toml")
    (change,) = differences(before.document, after.document)
    assert "tasks[0].pairs_digest" in change
    (tmp_path / "sweep.toml").write_text(text.replace("seeds = [0]", "seeds = [0, 1]"))
    with pytest.raises(InterpError, match="has nothing random in it, so that 2 seeds"):
        read_config(tmp_path / "sweep.toml")
    (tmp_path / "mine.csv").write_text("clean,corrupt,answer\n")
    with pytest.raises(InterpError, match=r"line 6: tasks\[0\].pairs: .* holds no prompts"):
        read_config(tmp_path / "sweep.toml")


def test_differences() -> None:
    text = SMALL.replace("n = 20", "n = 24").replace('layers = "2-3"', "")
    lines = differences(parse_toml(SMALL).document, parse_toml(text).document)
    assert lines == ["  tasks[0].n: 20 → 24", '  sites[1].layers: "2-3" → not there']


def test_init_writes_once(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["interp", "sweep", "init", str(tmp_path / "s.toml")])
    for code, words in ((0, "interp sweep plan"), (2, "is left as it is")):
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert int(ended.value.code or 0) == code
        caught = capsys.readouterr()
        assert words in caught.out + caught.err
    assert (tmp_path / "s.toml").read_text() == sweep_template()


def test_layers_may_be_a_list() -> None:
    as_text = parse_toml(SMALL)
    as_list = parse_toml(SMALL.replace('layers = "2-3"', "layers = [2, 3]"))
    assert [s.layers for s in as_list.sites] == [None if s.layers is None else "2,3" for s in as_text.sites]
    for wrong in ("[]", "[-1]", '["2"]', "[true]", "[[2]]", "2.5"):
        with pytest.raises(InterpError, match=r"a list of layers|a text expected"):
            parse_toml(SMALL.replace('"2-3"', wrong))
    with pytest.raises(InterpError, match="names its layer itself"):
        parse_toml(SMALL.replace('sites = "z"', 'sites = "z.L0H1"\nlayers = "0"'))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("x = " + "9" * 5000, "digits"),
        ("x = " + "[" * 100_000, "nested too deeply"),
        ("a." * 300_000 + "b = 1", "more than 200 dots"),
        ("\n".join(f"k{i} = 1" for i in range(60_000)), "'name' is missing"),
    ],
)
def test_hostile_configs_are_refused_at_once(content, says) -> None:
    """A key of 300,000 names, or 60,000 keys, took minutes."""
    start = time.process_time()
    with pytest.raises(InterpError, match=says):
        parse_toml(content)
    assert time.process_time() - start < 5
