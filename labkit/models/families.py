"""The roles of a model's modules (``decoder``, ``vision``, ...): a table of name patterns per architecture family.

Each family lists ``pattern -> role`` in order and the first match wins. Every ``Linear``, ``Embedding`` and
convolution of a known architecture must match: a module without a role would silently stay unquantized.

Names as in transformers 5.23 (``named_modules()`` of the real classes built on the meta device).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from labkit.common.errors import LabError

if TYPE_CHECKING:
    from torch import nn

ROLES = ("vision", "speech", "cross_modal", "projector", "decoder", "embedding", "lm_head")
"""Every role of a module, in the order of the tables."""


@dataclass(frozen=True)
class Family:
    """One architecture family.

    Attributes:
        name: the family's short name, for messages.
        model_types: values of ``config.model_type`` that belong to it.
        patterns: ``(regular expression, role)`` matched against the whole module name, first match wins.
        without_role: patterns of modules the lab leaves alone (they keep the plan's default dtype).
        modalities: what the family's processor accepts besides text.
    """

    name: str
    model_types: tuple[str, ...]
    patterns: tuple[tuple[str, str], ...]
    without_role: tuple[str, ...] = ()
    modalities: tuple[str, ...] = ()

    def role_of(self, name: str) -> str | None:
        """The role of a module's name, or None if no pattern matches."""
        for pattern, role in self.patterns:
            if re.fullmatch(pattern, name):
                return role
        return None

    def leaves_alone(self, name: str) -> bool:
        """Whether the module deliberately has no role."""
        return any(re.fullmatch(pattern, name) for pattern in self.without_role)


_TEXT = (
    (r"(?:model\.)?(?:language_model\.)?embed_tokens(?:_per_layer)?", "embedding"),
    (r"(?:model\.)?(?:language_model\.)?layers\.\d+\..+", "decoder"),
    (r"transformer\.(?:wte|wpe|word_embeddings)", "embedding"),  # GPT-2 and those named after it
    (r"transformer\.h\.\d+\..+", "decoder"),
    (r"lm_head", "lm_head"),
)

_GEMMA3N_TEXT = (
    (r"model\.(?:language_model\.)?per_layer_model_projection", "decoder"),
    (r"model\.(?:language_model\.)?altup_(?:unembed_)?projections\.\d+", "decoder"),
    *_TEXT,
)

_GLM4V = (
    (r"model\.visual\.(?:merger\..+|downsample)", "projector"),
    (r"model\.visual\..+", "vision"),
    *_TEXT,
)

FAMILIES: tuple[Family, ...] = (
    Family("Glm4v", ("glm4v",), _GLM4V, modalities=("image",)),
    Family(
        "pocket",
        ("pocket_phone",),
        (
            (r"model\.speech_projector(?:\..+)?", "projector"),
            (r"model\.speech\..+", "speech"),
            (r"model\.cross_modal\..+", "cross_modal"),
            *_GLM4V,
        ),
        modalities=("image", "audio"),
    ),
    Family(
        "Qwen2.5-Omni",
        ("qwen2_5_omni", "qwen2_5_omni_thinker"),
        (
            (r"(?:thinker\.)?model\.audio_tower\.proj", "projector"),
            (r"(?:thinker\.)?model\.audio_tower\..+", "speech"),
            (r"(?:thinker\.)?model\.visual\.merger\..+", "projector"),
            (r"(?:thinker\.)?model\.visual\..+", "vision"),
            (r"(?:thinker\.)?model\.language_model\.embed_tokens", "embedding"),
            (r"(?:thinker\.)?model\.language_model\.layers\.\d+\..+", "decoder"),
            (r"(?:thinker\.)?lm_head", "lm_head"),
        ),
        without_role=(r"talker\..+", r"token2wav\..+"),
        modalities=("image", "audio"),
    ),
    Family(
        "Gemma3n",
        ("gemma3n",),
        (
            (r"model\.vision_tower\..+", "vision"),
            (r"model\.audio_tower\..+", "speech"),
            (r"model\.embed_(?:vision|audio)\..+", "projector"),
            *_GEMMA3N_TEXT,
        ),
        modalities=("image", "audio"),
    ),
    Family("Gemma3n text", ("gemma3n_text",), _GEMMA3N_TEXT),
    Family(
        "Phi4Multimodal",
        ("phi4_multimodal",),
        (
            (r"model\.embed_tokens_extend\.image_embed\.img_projection_(?:up|down)", "projector"),
            (r"model\.embed_tokens_extend\.audio_embed\.(?:up|down)_proj_for_.+", "projector"),
            (r"model\.embed_tokens_extend\.image_embed\..+", "vision"),
            (r"model\.embed_tokens_extend\.audio_embed\..+", "speech"),
            *_TEXT,
        ),
        modalities=("image", "audio"),
    ),
    Family(
        "GlmAsr",
        ("glmasr",),
        (
            (r"model\.audio_tower\..+", "speech"),
            (r"model\.multi_modal_projector\..+", "projector"),
            *_TEXT,
        ),
        modalities=("audio",),
    ),
)

TEXT_FAMILY = Family("text", (), _TEXT)
"""Llama, Qwen, Mistral, GLM, Gemma, Phi and all others with modules named ``model.layers.N`` or ``transformer.h.N``."""


def family_of(model_type: str | None) -> Family:
    """The family of a ``config.model_type``; :data:`TEXT_FAMILY` for a type without an entry of its own."""
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    return TEXT_FAMILY


def roles_of_names(names: Iterable[str], family: Family, model: str = "this model") -> dict[str, str]:
    """Roles of module names, by one family's patterns.

    Raises:
        LabError: modules match no pattern of the family (the message names them).
    """
    roles, unmatched = {}, []
    for name in names:
        role = family.role_of(name)
        if role is not None:
            roles[name] = role
        elif not family.leaves_alone(name):
            unmatched.append(name)
    if unmatched:
        families = ", ".join(member.name for member in FAMILIES)
        more = f" and {len(unmatched) - 6} more" if len(unmatched) > 6 else ""
        raise LabError(
            f"no role is known for {len(unmatched)} modules of {model}: {', '.join(unmatched[:6])}{more}. "
            f"Known families: {families}, and text models with model.layers.N or transformer.h.N, embeddings and lm_head. "
            "Name the modules in the plan with match: rules and pass roles={} to quantize_, "
            "or add the family to labkit/models/families.py"
        )
    return roles


def find_roles(model: nn.Module) -> dict[str, str]:
    """Role of every ``Linear``, ``Embedding`` and convolution of a transformers model.

    Works on meta-device models too: only names and classes are read.  The output projections of
    ``nn.MultiheadAttention`` are left out: torch reads their weight directly, so they cannot be replaced.

    Returns:
        ``{module name: role}``, roles from :data:`ROLES`.  ``{}`` for a module that is no transformers model
        (it has no ``config.model_type``): plans then apply by name and default alone.

    Raises:
        LabError: modules of a transformers model match no pattern of its family.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type is None:
        return {}
    names = [name for name, module in model.named_modules() if has_role(module)]
    return roles_of_names(names, family_of(model_type), f"{type(model).__name__} ({model_type})")


def has_role(module: nn.Module) -> bool:
    """Whether :func:`find_roles` gives modules of this class a role."""
    from torch import nn

    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False
    return isinstance(module, nn.Linear | nn.Embedding | nn.modules.conv._ConvNd)
