"""A rule of a plan: which modules it selects, and their scheme. `labkit.plans.plan` describes the file's form."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from labkit.common.errors import PlanError
from labkit.models.families import ROLES
from labkit.quantization import Scheme, SchemeError, get_scheme

_NUMBER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


def relative_depths(names: Iterable[str]) -> dict[str, float]:
    """Depth of each module whose name has a layer number: ``(layer + 1/2) / layers``, between 0 and 1.

    The stack is the part of the name before its first number; its layers are counted in ``names``.

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
    match = _NUMBER.search(name)
    return (name[: match.start()], int(match[1])) if match else None


def kind_of(name: str) -> str:
    """The Linear's own name, the last part that is not a number: ``up_proj`` of ``layers.3.mlp.up_proj``."""
    parts = [part for part in name.split(".") if not part.isdigit()]
    return parts[-1] if parts else name


MODULE_KINDS = ("linear", "embedding", "conv")
_KEYS = ("role", "match", "linear", "depth", "modules", "scheme", "on_unsupported", "optional")


@dataclass(frozen=True)
class Rule:
    """One rule of a plan. Either ``roles`` or ``match`` is set.

    Attributes:
        scheme: the scheme of the matched modules.
        roles: the roles it applies to.
        match: ``re:`` and a regular expression for the whole module name, a glob, or an exact name.
        modules: the kinds of modules it applies to, of `MODULE_KINDS`.
        linears: the Linears' own names (`kind_of`) it is limited to; empty: all.
        depth: the relative depths (`relative_depths`) it is limited to, the lower end included and the upper
            excluded; a Linear in no stack of layers has no depth. None: any.
        on_unsupported: the scheme of a matched Linear that ``scheme`` cannot take; None: an error is raised.
        optional: whether a model may have no such module.
    """

    scheme: Scheme
    roles: tuple[str, ...] = ()
    match: str | None = None
    on_unsupported: Scheme | None = None
    optional: bool = False
    linears: tuple[str, ...] = ()
    depth: tuple[float, float] | None = None
    modules: tuple[str, ...] = ("linear",)

    def matches(self, name: str, role: str | None, depth: float | None = None) -> bool:
        """Whether this rule applies to the Linear ``name`` with ``role`` at relative ``depth``."""
        if self.linears and kind_of(name) not in self.linears:
            return False
        if self.depth is not None and (depth is None or not self.depth[0] <= depth < self.depth[1]):
            return False
        if self.match is None:
            return role in self.roles
        if self.match.startswith("re:"):
            return re.fullmatch(self.match[3:], name) is not None
        return name == self.match or fnmatch.fnmatchcase(name, self.match)

    def takes_all_of(self, role: str) -> bool:
        """Whether this rule is for every Linear of ``role``: by the role or for all names, and not narrowed."""
        if self.linears or self.depth is not None or "linear" not in self.modules:
            return False
        return role in self.roles or self.match in ("re:.*", "*")

    def names_exactly(self, name: str) -> bool:
        """Whether this rule matches the module by its exact name."""
        return self.match == name

    def __str__(self) -> str:
        text = f"match {self.match}" if self.match is not None else f"role {', '.join(self.roles)}"
        if self.linears:
            text += f", linear {', '.join(self.linears)}"
        if self.depth is not None:
            text += f", depth {self.depth[0]:g} to {self.depth[1]:g}"
        return f"({text} -> {self.scheme.name})"

    @classmethod
    def from_dict(cls, data: Any, where: str, on_unsupported: str | None = None) -> Rule:
        """A rule from its mapping in the file; ``where`` names it in errors."""
        if not isinstance(data, Mapping):
            raise PlanError(f"{where}: a rule is a mapping with role or match, and scheme; this is {data!r}")
        if ("role" in data) == ("match" in data):
            raise PlanError(f"{where}: give either role or match, and not both")
        if "scheme" not in data:
            raise PlanError(f"{where}: the key scheme is missing")
        options = {str(key): value for key, value in data.items() if key not in _KEYS}
        try:
            scheme = get_scheme(data["scheme"], **options)
            fallback = data.get("on_unsupported", on_unsupported)
            fallback = None if fallback in (None, "error") else get_scheme(fallback)
        except SchemeError as error:
            hint = f" (keys of a rule: {', '.join(_KEYS)})" if "unknown option" in str(error) else ""
            raise PlanError(f"{where}: {error}{hint}") from error
        optional = data.get("optional", False)
        if not isinstance(optional, bool):
            raise PlanError(f"{where}: optional must be true or false, not {optional!r}")
        return cls(
            scheme,
            _checked(data, "role", ROLES, "role", where),
            _match(data, where),
            fallback,
            optional,
            _linears(data, where),
            _depth(data, where),
            _checked(data, "modules", MODULE_KINDS, "kind of modules", where) or ("linear",),
        )

    def to_dict(self) -> dict[str, Any]:
        """The mapping `from_dict` reads."""
        head: dict[str, Any] = {"match": self.match}
        if self.match is None:
            head = {"role": _value_or_list(self.roles)}
        if self.linears:
            head["linear"] = _value_or_list(self.linears)
        if self.depth is not None:
            head["depth"] = list(self.depth)
        if self.modules != ("linear",):
            head["modules"] = _value_or_list(self.modules)
        data = {**head, "scheme": self.scheme.name, **self.scheme.options()}
        if self.on_unsupported is not None:
            data["on_unsupported"] = self.on_unsupported.name
        return {**data, "optional": True} if self.optional else data


def _listed(data: Mapping, key: str) -> list[Any]:
    """The values of a key that takes a value or a list; empty if the key is absent."""
    value = data.get(key, [])
    return value if isinstance(value, list) else [value]


def _value_or_list(values: Sequence[str]) -> str | list[str]:
    return values[0] if len(values) == 1 else list(values)


def _checked(data: Mapping, key: str, allowed: Sequence[str], noun: str, where: str) -> tuple[str, ...]:
    """The values of a key. Raises PlanError for a value that is not allowed, and for an empty list."""
    values = _listed(data, key)
    for value in values:
        if value not in allowed:
            raise PlanError(f"{where}: unknown {noun} {value!r}; known are {', '.join(allowed)}")
    if key in data and not values:
        raise PlanError(f"{where}: {key} is an empty list; known are {', '.join(allowed)}")
    return tuple(values)


def _linears(data: Mapping, where: str) -> tuple[str, ...]:
    names = _listed(data, "linear")
    wrong = not all(isinstance(name, str) and name and "." not in name for name in names)
    if wrong or ("linear" in data and not names):
        raise PlanError(f"{where}: linear is a Linear's own name such as down_proj, or a list of such names")
    return tuple(names)


def _match(data: Mapping, where: str) -> str | None:
    pattern = data.get("match")
    if "match" in data and not (isinstance(pattern, str) and pattern):
        raise PlanError(f"{where}: match must be a module name, a glob or re: and a regular expression")
    if pattern is not None and pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise PlanError(f"{where}: {pattern!r} is no regular expression: {error}") from error
    return pattern


def _depth(data: Mapping, where: str) -> tuple[float, float] | None:
    depth = data.get("depth")
    if depth is None:
        return None
    valid = isinstance(depth, list) and len(depth) == 2 and all(type(end) in (int, float) for end in depth)
    if not valid or not 0 <= depth[0] < depth[1] <= 1:
        raise PlanError(f"{where}: depth is [from, to] with 0 <= from < to <= 1, not {depth!r}")
    return float(depth[0]), float(depth[1])
