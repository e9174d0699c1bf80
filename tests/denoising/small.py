"""A small scan, and the recipe of a small network that learns from it in half a minute."""

from dsnet_bluesky.denoising.network import DenoiserConfig
from dsnet_bluesky.sim.anisotropic import AnisotropicScan
from dsnet_bluesky.training.denoiser import DenoiserRecipe

NETWORK = DenoiserConfig(channels=(8, 12, 16))
RECIPE = DenoiserRecipe(steps=500, batch=4, crop=64, held_out=0.25, architecture=NETWORK)
SCAN = AnisotropicScan.draw(32, "training", 1, shape=(64, 64), centre=(32.0, 32.0))
DOSE = 8.0
