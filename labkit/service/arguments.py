"""The arguments of ``labkit serve`` and of the launch script, made of `ServiceOptions`. No torch."""

from __future__ import annotations

import argparse
import dataclasses
import os

from labkit.common.options import add_options, settings_of
from labkit.service.options import API_KEY_VARIABLE, EngineOptions, ServiceOptions


def add_service_arguments(command: argparse.ArgumentParser) -> None:
    """One argument for each option of the service, and of its engine."""
    add_options(command, ServiceOptions)
    add_options(command, EngineOptions)


def options_of(namespace: argparse.Namespace) -> ServiceOptions:
    """The options in parsed arguments; the key may come from the environment.

    Raises:
        LabError: an option out of range, or of another engine.
    """
    settings_of(namespace, EngineOptions)
    options = settings_of(namespace, ServiceOptions)
    return dataclasses.replace(options, api_key=options.api_key or os.environ.get(API_KEY_VARIABLE) or None)
