"""Models that prepare a step in their own way: each row is continued as transformers' `generate` would continue it."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin

from labkit.common.errors import LabError
from labkit.engine.forward import MODULES, Forward, modules_only
from labkit.engine.kv_cache import PLAIN, Keeping
from labkit.engine.step import Row
from labkit.quantization.kernels.upcast import upcast
from labkit.quantization.torch_state import guarded

logger = logging.getLogger(__name__)

METHODS = (
    "prepare_inputs_for_generation",
    "_update_model_kwargs_for_generation",
    "_prepare_cache_for_generation",
)
"""What `generate` calls between two passes, and a family may override."""
FIRST_PASS_ONLY = frozenset(
    {
        "Gemma3nForConditionalGeneration",
        "GlmAsrForConditionalGeneration",
        "Glm4vForConditionalGeneration",
        "PocketForConditionalGeneration",
        "Qwen2_5OmniThinkerForConditionalGeneration",
    }
)
"""Classes that override them for the pictures and sounds of the first pass, which `Forward` prepares by them too; their
later steps are those of any model. The tests hold each against transformers' own `generate`."""


def has_own_way(model_class: type) -> bool:
    """Whether a family overrides what `generate` does between two passes, or brings a cache of its own."""
    if model_class.__name__ in FIRST_PASS_ONLY:
        return False
    overridden = any(getattr(model_class, name) is not getattr(GenerationMixin, name) for name in METHODS)
    return overridden or not model_class._supports_default_dynamic_cache()


def plain_forward(model: nn.Module, keeping: Keeping = PLAIN, joins: bool = True) -> Forward:
    """The passes of a model through its own modules; ``keeping`` and ``joins`` as for `Forward`."""
    return OwnForward(model, keeping) if has_own_way(type(model)) else Forward(model, keeping, joins=joins)


@dataclass
class OwnRow(Row):
    """A conversation with what `generate` keeps between two passes.

    Attributes:
        ids: all its tokens, ``[1, L]``: Phi-3 computes them anew once they are more than its short context.
        arguments: ``model_kwargs`` of `generate`, the cache among them.
    """

    ids: Tensor | None = None
    arguments: dict[str, Any] = field(default_factory=dict)


class OwnForward(Forward):
    """A model's passes, prepared by the model itself; rows are computed one after another."""

    def __init__(self, model: nn.Module, keeping: Keeping = PLAIN) -> None:
        super().__init__(model, keeping, modules_only, joins=False)
        self._warned = False
        self._brings_cache = not model._supports_default_dynamic_cache()
        if self._brings_cache and keeping != PLAIN:
            raise LabError(
                f"{type(model).__name__} brings a cache of its own: kv_cache and sliding_window are for plain ones"
            )

    @property
    def route(self) -> str:
        """By what a token is decoded."""
        return f"{MODULES}: it prepares each step in its own way"

    @guarded
    @torch.inference_mode()
    def prefill(self, inputs: Mapping[str, Tensor]) -> tuple[Row, Tensor]:
        """See `Forward.prefill`."""
        self._follow_model()
        self.reset_frequencies()
        model, arguments = self._model, dict(inputs)
        ids = arguments.pop("input_ids")
        if arguments.get("attention_mask") is None:
            arguments["attention_mask"] = torch.ones_like(ids)
        if "position_ids" in inspect.signature(model.forward).parameters:
            arguments["position_ids"] = model._prepare_position_ids_for_generation(ids, arguments)
        if model._supports_logits_to_keep():
            arguments["logits_to_keep"] = 1
        if not self._brings_cache:
            arguments["past_key_values"] = self.new_cache()
        row = OwnRow(None, None, None, ids=ids, arguments={**arguments, "use_cache": True})
        with upcast(ids.device):
            return row, self._pass(row, is_first_iteration=True)

    @guarded
    @torch.inference_mode()
    def step(self, rows: Sequence[OwnRow], tokens: Tensor, alone: bool = False) -> Tensor:
        """See `Forward.step`."""
        parts = []
        for row, token in zip(rows, tokens):
            row.ids = torch.cat((row.ids, token.view(1, 1)), dim=1)
            self.reset_frequencies()
            parts.append(self._pass(row, next_sequence_length=1))
        return torch.cat(parts)

    def _pass(self, row: OwnRow, **how: Any) -> Tensor:
        """One pass as in `generate`; the logits after the row's last token, ``[1, vocabulary]``."""
        model = self._model
        prepared = model.prepare_inputs_for_generation(row.ids, **how, **row.arguments)
        if not self._brings_cache and prepared.get("past_key_values") is None:  # Phi-3 begins anew
            prepared["past_key_values"] = self.new_cache()
            if prepared["input_ids"].shape[1] < row.ids.shape[1] and not self._warned:
                self._warned = True
                logger.warning(
                    "%s forgets the %d tokens before this one, as in transformers: beyond its short context its "
                    "positions change", type(model).__name__, row.ids.shape[1] - 1,
                )  # fmt: skip
        output = model(**prepared, return_dict=True)
        row.arguments = model._update_model_kwargs_for_generation(
            output, row.arguments, is_encoder_decoder=model.config.is_encoder_decoder
        )
        row.cache = row.arguments.get("past_key_values")
        return output.logits[:, -1]
