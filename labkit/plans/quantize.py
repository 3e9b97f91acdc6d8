"""`quantize_`: lay a plan over a model and replace its Linears in place, one by one."""

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from labkit.plans.calibrate import calibrate_
from labkit.plans.finished import WorkFolder, fingerprint_of, opened
from labkit.plans.plan import PlanError, QuantizationPlan
from labkit.plans.resolve import default_dtype_of
from labkit.plans.resolved import ResolvedPlan
from labkit.plans.sequential import checked_batches
from labkit.quantization import QuantizedLinear, Scheme
from labkit.quantization.dense import DenseLinear
from labkit.quantization.int8_storage import StoredInt8


@torch.no_grad()
def quantize_(
    model: nn.Module,
    plan: QuantizationPlan | str | Path,
    calibration: Iterable[Any] | None = None,
    *,
    roles: Mapping[str, str] | None = None,
    device: torch.device | str | None = None,
    work_folder: str | Path | WorkFolder | None = None,
    progress: bool = True,
) -> ResolvedPlan:
    """Replace the Linears of ``model`` as ``plan`` says, in place, and bring all else to its default dtype.

    Works on any torch module. Each original is freed as soon as its replacement stands, so the peak is the
    model and one layer, and for schemes that require calibration the inputs of one layer. Floating parameters
    and persistent buffers take the plan's default dtype; computed buffers (rotary frequencies) stay as they
    are. The model is for inference afterwards: nothing requires gradients. A module that is no transformers
    model casts its floating inputs to the default dtype from then on.

    Args:
        model: on the device where it is to be quantized, or on the CPU with ``device``; not on the meta device.
        plan: a plan, a YAML file, or the name of a preset.
        calibration: batches for schemes that require calibration, such as token ids [B, L] without padding,
            or mappings of the model's arguments; the others ignore it.
        roles: module name -> role, for plans with ``role`` rules (default: found by the model's family).
        device: where the model is afterwards and where calibration runs, if not where it is: each layer's
            weights are moved when its turn comes.
        work_folder: for plans that calibrate, a folder for what is finished: the same call again continues. One
            that is open already (`labkit.plans.finished.WorkFolder`) keeps the modules of every plan.
        progress: show a progress bar.

    Returns:
        what was done, with the predicted bytes.

    Raises:
        PlanError: the plan does not fit the model, or calibration is missing (before anything is changed).
        SchemeError: a weight cannot be quantized (not finite), naming the Linear.
        LabError: calibration batches that do not run, or do not come to every Linear that needs them.
        LabError: the work folder holds another run.
    """
    if not isinstance(plan, QuantizationPlan):
        plan = QuantizationPlan.from_yaml(plan)
    resolved = plan.resolve(model, roles, device)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise PlanError("the model is on the meta device and has no weights to quantize: load them first")
    calibrated = {name: scheme for name, scheme in resolved.schemes.items() if scheme.requires_calibration}
    for name in calibrated if calibration is None else ():
        raise PlanError(f"{_where(resolved, name)} needs calibration batches")
    batches = checked_batches(calibration) if calibrated else []
    run = partial(fingerprint_of, model, resolved.schemes, plan.dtype, batches) if calibrated else None
    places = find_places(model, set(resolved.schemes))
    walked = walked_schemes(model, resolved.schemes)

    with (
        opened(work_folder, run) as work,
        tqdm(
            total=len(resolved.schemes), desc=f"Quantizing ({plan.name})", unit="layer", disable=not progress
        ) as bar,
    ):

        def replace(name: str, module: nn.Module) -> None:
            for parent, attribute in places[name]:
                setattr(parent, attribute, module)
            bar.update()

        for name, scheme in resolved.schemes.items():
            if name in walked:
                continue
            original = model.get_submodule(name)
            there = device or original.weight.device
            module = work.load(name, scheme, original, there, plan.dtype) if work is not None else None
            if module is None:
                try:
                    module = scheme.quantize_module(original, device=there, dtype=plan.dtype)
                except ValueError as error:
                    raise type(error)(f"{name}: {error}") from error
                if work is not None:
                    work.save(name, module)
            module.train(original.training)
            replace(name, module)
            del original
        _convert_rest_(model, plan.dtype, device, {model.get_submodule(name) for name in walked})
        if not hasattr(
            model, "get_input_embeddings"
        ):  # transformers models look after their inputs themselves
            model.register_forward_pre_hook(_CastInputs(plan.dtype), with_kwargs=True)
        if walked:
            calibrate_(model, walked, batches, replace, dtype=plan.dtype, device=device, work=work)
    model.requires_grad_(False)
    return resolved


def walked_schemes(model: nn.Module, schemes: Mapping[str, Scheme]) -> dict[str, Scheme]:
    """What the calibration's walk replaces: the calibrated, and for references to the unquantized model all other
    Linears too."""
    calibrated = {name: scheme for name, scheme in schemes.items() if scheme.requires_calibration}
    if not any(one.needs_reference for one in calibrated.values()):
        return calibrated
    return {
        name: scheme for name, scheme in schemes.items() if isinstance(model.get_submodule(name), nn.Linear)
    }


def weights_bytes(model: nn.Module) -> int:
    """Resident bytes of a model's parameters and buffers, what is shared counted once.

    Models quantized by others are counted too: bitsandbytes' ``quant_state`` and ``SCB``, and the inner
    tensors of tensor subclasses.
    """
    seen: dict[Any, int] = {}

    def count(tensor: Any) -> None:
        if not isinstance(tensor, torch.Tensor):
            return
        if hasattr(tensor, "__tensor_flatten__"):
            for attribute in tensor.__tensor_flatten__()[0]:
                count(getattr(tensor, attribute))
            return
        size = tensor.numel() * tensor.element_size()
        key = id(tensor) if tensor.is_meta else (tensor.device, tensor.data_ptr(), size)
        seen[key] = size

    def count_state(state: Any) -> None:
        if state is not None:
            for attribute in ("absmax", "code", "offset"):
                count(getattr(state, attribute, None))
            count_state(getattr(state, "state2", None))

    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            count(tensor)
            count_state(getattr(tensor, "quant_state", None))
            count(getattr(tensor, "SCB", None))
        count(getattr(getattr(module, "state", None), "SCB", None))
    return sum(seen.values())


def _where(resolved: ResolvedPlan, name: str) -> str:
    """The rule that gave the Linear ``name`` its scheme, for errors."""
    number = resolved.rules[name]
    return f"plan {resolved.plan.name}, rule {number}: {resolved.schemes[name].name}"


def find_places(model: nn.Module, names: set[str]) -> dict[str, list[tuple[nn.Module, str]]]:
    """Name -> every (parent, attribute) where that module hangs; holds no reference to the modules."""
    ids = {id(module): name for name, module in model.named_modules() if name in names}
    places: dict[str, list[tuple[nn.Module, str]]] = {name: [] for name in names}
    for parent in model.modules():
        for attribute, child in parent._modules.items():
            if id(child) in ids:
                places[ids[id(child)]].append((parent, attribute))
    return places


def _convert_rest_(
    model: nn.Module, dtype: torch.dtype, device: torch.device | str | None, waiting: set[nn.Module]
) -> None:
    """Bring what no scheme owns to the default dtype and to ``device`` (None: it stays), keeping ties.

    The Linears ``waiting`` for calibration keep their weights as they are.
    """
    for linear in waiting:  # of its own, should it be tied to what is converted below
        linear.weight = nn.Parameter(linear.weight.data, requires_grad=False)
    for module in model.modules():
        if module in waiting:
            continue
        if isinstance(module, (QuantizedLinear, DenseLinear, StoredInt8)):
            module.to(device)
            continue
        for parameter in module._parameters.values():
            if parameter is not None:
                parameter.data = parameter.data.to(device, default_dtype_of(parameter, True, dtype))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                persistent = name not in module._non_persistent_buffers_set
                module._buffers[name] = buffer.to(device, default_dtype_of(buffer, persistent, dtype))


class _CastInputs:
    """Forward pre-hook: floating tensors among the arguments are cast to one dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return tuple(self.cast(value) for value in args), {key: self.cast(v) for key, v in kwargs.items()}

    def cast(self, value: Any) -> Any:
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.to(self.dtype) if floating else value
