"""The catalog's database: ``dsnet-bluesky index``."""

from __future__ import annotations

from typing import Annotated

import typer

from .common import app, say

__all__ = ["index"]


@app.command()
def index(
    database: Annotated[
        str, typer.Argument(metavar="URI", envvar="DSNET_CATALOG", help="Of the catalog's database.", show_default=False)
    ],
) -> None:
    """Give the catalog's database the indexes that make questions about results fast.

    Once for each catalog, and again after an upgrade. The server may run: PostgreSQL goes on writing meanwhile,
    SQLite waits for some seconds where there are tens of thousands of results.
    """
    from dsnet_bluesky.adapters.indexes import create_indexes

    created = create_indexes(database)
    for name in created:
        say(f"created {name}")
    if not created:
        say("The indexes are there.")
