"""databroker, as the way in by profile that beamlines know."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from fabio.edfimage import EdfImage

from dsnet_bluesky.ingest import ingest
from dsnet_bluesky.server import Server

CODE = """
import json, sys
import databroker
run = databroker.catalog["saxs"]["raw"][sys.argv[1]]
print(json.dumps([run.metadata["start"]["purpose"], list(run["primary"]["image"].read().shape)]))
"""


def test_runs_are_found_through_a_profile(served: Server, tmp_path: Path, poni_file: Path, sample_frames: np.ndarray):
    frame = served.data_directory / "detector" / "databroker.edf"
    EdfImage(data=sample_frames[0]).write(str(frame))
    (uid,) = ingest([frame], client=served.client(), purpose="sample", poni=poni_file, sample="AgBh")
    (tmp_path / "saxs.yml").write_text(f"saxs:\n  uri: {served.uri}\n")
    environment = {**os.environ, "TILED_PROFILES": str(tmp_path), "TILED_API_KEY": served.api_key}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CODE, uid], env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == ["sample", [1, *sample_frames.shape[1:]]]
