"""The registry of models: named, versioned, and refused when a byte of them has changed.

A model is a folder ``NAME-VERSION`` with ``weights.safetensors`` and its card ``model.toml``. Some are released
with this package; others are installed beside them (`install_model`). A version is immutable. An alias
(``dsnet:production``) is resolved to a version before work begins, and the version is what is recorded.
Nothing here imports torch: a server can name the version of a model without being able to run it.
"""

from .cards import CARD, WEIGHTS, Card, CompleteCard
from .installing import Installed, install_model
from .numbers import is_release, version_order
from .readme import write_card
from .references import aliases_of, remove_alias, resolve, set_alias
from .registry import Listed, Model, list_models, load_model, released_models, sha256_of
from .shelves import ENVIRONMENT, installation

__all__ = [
    "CARD",
    "ENVIRONMENT",
    "WEIGHTS",
    "Card",
    "CompleteCard",
    "Installed",
    "Listed",
    "Model",
    "aliases_of",
    "install_model",
    "installation",
    "is_release",
    "list_models",
    "load_model",
    "released_models",
    "remove_alias",
    "resolve",
    "set_alias",
    "sha256_of",
    "version_order",
    "write_card",
]
