"""``labkit serve``: the OpenAI-compatible service."""

import argparse

from labkit.cli.arguments import MODEL, Commands, add_command
from labkit.common.options import add_options
from labkit.loading.options import LoadOptions
from labkit.service.arguments import add_service_arguments, options_of


def add(commands: Commands) -> None:
    """Add the command to the command line."""
    command = add_command(
        commands,
        "serve",
        run,
        "serve a model to OpenAI's clients",
        (
            "Serve a model at http://HOST:PORT/v1 to any client of OpenAI's API, with a status page at /, its\n"
            "documentation at /docs, and counts for Prometheus at /metrics. Answers are those that\n"
            "`labkit compare` measures, alone and in company. Ctrl-C finishes what runs and stops."
        ),
        (
            "examples:\n"
            "  labkit serve pocket\n"
            "  labkit serve autoglm-phone-9b --device cuda:0,cuda:1\n"
            "  labkit serve autoglm-phone-9b --plan int4 --engine vllm --tensor-parallel-size 2\n\n"
            "assets/run_autoglm_server.sh does the same in the background."
        ),
    )
    command.add_argument("model", help=MODEL)
    add_options(command, LoadOptions)
    add_service_arguments(command)


def run(options: argparse.Namespace) -> None:
    """Run the service; wrong options and a taken port are refused before the model is read."""
    from labkit.models.spec import get_spec

    service = options_of(options)
    get_spec(options.model)
    if options.engine == "vllm":
        from labkit.service.vllm.command import VllmOptions
        from labkit.service.vllm.serve import serve_vllm

        vllm = VllmOptions(options.tensor_parallel_size, options.pipeline_parallel_size, options.vllm_args)
        return serve_vllm(options.model, options.plan, service, vllm)
    from labkit.service.serve import serve

    return serve(options.model, options.plan, service, device=options.device, threads=options.threads)
