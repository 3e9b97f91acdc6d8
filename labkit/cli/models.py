"""``labkit models``: the registered models, or the content of a quantized folder."""

import argparse
from pathlib import Path

from labkit.cli.arguments import Commands, add_command
from labkit.cli.terminal import console, make_table
from labkit.common.formats import format_bytes


def add(commands: Commands) -> None:
    """Add the command to the command line."""
    command = add_command(commands, "models", run, "list the models that can be named", config=False)
    command.add_argument(
        "folder", nargs="?", help="a folder of `labkit quantize`: check its files, and say what is in it"
    )


def run(options: argparse.Namespace) -> None:
    """Print the table, or the facts of a folder."""
    from labkit.models.spec import list_models

    if options.folder:
        return _describe_checkpoint(Path(options.folder))

    rows = []
    for spec in list_models():
        millions = "–" if spec.parameters is None else f"{spec.parameters / 1e6:,.0f} M"
        rows.append([spec.name, millions, spec.availability(), spec.description])
    console().print(make_table("", ["Model", "Parameters", "Where", "What it is"], rows, text_columns=(2, 3)))
    console().print(
        "\nA folder with a transformers checkpoint, or a hub id such as owner/name, works too.", style="dim"
    )


def _describe_checkpoint(folder: Path) -> None:
    """Check the files of a quantized folder against their hashes, then print its content."""
    from labkit.loading.manifest import Manifest
    from labkit.models.spec import get_spec

    spec = get_spec(folder)
    manifest = Manifest.read(spec.folder)
    manifest.check_sizes(spec.folder)
    manifest.check_hashes(spec.folder)
    counts: dict[str, int] = {}
    for facts in manifest.modules.values():
        options = ", ".join(f"{name} {value}" for name, value in facts["options"].items())
        scheme = f"{facts['scheme']} ({options})" if options else facts["scheme"]
        counts[scheme] = counts.get(scheme, 0) + 1
    base, made_with = manifest.base, manifest.made_with
    calibration = manifest.calibration
    print(f"{spec.name}: {base['name']} under the plan {manifest.plan['name']}")
    print(
        f"weights      {format_bytes(manifest.weights_bytes)}, {base['parameters'] / 1e6:,.1f} M parameters"
    )
    for scheme, count in counts.items():
        print(f"Linears      {count} in {scheme}")
    print(f"calibration  {calibration['source'] if calibration else 'none'}")
    print(f"made         {made_with['time']}, labkit {made_with['labkit']}, {made_with['device']}")
    print(f"files        {len(manifest.files)}, as they were written")
