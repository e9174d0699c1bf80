"""``python -m dsnet_bluesky`` is the command line."""

from .cli import app

app(prog_name="dsnet-bluesky")
