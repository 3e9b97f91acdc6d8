"""The short notation of candidate schemes: ``int8``, ``gptq-3bit``, ``awq-4bit:group_size=128``."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from labkit.common.errors import LabError
from labkit.common.yaml_text import parse_yaml
from labkit.quantization import Scheme, SchemeError, get_scheme


def parse_candidate(text: str) -> Scheme:
    """The scheme that ``text`` names: a scheme's name, ``-Nbit`` for its num_bits, ``:option=value,…``."""
    match = re.fullmatch(r"(?P<name>[a-z0-9-]+?)(?:-(?P<bits>\d+)bit)?(?::(?P<options>.+))?", text.strip())
    if not match:
        raise LabError(f"{text!r} names no scheme; write int8, gptq-3bit, or awq-4bit:group_size=128")
    options: dict[str, Any] = {}
    for pair in filter(None, (match["options"] or "").split(",")):
        key, separator, value = pair.partition("=")
        if not separator:
            raise LabError(f"{text!r}: an option is written name=value, not {pair!r}")
        try:
            options[key.strip()] = parse_yaml(value)
        except LabError as error:
            raise LabError(f"{text!r}: the value of {key.strip()} is {error}") from None
    if match["bits"]:
        options["num_bits"] = int(match["bits"])
    try:
        return get_scheme(match["name"], **options)
    except SchemeError as error:
        raise LabError(f"{text!r}: {error}") from None


def parse_candidates(texts: str | Iterable[str]) -> dict[str, Scheme]:
    """Label -> scheme, from a list, or from a text with semicolons or commas between the candidates.

    A comma before ``name=value`` belongs to the options of the candidate before it.
    """
    if isinstance(texts, str):
        texts = split_candidates(texts)
    schemes = [parse_candidate(text) for text in texts if text.strip()]
    if not schemes:
        raise LabError("no candidate scheme is given")
    return {label_of(scheme): scheme for scheme in schemes}


def split_candidates(text: str) -> list[str]:
    """The candidates of a text, as `parse_candidates` splits it, unparsed."""
    return [part.strip() for part in re.split(r";|,(?![^,;:]*=)", text) if part.strip()]


def label_of(scheme: Scheme) -> str:
    """The short notation of a scheme; `parse_candidate` reads it back."""
    options = scheme.options()
    bits = options.pop("num_bits", None)
    defaults = {item.name: item.default for item in fields(scheme)}
    settings = ",".join(
        f"{key}={_as_text(value)}" for key, value in options.items() if value != defaults[key]
    )
    return scheme.name + (f"-{bits}bit" if bits else "") + (f":{settings}" if settings else "")


def _as_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
