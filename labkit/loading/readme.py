"""The ``README.md`` of a quantized checkpoint: its content, its origin and its use."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from labkit.common.formats import format_bytes
from labkit.loading.manifest import NAME, Manifest


def text(name: str, engine: Any, manifest: Manifest) -> str:
    """The model card of the checkpoint ``name``, with facts from the manifest and the resolved plan."""
    base, plan = manifest.base, engine.plan
    what = f"{base['name']} under the plan {plan.name}"
    lines = [
        "---",
        "library_name: labkit",
        *([f"base_model: {base['source']}", "base_model_relation: quantized"] if _is_hub_id(base) else []),
        "tags:",
        "- quantized",
        "---",
        "",
        f"# {name}",
        "",
        f"{what}: {format_bytes(manifest.weights_bytes)} of weights. {plan.description}".strip(),
        "",
        "```python",
        "import labkit",
        "",
        f'engine = labkit.load("{name}")  # the path of this folder',
        "```",
        "",
        "It restores bit for bit, without the original weights and without calibration. Other libraries cannot",
        f"read it; `labkit export {name} --format compressed-tensors` writes what transformers and vLLM load.",
        "",
        "| Part | Scheme | Linears | Parameters | Bytes | Bits a parameter |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
        *(_row(row) for row in engine.resolved.rows()),
        "",
        "## How it was made",
        "",
        f"- Model: {_model(base)}",
        f"- Plan: `plan.yaml`; the scheme of each Linear is in `{NAME}`.",
        f"- Calibration: {_calibration(manifest.calibration)}",
        f"- Made on {manifest.made_with['time']} with labkit {manifest.made_with['labkit']}"
        f"{_commit(manifest.made_with)}, {_packages(manifest.made_with)}, on {manifest.made_with['device']}.",
        *(f"- {note}" for note in engine.resolved.summary),
        "",
        "What the quantization costs in quality is not known from this card: "
        f"`labkit compare {name}` measures it beside the unquantized model.",
        "",
        "The licence is that of the original model.",
        "",
    ]
    return "\n".join(lines)


def _row(row: Mapping[str, Any]) -> str:
    bits = "" if row["bits_per_parameter"] is None else f"{row['bits_per_parameter']:.2f}"
    return (
        f"| {row['role']} | {row['scheme']} | {row['linears']} | {row['parameters']:,} "
        f"| {format_bytes(row['bytes'])} | {bits} |"
    )


def _is_hub_id(base: Mapping[str, Any]) -> bool:
    return base.get("on_hub", False)


def _model(base: Mapping[str, Any]) -> str:
    source = base["source"] if _is_hub_id(base) else Path(base["source"]).name
    line = base["name"] if source == base["name"] else f"{base['name']} ({source})"
    if base.get("commit"):
        line += f", commit {base['commit']}"
    if base.get("fingerprint"):
        line += f", fingerprint {base['fingerprint'][:16]}"
    return f"{line}, {base['model_type']}, {base['parameters']:,} parameters."


def _calibration(facts: Mapping[str, Any] | None) -> str:
    if facts is None:
        return "none; no scheme looked at activations."
    return f"{facts['source']}; {facts['batches']} batches, SHA-256 {facts['sha256'][:16]}…"


def _commit(made_with: Mapping[str, Any]) -> str:
    return f" (commit {made_with['commit'][:10]})" if made_with.get("commit") else ""


def _packages(made_with: Mapping[str, Any]) -> str:
    packages = made_with["packages"]
    return ", ".join(f"{name} {packages[name]}" for name in ("torch", "transformers") if name in packages)
