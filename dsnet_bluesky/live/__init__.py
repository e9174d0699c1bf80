"""Looking on while results come: `plot.LiveDesmear` beside a RunEngine, `page.router` in a browser.

Both take from the catalog what anybody may read there, so they work wherever the
desmearing is done. Updates over Tiled's stream are a hint to look; what is in the
catalog is the truth.
"""
