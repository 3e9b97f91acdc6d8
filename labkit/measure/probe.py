"""How far a model's distributions are from the unquantized one's: KL divergence, token by token.

A probe is what is asked, and what the unquantized model says to it: for a phone agent PhoneTap's calibration
items with the answers it gives, compared at the answer's tokens; for any language model sequences of text,
compared everywhere. Unlike the share of right taps, it changes smoothly, so few items tell two plans apart.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from labkit.common.errors import LabError
from labkit.common.files import atomic_path
from labkit.loading.calibration import collate, keeps_logits, with_answer
from labkit.loading.datasets import Datasets
from labkit.measure.quality import MAX_NEW_TOKENS
from labkit.plans.sequential import run_model, to_device


@dataclass
class Probe:
    """Batches of inputs and the unquantized model's answer to each.

    Attributes:
        inputs: arguments of the model, one mapping a batch.
        lengths: for each batch and row how many of the last distributions are compared.
        skipped: distributions after those, at the end of each row (of the last token, which nothing follows).
        log_probs: the unquantized model's, for each batch [compared tokens of all rows, vocabulary], fp16.
    """

    inputs: list[dict[str, Tensor]]
    lengths: list[list[int]]
    skipped: int = 1
    log_probs: list[Tensor] = field(default_factory=list, repr=False)

    @property
    def tokens(self) -> int:
        """How many distributions are compared."""
        return sum(map(sum, self.lengths))

    @torch.inference_mode()
    def log_probs_of(self, model: nn.Module, index: int) -> Tensor:
        """Log-probabilities [tokens, vocabulary] fp32 of batch ``index``, where the model is."""
        lengths = self.lengths[index]
        kept = max(lengths) + self.skipped
        batch = to_device(self.inputs[index], next(model.parameters()).device)
        if keeps_logits(model):
            batch = {**batch, "logits_to_keep": kept}
        logits = run_model(model, batch).logits[:, -kept:]
        end = kept - self.skipped
        rows = [row[end - length : end] for row, length in zip(logits, lengths)]
        return torch.cat(rows).float().log_softmax(-1)

    def save(self, path: str | os.PathLike) -> None:
        """Write the probe to a safetensors file, whole or not at all."""
        tensors = {f"log_probs.{index}": one for index, one in enumerate(self.log_probs)}
        for index, batch in enumerate(self.inputs):
            tensors |= {f"inputs.{index}.{key}": value.contiguous() for key, value in batch.items()}
        facts = {"lengths": json.dumps(self.lengths), "skipped": str(self.skipped)}
        with atomic_path(Path(path)) as temporary:
            save_file(tensors, temporary, metadata=facts)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Probe:
        """Read what `save` wrote. Raises LabError if the file is damaged."""
        try:
            with safe_open(path, framework="pt") as file:
                facts = file.metadata()
                lengths = json.loads(facts["lengths"])
                inputs: list[dict[str, Tensor]] = [{} for _ in lengths]
                log_probs = [file.get_tensor(f"log_probs.{index}") for index in range(len(lengths))]
                for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
                    kind, index, *rest = key.split(".", 2)
                    if kind == "inputs":
                        inputs[int(index)][rest[0]] = file.get_tensor(key)
                return cls(inputs, lengths, int(facts["skipped"]), log_probs)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise LabError(
                f"{path} is damaged ({str(error).splitlines()[0]}): delete it to begin anew"
            ) from None

    def remember(self, model: nn.Module) -> Probe:
        """Take down the distributions of ``model``, the unquantized one; returns the probe itself."""
        self.log_probs = [self.log_probs_of(model, index).half().cpu() for index in range(len(self.inputs))]
        return self


@dataclass(frozen=True)
class Divergence:
    """What `divergence` finds.

    Attributes:
        kl: mean Kullback-Leibler divergence of the quantized from the unquantized distributions, nats a token.
        agreement: share of tokens at which both think the same token likeliest.
        tokens: distributions compared.
    """

    kl: float
    agreement: float
    tokens: int


def divergence(model: nn.Module, probe: Probe) -> Divergence:
    """How far the distributions of ``model`` are from those the probe remembers.

    Raises:
        LabError: the model's are not finite.
    """
    return divergence_of(probe, lambda index: probe.log_probs_of(model, index))


def divergence_of(probe: Probe, log_probs: Callable[[int], Tensor | None]) -> Divergence:
    """The same, given a function from a batch's number to log-probabilities; None: as remembered."""
    total, same = 0.0, 0
    for index, reference in enumerate(probe.log_probs):
        found = log_probs(index)
        if found is None:
            same += len(reference)
            continue
        expected = reference.to(found.device).float()
        # both sum to one but for rounding to fp16: what is missing would look like divergence
        gap = expected.exp() * (expected - found) + found.exp() - expected.exp()
        total += float(gap.sum(dtype=torch.float64))
        same += int((expected.argmax(-1) == found.argmax(-1)).sum())
    if not math.isfinite(total):
        raise LabError("the quantized model's logits are not finite: try a plan with bf16 or fp32 as default")
    return Divergence(max(total, 0.0) / probe.tokens, same / probe.tokens, probe.tokens)


def answer_probe(engine: Any, items: Sequence[Any], batch_size: int = 4) -> Probe:
    """A probe of PhoneTap items: the answers that ``engine``, unquantized, gives, with its distributions."""
    limit = MAX_NEW_TOKENS[False]
    inputs, lengths = [], []
    for start in range(0, len(items), batch_size):
        conversations = [item.messages() for item in items[start : start + batch_size]]
        answers = engine.generate_batch(conversations, max_new_tokens=limit)
        prompts = [
            with_answer(engine.prepare(messages), answer.token_ids, engine.processor)
            for messages, answer in zip(conversations, answers)
        ]
        inputs.append(collate(prompts, engine.tokenizer.pad_token_id or 0))
        lengths.append([len(answer.token_ids) for answer in answers])
    return Probe(inputs, lengths).remember(engine.model)


def probe_of(engine: Any, datasets: Datasets) -> Probe:
    """The probe of the unquantized ``engine``: of a text if ``datasets`` has one, else of PhoneTap's items."""
    if datasets.text is not None:
        return text_probe(engine.model, datasets.sequences(engine.tokenizer, "probe").split(4))
    return answer_probe(engine, datasets.items("probe", engine.modalities))


def text_probe(model: nn.Module, sequences: Iterable[Tensor]) -> Probe:
    """A probe of text: token ids [B, L] without padding, compared at every position; ``model`` unquantized."""
    batches = [{"input_ids": sequence} for sequence in sequences]
    lengths = [[batch["input_ids"].shape[1]] * batch["input_ids"].shape[0] for batch in batches]
    return Probe(batches, lengths, skipped=0).remember(model)


@torch.inference_mode()
def sequence_losses(model: nn.Module, sequences: Tensor, batch_size: int = 4) -> list[float]:
    """Of sequences of token ids [n, L] without padding: the mean negative log-likelihood, in nats, of each next
    token, one number a sequence. The exponential of their mean is the perplexity."""
    device = next(model.parameters()).device
    losses: list[float] = []
    for batch in sequences.split(batch_size):
        logits = run_model(model, {"input_ids": batch.to(device)}).logits[:, :-1].float()
        loss = nn.functional.cross_entropy(
            logits.transpose(1, 2), batch[:, 1:].to(device), reduction="none"
        )  # [n, L - 1]
        losses += loss.mean(1).tolist()
    return losses


def perplexity_of(losses: Sequence[float]) -> float:
    """The perplexity of sequences of equal length with these losses."""
    return math.exp(math.fsum(losses) / len(losses))
