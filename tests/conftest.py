"""Shared models. Hugging Face is kept offline: no test may reach a model hub."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from interp.doctor.families.text import tiny_hf

# Files to begin with, so that the two processes of `make test` end together.
LONGEST = ("test_headstats_triton.py", "test_headstats_triton_passes.py", "test_notebooks.py")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip a GPU test without a GPU, by name, and begin with the longest files."""
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def pytest_terminal_summary(terminalreporter, exitstatus, config) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    gpu = [r for r in skipped if "needs a CUDA GPU" in str(r.longrepr)]
    other = [r for r in skipped if r not in gpu]
    terminalreporter.write_line(f"not run: {len(gpu)} test(s) that need a GPU, {len(other)} for other reasons")
    for report in other:
        terminalreporter.write_line(f"  {report.nodeid}: {report.longrepr[-1] if report.longrepr else ''}")


@pytest.fixture(scope="session")
def smollm2():
    """The embedded model, fetched and converted on first use."""
    import interp

    return interp.load("smollm2")


@pytest.fixture(scope="session")
def word_tokenizer():
    """A tiny word-level tokenizer w0 … w96 with <bos>, which it puts in front of every text, and <pad>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {t: i for i, t in enumerate(["<bos>", "<pad>", "<unk>", *(f"w{i}" for i in range(97))])}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<bos>", eos_token="<pad>", pad_token="<pad>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def tiny(word_tokenizer):
    """tiny(kind) -> interp.Model in float64, built once per kind."""
    import interp

    built: dict[str, interp.Model] = {}

    def get(kind: str) -> interp.Model:
        if kind not in built:
            built[kind] = interp.load(tiny_hf(kind), tokenizer=word_tokenizer)
        return built[kind]

    return get
