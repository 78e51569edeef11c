"""Studies run from end to end with tiny settings, and their null controls hold exactly."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
import torch

import interp
from interp.doctor.families.text import tiny_hf

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
import deductive_trace
import head_modulation
import head_routing
import mask_catalogue
import replaced_mixing
import row_repair


@pytest.fixture(scope="module")
def folder(word_tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model and its tokenizer on disk, which knows few words of the text."""
    path = tmp_path_factory.mktemp("tiny")
    tiny_hf("llama").save_pretrained(path)
    word_tokenizer.save_pretrained(path)
    return path


def test_replaced_mixing(folder: Path, tmp_path: Path) -> None:
    written = tmp_path / "new" / "result.json"
    result = replaced_mixing.main(["--model", str(folder), "--windows", "2", "--length", "12", "--json", str(written)])
    assert set(result["null_differences"].values()) == {0.0}
    assert json.loads(written.read_text())["losses"] == result["losses"]


def test_static_rows_are_means_by_distance(folder: Path) -> None:
    model = interp.load(str(folder))
    rows = replaced_mixing.static_rows(model, torch.randint(4, 20, (2, 12)))
    assert rows.shape == (model.n_layers, 12, 12)
    assert rows.sum(-1) == pytest.approx(1)
    assert not rows[:, *torch.triu_indices(12, 12, 1).numpy()].any()
    assert rows[:, 9, 7] == pytest.approx(rows[:, 9, 6])  # distances 2 and 3 are one class
    assert rows[:, 9, 8] != pytest.approx(rows[:, 9, 7])
    with model.edited(*replaced_mixing.mixing("static", range(model.n_layers), rows)):
        inside = model.attention_patterns(interp.Prompt(list(range(4, 16)), {f"t{i}": (i, i + 1) for i in range(12)}))
    blocks = inside.examples[0].runs["clean"].blocks.reshape(model.n_layers, model.n_heads, 12, 12)
    assert abs(blocks - rows[:, None]).max() < 1e-6


def test_head_routing(folder: Path) -> None:
    result = head_routing.main(["--model", str(folder), "--windows", "2", "--length", "12", "--open", "2", "1"])
    assert result["gates_of_1_minus_unedited"] == 0.0
    losses = {(row["open_heads"], row["choice"]): row["loss"] for row in result["losses"]}
    assert len(losses) == 6


def test_mask_catalogue() -> None:
    result = mask_catalogue.main([])
    rows = result["masks"]
    assert len({row["mask"] for row in rows}) == len(rows) / 2 == 11
    assert max(row["logits"] for row in rows) < 1e-5
    assert max(row["weights"] for row in rows) < 1e-6
    assert {row["forbidden_mass"] for row in rows} == {0.0}
    assert min(row["unmasked"] for row in rows) > 1
    assert {d for nulls in result["null_differences"].values() for d in nulls.values()} == {0.0}
    assert {row["computed"] for row in rows} == {"in the kernel"}
    long = result["computed_at_96_tokens"]
    assert {name for name, where in long.items() if where == "dense"} == {"tree", "stride and window"}


def test_row_repair() -> None:
    result = row_repair.main(["--steps", "2", "--prompts", "4", "--draws", "1"])
    assert len(result["rise_of_logit_difference"]) == 12
    assert len(result["colored_objects"]) == 8
    assert all(0 <= share <= 1 for share in result["colored_objects"].values())


def test_head_modulation() -> None:
    result = head_modulation.main(["--steps", "2", "--prompts", "4", "--draws", "1"])
    for arm in (result["trained"], result["planted"]):
        unchanged = arm["scaled"][0]
        assert unchanged["lambda"] == unchanged["largest_change"] == 0
        assert unchanged["accuracy"] == unchanged["permuted"][0] == unchanged["mean_gate_on_all"] == arm["accuracy"]
        assert arm["scaled"][-1]["largest_change"] > 0


def test_derivations_follow_from_their_rules() -> None:
    for seed in range(20):
        pair = deductive_trace.derivation(random.Random(seed))
        rules, corrupt_rules = (
            dict(x.split(" -> ") for x in text.split("Rules: ")[-1].split(". ")[0].split(", "))
            for text in (pair.clean, pair.corrupt)
        )
        start, stop = pair.spans["choice"]
        asked = pair.clean[start - 2]
        assert pair.clean[start:stop] == "->"
        assert pair.clean[stop : stop + 2] == pair.answer == f" {rules[asked]}"
        assert pair.foil == f" {corrupt_rules[asked]}"
        assert sum(rules[a] != corrupt_rules[a] for a in rules) == 2
        trace = [x.split(" -> ") for x in pair.clean.split("Trace: ")[-1].rstrip(".").split(", ")]
        assert all(rules[a] == b for a, b in trace)
        assert pair.clean.split("Trace: ")[-1] == pair.corrupt.split("Trace: ")[-1]


@pytest.mark.slow
@pytest.mark.model
def test_deductive_trace() -> None:
    result = deductive_trace.main(["--prompts", "2", "--draws", "1"])
    assert sum(result["share_of_unsure_tokens"].values()) == pytest.approx(1)
    assert set(result["closed"]) == {"none", "best", "random 0"}
    assert list(result["aie"].values()) == sorted(result["aie"].values(), reverse=True)
