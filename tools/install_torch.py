"""Install PyTorch into the running environment: the CPU build where there is no GPU, whatever the registry has else.

A plain ``pip install torch`` brings several gigabytes of CUDA libraries to a Linux machine that cannot use them. The
CPU build sorts above the ordinary one (``2.13.0+cpu`` > ``2.13.0``), so offering PyTorch's own index beside the
registry is enough; where that index cannot be reached, pip falls back to the ordinary wheel.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys

VERSION = "2.13.0"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def main() -> int:
    if importlib.util.find_spec("torch") is not None:
        return 0
    command = [sys.executable, "-m", "pip", "install", "--quiet", f"torch=={VERSION}"]
    if sys.platform == "linux" and shutil.which("nvidia-smi") is None:
        command += ["--retries", "1", "--extra-index-url", CPU_INDEX]
    return subprocess.call(command)


if __name__ == "__main__":
    sys.exit(main())
