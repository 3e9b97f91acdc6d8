"""One pass over a model with its KV cache: prefill one prompt, then one token for each of several rows.

The only place that calls ``model.forward``. What a conversation needs between two steps - cache, position,
mask - lives in its `Row`; the model itself keeps no state that the next request could stumble over (Glm4v
stores the positions' offset of its last image on the module; here they are passed explicitly at every step).

A row's logits do not depend on the rows beside it, to the last bit: prompts are prefilled alone, attention is
computed row by row (`labkit.engine.row_cache`), and products with weights are taken in a way that was tried on this model
and device (`find_way`). So an answer at temperature 0 is the same alone and in any company.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from labkit.common.errors import LabError
from labkit.engine.kv_cache import PLAIN, Keeping
from labkit.engine.row_cache import JoinedCache, RowCache, use_rows
from labkit.engine.step_cpu import NativeStep, describe
from labkit.models.experts import is_mixture
from labkit.quantization import QuantizedLinear
from labkit.quantization.kernels.upcast import upcast
from labkit.quantization.logits import keep_logits_

PADDED_ROWS = 8
"""Rows that are always multiplied together where a product's rounding depends on their number."""
COMPILED = "compiled for the processor"
TRIED_ROWS = (1, 2, 3, 5, 8, 13, 16)


@dataclass
class Row:
    """One conversation between two steps.

    Attributes:
        cache: its keys and values.
        positions: of its last token, ``[…, 1, 1]`` as the model takes them, but for the compiled step's tokens, which
            `native` counts; None where the model counts itself.
        mask: what it may see, ``[1, L]``, where the model wants to be told.
        place: its last token's position as a number, kept by the compiled step; None if its axes differ.
        native: what the compiled step knows of it.
    """

    cache: RowCache
    positions: Tensor | None
    mask: Tensor | None
    place: int | None = None
    native: Any = None

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return self.cache.get_seq_length()

    def advance(self) -> None:
        """The model's own way of adding a token begins: one position further."""
        further = 1 + (self.native.steps if self.native is not None else 0)
        self.native = None
        if self.positions is not None:
            self.positions = self.positions + further


class Forward:
    """A model's passes.

    Args:
        model: a transformers causal model (text or multimodal) in evaluation mode.
        keeping: how its cache is kept.
        joins: whether rows may share a pass, where their caches allow it (`labkit.engine.trial` shows it).

    ``route`` says by what a token is decoded. ``way`` says how rows are: ``together`` (any number, as they come),
    ``padded`` (always `PADDED_ROWS`, filled up: in fp32 and fp16 a product's rounding depends on the number of
    rows) or ``single`` (one after another: caches that are not plain, or a scheme such as llm-int8 whose rows see
    each other).

    On the CPU the compiled step (`labkit.engine.step_cpu`) takes the place of the model's modules, where it knows them all
    and the cache keeps numbers as they come; ``native`` is that step or None, and ``not_native`` says why there is none.
    """

    def __init__(self, model: nn.Module, keeping: Keeping = PLAIN, joins: bool = True):
        keep_logits_(model)
        self._model = model
        self._keeping = keeping
        self._config = model.config.get_text_config(decoder=True)
        self._growing = growing_frequencies(model)
        self._joins = use_rows(model) and joins and not self._growing
        self._way: str | None = None
        self._route = "the model's own modules"
        self.native: NativeStep | None = None
        self.not_native = "not looked for yet"
        self.find_native()

    def find_native(self) -> None:
        """Describe the model for the compiled step, anew if something was replaced in it."""
        if not self._joins:
            self.not_native = "its caches are not plain"
        elif self._keeping != PLAIN:
            self.not_native = "its cache is not kept as it comes"
        else:
            self.native, self.not_native = describe(self._model)

    @property
    def route(self) -> str:
        """By what a token is decoded."""
        return COMPILED if self.native is not None else self._route

    @route.setter
    def route(self, route: str) -> None:
        self._route = route

    @property
    def dtype(self) -> torch.dtype:
        """Of the hidden states; logits are fp32 (`labkit.quantization.logits`)."""
        return self._model.dtype

    @property
    def way(self) -> str:
        """See the class; found out when it is first needed."""
        if self._way is None:
            self._way = find_way(self._model) if self._joins else "single"
        return self._way

    @torch.inference_mode()
    def prefill(self, inputs: Mapping[str, Tensor]) -> tuple[Row, Tensor]:
        """Run one prompt.

        Args:
            inputs: ``input_ids [1, L]``, optionally ``attention_mask [1, L]``, media tensors; on the device.

        Returns:
            the row, and the logits after its last token, fp32 ``[1, vocabulary]``.
        """
        keep_logits_(self._model)  # its head may be another by now
        if self.native is not None and not self.native.is_current():
            self.find_native()
        self.reset_frequencies()
        model, inputs = self._model, dict(inputs)
        ids = inputs.pop("input_ids")
        mask = inputs.pop("attention_mask", None)
        mask = torch.ones_like(ids) if mask is None else mask
        cache = self.new_cache()
        positions = model._prepare_position_ids_for_generation(
            ids, {"input_ids": ids, "attention_mask": mask, **inputs}
        )
        arguments: dict[str, Any] = model.prepare_inputs_for_generation(
            ids,
            past_key_values=cache,
            attention_mask=mask,
            position_ids=positions,
            is_first_iteration=True,
            use_cache=True,
            **inputs,
        )
        if model._supports_logits_to_keep():
            arguments["logits_to_keep"] = 1
        with upcast(ids.device):
            output = model(**arguments, return_dict=True)
        positions = arguments.get("position_ids")
        # A row that sees its whole cache needs no mask, where the model is told the positions.
        needs_mask = positions is None or bool((mask == 0).any())
        if needs_mask and self._keeping.window is not None:
            raise LabError("sliding_window is for prompts without padding, of models that are told positions")
        last = None if positions is None else positions[..., -1:].clone()
        return Row(cache, last, mask if needs_mask else None), output.logits[:, -1]

    @torch.inference_mode()
    def step(self, rows: Sequence[Row], tokens: Tensor, alone: bool = False) -> Tensor:
        """Append one token to each row, ``tokens [B]`` int64. Returns the logits after it, fp32 ``[B, vocabulary]``.

        alone: the one row there is never had company, so it may be multiplied as it comes.
        """
        taken = [self.native is not None and self.native.takes(row) for row in rows]
        if all(taken):
            return self.native.step(rows, tokens)
        if any(taken):  # a row goes the same way whatever its company
            return self._divided(rows, tokens, taken)
        return self._step_modules(rows, tokens, alone)

    def _divided(self, rows: Sequence[Row], tokens: Tensor, taken: Sequence[bool]) -> Tensor:
        chosen = torch.tensor(taken, device=tokens.device)
        ways = (self.native.step, chosen), (self._step_modules, ~chosen)
        parts = []
        for step, ours in ways:
            own = [row for row, mine in zip(rows, ours.tolist()) if mine]
            parts.append((step(own, tokens[ours]), ours))
        logits = parts[0][0].new_empty(len(rows), parts[0][0].shape[1])
        for part, ours in parts:
            logits[ours] = part.to(logits.dtype)
        return logits

    def _step_modules(self, rows: Sequence[Row], tokens: Tensor, alone: bool = False) -> Tensor:
        """`step` through the model's modules."""
        if self.way == "single" or any(row.mask is not None for row in rows):
            return torch.cat([self._step(row, tokens[i : i + 1]) for i, row in enumerate(rows)])
        if self.way == "together" or (alone and len(rows) == 1):
            return self._join(rows, tokens)
        parts = range(0, len(rows), PADDED_ROWS)
        return torch.cat(
            [self._padded(rows[at : at + PADDED_ROWS], tokens[at : at + PADDED_ROWS]) for at in parts]
        )

    def likeliest(self, logits: Tensor) -> tuple[list[float], Tensor]:
        """Of each row of ``logits [B, vocabulary]`` the largest number, NaN if any is, and its place ``[B]``, the first
        of several. Waits for the GPU."""
        if self.native is not None and logits.dtype == torch.float32 and logits.device.type == "cpu":
            return self.native.likeliest(logits)
        best, tokens = logits.max(dim=-1)
        return best.tolist(), tokens

    def new_cache(self) -> Any:
        """An empty cache for one conversation."""
        return RowCache(self._config, self._keeping)

    def room(self, row: Row) -> int:
        """For how many tokens a conversation's cache has memory."""
        return self._keeping.room(row.length)

    def _step(self, row: Row, token: Tensor) -> Tensor:
        """One row with its own cache."""
        row.advance()
        if row.mask is not None:
            row.mask = torch.nn.functional.pad(row.mask, (0, 1), value=1)
        return self._call(token, row.positions, row.mask, row.cache)

    def _padded(self, rows: Sequence[Row], tokens: Tensor) -> Tensor:
        missing = PADDED_ROWS - len(rows)
        return self._join(rows, torch.nn.functional.pad(tokens, (0, missing)))[: len(rows)]

    def _join(self, rows: Sequence[Row], tokens: Tensor) -> Tensor:
        """Rows together; tokens beyond the rows are filling."""
        for row in rows:
            row.advance()
        filling = [rows[0].positions] * (len(tokens) - len(rows))
        positions = torch.cat([*(row.positions for row in rows), *filling], dim=-2)
        return self._call(tokens, positions, None, JoinedCache([row.cache for row in rows]))

    def reset_frequencies(self) -> None:
        """Forget the longest conversation so far, on which "dynamic" rotary frequencies depend."""
        for rotary in self._growing:
            if rotary.rope_type == "dynamic":
                rotary.inv_freq = rotary.original_inv_freq.to(rotary.inv_freq.device)
                rotary.max_seq_len_cached = rotary.original_max_seq_len

    def _call(self, tokens: Tensor, positions: Tensor | None, mask: Tensor | None, cache: Any) -> Tensor:
        self.reset_frequencies()
        output = self._model(
            input_ids=tokens[:, None],
            position_ids=positions,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
        )
        return output.logits[:, -1]


def growing_frequencies(model: nn.Module) -> list[nn.Module]:
    """The modules whose rotary frequencies depend on the longest of the rows, which are thus computed one by one.

    Raises:
        LabError: frequencies that grow with the length, in one kind of a model's layers alone.
    """
    growing = []
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, Mapping) and any("dynamic" in str(kind) for kind in kinds.values()):
            raise LabError(
                f"{type(model).__name__} with dynamic rotary frequencies in some layers is not supported"
            )
        names = kinds.values() if isinstance(kinds, Mapping) else [kinds]
        if not {"dynamic", "longrope"}.isdisjoint(names):
            growing.append(module)
    return growing


@torch.inference_mode()
def find_way(model: nn.Module) -> str:
    """How rows may be multiplied so that none of them depends on the others: see `Forward`.

    Each kind of Linear of the decoder and the head is tried on made-up rows, one of them with outliers.
    """
    text = model.get_decoder() if hasattr(model, "get_decoder") else model
    kinds: dict[tuple, nn.Module] = {}
    for module in [*text.modules(), model.get_output_embeddings()]:
        if isinstance(module, nn.Linear | QuantizedLinear):
            options = (type(module), module.in_features, module.out_features, module.extra_repr())
            kinds.setdefault(options, module)
    ways = {_way_of(module) for module in kinds.values()}
    if is_mixture(model) and ways != {"together"}:
        return "single"  # how many rows an expert multiplies depends on the rows beside
    return next(way for way in ("single", "padded", "together") if way in ways or way == "together")


def _way_of(module: nn.Module) -> str:
    tensor = next(iter([*module.parameters(), *module.buffers()]))
    dtype = getattr(module, "dtype", tensor.dtype)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(max(TRIED_ROWS), module.in_features, generator=generator)
    rows[PADDED_ROWS // 2, :4] = 60.0
    rows = rows.to(tensor.device, dtype)
    if isinstance(module, nn.Linear) and not isinstance(module(rows[:1]), Tensor):  # Phi-3.5-MoE's router
        module = partial(nn.Linear.forward, module)
    first, others = rows[:1], rows[PADDED_ROWS:]
    padded = module(rows[:PADDED_ROWS])
    moved = module(torch.cat((others[: PADDED_ROWS - 1], first)))[-1:]
    if not (
        torch.equal(padded[:1], moved) and torch.equal(module(rows[:PADDED_ROWS].flip(0)).flip(0), padded)
    ):
        return "single"
    same = all(torch.equal(module(rows[:count])[:1], padded[:1]) for count in TRIED_ROWS)
    return "together" if same else "padded"
