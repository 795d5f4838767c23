"""Every Triton kernel compiles for the GPUs it is written for, and fits their shared memory. No GPU is needed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "dtype"), [(90, "bfloat16"), (90, "float32"), (80, "float16")])
def test_kernels_compile(capability: int, dtype: str) -> None:
    """In a process of its own, where Triton compiles; matrix instructions of the target are really used."""
    script = Path(__file__).with_name("triton_compiler.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, str(script), str(capability), dtype], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) > 40
    if dtype != "float32":
        instruction = "wgmma.mma" if capability == 90 else "mma.sync"
        forward = [line for line in lines if "prefill _forward_kernel" in line]
        assert forward
        assert all(f"'{instruction}': 0" not in line for line in forward)
