"""The trainer of the pocket phone agent: batches onto the device, losses, optimizer steps, checkpoints."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import Glm4vForConditionalGeneration

from labkit.common.files import atomic_path
from labkit.models.pocket.training.augment import augment
from labkit.models.pocket.training.batches import Batch
from labkit.models.pocket.training.colours import change_colours, vary_colours
from labkit.models.pocket.training.forward import BatchedForward
from labkit.models.pocket.training.losses import (
    TrainingHeads,
    answer_loss,
    ctc_loss,
    dense_loss,
    look_loss,
    read_loss,
    spell_loss,
    target_loss,
)
from labkit.models.pocket.training.optimizer import Gradients, make_optimizers, step_all
from labkit.models.pocket.training.runs import below
from labkit.models.pocket.training.samples import Encoder
from labkit.models.pocket.training.speech import frame_lengths, normalize
from labkit.models.pocket.training.text import PATCH
from labkit.quantization.kernels.upcast import is_emulated

LOSS_WEIGHTS = {
    "answer": 1.0, "look": 0.5, "target": 0.5, "dense": 0.5, "read": 0.5, "spell": 1.0, "ctc": 0.5,
}  # fmt: skip
LEAST_STRENGTH = 0.5  # of acoustic augmentation; each batch draws its own between this and 1

LETTERS_ALONE = 200  # spoken steps in which the letters head learns from an ear that is not taught by it yet


class Trainer:
    """Model, heads, optimizers and one training step over a `Batch`."""

    def __init__(self, model: Glm4vForConditionalGeneration, encoder: Encoder, *, device: torch.device, rate: float,
                 compile_layers: bool) -> None:  # fmt: skip
        self.model, self.device = model.to(device).train(), device
        self.heads = TrainingHeads(model.config).to(device)
        self.plain = BatchedForward(model)
        self.fast = BatchedForward(model, compile_layers=True) if compile_layers else self.plain
        self.change_colours = (
            torch.compile(change_colours, dynamic=False) if compile_layers else change_colours
        )
        self.number_ids = torch.tensor(encoder.numbers, device=device)
        layers = model.config.text_config.num_hidden_layers
        self.look_layers = (layers // 2 - 1, layers // 2)
        self.scaling = model.model.language_model.layers[0].self_attn.scaling
        self.pool = None
        self.letters_alone = 0
        self.random = random.Random(0)
        named = [*self.model.named_parameters(), *self.heads.named_parameters()]
        self.gradients = Gradients([parameter for _, parameter in named])
        self.optimizers = make_optimizers(named, rate, device)

    def losses(
        self, batch: Batch, data: dict, generator: torch.Generator | None
    ) -> tuple[torch.Tensor, dict]:
        """The weighted sum and what it is made of; `data`: the batch's arrays as tensors on the device.

        `generator` augments (None: evaluation, then recordings come with the batch).
        """
        # compiled layers are for training's few shapes alone: every other shape would be compiled anew
        forward = self.plain if generator is None or batch.kind == "text" else self.fast
        is_quick = self.device.type != "cpu" or not is_emulated(torch.bfloat16)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=is_quick):
            image, total, parts = None, 0.0, {}
            if batch.kind != "text":
                image, patches = forward.see(self._screens(batch, data, generator))
                total, parts = self._eye_losses(image, patches, data)
            if batch.kind != "eye":
                answer, told = self._answer_losses(forward, batch, data, image, generator)
                total, parts = total + answer, parts | told
        return total, {name: value.detach() for name, value in parts.items()}

    def _screens(self, batch: Batch, data: dict, generator: torch.Generator | None) -> torch.Tensor:
        """The batch's screens [S, H, W, 3]; in training in other colours."""
        pixels = data["pixels"]
        return pixels if generator is None else vary_colours(pixels, generator, self.change_colours)

    def _eye_losses(
        self, image: torch.Tensor, patches: torch.Tensor, data: dict
    ) -> tuple[torch.Tensor, dict]:
        weight = self.model.lm_head.weight
        dense, parts = dense_loss(self.heads, image, weight, data)
        read, told = read_loss(self.heads, image, weight, data)
        spell, spelled = spell_loss(self.heads, patches, data)
        losses = {"dense": dense, "read": read, "spell": spell}
        return sum(LOSS_WEIGHTS[name] * loss for name, loss in losses.items()), parts | told | spelled

    def _answer_losses(
        self, forward, batch: Batch, data: dict, image, generator
    ) -> tuple[torch.Tensor, dict]:
        frames = audio = None
        if batch.kind == "spoken":
            frames, audio, lengths = self._hear(data, generator, forward)
        if image is not None:  # several questions about each screen
            image = image.repeat_interleave(len(data["ids"]) // len(image), 0)
        height, width = data["pixels"].shape[1:3] if image is not None else (0, 0)
        grid = (height // PATCH, width // PATCH)
        hidden, mixed, looks = forward(data["ids"], data["prompt"], image, audio, data["audio_source"], grid)
        answer, parts = answer_loss(hidden, self.model.lm_head.weight, data, self.number_ids)
        total = LOSS_WEIGHTS["answer"] * answer
        if image is not None:
            parts["look"] = look_loss(looks, data, self.scaling, self.look_layers)
            total = total + LOSS_WEIGHTS["look"] * parts["look"]
        if image is not None and mixed is not None:
            parts["target"] = target_loss(self.heads, mixed, data)
            total = total + LOSS_WEIGHTS["target"] * parts["target"]
        if frames is not None and generator is not None:
            rows, count = data["rows"], frame_lengths(lengths, self.model.config)
            letters = self.pool.letters[rows], self.pool.letter_lengths[rows]
            heard = frames.detach() if self.letters_alone > 0 else frames
            parts["ctc"] = ctc_loss(self.heads, heard, count, *letters)
            total = total + LOSS_WEIGHTS["ctc"] * parts["ctc"]
        return total, parts

    def _hear(self, data: dict, generator: torch.Generator | None, forward: BatchedForward):
        if generator is None:
            audio, lengths = data["audio"], data["audio_lengths"]
        else:
            audio, lengths = self.pool.audio(data["rows"])
            strength = self.random.uniform(LEAST_STRENGTH, 1.0)
            audio, lengths = augment(audio, lengths, strength=strength, generator=generator, keep_length=True)
        audio = normalize(audio, lengths)
        frames = forward.hear(audio, lengths)
        return frames, self.model.model.speech_projector(frames), lengths

    def step(
        self, batch: Batch, data: dict, factor: float, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """One optimizer step at `factor` times the learning rate."""
        self.gradients.flat.zero_()
        total, parts = self.losses(batch, data, generator)
        total.backward()
        parts["norm"] = self.gradients.settle()
        step_all(self.optimizers, factor)
        self.letters_alone -= batch.kind == "spoken"
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
        """Takes up a trained speech encoder with its letters head, and the pool that spoken batches index.

        Without one the model's own ear goes on; an exported model has no letters head, so a new one learns first.
        """
        self.pool = pool
        if not (ear / "speech.safetensors").exists():
            self.letters_alone = LETTERS_ALONE
            return
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
