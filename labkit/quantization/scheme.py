"""The base of all schemes: a frozen dataclass of options that replaces a Linear, registered by name.

To add a scheme, write a file in this folder with a dataclass derived from `Scheme`, decorate it with
``@register("name")`` and import it in ``__init__.py``. The options are the dataclass's fields, made by
`labkit.common.options.option`; the command line, the widgets and the documentation show their help text.
"""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from labkit.common.errors import SchemeError
from labkit.quantization.int8_storage import empty_stored, module_kind, stored_bytes

if TYPE_CHECKING:
    from labkit.quantization.statistics import InputStatistics

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


_REGISTRY: dict[str, type["Scheme"]] = {}


@dataclass(frozen=True)
class Scheme:
    """How one Linear's weight, and perhaps its activations, are stored and multiplied."""

    name: ClassVar[str]
    requires_calibration: ClassVar[bool] = False
    # the kinds of modules it replaces: see `labkit.quantization.int8_storage`
    module_kinds: ClassVar[tuple[str, ...]] = ("linear",)
    needs_full_moment: ClassVar[bool] = True  # of calibrated schemes: the matrix, or its diagonal alone
    needs_reference: ClassVar[bool] = False  # of calibrated schemes: also the unquantized model's inputs

    def __post_init__(self) -> None:
        for item in fields(self):
            _check_option(self.name, item, getattr(self, item.name))

    @property
    def summary(self) -> str:
        """The first line of the scheme's docstring."""
        return (type(self).__doc__ or "").strip().splitlines()[0]

    def validate_environment(self, device: torch.device | str | None) -> None:
        """Raises SchemeError if this scheme cannot run on ``device`` with the packages installed."""
        kind = "cpu" if device is None else torch.device(device).type
        if kind not in ("cpu", "cuda", "meta"):
            raise SchemeError(f"scheme {self.name} runs on cpu and cuda, not on {kind}")

    def validate(self, in_features: int, out_features: int, device: torch.device | str | None = None) -> None:
        """Raises SchemeError, naming the fault and a remedy, if this scheme cannot take a Linear of these sizes."""
        self.validate_environment(device)

    def validate_module(self, module: nn.Module, device: torch.device | str | None = None) -> None:
        """`validate` for a module of any kind. Raises SchemeError for a kind that this scheme does not replace."""
        kind = module_kind(module)
        if kind not in self.module_kinds:
            able = [name for name, cls in _REGISTRY.items() if kind in cls.module_kinds]
            raise SchemeError(
                f"{self.name} does not replace a module of the kind {kind}; {', '.join(able) or 'none'} can"
            )
        if kind == "linear":
            self.validate(module.in_features, module.out_features, device)
        else:
            self.validate_environment(device)

    def empty_module(
        self,
        module: nn.Module,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> nn.Module:
        """`empty_linear` for a module of any kind; ``module`` may be on the meta device."""
        if module_kind(module) == "linear":
            sizes = module.in_features, module.out_features, module.bias is not None
            return self.empty_linear(*sizes, device=device, dtype=dtype)
        return empty_stored(module, device, dtype)

    def quantize_module(
        self,
        module: nn.Module,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        statistics: "InputStatistics | None" = None,
    ) -> nn.Module:
        """`quantize_linear` for a module of any kind."""
        if module_kind(module) == "linear":
            return self.quantize_linear(module, device=device, dtype=dtype, statistics=statistics)
        device = device or module.weight.device
        self.validate_module(module, device)
        weight = checked_weight(module)
        stored = empty_stored(module, device, dtype or weight.dtype)
        stored.set_weight(weight.to(device))
        if stored._parameters.get("bias") is not None:
            stored.bias.data.copy_(module.bias.detach())
        return stored

    def predict_module_bytes(self, module: nn.Module, *, dtype: torch.dtype = torch.bfloat16) -> int:
        """`predict_bytes` for a module of any kind."""
        if module_kind(module) == "linear":
            sizes = module.out_features, module.in_features, module.bias is not None
            return self.predict_bytes(*sizes, dtype=dtype)
        return stored_bytes(module, dtype)

    def empty_linear(
        self,
        in_features: int,
        out_features: int,
        has_bias: bool,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> nn.Module:
        """The module that replaces a Linear under this scheme, its buffers allocated but not filled.

        ``dtype`` is the dtype of the bias, which no scheme quantizes.
        """
        raise NotImplementedError

    def quantize_linear(
        self,
        linear: nn.Linear,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        statistics: "InputStatistics | None" = None,
    ) -> nn.Module:
        """A drop-in module for ``linear`` on ``device`` (default: its own), with the bias in ``dtype``
        (default: its own). ``linear`` itself is not changed. Schemes that require calibration use the ``statistics``
        of its inputs; the others ignore them. Raises SchemeError (see `validate`)."""
        device = device or linear.weight.device
        if self.requires_calibration and statistics is None:
            raise SchemeError(f"{self.name} needs calibration: statistics of this Linear's inputs")
        self.validate(linear.in_features, linear.out_features, device)
        weight = checked_weight(linear)
        module = self.empty_linear(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            device=device,
            dtype=dtype or weight.dtype,
        )
        if self.requires_calibration:
            self.fill_calibrated(module, weight.to(device), statistics)
        else:
            self.fill(module, weight.to(device))
        if linear.bias is not None:
            module.bias.data.copy_(linear.bias.detach())
        return module

    def fill(self, module: nn.Module, weight: Tensor) -> None:
        """Quantize ``weight`` [N, K] into the buffers of a module made by `empty_linear`."""
        module.set_weight(weight)

    def fill_calibrated(self, module: nn.Module, weight: Tensor, statistics: "InputStatistics") -> None:
        """As `fill`, with the statistics of the inputs; for schemes that require calibration."""
        raise NotImplementedError

    def predict_bytes(
        self, out_features: int, in_features: int, has_bias: bool, *, dtype: torch.dtype = torch.bfloat16
    ) -> int:
        """Bytes the module will hold, computed without building it; ``dtype`` is the dtype of the bias."""
        raise NotImplementedError

    def resident_bytes(self, module: nn.Module) -> int:
        """Bytes ``module`` holds, counted from its parameters and buffers."""
        return resident_bytes(module)

    def options(self) -> dict[str, Any]:
        """The options as a plain dictionary (what a plan file says besides ``scheme``)."""
        return {item.name: getattr(self, item.name) for item in fields(self)}


def register(name: str):
    """Class decorator: register the scheme under ``name``."""

    def decorate(cls: type[Scheme]) -> type[Scheme]:
        if name in _REGISTRY and _REGISTRY[name].__qualname__ != cls.__qualname__:
            raise ValueError(f"the scheme name {name!r} is taken by {_REGISTRY[name].__qualname__}")
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return decorate


def known_schemes() -> dict[str, type[Scheme]]:
    """Name -> class, in the order of registration."""
    return dict(_REGISTRY)


def get_scheme(name: str, **options: Any) -> Scheme:
    """The scheme ``name`` with ``options``; raises SchemeError that lists the valid names."""
    if not isinstance(name, str) or name not in _REGISTRY:
        raise SchemeError(f"unknown scheme {name!r}; known are {', '.join(_REGISTRY)}")
    cls = _REGISTRY[name]
    option_names = [item.name for item in fields(cls)]
    for key in options:
        if key not in option_names:
            listed = f"known are {', '.join(option_names)}" if option_names else "it has none"
            raise SchemeError(f"unknown option {key!r} of scheme {name}; {listed}")
    return cls(**options)


def resident_bytes(module: nn.Module) -> int:
    """Bytes of the module's own parameters and buffers, and of those of its submodules."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def bias_bytes(out_features: int, has_bias: bool, dtype: torch.dtype) -> int:
    """Bytes of a bias stored in ``dtype``."""
    return out_features * dtype.itemsize if has_bias else 0


def check_group_size(group_size: int, in_features: int) -> None:
    """Raises SchemeError, naming sizes that fit, if ``group_size`` does not divide ``in_features``."""
    if in_features % group_size:
        dividing = [str(size) for size in (32, 64, 128, 256) if in_features % size == 0]
        right = f"{' or '.join(dividing)} would do" if dividing else "no usual size does: take int8"
        raise SchemeError(f"group_size {group_size} does not divide {in_features} input features; {right}")


def checked_weight(linear: nn.Linear) -> Tensor:
    """The weight [N, K], detached; raises SchemeError if it is on the meta device or not finite."""
    weight = linear.weight.detach()
    if weight.is_meta:
        raise SchemeError("the model is on the meta device and has no weights to quantize: load them first")
    if not weight.is_floating_point():
        raise SchemeError(f"the weight is {weight.dtype}, not floating point: it is quantized already")
    if not torch.isfinite(weight.sum(dtype=torch.float32)) and not torch.isfinite(weight).all():
        raise SchemeError("the weight holds values that are not finite (inf or nan)")
    return weight


def _check_option(scheme: str, item: Any, value: Any) -> None:
    choices = item.metadata.get("choices")
    if choices is not None:
        if value not in choices or type(value) not in {type(choice) for choice in choices}:
            listed = ", ".join(str(choice) for choice in choices)
            raise SchemeError(f"{item.name} of scheme {scheme} must be one of {listed}, not {value!r}")
        return
    kind = item.type if isinstance(item.type, type) else type(item.default)
    valid = (isinstance(value, (int, float)) if kind is float else isinstance(value, kind)) and not (
        kind in (int, float) and isinstance(value, bool)
    )
    if not valid:
        raise SchemeError(f"{item.name} of scheme {scheme} must be {kind.__name__}, not {value!r}")
    if kind in (int, float) and value <= 0:
        raise SchemeError(f"{item.name} of scheme {scheme} must be positive, not {value!r}")
