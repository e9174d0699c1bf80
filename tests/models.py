"""Models for tests: small ones that only the registry knows, and copies of the released one with a version of their own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from dsnet_bluesky.features import INPUTS
from dsnet_bluesky.versions import WEIGHTS, load_model, sha256_of
from dsnet_bluesky.versions.readme import to_toml


def card_of(name: str, version: str, sha256: str, **changes: Any) -> dict[str, Any]:
    """A card that says all that is asked for."""
    card = {
        "name": name,
        "version": version,
        "licence": "BSD-3-Clause",
        "weights_sha256": sha256,
        "summary": "Nothing but a test.",
        "use": "Tests.",
        "limits": ["It does nothing."],
        "inputs": INPUTS,
        "architecture": {"parameters": 2},
        "data": {"curves": 1, "sha256": "0" * 64},
        "ranges": {"points": [50, 600], "width": 3.0},
        "figures": {"loss": 0.1},
        "made": {"date": "2026-11-27"},
    }
    return {key: value for key, value in {**card, **changes}.items() if value is not None}


def small_model(folder: Path, name: str = "net", version: str = "1.0.0", weight: float = 0.0, **changes: Any) -> Path:
    """A model of two numbers; changes are entries of its card, None leaves one out."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"w": np.full(2, weight)}, folder / WEIGHTS)
    card = card_of(name, version, sha256_of(folder / WEIGHTS), **changes)
    (folder / "model.toml").write_text(to_toml(card), encoding="utf-8")
    return folder


def own_model(folder: Path, version: str = "2.2.0", *, retrained: bool = True, **changes: Any) -> Path:
    """The released dsnet with another version, a card that says all, and, if retrained, slightly other weights."""
    shutil.copytree(load_model("dsnet:2.0.0").path, folder)
    if retrained:
        tensors = load_file(folder / WEIGHTS)
        save_file({name: values * np.float32(1.0001) for name, values in tensors.items()}, folder / WEIGHTS)
    card = {**load_model("dsnet:2.0.0").card, "version": version, "inputs": INPUTS, **changes}
    card["data"] = {**card["data"], "sha256": "1" * 64}
    card["weights_sha256"] = sha256_of(folder / WEIGHTS)
    (folder / "model.toml").write_text(to_toml(card), encoding="utf-8")
    return folder
