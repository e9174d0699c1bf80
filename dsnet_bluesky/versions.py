"""Released models: named, versioned, and refused when a byte of them has changed.

A model is a folder ``NAME-VERSION`` with ``weights.safetensors`` and its card
``model.toml``. Nothing here imports torch: a server can name the version of a
model without being able to run it.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .data import BadInput

__all__ = ["Model", "load_model", "released_models", "sha256_of", "write_card"]

WEIGHTS = "weights.safetensors"
CARD = "model.toml"


@dataclass(frozen=True)
class Model:
    """A released model whose weights have been checked.

    Parameters
    ----------
    name, version
        As its card says.
    sha256
        SHA-256 of the weights.
    path
        Its folder.
    card
        What ``model.toml`` holds: architecture, data, ranges, figures, licence.
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


def model_roots() -> list[Path]:
    """Folders that may hold released models: of the source tree, and inside an installed wheel."""
    package = Path(__file__).parent
    return [root for root in (package.parent / "models", package / "models") if root.is_dir()]


def released_models() -> list[str]:
    """List the released models as ``NAME:VERSION``, in order of name and version."""
    return [f"{name}:{version}" for name, version in sorted(_folders(), key=_order)]


def load_model(reference: str) -> Model:
    """Find a model and check its weights.

    Parameters
    ----------
    reference
        ``"dsnet-paper"`` (the latest version), ``"dsnet-paper:1.0.0"``, or the path
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
    path = Path(reference)
    return _open(path if (path / CARD).is_file() else _find(reference))


def sha256_of(path: Path) -> str:
    """Give the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_card(directory: Path, card: dict[str, Any]) -> None:
    """Write the card of a model for machines (``model.toml``) and for people (``README.md``).

    Parameters
    ----------
    directory
        The model's folder.
    card
        Plain values: strings, numbers, lists and tables of them.
    """
    (directory / "README.md").write_text(_readme(card), encoding="utf-8")
    (directory / CARD).write_text(_toml(card), encoding="utf-8")


def _readme(card: dict[str, Any]) -> str:
    limits = "\n".join(f"- {limit}" for limit in card["limits"])
    made = card["made"]
    return f"""# {card["name"]} {card["version"]}

{card["summary"]}

**Use.** {card["use"]}

**Limits.**

{limits}

{_published(card) if "form_factor" in card["data"] else _unrolled(card)}

![Losses over the epochs](history.png)

**Made** on {made["date"]} with torch {made["torch"]} in {made["seconds"] / 60:.0f} minutes on {made["hardware"]}.
`dsnet-bluesky train {card["name"]}` repeats it from `recipe.toml`.

**Licence.** {card["licence"]}. The SHA-256 of the weights is in `model.toml` and is checked whenever they are loaded.
"""


def _published(card: dict[str, Any]) -> str:
    """Tell data and figures of the published DSNet."""
    data, figures = card["data"], card["figures"]
    curves, q = data["values"], data["q"]
    return f"""**Training data.** {curves["count"]} curves of the sasmodels form factor `{data["form_factor"]}`,
{data["parameter"]} {curves["first"]:g} to {curves["last"]:g} angstrom, background {data["background"]:g} 1/cm,
q {q["first"]:g} to {q["last"]:g} 1/nm in {q["count"]} points, smeared by a stationary Gaussian of sigma {data["sigma"]:g} 1/nm,
without noise; {data["training"]} for training, {data["validation"]} for validation. No measured data.

**Figures** (mean squared error of ln I). At epoch {figures["epoch"]} of {figures["epochs"]}, whose weights are kept:
training {figures["training_loss"]:.4g}, validation {figures["validation_loss"]:.4g}.
The validation curves as they are, smeared: {figures["validation_loss_untreated"]:.4g}."""


def _unrolled(card: dict[str, Any]) -> str:
    """Tell data and figures of the network of dsnet 2."""
    data, figures, calibration = card["data"], card["figures"], card["calibration"]
    families = {split: ", ".join(data[split]) for split in ("training", "validation", "test")}
    shares = ", ".join(
        f"{share:g} over {length:g}"
        for length, share in zip(calibration["correlation"]["lengths"], calibration["correlation"]["shares"], strict=True)
    )
    return f"""**Training data.** {data["curves"]} curves measured in {data["sessions"]} sessions, each with an instrument of
its own (Gaussian, pinhole and odd kernels, rings and masked sectors of an area detector, slits, wavelength spread; linear,
logarithmic and measured grids, with gaps), counting and relative noise, stated well, badly or not at all. No measured
data. Spheres, cylinders and cubic paracrystals with the dimensionless parameters of the paper's tables are left out by a margin.

- Training families: {families["training"]}; peaks on power laws, gratings, and mixtures of all.
- Validation families, by which choices were made and errors calibrated: {families["validation"]}.
- Test families, which no choice has seen: {families["test"]}.

**Figures** on validation families (geometric mean over curves of the mean squared error of ln I): {figures["validation"]:.2g};
20 steps of Richardson and Lucy's iteration {figures["untreated"]:.2g}, the indirect transform {figures["indirect"]:.2g}.

**Errors.** Correlated, by shares of the variance and lengths in local resolutions: {shares}."""


def _toml(table: dict[str, Any], prefix: str = "") -> str:
    lines = [f"{key} = {_toml_value(value)}" for key, value in table.items() if not isinstance(value, dict)]
    for key, value in table.items():
        if isinstance(value, dict):
            lines.append(f"\n[{prefix}{key}]\n{_toml(value, f'{prefix}{key}.')}".rstrip("\n"))
    return "\n".join(lines) + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, list) and any(isinstance(item, str) for item in value):
        return "[\n" + "".join(f"    {_toml_value(item)},\n" for item in value) + "]"
    # Strings, numbers, booleans and lists of numbers are written alike in JSON and TOML.
    return json.dumps(value, ensure_ascii=False)


def _folders() -> dict[tuple[str, str], Path]:
    """Every released model: (name, version) to its folder. The source tree wins over the wheel."""
    found = {}
    for root in reversed(model_roots()):
        for card in root.glob(f"*-*/{CARD}"):
            name, _, version = card.parent.name.rpartition("-")
            found[name, version] = card.parent
    return found


def _order(key: tuple[str, str]) -> tuple[str, list[tuple[bool, int, str]]]:
    """Sort by name, then by version with its numbers as numbers."""
    return key[0], [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in key[1].split(".")]


def _find(reference: str) -> Path:
    name, _, version = reference.partition(":")
    folders = _folders()
    matches = [key for key in sorted(folders, key=_order) if key[0] == name and version in ("", key[1])]
    if not matches:
        known = ", ".join(released_models()) or "none"
        raise BadInput(f"There is no model {reference!r}. Released models: {known}; a path of a model's folder serves as well.")
    return folders[matches[-1]]


def _open(path: Path) -> Model:
    try:
        card = tomllib.loads((path / CARD).read_text(encoding="utf-8"))
        name, version, expected = card["name"], card["version"], card["weights_sha256"]
    except (tomllib.TOMLDecodeError, KeyError, UnicodeDecodeError) as error:
        raise BadInput(f"The card {path / CARD} cannot be read ({error}); install the model again.") from error
    weights = path / WEIGHTS
    if not weights.is_file():
        others = sorted(p.name for p in path.iterdir() if p.suffix in {".pt", ".pth", ".pkl", ".ckpt", ".bin"})
        also = f" {', '.join(others)} will not be read: such files can run code." if others else ""
        raise BadInput(f"Model {name} {version} has no {WEIGHTS} in {path}.{also}")
    found = sha256_of(weights)
    if found != expected:
        raise BadInput(
            f"The weights of model {name} {version} were altered: SHA-256 {found[:12]}..., the card says {expected[:12]}.... "
            "Install the model again, or train it and give it a version of its own."
        )
    return Model(name, version, found, path, card)
