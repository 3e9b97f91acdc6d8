"""Defaults of measurements."""

from __future__ import annotations

PROMPTS = 8
"""Number of timed prompts."""


DEFAULT_PLANS = ("fp32", "bf16", "int8", "int8-dynamic", "int4", "nf4", "llm-int8")


CANDIDATES = ("gptq-2bit", "gptq-3bit", "gptq-4bit", "int8", "gptq-8bit")
"""Candidate schemes of sensitivity and search."""


PERPLEXITY_PLANS = ("int8", "gptq", "awq", "hqq", "nf4", "int4")
"""Plans that `labkit perplexity` compares."""
