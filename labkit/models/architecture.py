"""The configuration and the class of a transformers checkpoint; code from its repository never runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from labkit.common.errors import LoadError
from labkit.models.families import Family
from labkit.models.hub import _first_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def architecture_of(
    source: str, name: str, facts: Mapping[str, Any], family: Family
) -> tuple[PreTrainedConfig, type[PreTrainedModel]]:
    """The configuration, without what it says on quantized weights, and the class that generates text.

    Args:
        source: the checkpoint's folder or hub id.
        name: the model's name, for messages.
        facts: its ``config.json``.
        family: its family.

    Raises:
        LoadError: the configuration is not valid, or transformers has no such class.
    """
    import transformers

    model_type = facts["model_type"]
    if family.name == "pocket":
        from labkit.models.pocket import PocketConfig, PocketForConditionalGeneration

        return _config(PocketConfig, source, name), PocketForConditionalGeneration
    if model_type not in transformers.CONFIG_MAPPING:
        code = " (it brings its own code, which is not run here)" if "auto_map" in facts else ""
        raise LoadError(f"transformers {transformers.__version__} has no architecture {model_type!r}{code}")
    config = _config(transformers.AutoConfig, source, name)
    if model_type == "qwen2_5_omni":  # the part that reads and writes; its talker only speaks
        return config.thinker_config, transformers.Qwen2_5OmniThinkerForConditionalGeneration
    classes = facts.get("architectures") or []
    if not isinstance(classes, list) or not all(isinstance(entry, str) for entry in classes):
        raise LoadError(f"the config.json of {name} is not valid: architectures is no list of names")
    for entry in classes:
        model_class = getattr(transformers, entry, None)
        if model_class is not None and hasattr(model_class, "generate"):
            return config, model_class
    mapping = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) in mapping:
        return config, mapping[type(config)]
    raise LoadError(f"{name} ({model_type}) is not a model that generates text")


def published_architecture(facts: Mapping[str, Any]) -> tuple[PreTrainedConfig, type[PreTrainedModel]]:
    """The same for a model whose published configuration the lab has."""
    import transformers

    return transformers.AutoConfig.for_model(**facts), getattr(transformers, facts["architectures"][0])


def _config(config_class: Any, source: str, name: str) -> PreTrainedConfig:
    try:
        config = config_class.from_pretrained(source)
    except Exception as error:
        raise LoadError(f"the config.json of {name} is not valid: {_first_line(error)}") from None
    for part in (config, *(value for value in vars(config).values() if hasattr(value, "to_dict"))):
        vars(part).pop("quantization_config", None)  # the lab dequantizes the weights itself
    layers = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    if layers is not None and layers < 1:  # transformers builds such a model, and fails in use
        raise LoadError(f"the config.json of {name} is not valid: num_hidden_layers is {layers}")
    return config
