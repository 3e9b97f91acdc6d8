"""The trainer of the pocket phone agent: batches onto the device, losses, optimizer steps, checkpoints."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from labkit.files import atomic_path
from labkit.models.pocket.augment import augment
from labkit.models.pocket.modeling import PocketForConditionalGeneration
from labkit.models.pocket.train_batches import SIZES, Batch, BatchSource
from labkit.models.pocket.train_forward import BatchedForward
from labkit.models.pocket.train_losses import (
    TrainingHeads,
    answer_loss,
    ctc_loss,
    dense_loss,
    look_loss,
    read_loss,
    target_loss,
)
from labkit.models.pocket.train_samples import PATCH, Encoder
from labkit.models.pocket.train_speech import frame_lengths, normalize

LOSS_WEIGHTS = {"answer": 1.0, "look": 0.5, "target": 0.5, "dense": 0.5, "read": 1.0, "ctc": 0.5}
SPEECH_RATE = 0.5  # the ear's learning rate in the joint training, relative to the rest


def below(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The entries of a state dict whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


class Prefetch:
    """Reads a BatchSource in a thread and puts its arrays on the device in a stream of their own, in order.

    Iterating gives ("slots", size, first, pixels) and (Batch, tensors).
    """

    def __init__(self, source: BatchSource, device: torch.device, depth: int = 6) -> None:
        self.source, self.device = source, device
        self.ready: queue.Queue = queue.Queue(maxsize=depth)
        self.stream = torch.cuda.Stream() if device.type == "cuda" else None
        threading.Thread(target=self._read, daemon=True).start()

    def _move(self, array) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.stream else tensor

    def _read(self) -> None:
        with torch.cuda.stream(self.stream) if self.stream else contextlib.nullcontext():
            for message in self.source:
                if isinstance(message, Batch):
                    content = (message, {name: self._move(array) for name, array in message.arrays.items()})
                else:
                    _, size, first, count = message
                    content = (
                        "slots",
                        size,
                        first,
                        self._move(self.source.pixels[size][first : first + count].copy()),
                    )
                done = self.stream.record_event() if self.stream else None
                self.ready.put((content, done))

    def __iter__(self):
        while True:
            content, done = self.ready.get()
            if done is not None:
                torch.cuda.current_stream().wait_event(done)
                tensors = content[1].values() if isinstance(content[0], Batch) else content[3:]
                for tensor in tensors:
                    tensor.record_stream(torch.cuda.current_stream())
            yield content


class Trainer:
    """Model, heads, optimizer and one training step over a `Batch`."""

    def __init__(self, model: PocketForConditionalGeneration, encoder: Encoder, *, device: torch.device, rate: float,
                 compile_layers: bool) -> None:  # fmt: skip
        self.model, self.device, self.rate = model.to(device).train(), device, rate
        self.heads = TrainingHeads(model.config).to(device)
        self.plain = BatchedForward(model)
        self.fast = BatchedForward(model, compile_layers=True) if compile_layers else self.plain
        self.number_ids = torch.tensor(encoder.numbers, device=device)
        layers = model.config.text_config.num_hidden_layers
        self.look_layers = (layers // 2 - 1, layers // 2)
        self.scaling = model.model.language_model.layers[0].self_attn.scaling
        self.pixels: list[torch.Tensor] = []
        self.pool = None
        self.optimizer = self._optimizer()

    def _optimizer(self) -> torch.optim.Optimizer:
        groups: dict[tuple[bool, bool], list] = {}
        for name, parameter in [*self.model.named_parameters(), *self.heads.named_parameters()]:
            ear = name.startswith("model.speech.")
            groups.setdefault((ear, parameter.ndim >= 2), []).append(parameter)
        return torch.optim.AdamW(
            [
                {"params": parameters, "weight_decay": 0.05 if matrix else 0.0, "scale": SPEECH_RATE if ear else 1.0}
                for (ear, matrix), parameters in groups.items()
            ],
            lr=self.rate, betas=(0.9, 0.95), fused=self.device.type == "cuda",
        )  # fmt: skip

    def losses(
        self, batch: Batch, data: dict, generator: torch.Generator | None
    ) -> tuple[torch.Tensor, dict]:
        """The weighted sum and what it is made of; `data`: the batch's arrays as tensors on the device.

        `generator` augments (None: evaluation).
        """
        # compiled layers are for training's few shapes alone: every other shape would be compiled anew
        forward = self.plain if generator is None or batch.kind == "text" else self.fast
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            image, total, parts = None, 0.0, {}
            if batch.kind != "text":
                image = forward.see(self._screens(batch, data, generator))
                total, parts = self._eye_losses(image, data)
            if batch.kind != "eye":
                answer, told = self._answer_losses(forward, batch, data, image, generator)
                total, parts = total + answer, parts | told
        return total, {name: value.detach() for name, value in parts.items()}

    def _screens(self, batch: Batch, data: dict, generator: torch.Generator | None) -> torch.Tensor:
        """uint8 [B, H, W, 3]; in training half of them with their colours in another order."""
        pixels = data["pixels"] if "pixels" in data else self.pixels[batch.size][data["slots"]]
        if generator is None:
            return pixels
        order = torch.rand(len(pixels), 3, generator=generator, device=self.device).argsort(-1)
        keep = torch.rand(len(pixels), 1, generator=generator, device=self.device) < 0.5
        order = torch.where(keep, torch.arange(3, device=self.device), order)
        return pixels.gather(-1, order[:, None, None].expand(-1, *pixels.shape[1:3], -1))

    def _eye_losses(self, image: torch.Tensor, data: dict) -> tuple[torch.Tensor, dict]:
        weight = self.model.lm_head.weight
        dense, parts = dense_loss(self.heads, image, weight, data)
        read, told = read_loss(self.heads, image, weight, data)
        return LOSS_WEIGHTS["dense"] * dense + LOSS_WEIGHTS["read"] * read, parts | told

    def _answer_losses(
        self, forward, batch: Batch, data: dict, image, generator
    ) -> tuple[torch.Tensor, dict]:
        frames = audio = None
        if batch.kind == "spoken":
            frames, audio, lengths = self._hear(data["rows"], generator, forward)
        width, height = SIZES[batch.size] if image is not None else (0, 0)
        grid = (height // PATCH, width // PATCH)
        hidden, mixed, looks = forward(data["ids"], data["prompt"], image, audio, data["audio_source"], grid)
        answer, parts = answer_loss(hidden, self.model.lm_head.weight, data, self.number_ids)
        total = LOSS_WEIGHTS["answer"] * answer
        if image is not None:
            parts["target"] = target_loss(self.heads, mixed, data)
            parts["look"] = look_loss(looks, data, self.scaling, self.look_layers)
            total = total + sum(LOSS_WEIGHTS[name] * parts[name] for name in ("target", "look"))
        if frames is not None:
            rows, count = data["rows"], frame_lengths(lengths, self.model.config)
            letters = self.pool.letters[rows], self.pool.letter_lengths[rows]
            parts["ctc"] = ctc_loss(self.heads, frames, count, *letters)
            total = total + LOSS_WEIGHTS["ctc"] * parts["ctc"]
        return total, parts

    def _hear(self, rows: torch.Tensor, generator: torch.Generator | None, forward: BatchedForward):
        audio, lengths = self.pool.audio(rows)
        if generator is not None:
            audio, lengths = augment(audio, lengths, generator=generator, keep_length=True)
        audio = normalize(audio, lengths)
        frames = forward.hear(audio, lengths)
        return frames, self.model.model.speech_projector(frames), lengths

    def step(
        self, batch: Batch, data: dict, factor: float, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """One optimizer step at `factor` times the learning rate."""
        total, parts = self.losses(batch, data, generator)
        total.backward()
        parts["norm"] = nn.utils.clip_grad_norm_([*self.model.parameters(), *self.heads.parameters()], 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * factor * group["scale"]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return parts

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Mean of each part over batches, without augmentation."""
        found: dict[str, list[torch.Tensor]] = {}
        for batch in batches:
            data = {name: torch.from_numpy(array).to(self.device) for name, array in batch.arrays.items()}
            for name, value in self.losses(batch, data, None)[1].items():
                found.setdefault(name, []).append(value.float())
        return {name: float(torch.stack(values).mean()) for name, values in found.items()}

    def take_ear(self, ear: Path, pool) -> None:
        """Takes up a trained speech encoder with its letters head, and the pool that spoken batches index."""
        self.pool = pool
        if not (ear / "speech.safetensors").exists():
            return  # the model's own ear goes on
        state = load_file(ear / "speech.safetensors")
        self.model.model.speech.load_state_dict(below(state, "speech."))
        self.heads.letters.load_state_dict(below(state, "letters."))

    def save(self, folder: Path) -> None:
        """Model and heads as float16 safetensors, written beside and renamed into place."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, module in (("model", self.model), ("heads", self.heads)):
            state = {k: v.half().contiguous() for k, v in module.state_dict().items()}
            with atomic_path(folder / f"{name}.safetensors") as temporary:
                save_file(state, temporary)
