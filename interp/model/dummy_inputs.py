"""Dummy inputs for testing models; deterministic, no processor needed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from interp.model.loaded_model import LoadedModel

WORDS_BEFORE, WORDS_AFTER = 3, 8


def images(hf: Any, batch: int = 1, seed: int = 0) -> Tensor:
    """Random images [batch, channel, height, width] for a vision encoder.

    They have the size that it was made for, in float64.
    """
    config = getattr(hf.config, "vision_config", None) or hf.config
    size, channels = config.image_size, getattr(config, "num_channels", 3)
    height, width = (size, size) if isinstance(size, int) else size
    return _noise(seed, batch, channels, height, width)


def _noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def image_prompt(hf: Any, seed: int = 0, words: int = WORDS_AFTER) -> dict[str, Tensor]:
    """Dummy prompt with one image for a vision–language model; a batch of one.

    It has some tokens, the image's tokens, and some tokens again. ``seed`` determines the image, not the tokens. Raises
    NotImplementedError for a family whose prompts are unknown.
    """
    config = hf.config
    inputs = _pixels(hf, seed)
    token = getattr(config, "image_token_id", None)
    token = config.image_token_index if token is None else token
    vocab = config.get_text_config().vocab_size
    around = [i for i in range(11, vocab) if i not in _reserved(config)][: WORDS_BEFORE + words]
    ids = [*around[:WORDS_BEFORE], *[token] * _n_tokens(hf, inputs), *around[WORDS_BEFORE:]]
    inputs["input_ids"] = torch.tensor([ids])
    if "qwen2" in config.model_type:  # marks the tokens whose rotary positions are those of an image
        inputs["mm_token_type_ids"] = torch.tensor([[int(i == token) for i in ids]])
    if config.model_type == "paligemma":  # the whole prompt is a prefix, read in both directions
        inputs["token_type_ids"] = torch.zeros(1, len(ids), dtype=torch.long)
    return inputs


def _reserved(config: Any) -> set[int]:
    """Tokens with a special meaning for a vision–language model."""
    names = [n for n in vars(config) if n.endswith(("_token_id", "_token_index"))]
    return {v for n in names if isinstance(v := getattr(config, n, None), int)}


def _pixels(hf: Any, seed: int) -> dict[str, Tensor]:
    config, vision = hf.config, hf.config.vision_config
    if "qwen2" in config.model_type:
        grid = torch.tensor([[1, 2 * vision.spatial_merge_size, 2 * vision.spatial_merge_size]])
        width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        return {"pixel_values": _noise(seed, int(grid.prod()), width), "image_grid_thw": grid}
    image = images(hf, 1, seed)
    if config.model_type in ("idefics3", "smolvlm"):
        return {"pixel_values": image[None]}
    if config.model_type == "llava_next":
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        size = config.image_grid_pinpoints[0]
        tiles = image_size_to_num_patches(size, config.image_grid_pinpoints, vision.image_size)
        pixels = torch.cat([images(hf, tiles - 1, seed + 1), image])[None]
        return {"pixel_values": pixels, "image_sizes": torch.tensor([size])}
    if config.model_type in ("llava", "paligemma", "blip-2"):
        return {"pixel_values": image}
    raise NotImplementedError(f"no dummy image prompt for {config.model_type}")


@torch.no_grad()
def _n_tokens(hf: Any, inputs: dict[str, Tensor]) -> int:
    """How many tokens the image becomes, according to the model itself."""
    if hf.config.model_type == "blip-2":
        return int(hf.config.num_query_tokens)
    first = next(hf.parameters())
    features = hf.get_image_features(**placed(inputs, first.device, first.dtype)).pooler_output
    features = features if isinstance(features, Tensor) else torch.cat(list(features))
    return features.numel() // features.shape[-1]


def placed(inputs: dict[str, Tensor], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Move inputs to a device, floats also to a model's dtype."""
    return {k: v.to(device, dtype if v.is_floating_point() else v.dtype) for k, v in inputs.items()}


def probe_inputs(hf: Any, tokens: Tensor) -> dict[str, Tensor]:
    """Dummy inputs of an encoder–decoder.

    Tokens for both sides, or input features for a speech model's encoder.
    """
    decoder = {"decoder_input_ids": tokens.flip(1)[:, :7]}
    if hf.main_input_name != "input_features":
        return {"input_ids": tokens, **decoder}
    frames = 2 * hf.config.max_source_positions  # the first convolutions halve their number
    wave = torch.linspace(0, 20, hf.config.num_mel_bins * frames).sin()
    return {"input_features": wave.reshape(1, -1, frames).expand(len(tokens), -1, -1), **decoder}


def probe_logits(model: LoadedModel, tokens: Tensor) -> Tensor:
    """Logits of an encoder–decoder on `probe_inputs`."""
    inputs = placed(probe_inputs(model.bridge.original_model, tokens), model.device, model.dtype)
    return model.bridge.original_model(**inputs, use_cache=False).logits
