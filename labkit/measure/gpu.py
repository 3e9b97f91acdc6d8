"""The figures of `labkit bench-gpu` for one engine: prompts, decoding steps by both routes, memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from labkit.engine.engine import Engine
from labkit.engine.forward import Forward, modules_only
from labkit.engine.kv_cache import keeping_of, vector_bytes
from labkit.engine.step import Row
from labkit.engine.step_gpu.captured import CapturedStep
from labkit.measure.speed import bandwidth
from labkit.plans.quantize import weights_bytes
from labkit.quantization.torch_state import guarded
from labkit.results.gpu import CAPTURED, MODULES, Decoding, GpuRecord, Prompt

COPY_BYTES = 2**31
STEPS, WARM_STEPS = 24, 4
SCREEN_GRID = (1, 172, 78)
"""Patches (frames, rows, columns) of a 1080 x 2400 screenshot; four patches are a token, so it has 3,354 tokens."""


class GpuBench:
    """Measures one engine on its GPU and stores each figure in ``record`` as soon as it is measured.

    Args:
        engine: as :func:`labkit.load` gave it.
        record: figures in it are not measured again.
        save: called after each figure.
    """

    def __init__(self, engine: Engine, record: GpuRecord, save: Callable[[], None]):
        self.engine, self.record, self._save = engine, record, save
        self.forward = engine.forward
        self._keeping = keeping_of(engine.plan.runtime)
        config = engine.model.config.get_text_config(decoder=True)
        self._sizes = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
        self._device = engine.device
        self._layers, self._vocabulary = config.num_hidden_layers, config.vocab_size

    @guarded
    @torch.inference_mode()
    def run(
        self, batches: Sequence[int], contexts: Sequence[int], prompts: Sequence[int], screenshot: int
    ) -> None:
        """Measure what is missing, the cheapest first. ``screenshot``: tokens of that prompt; 0 for none."""
        record, engine = self.record, self.engine
        if record.copy_bytes_per_s is None:
            record.copy_bytes_per_s = bandwidth(self._device.type, COPY_BYTES)
            self._free()
        record.weights_bytes = weights_bytes(engine.model)
        record.predicted_bytes = getattr(engine.resolved, "predicted_bytes", None)
        record.route, record.load_s = engine.route, engine.load_s
        self._save()
        captured = isinstance(self.forward.own_step, CapturedStep)
        if captured and not record.agreement:
            record.agreement = self._agreement(min(contexts))
            self._save()
        for context in contexts:
            for batch in batches:
                self._decode(CAPTURED if captured else MODULES, batch, context)
        self._decode(MODULES, 1, min(contexts))
        for tokens in prompts:
            if record.prompt(tokens) is None:
                self._attempt(f"a prompt of {tokens} tokens", lambda tokens=tokens: self._prompt(tokens))
        if screenshot and not record.screenshot and hasattr(engine.model.config, "image_token_id"):
            self._attempt("a screenshot", lambda: self._screenshot(screenshot))

    def _attempt(self, what: str, measure: Callable[[], None]) -> None:
        """Measure and save; note it if the GPU runs out of memory."""
        note = None
        try:
            measure()
        except torch.OutOfMemoryError:
            note = f"{what}: the GPU's memory does not suffice"
        if note is not None and note not in self.record.notes:
            self.record.notes.append(note)
        self._free()
        self._save()

    def _decode(self, route: str, batch: int, context: int) -> None:
        if self.record.decoded(batch, context, route) is None:
            what = f"{batch} x {context} tokens, {route}"
            self._attempt(what, lambda: self._time_decoding(route, batch, context))

    def _time_decoding(self, route: str, batch: int, context: int) -> None:
        forward = self.forward if route == CAPTURED else self._modules()
        rows = [self._row(forward, context, seed) for seed in range(batch)]
        read = batch * self._cache_bytes(context)
        read += weights_bytes(self.engine.model.get_decoder().layers)
        read += weights_bytes(self.engine.model.get_output_embeddings())
        tokens = torch.arange(batch, device=self._device) + 11

        def step() -> Tensor:
            return forward.step(rows, tokens, alone=batch == 1).argmax(-1)

        for _ in range(WARM_STEPS):
            step()
        self._start_peak()
        seconds = []
        for _ in range(STEPS):
            began = time.perf_counter()
            step().tolist()
            seconds.append(time.perf_counter() - began)
        began = time.perf_counter()
        for _ in range(STEPS):
            step()
        self._finish()
        queued = (time.perf_counter() - began) / STEPS
        peak = self._peak()
        self.record.decoding.append(Decoding(route, batch, context, seconds, queued, read, peak))

    def _modules(self) -> Forward:
        """Passes through the model's own modules, with the cache that the plan names."""
        return Forward(self.engine.model, self._keeping, modules_only)

    def _cache_bytes(self, context: int) -> int:
        """Bytes of one conversation's keys and values that a step reads."""
        keeping, (groups, width) = self._keeping, self._sizes
        size = (keeping.dtype or self.engine.dtype).itemsize
        each = vector_bytes(width, "int8" if keeping.int8 else "", size)
        return keeping.kept(context) * 2 * self._layers * groups * each

    def _row(self, forward: Forward, context: int, seed: int) -> Row:
        """A conversation of ``context`` tokens with random keys and values, which cost a step what real ones do."""
        generator = torch.Generator(self._device).manual_seed(seed)
        cache = forward.new_cache()
        shape = (1, self._sizes[0], context, self._sizes[1])
        for layer in cache.layers:
            keys, values = (torch.randn(shape, device=self._device, generator=generator) for _ in range(2))
            layer.update(keys.to(self.engine.dtype), values.to(self.engine.dtype))
        positions = torch.full((3, 1, 1), context - 1, device=self._device)
        return Row(cache, positions, None, position=context - 1)

    def _agreement(self, context: int) -> dict[str, float]:
        """The captured step against the model's own modules, and against itself with other rows beside it."""
        plain = self._modules()
        token = torch.tensor([17], device=self._device)
        exact = plain.step([self._row(plain, context, 5)], token, alone=True).float()
        fast = self.forward.step([self._row(self.forward, context, 5)], token, alone=True).float()
        beside = [self._row(self.forward, 64, seed) for seed in range(3)]
        company = self.forward.step([self._row(self.forward, context, 5), *beside], token.expand(4)).float()[
            :1
        ]
        norm = exact.norm()
        return {
            "relative_error": float((fast - exact).norm() / norm),
            "in_company": float((company - fast).norm() / norm),
            "same_token": float((fast.argmax(-1) == exact.argmax(-1)).item()),
        }

    def _prompt(self, tokens: int) -> None:
        ids = torch.randint(self._vocabulary, (1, tokens), generator=torch.Generator().manual_seed(tokens))
        seconds, peak = self._time_prompt({"input_ids": ids.to(self._device)})
        self.record.prompts.append(Prompt(tokens, seconds, peak))

    def _time_prompt(self, inputs: dict[str, Tensor], repeats: int = 3) -> tuple[list[float], int]:
        seconds = []
        for _ in range(repeats + 1):
            self._start_peak()
            began = time.perf_counter()
            row, logits = self.forward.prefill(dict(inputs))
            logits.argmax(-1).tolist()
            seconds.append(time.perf_counter() - began)
            peak = self._peak()
            del row, logits
        return seconds[1:], peak

    def _screenshot(self, tokens: int) -> None:
        """A prompt of ``tokens`` tokens with one screenshot, and eight decoded tokens."""
        inputs = screenshot_inputs(self.engine.model.config, tokens, SCREEN_GRID)
        inputs = {name: tensor.to(self._device) for name, tensor in inputs.items()}
        self._start_peak()
        row, logits = self.forward.prefill(inputs)
        for _ in range(8):
            logits = self.forward.step([row], logits.argmax(-1), alone=True)
        self._finish()
        self.record.screenshot = {"tokens": tokens, "peak_bytes": self._peak()}

    def _finish(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def _free(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _start_peak(self) -> None:
        self._finish()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def _peak(self) -> int:
        """Bytes; 0 where torch does not count them."""
        return torch.cuda.max_memory_allocated() if self._device.type == "cuda" else 0


def screenshot_inputs(
    config: Any, tokens: int, grid: tuple[int, int, int] = SCREEN_GRID
) -> dict[str, Tensor]:
    """A model's inputs for a screenshot of ``grid`` patches amid ``tokens`` tokens: random pixels and text."""
    vision = config.vision_config
    patches = grid[0] * grid[1] * grid[2]
    image = patches // vision.spatial_merge_size**2
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    generator = torch.Generator("cpu").manual_seed(tokens)  # not the caller's
    ids = torch.randint(min(10_000, config.image_token_id - 8), (1, tokens), generator=generator)
    ids[0, 8 : 8 + image] = config.image_token_id
    return {
        "input_ids": ids,
        "pixel_values": torch.randn(patches, width, generator=generator),
        "image_grid_thw": torch.tensor([grid]),
        "mm_token_type_ids": (ids == config.image_token_id).int(),
    }
