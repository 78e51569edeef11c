"""Models that read images: the class that opens them, and the part that is used."""

from __future__ import annotations

from typing import Any

from interp.errors import ModelError


def class_for_images(config: Any) -> Any | None:
    """The class that a checkpoint of a model that reads images was made for.

    None if it reads no images.
    """
    import transformers as tf

    from interp.model.vision_adapters import ENCODERS

    architecture = (getattr(config, "architectures", None) or [""])[0]
    model_class = getattr(tf, architecture, None)
    if architecture in ENCODERS or architecture in ("CLIPModel", "SiglipModel"):
        return model_class
    if type(config) in tf.AutoModelForImageTextToText._model_mapping:
        return model_class or tf.AutoModelForImageTextToText
    return model_class if getattr(model_class, "main_input_name", "") == "pixel_values" else None


def reads_images_alone(model: Any) -> bool:
    """Whether a model object takes images and no text, and so has no tokenizer."""
    import inspect

    parameters = inspect.signature(model.forward).parameters
    return _is_pair_of_towers(model) or ("pixel_values" in parameters and "input_ids" not in parameters)


def _is_pair_of_towers(model: Any) -> bool:
    return hasattr(model, "vision_model") and hasattr(model, "text_model") and hasattr(model, "logit_scale")


def vision_tower(model: Any) -> Any:
    """The vision encoder of a CLIP or SigLIP model, which shares its weights.

    Any other model as it is. CLIP's encoder returns the embedding that is compared with texts (before it is
    normalised), SigLIP's the pooled state.
    """
    import torch
    import transformers as tf

    if not _is_pair_of_towers(model):
        return model
    if type(model).__name__ == "SiglipModel":
        tower = model.vision_model
    elif type(model).__name__ == "CLIPModel":
        with torch.device("meta"):  # its weights are replaced in the next line
            tower = tf.CLIPVisionModelWithProjection(model.config.vision_config)
        tower.vision_model, tower.visual_projection = model.vision_model, model.visual_projection
    else:
        raise ModelError(
            f"{type(model).__name__} joins an image and a text tower in a way that interp does not know: pass its "
            "vision_model"
        )
    tower.config.architectures = [type(tower).__name__]
    return tower
