"""Calibrated quantization: each Linear is quantized on the inputs it gets behind already quantized layers."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from labkit.common.errors import LabError
from labkit.models.experts import every_expert_runs
from labkit.plans.batch_pass import TOO_LARGE
from labkit.plans.batches import Batch, run_model, to_device
from labkit.plans.sequential import SequentialRun
from labkit.plans.walk import PlanWalk
from labkit.quantization import Scheme
from labkit.quantization.gptq_blocks import forget_graphs
from labkit.quantization.statistics import InputStatistics


@torch.no_grad()
def calibrate_(
    walk: PlanWalk,
    batches: Sequence[Batch],
    device: torch.device | str | None = None,
    bar: tqdm | None = None,
) -> None:
    """Replace the Linears of ``walk.sequential`` in the order in which the model calls them.

    All batches' passes halt at a Linear (`labkit.plans.sequential`), the second moments of its inputs are summed, the
    scheme quantizes it, and the passes continue with the quantized module. Memory holds one layer's inputs. Weights
    may lie on the CPU while the work runs on a GPU: each is moved when it is needed.

    Args:
        walk: the rest of its model is already quantized or converted, and on ``device``.
        batches: see `labkit.plans.sequential.run_model`.
        device: where the batches run (default: where they are).
        bar: a progress bar, advanced for each Linear.

    Raises:
        LabError: a batch does not run, no batch reaches some of the Linears (raised before any is quantized), or
            the batches together do not fit into the device's memory.
        SchemeError: a Linear cannot be quantized (the message names it).
    """
    model, schemes = walk.model, walk.sequential
    in_training = [name for name, module in model.named_modules() if module.training]
    model.eval()
    references = any(scheme.needs_reference for scheme in schemes.values())
    gathered: _Gathered | None = None

    def visit(name: str, inputs: list[Tensor], originals: list[Tensor] | None) -> nn.Module:
        nonlocal gathered
        scheme = schemes[name]
        if not walk.take_finished(name):
            if not scheme.requires_calibration:
                gathered = None
            elif gathered is None or not gathered.serves(scheme, inputs):
                gathered = _Gathered(scheme, inputs, originals, walk.place(name))
            walk.quantize(name, gathered and gathered.statistics)
        if bar is not None:
            bar.update()
        return model.get_submodule(name)

    try:
        linears = {name: model.get_submodule(name) for name in schemes}
        with (
            every_expert_runs(model),
            SequentialRun(model, linears, batches, device, references) as run,
        ):
            del linears  # so that each original is freed as soon as it is replaced
            missing = run.find_order()
            if needing := [name for name in missing if schemes[name].requires_calibration]:
                raise LabError(_about_missing(needing))
            run.release(missing)
            for name in missing:
                visit(name, [], None)
            run.visit_all(visit)
            if run.watched:  # the path of the quantized layers' values passes them by
                raise LabError(_about_missing(list(run.watched)))
    except torch.OutOfMemoryError as error:
        raise LabError(TOO_LARGE) from error
    finally:
        forget_graphs()
        for name in in_training:
            model.get_submodule(name).training = True


class _Gathered:
    """Statistics and the inputs they are computed from: neighbours such as q, k and v share the same tensors."""

    def __init__(
        self, scheme: Scheme, inputs: list[Tensor], originals: list[Tensor] | None, device: torch.device | str
    ) -> None:
        drifting = scheme.needs_reference and originals is not None
        columns = inputs[0].shape[-1]
        self.statistics = InputStatistics(columns, scheme.needs_full_moment, drifting, device)
        for index, batch in enumerate(inputs):
            self.statistics.add(batch, originals[index] if drifting else None)
        self._inputs = [weakref.ref(batch) for batch in inputs]  # weak: the inputs can be freed

    def serves(self, scheme: Scheme, inputs: Sequence[Tensor]) -> bool:
        """Whether these are the same tensors and the statistics are those the scheme needs."""
        gathered = [reference() for reference in self._inputs]
        return (
            self.statistics.full == scheme.needs_full_moment
            and self.statistics.drifting == scheme.needs_reference
            and len(gathered) == len(inputs)
            and all(a is b for a, b in zip(gathered, inputs))
        )


@torch.no_grad()
def watch_inputs(
    model: nn.Module,
    names: Iterable[str],
    batches: Iterable[Batch],
    see: Callable[[str, int, Tensor], None],
) -> None:
    """Run the batches through the unchanged model; each call of a Linear of ``names`` calls
    ``see(name, batch number, inputs [..., K])``."""
    number = 0

    def hook_of(name: str) -> Callable:
        return lambda module, arguments: see(name, number, arguments[0])

    handles = [model.get_submodule(name).register_forward_pre_hook(hook_of(name)) for name in names]
    try:
        device = next((parameter.device for parameter in model.parameters()), None)
        for number, batch in enumerate(batches):  # noqa: B007 - the hooks read the number
            run_model(model, to_device(batch, device))
    finally:
        for handle in handles:
            handle.remove()


def input_statistics(
    model: nn.Module, names: Iterable[str], batches: Iterable[Batch], full: bool = True
) -> dict[str, InputStatistics]:
    """Second moments of the inputs of the Linears ``names`` in the unchanged model.

    Makes a single pass over the batches; memory holds K² numbers for each Linear (K with ``full`` False). A Linear
    that no batch reaches is left out.
    """
    statistics: dict[str, InputStatistics] = {}

    def see(name: str, number: int, inputs: Tensor) -> None:
        if name not in statistics:
            statistics[name] = InputStatistics(inputs.shape[-1], full, device=inputs.device)
        statistics[name].add(inputs)

    watch_inputs(model, names, batches, see)
    return statistics


def _about_missing(names: Sequence[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return (
        f"no calibration batch comes to {', '.join(names[:4])}{more}: give batches that use them "
        "(images for a vision encoder, recordings for a speech encoder), or lay a scheme on them that needs none"
    )
