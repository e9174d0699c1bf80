"""Desmearing methods behind one call: ``desmear(curves, smearing, method=...)``."""
