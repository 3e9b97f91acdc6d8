"""Chooses a scheme for each Linear: an integer program for the least predicted loss within a number of bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from labkit.common.errors import AllocationError

TOGETHER = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)
"""Kinds of Linears that share their input: engines multiply them as one, and many require one scheme for them."""
TIE_BREAK = 1e-6  # share of the largest loss that all bytes cost: among equally good plans the smallest wins


@dataclass(frozen=True)
class Option:
    """One choice for a unit: its bytes and its predicted loss."""

    scheme: str
    bytes: int
    loss: float


@dataclass(frozen=True)
class Unit:
    """Linears that get the same scheme: those of one part and one depth whose kinds belong together.

    Attributes:
        role: the part, or None.
        kinds: of its Linears, as `labkit.plans.rule.kind_of` names them.
        depth: relative depth, None outside a stack of layers.
        module: ``linear``, or the kind of the part's embeddings or convolutions, which form one unit.
        parameters: values in its Linears.
        options: the choices.
    """

    role: str | None
    kinds: tuple[str, ...]
    depth: float | None
    parameters: int
    options: tuple[Option, ...]
    module: str = "linear"

    @property
    def key(self) -> tuple[str | None, tuple[str, ...], float | None]:
        return self.role, self.kinds, self.depth


@dataclass(frozen=True)
class Allocation:
    """One choice for each unit, in the order of the units, and the total bytes and loss."""

    choices: tuple[Option, ...]
    bytes: int
    loss: float


def units_of(
    records: Sequence[Mapping[str, Any]],
    unquantized: str,
    itemsize: int,
    together: Sequence[Sequence[str]] = TOGETHER,
) -> list[Unit]:
    """Units and their options from records of `labkit.measure.search.sensitivity`.

    The first option leaves the unit unquantized (``unquantized``, with ``itemsize`` bytes a value). A scheme that
    some Linear of the unit does not support is no option.
    ``together`` lists the kinds that form one unit."""
    groups: dict[tuple, dict[str, list[Mapping[str, Any]]]] = {}
    for record in records:
        module = record.get("module", "linear")
        key = (
            record["role"],
            _kinds(record["kind"], together) if module == "linear" else (),
            record["depth"],
            module,
        )
        groups.setdefault(key, {}).setdefault(record["linear"], []).append(record)
    units = []
    for (role, _, depth, module), linears in groups.items():
        kinds = tuple(dict.fromkeys(entries[0]["kind"] for entries in linears.values()))
        parameters = sum(entries[0]["parameters"] for entries in linears.values())
        options = [Option(unquantized, parameters * itemsize, 0.0)]
        for scheme in dict.fromkeys(record["scheme"] for entries in linears.values() for record in entries):
            taken = [
                record for entries in linears.values() for record in entries if record["scheme"] == scheme
            ]
            if len(taken) == len(linears) and all("kl" in record for record in taken):
                size = sum(record["bytes"] for record in taken)
                loss = sum(max(record["kl"], 0.0) for record in taken)
                options.append(Option(scheme, size, loss))
        units.append(Unit(role, kinds, depth, parameters, tuple(options), module))
    return units


def allocate(
    units: Sequence[Unit],
    budget: float,
    weights: Mapping[tuple[str | None, str], float] | None = None,
    avoid: Sequence[Sequence[Option]] = (),
    apart: int = 1,
) -> Allocation:
    """The choices with the least predicted loss whose bytes are at most ``budget``.

    One 0/1 variable for each unit and option, exactly one option a unit; scipy's HiGHS solves the program exactly.
    ``weights``, (role, scheme) -> factor, correct the losses of a part under a scheme by what was measured. The
    choices differ from each of ``avoid`` in at least ``apart`` units.

    Raises:
        AllocationError: even the smallest choices exceed the budget (the message gives their size), or no other
            choice that differs enough fits.
    """
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    smallest = sum(min(option.bytes for option in unit.options) for unit in units)
    if smallest > budget:
        raise AllocationError(
            f"the smallest choices of all Linears take {smallest / 1e6:.2f} MB, more than {budget / 1e6:.2f} MB: "
            "allow more bytes, or schemes with fewer bits"
        )
    options = [(index, option) for index, unit in enumerate(units) for option in unit.options]
    # losses of units add up: single changes diverge little, and small changes hardly interact
    losses = np.array([_loss(units[index], option, weights) for index, option in options])
    sizes = np.array([option.bytes for _, option in options], dtype=float)
    scale = losses.max() or 1.0
    cost = losses / scale + TIE_BREAK * sizes / max(sizes.sum(), 1.0)
    columns = np.arange(len(options))
    rows = np.array([index for index, _ in options])
    one_each = csr_array((np.ones(len(options)), (rows, columns)), shape=(len(units), len(options)))
    constraints = [
        LinearConstraint(one_each, 1, 1),
        LinearConstraint((sizes / 1e6)[None], -np.inf, budget / 1e6),
    ]
    for choices in avoid:
        schemes = [option.scheme for option in choices]
        taken = np.array([float(option.scheme == schemes[index]) for index, option in options])
        constraints.append(LinearConstraint(taken[None], -np.inf, len(units) - apart))
    result = milp(
        cost,
        constraints=constraints,
        integrality=np.ones(len(options)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 1e-6, "time_limit": 60},
    )
    if result.x is None:
        raise AllocationError(f"no plan was found for {budget / 1e6:.2f} MB: {result.message}")
    chosen = tuple(option for (_, option), taken in zip(options, result.x) if taken > 0.5)
    loss = sum(_loss(unit, option, weights) for unit, option in zip(units, chosen))
    return Allocation(chosen, sum(option.bytes for option in chosen), float(loss))


def front(
    units: Sequence[Unit], points: int = 25, weights: Mapping[tuple[str | None, str], float] | None = None
) -> list[Allocation]:
    """The best allocations for ``points`` budgets, from the smallest possible to one that loses nothing."""
    smallest = sum(min(option.bytes for option in unit.options) for unit in units)
    largest = sum(max(option.bytes for option in unit.options) for unit in units)
    budgets = [smallest * (largest / smallest) ** (step / (points - 1)) for step in range(points)]
    budgets[0], budgets[-1] = smallest, largest
    by_bytes = {}
    for budget in budgets:
        allocation = allocate(units, budget, weights)
        by_bytes[allocation.bytes] = allocation
    return [by_bytes[size] for size in sorted(by_bytes)]


def _kinds(kind: str, together: Sequence[Sequence[str]]) -> tuple[str, ...]:
    return next((tuple(kinds) for kinds in together if kind in kinds), (kind,))


def _loss(unit: Unit, option: Option, weights: Mapping[tuple[str | None, str], float] | None) -> float:
    return option.loss * (weights or {}).get((unit.role, option.scheme), 1.0)
