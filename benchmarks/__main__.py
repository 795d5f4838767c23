"""Run every benchmark that needs no accelerator and print all claims as one table."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.report import print_table

HERE = Path(__file__).parent
NOT_BENCHMARKS = {"__init__", "__main__", "report"}
HOURS = {"dense_to_sparse", "serving_load"}  # trainings and ten minutes of load, which are run by themselves


def main() -> None:
    rows: list[dict[str, object]] = []
    failed = []
    names = [path.stem for path in sorted(HERE.glob("*.py"))]
    scripts = [name for name in names if name not in NOT_BENCHMARKS | HOURS and not name.startswith("gpu_")]
    for name in scripts:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "claims.json"
            print(f"== {name}", flush=True)
            if subprocess.run([sys.executable, "-m", f"benchmarks.{name}", "--json", str(out)]).returncode:
                failed.append(name)
            else:
                rows += json.loads(out.read_text())
    print_table(rows)
    if failed:
        sys.exit(f"these benchmarks did not finish: {', '.join(failed)}")


if __name__ == "__main__":
    main()
