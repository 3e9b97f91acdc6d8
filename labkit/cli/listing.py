"""What the commands of `labkit.cli.main` do. Each takes the parsed options and returns an exit code or None."""

import argparse
from pathlib import Path

from labkit.cli.terminal import console, make_table
from labkit.common.formats import format_bytes


def models(options: argparse.Namespace) -> None:
    """``labkit models``; with a folder, what is in it."""
    from labkit.models.spec import list_models

    if options.folder:
        return _describe_checkpoint(Path(options.folder))

    rows = []
    for spec in list_models():
        millions = "–" if spec.parameters is None else f"{spec.parameters / 1e6:,.0f} M"
        rows.append([spec.name, millions, spec.availability(), spec.description])
    console().print(make_table("", ["Model", "Parameters", "Where", "What it is"], rows, text_columns=(2, 3)))
    console().print(
        "\nA folder with a transformers checkpoint, or a hub id such as owner/name, will do as well.",
        style="dim",
    )


def plans(options: argparse.Namespace) -> None:
    """``labkit plans``, with ``--model`` also the predicted bytes."""
    from labkit.plans.plan import QuantizationPlan, presets

    known = [QuantizationPlan.preset(name) for name in presets()]
    headers, rows = ["Plan", "What it does"], [[plan.name, plan.description] for plan in known]
    text_columns = (1,)
    if options.model:
        from labkit.loading.prepare import Prepared

        model = Prepared.of(options.model, quantized=f"`labkit models {options.model}` says how")
        predicted = [model.predicted_bytes(plan) for plan in known]
        headers.insert(1, f"Bytes of {options.model}")
        for row, size in zip(rows, predicted):
            row.insert(1, format_bytes(size))
        text_columns = (2,)
    console().print(make_table("", headers, rows, text_columns=text_columns))
    console().print("\nA YAML file of your own will do as well: --plans fp32,my-plan.yaml", style="dim")


def _describe_checkpoint(folder: Path) -> None:
    """What a quantized folder holds, once its files are found to be as they were written."""
    from labkit.loading.manifest import Manifest
    from labkit.models.spec import get_spec

    spec = get_spec(folder)
    manifest = Manifest.read(spec.folder)
    manifest.check_sizes(spec.folder)
    manifest.check_hashes(spec.folder)
    counts: dict[str, int] = {}
    for facts in manifest.modules.values():
        options = ", ".join(f"{name} {value}" for name, value in facts["options"].items())
        told = f"{facts['scheme']} ({options})" if options else facts["scheme"]
        counts[told] = counts.get(told, 0) + 1
    base, made = manifest.base, manifest.made_with
    calibration = manifest.calibration
    print(f"{spec.name}: {base['name']} under the plan {manifest.plan['name']}")
    print(
        f"weights      {format_bytes(manifest.weights_bytes)}, {base['parameters'] / 1e6:,.1f} M parameters"
    )
    for told, count in counts.items():
        print(f"Linears      {count} in {told}")
    print(f"calibration  {calibration['source'] if calibration else 'none'}")
    print(f"made         {made['time']}, labkit {made['labkit']}, {made['device']}")
    print(f"files        {len(manifest.files)}, as they were written")
