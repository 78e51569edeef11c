"""Shared models. Hugging Face is kept offline: no test may reach a model hub."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from interp.doctor.families.text import tiny_hf

LONGEST = ("triton", "test_notebooks.py")  # groups to begin with, so that the two processes end together


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in its own hook
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests of a file in one process, and skip a GPU test without a GPU, by name.

    The tests that share Triton's slow jobs (headstats_jobs.py) are one group, so that each job runs once.
    """
    groups = {item: "triton" if "job" in parameters_of(item) else item.path.name for item in items}
    for item, group in groups.items():
        item.add_marker(pytest.mark.xdist_group(group))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
    items.sort(key=lambda item: LONGEST.index(groups[item]) if groups[item] in LONGEST else len(LONGEST))


def parameters_of(item: pytest.Item) -> dict[str, object]:
    """The parameters of a parametrized test."""
    callspec = getattr(item, "callspec", None)
    return {} if callspec is None else callspec.params


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
    """A tiny word-level tokenizer w0 … w99, with <bos> and <pad>."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {t: i for i, t in enumerate(["<bos>", "<pad>", "<unk>", *(f"w{i}" for i in range(97))])}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
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
