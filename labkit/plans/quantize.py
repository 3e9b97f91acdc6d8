"""`quantize_`: resolve a plan for a model and replace its Linears in place, one at a time."""

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm

from labkit.models.experts import unfuse_
from labkit.plans.batches import Batch, checked_batches
from labkit.plans.calibrate import calibrate_
from labkit.plans.finished import WorkFolder, fingerprint_of, opened
from labkit.plans.plan import PlanError, QuantizationPlan
from labkit.plans.resolve import default_dtype_of
from labkit.plans.resolved import ResolvedPlan
from labkit.plans.walk import PlanWalk
from labkit.quantization import QuantizedLinear
from labkit.quantization.dense import DenseLinear
from labkit.quantization.int8_storage import StoredInt8
from labkit.quantization.torch_state import guarded


@guarded
@torch.no_grad()
def quantize_(
    model: nn.Module,
    plan: QuantizationPlan | str | Path,
    calibration: Iterable[Batch] | None = None,
    *,
    roles: Mapping[str, str] | None = None,
    device: torch.device | str | None = None,
    work_folder: str | Path | WorkFolder | None = None,
    progress: bool = True,
) -> ResolvedPlan:
    """Replace the Linears of ``model`` in place by ``plan``, and convert the rest to the plan's default dtype.

    Works on any torch module. Each original is freed as soon as it is replaced, so the peak is the model and one
    layer, and for schemes that require calibration the inputs of one layer. Floating parameters and persistent
    buffers take the plan's default dtype; computed buffers (rotary frequencies) keep theirs. Afterwards the model
    serves inference only: no parameter requires gradients. A module that is not a transformers model then casts its
    floating inputs to the default dtype.

    Args:
        model: on the device where it is quantized, or on the CPU with ``device``; not on the meta device.
        plan: a plan, a YAML file, or the name of a preset.
        calibration: batches for schemes that require calibration, such as token ids [B, L] without padding,
            or mappings of the model's arguments; other schemes ignore it.
        roles: module name -> role, for plans with ``role`` rules (default: by the model's family).
        device: where the model is placed and calibration runs (default: where the model is); each layer's weights
            are moved when they are needed.
        work_folder: for plans that calibrate, a folder of finished modules, from which the same call continues after
            an interruption. An open `labkit.plans.finished.WorkFolder` stores the modules of every plan.
        progress: show a progress bar.

    Returns:
        the resolved plan, with the predicted bytes.

    Raises:
        PlanError: the plan does not fit the model, or calibration is missing (before anything is changed).
        SchemeError: a weight cannot be quantized (not finite), naming the Linear.
        LabError: calibration batches do not run, or do not reach every Linear that needs them.
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
    unfuse_(model)
    run = partial(fingerprint_of, model, resolved.schemes, plan.dtype, batches) if calibrated else None
    with (
        opened(work_folder, run) as work,
        tqdm(
            total=len(resolved.schemes), desc=f"Quantizing ({plan.name})", unit="layer", disable=not progress
        ) as bar,
    ):
        walk = PlanWalk(model, resolved, lambda name: device or model.get_submodule(name).weight.device, work)
        for name in resolved.schemes:
            if name not in walk.sequential:
                if not walk.take_finished(name):
                    walk.quantize(name)
                bar.update()
        _convert_rest_(model, plan.dtype, device, {model.get_submodule(name) for name in walk.sequential})
        if not hasattr(model, "get_input_embeddings"):  # transformers casts the inputs of its own models
            model.register_forward_pre_hook(_CastInputs(plan.dtype), with_kwargs=True)
        if walk.sequential:
            calibrate_(walk, batches, device, bar)
    model.requires_grad_(False)
    return resolved


def weights_bytes(model: nn.Module) -> int:
    """Resident bytes of a model's parameters and buffers; shared memory counts once.

    Includes what other libraries' quantized modules hold: bitsandbytes' ``quant_state`` and ``SCB``, and the inner
    tensors of tensor subclasses.
    """
    seen: dict[object, int] = {}

    def count(tensor: object) -> None:
        if not isinstance(tensor, torch.Tensor):
            return
        if hasattr(tensor, "__tensor_flatten__"):
            for attribute in tensor.__tensor_flatten__()[0]:
                count(getattr(tensor, attribute))
            return
        size = tensor.numel() * tensor.element_size()
        key = id(tensor) if tensor.is_meta else (tensor.device, tensor.data_ptr(), size)
        seen[key] = size

    def count_state(state: object) -> None:
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


def _convert_rest_(
    model: nn.Module, dtype: torch.dtype, device: torch.device | str | None, waiting: set[nn.Module]
) -> None:
    """Convert the tensors without a scheme to the default dtype and move them to ``device`` (None: they stay);
    tied tensors stay tied. The Linears ``waiting`` for calibration keep their weights.
    """
    for linear in waiting:  # a weight of its own: it may be tied to a tensor converted below
        linear.weight = nn.Parameter(linear.weight.data, requires_grad=False)
    replaced: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        if module in waiting:
            continue
        if isinstance(module, (QuantizedLinear, DenseLinear, StoredInt8)):
            module.to(device)
            continue
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            data = parameter.data.to(device, default_dtype_of(parameter, True, dtype))
            if parameter.is_inference():  # its data cannot be exchanged for those of an ordinary tensor
                fresh = nn.Parameter(data, requires_grad=False)
                module._parameters[name] = replaced.setdefault(parameter, fresh)
            else:
                parameter.data = data
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

    def cast(self, value: object) -> object:
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.to(self.dtype) if floating else value
