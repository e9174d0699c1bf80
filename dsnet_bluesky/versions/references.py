"""References to models: what ``dsnet``, ``dsnet:production`` and ``dsnet:latest`` stand for.

Aliases lie in ``aliases.toml`` of the installation: a table for each model, alias to version. Those that this package is
released with lie beside its models; what is set in the installation comes first.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from dsnet_bluesky.atomic import replacing
from dsnet_bluesky.data import BadInput

from .cards import CARD
from .numbers import SEMANTIC, is_release
from .readme import to_toml
from .shelves import ENVIRONMENT, folders, installation, model_roots

__all__ = ["ALIASES", "LATEST", "PRODUCTION", "aliases_of", "remove_alias", "resolve", "set_alias"]

ALIASES = "aliases.toml"

LATEST = "latest"
"""The newest version that is released; it cannot be set."""

PRODUCTION = "production"
"""What is meant where no version is named: as this package was released, until somebody sets it; else the newest version."""

_ALIAS = re.compile("[a-z][a-z0-9_-]*")


def resolve(reference: str) -> str:
    """Say which version of a model is meant. Whatever begins work calls this first, and keeps the answer.

    Parameters
    ----------
    reference
        ``"dsnet"`` (that in production), ``"dsnet:2.0.0"``, an alias (``"dsnet:production"``, ``"dsnet:latest"``),
        or the path of a model's folder.

    Returns
    -------
    str
        ``"dsnet:2.0.0"``; a path as it stands.

    Raises
    ------
    BadInput
        If there is no such model, version or alias, or the alias stands for a version that is not there.
    """
    name, _, asked = reference.partition(":")
    versions = _versions(name)
    if not versions and (Path(reference) / CARD).is_file():
        return reference
    if not versions or (SEMANTIC.fullmatch(asked) and asked not in versions):
        raise _unknown(reference)
    if asked in versions:
        return reference
    known, alias = aliases_of(name), asked or PRODUCTION
    if alias not in known:
        raise _unknown_alias(name, alias, known)
    if known[alias] not in versions:
        raise BadInput(
            f"{name}:{alias} stands for {known[alias]}, which is not here; there are {', '.join(versions)}. Install it, "
            f"or set the alias: `dsnet-bluesky models alias {name}:{alias} VERSION`."
        )
    return f"{name}:{known[alias]}"


def aliases_of(name: str) -> dict[str, str]:
    """Give the aliases of a model and the versions that they stand for, defaults included.

    Raises
    ------
    BadInput
        If the file of aliases cannot be read.
    """
    released = [version for version in _versions(name) if is_release(version)]
    newest = {LATEST: released[-1]} if released else {}
    default = {PRODUCTION: released[-1]} if released else {}
    shipped = {k: v for root in model_roots() for k, v in _read(root / ALIASES).get(name, {}).items()}
    return {**default, **shipped, **_read().get(name, {}), **newest}


def set_alias(reference: str, version: str) -> str:
    """Let an alias stand for a version from now on. Work that has begun goes on with the version it began with.

    Parameters
    ----------
    reference
        ``"NAME:ALIAS"``.
    version
        Of the same model: ``"2.1.0"``, or another of its aliases, which is resolved now.

    Returns
    -------
    str
        ``"NAME:VERSION"``.

    Raises
    ------
    BadInput
        If it cannot be an alias, or there is no such version.
    """
    name, alias = _alias(reference)
    resolved = resolve(f"{name}:{version}")
    aliases = _read()
    aliases.setdefault(name, {})[alias] = resolved.partition(":")[2]
    _write(aliases)
    return resolved


def remove_alias(reference: str) -> None:
    """Forget an alias; ``production`` stands for what it was released as again.

    Raises
    ------
    BadInput
        If it was not set.
    """
    name, alias = _alias(reference)
    aliases = _read()
    if alias not in aliases.get(name, {}):
        raise BadInput(f"The alias {reference} is not set; `dsnet-bluesky models alias` shows those that are.")
    del aliases[name][alias]
    _write({name: table for name, table in aliases.items() if table})


def _versions(name: str) -> list[str]:
    return [version for known, version in folders() if known == name]


def _unknown(reference: str) -> BadInput:
    known = ", ".join(f"{name}:{version}" for name, version in folders()) or "none"
    return BadInput(
        f"There is no model {reference!r}. Released models: {known}; install another with `dsnet-bluesky models install PATH` "
        f"(it is looked for in {installation()}; {ENVIRONMENT} names another directory), or give the path of its folder."
    )


def _unknown_alias(name: str, alias: str, known: dict[str, str]) -> BadInput:
    if alias in (LATEST, PRODUCTION):
        return BadInput(f"No version of {name} is released yet, only {', '.join(_versions(name))}; name the version.")
    has = ", ".join(f"{other} ({version})" for other, version in known.items()) or "none"
    return BadInput(
        f"{name}:{alias} is neither a version nor an alias. Versions: {', '.join(_versions(name))}; aliases: {has}. "
        f"`dsnet-bluesky models alias {name}:{alias} VERSION` sets one."
    )


def _alias(reference: str) -> tuple[str, str]:
    """Split what shall become an alias, or cease to be one."""
    name, _, alias = reference.partition(":")
    if not _ALIAS.fullmatch(alias):
        raise BadInput(f"{reference!r} is no alias; write it as NAME:ALIAS in small letters, as dsnet:production.")
    if alias == LATEST:
        raise BadInput(f"{reference} is always the newest released version and cannot be set; set {name}:{PRODUCTION}.")
    return name, alias


def _read(path: Path | None = None) -> dict[str, dict[str, str]]:
    """Read the aliases of a file, by default those of the installation."""
    path = path or installation() / ALIASES
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"The aliases in {path} cannot be read ({error}); correct the file, or remove it.") from error
    for name, table in tables.items():
        if not isinstance(table, dict) or not all(isinstance(version, str) for version in table.values()):
            raise BadInput(f'The aliases in {path} cannot be read: [{name}] must hold lines as production = "2.0.0".')
    return tables


def _write(aliases: dict[str, dict[str, str]]) -> None:
    root = installation()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with replacing(root / ALIASES) as partial:
            partial.write_text(to_toml(aliases), encoding="utf-8")
    except OSError as error:
        raise BadInput(f"Aliases cannot be written to {root} ({error}); {ENVIRONMENT} names another directory.") from error
