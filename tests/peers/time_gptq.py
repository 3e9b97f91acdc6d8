"""Times GPTQ at the layer sizes of a large model, on a few of its layers with random weights.

    python tests/peers/time_gptq.py autoglm-phone-9b --layers 3 --output gptq-9b.json

The model is built from its configuration alone, with ``--layers`` layers in each stack; its weights lie in the main
memory, as those of the whole model would, and each is moved to the device when its turn comes. The calibration samples
are screenshots and text of the sizes asked for. What the whole model would take is **extrapolated**: the time measured,
and for each layer left out the median time of those measured (the first of a stack not counted, for what comes before
the stack is in it).
"""

import argparse
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from labkit.common.machine import environment_on, peak_rss
from labkit.loading.prepare import choose_device
from labkit.models import find_roles, get_spec
from labkit.models.checkpoint import Checkpoint
from labkit.plans.plan import QuantizationPlan
from labkit.plans.quantize import quantize_, weights_bytes
from labkit.plans.rule import layer_of
from labkit.results.record import OpenRecord

GRID = (34, 16)
"""Patches of a screenshot of 224 x 476 pixels, as `labkit.loading.calibration` draws them."""
SEED = 0


class Clock:
    """Stands in for a `labkit.plans.finished.WorkFolder`: keeps only the time at which each module was finished."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.began, self.finished = device, time.perf_counter(), {}

    def load(self, *_: Any) -> None:
        """There is nothing to continue."""

    def save(self, name: str, _: Any) -> None:
        """Note the time, once the device has done what it was asked to."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.finished[name] = time.perf_counter() - self.began

    def layers(self) -> dict[str, list[float]]:
        """Stack -> seconds that each of its layers but the first took."""
        ends: dict[str, dict[int, float]] = {}
        for name, moment in self.finished.items():
            if place := layer_of(name):
                ends.setdefault(place[0], {})[place[1]] = moment
        return {
            stack: [moments[index] - moments[index - 1] for index in sorted(moments) if index - 1 in moments]
            for stack, moments in ends.items()
        }


def shortened(checkpoint: Checkpoint, layers: int) -> tuple[Any, dict[str, int]]:
    """The configuration with at most so many layers a stack, and the number of layers that each part really has."""
    config = checkpoint.config
    text = config.get_text_config(decoder=True)
    real = {"text": text.num_hidden_layers}
    text.num_hidden_layers = min(layers, text.num_hidden_layers)
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[: text.num_hidden_layers]
    if (vision := getattr(config, "vision_config", None)) is not None:
        real["vision"] = vision.depth
        vision.depth = min(layers, vision.depth)
    return config, real


def samples(config: Any, count: int, tokens: int) -> list[dict[str, torch.Tensor]]:
    """``count`` batches of one conversation each, of ``tokens`` tokens, with a screenshot if the model has eyes."""
    generator = torch.Generator().manual_seed(SEED)
    text = config.get_text_config(decoder=True)
    vision = getattr(config, "vision_config", None)
    special = {
        value
        for name, value in config.to_dict().items()
        if name.endswith("_token_id") and isinstance(value, int)
    }
    common = torch.tensor([one for one in range(min(text.vocab_size, 4096)) if one not in special])
    found = []
    for _ in range(count):
        ids = common[torch.randint(len(common), (tokens,), generator=generator)]
        batch = {"logits_to_keep": 8}
        if vision is not None:
            seen = GRID[0] * GRID[1] // vision.spatial_merge_size**2
            if tokens <= seen + 16:
                raise SystemExit(f"a screenshot takes {seen} tokens: give --tokens {seen + 17} or more")
            ids[8 : 8 + seen] = config.image_token_id
            values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
            batch["pixel_values"] = torch.randn(GRID[0] * GRID[1], values, generator=generator)
            batch["image_grid_thw"] = torch.tensor([[1, *GRID]])
            batch["mm_token_type_ids"] = (ids == config.image_token_id).int()[None]
        found.append({**batch, "input_ids": ids[None]})
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Build, quantize, and say what it took."""
    device = choose_device(options.device)
    plan = QuantizationPlan.from_yaml(options.plan)
    checkpoint = Checkpoint(get_spec(options.model))
    config, real = shortened(checkpoint, options.layers)
    torch.manual_seed(SEED)
    with torch.device(device):
        model = checkpoint.model_class._from_config(config, dtype=plan.dtype).eval()
    model.to("cpu")
    batches = samples(config, options.samples, options.tokens)
    roles = find_roles(model)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    clock = Clock(device)
    quantize_(model, plan, batches, roles=roles, device=device, work_folder=clock)
    took = time.perf_counter() - clock.began
    facts: dict[str, Any] = {
        "model": options.model, "plan": plan.name, "device": str(device), "samples": options.samples,
        "tokens": options.tokens, "layers_measured": options.layers, "layers": real, "measured_s": took,
        "weights_bytes": weights_bytes(model), "finished_s": clock.finished,
    }  # fmt: skip
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        facts |= {
            "peak_allocated_bytes": torch.cuda.max_memory_allocated(device),
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(device),
            "device_used_bytes": total - free,  # with what libraries keep beside torch's allocator
            "device_bytes": total,
        }
    facts["peak_rss_bytes"] = peak_rss()[0]
    return {**facts, **extrapolated(took, clock.layers(), real, options.layers)}


def extrapolated(
    took: float, layers: Mapping[str, list[float]], real: Mapping[str, int], measured: int
) -> dict[str, Any]:
    """Seconds a layer of each stack, and what the whole model would take."""
    total, stacks = took, {}
    for stack, seconds in layers.items():
        part = "vision" if "visual" in stack or "vision" in stack else "text"
        if not seconds or part not in real:
            continue
        each, left = statistics.median(seconds), max(real[part] - measured, 0)
        stacks[stack] = {"layer_s": each, "layers_left_out": left}
        total += each * left
    return {"stacks": stacks, "extrapolated_s": total}


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "model", help="a name from `labkit models`, or a checkpoint's folder: its configuration is read"
    )
    parser.add_argument("--plan", default="gptq", help="a preset or a plan's file (gptq)")
    parser.add_argument("--layers", type=int, default=3, help="layers of each stack that are measured (3)")
    parser.add_argument("--samples", type=int, default=128, help="calibration samples (128)")
    parser.add_argument(
        "--tokens", type=int, default=512, help="tokens of each, the screenshot's among them (512)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto)")
    parser.add_argument("--output", type=Path, help="a file to write, JSON")
    options = parser.parse_args()
    if options.layers < 2:
        parser.error("--layers must be at least 2: the first of a stack does not count")
    found = measure(options)
    if options.output:
        OpenRecord(found, environment=environment_on(found["device"])).save(options.output)
    for stack, facts in found["stacks"].items():
        print(f"{stack}: {facts['layer_s']:.2f} s a layer, {facts['layers_left_out']} layers left out")
    print(
        f"measured {found['measured_s']:.0f} s; the whole model, extrapolated: {found['extrapolated_s']:.0f} s"
    )
    if "peak_allocated_bytes" in found:
        print(
            f"peak allocated {found['peak_allocated_bytes'] / 1e9:.1f} GB, device {found['device_used_bytes'] / 1e9:.1f} GB"
        )


if __name__ == "__main__":
    main()
