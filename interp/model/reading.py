"""Read a Hugging Face model and its tokenizer, from a name, a folder, a GGUF file or a model object.

Nothing is installed, and no code of a model's folder is run unless the caller trusts it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import threading
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from interp.errors import ModelError
from interp.model import vision_towers as towers
from interp.model.load_errors import first_line, short_cause, why_not, why_not_object
from interp.model.names import EMBEDDED, did_you_mean, is_hub_unreachable
from interp.model.wiring import Wiring, wiring_of
from interp.prompts.special_tokens import BosPolicy

log = logging.getLogger("interp")

QUANTIZED = ("8bit", "4bit")
BUILDING = threading.RLock()  # one model is read or built at a time: functions of the libraries are replaced meanwhile


@dataclass(frozen=True)
class Weights:
    """A Hugging Face model before it is wrapped, its tokenizer, and its name.

    Results carry this name.
    """

    name: str
    model: Any
    tokenizer: Any
    bos: BosPolicy = "tokenizer"  # unless the caller says otherwise


def read(
    source: Any,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    device_map: str | dict[str, Any] | None = None,
    quantize: str | None = None,
    copy: bool = False,
) -> Weights:
    """Read weights and tokenizer of a name, a folder, a GGUF file or a model object.

    ``copy``: copy a model object. Raises ModelError for anything that cannot be read.
    """
    hub: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    hub |= {"revision": revision} if revision else {}
    hub |= _placement(device, device_map, quantize)
    if isinstance(source, torch.nn.Module):
        if device_map is not None or quantize is not None:
            raise ModelError("device_map= and quantize= act while weights are read: give a name, not a model object")
        return _from_object(source, tokenizer, dtype, device, trust_remote_code, copy)
    if copy:
        raise ModelError("copy=True copies a model object; what is read from a name or a folder belongs to no one else")
    if not isinstance(source, str | Path):
        raise ModelError(
            f"cannot load a {type(source).__name__}: pass a hub id, a folder, a .gguf file, a Hugging Face model "
            "or a TransformerBridge"
        )
    name = str(source)
    if name.lower() in EMBEDDED:
        from interp.model.embedded import embedded_model

        name, location = "SmolLM2-135M-Instruct", embedded_model()
        weights = _from_pretrained(name, location, dtype, device, tokenizer, hub)
        # as TransformerLens reads it, and as all figures of these docs were measured: <|im_start|> in front
        return replace(weights, bos=weights.tokenizer.bos_token_id is not None or "tokenizer")
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf" or path.exists():
        return _from_path(path, dtype, device, tokenizer, hub)
    if name.startswith((".", "/", "~")):
        raise ModelError(
            f"{name} does not exist; give an existing folder, a .gguf file or a hub id like 'gpt2'.{did_you_mean(name)}"
        )
    if is_hub_unreachable(name):  # what the cache holds can be loaded; transformers would try again and again
        hub["local_files_only"] = True
    return _from_pretrained(name, name, dtype, device, tokenizer, hub)


def _placement(device: Any, device_map: Any, quantize: str | None) -> dict[str, Any]:
    """Check ``device_map`` and ``quantize``; return them as transformers' options."""
    options: dict[str, Any] = {}
    if device_map is not None:
        if device is not None:
            raise ModelError("give device= (one device) or device_map= (several), not both")
        _require("accelerate", "device_map=")
        options["device_map"] = device_map
    if quantize is not None:
        if quantize not in QUANTIZED:
            raise ModelError(f"quantize={quantize!r}: one of {', '.join(map(repr, QUANTIZED))} is expected")
        _require("bitsandbytes", f"quantize={quantize!r}")
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=quantize == "8bit", load_in_4bit=quantize == "4bit"
        )
    return options


def _require(package: str, what: str) -> None:
    """Raise ModelError unless a package is installed."""
    if importlib.util.find_spec(package) is None:
        raise ModelError(f"{what} needs the package {package}, which is not installed: pip install {package}")


def _from_path(path: Path, dtype: Any, device: Any, tokenizer: Any, hub: dict[str, Any]) -> Weights:
    if not path.exists():
        raise ModelError(f"{path} does not exist.{did_you_mean(str(path))}")
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelError(f"{path} is a file but not a .gguf; give the folder that holds config.json instead")
        return _from_pretrained(path.stem, path.parent, dtype, device, tokenizer, {**hub, "gguf_file": path.name})
    if not (path / "config.json").exists():
        ggufs = sorted(p.name for p in path.glob("*.gguf"))
        hint = f"; it holds {ggufs[0]}: pass that file" if ggufs else ""
        raise ModelError(f"{path} holds no config.json, so it is not a Hugging Face model folder{hint}")
    return _from_pretrained(path.name, path, dtype, device, tokenizer, hub)


def _from_pretrained(
    name: str, location: str | Path, dtype: Any, device: Any, tokenizer: Any, hub: dict[str, Any]
) -> Weights:
    # Safetensors (or GGUF) only: pickled checkpoints can execute code when they are opened.
    safe = {} if "gguf_file" in hub else {"use_safetensors": True}
    try:
        with quiet():
            model_and_info: Any = _auto_class(location, hub).from_pretrained(
                location, dtype=dtype or torch.float32, output_loading_info=True, **safe, **hub
            )
    except Exception as error:
        raise ModelError(why_not(name, error)) from error
    model, info = model_and_info
    _refuse_mismatch(name, model, info)
    if tokenizer is None and not towers.reads_images_alone(model):
        tokenizer = _tokenizer_at(name, location, hub)
    tokenizer = None if tokenizer is False else tokenizer
    if device is not None:
        model = model.to(device)
    return Weights(name, model, tokenizer)


def _auto_class(location: str | Path, hub: dict[str, Any]) -> Any:
    """The class of transformers that opens a checkpoint, according to its config."""
    import transformers as tf

    if "gguf_file" in hub:
        return tf.AutoModelForCausalLM
    options = {key: hub[key] for key in ("trust_remote_code", "revision", "local_files_only") if key in hub}
    config = tf.AutoConfig.from_pretrained(location, **options)
    if (for_images := towers.class_for_images(config)) is not None:
        return for_images
    architecture = (getattr(config, "architectures", None) or [""])[0]
    if is_encoder(config):
        return tf.AutoModel if architecture.endswith("Model") else tf.AutoModelForMaskedLM
    if config.is_encoder_decoder:
        is_speech = type(config) in tf.AutoModelForSpeechSeq2Seq._model_mapping
        return tf.AutoModelForSpeechSeq2Seq if is_speech else tf.AutoModelForSeq2SeqLM
    return tf.AutoModelForCausalLM


def is_encoder(config: Any) -> bool:
    """Whether a config is that of a bidirectional text encoder, such as BERT or RoBERTa."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    is_decoder = getattr(config, "is_decoder", False) or getattr(config, "is_encoder_decoder", False)
    return getattr(config, "model_type", None) in MASKED and not is_decoder


def _tokenizer_at(name: str, location: str | Path, hub: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    read_by_tokenizers = ("trust_remote_code", "revision", "gguf_file", "local_files_only")
    options = {"trust_remote_code": False, **{key: hub[key] for key in read_by_tokenizers if key in hub}}
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(location, **options)
    except Exception as error:
        raise ModelError(
            f"{name} has weights, but no tokenizer that can be read ({short_cause(error)}): pass tokenizer=…, "
            "or tokenizer=False for prompts of token ids"
        ) from error


def _refuse_mismatch(name: str, model: Any, info: dict[str, Any]) -> None:
    """Raise ModelError if a checkpoint and its config differ.

    transformers fills weights that a checkpoint lacks with random numbers, and drops those that it does not know.
    """
    for what, keys, meaning in (
        ("lacks", info["missing_keys"], "would be random numbers"),
        ("holds other shapes for", info["mismatched_keys"], "would be random numbers"),
        ("also holds", info["unexpected_keys"], "would be ignored"),
    ):
        if keys:
            names = sorted(k if isinstance(k, str) else str(k[0]) for k in keys)
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise ModelError(
                f"{name}: the weights do not match config.json, which makes a {type(model).__name__}: the checkpoint "
                f"{what} {shown}, which {meaning}. Correct config.json, or fetch the checkpoint that belongs to it."
            )


def _from_object(
    model: Any, tokenizer: Any, dtype: Any, device: Any, trust_remote_code: bool, is_copied: bool
) -> Weights:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ModelError(why_not_object(model))
    name = getattr(model.config, "_name_or_path", "") or type(model).__name__
    if tokenizer is None and not towers.reads_images_alone(model):
        tokenizer = _tokenizer_of(name, trust_remote_code)
    tokenizer = None if tokenizer is False else tokenizer
    wiring = wiring_of(model)
    if is_copied:
        model = _copied(name, model, wiring)
    elif wiring is not None:
        wiring.release("its model object was loaded again, and belongs to the newer Model")
    if dtype is not None or device is not None:
        model = model.to(*(x for x in (device, dtype) if x is not None))
    return Weights(name, model, tokenizer)


def _copied(name: str, model: Any, wiring: Wiring | None) -> Any:
    """A deep copy of a model object, as it was before an earlier loading."""
    try:
        with wiring.undone() if wiring is not None else contextlib.nullcontext():
            return deepcopy(model)
    except Exception as error:
        raise ModelError(f"{name} cannot be copied ({first_line(error)}): load it without copy=True") from error


def _tokenizer_of(name: str, trust_remote_code: bool) -> Any:
    """Read the tokenizer stored with a model object's weights; warn and return None if there is none."""
    from transformers import AutoTokenizer

    try:
        if not name or not (Path(name).exists() or "/" in name):
            raise OSError("the model object does not say where it came from")
        with quiet():
            return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:
        log.warning(
            "%s is loaded without a tokenizer (%s): its prompts are token ids. For text, pass tokenizer=…; "
            "tokenizer=False says that there is none", name, short_cause(error),
        )  # fmt: skip
        return None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress transformers' progress bars, info lines and questions while a model loads, one at a time.

    Without an explicit ``trust_remote_code`` transformers asks on standard output, which is hidden here, whether to run
    code from the model's folder. TransformerLens reads tokenizers in this way. Here the answer is no.
    """
    from transformers import dynamic_module_utils
    from transformers.utils import logging as hf_logging

    with BUILDING:
        has_progress_bar = hf_logging.is_progress_bar_enabled()
        level = logging.getLogger("transformers").level
        seconds_to_answer = dynamic_module_utils.TIME_OUT_REMOTE_CODE
        hf_logging.disable_progress_bar()
        logging.getLogger("transformers").setLevel(logging.ERROR)
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                yield
        finally:
            dynamic_module_utils.TIME_OUT_REMOTE_CODE = seconds_to_answer
            logging.getLogger("transformers").setLevel(level)
            if has_progress_bar:
                hf_logging.enable_progress_bar()


def check_device(device: Any) -> None:
    """Raise ModelError for a device that is unknown or that this machine lacks."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        first = str(error).splitlines()[0]
        raise ModelError(f"cannot use device {str(device)!r}: {first}") from error


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Return a floating dtype that may be given by its name. Raises ModelError for anything else; None stays None."""
    named = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if named is not None and isinstance(named, torch.dtype) and named.is_floating_point:
        return named
    if dtype is None:
        return None
    raise ModelError(
        f"dtype must be a floating torch dtype or its name: float32, bfloat16, float16, float64; got {dtype!r}"
    )
