"""DeepSpeed's compiled collective: built once for each checkout, and free of the locks of killed processes.

``python tests/compiled_ops.py FOLDER`` builds it before the tests.

PyTorch guards a build by a lock file that nobody takes away when its owner is killed: every later process waits for it
without end. Tests kill processes, so they have a folder of their own, where no lock outlives the test that left it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

BUILD = 'from deepspeed.accelerator import get_accelerator as a; a().create_op_builder("ShareMemCommBuilder").load()'


def build(folder: Path) -> None:
    """Compile into ``folder``, or find that it is up to date; later processes of these tests look there."""
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    # ninja lies beside this Python, which need not be on the path.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    environment = {**os.environ, "PATH": path, "CUDA_VISIBLE_DEVICES": ""}
    remove_locks()
    subprocess.run([sys.executable, "-c", BUILD], env=environment, check=True, capture_output=True, timeout=500)


def remove_locks() -> None:
    """To be called when no process of ours runs."""
    if "TORCH_EXTENSIONS_DIR" not in os.environ:
        return  # builds are the user's own
    for lock in Path(os.environ["TORCH_EXTENSIONS_DIR"]).glob("*/lock"):
        lock.unlink(missing_ok=True)


if __name__ == "__main__":
    build(Path(sys.argv[1]).resolve())
