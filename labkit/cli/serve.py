"""``labkit serve``: the OpenAI-compatible service."""

import argparse

from labkit.cli.arguments import MODEL, add_machine
from labkit.service.arguments import add_service_arguments


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


def add_serve(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "serve",
        help="serve a model to OpenAI's clients",
        description=(
            "Serve a model at http://HOST:PORT/v1 to any client of OpenAI's API, with a status page at /, its\n"
            "documentation at /docs, and counts for Prometheus at /metrics. Answers are those that\n"
            "`labkit compare` measures, alone and in company. Ctrl-C finishes what runs and stops."
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=(
            "examples:\n"
            "  labkit serve pocket\n"
            "  labkit serve autoglm-phone-9b --plan int4 --engine vllm --tensor-parallel-size 2\n\n"
            "assets/run_autoglm_server.sh does the same in the background."
        ),
    )
    command.add_argument("model", help=MODEL)
    command.add_argument(
        "--plan", help="a name from `labkit plans`, or a YAML file (bf16; a quantized folder has its own)"
    )
    add_machine(command)
    add_service_arguments(command)
    command.set_defaults(run=serve)
