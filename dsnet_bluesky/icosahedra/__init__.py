"""Single icosahedra from one image at wide angles: simulated, read by a network, and simulated again to see whether it is right.

After T. Stielow, R. Schmidt, C. Peltz, T. Fennel and S. Scheel, "Fast reconstruction of single-shot wide-angle diffraction
images through deep learning", Mach. Learn.: Sci. Technol. 1 (2020) 045007.

These images have no centre of symmetry: at wide angles the pixel opposite to q is not -q, for both have the same component
along the beam. Averaging opposite pixels, or denoising by them, ruins the answer; the card of a model forbids it.
"""

from .model import Icosahedra
from .multislice import Detector, Simulator
from .network import NetworkConfig, ResNet

__all__ = ["Detector", "Icosahedra", "NetworkConfig", "ResNet", "Simulator"]
