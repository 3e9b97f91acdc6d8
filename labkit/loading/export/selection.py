"""Which Linears an export writes quantized, and which unquantized."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from labkit.common.errors import LabError
from labkit.loading.export.formats import FORMATS, GGUF, Format
from labkit.loading.export.integers import Kind, cannot_be_integers, kind_of
from labkit.loading.export.refusal import Refusal, keeps_integers, nearest_module, refuse
from labkit.plans.resolved import NO_ROLE, ResolvedPlan
from labkit.quantization import QuantizedLinear
from labkit.quantization.int8_storage import StoredInt8

AUTO = "auto"


@dataclass(frozen=True)
class Selection:
    """The parts of an export.

    Attributes:
        kinds: Linear -> kind, of all that are written quantized.
        unquantized: names of quantized modules that are written unquantized.
        notes: sentences on what stands in for what the format cannot express.
    """

    kinds: dict[str, Kind]
    unquantized: set[str]
    notes: list[str]


def named_parts(parts: Sequence[str], resolved: ResolvedPlan, roles: Mapping[str, str]) -> set[str]:
    """Names of the quantized modules in ``parts`` (roles, names, or ``auto``, which names none).

    Raises:
        LabError: an unknown part.
    """
    chosen: set[str] = set()
    available = sorted({roles[name] for name in resolved.schemes if name in roles})
    for part in parts:
        if part == AUTO:
            continue
        matches = {name for name in resolved.schemes if part in (name, roles.get(name))}
        if not matches:
            raise LabError(
                f"nothing quantized is called {part!r}; parts with quantized Linears are {', '.join(available)}, "
                f"and {AUTO} is what the format cannot express"
            )
        chosen |= matches
    return chosen


def select(
    model: nn.Module,
    resolved: ResolvedPlan,
    roles: Mapping[str, str],
    unquantized: set[str],
    format: str,
    replace: bool = False,
) -> Selection:
    """Sort the quantized modules of ``model``, besides those that are to be ``unquantized``.

    replace: put the nearest that the format can express in the place of modules that it refuses.

    Raises:
        LabError: schemes that the format cannot express, all of them at once; nothing quantized.
    """
    kinds: dict[str, Kind] = {}
    refused: dict[str, Refusal] = {}
    for name, scheme in resolved.schemes.items():
        module, role = model.get_submodule(name), roles.get(name, NO_ROLE)
        if name in unquantized or not isinstance(module, (QuantizedLinear, StoredInt8)):
            continue
        refusal = _refusal(name, role, scheme.name, module, FORMATS[format])
        if refusal is None:
            kinds[name] = kind_of(module)
        else:
            refused[name] = refusal
    notes: list[str] = []
    if replace:
        replaced, notes = _replace(model, refused, resolved, roles, format)
        kinds |= replaced
        unquantized = unquantized | (refused.keys() - replaced.keys())
    else:
        refuse(format, refused, resolved.schemes, roles)
    if not kinds and format != GGUF:
        raise LabError(
            f"nothing is quantized in this checkpoint, so it is no {format}: the original model loads as it is"
        )
    return Selection({name: kinds[name] for name in resolved.schemes if name in kinds}, unquantized, notes)


def _refusal(
    name: str, role: str, scheme: str, module: QuantizedLinear | StoredInt8, rules: Format
) -> Refusal | None:
    if isinstance(module, StoredInt8):
        if rules.EMBEDDINGS and isinstance(module, nn.Embedding):
            return rules.cannot_hold(name, role, module)
        kept = "Linears and embeddings" if rules.EMBEDDINGS else "Linears"
        return Refusal(f"the format quantizes {kept} only", "unquantized")
    reason = cannot_be_integers(module)
    if reason is not None:
        return Refusal(reason, rules.NEAREST.get(scheme, rules.NEAREST["*"]))
    return rules.cannot_hold(name, role, module)


def _replace(
    model: nn.Module,
    refused: Mapping[str, Refusal],
    resolved: ResolvedPlan,
    roles: Mapping[str, str],
    format: str,
) -> tuple[dict[str, Kind], list[str]]:
    """Put the nearest that the format can express in the place of what it refuses: the kinds of these, and notes."""
    kinds: dict[str, Kind] = {}
    groups: Counter[tuple[str, Kind, str]] = Counter()
    for name in refused:
        module = model.get_submodule(name)
        nearest = nearest_module(module)
        if (
            nearest is None
            or FORMATS[format].cannot_hold(name, roles.get(name, NO_ROLE), nearest) is not None
        ):
            continue
        model.set_submodule(name, nearest)
        kinds[name] = kind_of(nearest)
        how = "the same integers" if keeps_integers(module) else "rounded anew"
        groups[resolved.schemes[name].name, kinds[name], how] += 1
    notes = [
        f"{count} Linears in {scheme}, which {format} cannot express, are written as the nearest: {kind}, {how}."
        for (scheme, kind, how), count in groups.items()
    ]
    left: dict[str, list[str]] = {}
    for name, refusal in refused.items():
        if name not in kinds:
            left.setdefault(refusal.reason, []).append(name)
    notes += [f"Unquantized, for {reason}: {', '.join(names)}." for reason, names in left.items()]
    return kinds, notes
