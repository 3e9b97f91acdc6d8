"""The options of every measurement. No torch: the command line and widgets read them."""

from __future__ import annotations

from dataclasses import dataclass

from labkit.common.formats import bytes_of
from labkit.common.options import REQUIRED, option
from labkit.loading.options import MachineOptions
from labkit.measure.defaults import CANDIDATES, DEFAULT_PLANS, PERPLEXITY_PLANS
from labkit.measure.search.goal import AGAINST, KEPT_DTYPES, ROUNDS

BATCH_HELP = "answers at a time"
PLANS_HELP = "names from `labkit plans`, or YAML files"
RANDOM_HELP = "random: the cost of the architecture, without the model's weights; no item is answered"


@dataclass(frozen=True, kw_only=True)
class CompareOptions(MachineOptions):
    """What `labkit.compare` takes."""

    plans: tuple[str, ...] | None = option(
        None, PLANS_HELP, usual=f"{','.join(DEFAULT_PLANS)}; a quantized folder has its own"
    )
    items: int = option(200, "how many test items", least=1)
    split: str = option(
        "all",
        "typed, spoken, hard, several with commas, or all that the model takes: which items",
        metavar="NAME",
    )
    seed: int | None = option(None, "draw other test items than the standard set", least=0)
    thinking: bool = option(False, "let the model think before it answers")
    batch_size: int = option(8, BATCH_HELP, least=1)
    weights: str | None = option(None, RANDOM_HELP, ("random",))
    output: str | None = option(
        None, "where results.json and report.html go", metavar="FOLDER", usual="results/MODEL"
    )


@dataclass(frozen=True, kw_only=True)
class ContextOptions(MachineOptions):
    """What `labkit.measure.context.measure_growth` takes."""

    plans: tuple[str, ...] = option(
        ("bf16", "int8-kv"), "names or files; the others are compared with the first"
    )
    windows: tuple[int, ...] = option((), "the first plan once more with each of these windows", least=1)
    contexts: tuple[int, ...] = option((160, 240, 320, 480, 720, 1440), "tokens of the prompt", least=1)
    items: int = option(60, "items answered at each context", least=0)
    prompts: int = option(4, "requests that are timed", least=1)
    weights: str | None = option(None, RANDOM_HELP, ("random",))
    batch_size: int = option(8, BATCH_HELP, least=1)
    output: str | None = option(
        None, "where context.json goes", metavar="FOLDER", usual="results/context-MODEL"
    )


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """What `labkit.measure.fit.needs` takes, the device's memory, and what ``--check`` needs."""

    memory: str | None = option(None, "free memory of the device", metavar="8GB", check=bytes_of)
    card: str | None = option(None, "a graphics card, such as rtx-4090 or h100", metavar="NAME")
    bandwidth: float | None = option(None, "of the memory", metavar="GB/S", usual="the card's")
    context: int = option(4096, "tokens of the conversation", least=1)
    screen: str = option("1080x2400", "the screenshot's pixels, or none", metavar="WxH")
    max_pixels: int | None = option(None, "limit of the image processor", least=1, usual="the model's")
    plans: tuple[str, ...] | None = option(None, PLANS_HELP, usual="every preset")
    check: bool = option(False, "measure what was predicted, with random weights")
    device: str = option("auto", "with --check: auto, cpu, cuda or cuda:N")
    output: str | None = option(
        None, "with --check: where fit.json goes", metavar="FOLDER", usual="results/fit-MODEL"
    )


@dataclass(frozen=True, kw_only=True)
class GpuOptions:
    """What `labkit bench-gpu` measures."""

    weights: str | None = option(
        None, "random: weights drawn on the GPU", ("random",), usual="the model's own"
    )
    plans: tuple[str, ...] = option(
        ("fp32", "bf16", "int8", "int8-dynamic", "int4", "article", "nf4", "llm-int8"), PLANS_HELP
    )
    batches: tuple[int, ...] = option((1, 8), "conversations at a time", least=1)
    contexts: tuple[int, ...] = option((1024, 8192, 24576), "tokens that each of them has", least=1)
    prompts: tuple[int, ...] = option((1024, 3200), "tokens of the prompts", least=1)
    screenshot: int = option(4096, "tokens of the prompt with a screenshot; 0: none", least=0)
    timeout_s: int = option(1800, "seconds for each plan", least=1, metavar="S")
    output: str = option(REQUIRED, "the folder for the results", metavar="FOLDER")


@dataclass(frozen=True, kw_only=True)
class PerplexityOptions(MachineOptions):
    """What `labkit.compare_perplexity` takes, besides the `Datasets`."""

    plans: str = option(
        ",".join(PERPLEXITY_PLANS),
        "presets, plan files, or candidates such as gptq-3bit, applied to every Linear",
        metavar="A,B,…",
    )
    dtype: str = option("fp32", "of what is not quantized", ("fp32", "fp16", "bf16"))
    output: str | None = option(
        None, "where perplexity.json goes", metavar="FOLDER", usual="results/perplexity-MODEL"
    )


@dataclass(frozen=True, kw_only=True)
class LayerOptions(MachineOptions):
    """What sensitivity and search share, besides the `Datasets`."""

    schemes: str = option(",".join(CANDIDATES), "candidates for each Linear", metavar="A,B,…")
    parts: bool = option(True, "measure whole parts too")
    jobs: int | None = option(None, "processes side by side", least=1, usual="half the cores")


@dataclass(frozen=True, kw_only=True)
class SensitivityOptions(LayerOptions):
    """What `labkit.measure_sensitivity` takes."""

    output: str | None = option(
        None, "the folder for the results", metavar="FOLDER", usual="results/sensitivity-MODEL"
    )


@dataclass(frozen=True, kw_only=True)
class GoalOptions:
    """What a search is for: one of three."""

    memory: str | None = option(None, "bytes of all weights", metavar="60MB", check=bytes_of)
    bits: float | None = option(
        None, "bits a value of the Linears, on average, scales included", metavar="4.5"
    )
    max_loss: float | None = option(
        None,
        "the largest loss: points of right steps, or percent of perplexity for a model that takes no images",
        metavar="0.5",
    )


@dataclass(frozen=True, kw_only=True)
class SearchOptions(LayerOptions):
    """What `labkit.search_plan` takes, besides its goal."""

    against: tuple[str, ...] = option(AGAINST, "plans that the plan found is compared with")
    test_items: int = option(200, "test items the plan is reported on; 0 for none", least=0)
    rounds: int = option(ROUNDS, "most plans to measure before the best of them is kept", least=1)
    dtype: str = option(
        "auto",
        "of what is not quantized: fp16 rounds finer, bf16 is faster on many CPUs; auto decides by measuring",
        ("auto", *KEPT_DTYPES),
    )
    apart: bool = option(
        False,
        "let q, k and v differ, and gate and up: can lose less in as many bytes, but vLLM requires them alike",
    )
    name: str | None = option(None, "the plan's name", metavar="NAME", usual="from the goal")
    sensitivities: str | None = option(
        None,
        "the folder of sensitivities; what is missing there is measured",
        metavar="FOLDER",
        usual="results/sensitivity-MODEL",
    )
    output: str | None = option(
        None, "the folder for the results", metavar="FOLDER", usual="results/search-MODEL-GOAL"
    )
