"""What the commands of `labkit.cli` do. Each takes the parsed options and returns an exit code or None."""

import argparse
import sys
from pathlib import Path
from typing import Any

from labkit.common.errors import LabError
from labkit.common.formats import format_bytes, format_rate_per_s, format_seconds
from labkit.terminal import console as _console
from labkit.terminal import make_table as _table


def compare(options: argparse.Namespace) -> int:
    """``labkit compare``: measure, then print conclusions, tables and where the files are."""
    from labkit.measure.compare import compare as run_comparison
    from labkit.models.spec import get_spec
    from labkit.results import tables
    from labkit.results.comparison import describe

    spec = get_spec(options.model)
    output = Path(options.output or Path("results") / Path(spec.name).name)
    comparison = run_comparison(
        options.model,
        None if options.plans is None else _listed(options.plans),
        options.items,
        seed=options.seed,
        split=options.split,
        device=options.device,
        threads=options.threads,
        enable_thinking=options.thinking,
        batch_size=options.batch_size,
        weights=options.weights,
        output=output,
    )
    console = _console()
    console.print()
    console.print(describe(comparison.environment["settings"]), style="dim")
    for sentence in comparison.conclusions():
        console.print(f"• {sentence}", highlight=False)
    if added := comparison.environment["added_plan"]:
        console.print(f"• {added} was added, to have an unquantized row.", highlight=False)
    for title, table in tables.shown_tables(comparison.measurements).items():
        console.print()
        console.print(_table(title, *table))
    console.print()
    console.print(f"{output / 'results.json'}\n{output / 'report.html'}", highlight=False, soft_wrap=True)
    for plan, reason in comparison.failures.items():
        print(f"labkit: plan {plan} could not be measured: {reason}", file=sys.stderr)
    return 1 if comparison.failures else 0


def models(options: argparse.Namespace) -> None:
    """``labkit models``; with a folder, what is in it."""
    from labkit.models.spec import list_models

    if options.folder:
        return _describe_checkpoint(Path(options.folder))

    rows = []
    for spec in list_models():
        millions = "–" if spec.parameters is None else f"{spec.parameters / 1e6:,.0f} M"
        rows.append([spec.name, millions, spec.availability(), spec.description])
    _console().print(_table("", ["Model", "Parameters", "Where", "What it is"], rows, text_columns=(2, 3)))
    _console().print(
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
        from labkit.measure.job import predict_bytes

        predicted = predict_bytes(options.model, known)
        headers.insert(1, f"Bytes of {options.model}")
        for row, size in zip(rows, predicted):
            row.insert(1, format_bytes(size))
        text_columns = (2,)
    _console().print(_table("", headers, rows, text_columns=text_columns))
    _console().print("\nA YAML file of your own will do as well: --plans fp32,my-plan.yaml", style="dim")


def quantize(options: argparse.Namespace) -> None:
    """``labkit quantize``: everything that can be refused is refused before the model is read."""
    import torch

    from labkit.loading.quantize_to import CalibrationSettings, quantize_to

    if options.threads:
        torch.set_num_threads(options.threads)
    made = quantize_to(
        options.model,
        options.plan,
        options.output,
        options.device,
        calibration=CalibrationSettings(
            options.calibration_items, options.calibration_seed, options.calibration_text
        ),
        force=options.force,
    )
    for note in made.engine.resolved.notes:
        print(f"• {note}")
    if made.continued:
        print(f"• {made.continued} Linears were finished by an earlier run.")
    size = sum(path.stat().st_size for path in made.folder.iterdir())
    predicted = made.engine.resolved.predicted_bytes
    print(f"{made.folder}: {format_bytes(predicted)} of weights, {format_bytes(size)} on disk")


def export(options: argparse.Namespace) -> None:
    """``labkit export``."""
    from labkit.loading.export import export as write

    done = write(
        options.folder,
        options.output,
        format=options.format,
        dequantize=_listed(options.dequantize),
        force=options.force,
    )
    for note in done.notes:
        print(f"• {note}")
    size = sum(path.stat().st_size for path in done.folder.iterdir())
    print(f"{done.folder}: {done.quantized} Linears quantized, {format_bytes(size)} on disk")


def doctor(options: argparse.Namespace) -> int | None:
    """``labkit doctor``."""
    from labkit.doctor import examine

    return examine()


def ask(options: argparse.Namespace) -> None:
    """``labkit ask``: everything given is read and checked before the model is loaded."""
    from labkit.common.messages import load_audio, load_image

    content: list[dict[str, Any]] = []
    if options.image:
        content.append({"type": "image", "image": load_image(options.image)})
    if options.audio:
        content.append({"type": "audio", "audio": load_audio(options.audio)})
    if options.instruction and options.instruction.strip():
        content.append({"type": "text", "text": options.instruction})
    elif not options.audio:
        raise LabError("nothing is asked: give an instruction, or --audio with a spoken one")

    import torch

    from labkit.engine.sampling import SamplingSettings
    from labkit.loading.load import load
    from labkit.measure.job import check_senses

    settings = {
        "max_new_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "seed": options.seed,
    }
    SamplingSettings(**settings)  # refuses what is wrong before the model is read
    check_senses(options.model, [part["type"] for part in content if part["type"] != "text"])
    if options.threads:
        torch.set_num_threads(options.threads)
    engine = load(options.model, options.plan, options.device, progress=False)
    conversation = [{"role": "user", "content": content}]
    stream = engine.stream(conversation, enable_thinking=options.thinking, **settings)
    for delta in stream:
        print(delta, end="", flush=True)
    print(flush=True)
    done = stream.generation
    told = f"{done.completion_tokens} tokens, first after {format_seconds(done.ttft_s)}"
    if done.decode_tokens_per_s:
        told += f", then {format_rate_per_s(done.decode_tokens_per_s)}"
    print(told + (", cut off: --max-new-tokens" if done.finish_reason == "length" else ""), file=sys.stderr)


def screen(options: argparse.Namespace) -> None:
    """``labkit screen``: draw one, and say what could be asked of it."""
    from labkit import phonetap
    from labkit.common.files import atomic_path

    path = Path(options.output)
    if path.suffix.lower() != ".png":
        raise LabError(f"--output must end in .png, not {path.suffix or path.name!r}")
    item = phonetap.items(split="typed", count=1, seed=options.seed, part="test")[0]
    try:
        with atomic_path(path) as temporary:
            item.screen.image.save(temporary)
    except OSError as error:
        raise LabError(f"{path} cannot be written: {error.strerror or error}") from None
    width, height = item.screen.size
    print(f"{path}: {width}×{height} pixels; try the instruction: {item.instruction}")


def plot(options: argparse.Namespace) -> None:
    """``labkit plot``: the picture says below what it was measured with."""
    from labkit.common.files import atomic_path
    from labkit.results.charts.svg import comparison_svg
    from labkit.results.comparison import describe
    from labkit.results.measurement import load_results

    path = Path(options.output)
    if path.suffix.lower() != ".svg":
        raise LabError(f"--output must end in .svg, not {path.suffix or path.name!r}")
    environment, measurements = load_results(options.results)
    settings = environment.get("settings")
    picture = comparison_svg(measurements, describe(settings) if settings else "")
    try:
        with atomic_path(path) as temporary:
            temporary.write_text(picture, encoding="utf-8")
    except OSError as error:
        raise LabError(f"{path} cannot be written: {error.strerror or error}") from None
    print(path)


def serve(options: argparse.Namespace) -> None:
    """``labkit serve``: wrong options and a taken port are refused before the model is read."""
    from labkit.models.spec import get_spec
    from labkit.service.arguments import options_of

    wanted = options_of(options)
    get_spec(options.model)
    if options.engine == "vllm":
        from labkit.service.vllm.command import VllmOptions
        from labkit.service.vllm.serve import serve_vllm

        told = (options.tensor_parallel_size, options.pipeline_parallel_size, options.vllm_args)
        return serve_vllm(options.model, options.plan, wanted, VllmOptions(*told))
    from labkit.service.serve import serve as run

    return run(options.model, options.plan, wanted, device=options.device, threads=options.threads)


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


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
