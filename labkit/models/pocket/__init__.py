"""The pocket phone agent: a real model with AutoGLM-Phone's four parts at a size for two CPU cores."""

from labkit.models.pocket.configuration import PocketConfig
from labkit.models.pocket.modeling import PocketForConditionalGeneration, PocketModel
from labkit.models.pocket.processing import PocketProcessor

__all__ = ["PocketConfig", "PocketForConditionalGeneration", "PocketModel", "PocketProcessor"]
