"""What the pocket model is taught by: next-token loss on answers, and dense losses that make it learn fast.

- coordinates: a soft target around the true centre, so that a near miss costs less than a far one;
- pointer: head 0 of two middle decoder layers must look at the target while the coordinates are written, and the
  cross-modal block's image tokens must tell target from the rest;
- dense: image tokens name the element that covers them (its first label tokens) and its centre, and read the text tokens
  that are drawn on them; patches spell the letters in them;
- CTC: the speech encoder spells what was said (letters; pinyin for Chinese).
The extra heads exist in training alone.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Glm4vConfig

from labkit.models.pocket.training.samples import SLOTS
from labkit.models.pocket.training.text import BLANK, IGNORE, OTHER, SPELLED, letters

BINS = 50  # centre of an element along one axis, for the dense loss
SPREAD = 8.0  # standard deviation of a coordinate's soft target, in thousandths of the screen
LETTERS = "_ abcdefghijklmnopqrstuvwxyz'"  # CTC's alphabet; the first is its blank


class TrainingHeads(nn.Module):
    """Heads that training needs and the saved model does not."""

    def __init__(self, config: Glm4vConfig) -> None:
        super().__init__()
        hidden = config.text_config.hidden_size
        self.slots = nn.Sequential(nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, SLOTS * hidden))
        self.read = nn.Sequential(nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, hidden))
        seen = config.vision_config.hidden_size
        self.spell = nn.Sequential(nn.Linear(seen, seen), nn.GELU(), nn.Linear(seen, SPELLED * seen))
        self.glyphs = nn.Linear(seen, OTHER + 1 + len(letters()))
        self.centre = nn.Linear(hidden, 2 * BINS)
        self.target = nn.Linear(hidden, 1)
        if hasattr(config, "speech_config"):
            self.letters = nn.Linear(config.speech_config.hidden_size, len(LETTERS))


def answer_loss(hidden, head_weight, batch, number_ids) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Cross-entropy of the answers' tokens; coordinates against a soft target. hidden [B, L, D].

    Nothing here waits for the device (no boolean indexing), so that the next step's kernels queue up meanwhile.
    """
    places = batch["position"].long()[..., None].expand(-1, -1, hidden.shape[-1])
    logits = F.linear(torch.gather(hidden, 1, places), head_weight).float()
    token = batch["token"].long()
    log_total = logits.logsumexp(-1)
    is_point = batch["coordinate"] >= 0
    written = (token != IGNORE) & ~is_point
    picked = logits.gather(-1, token.clamp(min=0)[..., None])[..., 0]
    token_loss = ((log_total - picked) * written).sum() / written.sum().clamp(min=1)
    # the two coordinates of each sample: [B, 2] places among the answer's tokens
    at, there = batch["point_at"].long(), batch["point_at"] >= 0
    index = at.clamp(min=0)
    points = logits.gather(1, index[..., None].expand(-1, -1, logits.shape[-1]))[..., number_ids]
    true = batch["coordinate"].long().gather(1, index)
    numbers = torch.arange(len(number_ids), device=hidden.device)
    soft = torch.softmax(-(((numbers - true[..., None]) / SPREAD) ** 2) / 2, dim=-1)
    missed = log_total.gather(1, index) - (soft * points).sum(-1)
    count = there.sum().clamp(min=1)
    point_loss = (missed * there).sum() / count
    near = (((points.argmax(-1) - true).abs() <= 30) & there).sum() / count
    right = (logits.argmax(-1) == token) & written
    return token_loss + point_loss, {
        "token": token_loss.detach(),
        "point": point_loss.detach(),
        "near": near,
        "tokens_right": right.sum() / written.sum().clamp(min=1),
    }


def look_loss(looks, batch, scaling: float, layers: tuple[int, ...]) -> torch.Tensor:
    """-log of the attention that head 0 pays to the target's image tokens where coordinates are written."""
    there = batch["point_at"] >= 0
    places = batch["position"].long().gather(1, batch["point_at"].long().clamp(min=0))  # [B, 2]
    pointed = batch["pointed"] | ~there.any(-1, keepdim=True)  # rows without a target: anything, and weight 0
    tokens, total = pointed.shape[1], 0.0
    for layer in layers:
        query, key = looks[layer]
        asked = query.gather(1, places[..., None].expand(-1, -1, query.shape[-1]))
        scores = torch.einsum("bqd,bld->bql", asked.float(), key.float()) * scaling
        behind = torch.arange(key.shape[1], device=key.device) > places[..., None]
        scores = scores.masked_fill(behind, float("-inf"))
        image = scores[:, :, 5 : 5 + tokens].masked_fill(~pointed[:, None], float("-inf"))
        share = scores.logsumexp(-1) - image.logsumexp(-1)
        total = total + torch.where(there, share, torch.zeros_like(share)).sum() / there.sum().clamp(min=1)
    return total / len(layers)


def target_loss(heads: TrainingHeads, mixed, batch) -> torch.Tensor:
    """-log of the share that the cross-modal block's image tokens give to the target. mixed [B, L, D]."""
    pointed = batch["pointed"]
    asked = pointed.any(-1)
    scores = heads.target(mixed[:, 5 : 5 + pointed.shape[1]]).float()[..., 0]
    share = scores.logsumexp(-1) - scores.masked_fill(~pointed, float("-inf")).logsumexp(-1)
    return torch.where(asked, share, torch.zeros_like(share)).sum() / asked.sum().clamp(min=1)


def dense_loss(
    heads: TrainingHeads, image, head_weight, batch
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Image tokens [B, N, D] name the label that covers them and tell its centre."""
    places = batch["dense_at"].long()[..., None].expand(-1, -1, image.shape[-1])
    chosen = torch.gather(image, 1, places)
    slots = heads.slots(chosen).unflatten(-1, (SLOTS, -1))
    label = batch["dense_label"].long()
    logits = F.linear(slots, head_weight.to(slots.dtype)).flatten(0, 2)
    name = F.cross_entropy(logits.float(), label.flatten(), ignore_index=IGNORE)
    point = batch["dense_point"].long()
    bins = torch.where(point >= 0, point * BINS // 1000, torch.full_like(point, IGNORE))
    where = F.cross_entropy(heads.centre(chosen).float().unflatten(-1, (2, BINS)).flatten(0, 2), bins.flatten(),
                            ignore_index=IGNORE)  # fmt: skip
    known = label != IGNORE
    right = ((logits.argmax(-1).view_as(label) == label) & known).sum() / known.sum().clamp(min=1)
    return name + where, {"name": name.detach(), "where": where.detach(), "names_right": right}


def read_loss(
    heads: TrainingHeads, image, head_weight, batch
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Image tokens [B, N, D] read the text that is drawn on them: a softmax whose truth is shared by all tokens there."""
    tokens = batch["read"].long()
    there = tokens != IGNORE
    asked = there.any(-1)
    places = batch["read_at"].long()[..., None].expand(-1, -1, image.shape[-1])
    logits = F.linear(heads.read(torch.gather(image, 1, places)), head_weight.to(image.dtype)).float()
    picked = logits.gather(-1, tokens.clamp(min=0)) - logits.logsumexp(-1, keepdim=True)
    missed = -(picked * there).sum(-1) / there.sum(-1).clamp(min=1)
    count = asked.sum().clamp(min=1)
    loss = (missed * asked).sum() / count
    right = ((tokens == logits.argmax(-1, keepdim=True)) & there).any(-1).sum() / count
    return loss, {"read": loss.detach(), "read_right": right}


def spell_loss(heads: TrainingHeads, patches, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Patches [B, P, D] spell the letters in them, slot by slot; what is blank counts half as much."""
    places = batch["spell_at"].long()[..., None].expand(-1, -1, patches.shape[-1])
    slots = heads.spell(torch.gather(patches, 1, places)).unflatten(-1, (SPELLED, -1))
    letter = batch["spell"].long()
    logits = heads.glyphs(slots).float().flatten(0, 2)
    missed = F.cross_entropy(logits, letter.flatten(), ignore_index=IGNORE, reduction="none").view_as(letter)
    weight = torch.where(letter == BLANK, 0.5, 1.0) * (letter != IGNORE)
    loss = (missed * weight).sum() / weight.sum().clamp(min=1)
    written = letter > BLANK
    right = ((logits.argmax(-1).view_as(letter) == letter) & written).sum() / written.sum().clamp(min=1)
    return loss, {"spell": loss.detach(), "spell_right": right}


def ctc_loss(heads: TrainingHeads, frames, lengths, letters, letter_lengths) -> torch.Tensor:
    """CTC over encoder frames [B, T, S] with their lengths; letters [B, U] padded, with their lengths."""
    log_probabilities = heads.letters(frames).float().log_softmax(-1).transpose(0, 1)
    return F.ctc_loss(log_probabilities, letters, lengths, letter_lengths, zero_infinity=True)
