"""What the server must know of files that are numbered; importing this module tells it.

The server stores the names of a sequence of files, not how they are made. When it gives a run's documents
back, it finds the number in them again. `bluesky_tiled_plugins.exporters` takes the first digits of a name for it, which
mostly belong to a uuid: of such a run it names the first file only.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from bluesky_tiled_plugins import exporters

__all__ = ["template_of"]

_first_digits = exporters._synthesize_multipart_template


def template_of(uris: Sequence[str]) -> tuple[str | None, str | None, int | None]:
    """Find the number by which the names of files differ.

    Parameters
    ----------
    uris
        Of the files, in their order.

    Returns
    -------
    tuple
        Beginning, template and first number: file k is ``beginning + template % (first + k)``; three times None where the
        names are not numbered one after the other.
    """
    if len(uris) < 2:
        return _first_digits(list(uris))
    prefix = os.path.commonprefix(list(uris))  # noqa: RUF071 - letters are what is compared
    found = re.match(r"\d+", uris[0][len(prefix) :])
    if found is None or "%" in uris[0]:
        return None, None, None
    digits, suffix = found.group(), uris[0][len(prefix) + found.end() :]
    base = prefix[: prefix.rfind("/") + 1]
    # Padded with zeros where all are equally long; 9, 10 is not padded.
    width = f"0{len(digits)}" if len({len(uri) for uri in uris}) == 1 else ""
    template, first = f"{prefix[len(base) :]}%{width}d{suffix}", int(digits)
    same = all(base + template % (first + k) == uri for k, uri in enumerate(uris))
    return (base, template, first) if same else (None, None, None)


exporters._synthesize_multipart_template = template_of
