"""Cards of models, ``model.toml``: what they must say."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, PositiveInt, StringConstraints, ValidationError

from dsnet_bluesky.data import BadInput

from .numbers import SEMANTIC

__all__ = ["CARD", "NAME", "WEIGHTS", "Card", "CompleteCard", "Inputs", "read_card"]

WEIGHTS = "weights.safetensors"
CARD = "model.toml"

NAME = "[a-z][a-z0-9_]*(?:-[a-z0-9_]+)*"
"""A name of a model: ``dsnet``, ``dsnet-paper``."""


def _sha256(text: str) -> str:
    if not re.fullmatch("[0-9a-f]{64}", text):
        raise ValueError("it must be a SHA-256, 64 hexadecimal digits")
    return text


def _name(text: str) -> str:
    if not re.fullmatch(NAME, text):
        raise ValueError(f"{text!r} is no name; write it in small letters, as dsnet-own")
    return text


def _semantic(text: str) -> str:
    if not SEMANTIC.fullmatch(text):
        raise ValueError(f"{text!r} is no semantic version; write it as 2.1.0, or 2.1.0rc1 before it is released")
    return text


Words = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Digest = Annotated[str, AfterValidator(_sha256)]
Span = FiniteFloat | tuple[FiniteFloat, FiniteFloat]
"""A limit, or the lowest and the highest value."""


class _Table(BaseModel):
    """A table of a card; it may say more than what it must."""

    model_config = ConfigDict(extra="allow")


class Inputs(_Table):
    """What a network is given of a measurement."""

    summary: Words
    """In words."""
    dims: list[Words] = Field(min_length=1)
    """Of the array that the network takes."""
    channels: PositiveInt
    """How many values it has for each point."""
    units: dict[str, Words]
    """Of what these are computed from: q, I, Idev."""


class Data(_Table):
    """What a network was trained on."""

    sha256: Digest
    """Of what the data depend on."""


class Card(_Table):
    """What the card of every model says."""

    name: Words
    version: Words
    licence: Words
    weights_sha256: Digest
    summary: Words
    use: Words
    """What it is for."""
    limits: list[Words]
    architecture: dict[str, Any]
    data: dict[str, Any]
    ranges: dict[str, Span] = Field(min_length=1)
    """That it was trained on; what lies outside is flagged OUT_OF_RANGE."""
    figures: dict[str, FiniteFloat] = Field(min_length=1)
    """Figures of merit."""
    made: dict[str, Any]


class CompleteCard(Card):
    """What the card of a model says that is to be installed: models released before this was asked for say less."""

    name: Annotated[str, AfterValidator(_name)]
    version: Annotated[str, AfterValidator(_semantic)]
    inputs: Inputs
    data: Data  # pyright: ignore[reportIncompatibleVariableOverride]


def read_card(folder: Path, kind: type[Card] = Card) -> dict[str, Any]:
    """Read the card of a model.

    Parameters
    ----------
    folder
        Of the model.
    kind
        What it must say.

    Raises
    ------
    BadInput
        If there is none, it cannot be read, or does not say what it must.
    """
    path = folder / CARD
    try:
        card = tomllib.loads(path.read_text(encoding="utf-8"))
        kind.model_validate(card)
    except FileNotFoundError as error:
        raise BadInput(f"There is no model in {folder}: it holds no {CARD}. Give the folder that a training wrote.") from error
    except ValidationError as error:
        raise BadInput(
            f"The card {path} cannot be read as one: {_words(error)}. Compare it with that of a released model, "
            "and install the model again."
        ) from error
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"The card {path} cannot be read ({error}); install the model again.") from error
    return card


def _words(error: ValidationError) -> str:
    """Say everything that is wrong, each with its place."""
    found = []
    for each in error.errors():
        place = ".".join(str(part) for part in each["loc"] if not str(part).startswith(("float", "tuple")))
        said = each["msg"].removeprefix("Value error, ")
        found.append(f"{place} is missing" if each["type"] == "missing" else f"{place}: {said[0].lower()}{said[1:]}")
    return "; ".join(dict.fromkeys(found))
