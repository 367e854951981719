"""The short form of each benchmark runs; its numbers mean nothing here."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_benchmark_of_the_pair_stream_times_every_variant():
    command = [sys.executable, str(ROOT / "benchmarks" / "pair_stream.py"), "--tiny", "--repeats", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("pairs/s") == 5
