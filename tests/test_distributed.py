"""Sharded parameters: two gloo processes step the shards of what one process steps whole, to the same bits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import distributed

import fusedopt

WORLD = 2
SECONDS = 100  # a guard against a hang: importing torch takes most of the time


@pytest.mark.skipif(not distributed.is_gloo_available(), reason="torch was built without gloo")
def test_two_processes(tmp_path: Path) -> None:
    path = [str(Path(fusedopt.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("ranks.py")), str(rank), str(WORLD), str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        printed = [rank.communicate(timeout=SECONDS)[0] for rank in ranks]
    finally:
        for process in ranks:
            process.kill()
    for rank, text in enumerate(printed):
        assert ranks[rank].returncode == 0, f"process {rank}:\n{text}"
