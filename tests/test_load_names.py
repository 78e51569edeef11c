"""Names that cannot be loaded: near misses, a hub that does not answer, and code in a model's folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import interp
from interp.doctor.families.text import tiny_hf
from interp.errors import ModelError
from interp.model.names import did_you_mean

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("smolm2", "'smollm2'"),
        ("SmolLM-2", "'smollm2'"),
        ("gpt-2", "'gpt2'"),
        ("pythia70m", "'EleutherAI/pythia-70m'"),
        ("nothing-like-it", None),
        ("", None),
    ],
)
def test_near_misses_of_known_names(name: str, suggestion: str | None) -> None:
    assert (suggestion in did_you_mean(name)) if suggestion else did_you_mean(name) == ""


def test_near_misses_of_folders_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my-llama").mkdir()
    (tmp_path / "my-llama" / "config.json").write_text("{}")
    (tmp_path / "small.gguf").touch()
    with pytest.raises(ModelError, match=r"Did you mean '.*/my-llama'"):
        interp.load(str(tmp_path / "my-lama"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="Did you mean 'my-llama'"):
        interp.load("my_llama")
    with pytest.raises(ModelError, match=r"Did you mean 'small\.gguf'"):
        interp.load("./smal.gguf")


def test_other_wrappers_of_a_model_say_what_to_pass() -> None:
    hf = tiny_hf("llama")

    class PeftModel(torch.nn.Module):
        """As PEFT's: no PreTrainedModel, but holds one."""

        __module__ = "peft.peft_model"

        def __init__(self, model: Any):
            super().__init__()
            self.base_model = model

    with pytest.raises(ModelError, match=r"merge_and_unload\(\).*\.base_model\.model"):
        interp.load(PeftModel(hf))
    with pytest.raises(ModelError, match=r"it holds one: pass its \.module"):
        interp.load(torch.nn.DataParallel(hf))


LOADS = """
import os, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class NotFound(BaseHTTPRequestHandler):
    def do_HEAD(self):
        asked.append(self.path)
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
    do_GET = do_HEAD
    def log_message(self, *_): pass

asked = []
server = ThreadingHTTPServer(("127.0.0.1", 0), NotFound)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ.update(HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", NO_PROXY="127.0.0.1")
import torch, interp, transformers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

folder = sys.argv[1]

def outcome(source, **options):
    start = time.perf_counter()
    try:
        model = interp.load(source, **options)
        text = f"loaded {type(model.bridge.original_model).__name__} {type(model.tokenizer).__name__}"
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
    print(f"{time.perf_counter() - start:.1f} {text}", flush=True)

hf = LlamaForCausalLM.from_pretrained(folder, trust_remote_code=False)
outcome(folder)                                                  # 0: a folder
outcome(hf)                                                      # 1: an object made from that folder
plain = PreTrainedTokenizerFast(tokenizer_file=folder + "/tokenizer.json", bos_token="w0")
plain.init_kwargs["name_or_path"] = folder                       # TransformerLens reads it again from there
outcome(hf, tokenizer=plain)                                     # 2
outcome("smolm2")                                                # 3: the hub answers that there is no such model
assert asked
server.shutdown(), server.server_close()
outcome("smolm2")                                                # 4: nobody answers
assert not os.path.exists(folder + "/../it ran")
transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
print(transformers.dynamic_module_utils.TIME_OUT_REMOTE_CODE)
"""


@pytest.fixture
def folder_with_code(tmp_path: Path, word_tokenizer) -> Path:
    """A model folder whose config and tokenizer name code of its own, which leaves a file behind if it runs."""
    folder = tmp_path / "model"
    tiny_hf("llama", torch.float32).save_pretrained(folder)
    word_tokenizer.save_pretrained(folder)
    (folder / "own_code.py").write_text(
        f"import pathlib\npathlib.Path({str(tmp_path / 'it ran')!r}).touch()\n"
        "from transformers import PreTrainedTokenizerFast\n"
        "class OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    for name, own in (
        ("tokenizer_config.json", {"AutoTokenizer": ["own_code.OwnTokenizer", "own_code.OwnTokenizer"]}),
        ("config.json", {"AutoModelForCausalLM": "own_code.OwnTokenizer"}),
    ):
        content = json.loads((folder / name).read_text())
        content["auto_map"] = own
        if name == "tokenizer_config.json":
            content["tokenizer_class"] = "OwnTokenizer"
        (folder / name).write_text(json.dumps(content))
    return folder


def test_no_code_of_a_folder_runs_and_a_silent_hub_costs_no_time(folder_with_code: Path, tmp_path: Path) -> None:
    """With "y" on standard input, transformers' question would be answered by yes."""
    script = tmp_path / "loads.py"
    script.write_text(LOADS)
    environment = {
        **os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "cache"),
    }  # fmt: skip
    done = subprocess.run(
        ["bash", "-c", f"yes | {sys.executable} {script} {folder_with_code}"],
        capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 6, done.stdout + done.stderr
    seconds = [float(line.split()[0]) for line in lines[:5]]
    folder, made, given, unknown, silent = (line.split(" ", 1)[1] for line in lines[:5])
    assert folder.startswith("ModelError") and "trust_remote_code=True" in folder
    assert made.startswith("loaded LlamaForCausalLM")  # without a tokenizer: no code of the folder is run for one
    assert given.startswith("loaded LlamaForCausalLM")
    assert unknown.startswith("ModelError") and "Did you mean 'smollm2'" in unknown
    assert silent.startswith("ModelError") and "cannot be reached" in silent and "Did you mean 'smollm2'" in silent
    assert max(seconds[1:]) < 12, seconds  # a question waits 15 s, retries take 23 s
    assert (tmp_path / "it ran").exists()  # the code does run where it is trusted
    assert lines[5] == "15"  # and questions outside interp are asked as before
