"""Resolve a plan for a model: the scheme of each Linear and the predicted bytes, before any quantization.

Works on the meta device: only names, classes and shapes are read.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from labkit.common.errors import PlanError
from labkit.models.experts import expert_names, has_fused, unfused_copy
from labkit.plans.resolved import NO_ROLE, Part, ResolvedPlan
from labkit.plans.rule import Rule, kind_of, relative_depths
from labkit.quantization import DTYPES, QuantizedLinear, Scheme, SchemeError
from labkit.quantization.dense import DenseLinear
from labkit.quantization.int8_storage import StoredInt8, module_kind
from labkit.quantization.logits import LogitsLinear

if TYPE_CHECKING:
    from labkit.plans.plan import QuantizationPlan


def resolve(
    plan: QuantizationPlan,
    model: nn.Module,
    roles: Mapping[str, str] | None = None,
    device: torch.device | str | None = None,
) -> ResolvedPlan:
    """See `QuantizationPlan.resolve`."""
    if any(isinstance(module, (QuantizedLinear, StoredInt8)) for module in model.modules()):
        raise PlanError("the model is quantized already: load it anew and apply one plan")
    if device is None:
        device = next((p.device for p in model.parameters() if not p.is_meta), None)
    separated: list[str] = []
    if has_fused(model):
        model, separated = unfused_copy(model)  # as `quantize_` will change it
    if roles is None:
        roles = _roles_of(plan, model)
    else:
        role_of = _role_lookup(roles)  # the caller's roles are of the model before its experts are separated
        roles = {**{name: role_of(name) for name in separated}, **roles}
    linears, fixed = replaceable_linears(model)
    schemes, rule_numbers, notes = {}, {}, [f"{name} is left alone: {why}" for name, why in fixed.items()]
    modules = linears | replaceable_others(model, {kind for rule in plan.rules for kind in rule.modules})
    tied = tied_linears(model, modules)
    depths = relative_depths(modules)

    def matches(rule: Rule, name: str) -> bool:
        selected = module_kind(modules[name]) in rule.modules
        return selected and rule.matches(name, roles.get(name), depths.get(name))

    shadowed: Counter[int] = Counter()
    degraded: dict[int, list[str]] = {}
    for name, module in modules.items():
        matching = [i for i, rule in enumerate(plan.rules) if matches(rule, name)]
        shadowed.update(matching)
        if name in tied:
            exact = [i for i in matching if plan.rules[i].names_exactly(name)]
            if matching and not exact:
                notes.append(
                    f"{name} is left alone: {tied[name]}; a rule that names it exactly would quantize it"
                )
            matching = exact
        if matching:
            number = matching[0] + 1
            schemes[name], note = _scheme_for(plan, number, name, module, device)
            rule_numbers[name] = number
            if note:
                degraded.setdefault(number, []).append(note)
    for number, reasons in degraded.items():
        notes.extend(reasons)
        more = f", and {len(reasons) - 1} more Linears" if len(reasons) > 1 else ""
        warnings.warn(f"plan {plan.name}, rule {number}: {reasons[0]}{more}", stacklevel=3)
    experts = [name for name in expert_names(model) if f"{name}.down_proj" in schemes]
    if experts:
        notes.append(
            f"{len(experts)} experts are quantized as Linears of their own, such as {experts[0]}.down_proj"
        )
    _refuse_idle_rules(plan, rule_numbers, shadowed, modules, tied, roles, matches)
    if "" in schemes:
        raise PlanError(
            "the model itself is one Linear and cannot be replaced in place: wrap it in nn.Sequential"
        )
    resolved = ResolvedPlan(plan, schemes, rule_numbers, _account(plan, model, schemes, roles), notes)
    for note in _about_small_shares(resolved):
        notes.append(note)
        warnings.warn(f"plan {plan.name}: {note}", stacklevel=3)
    return resolved


def resolved_as(
    plan: QuantizationPlan,
    model: nn.Module,
    schemes: Mapping[str, Scheme],
    rules: Mapping[str, int],
    roles: Mapping[str, str],
    notes: list[str],
) -> ResolvedPlan:
    """The resolved plan of an earlier `resolve` for ``model`` (unquantized; the meta device suffices)."""
    account = _account(plan, model, schemes, roles)
    return ResolvedPlan(plan, dict(schemes), dict(rules), account, list(notes))


def replaceable_linears(model: nn.Module) -> tuple[dict[str, nn.Linear], dict[str, str]]:
    """Linears that can be replaced, by name, and the reasons why the others cannot."""
    linears, fixed = {}, {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
            fixed[name] = "nn.MultiheadAttention reads its weight directly"
        elif not isinstance(module._parameters.get("weight"), nn.Parameter):
            fixed[name] = "its weight is computed from other parameters"
        elif type(module).forward not in (nn.Linear.forward, DenseLinear.forward, LogitsLinear.forward):
            fixed[name] = f"{type(module).__name__} has a forward of its own"
        else:
            linears[name] = module
    return linears, fixed


def replaceable_others(model: nn.Module, kinds: Collection[str]) -> dict[str, nn.Module]:
    """Embeddings and convolutions of ``kinds`` whose weight can be quantized."""
    return {
        name: module
        for name, module in model.named_modules()
        if module_kind(module) in set(kinds) - {"linear"}
        and isinstance(module._parameters.get("weight"), nn.Parameter)
        and getattr(module, "max_norm", None) is None
    }


def tied_linears(model: nn.Module, linears: Mapping[str, nn.Module]) -> dict[str, str]:
    """The Linears (or embeddings) whose weight another module shares, with the reason as text."""
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append(name)
    tied = {}
    for name, linear in linears.items():
        others = [other for other in holders[id(linear.weight)] if other != name]
        if others:
            tied[name] = f"its weight is tied to {', '.join(others)}"
    return tied


def default_dtype_of(tensor: torch.Tensor, persistent: bool, default: torch.dtype) -> torch.dtype:
    """The dtype ``quantize_`` gives a tensor without a scheme: the default dtype for floating parameters and
    persistent buffers, its own for others (integers, computed tables such as rotary frequencies)."""
    return default if tensor.is_floating_point() and persistent else tensor.dtype


def _roles_of(plan: QuantizationPlan, model: nn.Module) -> Mapping[str, str]:
    from labkit.models.families import find_roles

    try:
        return find_roles(model)
    except ValueError:
        if any(rule.roles for rule in plan.rules):
            raise
        return {}


def _scheme_for(
    plan: QuantizationPlan, number: int, name: str, module: nn.Module, device
) -> tuple[Scheme, str | None]:
    rule = plan.rules[number - 1]
    try:
        rule.scheme.validate_module(module, device)
        return rule.scheme, None
    except SchemeError as error:
        where = f"plan {plan.name}, rule {number} {rule}: {name}: {error}"
        if rule.on_unsupported is None:
            raise PlanError(f"{where} (or set on_unsupported: int8)") from error
        try:
            rule.on_unsupported.validate_module(module, device)
        except SchemeError as second:
            raise PlanError(f"{where}; nor can {rule.on_unsupported.name}: {second}") from error
        note = f"{name} gets {rule.on_unsupported.name} instead of {rule.scheme.name}: {error}"
        return rule.on_unsupported, note


def _about_small_shares(resolved: ResolvedPlan) -> list[str]:
    """A sentence for each role that the plan means to quantize and of whose values it reaches less than half."""
    notes = []
    for role, (reached, total) in resolved.reached_by_role.items():
        meant = any(
            rule.takes_all_of(role) and rule.scheme.name not in DTYPES for rule in resolved.plan.rules
        )
        if not meant or not 0 < reached < total / 2:
            continue
        missed = [
            part for part in resolved.parts if part.role == role and part.module not in resolved.schemes
        ]
        largest = max(missed, key=lambda part: part.parameters)
        notes.append(
            f"{role}: the rules reach {reached / total:.0%} of its {total:,} values; the rest is no Linear that "
            f"can be replaced and stays {resolved.plan.default}, most of it as in {largest.module}"
        )
    return notes


def _refuse_idle_rules(plan, used, shadowed, linears, tied, roles, matches) -> None:
    """Raises PlanError for a rule that applies to no Linear."""
    for number, rule in enumerate(plan.rules, 1):
        if number in used.values() or rule.optional:
            continue
        where = f"plan {plan.name}, rule {number} {rule}"
        matched = [name for name in linears if matches(rule, name)]
        if matched and all(name in tied for name in matched):
            only = ", ".join(matched)
            raise PlanError(f"{where} matches only tied Linears ({only}): name it exactly to quantize it")
        if shadowed[number - 1]:
            raise PlanError(f"{where} has no effect: earlier rules match all its Linears")
        kinds = "Linear" if "linear" in rule.modules else " or ".join(rule.modules)
        raise PlanError(f"{where} matches no {kinds}; {_describe_candidates(rule, linears, roles)}")


def _describe_candidates(rule: Rule, modules: Mapping[str, nn.Module], roles: Mapping[str, str]) -> str:
    if "linear" not in rule.modules:
        return f"modules of these kinds are {_listed([n for n, m in modules.items() if not _is_linear(m)])}"
    linears = [name for name, module in modules.items() if _is_linear(module)]
    wider = dataclasses.replace(rule, linears=(), depth=None)
    matched = [name for name in linears if wider.matches(name, roles.get(name))]
    if matched and (rule.linears or rule.depth):
        kinds = dict.fromkeys(map(kind_of, matched))
        return (
            f"{len(matched)} Linears match without linear and depth; their own names are {', '.join(kinds)}"
        )
    if rule.roles:
        count = Counter(roles[name] for name in linears if name in roles)
        if not count:
            return "no roles are known for this model: use match, or pass roles="
        return f"Linears by role: {', '.join(f'{role} {n}' for role, n in count.items())}"
    if not linears:
        return "the model has no Linear that can be replaced"
    return f"Linears are {_listed(linears)}"


def _listed(names: Sequence[str]) -> str:
    if not names:
        return "none"
    return f"{', '.join(names[:6])}{f' and {len(names) - 6} more' if len(names) > 6 else ''}"


def _is_linear(module: nn.Module) -> bool:
    return module_kind(module) == "linear"


def _account(
    plan: QuantizationPlan, model: nn.Module, schemes: Mapping[str, Scheme], roles: Mapping[str, str]
) -> list[Part]:
    """Every parameter and buffer once."""
    role_of = _role_lookup(roles)
    parts, seen = [], set()
    for name, module in model.named_modules():
        if name in schemes:
            size = schemes[name].predict_module_bytes(module, dtype=plan.dtype)
            parameters = sum(tensor.numel() for tensor in module.parameters(recurse=False))
            linear = isinstance(module, nn.Linear)
            parts.append(Part(name, role_of(name), schemes[name].name, parameters, size, linear))
            continue
        parameters = size = 0
        computed = module._non_persistent_buffers_set
        tensors = [(p, True, True) for p in module._parameters.values()]
        tensors += [(b, False, key not in computed) for key, b in module._buffers.items()]
        for tensor, is_parameter, persistent in tensors:
            if tensor is None or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            parameters += tensor.numel() * is_parameter
            size += tensor.numel() * default_dtype_of(tensor, persistent, plan.dtype).itemsize
        if size:
            linear = isinstance(module, nn.Linear)
            parts.append(Part(name, role_of(name), plan.default, parameters, size, linear))
    return parts


def _role_lookup(roles: Mapping[str, str]):
    """name -> role; a module without a role takes that of the smallest enclosing part with roles, if these agree."""
    inside: dict[str, set[str]] = {}
    for name, role in roles.items():
        pieces = name.split(".")
        for length in range(1, len(pieces) + 1):
            inside.setdefault(".".join(pieces[:length]), set()).add(role)

    def role_of(name: str) -> str:
        pieces = name.split(".")
        for length in range(len(pieces), 0, -1):
            around = inside.get(".".join(pieces[:length]))
            if around:
                return next(iter(around)) if len(around) == 1 else NO_ROLE
        return NO_ROLE

    return role_of
