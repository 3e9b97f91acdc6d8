"""``labkit doctor``: what this machine can run, and what is missing."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from labkit.cli.arguments import Commands, add_command
from labkit.measure.diagnosis import NOTE, OK, PROBLEM, Finding, diagnose

MARKS = {OK: "✓", NOTE: "·", PROBLEM: "✗"}


def add(commands: Commands) -> None:
    """Add the command to the command line."""
    add_command(commands, "doctor", run, "say what this machine can run, and what is missing", config=False)


def run(options: argparse.Namespace) -> int:
    """Print the diagnosis. Returns 1 if there is a problem, else 0."""
    findings = diagnose()
    print(render(findings))
    return int(any(finding.status == PROBLEM for finding in findings))


def render(findings: Iterable[Finding]) -> str:
    """The findings as text, with a heading for each topic and the number of problems at the end."""
    findings = list(findings)
    lines: list[str] = []
    topic = None
    for finding in findings:
        if finding.topic != topic:
            lines += ([""] if lines else []) + [finding.topic]
            topic = finding.topic
        lines.append(f"  {MARKS[finding.status]} {finding.text}")
        if finding.advice:
            lines.append(f"      {finding.advice}")
    problems = sum(finding.status == PROBLEM for finding in findings)
    verdict = (
        f"{problems} problem{'s' if problems != 1 else ''} found." if problems else "Nothing is missing."
    )
    return "\n".join([*lines, "", verdict])
