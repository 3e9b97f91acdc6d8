"""Which language a notebook speaks: that of the course's edition it is in."""

import os
from pathlib import Path


def language() -> str:
    """``zh`` in the Chinese edition, a folder called ``zh``, else ``en``; ``$LABKIT_LANGUAGE`` goes before."""
    return os.environ.get("LABKIT_LANGUAGE") or ("zh" if Path.cwd().name == "zh" else "en")
