"""The anatomy of a model: its parts, their parameters and bytes, without reading a single weight."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from labkit.common.errors import LabError
from labkit.common.formats import format_bytes
from labkit.engine.kv_cache import keeping_of, vector_bytes
from labkit.loading.prepare import Prepared
from labkit.models import ROLES, ModelSpec, get_spec
from labkit.plans.plan import QuantizationPlan, as_plan
from labkit.plans.resolved import Part, ResolvedPlan
from labkit.quantization import DTYPES
from labkit.quantization.torch_state import guarded
from labkit.results.charts import anatomy

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects as go

PlanLike = str | Path | QuantizationPlan
ARTICLE_BYTES = {"article: before, 18.3 GB": 18.3e9, "article: after, 6.9 GB": 6.9e9}
"""Bytes of the 9B's weights before and after the article's recipe, as the article states them."""
CONTEXT_TOKENS = 25_480
"""The context length at which the authors of AutoGLM-Phone serve it (``--max-model-len``)."""


@guarded
def dissect(model: str | Path | ModelSpec = "pocket", plan: PlanLike = "bf16") -> Anatomy:
    """The parts of a model under a plan; reads only its configuration.

        pocket = dissect("pocket")
        pocket.table(); pocket.treemap(); pocket.plan_chart(["bf16", "int8", "int4"])

    The model is built on torch's meta device, with names and shapes only. Models with published sizes
    (AutoGLM-Phone-9B) need no network. Bytes are those that the plan predicts, with embeddings and norms.

    model: a name from ``labkit models``, a checkpoint's folder, or a hub id. Raises LabError for an unknown
    model or plan, or a plan that does not fit the model.
    """
    spec = get_spec(model)
    prepared = Prepared.of(
        spec, ask_hub=spec.published is None, quantized="dissect the model that it was made of"
    )
    return Anatomy(spec, prepared.skeleton, prepared.roles, prepared.resolve(as_plan(plan)))


@dataclass(frozen=True)
class Anatomy:
    """A model's parts under one plan.

    Attributes:
        spec: the model.
        skeleton: the model on the meta device.
        roles: module name -> role, for every Linear, embedding and convolution.
        resolved: the plan laid over it; ``resolved.parts`` has one entry a module.
    """

    spec: ModelSpec
    skeleton: nn.Module = field(repr=False)
    roles: Mapping[str, str] = field(repr=False)
    resolved: ResolvedPlan = field(repr=False)

    @property
    def name(self) -> str:
        """The model's name."""
        return self.spec.name

    @property
    def parts(self) -> list[Part]:
        """One entry a module: name, role, scheme, parameters, bytes."""
        return self.resolved.parts

    @property
    def parameters(self) -> int:
        """Parameters of the whole model."""
        return self.resolved.parameters

    @property
    def bytes(self) -> int:
        """Bytes of the whole model's weights under the plan."""
        return self.resolved.predicted_bytes

    @cached_property
    def parameters_by_role(self) -> dict[str, int]:
        """Role -> parameters, in the order of the tables."""
        return _sum_by_role(self.parts, "parameters")

    def under(self, plan: PlanLike) -> Anatomy:
        """The same model under another plan."""
        return dataclasses.replace(self, resolved=as_plan(plan).resolve(self.skeleton, roles=self.roles))

    def table(self) -> pandas.DataFrame:
        """One row a part: Linears, parameters, their share of the whole, bytes under the plan."""
        import pandas

        sizes = _sum_by_role(self.parts, "bytes")
        rows = {
            role: {
                "linears": sum(part.is_linear for part in self.parts if part.role == role),
                "parameters": self.parameters_by_role.get(role, 0),
                "share": self.parameters_by_role.get(role, 0) / self.parameters,
                "bytes": sizes[role],
            }
            for role in sizes
        }
        return pandas.DataFrame.from_dict(rows, orient="index").rename_axis("part")

    def linears(self) -> pandas.DataFrame:
        """One row a kind of Linear: its name with N for the layer's number, its count, shape and size."""
        import pandas

        kinds: dict[tuple, list[Part]] = {}
        for part in self.parts:
            if part.is_linear:
                module = self.skeleton.get_submodule(part.module)
                shape = (module.out_features, module.in_features)
                kinds.setdefault((re.sub(r"\.\d+\.", ".N.", part.module), part.role, *shape), []).append(part)
        rows = [
            {
                "linear": kind,
                "part": role,
                "count": len(parts),
                "out_features": rows_out,
                "in_features": columns_in,
                "parameters": sum(part.parameters for part in parts),
                "bytes": sum(part.bytes for part in parts),
            }
            for (kind, role, rows_out, columns_in), parts in kinds.items()
        ]
        return pandas.DataFrame(rows).set_index("linear")

    def bytes_under(self, plans: Sequence[PlanLike]) -> pandas.DataFrame:
        """Bytes of each part (rows) under each plan (columns)."""
        import pandas

        columns = {}
        for plan in plans:
            resolved = as_plan(plan).resolve(self.skeleton, roles=self.roles)
            columns[resolved.plan.name] = _sum_by_role(resolved.parts, "bytes")
        return pandas.DataFrame(columns).rename_axis("part")

    def kv_cache_bytes_per_token(self) -> int:
        """Bytes by which each token extends the KV cache: keys and values, in every layer of the decoder.

        The type is the plan's ``runtime.kv_cache``, else its default; ``int8`` includes its scales.
        """
        config = self.skeleton.config.get_text_config(decoder=True)
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        plan = self.resolved.plan
        dtype = plan.runtime.kv_cache or plan.default
        itemsize = 1 if dtype == "int8" else DTYPES[dtype].itemsize
        return 2 * config.num_hidden_layers * config.num_key_value_heads * vector_bytes(head, dtype, itemsize)

    def kv_cache_bytes(self, tokens: int) -> int:
        """Bytes of the KV cache of a conversation of ``tokens`` tokens; a window keeps the last ones and the first
        `labkit.engine.kv_cache.SINKS`."""
        return keeping_of(self.resolved.plan.runtime).kept(tokens) * self.kv_cache_bytes_per_token()

    def image_tokens(self, width: int, height: int, max_pixels: int | None = None) -> int:
        """Tokens that an image of this size takes in the prompt, after the processor has resized it.

        max_pixels: the processor's limit (``longest_edge``), which counts a still image twice, as a pair of
        frames; default: the model's own. Raises LabError for a model other than Glm4v.
        """
        rows, columns = self.image_grid(width, height, max_pixels)
        return rows * columns

    def image_grid(self, width: int, height: int, max_pixels: int | None = None) -> tuple[int, int]:
        """Rows and columns of image tokens; see `image_tokens`."""
        from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil, smart_resize

        vision = getattr(self.skeleton.config, "vision_config", None)
        if not hasattr(vision, "spatial_merge_size") or not hasattr(vision, "temporal_patch_size"):
            raise LabError(f"{self.name} has no Glm4v vision encoder, whose image tokens are known here")
        limits = dict(Glm4vImageProcessorPil.size)
        if self.spec.folder is not None and (self.spec.folder / "preprocessor_config.json").is_file():
            limits |= json.loads((self.spec.folder / "preprocessor_config.json").read_text()).get("size", {})
        side = vision.patch_size * vision.spatial_merge_size
        resized = smart_resize(
            vision.temporal_patch_size,
            height,
            width,
            vision.temporal_patch_size,
            side,
            min_pixels=min(limits["shortest_edge"], max_pixels or limits["shortest_edge"]),
            max_pixels=max_pixels or limits["longest_edge"],
        )
        return resized[0] // side, resized[1] // side

    def treemap(self, value: str = "parameters") -> go.Figure:
        """Rectangles in proportion to ``parameters`` or ``bytes``: parts, their layers, their modules."""
        if value not in ("parameters", "bytes"):
            raise LabError(f"a treemap shows parameters or bytes, not {value!r}")
        return anatomy.treemap(self.parts, f"{self.name}, {self.resolved.plan.name}", value)

    def skyline(self) -> go.Figure:
        """One bar a Linear, in the model's order; height is the number of parameters, colour the part."""
        return anatomy.skyline([part for part in self.parts if part.is_linear])

    def plan_chart(self, plans: Sequence[PlanLike], marks: Mapping[str, float] | None = None) -> go.Figure:
        """Stacked bars: bytes of each part under each plan; ``marks`` (words -> bytes) are dashed lines."""
        columns = self.bytes_under(plans).to_dict()
        return anatomy.bars(columns, "bytes", marks)

    def memory_chart(self, plans: Sequence[PlanLike], tokens: int = CONTEXT_TOKENS) -> go.Figure:
        """Lines: weights and KV cache of one conversation against its length, and the sizes of GPUs."""
        if tokens < 1:
            raise LabError(f"tokens must be 1 or more, not {tokens}")
        lines = {}
        for plan in plans:
            variant = self.under(plan)
            most = keeping_of(variant.resolved.plan.runtime).limit
            lines[variant.resolved.plan.name] = (variant.bytes, variant.kv_cache_bytes_per_token(), most)
        return anatomy.memory(lines, tokens)


def shares_chart(anatomies: Sequence[Anatomy]) -> go.Figure:
    """Stacked bars that all reach 100 %: which share of each model's parameters each part has."""
    if not anatomies:
        raise LabError("there is nothing to draw: no anatomy given")
    return anatomy.bars({model.name: model.parameters_by_role for model in anatomies}, "share")


def article_steps() -> list[QuantizationPlan]:
    """The article's recipe on the 9B, with one more rule each time: INT4 decoder, INT8 vision, INT8 head."""
    decoder = {"role": "decoder", "scheme": "int4", "group_size": 128}
    vision, head = {"role": "vision", "scheme": "int8"}, {"role": "lm_head", "scheme": "int8"}
    return [
        QuantizationPlan.from_dict({"name": name, "rules": rules, "default": "bf16"})
        for name, rules in (
            ("int4 decoder", [decoder]),
            ("+ int8 vision", [decoder, vision]),
            ("+ int8 lm_head", [decoder, vision, head]),
        )
    ]


def article_claims(model: Anatomy) -> pandas.DataFrame:
    """The article's claims on memory and parts (rows), beside figures from this model's configuration."""
    import pandas

    fp32, bf16 = model.under("fp32"), model.under("bf16")
    text = sum(bf16.resolved.bytes_by_role.get(role, 0) for role in ("decoder", "embedding", "lm_head"))
    steps = [format_bytes(model.under(plan).bytes) for plan in article_steps()]
    cache = CONTEXT_TOKENS * bf16.kv_cache_bytes_per_token()
    count = model.parameters_by_role

    def millions(role: str) -> str:
        return f"{count[role] / 1e6:,.0f} M parameters" if count.get(role) else "there is none"

    rows = [
        ("weights in FP32", "about 18 GB", format_bytes(fp32.bytes)),
        (
            "before quantizing",
            "18.3 GB",
            f"{format_bytes(bf16.bytes)} in BF16, {format_bytes(text)} without vision",
        ),
        (
            "after",
            "6.9 GB",
            f"{steps[0]} (INT4 decoder); + INT8 vision {steps[1]}; + INT8 lm_head {steps[2]}",
        ),
        ("speech encoder", "Wav2Vec2, INT8", millions("speech")),
        ("cross-modal attention", "FP16", f"{millions('cross_modal')}; projector: {millions('projector')}"),
        (
            "needed",
            "two GPUs with 24 GB",
            f"BF16 and the KV cache of {CONTEXT_TOKENS:,} tokens: {format_bytes(bf16.bytes + cache)}",
        ),
    ]
    columns = ["what", "the article", f"computed for {model.name}"]
    return pandas.DataFrame(rows, columns=columns).set_index("what")


def _sum_by_role(parts: Sequence[Part], value: str) -> dict[str, int]:
    """Role -> sum, known roles first and in their order."""
    roles = {part.role for part in parts}
    order = [*(role for role in ROLES if role in roles), *sorted(roles - set(ROLES))]
    return {role: sum(getattr(part, value) for part in parts if part.role == role) for role in order}
