"""bitsandbytes' functions, imported on first use."""

import logging
from functools import cache

from labkit.common.errors import SchemeError


@cache
def bitsandbytes_functional():
    """The module ``bitsandbytes.functional``; raises SchemeError if it cannot be imported."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)  # on import it warns about an optional kernel on the hub
    try:
        import bitsandbytes.functional as functional
    except (ImportError, RuntimeError, OSError) as error:
        raise SchemeError(f"bitsandbytes cannot be imported ({error}): pip install bitsandbytes") from error
    finally:
        logger.setLevel(level)
    return functional
