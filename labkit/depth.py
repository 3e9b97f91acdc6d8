"""Where a module stands in its stack: relative depth, the same for models of any number of layers.

The third of six layers and the seventeenth of forty stand at nearly the same depth; a rule that speaks of depth
therefore fits both, where one that names layer numbers fits one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_NUMBER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


def relative_depths(names: Iterable[str]) -> dict[str, float]:
    """Depth of each module whose name has a layer number: ``(layer + 1/2) / layers``, between 0 and 1.

    The stack is what stands before the first number in the name; its layers are counted in ``names``.

    >>> relative_depths(["layers.0.fc", "layers.1.fc", "head"])
    {'layers.0.fc': 0.25, 'layers.1.fc': 0.75}
    """
    places = {name: place for name in names if (place := layer_of(name)) is not None}
    counts: dict[str, int] = {}
    for stack, number in places.values():
        counts[stack] = max(counts.get(stack, 0), number + 1)
    return {name: (number + 0.5) / counts[stack] for name, (stack, number) in places.items()}


def layer_of(name: str) -> tuple[str, int] | None:
    """``("model.layers", 3)`` for ``model.layers.3.mlp.up_proj``; None for a name without a number."""
    found = _NUMBER.search(name)
    return (name[: found.start()], int(found[1])) if found else None


def kind_of(name: str) -> str:
    """The Linear's own name, the last part that is no number: ``up_proj`` of ``layers.3.mlp.up_proj``."""
    parts = [part for part in name.split(".") if not part.isdigit()]
    return parts[-1] if parts else name
