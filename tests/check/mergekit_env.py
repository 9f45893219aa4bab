# SPDX-License-Identifier: Apache-2.0
"""mergekit and PEFT in an environment of their own, and real merges through them: ``python tests/check/mergekit_env.py``.

mergekit pins much, and what it needs besides torch changes often: exact versions are installed into build/mergekit, beside
the torch of this interpreter, which is only looked up there. Later runs use the environment again. Needs pip's index the
first time; about a minute then, half a minute later.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import sys
import time
from pathlib import Path

from check import ROOT, run

PLACE = ROOT / "build" / "mergekit"
# Without their dependencies: those would bring another torch, and data sets that no merge reads.
ALONE = ("mergekit==0.1.5", "peft==0.21.2", "accelerate==1.15.0")
WITH = (
    "transformers==5.23.0", "click==8.5.1", "pydantic==2.14.3", "immutables==0.21", "tqdm==4.70.1", "psutil==7.2.2",
    "pyyaml==6.0.3", "scipy==1.17.1", "safetensors==0.8.0", "pytest==9.2.0",
)  # fmt: skip
TESTS = ("tests/compat/test_compat_mergekit.py", "tests/soups/test_adapters_peft.py")


def environment() -> Path:
    """The interpreter of the environment, which is made where it is not there or not of these versions."""
    python = PLACE / "bin" / "python"
    stamp, wanted = PLACE / "versions", hashlib.sha256(repr((ALONE, WITH, sys.executable)).encode()).hexdigest()
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    shutil.rmtree(PLACE, ignore_errors=True)
    run(sys.executable, "-m", "venv", PLACE)
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        run(python, "-m", "pip", "install", "-q", "torch==2.13.0")
    else:  # behind the environment's own packages, so that those come first
        own = next((PLACE / "lib").glob("python*/site-packages"))
        # what torch needs may lie in another folder, where this interpreter's environment stands upon another
        folders = [str(Path(torch.origin).parents[1]), *(p for p in sys.path if p.endswith("-packages"))]
        (own / "torch-of-the-parent.pth").write_text("\n".join(dict.fromkeys(folders)) + "\n")
    run(python, "-m", "pip", "install", "-q", *WITH)
    run(python, "-m", "pip", "install", "-q", "--no-deps", *ALONE)
    stamp.write_text(wanted)
    return python


def main() -> None:
    begin = time.perf_counter()
    python = environment()
    made = time.perf_counter()
    version = run(python, "-c", "import mergekit, importlib.metadata as m; print(m.version('mergekit'))").strip()
    settings = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    output = run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rs", *TESTS, env=settings)
    if " skipped" in output.splitlines()[-1]:
        raise SystemExit(f"{output[-3000:]}\na test was skipped where all must run")
    print(f"    mergekit {version}: {output.strip().splitlines()[-1]}; environment {made - begin:.0f} s")


if __name__ == "__main__":
    main()
