"""The language of the notebook's edition of the course."""

import os
from pathlib import Path


def language() -> str:
    """``zh`` in a folder called ``zh`` (the Chinese edition), else ``en``; ``$LABKIT_LANGUAGE`` overrides."""
    return os.environ.get("LABKIT_LANGUAGE") or ("zh" if Path.cwd().name == "zh" else "en")
