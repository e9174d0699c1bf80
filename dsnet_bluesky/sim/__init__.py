"""A simulated SAXS beamline: exact physics without devices, and ophyd-async devices around it.

`samples` holds form factors with their exact curves, `camera` turns them into
frames, `devices` lets a RunEngine take those frames.

Examples
--------
>>> from dsnet_bluesky.sim import SaxsCamera, Setting, Sphere
>>> camera = SaxsCamera(seed=1)
>>> camera.frame(Setting(Sphere(radius=8.0), slit_width=4e-3, slit_height=2.5e-3), time=60.0).shape
(619, 487)
"""

from .camera import PAPER_SLITS, SaxsCamera, Setting, SlitSetting
from .devices import SampleChanger, SimBeamline, SimSaxsDetector
from .samples import SAMPLES, GaussianChain, Sample, SilverBehenate, Sphere

__all__ = [
    "PAPER_SLITS",
    "SAMPLES",
    "GaussianChain",
    "Sample",
    "SampleChanger",
    "SaxsCamera",
    "Setting",
    "SilverBehenate",
    "SimBeamline",
    "SimSaxsDetector",
    "SlitSetting",
    "Sphere",
]
