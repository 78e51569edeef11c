"""Examine one model: its logits, backends, sites and costs.

`examine` checks a model against Hugging Face's eager attention and measures everything else: which backend computes
each layer, which sites can be read and patched, what half precision changes, how much memory a context needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from interp.doctor import probe_inputs
from interp.doctor.findings import Examination, Finding
from interp.doctor.matrix import difference
from interp.doctor.memory import memory_needs
from interp.engine import Cell, CellWrite, Engine
from interp.errors import InterpError
from interp.model.attention_call import AttentionCall
from interp.model.edited_attention import attend
from interp.model.hf_classes import key_value_cache
from interp.model.load_model import load
from interp.model.loading import wrap
from interp.model.model import Model
from interp.model.reading import as_dtype, read
from interp.model.vision_towers import vision_tower
from interp.prompts.special_tokens import BosPolicy
from interp.sites import COMPONENTS, Site
from interp.utils.progress import progress

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}  # of the largest logit; other dtypes: HALF
HALF = 5e-2


def examine(
    source: Any = "smollm2",
    *,
    context: int | None = None,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    bos: BosPolicy | None = None,
    **options: Any,
) -> Examination:
    """Examine a model given as in `interp.load`, which takes ``options`` too.

    ``context``: number of tokens for which memory is computed (default: the model's context length). ``bos``: as for
    `interp.load`. A Model or TransformerBridge is wrapped already, so that its logits cannot be compared with those of
    eager attention: give its name instead for this comparison.

    Raises ModelError if the model cannot be loaded, InterpError for a context longer than the model's.
    """
    batches: dict[str, dict[str, Tensor]] = {}
    expected: dict[str, Tensor] = {}
    is_wrapped = isinstance(source, Model) or hasattr(source, "original_model")
    if is_wrapped:
        model = load(source, dtype=dtype, device=device, bos=bos)
    else:
        weights = read(source, dtype=as_dtype(dtype), device=device, **options)
        weights = replace(weights, model=vision_tower(weights.model))
        batches = probe_inputs.batches(weights.model, weights.tokenizer)
        expected = _eager(weights.model, batches)
        wrapped = wrap(weights, bos)
        model = Model(wrapped.bridge, name=wrapped.name, tokenizer=wrapped.tokenizer, special=wrapped.special)
    context = model.n_ctx if context is None else context
    if not 1 <= context <= model.n_ctx:
        raise InterpError(
            f"--context {context}: {model.name} has a context of {model.n_ctx} tokens; give 1 to {model.n_ctx}"
        )
    calls = _calls(model)
    sections = (
        lambda: _logits(model, batches, expected, is_wrapped),
        lambda: _special_tokens(model),
        lambda: _layers(model),
        lambda: _heads(model),
        lambda: _sites(model),
        lambda: _precision(model),
        lambda: _memory(model, calls, context),
    )
    findings: list[Finding] = []
    with progress("examine the model", len(sections)) as advance:
        for section in sections:
            findings += section()
            advance(1)
    return Examination(repr(model), tuple(findings))


# ---------------------------------------------------------------- logits


@torch.no_grad()
def _eager(model: Any, batches: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Logits of Hugging Face's eager attention, before the model is wrapped."""
    model.eval()
    with suppress(ValueError, NotImplementedError):  # models that predate the attention interface are always eager
        model.set_attn_implementation("eager")
    return {name: probe_inputs.outputs(model, batch) for name, batch in batches.items()}


@torch.no_grad()
def _logits(
    model: Model, batches: dict[str, dict[str, Tensor]], expected: dict[str, Tensor], wrapped: bool
) -> Iterator[Finding]:
    section = "logits against Hugging Face eager attention"
    if wrapped:
        yield Finding(section, "not compared", None, "the model was already wrapped; give its name to compare")
        return
    allowed = TOLERANCE.get(model.dtype, HALF)
    for name, batch in batches.items():
        gap = difference(probe_inputs.outputs(model.bridge.original_model, batch), expected[name])
        yield _compared(section, name, gap, allowed)
    if "one prompt" not in batches or not all(call.causal for call in _calls(model)):
        return
    tokens = batches["one prompt"]["input_ids"]
    try:
        steps = _decode(model, tokens)
    except Exception as error:
        yield Finding(section, "key/value cache", None, f"cannot decode: {type(error).__name__}: {error}")
        return
    yield _compared(section, "key/value cache", difference(steps, expected["one prompt"]), allowed)


def _compared(section: str, name: str, gap: float, allowed: float) -> Finding:
    return Finding(section, name, gap <= allowed, f"differ by {gap:.1e} of the largest (allowed: {allowed:.0e})")


def _decode(model: Model, tokens: Tensor) -> Tensor:
    cache = key_value_cache(model.bridge.original_model.config)
    pieces = [tokens[:, :4], *tokens[:, 4:].split(1, dim=1)]
    return torch.cat([model(piece, past_key_values=cache, use_cache=True) for piece in pieces], 1)


# ---------------------------------------------------------------- layers and sites


@torch.no_grad()
def _calls(model: Model) -> list[AttentionCall]:
    """Record each layer's attention call.

    A second, plain forward leaves the record of the backends used.
    """
    calls: list[AttentionCall] = []

    def record(call: AttentionCall) -> Tensor:
        calls.append(call)
        return attend(call).out

    with ExitStack() as handlers:
        for instrument in model.instruments.values():
            handlers.enter_context(instrument.handled_by(record))
        _forward(model)
    for instrument in model.instruments.values():
        instrument.layers.clear()
    _forward(model)
    return calls


def _forward(model: Model) -> Tensor:
    """Output of the one prompt on which precision is measured."""
    if not model.stacks:
        return model.forward([probe_inputs.prompt(model)])
    (batch,) = probe_inputs.batches(model.bridge.original_model, model.tokenizer).values()
    return probe_inputs.outputs(model.bridge.original_model, batch)


def _special_tokens(model: Model) -> Iterator[Finding]:
    """Which special tokens stand around every text, and why."""
    special = model.special_tokens
    if model.tokenizer is None or model.reads == "images":
        return
    before, after = (" ".join(map(repr, model.coder.texts(ids))) for ids in (special.before, special.after))
    shown = f"{before or 'nothing'} before a text, {after or 'nothing'} after it"
    own = "as the tokenizer itself adds" if special.policy == "tokenizer" else f"bos={special.policy}"
    yield Finding("prompts", "special tokens", None, f"{shown} ({own})")


def _layers(model: Model) -> Iterator[Finding]:
    report = model.backend_report()
    report["backend"] = report["backend"].str.replace(r" ×\d+", "", regex=True)
    if "stack" not in report:
        report["stack"] = ""
    for kind, rows in report.groupby(["stack", "attention", "backend"], sort=False):
        stack, attention, backend = cast("tuple[str, str, str]", kind)
        layers = rows["layer"].tolist()
        is_range = len(layers) == layers[-1] - layers[0] + 1
        place = f"{stack} layers {layers[0]}–{layers[-1]}" if is_range else f"{stack} layers {layers}"
        why = ", ".join(filter(None, rows["dense_because"].unique()))
        yield Finding("backend", place.strip(), None, f"{attention}: {backend}" + (f" (dense: {why})" if why else ""))
    has_attention = report["attention"] != "none"
    bypassing = report["layer"][(report["calls"] == 0) & has_attention].tolist()
    value = "every layer's attention reaches headstats"
    if not all(has_attention):
        value = "attention of every layer that has it reaches headstats; the others have none"
    if bypassing:
        value = f"attention of layers {bypassing} never reached headstats"
    yield Finding("backend", "call count", not bypassing, value)


def _heads(model: Model) -> Iterator[Finding]:
    """What the check at load found: whether head h of a component is the model's head h."""
    axes, section = model.head_axes, "heads"
    names = "q, k, v, z, result"
    for (stack, component), fault in axes.faults.items():
        yield Finding(section, f"{stack} {component}".strip(), False, f"refused: {fault}")
    if not axes.faults:
        yield Finding(section, names, True, "head h is head h of the model's own attention and projections")
    for component in sorted(axes.joint):
        yield Finding(section, component, None, "a norm over all heads follows: a change of one head scales all")


def _sites(model: Model) -> Iterator[Finding]:
    """Read and patch every component at every layer, on one prompt.

    Reports the reason if that fails.
    """
    if model.stacks:
        yield Finding(
            "sites", "all", None, "not available: sites address one stack, and an encoder–decoder has three; use hooks"
        )
        return
    for component in COMPONENTS:
        try:
            value = _patch_every_layer(model, component)
        except Exception as error:
            yield Finding("sites", component, None, f"not available: {error}")
            continue
        yield Finding("sites", component, None, value)


def _patch_every_layer(model: Model, component: str) -> str:
    """Set a component (its head 0) to zero at each layer.

    The logits must change, and both engines must agree. Neuron 0 is set to one, since it may be zero already.
    """
    heads = {"heads": 0} if COMPONENTS[component].heads else {}
    sites: list[Site] = [s.at(None) for s in model.sites(component, **heads)]
    value = float(COMPONENTS[component].heads == "neuron")
    gaps: dict[str, Tensor] = {}
    engine = ""
    for kind in ("auto", "naive"):
        patched = sites if kind == "auto" else [sites[0], sites[-1]]
        runner = Engine(model, kind)
        runner.check_sites(patched)
        (run,) = runner.record([probe_inputs.prompt(model)], [component])
        new_values = [torch.full_like(run.value(s, 0, len(run)), value) for s in patched]
        cells = [Cell(0, (CellWrite(s, 0, len(run), x),)) for s, x in zip(patched, new_values, strict=True)]
        base = run.logits
        gaps[kind] = runner.score([run], cells, lambda logits, _, b=base: (logits - b).abs().amax(-1), lambda _: None)
        engine = engine or runner.describe()
    idle = [str(s) for s, gap in zip(sites, gaps["auto"].tolist(), strict=True) if not gap > 0]
    if idle:
        raise InterpError(f"setting {', '.join(idle[:3])} to {value:g} changes no logit")
    ends = gaps["auto"][[0, -1]]
    scale = max(float(ends.max()), 1.0)
    if float((ends - gaps["naive"]).abs().max()) > 1e-2 * scale:
        raise InterpError("patching it gives other logits than a full forward does")
    layers = "" if sites[0].layer is None else f" at {len(sites)} layer(s)"
    return f"available{layers}; patched by: {engine}"


# ---------------------------------------------------------------- precision and memory


def _precision(model: Model) -> Iterator[Finding]:
    """Measure what changes in 16 bits and on the machine's accelerator."""
    section = "numbers that change"
    device_type = model.device.type
    yield from _stored(model, section)
    is_wide = model.dtype in TOLERANCE
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    accelerators = [device for device in available if available[device] and device != device_type]
    settings = [(dtype, device_type) for dtype in (torch.bfloat16, torch.float16) if is_wide]
    settings += [(torch.float32, device) for device in accelerators if model.dtype == torch.float32]
    with torch.no_grad():
        exact = _forward(model).double().cpu()
        for dtype, device in settings:
            name = f"{str(dtype).removeprefix('torch.')} on {device}"
            try:
                with _moved(model, dtype, device):
                    rounded = _forward(model).double().cpu()
            except Exception as error:
                yield Finding(section, name, None, f"cannot run: {type(error).__name__}: {error}")
                continue
            yield Finding(section, name, None, _consequences(rounded, exact))
    for device in ("cuda", "mps"):
        if device != device_type and device not in accelerators:
            yield Finding(section, device, None, "not measured: this machine has none")


def _stored(model: Model, section: str) -> Iterator[Finding]:
    config = getattr(model.bridge.original_model, "config", None)  # a native model of TransformerLens has none
    stored = getattr(config, "dtype", None)
    if model.dtype not in TOLERANCE:
        yield Finding(section, "loaded as", None, f"{model.dtype}: differences below 1e-2 of a logit may be rounding")
    elif isinstance(stored, torch.dtype) and stored != model.dtype:
        yield Finding(section, "loaded as", None, f"{model.dtype}; the config says {stored}")


def _consequences(rounded: Tensor, exact: Tensor) -> str:
    if not rounded.isfinite().all():
        return "overflows: logits are NaN or infinite"
    changed = int((rounded.argmax(-1) != exact.argmax(-1)).sum())
    kl = (exact.softmax(-1) * (exact.log_softmax(-1) - rounded.log_softmax(-1))).sum(-1).max().item()
    gap = (rounded - exact).abs().max().item()
    return (
        f"logits by up to {gap:.1g} (largest: {exact.abs().max():.3g}), KL up to {kl:.1g} nats, next token at "
        f"{changed} of {exact.shape[:-1].numel()} positions"
    )


@contextmanager
def _moved(model: Model, dtype: torch.dtype, device: str) -> Iterator[None]:
    """Hold the weights in another dtype or on another device inside the block.

    They are restored after it.
    """
    bridge = model.bridge
    parameters = {id(p): p for p in [*bridge.parameters(), *bridge.original_model.parameters()]}.values()
    buffers = {id(b): b for b in [*bridge.buffers(), *bridge.original_model.buffers()]}.values()
    original = [(t, t.data) for t in [*parameters, *buffers]]
    try:
        for p in parameters:
            p.data = p.data.to(device=device, dtype=dtype if p.is_floating_point() else p.dtype)
        for b in buffers:
            b.data = b.data.to(device)
        for module in bridge.original_model.modules():  # rotary frequencies stay in float32, as transformers keeps them
            for name, b in module.named_buffers(recurse=False):
                if b.is_floating_point() and "freq" not in name:
                    b.data = b.data.to(dtype)
        yield
    finally:
        for tensor, data in original:
            tensor.data = data


def _memory(model: Model, calls: list[AttentionCall], context: int) -> Iterator[Finding]:
    if model.reads != "text":
        size = sum(p.numel() * p.element_size() for p in model.bridge.original_model.parameters())
        yield Finding(
            "memory",
            "weights",
            None,
            f"{_bytes(size):>9}  parameters; activations are measured for text-only models",
        )
        return
    section = f"memory for one prompt of {context:,} tokens"
    for name, (size, how) in memory_needs(model, calls, context).items():
        yield Finding(section, name, None, f"{_bytes(size):>9}  {how}")


def _bytes(n: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024 or unit == "GiB":
            break
        n /= 1024
    return f"{n:,.0f} {unit}" if n >= 10 or unit == "B" else f"{n:.1f} {unit}"
