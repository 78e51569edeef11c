"""Which of transformers' classes a model of images is opened as, and which part of it is looked at."""

from __future__ import annotations

from typing import Any

from interp.errors import ModelError


def class_for_images(config: Any) -> Any | None:
    """The class for a checkpoint that reads images: the one it was made for. None if it reads none."""
    import transformers as tf

    from interp.model.vision_adapters import ENCODERS

    made_for = (getattr(config, "architectures", None) or [""])[0]
    known = getattr(tf, made_for, None)
    if made_for in ENCODERS or made_for in ("CLIPModel", "SiglipModel"):
        return known
    if type(config) in tf.AutoModelForImageTextToText._model_mapping:
        return known or tf.AutoModelForImageTextToText
    return known if getattr(known, "main_input_name", "") == "pixel_values" else None


def reads_images_alone(model: Any) -> bool:
    """Whether a model object takes images and no text: it has no tokenizer."""
    import inspect

    takes = inspect.signature(model.forward).parameters
    return _is_pair_of_towers(model) or ("pixel_values" in takes and "input_ids" not in takes)


def _is_pair_of_towers(model: Any) -> bool:
    return hasattr(model, "vision_model") and hasattr(model, "text_model") and hasattr(model, "logit_scale")


def vision_tower(model: Any) -> Any:
    """The vision encoder of a CLIP or SigLIP model, on the same weights; any other model as it is.

    CLIP's gives the embedding that is compared with texts (before it is normed), SigLIP's the pooled state.
    """
    import torch
    import transformers as tf

    if not _is_pair_of_towers(model):
        return model
    if type(model).__name__ == "SiglipModel":
        tower = model.vision_model
    elif type(model).__name__ == "CLIPModel":
        with torch.device("meta"):  # its own weights are replaced at once
            tower = tf.CLIPVisionModelWithProjection(model.config.vision_config)
        tower.vision_model, tower.visual_projection = model.vision_model, model.visual_projection
    else:
        raise ModelError(
            f"{type(model).__name__} joins an image and a text tower in a way that interp does not know: pass its "
            "vision_model"
        )
    tower.config.architectures = [type(tower).__name__]
    return tower
