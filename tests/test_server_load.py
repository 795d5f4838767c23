"""The load of benchmarks/serving_load.py for a minute: no error, and the server still ends cleanly."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_minute_of_mixed_requests_meets_no_error(tmp_path: Path) -> None:
    """The ten minutes of the claim, and its memory, are the benchmark's."""
    file = tmp_path / "claims.json"
    command = [sys.executable, "-m", "benchmarks.serving_load", "--minutes", "1", "--clients", "24", "--warm-up", "2"]
    subprocess.run([*command, "--json", str(file)], check=True, cwd=ROOT, timeout=300)
    claims = {row["claim"]: row for row in json.loads(file.read_text())}
    assert claims["errors in 1 minutes, 24 clients, pocket"]["measured"] == 0
    assert claims["requests answered"]["measured"] > 20
