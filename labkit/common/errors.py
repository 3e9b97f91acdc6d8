"""The one error that is meant for the user: the command line prints its message and exits with code 2."""

from __future__ import annotations


class LabError(ValueError):
    """Something the user asked for cannot be done.

    The message names what was wrong and what would be right, in one line. Modules derive
    their own from it (``SchemeError``, ``ActionSyntaxError``, ``ResultsError``); anything else that
    escapes is a bug of the lab.
    """


class ResultsError(LabError):
    """A results file is missing, damaged or of another shape; the message says which and where."""


class GoalError(LabError):
    """No goal, more than one, or one that cannot be read."""


class CheckpointError(LabError):
    """A quantized checkpoint that is damaged, was changed, or cannot be used as asked."""


class LoadError(LabError):
    """A model that cannot be loaded as asked."""
