"""What a scheme refuses."""

from labkit.common.errors import LabError


class SchemeError(LabError):
    """A scheme, an option of one, or a Linear it was asked to replace is not possible."""
