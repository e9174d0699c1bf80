"""Every command and snippet of the documentation is run, page by page, against a real server.

What cannot be run here says why in a comment before it that readers do not see, ``<!-- not run: reason -->``, or, for all
of a page from there on, ``<!-- not run below: reason -->``.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.resources import files
from pathlib import Path
from typing import Any

import fabio.edfimage
import numpy as np
import pyFAI
import pytest
from bluesky import Msg, RunEngine
from bluesky import plan_stubs as bps
from bluesky.preprocessors import plan_mutator
from bluesky_tiled_plugins import TiledWriter
from ophyd_async.plan_stubs import ensure_connected
from tiled.client import from_uri

from dsnet_bluesky.callbacks.desmear import desmear_runs
from dsnet_bluesky.plans import Instrument, direct_beam, expose
from dsnet_bluesky.questions import Complete, Failed, OfRun
from dsnet_bluesky.sim import SaxsCamera, SimBeamline
from tests.pages import ROOT, Block, Terminal, blocks, pages, service
from tests.ports import free_port

pytestmark = pytest.mark.system

SERVE = "dsnet-bluesky serve --directory dsnet-demo/data --api-key secret"
"""How the pages open the catalog of the demonstration."""

BEAMSTOP = 2.8e-3
EXAMPLES = Path(str(files("sasdata"))) / "example_data" / "1d_data"


class Site:
    """A working directory with what a reader of the pages has, and the servers that they start."""

    def __init__(self, folder: Path, stack: ExitStack, database: Path):
        self.folder, self._stack, self._database = folder, stack, database
        self._ports: dict[str, int] = {}
        self.environment = dict(os.environ)
        self.camera = SaxsCamera("Pilatus100k", centre=(97.5, 243.5), hot_pixels=5, oversampling=1, seed=1)
        self.start("serve", SERVE)
        self.client = from_uri(self.uri, api_key="secret")
        self.uids: dict[str, str] = {}

    @property
    def uri(self) -> str:
        """Of the catalog of the demonstration."""
        return f"http://127.0.0.1:{self._ports[SERVE]}"

    def start(self, kind: str, command: str) -> int:
        """Start a service on a free port, unless it runs already; return the port."""
        if command not in self._ports:
            port = free_port()
            said = re.sub(r" --port \d+", "", command.split(" #")[0])
            options = f" --readable {self.folder}" if kind == "serve" else ""  # masks lie in the working directory
            if kind == "serve":
                self._save_the_server_its_tables(re.search(r"--directory (\S+)", command))
            whole = f"{self.here(said)} --port {port}{options}"
            self._stack.enter_context(service(whole, f"http://127.0.0.1:{port}/healthz", self.environment))
            self._ports[command] = port
        return self._ports[command]

    def _save_the_server_its_tables(self, directory: re.Match[str] | None) -> None:
        """Put an empty catalog where the server would make one, which takes it seconds."""
        if directory and not (self.folder / directory[1]).exists():
            (self.folder / directory[1]).mkdir(parents=True)
            shutil.copy(self._database, self.folder / directory[1] / "catalog.db")

    def here(self, text: str) -> str:
        """Take places of a beamline to places below the working directory."""
        for there in ("/data/", "/var/spool/"):
            text = re.sub(rf"(?<![\w.-]){there}", f"{self.folder}{there}", text)
        return text


class Reader:
    """Someone who does what a page says."""

    def __init__(self, site: Site, namespace: dict[str, Any]):
        self.site, self.namespace = site, namespace
        self.ports = {"8000": site.start("serve", SERVE)}
        environment = {**site.environment, "TILED_URI": site.uri, "TILED_API_KEY": "secret"}
        self.terminal = Terminal(environment, self.replace, self.start)

    def start(self, kind: str, command: str) -> None:
        """Start a service, and take the page's port for its own from now on."""
        said = re.search(r"--port (\d+)", command)
        self.site.environment = self.terminal.environment
        port = self.site.start(kind, command)
        self.ports[said[1] if said else "8000"] = port
        if kind == "serve":
            self.terminal.environment["TILED_URI"] = f"http://127.0.0.1:{port}"

    def replace(self, text: str) -> str:
        """Put what is true here in the place of what stands for it on the page."""
        for said, port in self.ports.items():
            text = text.replace(f"127.0.0.1:{said}", f"127.0.0.1:{port}").replace(f"localhost:{said}", f"localhost:{port}")
        text = re.sub(r"\bUID\b", self.terminal.uid or self.site.uids["AgBh"], text)
        return self.site.here(text.replace("TILED_API_KEY=...", "TILED_API_KEY=secret"))

    def do(self, block: Block) -> None:
        """Do what a block says."""
        block.check()
        if block.language == "python":
            # Empty lines before, so that errors name the line of the page.
            code = compile("\n" * (block.line - 1) + self.replace(block.text), str(block.page), "exec")
            exec(code, self.namespace)
        else:
            for command in block.commands() if block.language not in ("yaml", "toml", "ini", "json") else ():
                self.terminal.run(command)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Iterator[Site]:
    """A catalog as the demonstration leaves it, but smaller, and the files that the pages name."""
    folder = tmp_path_factory.mktemp("reader")
    before = Path.cwd()
    with ExitStack() as stack:
        os.chdir(folder)
        stack.callback(os.chdir, before)
        for name in ("data/2026-11", "var/spool"):
            (folder / name).mkdir(parents=True)
        site = Site(folder, stack, empty_database)
        write_files(site)
        take_runs(site)
        yield site


def write_files(site: Site) -> None:
    """Write a geometry, masks, frames and curves under the names that the pages give them."""
    pyFAI.load(site.camera.poni).save("saxs.poni")
    for name in ("mask.edf", "beamstop.edf"):
        fabio.edfimage.EdfImage(data=site.camera.mask(BEAMSTOP).astype(np.int8)).write(name)
    shutil.copy(EXAMPLES / "latex_smeared.xml", ".")
    q = np.linspace(0.05, 3.0, 120)
    x = 4 * q
    I = 100 * (3 * (np.sin(x) - x * np.cos(x)) / x**3) ** 2 + 0.2
    for name, scale in (("usaxs.dat", 0.1), ("saxs.dat", 1.0), ("kratky.dat", 0.1)):
        noise = 0.02 * I * np.random.default_rng(1).normal(size=q.size)
        np.savetxt(name, np.transpose([scale * q, I + noise, 0.02 * I]))
    np.savetxt("profile.dat", np.transpose([np.linspace(0, 0.5, 20), np.linspace(1, 0, 20)]))


class Beamline:
    """A small beamline that takes direct beams with the attenuator in, and samples behind the beamstop."""

    def __init__(self, engine: RunEngine, site: Site):
        self.devices = SimBeamline(site.folder / "dsnet-demo/data/detector", site.camera)
        self.engine, self.subscribed = engine, []
        engine(ensure_connected(*self.devices.devices))
        engine.preprocessors.append(lambda plan: plan_mutator(plan, self._prepared))
        subscribe = engine.subscribe

        def remembering(callback: Any, name: str = "all") -> int:
            self.subscribed.append(callback)
            return subscribe(callback, name)

        engine.subscribe = remembering

    def close(self) -> None:
        """Wait for what is still at work for the session, and end it."""
        for callback in self.subscribed:
            if hasattr(callback, "wait"):
                assert callback.wait(60), callback
            if hasattr(callback, "close"):
                callback.close()

    @property
    def detector(self) -> Any:
        return self.devices.detector

    def _prepared(self, message: Msg) -> tuple[Any, None]:
        """Move what a beamline moves before a run begins."""
        if message.command != "open_run":
            return None, None
        line, start = self.devices, message.kwargs
        beam = start["purpose"] == "direct_beam"

        def moved() -> Iterator[Any]:
            yield from bps.mv(line.beamstop.radius, 0.0 if beam else BEAMSTOP, line.attenuator.factor, 5000.0 if beam else 1.0)
            yield from bps.mv(line.changer.sample, "" if beam else start["sample"])
            return (yield message)

        return moved(), None


def take_runs(site: Site) -> None:
    """Expose a direct beam, silver behenate and a scan of spheres, and desmear them."""
    engine = RunEngine({})
    beamline = Beamline(engine, site)
    instrument = Instrument("saxs.poni", mask=site.folder / "mask.edf", slit_width=4e-3, slit_height=2.5e-3)
    token = engine.subscribe(TiledWriter(site.client["raw"], batch_size=1))
    detector, x = beamline.detector, beamline.devices.changer.x
    plans = {
        "beam": direct_beam(detector, instrument=instrument, exposure_time=60),
        "AgBh": expose(detector, sample="AgBh", instrument=instrument, exposure_time=60),
        "sphere": expose(detector, sample="sphere", instrument=instrument, exposure_time=60, motor=x, positions=(-0.4, 0.4)),
    }
    for name, plan in plans.items():
        site.uids[name] = engine(plan)[0]
    engine.unsubscribe(token)
    engine.loop.call_soon_threadsafe(engine.loop.stop)
    done = desmear_runs(site.client, site.uids.values())
    assert len(site.client["desmeared"].search(Complete())) == 2, done
    for name, frame in (("beam", site.uids["beam"]), ("agbh-1", site.uids["AgBh"])):
        counts = site.client["raw"][frame]["primary"].read()["pilatus"].values.reshape(site.camera.shape)
        fabio.edfimage.EdfImage(data=counts.astype(np.int32)).write(f"data/2026-11/{name}.edf")


@pytest.fixture(autouse=True)
def tidy(site: Site) -> Iterator[None]:
    """Take away the files that a page leaves: the next one shall not find them."""
    before = set(site.folder.iterdir())
    yield
    for path in set(site.folder.iterdir()) - before:
        if path.is_file():
            path.unlink()


@pytest.fixture
def beamline(RE: RunEngine, site: Site) -> Iterator[Beamline]:
    """A session of Bluesky."""
    beamline = Beamline(RE, site)
    yield beamline
    beamline.close()


def at_the_beamline(site: Site, beamline: Beamline) -> dict[str, Any]:
    """A session of Bluesky, as the pages presuppose it."""
    return {"RE": beamline.engine, "TiledWriter": TiledWriter, "pilatus": beamline.detector, "bps": bps}


def readme(site: Site, beamline: Beamline) -> dict[str, Any]:
    """A session, and a curve."""
    q, I, Idev = np.loadtxt("saxs.dat").T
    return {**at_the_beamline(site, beamline), "q": q, "I": I, "Idev": Idev}


def spheres(site: Site, beamline: Beamline) -> dict[str, Any]:
    """A result with several exposures."""
    return {"result": site.client["desmeared"].search(OfRun(site.uids["sphere"])).values().first().read()}


GIVEN: dict[str, Callable[[Site, Beamline], dict[str, Any]]] = {
    "README.md": readme,
    "docs/how-to/errors.md": spheres,
    "docs/how-to/live-view.md": at_the_beamline,
    "docs/how-to/own-detector.md": at_the_beamline,
    "docs/how-to/spool.md": at_the_beamline,
}
"""What pages take for granted, beside `client`, the server's root, and `uid`, a run of silver behenate."""


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_a_reader_can_do_what_the_page_says(page: Path, site: Site, beamline: Beamline) -> None:
    given = GIVEN.get(str(page.relative_to(ROOT)), lambda *_: {})
    reader = Reader(site, {"client": site.client, "uid": site.uids["AgBh"], **given(site, beamline)})
    for block in blocks(page):
        try:
            if block.reason:
                block.check()
            else:
                reader.do(block)
        except Exception as error:
            error.add_note(f"in {block}")
            raise


@pytest.fixture(scope="module", autouse=True)
def nothing_live_failed(site: Site) -> Iterator[None]:
    """Whatever pages exposed and desmeared is complete in the end."""
    yield
    failed = site.client["desmeared"].search(Failed())
    assert len(failed) == 0, [node.metadata["reason"] for node in failed.values()]


def test_what_is_not_run_says_why() -> None:
    left_out = [block for page in pages() for block in blocks(page) if block.reason]
    for block in left_out:
        print(f"{block}: {block.reason}")
        assert len(block.reason.split()) >= 3, f"{block} does not say why it is not run"
    assert left_out
