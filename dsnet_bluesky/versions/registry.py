"""Models that can be used: found by name, version, alias or path, and checked."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from dsnet_bluesky.data import BadInput

from .cards import WEIGHTS, Card, read_card
from .references import aliases_of, resolve
from .shelves import copies, folders, installation

__all__ = ["EXECUTABLE", "Listed", "Model", "list_models", "load_model", "open_model", "released_models", "sha256_of"]

EXECUTABLE = {".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".bin", ".joblib", ".dill", ".npy", ".h5", ".keras", ".py", ".so"}
"""How names of files end that may run code when they are read."""


@dataclass(frozen=True)
class Model:
    """A model whose weights have been checked.

    Parameters
    ----------
    name, version
        As its card says.
    sha256
        SHA-256 of the weights.
    path
        Its folder.
    card
        What ``model.toml`` holds: inputs, architecture, data, ranges, figures, licence.
    """

    name: str
    version: str
    sha256: str
    path: Path
    card: dict[str, Any] = field(repr=False)

    @property
    def weights(self) -> Path:
        """The file of weights."""
        return self.path / WEIGHTS

    @property
    def reference(self) -> str:
        """``NAME:VERSION``."""
        return f"{self.name}:{self.version}"


@dataclass(frozen=True)
class Listed:
    """A model of the registry, be it intact or not.

    Parameters
    ----------
    reference
        ``NAME:VERSION``.
    aliases
        That stand for it.
    sha256
        Of its weights; empty if it is damaged.
    problem
        What is wrong, and what to do; empty if it is intact.
    origin
        Whether it came with this package or was installed.
    path
        Its folder.
    """

    reference: str
    aliases: list[str]
    sha256: str
    problem: str
    origin: Literal["released", "installed"]
    path: Path

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-serialisable values."""
        return {**asdict(self), "state": "damaged" if self.problem else "intact", "path": str(self.path)}


def released_models() -> list[str]:
    """List the models at hand, released or installed, as ``NAME:VERSION``, in order of name and version."""
    return [f"{name}:{version}" for name, version in folders()]


def list_models() -> list[Listed]:
    """List the models at hand and check them."""
    return [_listed(name, version, paths) for (name, version), paths in copies().items()]


def load_model(reference: str) -> Model:
    """Find a model and check it.

    Parameters
    ----------
    reference
        ``"dsnet"`` (the version in production), ``"dsnet:2.0.0"``, an alias, ``"dsnet:latest"``, or the path
        of a model's folder.

    Returns
    -------
    Model
        Its name, version, checksum, folder and card.

    Raises
    ------
    BadInput
        If there is no such model, its card or weights are missing, or the
        weights are not those of the card.
    """
    resolved = resolve(reference)
    name, _, version = resolved.partition(":")
    folder = folders().get((name, version))
    if folder is None:
        return open_model(Path(resolved))
    model = open_model(folder)
    if model.reference != resolved:
        raise BadInput(f"{folder} holds {model.reference}; a version is never renamed. Remove the folder and install the model.")
    return model


def open_model(path: Path, kind: type[Card] = Card) -> Model:
    """Check the model in a folder: its card, that its weights are safetensors, and that they are those of the card.

    Raises
    ------
    BadInput
        If something is wrong with it.
    """
    card = read_card(path, kind)
    name, version, expected = card["name"], card["version"], card["weights_sha256"]
    weights = path / WEIGHTS
    if not weights.is_file():
        others = sorted(p.name for p in path.iterdir() if p.suffix.lower() in EXECUTABLE)
        also = f" {', '.join(others)} will not be read: such files can run code." if others else ""
        raise BadInput(f"Model {name} {version} has no {WEIGHTS} in {path}.{also} Install the model again.")
    found = sha256_of(weights)
    if found != expected:
        raise BadInput(
            f"The weights of model {name} {version} were altered: SHA-256 {found[:12]}..., the card says {expected[:12]}.... "
            "Install the model again, or train it and give it a version of its own."
        )
    _check_weights(weights)
    return Model(name, version, found, path, card)


def sha256_of(path: Path) -> str:
    """Give the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_weights(path: Path) -> None:
    """Refuse what only bears the name: safetensors account for every byte of their file."""
    try:
        with safe_open(path, framework="numpy") as file:
            if file.keys():
                return
            why = "it holds no tensor"
    except SafetensorError as error:
        why = str(error)
    raise BadInput(f"{path} holds no safetensors ({why}); anything else can run code and is not read. Train the model again.")


def _listed(name: str, version: str, paths: list[Path]) -> Listed:
    reference, problem, sha256 = f"{name}:{version}", "", ""
    try:
        sha256 = load_model(reference).sha256
        _check_copies(reference, sha256, paths)
    except BadInput as error:
        problem = str(error)
    aliases = [alias for alias, stands_for in aliases_of(name).items() if stands_for == version]
    origin = "installed" if paths[0].parent == installation() else "released"
    return Listed(reference, aliases, sha256, problem, origin, paths[0])


def _check_copies(reference: str, sha256: str, paths: list[Path]) -> None:
    """See that a version is the same everywhere: one of one's own may since have been released with other weights."""
    for other in paths[1:]:
        if not (other / WEIGHTS).is_file() or sha256_of(other / WEIGHTS) != sha256:
            raise BadInput(
                f"There are two models {reference}: that in {paths[0]} is used, and {other} holds other weights. "
                "Give the latter a version of its own, or remove it."
            )
