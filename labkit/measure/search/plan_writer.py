"""Writes an allocation as a plan: rules by part, kind and relative depth, for models with any number of layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from labkit.measure.search.allocate import Allocation, Unit
from labkit.plans.plan import QuantizationPlan, Rule
from labkit.quantization import DTYPES, Scheme, get_scheme
from labkit.quantization.shorthand import parse_candidate

FALLBACK = "int8"
"""The scheme for a Linear of another model that does not support the chosen one."""


def plan_of(
    units: Sequence[Unit], allocation: Allocation, name: str, description: str = "", default: str = "bf16"
) -> QuantizationPlan:
    """The plan that gives every unit its choice.

    For each part the last rule has the scheme of most of its values and names no Linear, so it also covers Linears
    that only another model has. The exceptions come before it; neighbouring layers share a rule.
    """
    rules: list[Rule] = []
    for role in dict.fromkeys(unit.role for unit in units):
        here = [(unit, option.scheme) for unit, option in zip(units, allocation.choices) if unit.role == role]
        rules += [
            _rule(role, scheme, modules=(unit.module,)) for unit, scheme in here if _is_stored(unit, scheme)
        ]
        mine = [(unit, scheme) for unit, scheme in here if unit.module == "linear"]
        if not mine:
            continue
        sizes: Counter[str] = Counter()
        for unit, scheme in mine:
            sizes[scheme] += unit.parameters
        usual = sizes.most_common(1)[0][0]
        rules += _exceptions(role, mine, usual)
        if usual not in DTYPES:
            rules.append(_rule(role, usual))
    return QuantizationPlan(name, tuple(rules), description, default)


def _is_stored(unit: Unit, scheme: str) -> bool:
    """Whether the unit holds embeddings or convolutions that are quantized."""
    return unit.module != "linear" and scheme not in DTYPES


def _exceptions(role: str | None, units: Sequence[tuple[Unit, str]], usual: str) -> list[Rule]:
    """Rules for the units that do not get the part's usual scheme; kinds with the same layers share a rule."""
    kinds: dict[tuple[str, ...], list[tuple[float | None, str]]] = {}
    for unit, scheme in units:
        kinds.setdefault(unit.kinds, []).append((unit.depth, scheme))
    rules: dict[tuple[str, tuple[float, float] | None], list[str]] = {}
    for names, layers in kinds.items():
        runs = _bands(layers)
        # a rule without depth also matches layers: where it is needed, rules for all layers of its kinds precede it
        bare = any(depth is None and scheme != usual for scheme, depth in runs)
        for scheme, depth in runs:
            if scheme != usual or (bare and depth is not None):
                rules.setdefault((scheme, depth), []).extend(names)
    ordered = sorted(rules.items(), key=lambda entry: entry[0][1] is None)
    return [_rule(role, scheme, tuple(dict.fromkeys(names)), depth) for (scheme, depth), names in ordered]


def _bands(layers: Sequence[tuple[float | None, str]]) -> list[tuple[str, tuple[float, float] | None]]:
    """(depth, scheme) of one kind's layers -> (scheme, (from, to)) for each run of layers with the same scheme.

    A single run over all layers has no depth, unless the kind also occurs outside the stack of layers.
    """
    outside = [(scheme, None) for depth, scheme in layers if depth is None]
    inside = sorted((depth, scheme) for depth, scheme in layers if depth is not None)
    runs: list[tuple[str, tuple[float, float] | None]] = []
    for index, (depth, scheme) in enumerate(inside):
        low = 0.0 if index == 0 else (inside[index - 1][0] + depth) / 2
        high = 1.0 if index == len(inside) - 1 else (depth + inside[index + 1][0]) / 2
        if runs and runs[-1][0] == scheme:
            low = runs.pop()[1][0]
        runs.append((scheme, (round(low, 4), round(high, 4))))
    if len(runs) == 1 and not outside:
        runs = [(runs[0][0], None)]
    return [*runs, *outside]


def _rule(
    role: str | None,
    label: str,
    kinds: tuple[str, ...] = (),
    depth: tuple[float, float] | None = None,
    modules: tuple[str, ...] = ("linear",),
) -> Rule:
    scheme: Scheme = get_scheme(label) if label in DTYPES else parse_candidate(label)
    return Rule(
        scheme,
        roles=(role,) if role else (),
        match=None if role else "*",
        on_unsupported=get_scheme(FALLBACK),
        optional=True,
        linears=kinds,
        depth=depth,
        modules=modules,
    )
