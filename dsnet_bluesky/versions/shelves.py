"""Where models lie: released with this package, or installed beside them."""

from __future__ import annotations

import os
import re
from pathlib import Path

import platformdirs

from .cards import CARD, NAME
from .numbers import SEMANTIC, version_order

__all__ = ["ENVIRONMENT", "copies", "folders", "installation", "model_roots"]

ENVIRONMENT = "DSNET_MODELS"
"""Environment variable that names the directory of models of one's own."""

_FOLDER = re.compile(rf"(?P<name>{NAME})-(?P<version>{SEMANTIC.pattern})")

Key = tuple[str, str]
"""Name and version."""


def model_roots() -> list[Path]:
    """Folders of released models: of the source tree, and inside an installed wheel."""
    package = Path(__file__).parents[1]
    return [root for root in (package.parent / "models", package / "models") if root.is_dir()]


def installation() -> Path:
    """Directory of models of one's own: ``$DSNET_MODELS``, or one of the user's. It need not exist yet."""
    named = os.environ.get(ENVIRONMENT)
    return Path(named).expanduser() if named else platformdirs.user_data_path("dsnet-bluesky", appauthor=False) / "models"


def copies() -> dict[Key, list[Path]]:
    """Find all models, in order of name and version: (name, version) to its folders, of which the first counts.

    What is released comes before what is installed: a version of one's own cannot take its place.
    """
    found: dict[Key, list[Path]] = {}
    for root in (*model_roots(), installation()):
        for card in root.glob(f"*/{CARD}"):
            if named := _FOLDER.fullmatch(card.parent.name):
                found.setdefault((named["name"], named["version"]), []).append(card.parent)
    return {key: found[key] for key in sorted(found, key=lambda key: (key[0], version_order(key[1])))}


def folders() -> dict[Key, Path]:
    """Find all models, in order of name and version: (name, version) to its folder."""
    return {key: paths[0] for key, paths in copies().items()}
