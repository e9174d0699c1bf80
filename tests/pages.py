"""What stands in fenced blocks of the documentation, and how it is run."""

from __future__ import annotations

import ast
import configparser
import contextlib
import glob
import json
import re
import shlex
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import yaml
from markdown_it import MarkdownIt
from typer.testing import CliRunner

from dsnet_bluesky.cli import app

ROOT = Path(__file__).parents[1]
MADE_BY_THE_BUILD = ("docs/_build", "docs/benchmarks", "docs/reference/api", "docs/reference/command-line.md")
RUN_AS_NOTEBOOKS = ("docs/notebooks",)

SHELL = {"", "bash", "console", "sh", "shell"}
PARSERS: dict[str, Callable[[str], object]] = {
    "ini": lambda text: configparser.ConfigParser().read_string(text),
    "json": json.loads,
    "toml": tomllib.loads,
    "yaml": yaml.safe_load,
}
NOTHING_TO_RUN = {"text", "{toctree}", "{eval-rst}", "{note}", "{warning}", "{math}"}
LEFT_OUT = re.compile(r"<!-- not run(?P<below> below)?: (?P<reason>.+?) -->", re.DOTALL)
SERVICES = re.compile(r"dsnet-bluesky (?P<kind>serve|watch)\b")
NEEDS_A_SHELL = re.compile(r"[|<>;&$`(]")
UID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    """Of its first line of content, from 1."""
    language: str
    text: str
    reason: str = ""
    """Why it is not run: what a comment that readers do not see says before it."""

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line} ({self.language or 'no language'})"

    def commands(self) -> list[str]:
        """Split commands to a shell; where some lines begin with a prompt, the others are what is printed."""
        lines = self.text.replace("\\\n", " ").splitlines()
        if any(line.startswith("$ ") for line in lines):
            lines = [line[2:] for line in lines if line.startswith("$ ")]
        return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]

    def check(self) -> None:
        """Raise if it cannot be what it says to be."""
        if self.language == "python":
            ast.parse(self.text)
        elif self.language in SHELL:
            subprocess.run(["bash", "-n"], input=self.text, text=True, check=True)
        elif self.language in PARSERS:
            PARSERS[self.language](self.text)
        elif self.language not in NOTHING_TO_RUN:
            raise ValueError(f"Nobody knows how to run this; mark it as python, console or text, not {self.language!r}.")


def pages() -> list[Path]:
    """List the pages that have something to run; README.md, which takes runs of its own, last."""
    without = tuple(str(ROOT / part) for part in (*MADE_BY_THE_BUILD, *RUN_AS_NOTEBOOKS))
    found = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md"]
    return [page for page in found if not str(page).startswith(without) and blocks(page)]


def blocks(page: Path) -> list[Block]:
    """Collect the blocks of a page, each with the reason why it is not run, if there is one."""
    found, reason, below = [], "", ""
    for token in MarkdownIt("commonmark").parse(page.read_text()):
        if token.type == "html_block" and (mark := LEFT_OUT.search(token.content)):
            words = " ".join(mark["reason"].split())
            reason, below = ("", words) if mark["below"] else (words, below)
        elif token.type == "fence" and token.map:
            language = token.info.split()[0] if token.info.strip() else ""
            if language not in NOTHING_TO_RUN:
                found.append(Block(page, token.map[0] + 2, language, token.content, reason or below))
            reason = ""
    return found


class Terminal:
    """Runs commands one after the other in the working directory, as a user would; keeps what they export.

    Parameters
    ----------
    environment
        Of the commands.
    replace
        Takes a command as it stands on the page, and returns one for this machine.
    start
        Starts a service, given its kind and the command as it stands on the page.
    """

    def __init__(self, environment: dict[str, str], replace: Callable[[str], str], start: Callable[[str, str], None]):
        self.environment, self._replace, self._start = environment, replace, start
        self.uid = ""
        """What the last command printed, if that was a uid."""

    def run(self, command: str) -> str:
        """Run a command to its end, or start a service; return what it printed."""
        command = command.removeprefix(".venv/bin/")
        if command.startswith("make "):
            return _check_that_ci_runs(command)
        if service := SERVICES.match(command):
            self._start(service["kind"], command)
            return ""
        command = self._replace(command)
        output = (
            self._here(command) if command.startswith("dsnet-bluesky ") and not _needs_a_shell(command) else self._bash(command)
        )
        if UID.fullmatch(output.strip()):
            self.uid = output.strip()
        return output

    def _here(self, command: str) -> str:
        """Run a command of ours in this process, which has loaded what takes a new one seconds."""
        _, *words = [each for word in shlex.split(command, comments=True) for each in sorted(glob.glob(word)) or [word]]
        done = CliRunner(env={"TILED_API_KEY": None, "TILED_URI": None, **self.environment}).invoke(app, words)
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        assert done.exit_code == 0, f"{command}\n{done.output}"
        return done.stdout

    def _bash(self, command: str) -> str:
        """Run anything else."""
        script = f"set -eo pipefail\n{command}\nenv -0 > .environment"
        path = f"{Path(sys.executable).parent}:{self.environment['PATH']}"
        done = subprocess.run(
            ["bash", "-c", script], env={**self.environment, "PATH": path}, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        lines = Path(".environment").read_text().split("\0")
        self.environment.update(dict(line.split("=", 1) for line in lines if "=" in line))
        return done.stdout


def _needs_a_shell(command: str) -> bool:
    return bool(NEEDS_A_SHELL.search(command.split(" #")[0]))


def _check_that_ci_runs(command: str) -> str:
    command = command.split(" #")[0].strip()
    target = command.removeprefix("make ")
    called = re.findall(r"^make (.*)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert target in " ".join(called).split(), f"CI does not run `{command}`"
    return ""


@contextlib.contextmanager
def service(command: str, url: str, environment: dict[str, str]) -> Iterator[None]:
    """Run a command that does not end, from when its address answers."""
    words = [str(Path(sys.executable).parent / "dsnet-bluesky"), *shlex.split(command, comments=True)[1:]]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(words, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            _wait_until_healthy(process, url)
            yield
        except (RuntimeError, TimeoutError) as error:
            log.seek(0)
            error.add_note(log.read()[-5000:])
            raise
        finally:
            process.terminate()
            process.wait(timeout=30)


def _wait_until_healthy(process: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + 120
    # One client for all attempts: making one loads certificates.
    with httpx.Client(timeout=2.0, trust_env=False) as http:
        while process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                if http.get(url).status_code == 200:
                    return
            if time.monotonic() > deadline:
                raise TimeoutError(f"Nothing answers at {url} after two minutes.")
            time.sleep(0.2)
    raise RuntimeError(f"{process.args} ended with status {process.returncode}.")
