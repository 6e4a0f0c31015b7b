"""Make a virtual environment with the pinned versions, in a checkout that has nothing yet. Standard library only."""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
OLDEST = (3, 11)

CUDA_WARNING = """\
pip is about to download PyTorch with CUDA, about 3 GB. On a machine without an NVIDIA GPU, stop here (Ctrl-C) and
install the CPU build into the new environment first (see pytorch.org, "CPU"), then run the same command again:
    {python} -m pip install torch=={version} --index-url <the CPU index named there>"""


class BootstrapError(Exception):
    """Something the user has to do first, in one sentence."""


def environment(extra: str) -> Path:
    """The Python of the checkout's environment with `depthscope[extra]` installed; made where it is missing.

    Raises BootstrapError when Python is too old, cannot make environments, or pip fails.
    """
    if sys.version_info < OLDEST:
        raise BootstrapError(
            f"depthscope needs Python {'.'.join(map(str, OLDEST))} or newer; this is {platform.python_version()}. "
            "Run the same command with a newer one (make: PYTHON=python3.12 make demo)."
        )
    if not (ROOT / "constraints.txt").exists():
        raise BootstrapError(
            'This depthscope lacks torch, which training needs: pip install "depthscope[probes]".'
        )
    python = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = VENV / f"depthscope-{extra}.stamp"
    wanted = _fingerprint()
    if python.exists() and stamp.exists() and stamp.read_text() == wanted:
        return python
    if not python.exists():
        print(f"Making a virtual environment in {VENV.name} …", flush=True)
        try:
            venv.create(VENV, with_pip=True, clear=VENV.exists())
        except (subprocess.CalledProcessError, OSError) as error:
            shutil.rmtree(VENV, ignore_errors=True)
            raise BootstrapError(
                f"This Python cannot make a virtual environment ({error}): on Debian and Ubuntu, install python3-venv."
            ) from error
    _warn_of_cuda(python)
    print(
        f"Installing depthscope[{extra}] with pinned versions; the first time takes a minute or two …",
        flush=True,
    )
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["-c", ROOT / "constraints.txt", "-e", f"{ROOT}[{extra}]"]
    if subprocess.run(command).returncode:
        raise BootstrapError(
            "pip could not install depthscope (its words are above): check the network and disk, then run this again."
        )
    stamp.write_text(wanted)
    return python


def _fingerprint() -> str:
    files = (ROOT / "pyproject.toml", ROOT / "constraints.txt")
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def _warn_of_cuda(python: Path) -> None:
    """Say so before pip fetches gigabytes of CUDA; in a terminal, wait for a yes."""
    version = _torch_version()
    asked = [
        python,
        "-m",
        "pip",
        "install",
        "--dry-run",
        "--quiet",
        "--no-deps",
        "--report",
        "-",
        f"torch=={version}",
    ]
    answer = subprocess.run(asked, capture_output=True, text=True)
    try:
        chosen = json.loads(answer.stdout)["install"]
    except (ValueError, KeyError):
        return  # the installation itself will say what is wrong
    # On Linux the plain wheel carries CUDA; a CPU build calls itself "+cpu", and an installed one needs no download.
    plain = [package for package in chosen if "+" not in package["metadata"]["version"]]
    if not plain or not sys.platform.startswith("linux"):
        return
    print(CUDA_WARNING.format(python=python, version=version), flush=True)
    if sys.stdin.isatty() and input("Download it? [y/N] ").strip().lower() not in ("y", "yes"):
        raise BootstrapError("Nothing was downloaded.")


def _torch_version() -> str:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return next(line.removeprefix("torch==") for line in lines if line.startswith("torch=="))


def browser() -> None:
    """Install Chromium for the browser tests where apt-get may; otherwise those tests skip and say so."""
    if any(shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")):
        return
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        print(
            "No Chromium here, and none can be installed without root and apt: the browser tests will be skipped."
        )
        return
    print("Installing Chromium for the browser tests …", flush=True)
    quiet = {"stdout": subprocess.DEVNULL, "env": {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}}
    subprocess.run(["apt-get", "update", "-qq"], **quiet)
    command = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium", "fonts-liberation"]
    if subprocess.run(command, **quiet).returncode:
        print("Chromium could not be installed: the browser tests will be skipped.", flush=True)


if __name__ == "__main__":
    try:
        environment(sys.argv[1] if len(sys.argv) > 1 else "probes")
        if sys.argv[1:] == ["dev"]:
            browser()
    except BootstrapError as problem:
        sys.exit(str(problem))
    except KeyboardInterrupt:
        sys.exit("Stopped.")
