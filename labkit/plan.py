"""The plan: which Linear gets which scheme, read from a YAML file.

A plan is a list of rules ``role or name pattern -> scheme with options``; for each Linear the first rule
that matches wins. What no rule matches, and everything that is no Linear, keeps its values in the
``default`` dtype.

    name: mixed
    description: INT4 decoder, INT8 vision, the rest BF16.
    rules:
      - role: decoder            # or a list of roles
        scheme: int4
        group_size: 64           # an option of the scheme
        on_unsupported: int8     # what a Linear gets that the scheme cannot take (default: an error)
      - match: "re:model\\.visual\\..*"   # a regular expression for the whole name, a glob, or a name
        scheme: int8-dynamic
        optional: true           # no error if the model has no such Linear
      - role: vision
        linear: [gate_proj, up_proj]   # of these only the Linears so called: the last part of their names
        depth: [0, 0.5]          # and only in the first half of their stack of layers, whatever its height
        scheme: int8
      - role: embedding
        modules: embedding       # rules are about Linears unless they say embedding, conv, or a list of kinds
        scheme: int8
    default: bf16
    runtime:
      kv_cache: bf16
      sliding_window: null
"""

import fnmatch
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from labkit.depth import kind_of
from labkit.errors import LabError
from labkit.files import atomic_path
from labkit.quantization import DTYPES, Scheme, SchemeError, get_scheme

if TYPE_CHECKING:
    import torch
    from torch import nn

    from labkit.resolution import ResolvedPlan

ROLES = ("vision", "speech", "cross_modal", "projector", "decoder", "embedding", "lm_head")
KV_CACHE_DTYPES = ("fp32", "fp16", "bf16", "int8")
MODULE_KINDS = ("linear", "embedding", "conv")
_RULE_KEYS = ("role", "match", "linear", "depth", "modules", "scheme", "on_unsupported", "optional")


class PlanError(LabError):
    """A plan that says something impossible, or that does not fit the model."""


@dataclass(frozen=True)
class RuntimeOptions:
    """What the engine does besides multiplying weights."""

    kv_cache: str | None = field(
        default=None,
        metadata={"help": "dtype of the KV cache; none: the plan's default", "choices": KV_CACHE_DTYPES},
    )
    sliding_window: int | None = field(
        default=None,
        metadata={"help": "tokens of the past each token attends to, besides the first 4; none: all of them"},
    )

    @property
    def is_default(self) -> bool:
        """Whether the cache is kept whole, in the dtype the model computes in."""
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
class Rule:
    """One line of a plan. Either ``roles`` or ``match`` is set.

    Attributes:
        scheme: what the matched Linears get.
        roles: roles it applies to.
        match: ``re:`` and a regular expression for the whole module name, a glob, or one exact name.
        modules: the kinds of modules it is about, of `MODULE_KINDS`.
        linears: of those, only the Linears of these own names (`labkit.depth.kind_of`); empty: all.
        depth: of those, only the ones from this relative depth on and below that (`labkit.depth`); a Linear
            in no stack of layers has none. None: any.
        on_unsupported: the scheme for a matched Linear that ``scheme`` cannot take; None: that is an error.
        optional: a model without such a Linear is no error.
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
        """Whether this rule is about the Linear ``name`` that plays ``role`` at relative ``depth``."""
        if self.linears and kind_of(name) not in self.linears:
            return False
        if self.depth is not None and (depth is None or not self.depth[0] <= depth < self.depth[1]):
            return False
        if self.match is None:
            return role in self.roles
        if self.match.startswith("re:"):
            return re.fullmatch(self.match[3:], name) is not None
        return name == self.match or fnmatch.fnmatchcase(name, self.match)

    def names_exactly(self, name: str) -> bool:
        """Whether this rule is for this one Linear."""
        return self.match == name

    def __str__(self) -> str:
        what = f"match {self.match}" if self.match is not None else f"role {', '.join(self.roles)}"
        if self.linears:
            what += f", linear {', '.join(self.linears)}"
        if self.depth is not None:
            what += f", depth {self.depth[0]:g} to {self.depth[1]:g}"
        return f"({what} -> {self.scheme.name})"

    @classmethod
    def from_dict(cls, data: Any, where: str, on_unsupported: str | None = None) -> "Rule":
        """A rule from its mapping in the file; ``where`` names it in errors."""
        if not isinstance(data, Mapping):
            raise PlanError(f"{where}: a rule is a mapping with role or match, and scheme; this is {data!r}")
        if ("role" in data) == ("match" in data):
            raise PlanError(f"{where}: give either role or match, and not both")
        if "scheme" not in data:
            raise PlanError(f"{where}: the key scheme is missing")
        options = {str(key): value for key, value in data.items() if key not in _RULE_KEYS}
        try:
            scheme = get_scheme(data["scheme"], **options)
            fallback = data.get("on_unsupported", on_unsupported)
            fallback = None if fallback in (None, "error") else get_scheme(fallback)
        except SchemeError as error:
            known = f" (keys of a rule: {', '.join(_RULE_KEYS)})" if "unknown option" in str(error) else ""
            raise PlanError(f"{where}: {error}{known}") from error
        optional = data.get("optional", False)
        if not isinstance(optional, bool):
            raise PlanError(f"{where}: optional must be true or false, not {optional!r}")
        return cls(
            scheme,
            _roles(data, where),
            _match(data, where),
            fallback,
            optional,
            _linears(data, where),
            _depth(data, where),
            _modules(data, where),
        )

    def to_dict(self) -> dict[str, Any]:
        """The mapping `from_dict` reads."""
        head: dict[str, Any] = {"match": self.match}
        if self.match is None:
            head = {"role": self.roles[0] if len(self.roles) == 1 else list(self.roles)}
        if self.linears:
            head["linear"] = self.linears[0] if len(self.linears) == 1 else list(self.linears)
        if self.depth is not None:
            head["depth"] = list(self.depth)
        if self.modules != ("linear",):
            head["modules"] = self.modules[0] if len(self.modules) == 1 else list(self.modules)
        data = {**head, "scheme": self.scheme.name, **self.scheme.options()}
        if self.on_unsupported is not None:
            data["on_unsupported"] = self.on_unsupported.name
        return {**data, "optional": True} if self.optional else data


@dataclass(frozen=True)
class QuantizationPlan:
    """Rules, the dtype of everything else, and runtime options.

    ``evidence`` is what a search found out about its plan: it is kept in the file and changes nothing.
    """

    name: str
    rules: tuple[Rule, ...]
    description: str = ""
    default: str = "bf16"
    runtime: RuntimeOptions = field(default_factory=RuntimeOptions)
    evidence: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.default not in DTYPES:
            raise PlanError(
                f"plan {self.name}: default must be one of {', '.join(DTYPES)}, not {self.default!r}"
            )

    @property
    def dtype(self) -> "torch.dtype":
        """The torch dtype of ``default``."""
        return DTYPES[self.default]

    @property
    def requires_calibration(self) -> bool:
        """Whether a rule's scheme looks at activations before it quantizes."""
        return any(rule.scheme.requires_calibration for rule in self.rules)

    @classmethod
    def from_dict(cls, data: Any, where: str = "plan") -> "QuantizationPlan":
        """A plan from a mapping; errors begin with ``where`` and the rule's number."""
        if not isinstance(data, Mapping):
            raise PlanError(f"{where}: a plan is a mapping with name and rules")
        known = [*(item.name for item in fields(cls)), "on_unsupported"]
        for key in data:
            if key not in known:
                raise PlanError(f"{where}: unknown key {key!r}; known are {', '.join(known)}")
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
                name=str(data["name"]),
                rules=tuple(rules),
                description=str(data.get("description") or ""),
                default=data.get("default", "bf16"),
                runtime=RuntimeOptions(**runtime),
                evidence=dict(evidence),
            )
        except PlanError as error:
            raise PlanError(f"{where}: {error}") from error

    @classmethod
    def from_yaml(cls, path_or_name: str | Path) -> "QuantizationPlan":
        """A plan from a YAML file, or a preset by its name. Raises PlanError with the file's name."""
        path = Path(path_or_name).expanduser()
        if not path.is_file():
            if str(path_or_name) in presets():
                path = plans_folder() / f"{path_or_name}.yaml"
            else:
                listed = ", ".join(presets())
                raise PlanError(f"no plan file or preset {str(path_or_name)!r}; presets are {listed}")
        try:
            data = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise PlanError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from error
        return cls.from_dict(data, path.name)

    @classmethod
    def preset(cls, name: str) -> "QuantizationPlan":
        """One of `presets`."""
        if name not in presets():
            raise PlanError(f"no preset {name!r}; presets are {', '.join(presets())}")
        return cls.from_yaml(plans_folder() / f"{name}.yaml")

    @classmethod
    def uniform(cls, scheme: str, *, default: str = "bf16", **options: Any) -> "QuantizationPlan":
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
        """Write the plan to ``path``; the file appears whole or not at all."""
        text = yaml.dump(self.to_dict(), Dumper=_PlanDumper, sort_keys=False, allow_unicode=True, width=110)
        with atomic_path(Path(path)) as temporary:
            Path(temporary).write_text(text, encoding="utf-8")

    def resolve(
        self,
        model: "nn.Module",
        roles: Mapping[str, str] | None = None,
        device: "torch.device | str | None" = None,
    ) -> "ResolvedPlan":
        """Which Linear gets which scheme, and how many bytes that makes; the model may be on the meta device.

        ``roles`` maps module names to roles (default: found by the model's family). ``device`` is where the
        model will run (default: where its weights are). Raises PlanError that names the rule.
        """
        from labkit.resolution import resolve

        return resolve(self, model, roles, device)


def plans_folder() -> Path:
    """The folder of the presets."""
    from labkit.models.spec import assets_folder

    return assets_folder() / "plans"


def presets() -> list[str]:
    """Names of the plans that come with the lab: the usual ones first, then by name."""
    usual = ["fp32", "fp16", "bf16", "int8", "int8-dynamic", "int4", "nf4", "llm-int8"]
    usual += ["hqq", "awq", "gptq", "article", "article-hybrid", "article-code"]
    found = sorted(path.stem for path in plans_folder().glob("*.yaml"))
    return [name for name in usual if name in found] + [name for name in found if name not in usual]


def _roles(data: Mapping, where: str) -> tuple[str, ...]:
    if "role" not in data:
        return ()
    roles = data["role"] if isinstance(data["role"], list) else [data["role"]]
    for role in roles:
        if role not in ROLES:
            raise PlanError(f"{where}: unknown role {role!r}; known are {', '.join(ROLES)}")
    if not roles:
        raise PlanError(f"{where}: the list of roles is empty")
    return tuple(roles)


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


def _linears(data: Mapping, where: str) -> tuple[str, ...]:
    if "linear" not in data:
        return ()
    names = data["linear"] if isinstance(data["linear"], list) else [data["linear"]]
    if not names or not all(isinstance(name, str) and name and "." not in name for name in names):
        raise PlanError(f"{where}: linear is a Linear's own name such as down_proj, or a list of such names")
    return tuple(names)


def _modules(data: Mapping, where: str) -> tuple[str, ...]:
    if "modules" not in data:
        return ("linear",)
    kinds = data["modules"] if isinstance(data["modules"], list) else [data["modules"]]
    for kind in kinds:
        if kind not in MODULE_KINDS:
            raise PlanError(f"{where}: unknown kind of modules {kind!r}; known are {', '.join(MODULE_KINDS)}")
    if not kinds:
        raise PlanError(f"{where}: the list of modules is empty")
    return tuple(kinds)


def _depth(data: Mapping, where: str) -> tuple[float, float] | None:
    depth = data.get("depth")
    if depth is None:
        return None
    right = isinstance(depth, list) and len(depth) == 2 and all(type(end) in (int, float) for end in depth)
    if not right or not 0 <= depth[0] < depth[1] <= 1:
        raise PlanError(f"{where}: depth is [from, to] with 0 <= from < to <= 1, not {depth!r}")
    return float(depth[0]), float(depth[1])


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key given twice, of which YAML would silently keep the last."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


class _PlanDumper(yaml.SafeDumper):
    """Writes lists of plain values, such as depths and names, in one line."""

    def represent_list(self, values):
        plain = all(isinstance(value, str | int | float) for value in values)
        return self.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=plain or None)


_PlanDumper.add_representer(list, _PlanDumper.represent_list)
