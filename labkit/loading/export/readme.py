"""Notes for the users of an export, and the folder's ``README.md``."""

from collections.abc import Mapping, Sequence

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from labkit.loading.export.formats import GGUF
from labkit.loading.export.integers import Kind
from labkit.loading.export.selection import Selection
from labkit.models.checkpoint import Checkpoint
from labkit.plans.resolved import ResolvedPlan


def notes(source: Checkpoint, resolved: ResolvedPlan, selection: Selection, format: str) -> list[str]:
    """Notes that concern every reader of the export, in sentences."""
    kinds, unquantized = selection.kinds, selection.unquantized
    sentences = []
    if source.family.name == "pocket":
        sentences.append(
            "No other engine has the pocket model's architecture: only labkit's own class loads this."
        )
    if format != GGUF and get_checkpoint_conversion_mapping(source.model_type):
        sentences.append(
            f"Tensors are called as transformers 5 calls the modules of {source.model_type}; engines that look for "
            "the original's names will not find them."
        )
    if unquantized:
        count = len(unquantized)
        what = "1 Linear is" if count == 1 else f"{count} Linears are"
        sentences.append(f"{what} written unquantized in {resolved.plan.default}.")
    other = {
        scheme.name
        for name, scheme in resolved.schemes.items()
        if name not in kinds and name not in unquantized and scheme.name != resolved.plan.default
    }
    if other and format != GGUF:
        sentences.append(
            f"Linears in {', '.join(sorted(other))} are written so; engines load them in "
            f"{resolved.plan.default}, as all else that is not quantized."
        )
    return sentences + selection.notes


def text(
    name: str,
    format: str,
    base: str,
    plan: str,
    kinds: Mapping[str, Kind],
    notes: Sequence[str],
    record: str,
) -> str:
    """The model card of the export ``name``; ``record`` names the file with all other facts."""
    counts: dict[str, int] = {}
    for kind in kinds.values():
        counts[str(kind)] = counts.get(str(kind), 0) + 1
    lines = [
        f"# {name}",
        "",
        f"{base}, {'quantized' if kinds else 'written'} by labkit under the plan {plan}, in the format {format}.",
        "",
        *(f"- {count} Linears: {kind}" for kind, count in counts.items()),
        *(f"- {note}" for note in notes),
        "",
        f"`{record}` has the plan, the scheme of each Linear, the calibration's fingerprint and the versions it "
        "was made with. The licence is that of the original model.",
        "",
    ]
    return "\n".join(lines)
