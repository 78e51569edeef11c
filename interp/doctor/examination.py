"""The doctor: is this model, as interp runs it, the model you meant? And what will it cost, and lose, where?

`examine` checks one model against Hugging Face's eager attention and tries everything else out: which backend
computes each layer, which sites can be read and patched, what half precision changes, what a context needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, cast

import pandas as pd
import torch
from torch import Tensor

from interp.doctor import probe_inputs as trial
from interp.doctor.matrix import difference
from interp.doctor.memory import needed
from interp.engine import Cell, Engine, Write
from interp.errors import InterpError
from interp.model.attention_call import AttentionCall
from interp.model.hf_classes import key_value_cache
from interp.model.instrument import attend
from interp.model.loading import read, wrap
from interp.model.model import Model, load
from interp.model.vision_towers import vision_tower
from interp.sites import COMPONENTS, Site

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}  # of the largest logit; other dtypes: HALF
HALF = 5e-2


@dataclass(frozen=True)
class Finding:
    """One line of the report. ``passed``: None where nothing can fail."""

    section: str
    item: str
    passed: bool | None
    value: str


@dataclass(frozen=True)
class Examination:
    """What the doctor found; prints itself."""

    title: str
    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(f.passed is not False for f in self.findings)

    def frame(self) -> pd.DataFrame:
        """One row per finding: section, item, passed (empty where nothing can fail), value."""
        return pd.DataFrame(
            [(f.section, f.item, f.passed, f.value) for f in self.findings],
            columns=["section", "item", "passed", "value"],
        )

    def __str__(self) -> str:
        lines, width = [self.title], max(len(f.item) for f in self.findings)
        for section in dict.fromkeys(f.section for f in self.findings):
            lines += ["", section]
            for f in self.findings:
                if f.section == section:
                    mark = {True: "✓", False: "✗", None: " "}[f.passed]
                    lines.append(f"  {mark} {f.item:<{width}}  {f.value}")
        return "\n".join([*lines, "", "all checks passed" if self.passed else "SOME CHECKS FAILED"])


def examine(
    source: Any = "smollm2",
    *,
    context: int | None = None,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    **options: Any,
) -> Examination:
    """Examine a model named or given as in `interp.load` (which takes ``options`` too).

    ``context``: tokens for which memory is worked out (default: the model's own). A Model or TransformerBridge is
    wrapped already, so its logits cannot be compared with eager's: give its name instead if you want that.

    Raises ModelError if the model cannot be loaded at all, InterpError for a context it does not have.
    """
    batches: dict[str, dict[str, Tensor]] = {}
    expected: dict[str, Tensor] = {}
    wrapped = isinstance(source, Model) or hasattr(source, "original_model")
    if wrapped:
        model = load(source, dtype=dtype, device=device)
    else:
        weights = read(source, dtype=_dtype(dtype), device=device, **options)
        weights = replace(weights, model=vision_tower(weights.model))
        batches = trial.batches(weights.model, weights.tokenizer)
        expected = _eager(weights.model, batches)
        bridge, name = wrap(weights)
        model = Model(bridge, name=name)
    context = model.n_ctx if context is None else context
    if not 1 <= context <= model.n_ctx:
        raise InterpError(f"--context {context}: {model.name} has a context of {model.n_ctx} tokens; ask for 1 to that")
    calls = _calls(model)
    findings = [
        *_logits(model, batches, expected, wrapped),
        *_layers(model),
        *_sites(model),
        *_precision(model),
        *_memory(model, calls, context),
    ]
    return Examination(repr(model), tuple(findings))


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    return getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype


# ---------------------------------------------------------------- logits


@torch.no_grad()
def _eager(model: Any, batches: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Logits by Hugging Face's eager attention, before anything is wrapped."""
    model.eval()
    with suppress(ValueError, NotImplementedError):  # models that predate the attention interface are always eager
        model.set_attn_implementation("eager")
    return {name: trial.outputs(model, batch) for name, batch in batches.items()}


@torch.no_grad()
def _logits(
    model: Model, batches: dict[str, dict[str, Tensor]], expected: dict[str, Tensor], wrapped: bool
) -> Iterator[Finding]:
    section = "logits against Hugging Face eager attention"
    if wrapped:
        yield Finding(section, "not compared", None, "the model came wrapped; give its name to compare")
        return
    allowed = TOLERANCE.get(model.dtype, HALF)
    for name, batch in batches.items():
        gap = difference(trial.outputs(model.bridge.original_model, batch), expected[name])
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
    """What each layer asks of the kernel; and, from a plain forward after it, the record of who answered."""
    seen: list[AttentionCall] = []
    with ExitStack() as held:
        for instrument in model.instruments.values():
            held.enter_context(instrument.handled_by(lambda call: (seen.append(call), attend(call).out)[1]))
        _forward(model)
    for instrument in model.instruments.values():
        instrument.layers.clear()
    _forward(model)
    return seen


def _forward(model: Model) -> Tensor:
    """Output of the prompt that everything is tried on."""
    if not model.stacks:
        return model.forward([trial.prompt(model)])
    (batch,) = trial.batches(model.bridge.original_model, model.tokenizer).values()
    return trial.outputs(model.bridge.original_model, batch)


def _layers(model: Model) -> Iterator[Finding]:
    report = model.backend_report()
    report["backend"] = report["backend"].str.replace(r" ×\d+", "", regex=True)
    if "stack" not in report:
        report["stack"] = ""
    for kind, rows in report.groupby(["stack", "attention", "backend"], sort=False):
        stack, attention, backend = cast("tuple[str, str, str]", kind)
        layers = rows["layer"].tolist()
        run = len(layers) == layers[-1] - layers[0] + 1
        where = f"{stack} layers {layers[0]}–{layers[-1]}" if run else f"{stack} layers {layers}"
        why = ", ".join(filter(None, rows["dense_because"].unique()))
        yield Finding("backend", where.strip(), None, f"{attention}: {backend}" + (f" (dense: {why})" if why else ""))
    bypassing = report["layer"][report["calls"] == 0].tolist()
    value = f"attention of layers {bypassing} never arrived" if bypassing else "every layer's attention arrives"
    yield Finding("backend", "call count", not bypassing, value)


def _sites(model: Model) -> Iterator[Finding]:
    """Read and patch every component at every layer, on one prompt; say why where that fails."""
    if model.stacks:
        yield Finding(
            "sites", "all", None, "not available: sites name one stack, and an encoder–decoder has three; use hooks"
        )
        return
    for component in COMPONENTS:
        try:
            value = _try(model, component)
        except Exception as error:
            yield Finding("sites", component, None, f"not available: {error}")
            continue
        yield Finding("sites", component, None, value)


def _try(model: Model, component: str) -> str:
    """Set a component to zero at each layer (head 0): the logits must change, and both engines agree.

    Neuron 0 is set to one, since it may well be zero.
    """
    heads = {"heads": 0} if COMPONENTS[component].heads else {}
    sites: list[Site] = [s.at(None) for s in model.sites(component, **heads)]
    gaps: dict[str, Tensor] = {}
    how = ""
    for kind in ("auto", "naive"):
        chosen = sites if kind == "auto" else [sites[0], sites[-1]]
        runner = Engine(model, kind)
        runner.check_sites(chosen)
        (run,) = runner.record([trial.prompt(model)], [component])
        to = float(COMPONENTS[component].heads == "neuron")
        cells = [Cell(0, (Write(s, 0, len(run), torch.full_like(run.value(s, 0, len(run)), to)),)) for s in chosen]
        base = run.logits
        gaps[kind] = runner.score([run], cells, lambda logits, _, b=base: (logits - b).abs().amax(-1), lambda _: None)
        how = how or runner.describe()
    idle = [str(s) for s, gap in zip(sites, gaps["auto"].tolist(), strict=True) if not gap > 0]
    if idle:
        raise InterpError(f"setting {', '.join(idle[:3])} to {to:g} changes no logit")
    ends = gaps["auto"][[0, -1]]
    scale = max(float(ends.max()), 1.0)
    if float((ends - gaps["naive"]).abs().max()) > 1e-2 * scale:
        raise InterpError("patching it gives other logits than a full forward does")
    where = "" if sites[0].layer is None else f" at {len(sites)} layer(s)"
    return f"available{where}; patched by: {how}"


# ---------------------------------------------------------------- precision and memory


def _precision(model: Model) -> Iterator[Finding]:
    """What changes when weights and activations are rounded to 16 bits, and on the machine's accelerator."""
    section = "numbers that change"
    here = model.device.type
    yield from _stored(model, section)
    wide = model.dtype in TOLERANCE
    accelerators = [d for d, there in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available()))
                    if there and d != here]  # fmt: skip
    trials = [(dtype, here) for dtype in (torch.bfloat16, torch.float16) if wide]
    trials += [(torch.float32, device) for device in accelerators if model.dtype == torch.float32]
    with torch.no_grad():
        exact = _forward(model).double().cpu()
        for dtype, device in trials:
            name = f"{str(dtype).removeprefix('torch.')} on {device}"
            try:
                with _changed(model, dtype, device):
                    rounded = _forward(model).double().cpu()
            except Exception as error:
                yield Finding(section, name, None, f"cannot run: {type(error).__name__}: {error}")
                continue
            yield Finding(section, name, None, _consequences(rounded, exact))
    for device in ("cuda", "mps"):
        if device != here and device not in accelerators:
            yield Finding(section, device, None, "not measured: there is none on this machine")


def _stored(model: Model, section: str) -> Iterator[Finding]:
    stored = getattr(model.bridge.original_model.config, "dtype", None)
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
def _changed(model: Model, dtype: torch.dtype, device: str) -> Iterator[None]:
    """The model with its weights in another dtype or place inside the block, and as it was after it."""
    bridge = model.bridge
    parameters = {id(p): p for p in [*bridge.parameters(), *bridge.original_model.parameters()]}.values()
    buffers = {id(b): b for b in [*bridge.buffers(), *bridge.original_model.buffers()]}.values()
    before = [(t, t.data) for t in [*parameters, *buffers]]
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
        for tensor, data in before:
            tensor.data = data


def _memory(model: Model, calls: list[AttentionCall], context: int) -> Iterator[Finding]:
    if model.reads != "text":
        size = sum(p.numel() * p.element_size() for p in model.bridge.original_model.parameters())
        yield Finding(
            "memory",
            "weights",
            None,
            f"{_bytes(size):>9}  parameters; activations are measured of models of text alone",
        )
        return
    section = f"memory for one prompt of {context:,} tokens"
    for name, (size, how) in needed(model, calls, context).items():
        yield Finding(section, name, None, f"{_bytes(size):>9}  {how}")


def _bytes(n: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024 or unit == "GiB":
            break
        n /= 1024
    return f"{n:,.0f} {unit}" if n >= 10 or unit == "B" else f"{n:.1f} {unit}"
