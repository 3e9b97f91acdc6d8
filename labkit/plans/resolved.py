"""A plan resolved for a model: the scheme of each module and the predicted bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from labkit.plans.rule import kind_of, relative_depths
from labkit.quantization import Scheme

if TYPE_CHECKING:
    import pandas

    from labkit.plans.plan import QuantizationPlan


NO_ROLE = "other"


@dataclass(frozen=True)
class Part:
    """The parameters of one module, or of one quantized Linear, with their predicted bytes."""

    module: str
    role: str
    scheme: str
    parameters: int
    bytes: int
    is_linear: bool


def grouped(notes: Sequence[str]) -> list[str]:
    """Notes that begin with a module's name, with one line for all that are alike after it.

    >>> grouped(["a.fc is left alone: tied", "b.fc is left alone: tied"])
    ['a.fc is left alone: tied (1 more like it)']
    """
    names: dict[str, list[str]] = {}
    for note in notes:
        name, _, reason = note.partition(" ")
        names.setdefault(reason, []).append(name)
    return [
        f"{alike[0]} {reason}" + (f" ({len(alike) - 1} more like it)" if len(alike) > 1 else "")
        for reason, alike in names.items()
    ]


@dataclass(frozen=True)
class ResolvedPlan:
    """What `QuantizationPlan.resolve` returns.

    Attributes:
        plan: the plan.
        schemes: module name -> scheme of each Linear a rule matches; the others take the default dtype.
        rules: module name -> number of the rule (from 1).
        parts: the predicted bytes, an entry for each module.
        notes: sentences on modules that are left unquantized or get another scheme, with the reason.
    """

    plan: QuantizationPlan
    schemes: dict[str, Scheme]
    rules: dict[str, int]
    parts: list[Part] = field(repr=False)
    notes: list[str]

    @property
    def summary(self) -> list[str]:
        """The notes for a reader: Linears with the same note share a line with their number."""
        return grouped(self.notes)

    @property
    def requires_calibration(self) -> bool:
        """Whether a Linear's scheme needs the activations to quantize."""
        return any(scheme.requires_calibration for scheme in self.schemes.values())

    @property
    def predicted_bytes(self) -> int:
        """Bytes of the whole model: parameters and buffers; tied tensors count once."""
        return sum(part.bytes for part in self.parts)

    @property
    def parameters(self) -> int:
        """Number of values in the whole model; tied tensors count once."""
        return sum(part.parameters for part in self.parts)

    @property
    def bytes_by_role(self) -> dict[str, int]:
        """Role -> bytes; ``other`` for modules without a role."""
        total: Counter[str] = Counter()
        for part in self.parts:
            total[part.role] += part.bytes
        return dict(total)

    @property
    def reached_by_role(self) -> dict[str, tuple[int, int]]:
        """Role -> how many of its values (parameters) the rules give a scheme, and how many it has."""
        reached: Counter[str] = Counter()
        total: Counter[str] = Counter()
        for part in self.parts:
            total[part.role] += part.parameters
            reached[part.role] += part.parameters * (part.module in self.schemes)
        return {role: (reached[role], total[role]) for role in total}

    def rows(self) -> list[dict[str, object]]:
        """One entry per role and scheme: linears, parameters, bytes, bits a parameter."""
        grouped: dict[tuple[str, str], list[Part]] = {}
        for part in self.parts:
            grouped.setdefault((part.role, part.scheme), []).append(part)
        rows = []
        for (role, scheme), parts in grouped.items():
            parameters, size = sum(p.parameters for p in parts), sum(p.bytes for p in parts)
            rows.append(
                {
                    "role": role,
                    "scheme": scheme,
                    "linears": sum(p.is_linear for p in parts),
                    "parameters": parameters,
                    "bytes": size,
                    "bits_per_parameter": round(8 * size / parameters, 2) if parameters else None,
                }
            )
        return rows

    def linears(self) -> list[dict[str, object]]:
        """One entry per Linear, and per other module that is quantized: ``linear, role, kind, depth, scheme,
        parameters, bytes``; for `labkit.results.charts.methods.plan_map`."""
        depths = relative_depths(part.module for part in self.parts if part.is_linear)
        return [
            {
                "linear": part.module,
                "role": part.role,
                "kind": kind_of(part.module),
                "depth": depths.get(part.module),
                "scheme": part.scheme,
                "parameters": part.parameters,
                "bytes": part.bytes,
            }
            for part in self.parts
            if part.is_linear or part.module in self.schemes
        ]

    def table(self) -> pandas.DataFrame:
        """`rows` as a DataFrame."""
        import pandas

        return pandas.DataFrame(self.rows())
