"""The pocket phone agent: a real model with AutoGLM-Phone's four parts at a size for two CPU cores.

Importing this package is cheap; torch and transformers come with the first name that needs them.
"""

from importlib import import_module

_HOMES = {
    "PocketConfig": "configuration",
    "PocketForConditionalGeneration": "modeling",
    "PocketModel": "modeling",
    "PocketProcessor": "processing",
}
__all__ = ["PocketConfig", "PocketForConditionalGeneration", "PocketModel", "PocketProcessor"]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
