"""KL divergence, token by token, of a model's distributions from the unquantized model's.

Unlike the share of right taps it changes smoothly, so few items distinguish two plans.
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
    """Batches of inputs and the unquantized model's distributions for each.

    For a phone agent: PhoneTap's calibration items with the model's answers, compared at the tokens of the answers.
    For any language model: sequences of text, compared at every token.

    Attributes:
        inputs: arguments of the model, one mapping a batch.
        lengths: for each batch and row, how many distributions at the end are compared.
        skipped: distributions after those, at the end of each row (of the last token, which nothing follows).
        log_probs: of the unquantized model, for each batch [compared tokens of all rows, vocabulary], fp16.
    """

    inputs: list[dict[str, Tensor]]
    lengths: list[list[int]]
    skipped: int = 1
    log_probs: list[Tensor] = field(default_factory=list, repr=False)

    @property
    def tokens(self) -> int:
        """The number of distributions that are compared."""
        return sum(map(sum, self.lengths))

    @torch.inference_mode()
    def log_probs_of(self, model: nn.Module, index: int) -> Tensor:
        """Log-probabilities [tokens, vocabulary] fp32 of batch ``index``, on the model's device."""
        lengths = self.lengths[index]
        count = max(lengths) + self.skipped
        batch = to_device(self.inputs[index], next(model.parameters()).device)
        if keeps_logits(model):
            batch = {**batch, "logits_to_keep": count}
        logits = run_model(model, batch).logits[:, -count:]
        end = count - self.skipped
        rows = [row[end - length : end] for row, length in zip(logits, lengths)]
        return torch.cat(rows).float().log_softmax(-1)

    def save(self, path: str | os.PathLike) -> None:
        """Write the probe to a safetensors file, whole or not at all."""
        tensors = {f"log_probs.{index}": tensor for index, tensor in enumerate(self.log_probs)}
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
        """Store the distributions of ``model``, the unquantized one; returns the probe itself."""
        self.log_probs = [self.log_probs_of(model, index).half().cpu() for index in range(len(self.inputs))]
        return self


@dataclass(frozen=True)
class Divergence:
    """The result of `divergence`.

    Attributes:
        kl: mean Kullback-Leibler divergence of the quantized from the unquantized distributions, nats a token.
        agreement: share of tokens at which both have the same most likely token.
        tokens: number of distributions compared.
    """

    kl: float
    agreement: float
    tokens: int


def divergence(model: nn.Module, probe: Probe) -> Divergence:
    """The divergence of the distributions of ``model`` from those of the probe.

    Raises:
        LabError: the model's logits are not finite.
    """
    return divergence_of(probe, lambda index: probe.log_probs_of(model, index))


def divergence_of(probe: Probe, log_probs: Callable[[int], Tensor | None]) -> Divergence:
    """The same from a function (batch number) -> log-probabilities, or None where they equal the probe's."""
    total, same = 0.0, 0
    for index, reference in enumerate(probe.log_probs):
        actual = log_probs(index)
        if actual is None:
            same += len(reference)
            continue
        expected = reference.to(actual.device).float()
        # fp16 rounding keeps the sums from being exactly one: without the difference it would count as divergence
        gap = expected.exp() * (expected - actual) + actual.exp() - expected.exp()
        total += float(gap.sum(dtype=torch.float64))
        same += int((expected.argmax(-1) == actual.argmax(-1)).sum())
    if not math.isfinite(total):
        raise LabError(
            "the quantized model's logits are not finite: the scheme cannot hold these weights, or the default dtype "
            "their activations (fp32 holds the most)"
        )
    return Divergence(max(total, 0.0) / probe.tokens, same / probe.tokens, probe.tokens)


def answer_probe(engine: Any, items: Sequence[Any], batch_size: int = 4) -> Probe:
    """A probe of PhoneTap items: the answers of the unquantized ``engine``, with its distributions."""
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
    """The probe of the unquantized ``engine``: from the text of ``datasets`` if any, else from PhoneTap items."""
    if datasets.text is not None:
        return text_probe(engine.model, datasets.sequences(engine.tokenizer, "probe").split(4))
    return answer_probe(engine, datasets.items("probe", engine.modalities))


def text_probe(model: nn.Module, sequences: Iterable[Tensor]) -> Probe:
    """A probe of text: token ids [B, L] without padding, compared at every position; ``model`` unquantized."""
    batches = [{"input_ids": ids} for ids in sequences]
    lengths = [[batch["input_ids"].shape[1]] * batch["input_ids"].shape[0] for batch in batches]
    return Probe(batches, lengths, skipped=0).remember(model)


@torch.inference_mode()
def sequence_losses(model: nn.Module, sequences: Tensor, batch_size: int = 4) -> list[float]:
    """The mean negative log-likelihood of the next token, in nats, for each sequence of token ids [n, L] without
    padding. The exponential of the mean over sequences is the perplexity."""
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
    """The perplexity of sequences of equal length from their losses."""
    return math.exp(math.fsum(losses) / len(losses))
