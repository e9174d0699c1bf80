"""What is compared: a model in a version, or a classical method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from packaging.version import InvalidVersion, Version
from tiled.queries import Key

from dsnet_bluesky.data import BadInput
from dsnet_bluesky.desmearing import METHODS
from dsnet_bluesky.kinds import FRAME_MODELS
from dsnet_bluesky.questions import Model
from dsnet_bluesky.versions import load_model, released_models, version_order

__all__ = ["Reference", "parse_reference"]


@dataclass(frozen=True)
class Reference:
    """A method, with the version of its model where it has one.

    Attributes
    ----------
    name
        A key of `desmearing.METHODS`.
    version
        Of its model; empty for a method without models.
    """

    name: str
    version: str = ""

    def __str__(self) -> str:
        return f"{self.name}:{self.version}" if self.version else self.name

    @property
    def remedy(self) -> str:
        """What to do where it has no results: make them, if the model is here."""
        here = [model for model in released_models() if model.partition(":")[0] == self.name]
        if self.version and str(self) not in here:
            return f"there is no such model here: there are {', '.join(here)}; name one of them, or install it"
        return f"make them with `dsnet-bluesky replay --model {self}`"

    def searches(self) -> list[list[Any]]:
        """Return searches, each of queries of Tiled, that together find its results.

        A run that failed before its model was loaded has no version: it counts where the configuration named this one.
        """
        if not self.version:
            return [[Key("method") == self.name]]
        early = [Key("method") == self.name, Key("status") == "failed", Key("config.method") == str(self)]
        return [Model(self.name, f"=={self.version}").queries(), [*early, Key("model_version") == ""]]

    def made(self, said: Mapping[str, Any]) -> bool:
        """Whether it made a result, by the result's metadata; the same as `searches`."""
        if said["method"] != self.name:
            return False
        if not self.version:
            return True
        if said["model_version"]:
            return said["model_order"] == version_order(self.version)
        return said["status"] == "failed" and said["config"].get("method") == str(self)


def parse_reference(text: str) -> Reference:
    """Read ``dsnet:2.0.0``, ``dsnet`` (the version that is used by default) or ``ift``.

    A version need not be installed here: its results may have been made elsewhere.

    Raises
    ------
    BadInput
        If there is no such method or model.
    """
    name, _, version = text.partition(":")
    if name in FRAME_MODELS:
        raise BadInput(
            f"{name} reads frames, and what is compared here are desmeared curves. Put two versions side by side with "
            f"""client["{FRAME_MODELS[name].mount}"].search(Model("{name}")).to_table()."""
        )
    if name not in METHODS:
        known = ", ".join(sorted(METHODS))
        raise BadInput(f"There is no method {name!r}; the methods are {known}; a version may follow: dsnet:2.0.0.")
    if name not in {reference.partition(":")[0] for reference in released_models()}:
        if version:
            raise BadInput(f"{name} has no released models, so there is no {text!r}; leave out the version.")
        return Reference(name)
    try:
        return Reference(name, str(Version(version)))
    except InvalidVersion:
        return Reference(name, load_model(text).version)
