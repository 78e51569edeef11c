"""State around a call: modules in training mode, other threads, settings of PyTorch."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import pytest
import torch

import interp
from interp import circuits, corpus, engine
from interp.doctor.families.text import tiny_hf
from interp.errors import ModelError
from interp.model.session import IN_SESSION, in_session

TOKENS = torch.arange(12).reshape(2, 6) + 5
TEXTS = [" ".join(f"w{(7 * i + j * j) % 97}" for j in range(5 + i % 4)) for i in range(12)]
PAIRS = [
    interp.PromptPair(clean=t, corrupt=t.replace(t.split()[2], "w3"), answer=" w5", foil=" w6") for t in TEXTS[4:8]
]

# Public functions that take a model and run no forward of it.
RUNS_NOTHING = {
    "Circuit.check", "Circuit.of", "Circuit.read", "Circuit.whole", "Engine.__init__", "HeadGates.circuit",
    "random_scores",
}  # fmt: skip


# ---------------------------------------------------------------- the one door


def public_functions() -> Iterator[tuple[str, Any, int]]:
    """Public functions and methods with a ``model`` parameter, and the number of arguments before it."""
    for package in (interp, circuits, corpus, engine):
        for name in package.__all__ if hasattr(package, "__all__") else dir(package):
            value = getattr(package, name)
            functions = {name: value}
            if inspect.isclass(value):
                members = inspect.getmembers(value, lambda m: inspect.isfunction(m) or inspect.ismethod(m))
                functions = {f"{name}.{k}": v for k, v in members if not k.startswith("_") or k == "__init__"}
            for path, function in functions.items():
                if callable(function) and not inspect.isclass(function):
                    parameters = list(inspect.signature(function).parameters)
                    if "model" in parameters:
                        yield path, function, parameters.index("model")


@pytest.fixture(scope="module")
def dropping(word_tokenizer) -> interp.Model:
    """A model with dropout in one block, which is in training mode."""
    hf: Any = tiny_hf("gpt2", torch.float32)
    hf.transformer.h[1].attn.resid_dropout.p = 0.3
    model = interp.load(hf, tokenizer=word_tokenizer)
    model.bridge.original_model.transformer.h[1].train()
    return model


def test_every_public_function_refuses_dropout(dropping: interp.Model) -> None:
    functions = [(path, f, i) for path, f, i in public_functions() if path not in RUNS_NOTHING]
    assert len(functions) > 30
    for path, function, before in functions:
        required = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty]
        arguments: list[Any] = [None] * max(len([p for p in required if p.kind <= p.POSITIONAL_OR_KEYWORD]), 1 + before)
        arguments[before] = dropping
        with pytest.raises(ModelError, match=r"h\.1\..*training mode and has .*drop.*model\.bridge\.eval\(\)"):
            function(*arguments)
            pytest.fail(f"{path} ran a model with dropout: mark it with interp.model.session.in_session")


@pytest.mark.parametrize(
    "name", ["__call__", "run_with_cache", "next_token_logits", "last_logits", "forward", "attention_stats"]
)
def test_every_forward_of_a_model_refuses_dropout(dropping: interp.Model, name: str) -> None:
    with pytest.raises(ModelError, match="training mode"):
        getattr(dropping, name)(TOKENS)


def test_tasks_that_try_the_model_refuse_dropout(dropping: interp.Model) -> None:
    with pytest.raises(ModelError, match="training mode"):
        interp.tasks.check(dropping, PAIRS[:1])


def test_what_is_used_by_every_recipe_is_a_session_too() -> None:
    """So that a recipe without the mark is still refused: it needs the engine, or hooks."""
    for function in (engine.Engine.record, engine.Engine.score, engine.Engine.score_prompts):
        assert getattr(function, IN_SESSION)


def test_a_generator_cannot_be_a_session() -> None:
    def cells(model: Any) -> Iterator[int]:
        yield 1

    with pytest.raises(TypeError, match="generator"):
        in_session(cells)


# ---------------------------------------------------------------- training mode


@pytest.mark.parametrize("family", ["llama", "bert", "bart", "vit", "mixtral"])
def test_dropout_by_number_is_refused(family: str, word_tokenizer) -> None:
    """transformers' attention modules pass a number to their function; nothing in the module tree is a Dropout."""
    hf: Any = tiny_hf(family, torch.float32)
    model = interp.load(hf, tokenizer=None if family == "vit" else word_tokenizer)
    modules = [m for m in hf.modules() if not isinstance(m, torch.nn.Dropout)]
    numbers = {"llama": "attention_dropout", "bert": "p", "bart": "dropout", "vit": "p", "mixtral": "jitter_noise"}
    name = numbers[family]
    if name == "p":
        modules = [m for m in hf.modules() if isinstance(m, torch.nn.Dropout)]
    module = next(m for m in modules if name in vars(m))
    setattr(module, name, 0.25)
    hf.train()
    with pytest.raises(ModelError, match=r"0\.\d+.* different numbers"):
        model.forward(TOKENS)
    model.bridge.eval()
    assert not module.training
    with model.session:
        pass


def test_training_mode_without_dropout_changes_nothing(word_tokenizer) -> None:
    model = interp.load(tiny_hf("llama", torch.float32), tokenizer=word_tokenizer)
    expected, effects = model(TOKENS), interp.patch(model, PAIRS, model.sites("z"), show_progress=False)
    model.bridge.original_model.train()
    assert torch.equal(model(TOKENS), expected)
    again = interp.patch(model, PAIRS, model.sites("z"), show_progress=False)
    assert np.allclose(again.frame()["patched"], effects.frame()["patched"], atol=1e-4)


# ---------------------------------------------------------------- threads


def same(a: interp.AttentionStats, b: interp.AttentionStats) -> bool:
    return a.frame().equals(b.frame())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_statistics_in_four_threads_are_those_of_one(family: str, tiny: Callable[[str], interp.Model]) -> None:
    model = tiny(family)
    expected = [model.attention_stats(text) for text in TEXTS]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(model.attention_stats, TEXTS))
    assert all(map(same, expected, results))


def test_forwards_of_the_bridge_and_recipes_do_not_meet(tiny: Callable[[str], interp.Model]) -> None:
    """One thread runs the bridge and the Hugging Face model, with hooks of its own, while others patch."""
    model = tiny("llama")
    pairs, sites = PAIRS[:2], model.sites("z", layers=range(2))
    expected = interp.patch(model, pairs, sites, engine="naive", show_progress=False).frame()["patched"]
    logits = model(TOKENS)
    done = threading.Event()

    def forwards() -> int:
        n = 0
        while not done.is_set() or n == 0:
            with model.bridge.hooks(fwd_hooks=[("blocks.0.attn.hook_z", lambda x, hook: x * 0)]):
                assert not torch.equal(model.bridge(TOKENS), logits)
            assert torch.equal(model.bridge(TOKENS), logits)
            assert torch.equal(model.bridge.original_model(TOKENS).logits, logits)
            _, cache = model.bridge.run_with_cache(TOKENS, names_filter=lambda name: name.endswith("resid_post"))
            assert cache["blocks.1.hook_resid_post"].shape[:2] == TOKENS.shape
            n += 1
        return n

    with ThreadPoolExecutor(3) as pool:
        background = pool.submit(forwards)
        engines: list[Any] = ["naive", "fast"]
        recipes = [pool.submit(interp.patch, model, pairs, sites, engine=kind, show_progress=False) for kind in engines]
        tables = [r.result(60).frame()["patched"] for r in recipes]
        done.set()
        assert background.result(60)
    for table in tables:
        assert np.allclose(table, expected, atol=1e-9)


def test_a_recipe_inside_a_metric_does_not_wait_for_itself(tiny: Callable[[str], interp.Model]) -> None:
    model = tiny("llama")

    def metric(logits: Any, *_: Any) -> Any:
        model.attention_stats(TEXTS[0])
        return logits[:, 0]

    effects = interp.patch(model, PAIRS[:1], ["z.L0H0"], metric=metric, show_progress=False)
    assert len(effects.frame()) == 1


def test_a_forked_process_does_not_wait_for_threads_it_does_not_have() -> None:
    import os

    from interp.model.session import ModelLock

    lock, taken, leave = ModelLock(), threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            taken.set()
            leave.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait(30)
    pid = os.fork()
    if pid == 0:
        with lock:
            os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    leave.set()
    thread.join()


# ---------------------------------------------------------------- settings of PyTorch


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        assert torch.get_default_dtype() == dtype  # nothing inside has left another one
        torch.set_default_dtype(torch.float32)


@contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "anomaly detection": lambda: torch.autograd.detect_anomaly(check_nan=False),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "another device": default_device,
    "a device in a block": lambda: torch.device("meta"),
    "deterministic": deterministic,
}


def numbers(model: interp.Model) -> list[np.ndarray]:
    """Results of a forward, statistics, a fast and a naive sweep, and gradients."""
    pairs, sites = PAIRS[:1], model.sites("z", layers=1)
    frames = [
        model.attention_stats(TEXTS[:1]).frame(),
        interp.patch(model, pairs, sites, show_progress=False).frame(),
        interp.ablate(model, pairs, sites, engine="naive", show_progress=False).frame(),
        circuits.attribute_sites(model, pairs, sites).frame(),
    ]
    edges = circuits.attribute_edges(model, pairs)
    return [
        model(TOKENS).detach().numpy(), *[f.select_dtypes("number").to_numpy(float) for f in frames],
        np.asarray(edges.matrix, float),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def single(word_tokenizer) -> tuple[interp.Model, list[np.ndarray]]:
    model = interp.load(tiny_hf("llama", torch.float32), tokenizer=word_tokenizer)
    numbers(model)  # the first call checks the engine, and answers in another order of additions
    return model, numbers(model)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_of_torch_change_no_number(setting: str, single: tuple[interp.Model, list[np.ndarray]]) -> None:
    model, expected = single
    with SETTINGS[setting]():
        results = numbers(model)
    for ours, theirs in zip(results, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert np.array_equal(ours, theirs, equal_nan=True)


def test_rounded_products_stand_in_the_provenance(single: tuple[interp.Model, list[np.ndarray]]) -> None:
    assert "matmul_precision" not in single[0].provenance()
    torch.set_float32_matmul_precision("medium")
    try:
        assert single[0].provenance()["matmul_precision"] == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_autocast_is_reported_once(
    single: tuple[interp.Model, list[np.ndarray]], caplog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("interp.model.session._WARNED", set())
    with torch.autocast("cpu", torch.bfloat16):
        logits = single[0](TOKENS) + single[0](TOKENS)
    assert logits.dtype == torch.float32
    assert caplog.text.count("autocast is off inside interp") == 1


def test_the_bridge_itself_runs_under_autocast(single: tuple[interp.Model, list[np.ndarray]]) -> None:
    bridge = single[0].bridge
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = bridge(TOKENS)
    assert (logits.float() - bridge(TOKENS)).abs().max() < 0.1 * bridge(TOKENS).abs().max()


def test_gradients_of_weights_made_in_inference_mode(word_tokenizer) -> None:
    with torch.inference_mode():
        hf = tiny_hf("llama", torch.float32)
        with pytest.raises(ModelError, match=r"torch.inference_mode.*copy=True"):
            interp.load(hf, tokenizer=word_tokenizer)
        copied = interp.load(hf, tokenizer=word_tokenizer, copy=True)
    plain = interp.load(tiny_hf("llama", torch.float32), tokenizer=word_tokenizer)
    ours, theirs = (circuits.attribute_edges(model, PAIRS[:1]).matrix for model in (copied, plain))
    assert np.array_equal(ours, theirs, equal_nan=True)
