"""Models: ``dsnet-bluesky train`` and ``dsnet-bluesky models list|show|verify|install|alias``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .common import LOCAL, ApiKey, Uri, app, connect, say

if TYPE_CHECKING:
    from dsnet_bluesky.versions import Listed, Model

__all__ = ["alias", "install", "list_", "models", "show", "train", "verify"]

models = typer.Typer(help="Models: list, verify, install and promote them.", no_args_is_help=True)
app.add_typer(models, name="models")
Json = Annotated[bool, typer.Option("--json", help="For programs.")]
DENOISER = "symmetry-denoiser"
"""What learns from runs of the catalog, not by a recipe alone."""

REFERENCE_HELP = "NAME (the version in production), NAME:VERSION, NAME:ALIAS, or the path of a model's folder."


@app.command()
def train(
    recipe: Annotated[
        str, typer.Argument(help="A released model's name (dsnet, icosahedra ...), a recipe file, or symmetry-denoiser.")
    ] = "dsnet-paper",
    output: Annotated[Path | None, typer.Option(help="Folder of the new model. [dim]Default: its name here[/]")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda ...")] = "cpu",
    query: Annotated[
        list[str] | None,
        typer.Option(help="For symmetry-denoiser, runs to learn from: sample=fibres, run=UID, since=2026-11-30; repeatable."),
    ] = None,
    name: Annotated[str, typer.Option(help="Of a symmetry-denoiser.")] = DENOISER,
    version: Annotated[str, typer.Option(help="Of a symmetry-denoiser.")] = "1.0.0",
    variant: Annotated[
        str, typer.Option(help="Of a symmetry-denoiser: symmetry, or paper for the published algorithm.")
    ] = "symmetry",
    steps: Annotated[int | None, typer.Option(help="Of a symmetry-denoiser.", show_default=False)] = None,
    seed: Annotated[int, typer.Option(help="Of a symmetry-denoiser.")] = 1,
    installed: Annotated[bool, typer.Option("--install", help="Install the model when it is trained.")] = False,
    uri: Uri = LOCAL,
    api_key: ApiKey = None,
) -> None:
    """Train a network by its recipe, or a denoiser on runs of the catalog; an interrupted training goes on where it stopped."""
    from dsnet_bluesky import training
    from dsnet_bluesky.data import BadInput
    from dsnet_bluesky.network import check_device

    check_device(device)
    if recipe == DENOISER:
        named = {"name": name, "version": version, "seed": seed, **({} if steps is None else {"steps": steps})}
        target = output or Path(f"{name}-{version}")
        _train_denoiser(target, query or [], variant, named, device, lambda: connect(uri, api_key))
    else:
        if query:
            raise BadInput(f"{recipe} does not learn from runs; leave out --query, or train {DENOISER}.")
        parsed = training.load_recipe(recipe)
        target = output or Path(f"{parsed.name}-{parsed.version}")
        with _notifying(parsed.name) as notify:
            training.train(parsed, target, device=device, notify=notify)
    say(f"Written: {target}")
    if installed:
        install(target)


def _train_denoiser(
    target: Path, query: list[str], variant: str, named: dict[str, Any], device: str, client: Callable[[], Any]
) -> None:
    """Train a denoiser on the runs that a query finds."""
    from dsnet_bluesky.data import BadInput
    from dsnet_bluesky.learning import train_on_runs
    from dsnet_bluesky.questions import parse_query
    from dsnet_bluesky.training.denoiser import DenoiserRecipe

    if not query:
        raise BadInput("Say which runs to learn from: --query sample=NAME, run=UID, since=DATE or until=DATE.")
    asked = [question for item in query for question in parse_query(item)]
    recipe = DenoiserRecipe.of(variant, **named)
    with _notifying(recipe.name) as notify:
        train_on_runs(client(), target, questions=asked, recipe=recipe, device=device, notify=notify)


@contextmanager
def _notifying(label: str) -> Iterator[Callable[[int, int, str], None]]:
    """Show how far a training is."""
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        *Progress.get_default_columns()[:2],
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[word]}"),
    )
    with Progress(*columns, console=Console()) as progress:
        task = progress.add_task(label, total=None, word="")
        yield lambda done, total, word: progress.update(task, completed=done, total=total, word=word)


@models.command("list")
def list_(as_json: Json = False) -> None:
    """List the models at hand: version, aliases, digest, whether it is intact, and where it is from."""
    from dsnet_bluesky.versions import list_models

    found = list_models()
    if as_json:
        say(json.dumps([model.to_dict() for model in found]))
    else:
        Console().print(_table(found))


@models.command()
def show(reference: Annotated[str, typer.Argument(metavar="MODEL", help=REFERENCE_HELP)], as_json: Json = False) -> None:
    """Show a model's card: what it is for, inputs, ranges, figures of merit, training data, licence, limits."""
    from dsnet_bluesky.versions import load_model

    model = load_model(reference)
    if as_json:
        say(json.dumps({"sha256": model.sha256, "path": str(model.path), "card": model.card}, ensure_ascii=False))
    else:
        Console().print(_card(model))


@models.command()
def verify(
    references: Annotated[list[str] | None, typer.Argument(metavar="[MODEL]...", help=f"{REFERENCE_HELP} All if none.")] = None,
) -> None:
    """Check cards and weights, byte by byte; status 2 if something is damaged."""
    from dsnet_bluesky.versions import list_models, load_model, resolve

    found = {model.reference: model for model in list_models()}
    wanted = [resolve(reference) for reference in references or found]
    damaged = False
    for reference in wanted:
        if reference not in found:  # a path
            model = load_model(reference)
            say(f"{model.reference}  intact  sha256 {model.sha256[:12]}  {model.path}")
            continue
        listed = found[reference]
        damaged |= bool(listed.problem)
        if listed.problem:
            say(f"{reference}  damaged: {listed.problem}", style="bold red")
        else:
            say(f"{reference}  intact  sha256 {listed.sha256[:12]}  {listed.path}")
    if not wanted:
        say("There is no model here.")
    if damaged:
        raise typer.Exit(2)


@models.command()
def install(path: Annotated[Path, typer.Argument(help="Folder of a model, as `dsnet-bluesky train` writes it.")]) -> None:
    """Install a model beside the released ones, in $DSNET_MODELS or the user's data directory."""
    from dsnet_bluesky.versions import install_model

    model, new, left_out = install_model(path)
    say(f"{'Installed' if new else 'Already installed'}: {model.reference}  sha256 {model.sha256[:12]}  {model.path}")
    if new and left_out:
        say(f"Left out, being no part of a model: {', '.join(left_out)}")


@models.command()
def alias(
    reference: Annotated[
        str | None, typer.Argument(metavar="[NAME:ALIAS]", help="Alias, such as dsnet:production.", show_default=False)
    ] = None,
    version: Annotated[
        str | None, typer.Argument(metavar="[VERSION]", help="What it is to stand for, such as 2.1.0.", show_default=False)
    ] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Forget the alias; production is what was released again.")] = False,
) -> None:
    """Let an alias stand for a version; without arguments, show the aliases.

    What runs already goes on with the version that it began with: start watchers anew.
    """
    from dsnet_bluesky.data import BadInput
    from dsnet_bluesky.versions import load_model, remove_alias, resolve, set_alias

    if reference is None:
        _show_aliases()
    elif remove:
        remove_alias(reference)
        say(f"Removed: {reference}")
    elif version is None:
        say(f"{reference} is {resolve(reference)}")
    else:
        if ":" in version:
            raise BadInput(f"{version!r} is no version; write it alone: `dsnet-bluesky models alias dsnet:production 2.0.0`.")
        load_model(f"{reference.partition(':')[0]}:{version}")  # nothing damaged is promoted
        say(f"{reference} is {set_alias(reference, version)} from now on")


def _table(found: list[Listed]) -> Table:
    table = Table("model", "version", "aliases", "sha256", "state", "from", box=None, header_style="bold")
    for model in found:
        name, _, version = model.reference.partition(":")
        state = "[bold red]damaged[/]" if model.problem else "intact"
        place = "this package" if model.origin == "released" else str(model.path)
        table.add_row(name, version, ", ".join(model.aliases), model.sha256[:12], state, place)
    return table


def _show_aliases() -> None:
    from dsnet_bluesky.versions import aliases_of, released_models

    for name in dict.fromkeys(reference.partition(":")[0] for reference in released_models()):
        for word, version in aliases_of(name).items():
            say(f"{name}:{word} is {name}:{version}")


def _card(model: Model) -> Table:
    """Lay a card out for people; what an older one does not say is called so."""
    card, data = model.card, model.card["data"]
    inputs = card.get("inputs", {})
    lines = {
        model.reference: card["summary"],
        "use": card["use"],
        "inputs": _words(inputs) or "not stated",
        "ranges": _words(card["ranges"]),
        "figures": _words(card["figures"]),
        "trained on": _words({name: value for name, value in data.items() if name != "sha256"}),
        "data sha256": data.get("sha256", "not stated"),
        "weights sha256": model.sha256,
        "licence": card["licence"],
        "made": _words(card["made"]),
        "limits": "\n".join(f"- {limit}" for limit in card["limits"]),
        "folder": str(model.path),
    }
    table = Table.grid(padding=(0, 2))
    for label, text in lines.items():
        table.add_row(f"[bold]{label}[/]", text.replace("[", r"\["))
    return table


def _words(table: dict[str, Any]) -> str:
    """Write a table of a card, a line for each entry."""
    return "\n".join(f"{name.replace('_', ' ')}: {_value(value)}" for name, value in table.items())


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_value(part)}" for name, part in value.items())
    if isinstance(value, list) and len(value) == 2 and not isinstance(value[0], str):
        return f"{value[0]} to {value[1]}"
    return ", ".join(str(part) for part in value) if isinstance(value, list) else str(value)
