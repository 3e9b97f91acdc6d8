"""What the readers of an export must know: notes for the user, and the folder's ``README.md``."""

from collections.abc import Mapping, Sequence

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from labkit.loading.export.integers import Kind
from labkit.loading.manifest import Manifest
from labkit.models.checkpoint import Checkpoint
from labkit.plans.resolved import ResolvedPlan


def notes(
    source: Checkpoint, resolved: ResolvedPlan, kinds: Mapping[str, Kind], unquantized: set[str]
) -> list[str]:
    """What every reader of the export must know, in sentences."""
    told = []
    if source.family.name == "pocket":
        told.append(
            "No other engine has the pocket model's architecture: only labkit's own class loads this."
        )
    if get_checkpoint_conversion_mapping(source.model_type):
        told.append(
            f"Tensors are called as transformers 5 calls the modules of {source.model_type}; engines that look for "
            "the original's names will not find them."
        )
    if unquantized:
        count = len(unquantized)
        what = "1 Linear is" if count == 1 else f"{count} Linears are"
        told.append(f"{what} written unquantized in {resolved.plan.default}.")
    other = {
        scheme.name
        for name, scheme in resolved.schemes.items()
        if name not in kinds and name not in unquantized and scheme.name != resolved.plan.default
    }
    if other:
        told.append(
            f"Linears in {', '.join(sorted(other))} are written so; engines load them in "
            f"{resolved.plan.default}, as all else that is not quantized."
        )
    return told


def text(
    name: str, format: str, manifest: Manifest, kinds: Mapping[str, Kind], notes: Sequence[str], record: str
) -> str:
    """The card of the export ``name``; ``record`` is the file that has everything else."""
    counts: dict[str, int] = {}
    for kind in kinds.values():
        counts[str(kind)] = counts.get(str(kind), 0) + 1
    lines = [
        f"# {name}",
        "",
        f"{manifest.base['name']}, quantized by labkit under the plan {manifest.plan['name']}, in the format "
        f"{format}.",
        "",
        *(f"- {count} Linears: {kind}" for kind, count in counts.items()),
        *(f"- {note}" for note in notes),
        "",
        f"`{record}` has the plan, the scheme of each Linear, the calibration's fingerprint and the versions it "
        "was made with. The licence is that of the original model.",
        "",
    ]
    return "\n".join(lines)
