"""How Sphinx makes the site: ``make docs``.

Pages are Markdown that reads well without Sphinx, too. Made anew by each build, and ignored by git: ``reference/api`` (from the
docstrings), ``reference/command-line.md`` (from the commands) and ``benchmarks`` (copies of the results). Nothing is fetched from
the network.
"""

from __future__ import annotations

import hashlib
import importlib
import pkgutil
import re
import shutil
from pathlib import Path
from typing import Any

import typer
from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from typer.cli import get_docs_for_click

import dsnet_bluesky
from dsnet_bluesky.cli import app as commands

HERE = Path(__file__).parent
ROOT = HERE.parent
PACKAGE = "dsnet_bluesky"

project = "dsnet-bluesky"
author = "The dsnet-bluesky founders"
copyright = "The dsnet-bluesky founders, BSD-3-Clause"
version = release = dsnet_bluesky.__version__
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.viewcode",
    "numpydoc",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "_templates"]
templates_path = ["_templates"]
suppress_warnings = [
    "config.cache",  # `autosummary_context` holds a function
    "ref.python",  # a question and a released model are both called Model; annotations name them without their module
]

# Markdown
myst_heading_anchors = 3
copybutton_exclude = ".linenos, .gp, .go"

# Reference
default_role = "py:obj"
autosummary_ignore_module_all = False
autodoc_default_options = {"member-order": "bysource"}
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
autodoc_type_aliases = {name: name for name in ("ArrayLike", "Floats", "NDArray", "xr.DataArray", "xr.Dataset")}
numpydoc_show_class_members = False

# Looks
html_theme = "pydata_sphinx_theme"
html_title = "dsnet-bluesky"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_theme_options = {
    "navigation_with_keys": False,
    "show_toc_level": 2,
    "show_nav_level": 1,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
}


def _digest_of_sources() -> str:
    """Of all that a notebook's outputs depend on beside itself."""
    files = [*sorted((ROOT / PACKAGE).rglob("*.py")), ROOT / "constraints.txt"]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


# Notebooks: run by the build, an error stops it. Outputs are kept until the notebook, the package or its dependencies change.
nb_execution_mode = "cache"
nb_execution_cache_path = str(ROOT / "build" / "notebooks" / _digest_of_sources())
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True
nb_output_stderr = "remove"  # what libraries grumble about when they are imported


def copy_benchmarks(app: Sphinx) -> None:
    """Copy the benchmarks' results, so that they are pages of the site."""
    shutil.copytree(ROOT / "benchmarks" / "results", HERE / "benchmarks", dirs_exist_ok=True)


def write_command_line(app: Sphinx) -> None:
    """Write the reference of the commands, from what ``--help`` says."""
    command = typer.main.get_command(commands)
    context = typer.Context(command, obj={"TYPER_RICH_MARKUP_MODE": "rich"})
    text = get_docs_for_click(obj=command, ctx=context, name="dsnet-bluesky", title="The command line")
    text = re.sub(r"\*\*Commands\*\*:\n\n(\* .*\n)+\n", "", text)  # cut off after 45 characters; the page's contents list them
    _write_if_new(HERE / "reference" / "command-line.md", text)


def _write_if_new(path: Path, text: str) -> None:
    """Leave a file's time as it is if it would say the same: Sphinx would read the page again."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def lead_to_copies(app: Sphinx, docname: str, source: list[str]) -> None:
    """Let links to the benchmarks' results, right for a reader of the files, lead to the copies."""
    if docname.startswith("benchmarks/"):
        source[0] = "---\nhtml_theme.sidebar_secondary.remove: true\n---\n" + source[0]  # the tables want the room
    source[0] = re.sub(r"\]\((?:\.\./)+benchmarks/results/", f"]({'../' * docname.count('/')}benchmarks/", source[0])


def elsewhere(module: str, names: list[str]) -> dict[str, str]:
    """Of what a module offers, return what another module of the package defines, and which."""
    homes = {name: getattr(getattr(importlib.import_module(module), name), "__module__", None) or module for name in names}
    return {name: home for name, home in homes.items() if home != module and home.startswith(PACKAGE)}


def modules_of(package: str) -> list[str]:
    """List the modules of a package; of a module, none."""
    paths = getattr(importlib.import_module(package), "__path__", [])
    names = [each.name for each in pkgutil.iter_modules(paths) if not each.name.startswith("_")]
    return [f"{package}.{name}" for name in names]


def find_in_package(app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: nodes.Element) -> nodes.Node | None:
    """Find what docstrings name from the package on: `queries.ResultsClient`."""
    domain = node.get("refdomain")
    if domain != "py" or node["reftarget"].startswith(PACKAGE):
        return None
    target = f"{PACKAGE}.{node['reftarget']}"
    return env.domains["py"].resolve_xref(env, node["refdoc"], app.builder, "obj", target, node, contnode)


autosummary_context: dict[str, Any] = {"elsewhere": elsewhere, "modules_of": modules_of}


def setup(app: Sphinx) -> None:
    """Connect what is above to the build."""
    app.connect("builder-inited", copy_benchmarks, priority=100)
    app.connect("builder-inited", write_command_line, priority=100)
    app.connect("source-read", lead_to_copies)
    app.connect("missing-reference", find_in_package)
