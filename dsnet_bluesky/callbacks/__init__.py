"""Callbacks: from run documents to exposures, and from exposures to results."""
