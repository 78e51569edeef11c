"""Make a TransformerBridge of a model that was read. Nothing is installed."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch

from interp.errors import ModelError
from interp.model import bridge_adapters as adapters
from interp.model import vision_towers as towers
from interp.model.head_layout import correct_heads
from interp.model.load_errors import first_line
from interp.model.reading import BUILDING, Weights, is_encoder, quiet, read
from interp.model.wiring import WIRING, Wiring
from interp.prompts.special_tokens import PROBE, BosPolicy, SpecialTokens


@dataclass(frozen=True)
class Wrapped:
    """A TransformerBridge, its name, its tokenizer as it was before wrapping, and the special tokens of prompts."""

    bridge: Any
    name: str
    tokenizer: Any
    special: SpecialTokens


@contextlib.contextmanager
def alone_with(source: Any) -> Iterator[None]:
    """Load a model object or bridge inside the block: one at a time, and not while another thread runs it."""
    if not isinstance(source, torch.nn.Module):
        yield
        return
    with contextlib.ExitStack() as held:
        while True:
            held.enter_context(BUILDING)
            wiring: Wiring | None = vars(source).get(WIRING)
            if wiring is None:
                break
            if wiring.lock.try_to_enter():
                held.push(wiring.lock)
                break
            held.close()  # others may load meanwhile
            with wiring.lock:
                pass
        yield


def boot(source: Any, bos: BosPolicy | None = None, **options: Any) -> Wrapped:
    """Make a TransformerBridge, with a name; options as for `read`, ``bos`` as for `interp.load`.

    Raises ModelError with one clear message.
    """
    from transformer_lens.model_bridge import TransformerBridge

    if isinstance(source, TransformerBridge):
        if options.get("copy"):
            raise ModelError("copy=True takes a Hugging Face model object, not a TransformerBridge")
        move = [options[key] for key in ("device", "dtype") if options.get(key) is not None]
        if move:
            source.to(*move)
        correct_heads(source)
        name = str(getattr(source.cfg, "model_name", None) or "bridge")
        return Wrapped(source, name, source.tokenizer, special_tokens_of(source, name, bos))
    return wrap(read(source, **options), bos)


def wrap(weights: Weights, bos: BosPolicy | None = None) -> Wrapped:
    """Build a TransformerBridge around a Hugging Face model.

    ``bos``: as for `interp.load`. Raises ModelError if TransformerLens cannot wrap the model.
    """
    from transformer_lens.model_bridge import TransformerBridge

    name, model = weights.name, towers.vision_tower(weights.model)
    special = _special_tokens(weights, weights.bos if bos is None else bos)
    _refuse_unusable(name, model)
    adapters.register()
    wiring = Wiring([weights.model, *([] if model is weights.model else [model])])
    adapters.repair(model)
    if not getattr(model.config, "architectures", None):
        model.config.architectures = [type(model).__name__]  # missing in a model made from a config alone
    first = next(model.parameters())
    try:
        with quiet(), _without_installing():
            bridge = TransformerBridge.boot_transformers(
                name, hf_model=model, tokenizer=_copy_for_bridge(weights.tokenizer), device=first.device,
                dtype=first.dtype,
            )  # fmt: skip
    except Exception as error:
        wiring.undo()
        raise ModelError(f"TransformerLens cannot wrap {name} ({type(model).__name__}): {first_line(error)}") from error
    correct_heads(bridge)
    wiring.finish()
    vars(bridge)[WIRING] = wiring
    _tell_bridge(bridge, special)
    return Wrapped(bridge, name, weights.tokenizer, special)


def _special_tokens(weights: Weights, bos: BosPolicy) -> SpecialTokens:
    config = getattr(weights.model, "config", None)  # a native model has none
    is_continued = not (is_encoder(config) or getattr(config, "is_encoder_decoder", False))
    return SpecialTokens.of(weights.tokenizer).following(bos, weights.name, is_continued=is_continued)


def special_tokens_of(bridge: Any, name: str, bos: BosPolicy | None = None) -> SpecialTokens:
    """Return the special tokens of prompts of an existing bridge: by default those that its ``to_tokens`` adds.

    With ``bos``, the bridge is set to the same policy.
    """
    if bridge.tokenizer is None:
        return SpecialTokens().following("tokenizer" if bos is None else bos, name, is_continued=True)
    weights = Weights(name, bridge.original_model, bridge.tokenizer)
    special = _special_tokens(weights, "tokenizer" if bos is None else bos)
    if bos is None and (first := bridge.to_tokens(PROBE)[0, 0].item()) not in special.before[:1]:
        special = _special_tokens(weights, first == special.bos)
    _tell_bridge(bridge, special)
    return special


def _copy_for_bridge(tokenizer: Any) -> Any:
    """Copy a tokenizer for TransformerLens, which changes it: padding side, and a BOS and PAD token where none is.

    The copy says that it adds BOS, whether or not it does: else TransformerLens would read another one from its hub.
    """
    if tokenizer is None:
        return None
    tokenizer = deepcopy(tokenizer)
    tokenizer.init_kwargs.setdefault("name_or_path", "")
    tokenizer.init_kwargs["add_bos_token"] = True
    return tokenizer


def _tell_bridge(bridge: Any, special: SpecialTokens) -> None:
    """Make ``bridge.to_tokens`` put the same special tokens around a text."""
    bridge.cfg.default_prepend_bos = bool(special.before)
    bridge.cfg.tokenizer_appends_eos = bridge.cfg.tokenizer_appends_eos and not special.after


def _refuse_unusable(name: str, model: Any) -> None:
    """Raise ModelError unless weights are in memory, on one device, and outside inference mode.

    They may be on several if accelerate moves activations between these.
    """
    devices = sorted({str(p.device) for p in model.parameters()})
    if any(p.is_inference() for p in model.parameters()):
        raise ModelError(
            f"{name}: its weights were made inside torch.inference_mode(), so that no gradient can pass them: make the "
            "model outside that block, or load it with copy=True"
        )
    if "meta" in devices:
        raise ModelError(
            f"{name}: some weights are not in memory (offloaded to the CPU or disk by device_map, or never loaded). "
            "interp hooks and fingerprints weights where they are: use fewer bits, more devices or a smaller model."
        )
    if len(devices) > 1 and not getattr(model, "hf_device_map", None):
        raise ModelError(
            f"{name}: weights lie on {', '.join(devices)}, and nothing moves activations between them: move the model "
            "to one device with model.to(…), or load it by name with device_map='auto'"
        )


@contextlib.contextmanager
def _without_installing() -> Iterator[None]:
    """Replace three functions of TransformerLens while it builds a bridge.

    Afterwards they are its own again. For a model without a tokenizer TransformerLens would request one from the hub,
    and for a model that reads images a processor; it would also pip-install torchvision. That torchvision would bring
    another torch with it, and a model object need not be on any hub.
    """
    from transformer_lens.model_bridge.sources.transformers import helpers, source

    building: Any = source
    with BUILDING:
        originals = (
            helpers._ensure_torchvision, building.load_modality_processor, building.skip_tokenizer_for_modality,
        )  # fmt: skip
        building.skip_tokenizer_for_modality = lambda _config: True
        helpers._ensure_torchvision = lambda: importlib.util.find_spec("torchvision") is not None
        building.load_modality_processor = lambda *_args, **_options: None
        try:
            yield
        finally:
            (
                helpers._ensure_torchvision, building.load_modality_processor, building.skip_tokenizer_for_modality,
            ) = originals  # fmt: skip
