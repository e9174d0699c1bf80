"""What all commands share: the app, their errors, the server's address, and how they print."""

from __future__ import annotations

import json
import math
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

if TYPE_CHECKING:
    from dsnet_bluesky.pipeline import Config

__all__ = [
    "FRAMES_HELP",
    "LOCAL",
    "METHOD_HELP",
    "ApiKey",
    "Commands",
    "Options",
    "Uri",
    "app",
    "checked_config",
    "connect",
    "finite",
    "parse_options",
    "say",
]

METHOD_HELP = (
    "dsnet, dsnet-fast, map, ift, lake, wiener, cme or dsnet-paper; a version or an alias may follow: dsnet:2.0.0, dsnet:latest."
)
FRAMES_HELP = "Of models that read frames: icosahedra, symmetry-denoiser."


class Commands(TyperGroup):
    """Commands that answer unusable input with one line on stderr and status 2."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except ValueError as error:
            from dsnet_bluesky.data import BadInput

            if not isinstance(error, BadInput):
                raise
            raise _ended(error) from None
        except Exception as error:
            if "httpx" not in sys.modules:  # then no server was asked
                raise
            from dsnet_bluesky.callbacks.sample_runs import key_refused

            refusal = key_refused(error)
            if refusal is None:
                raise
            raise _ended(refusal) from None


def _ended(error: ValueError) -> typer.Exit:
    """Say what is wrong, in one line; what ends the command."""
    say(f"Error: {' '.join(str(error).split())}", style="bold red", stderr=True)
    return typer.Exit(2)


app = typer.Typer(cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich")


def finite(param: typer.CallbackParam, value: float | None) -> float | None:
    """Take numbers that are numbers: nan and inf parse as floats too."""
    if value is not None and not math.isfinite(value):
        from dsnet_bluesky.data import BadInput

        raise BadInput(f"{param.opts[0]} is {value}; give a finite number.")
    return value


Uri = Annotated[str, typer.Option(envvar="TILED_URI", help="Address of the Tiled server.")]
ApiKey = Annotated[str | None, typer.Option(envvar="TILED_API_KEY", help="Its API key.", show_default=False)]
Options = Annotated[
    list[str] | None, typer.Option("--option", "-o", metavar="NAME=VALUE", help="Option of the method; repeatable.")
]
LOCAL = "http://127.0.0.1:8000"


@app.callback(invoke_without_command=True)
def main(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    """Desmearing of small-angle scattering, from exposures in Bluesky to results in Tiled."""
    if version:
        from dsnet_bluesky import __version__

        say(__version__)
        raise typer.Exit


def checked_config(method: str, option: list[str] | None = None, device: str = "cpu") -> Config:
    """Settle and check what is to be done, before a server is asked for anything.

    Raises
    ------
    BadInput
        If there is no such method, model, option or device.
    """
    from dsnet_bluesky.pipeline import Config

    if device != "cpu":
        from dsnet_bluesky.network import check_device

        check_device(device)
    config = Config(method=method, options=parse_options(option), device=device)
    config.check()
    return config


def parse_options(texts: list[str] | None) -> dict[str, Any]:
    """Read options of a method.

    Raises
    ------
    BadInput
        If one is not written as NAME=VALUE.
    """
    return dict(_parse_option(text) for text in texts or [])


def _parse_option(text: str) -> tuple[str, Any]:
    """Split NAME=VALUE; the value is JSON where it is one, else a string."""
    from dsnet_bluesky.data import BadInput

    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise BadInput(f"--option {text}: write it as NAME=VALUE, e.g. --option iterations=20.")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def say(text: str, *, style: str | None = None, stderr: bool = False) -> None:
    """Print as it stands: no line is broken, no bracket taken for markup."""
    Console(stderr=stderr).print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def connect(uri: str, api_key: str | None) -> Any:
    """Return the client of the root of a server, or raise what a user can act on.

    Raises
    ------
    BadInput
        If no Tiled server can be reached there, or it does not let us in.
    """
    import httpx
    from tiled.client import from_uri
    from tiled.client.context import CannotPrompt

    from dsnet_bluesky.data import BadInput

    # As it goes into a header. Here, because the client's own message would show the key.
    if api_key and not (api_key.isascii() and api_key.isprintable() and " " not in api_key):
        raise BadInput("The API key holds a blank or a letter that no key can hold; check --api-key or TILED_API_KEY.")
    try:
        return from_uri(uri, api_key=api_key)
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise BadInput(f"{uri} is no address of a server ({error}); write --uri as {LOCAL}.") from error
    except httpx.TransportError as error:
        raise BadInput(
            f"No Tiled server answers at {uri} ({error}); start one with `dsnet-bluesky serve`, or give --uri."
        ) from error
    except httpx.HTTPStatusError as error:
        raise BadInput(_refusal(uri, error.response.status_code)) from error
    except (RuntimeError, CannotPrompt) as error:
        if api_key:
            raise
        raise BadInput(f"The Tiled server at {uri} wants an API key; give --api-key, or set TILED_API_KEY.") from error
    except (ValueError, LookupError, TypeError) as error:  # an answer that Tiled's client cannot read
        raise BadInput(f"What answers at {uri} is no Tiled server; check --uri, such as {LOCAL}.") from error


def _refusal(uri: str, status: int) -> str:
    """Say what a server means by a status that is no success."""
    if status in (401, 403):
        return f"The Tiled server at {uri} refuses the key ({status}); check --api-key or TILED_API_KEY."
    if status >= 500:
        return f"The server at {uri} is in trouble ({status}): try again later, or look at its log."
    if status == 404:
        return f"The server at {uri} has nothing there (404); check the path in --uri, such as {LOCAL}."
    return f"The server at {uri} does not take the request ({status}); check --uri."
