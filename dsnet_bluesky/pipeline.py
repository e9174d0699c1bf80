"""From exposures to a Dataset of results: the one function that live, served and replayed work share.

Nothing here knows a catalog. Preparing (beam, geometry, mask -> operator -> method)
costs a second or so; applying it to a frame costs milliseconds. Preparations are
kept, so that a scan pays once. Curves are desmeared by `PreparedCurves`; models that read frames
have classes of their own (`kinds`), and all keep to `PreparedExposures`.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray

from .data import BadInput
from .desmearing import LEARNED, check_options, prepare, settled, solver_of
from .kinds import FRAME_MODELS, Kind, kind_of
from .reduction import MINIMUM_BEAM_COUNTS, Reduction, centred, invalid_pixels, psf
from .smearing import Smearing
from .versions import Model, load_model

if TYPE_CHECKING:
    from .denoising.exposures import PreparedPatterns
    from .icosahedra.exposures import PreparedImages

__all__ = ["Config", "Exposed", "Instrumental", "PreparedCurves", "PreparedExposures", "prepare_exposures", "without_model"]

ANSWERED_BY_MODELS = (*LEARNED, *FRAME_MODELS)
"""Methods that models of the registry answer for."""

CACHE_SIZE = 8
"""Preparations that are kept: each holds an operator of a few MB."""


@dataclass(frozen=True)
class Config:
    """What is done with exposures, and how; its digest is part of a result's identity.

    Which model answers is settled when it is made, before any work begins: `method` then names the version that
    a name or an alias stands for. That version is no part of the digest: the SHA-256 of its weights
    is in the identity beside it, so that the same computation has the same identity, whatever the model was called.

    Attributes
    ----------
    method
        A name of `dsnet_bluesky.desmearing.METHODS` or of `kinds.FRAME_MODELS`, with or without a version or an alias:
        ``"dsnet"``, ``"dsnet:2.0.0"``, ``"dsnet:production"``. Reads ``"dsnet:2.0.0"`` in each of these cases.
    options
        Of the method, JSON-serialisable.
    bins
        Number of q bins.
    q_min, q_max
        Range in 1/nm, None for all that the detector sees.
    per_bin
        Pixels of each bin in the pixel-coverage operator.
    minimum_beam_counts
        Fewer counts in the direct beam are refused.
    wavelength_spread
        Standard deviation of the wavelength over its mean.
    device
        Of networks: ``"cpu"``, ``"cuda"``. No part of a result's identity: the answer is the same.

    Raises
    ------
    BadInput
        If there is no such model.
    """

    method: str = "dsnet"
    options: Mapping[str, Any] = field(default_factory=dict)
    bins: int = 500
    q_min: float | None = None
    q_max: float | None = None
    per_bin: int = 256
    minimum_beam_counts: float = MINIMUM_BEAM_COUNTS
    wavelength_spread: float = 0.0
    device: str = "cpu"

    def __post_init__(self) -> None:
        method, options = settled(self.method, self.options, ANSWERED_BY_MODELS)
        if then := kind_of(method).desmears_with:
            # The version of the model that desmears afterwards has no other place in a result's identity.
            options["method"] = settled(str(options.get("method", then)), {})[0]
        object.__setattr__(self, "method", method)
        object.__setattr__(self, "options", options)

    def to_dict(self) -> dict[str, Any]:
        """Return what makes the result, but for which model answered, as JSON-serialisable values."""
        values = asdict(self)
        del values["device"]
        return without_model(values)

    @property
    def method_name(self) -> str:
        """The method without a version; which version answered is recorded with every result."""
        return self.method.partition(":")[0]

    @property
    def kind(self) -> Kind:
        """The kind of its results."""
        return kind_of(self.method)

    def check(self) -> Model | None:
        """Check options and model before any work begins, and give the model, as `load_model`; it takes torch, and seconds.

        Raises
        ------
        BadInput
            If there is no such method or option, an option has a value of the wrong type, or the model is damaged.
        """
        OPTIONS.get(self.method_name, _desmearing_options)(self)
        return self.load_model()

    def load_model(self) -> Model | None:
        """Check the model behind the method, None for a classical method.

        Raises
        ------
        BadInput
            If it is damaged.
        """
        if self.method_name not in ANSWERED_BY_MODELS:
            return None
        return load_model(str(self.options.get("model", self.method)))

    @property
    def sha256(self) -> str:
        """Digest of the configuration in canonical JSON."""
        return _digest_json(self.to_dict())


def without_model(config: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out of a configuration, as a dictionary, which model answers: results of before may still name it there."""
    options = {name: value for name, value in (config.get("options") or {}).items() if name != "model"}
    return {**config, "method": str(config.get("method", "")).partition(":")[0], "options": options}


class PreparedExposures(Protocol):
    """Ready for any number of exposures of one instrument.

    Exposures are answered independently of each other: together as one by one.
    """

    @property
    def model(self) -> Model | None:
        """The model that answers; None for a classical method."""
        ...

    def reduce(
        self, frames: ArrayLike, *, time: ArrayLike = 1.0, monitor: ArrayLike = 1.0, transmission: ArrayLike = 1.0
    ) -> xr.Dataset:
        """Bring frames to what the method works on.

        Parameters
        ----------
        frames
            Counts, shape (exposure, y, x).
        time, monitor, transmission
            Divisors, scalars or shape (exposure,).

        Raises
        ------
        BadInput
            If they cannot be used.
        """
        ...

    def answer(self, reduced: xr.Dataset) -> xr.Dataset:
        """Apply the method to what `reduce` gave; dims (exposure, ...), with `status` and `flags` of each exposure.

        Raises
        ------
        BadInput
            If it can be applied to no exposure.
        """
        ...


class Instrumental(NamedTuple):
    """What the direct beam says of an instrument.

    Attributes
    ----------
    psf
        The direct beam, see `reduction.psf`.
    reduction
        With the beam centre where the direct beam is.
    smearing
        Pixel-coverage operator, with the wavelength spread where there is one.
    """

    psf: xr.Dataset
    reduction: Reduction
    smearing: Smearing


class Exposed(NamedTuple):
    """What there is to prepare from; see `prepare_exposures`."""

    beam_frame: NDArray
    poni: Mapping[str, Any]
    mask: NDArray | None
    beam_mask: NDArray | None = None
    beam_poni: Mapping[str, Any] | None = None

    def found(self, config: Config) -> Found:
        """Find the beam.

        Raises
        ------
        BadInput
            If the direct beam shows none that can be used.
        """
        beam = psf(
            self.beam_frame,
            self.poni if self.beam_poni is None else self.beam_poni,
            mask=self.mask if self.beam_mask is None else self.beam_mask,
            minimum_counts=config.minimum_beam_counts,
        )
        return Found(beam, centred(self.poni, beam), _with_gaps(self.beam_frame, self.poni, self.mask))

    def instrumental(self, config: Config, sector: tuple[float, float] | None = None) -> Instrumental:
        """Find the beam, and make the reduction and the operator."""
        beam, poni, mask = self.found(config)
        reduction = Reduction(poni, mask=mask, bins=config.bins, q_min=config.q_min, q_max=config.q_max, sector=sector)
        return Instrumental(beam, reduction, reduction.smearing(beam, per_bin=config.per_bin, spread=config.wavelength_spread))


class Found(NamedTuple):
    """Where the beam is, and which pixels count.

    Attributes
    ----------
    psf
        The direct beam, see `reduction.psf`.
    poni
        Geometry of the samples, with the beam centre where the direct beam is.
    mask
        True where a pixel does not count, in the samples' frames or that of the direct beam.
    """

    psf: xr.Dataset
    poni: dict[str, Any]
    mask: NDArray[np.bool_]


class PreparedCurves:
    """Exposures with one direct beam, geometry, mask and configuration: reduced to curves and desmeared.

    Attributes
    ----------
    q : ndarray
        In 1/nm, shape (n,).
    psf, reduction, smearing
        See `Instrumental`.
    model : versions.Model or None
        The model behind the method; None for classical ones.
    """

    def __init__(self, instrumental: Instrumental, config: Config) -> None:
        self.psf, self.reduction, self.smearing = instrumental
        self.q = self.reduction.q
        self._method = prepare(self.smearing, config.method, **_desmearing_options(config))
        self.model: Model | None = self._method.model

    def __call__(
        self, frames: ArrayLike, *, time: ArrayLike = 1.0, monitor: ArrayLike = 1.0, transmission: ArrayLike = 1.0
    ) -> xr.Dataset:
        """Reduce and desmear sample frames, see `reduce`; dims (exposure, q), as `desmearing.desmear` returns.

        Raises
        ------
        BadInput
            If the frames cannot be reduced or desmeared.
        """
        return self.answer(self.reduce(frames, time=time, monitor=monitor, transmission=transmission))

    def reduce(
        self, frames: ArrayLike, *, time: ArrayLike = 1.0, monitor: ArrayLike = 1.0, transmission: ArrayLike = 1.0
    ) -> xr.Dataset:
        """Reduce sample frames to curves; see `PreparedExposures.reduce`."""
        return self.reduction(frames, time=time, monitor=monitor, transmission=transmission)

    def answer(self, reduced: xr.Dataset) -> xr.Dataset:
        """Desmear curves of `reduce`; see `PreparedExposures.answer`."""
        return self._method(reduced)


def _desmearing(exposed: Exposed, config: Config) -> PreparedCurves:
    return PreparedCurves(exposed.instrumental(config), config)


def _desmearing_options(config: Config) -> dict[str, Any]:
    options = {**config.options, **({} if config.device == "cpu" else {"device": config.device})}
    solver_of(config.method_name, options)
    return options


def _images(exposed: Exposed, config: Config) -> PreparedImages:
    from .icosahedra.exposures import PreparedImages

    return PreparedImages(exposed.poni, exposed.mask, device=config.device, **_image_options(config))


def _image_options(config: Config) -> dict[str, Any]:
    from .icosahedra.exposures import PreparedImages

    check_options(config.method_name, PreparedImages, config.options, given=("poni", "mask", "device"))
    return {"model": config.method, **config.options}


SECTOR = (0.0, 20.0)
"""Azimuth and width, in degrees, of the sector that denoised frames are integrated over, if none is given."""


def _patterns(exposed: Exposed, config: Config) -> PreparedPatterns:
    from .denoising.exposures import PreparedPatterns

    options = _pattern_options(config)
    azimuth, width = options.pop("sector")
    _, reduction, smearing = exposed.instrumental(config, (azimuth - width / 2, azimuth + width / 2))
    return PreparedPatterns(reduction, smearing, device=config.device, **options)


def _pattern_options(config: Config) -> dict[str, Any]:
    from .denoising.exposures import PreparedPatterns

    options = dict(config.options)
    sector = _sector(options.pop("sector", SECTOR))
    check_options(config.method_name, PreparedPatterns, options, given=("reduction", "smearing", "device", "options"))
    solver_of(str(options["method"]).partition(":")[0], {})
    return {"model": config.method, **options, "sector": sector}


def _sector(value: Any) -> tuple[float, float]:
    match value:
        case [int() | float() as azimuth, int() | float() as width] if 0 < width <= 360:
            return float(azimuth), float(width)
    raise BadInput(f"The sector is {value!r}; give its azimuth and its width in degrees, such as [0, 20].")


PREPARE: dict[str, Callable[[Exposed, Config], PreparedExposures]] = {"icosahedra": _images, "symmetry-denoiser": _patterns}
"""How models that read frames are prepared; all other methods desmear."""

OPTIONS: dict[str, Callable[[Config], dict[str, Any]]] = {"icosahedra": _image_options, "symmetry-denoiser": _pattern_options}
"""Their options, once they are checked."""


def prepare_exposures(
    beam_frame: ArrayLike | None,
    poni: Mapping[str, Any],
    *,
    mask: NDArray | None = None,
    beam_mask: NDArray | None = None,
    beam_poni: Mapping[str, Any] | None = None,
    config: Config | None = None,
) -> PreparedExposures:
    """Prepare for all samples that were exposed with one direct beam; repeated calls are free.

    Parameters
    ----------
    beam_frame
        Counts of the direct beam, shape (y, x) or (frame, y, x), which are summed; None for a method that needs none.
    poni
        Geometry of the exposures.
    mask
        True where a pixel does not count in the samples' frames.
    beam_mask
        The same for the direct beam's frame, which has no beamstop; `mask` if not given.
    beam_poni
        Geometry of the direct beam's exposure, where the detector stood elsewhere; `poni` if not given.
    config
        What to do, and how.

    Returns
    -------
    PreparedExposures
        `PreparedCurves` where the method desmears.

    Raises
    ------
    BadInput
        If beam, geometry or mask cannot be used, or the method has no such options.
    """
    config = config or Config()
    frame = np.asarray(() if beam_frame is None else beam_frame)
    key = _digest(frame, (poni, beam_poni), (mask, beam_mask), config)
    with _lock:
        lock = _locks.setdefault(key, threading.Lock())
    with lock:  # one thread prepares, others that want the same wait for it
        with _lock:
            if key in _cache:
                _cache.move_to_end(key)
                return _cache[key]
        prepared = PREPARE.get(config.method_name, _desmearing)(Exposed(frame, poni, mask, beam_mask, beam_poni), config)
        with _lock:
            _cache[key] = prepared
            while len(_cache) > CACHE_SIZE:
                _locks.pop(_cache.popitem(last=False)[0], None)
    return prepared


_cache: OrderedDict[str, PreparedExposures] = OrderedDict()
_locks: dict[str, threading.Lock] = {}
_lock = threading.Lock()


def _with_gaps(beam_frame: ArrayLike, poni: Mapping[str, Any], mask: NDArray | None) -> NDArray[np.bool_]:
    """Add what does not count in the direct beam's frame (gaps, hot pixels) to the mask."""
    frame = np.asarray(beam_frame)
    gaps = invalid_pixels(frame, str(poni.get("detector", "")))
    gaps = np.atleast_3d(gaps.T).T.any(axis=0)
    return np.asarray(gaps if mask is None else gaps | np.asarray(mask, dtype=bool))


def _digest(frame: NDArray, ponis: Iterable[Mapping[str, Any] | None], masks: Iterable[NDArray | None], config: Config) -> str:
    geometries = [None if poni is None else _plain(poni) for poni in ponis]
    sha = hashlib.sha256(json.dumps([geometries, asdict(config)], sort_keys=True).encode())
    for array in (frame, *(np.empty(0) if m is None else np.asarray(m, dtype=bool) for m in masks)):
        sha.update(f"{array.shape}{array.dtype}".encode())
        sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()


def _plain(poni: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(dict(poni), default=str))


def _digest_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
