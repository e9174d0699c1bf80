"""The live page in a real browser, on a real server, beside a real scan."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import xarray as xr
from bluesky import plan_stubs as bps
from bluesky_tiled_plugins import TiledWriter
from event_model import compose_run
from ophyd_async.plan_stubs import ensure_connected
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

from dsnet_bluesky.callbacks.desmear import DesmearCallback
from dsnet_bluesky.data import curve
from dsnet_bluesky.derived import ResultWriter
from dsnet_bluesky.desmearing import desmear
from dsnet_bluesky.documents import result_metadata
from dsnet_bluesky.pipeline import Config
from dsnet_bluesky.plans import Instrument, direct_beam, expose
from dsnet_bluesky.server import Server
from dsnet_bluesky.sim import SaxsCamera, SimBeamline
from dsnet_bluesky.smearing import Smearing

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and chromedriver (chromium-driver) are not installed"),
]

OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
WAIT = 40.0
PATIENCE = 120.0
"""Seconds for the first exposure of all, for which everything is loaded and prepared."""
STREAMED = 12.0
"""Seconds; with the stream the page itself asks every 15 s only."""
HOSTILE = """<img src=x onerror="window.harmed='yes'"><script>window.harmed='yes'</script>"""
FITS = "return document.documentElement.scrollWidth <= innerWidth && document.querySelector('#curves .uplot')?.clientWidth"
q = np.geomspace(0.1, 3, 80)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that is this module's own: it is stopped and started again."""
    with Server(tmp_path_factory.mktemp("live"), timeout=120) as server:
        yield server


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for option in (*OPTIONS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}", "--window-size=1280,900"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    yield driver
    driver.quit()


class Page:
    """What somebody sees who looks at the page."""

    def __init__(self, chromium: webdriver.Chrome, server: Server):
        self.chromium, self.server = chromium, server

    def open(self, rest: str = "") -> None:
        self.chromium.get("about:blank")
        self.chromium.get(f"{self.server.uri}/custom/live{rest}")
        self.chromium.execute_script("window.untouched = true")

    def text(self, where: str = "body") -> str:
        return self.script("return document.querySelector(arguments[0])?.innerText ?? ''", where)

    def script(self, code: str, *arguments: Any) -> Any:
        return self.chromium.execute_script(code, *arguments)

    def shows(self, text: str, where: str = "body", wait: float = WAIT) -> None:
        eventually(lambda: text in self.text(where), lambda: f"{text!r} in {self.text(where)!r}", wait)

    def shows_curves(self, exposure: int, key: str, wait: float = WAIT) -> None:
        wanted = f"{key} {exposure - 1}"
        drawn = "return document.getElementById('figure').checkVisibility() && document.getElementById('figure').dataset.drawn"
        eventually(lambda: self.script(drawn) == wanted, lambda: f"{wanted!r} drawn; it is {self.script(drawn)!r}", wait)

    @property
    def unmoved(self) -> bool:
        """Whether it was not loaded again since it was opened."""
        return bool(self.script("return window.untouched"))


def eventually(holds: Callable[[], Any], what: Callable[[], str], wait: float = WAIT) -> None:
    deadline = time.monotonic() + wait
    while not holds():
        if time.monotonic() > deadline:
            raise AssertionError(f"Not within {wait:g} s: {what()}")
        time.sleep(0.1)


@pytest.fixture
def page(chromium: webdriver.Chrome, server: Server) -> Iterator[Page]:
    """The page, opened by somebody who has the key, and no complaint of the browser at the end."""
    page = Page(chromium, server)
    chromium.get_log("browser")
    page.open(f"#api_key={server.api_key}")
    page.shows("live", "#connection")
    yield page
    complaints = [entry["message"] for entry in chromium.get_log("browser") if "Failed to fetch" not in entry["message"]]
    assert not [message for message in complaints if "Content Security" in message or "TypeError" in message], complaints


@pytest.fixture(scope="module")
def desmeared() -> xr.Dataset:
    smearing = Smearing.gaussian(q, 0.05)
    I = np.outer([1, 2, 3], smearing.apply(1e3 * np.exp(-((smearing.q_calc * 2) ** 2) / 3) + 1))
    return desmear(curve(q, I, 0.02 * I), smearing, method="lake")


def writer(server: Server, **metadata: Any) -> tuple[str, ResultWriter]:
    """Begin a sample run and its result, as RunEngine and watcher would; return the result's key too."""
    start, client = compose_run(metadata={"purpose": "sample", **metadata}).start_doc, server.client()
    TiledWriter(client["raw"], batch_size=1)("start", start)
    said = result_metadata(start, direct_beam_uid=None, config={}, config_sha256="", method="lake")
    return start["uid"], ResultWriter.create(client, start["uid"], said)


def test_a_scan_is_seen_exposure_by_exposure_without_reload(page: Page, server: Server, RE):
    client, folder = server.client(), server.data_directory / "detector"
    camera = SaxsCamera("Pilatus100k", centre=(97.5, 243.5), hot_pixels=5, oversampling=1, seed=1)
    line = SimBeamline(folder, camera)
    np.save(folder / "mask.npy", camera.mask(2.8e-3))
    instrument = Instrument(camera.poni, slit_width=4e-3, slit_height=2.5e-3)
    desmearing = DesmearCallback(client, config=Config(bins=60, per_bin=32))
    RE(ensure_connected(*line.devices))
    RE.subscribe(TiledWriter(client["raw"], batch_size=1))
    RE.subscribe(desmearing)
    purposes, seen = [], []

    def look(name: str, doc: Any) -> None:
        # On the RunEngine's thread: the scan goes on when the page has shown this exposure.
        if name == "start":
            purposes.append(doc["purpose"])
        elif name == "event" and purposes[-1] == "sample":
            page.shows(f"exposure {doc['seq_num']} · dsnet", "#facts", PATIENCE)
            page.shows("Scan 2 (AgBh) is running", "#now")
            seen.append(doc["seq_num"])

    RE.subscribe(look)

    def beam():
        yield from bps.mv(line.beamstop.radius, 0.0, line.attenuator.factor, 5000.0, line.changer.sample, "")
        yield from direct_beam(line.detector, instrument=instrument, exposure_time=60.0)

    def sample():
        yield from bps.mv(line.beamstop.radius, 2.8e-3, line.attenuator.factor, 1.0, line.changer.sample, "AgBh")
        yield from bps.configure(instrument, mask=folder / "mask.npy")
        yield from expose(line.detector, sample="AgBh", instrument=instrument, exposure_time=60.0, exposures=2)

    RE(beam())
    page.shows("Scan 1 (direct beam) ended", "#now")
    (uid,) = RE(sample())
    assert seen == [1, 2]
    assert desmearing.close()
    result = client["desmeared"].values().last()
    page.shows_curves(2, result.item["id"])
    page.shows("complete", "#facts")
    page.shows("dsnet", "#facts")
    page.shows("No scan is running. Scan 2 (AgBh) ended", "#now")
    assert page.text("#title") == "AgBh, scan 2"
    assert page.unmoved
    assert page.script("return document.getElementById('link-raw').href") == f"{server.uri}/ui/browse/raw/{uid}"
    assert "api_key" not in page.script("return location.href")


def test_updates_come_by_the_stream(page: Page, server: Server, desmeared: xr.Dataset):
    key, result = writer(server, sample="streamed")
    for number in range(3):
        result.append(desmeared.isel(exposure=number))
        page.shows_curves(number + 1, key, STREAMED)
    page.shows("exposure 3 · lake · χ² = ", "#facts")
    page.shows("running", "#facts")
    result.append_failure("The frame holds no usable image.")
    page.shows("Exposure 4 failed: The frame holds no usable image. Shown is exposure 3.", "#failure", STREAMED)
    page.shows("Exposure 4: The frame holds no usable image.", "#results")
    result.complete()
    page.shows("exposure 3 of 4", "#facts", STREAMED)
    assert page.unmoved


def test_pixels_are_drawn(page: Page, server: Server, desmeared: xr.Dataset):
    key, result = writer(server, sample="pixels")
    result.append(desmeared.isel(exposure=0))
    page.shows_curves(1, key)
    inked = """
        const canvas = document.querySelector(arguments[0] + " canvas");
        const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
        const colours = new Set();
        for (let i = 0; i < data.length; i += 4) if (data[i + 3] > 250) colours.add(`${data[i]},${data[i + 1]},${data[i + 2]}`);
        return [...colours];
    """
    assert {"0,114,178", "118,118,118", "213,94,0"} <= set(page.script(inked, "#curves"))
    assert "0,114,178" in page.script(inked, "#residuals")


def test_a_failed_result_is_shown_with_its_reason_and_can_be_left(page: Page, server: Server, desmeared: xr.Dataset):
    good, result = writer(server, sample="good")
    result.append(desmeared.isel(exposure=0))
    result.complete()
    bad, result = writer(server, sample="bad")
    result.fail("No direct beam was exposed before this sample.")
    page.shows("This result failed: No direct beam was exposed before this sample.", "#failure")
    page.shows("bad", "#title")
    assert not page.script("return document.getElementById('figure').checkVisibility()"), "no curve of another result beside it"

    page.chromium.find_element(By.CSS_SELECTOR, f"[data-result='{good}']").click()
    page.shows_curves(1, good)
    assert not page.text("#failure")
    page.open(page.script("return location.hash"))
    page.shows_curves(1, good)  # a chosen result is in the address, and the key stays in the tab
    page.chromium.find_element(By.ID, "follow").click()
    page.shows("bad", "#title")
    assert bad in page.script("return document.getElementById('link-result').href")


def test_hostile_names_are_text(page: Page, server: Server, desmeared: xr.Dataset):
    _, result = writer(server, sample=HOSTILE)
    result.append(desmeared.isel(exposure=0))
    result.append_failure(HOSTILE)
    page.shows(HOSTILE, "#title")
    page.shows(f"Exposure 2: {HOSTILE}", "#results")
    page.shows(f"Exposure 2 failed: {HOSTILE}", "#failure")
    assert page.script("return [document.querySelectorAll('img, body script').length, window.harmed ?? 'no']") == [0, "no"]


def test_links_lead_to_the_node(page: Page, server: Server, desmeared: xr.Dataset):
    key, result = writer(server, sample="linked", scan_id=12)
    result.append(desmeared.isel(exposure=0))
    page.open(f"?api_key={server.api_key}")  # as with Tiled's own page: the key becomes a cookie for what is linked
    page.shows("linked, scan 12", "#title")
    assert "api_key" not in page.script("return location.href")
    address = page.script("return document.getElementById('link-api').href")
    answer = httpx.get(address, headers={"Authorization": f"Apikey {server.api_key}"}).json()
    assert answer["data"]["attributes"]["metadata"]["raw_uid"] == key
    page.shows_curves(1, key)
    page.chromium.find_element(By.ID, "link-result").click()
    page.shows(key[:8])
    assert page.script("return location.pathname") == f"/ui/browse/desmeared/{key}"


def test_without_a_key_nothing_is_shown(page: Page, server: Server):
    page.chromium.delete_all_cookies()
    page.script("sessionStorage.clear()")
    page.open()
    page.shows("API key", "#login")
    assert not page.script("return document.getElementById('main').checkVisibility()")
    for key, where in (("wrong", "#login"), (server.api_key, "#results")):
        page.chromium.find_element(By.ID, "key").send_keys(key)
        page.chromium.find_element(By.CSS_SELECTOR, "#login button").click()
        eventually(lambda where=where: page.script("return document.querySelector(arguments[0]).checkVisibility()", where), str)
    assert page.script("return [location.hash, location.search, document.cookie.includes(arguments[0])]", server.api_key) == [
        "",
        "",
        False,
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_and_wide_light_and_dark(page: Page, server: Server, desmeared: xr.Dataset, scheme: str):
    key, result = writer(server, sample="a-long-name-without-any-space-" * 4)
    result.append(desmeared.isel(exposure=0))
    page.chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    try:
        for width in (320, 800, 1920):
            metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
            page.chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
            page.shows_curves(1, key)
            eventually(lambda width=width: 0 < page.script(FITS) <= width, lambda: f"a page of {page.script(FITS)} px")
        ground = page.script("return getComputedStyle(document.body).backgroundColor")
        assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(21, 24, 28)"}[scheme]
    finally:
        page.chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_the_router_hands_out_its_files_and_nothing_else(server: Server):
    page = httpx.get(f"{server.uri}/custom/live")
    assert page.is_success
    for name in ("live.js", "tiled.js", "figure.js", "live.css", "uPlot.iife.min.js", "uPlot.min.css", "uPlot.LICENSE"):
        answer = httpx.get(f"{server.uri}/custom/live/{name}")
        assert answer.is_success
        assert "script-src 'self'" in answer.headers["Content-Security-Policy"]
        assert "unsafe" not in answer.headers["Content-Security-Policy"]
    for name in ("page.py", "..%2Fpage.py", "%2e%2e/page.py", "live.js%00", "../../../etc/passwd", "x" * 5000):
        assert httpx.get(f"{server.uri}/custom/live/{name}").status_code == 404
    assert "//" not in page.text.replace("<!doctype", "").replace("--", ""), "nothing comes from elsewhere"
    assert httpx.get(f"{server.uri}/api/v1/search/desmeared").status_code == 401, "the page opens nothing"


@pytest.mark.faults
def test_the_page_recovers_from_a_server_that_was_killed(page: Page, server: Server, desmeared: xr.Dataset, tmp_path: Path):
    key, result = writer(server, sample="outage")
    result.append(desmeared.isel(exposure=0))
    page.shows_curves(1, key)
    assert server._process is not None
    server._process.kill()
    server.stop()
    page.shows("the server does not answer", "#connection")
    assert "outage" in page.text("#title"), "what was seen stays"
    server.start()
    result.append(desmeared.isel(exposure=1))
    page.shows_curves(2, key)
    page.shows("live", "#connection")
    result.append(desmeared.isel(exposure=2))
    page.shows_curves(3, key, STREAMED)
    assert page.unmoved
