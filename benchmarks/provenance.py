"""What a report must say of itself."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from collections.abc import Sequence

from dsnet_bluesky.training import hardware


def provenance(command: str, packages: Sequence[str]) -> str:
    """Say what was run, when, on what (processor and threads), and with which versions."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    date = datetime.datetime.now(datetime.UTC).date()
    return f"`{command}`, {date}, {hardware('cpu')}, Python {platform.python_version()}, {versions}."


def with_model(command: str, model: str) -> str:
    """Add the option ``--model`` to a command, where it is not left at its default."""
    return command if model == "dsnet" else f"{command} --model {model}"
