"""What measurements use unless told otherwise."""

from __future__ import annotations

PROMPTS = 8
"""Prompts that are timed."""


DEFAULT_PLANS = ("fp32", "bf16", "int8", "int8-dynamic", "int4", "nf4", "llm-int8")


CANDIDATES = ("gptq-2bit", "gptq-3bit", "gptq-4bit", "int8", "gptq-8bit")
"""Schemes of which sensitivity is measured, and plans are put together."""


PERPLEXITY_PLANS = ("int8", "gptq", "awq", "hqq", "nf4", "int4")
"""Plans that `labkit perplexity` compares."""
