"""A live plot of what is desmeared, for use beside a RunEngine."""

from __future__ import annotations

import logging
import textwrap
import threading
from collections.abc import Mapping
from typing import Any

from bluesky.callbacks.core import make_class_safe
from matplotlib.axes import Axes
from matplotlib.backend_bases import TimerBase
from matplotlib.figure import Figure

from dsnet_bluesky.data import BadInput
from dsnet_bluesky.documents import purpose
from dsnet_bluesky.plots import VERMILION, plot_residuals, plot_result

from .follow import Follower, Picture

__all__ = ["LiveDesmear"]

logger = logging.getLogger(__name__)

REDRAW = 100
"""Milliseconds after which an interactive figure looks whether there is something new to draw."""


@make_class_safe(logger=logger)
class LiveDesmear:
    """Plot the newest desmeared exposure while scans run: measured, desmeared with its band, and the residuals.

    The documents only say which sample runs go on; the curves come from their
    results in the catalog, whoever makes them: a `DesmearCallback` in this process
    or a watcher elsewhere. Nothing is read or drawn on the RunEngine's thread, and
    nothing that goes wrong here reaches the plan. A result or an exposure that failed is
    shown with its reason.

    Make it on the main thread, as any figure. An interactive figure draws itself there, in
    its own event loop (with bluesky: Qt, or a notebook), and Agg draws on a thread of this class.

    Parameters
    ----------
    client
        Tiled client of the server's root, which holds ``/desmeared``.
    ax
        Axes for the curves alone, or a pair for curves and residuals; by default a new pyplot figure.
    interval
        Seconds after which the catalog is looked at if the server announces nothing.

    Attributes
    ----------
    figure : matplotlib.figure.Figure
    picture : Picture
        What was drawn last.

    Examples
    --------
    >>> live = LiveDesmear(client)          # doctest: +SKIP
    >>> RE.subscribe(live)                  # doctest: +SKIP
    >>> RemoteDispatcher(("localhost", 5578)).subscribe(live)   # or: documents of another process    # doctest: +SKIP
    """

    def __init__(self, client: Any, ax: Axes | tuple[Axes, Axes] | None = None, *, interval: float = 2.0):
        self.picture = Picture()
        self.figure, self._curves, self._residuals = _axes(ax)
        self._new: Picture | None = None
        self._lock = threading.Lock()
        timer = self.figure.canvas.new_timer(interval=REDRAW)
        self._timer = None if type(timer) is TimerBase else timer  # a canvas without an event loop has the base class
        if self._timer is not None:
            self._timer.add_callback(self._draw_new)
            self._timer.start()
        self._follower = Follower(client, self._show, interval=interval)
        self.figure.canvas.mpl_connect("close_event", lambda _: self._follower.stop())

    def __call__(self, name: str, doc: Mapping[str, Any]) -> None:
        """Take a document: note which run goes on. Never raises, never waits."""
        if name == "start" and purpose(doc) == "sample":
            self._follower.begin(doc)
        elif name == "stop":
            self._follower.end(doc["run_start"])

    def close(self) -> None:
        """Stop following; the figure stays as it is."""
        self._follower.close()
        if self._timer is not None:
            self._timer.stop()
        self._draw_new()

    def _show(self, picture: Picture) -> None:
        """Take a picture from the follower's thread; an interactive figure fetches it from its own."""
        self._new = picture
        if self._timer is None:
            self._draw_new()

    def _draw_new(self) -> None:
        with self._lock:
            picture, self._new = self._new, None
            if picture is None:
                return
            try:
                self._draw(picture)
            except Exception:
                logger.exception("The live plot could not be drawn.")
            self.picture = picture
        if self._timer is not None:
            self.figure.canvas.draw_idle()

    def _draw(self, picture: Picture) -> None:
        curves, residuals = self._curves, self._residuals
        failure = picture.failure
        for ax in (curves, residuals):
            if ax is not None:
                ax.clear()
        if picture.exposure is not None:
            try:
                self._draw_exposure(picture.exposure)
            except BadInput as error:  # nothing of it can be drawn on logarithmic axes
                failure = failure or str(error)
        curves.set_title(picture.title, parse_math=False, fontsize="medium")
        if failure:
            _write(curves, failure, 0.5, color=VERMILION)
        if picture.notes:
            _write(curves, "\n".join(picture.notes), 0.03, fontsize="small", color="0.35")

    def _draw_exposure(self, exposure: Any) -> None:
        plot_result(exposure, self._curves, title="")
        self._curves.legend_.set_loc("upper right")  # pyright: ignore[reportOptionalMemberAccess]
        if self._residuals is not None:
            plot_residuals(exposure, self._residuals)
            self._curves.set_xlabel("")
            self._curves.tick_params(labelbottom=False)


def _axes(ax: Axes | tuple[Axes, Axes] | None) -> tuple[Figure, Axes, Axes | None]:
    if ax is None:
        import matplotlib.pyplot as plt

        figure, (curves, residuals) = plt.subplots(
            2, 1, sharex=True, height_ratios=(3, 1), layout="constrained", figsize=(6.8, 5.8)
        )
        if figure.canvas.manager is not None:
            figure.canvas.manager.set_window_title("Live desmearing")
        return figure, curves, residuals
    curves, residuals = (ax, None) if isinstance(ax, Axes) else ax
    figure = curves.get_figure()
    assert isinstance(figure, Figure)
    return figure, curves, residuals


def _write(ax: Axes, text: str, height: float, **style: Any) -> None:
    """Write something into the axes, as it stands: a sample's name may hold what looks like mathematics."""
    lines = "\n".join(textwrap.fill(line, 70) for line in text.splitlines())
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 3}
    ax.text(0.03, height, lines, transform=ax.transAxes, va="bottom", parse_math=False, bbox=box, zorder=10, **style)
