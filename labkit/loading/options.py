"""The options of loading, quantizing and exporting. No torch: the command line and widgets read them."""

from __future__ import annotations

from dataclasses import dataclass

from labkit.common.errors import CheckpointError
from labkit.common.options import REQUIRED, option
from labkit.loading.datasets import Datasets

EXPORT_FORMATS = ("compressed-tensors", "gptq", "gguf")


@dataclass(frozen=True, kw_only=True)
class MachineOptions:
    """Where a model runs."""

    device: str = option("auto", "auto, cpu, cuda, cuda:N, or several GPUs, cuda:0,cuda:1")
    threads: int | None = option(None, "CPU threads", least=1, usual="all cores")


@dataclass(frozen=True, kw_only=True)
class LoadOptions(MachineOptions):
    """The plan a model is loaded under, and where it runs."""

    plan: str | None = option(
        None, "a name from `labkit plans`, or a YAML file", usual="bf16; a quantized folder has its own"
    )


@dataclass(frozen=True)
class CalibrationOptions:
    """The examples for plans that calibrate: PhoneTap's calibration items, or a text."""

    items: int = option(Datasets.calibration, "how many calibration items, or sequences of the text", least=1)
    seed: int | None = option(None, "draw other items than the standard set", least=0)
    text: str | None = option(
        None, "a plain text file to calibrate on, for models that take no images", metavar="FILE"
    )

    def __post_init__(self) -> None:
        if type(self.items) is not int or self.items < 1:
            raise CheckpointError(f"calibration items must be at least 1, not {self.items!r}")


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions(MachineOptions):
    """What `labkit.quantize_to` takes, besides the calibration."""

    plan: str = option(REQUIRED, "a name from `labkit plans`, or a YAML file")
    output: str = option(REQUIRED, "the folder to make", metavar="FOLDER")
    force: bool = option(
        False, "replace what the lab wrote there before, and drop an unfinished one of another plan"
    )


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What `labkit.export` takes."""

    format: str = option(REQUIRED, "what to write", EXPORT_FORMATS)
    output: str | None = option(None, "the folder to make", metavar="FOLDER", usual="FOLDER-FORMAT")
    dequantize: tuple[str, ...] = option(
        (),
        "parts (vision, projector, …) or names of Linears to write unquantized, as they multiply; auto: what the format "
        "cannot express becomes the nearest that it can",
    )
    force: bool = option(False, "replace what the lab wrote there before")
