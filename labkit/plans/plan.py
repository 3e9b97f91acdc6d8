"""The plan: which Linear gets which scheme, read from a YAML file.

A plan is a list of rules ``role or name pattern -> scheme with options``; for each Linear the first
matching rule applies. Everything that no rule matches is stored in the ``default`` dtype.

    name: mixed
    description: INT4 decoder, INT8 vision, the rest BF16.
    rules:
      - role: decoder            # or a list of roles
        scheme: int4
        group_size: 64           # an option of the scheme
        on_unsupported: int8     # the scheme of Linears that `scheme` cannot take (default: an error)
      - match: "re:model\\.visual\\..*"   # a regular expression for the whole name, a glob, or a name
        scheme: int8-dynamic
        optional: true           # no error if the model has no such Linear
      - role: vision
        linear: [gate_proj, up_proj]   # only Linears whose name ends in one of these
        depth: [0, 0.5]          # and only in the first half of their stack of layers, however many it has
        scheme: int8
      - role: embedding
        modules: embedding       # linear (the default), embedding, conv, or a list of these
        scheme: int8
    default: bf16
    runtime:
      kv_cache: bf16
      sliding_window: null
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from labkit.common.errors import LabError, PlanError
from labkit.common.files import assets_folder, atomic_path, user_path
from labkit.common.options import option
from labkit.common.yaml_text import read_yaml
from labkit.models.checkpoint import LoadError
from labkit.plans.rule import Rule
from labkit.quantization import DTYPES, get_scheme
from labkit.quantization.torch_state import guarded

if TYPE_CHECKING:
    import torch
    from torch import nn

    from labkit.plans.resolved import ResolvedPlan

KV_CACHE_DTYPES = ("fp32", "fp16", "bf16", "int8")
_USUAL = [
    *("fp32", "fp16", "bf16", "int8", "int8-dynamic", "int4", "nf4", "llm-int8"),
    *("hqq", "awq", "gptq", "article", "article-hybrid", "article-code"),
]


@dataclass(frozen=True)
class RuntimeOptions:
    """Options of the engine that do not concern weights."""

    kv_cache: str | None = option(
        None, "dtype of the KV cache; none: the plan's default", choices=KV_CACHE_DTYPES
    )
    sliding_window: int | None = option(
        None, "tokens of the past each token attends to, besides the first 4; none: all of them"
    )

    @property
    def is_default(self) -> bool:
        """Whether the cache holds all tokens, in the dtype the model computes in."""
        return self == RuntimeOptions()

    def __post_init__(self) -> None:
        if self.kv_cache is not None and self.kv_cache not in KV_CACHE_DTYPES:
            raise PlanError(
                f"runtime: kv_cache must be one of {', '.join(KV_CACHE_DTYPES)}, not {self.kv_cache!r}"
            )
        window = self.sliding_window
        if window is not None and (not isinstance(window, int) or isinstance(window, bool) or window < 1):
            raise PlanError(f"runtime: sliding_window must be a number of tokens or null, not {window!r}")


@dataclass(frozen=True)
class QuantizationPlan:
    """Rules, the dtype of everything else, and runtime options.

    ``evidence`` holds a search's measurements of its plan; it stands in the file and has no effect.
    """

    name: str
    rules: tuple[Rule, ...]
    description: str = ""
    default: str = "bf16"
    runtime: RuntimeOptions = field(default_factory=RuntimeOptions)
    evidence: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise PlanError(f"a plan's name is text, not {self.name!r}")
        if not isinstance(self.default, str) or self.default not in DTYPES:
            raise PlanError(
                f"plan {self.name}: default must be one of {', '.join(DTYPES)}, not {self.default!r}"
            )

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype of ``default``."""
        return DTYPES[self.default]

    @property
    def requires_calibration(self) -> bool:
        """Whether a rule's scheme needs the activations to quantize."""
        return any(rule.scheme.requires_calibration for rule in self.rules)

    @classmethod
    def from_dict(cls, data: Any, where: str = "plan") -> QuantizationPlan:
        """A plan from a mapping; errors begin with ``where`` and the rule's number."""
        if not isinstance(data, Mapping):
            raise PlanError(f"{where}: a plan is a mapping with name and rules")
        keys = [*(item.name for item in fields(cls)), "on_unsupported"]
        for key in data:
            if key not in keys:
                raise PlanError(f"{where}: unknown key {key!r}; known are {', '.join(keys)}")
        for key in ("name", "rules"):
            if key not in data:
                raise PlanError(f"{where}: the key {key} is missing")
        if not isinstance(data["rules"], list):
            raise PlanError(f"{where}: rules must be a list")
        runtime = data.get("runtime") or {}
        options = [item.name for item in fields(RuntimeOptions)]
        if not isinstance(runtime, Mapping) or any(key not in options for key in runtime):
            raise PlanError(f"{where}: runtime takes {' and '.join(options)}; this is {runtime!r}")
        evidence = data.get("evidence") or {}
        if not isinstance(evidence, Mapping):
            raise PlanError(f"{where}: evidence is a mapping of what was measured, not {evidence!r}")
        fallback = data.get("on_unsupported")
        rules = [
            Rule.from_dict(rule, f"{where}: rule {number}", fallback)
            for number, rule in enumerate(data["rules"], 1)
        ]
        try:
            return cls(
                name=str(data["name"]) if type(data["name"]) in (int, float) else data["name"],
                rules=tuple(rules),
                description=str(data.get("description") or ""),
                default=data.get("default", "bf16"),
                runtime=RuntimeOptions(**runtime),
                evidence=dict(evidence),
            )
        except PlanError as error:
            raise PlanError(f"{where}: {error}") from error

    @classmethod
    def from_yaml(cls, path_or_name: str | Path) -> QuantizationPlan:
        """A plan from a YAML file, or a preset by its name. Raises PlanError with the file's name."""
        path = user_path(path_or_name)
        if not path.is_file():
            if str(path_or_name) in presets():
                path = plans_folder() / f"{path_or_name}.yaml"
            else:
                listed = ", ".join(presets())
                raise PlanError(f"no plan file or preset {str(path_or_name)!r}; presets are {listed}")
        try:
            data = read_yaml(path)
        except LabError as error:
            raise PlanError(str(error)) from None
        return cls.from_dict(data, path.name)

    @classmethod
    def preset(cls, name: str) -> QuantizationPlan:
        """The preset ``name``, of `presets`."""
        if name not in presets():
            raise PlanError(f"no preset {name!r}; presets are {', '.join(presets())}")
        return cls.from_yaml(plans_folder() / f"{name}.yaml")

    @classmethod
    def uniform(cls, scheme: str, *, default: str = "bf16", **options: Any) -> QuantizationPlan:
        """Every Linear the same: ``QuantizationPlan.uniform("int4", num_bits=3)``."""
        settings = "".join(f"-{key}-{value}" for key, value in options.items()).replace("_", "-")
        rule = Rule(get_scheme(scheme, **options), match="re:.*")
        return cls(f"{scheme}{settings}", (rule,), f"Every Linear in {scheme}.", default)

    def to_dict(self) -> dict[str, Any]:
        """The mapping `from_dict` reads, every option written out."""
        data = {
            "name": self.name,
            "description": self.description,
            "rules": [rule.to_dict() for rule in self.rules],
            "default": self.default,
            "runtime": {item.name: getattr(self.runtime, item.name) for item in fields(self.runtime)},
        }
        return {**data, "evidence": dict(self.evidence)} if self.evidence else data

    def to_yaml(self, path: str | Path) -> None:
        """Write the plan to ``path``, atomically."""
        text = yaml.dump(self.to_dict(), Dumper=_PlanDumper, sort_keys=False, allow_unicode=True, width=110)
        with atomic_path(Path(path)) as temporary:
            Path(temporary).write_text(text, encoding="utf-8")

    @guarded
    def resolve(
        self,
        model: nn.Module,
        roles: Mapping[str, str] | None = None,
        device: torch.device | str | None = None,
    ) -> ResolvedPlan:
        """Which Linear gets which scheme, and the resulting bytes; the model may be on the meta device.

        ``roles`` maps module names to roles (default: by the model's family). ``device`` is where the model will
        run (default: where its weights are). Raises PlanError that names the rule.
        """
        from labkit.plans.resolve import resolve

        return resolve(self, model, roles, device)


def plans_folder() -> Path:
    """The folder of the presets."""
    return assets_folder() / "plans"


def presets() -> list[str]:
    """Names of the plans that come with the lab: the usual ones first, then by name."""
    names = sorted(path.stem for path in plans_folder().glob("*.yaml"))
    return [name for name in _USUAL if name in names] + [name for name in names if name not in _USUAL]


class _PlanDumper(yaml.SafeDumper):
    """Writes lists of plain values, such as depths and names, on one line."""

    def represent_list(self, values):
        plain = all(isinstance(value, str | int | float) for value in values)
        return self.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=plain or None)


_PlanDumper.add_representer(list, _PlanDumper.represent_list)


def as_plan(
    plan: str | Path | Mapping[str, Any] | QuantizationPlan, dtype: str | None = None
) -> QuantizationPlan:
    """The plan of a preset's name, a file, a definition (`QuantizationPlan.to_dict`) or a plan; ``dtype`` replaces
    its default dtype."""
    if isinstance(plan, Mapping):
        plan = QuantizationPlan.from_dict(plan)
    elif not isinstance(plan, QuantizationPlan):
        plan = QuantizationPlan.from_yaml(plan)
    if dtype is None:
        return plan
    if dtype not in DTYPES:
        raise LoadError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    return dataclasses.replace(plan, default=dtype)
