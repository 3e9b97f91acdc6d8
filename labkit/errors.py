"""The one error that is meant for the user: the command line prints its message and exits with code 2."""


class LabError(ValueError):
    """Something the user asked for cannot be done.

    The message names what was wrong and what would be right, in one line. Modules derive
    their own from it (``SchemeError``, ``ActionSyntaxError``, ``ResultsError``); anything else that
    escapes is a bug of the lab.
    """
