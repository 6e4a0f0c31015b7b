"""`python -m app …` in a checkout: the command line, after making an environment for it where there is none."""

import importlib.util
import os
import subprocess
import sys


def main() -> None:
    try:
        _main()
    except KeyboardInterrupt:  # also while the libraries are still being imported
        sys.exit(130)


def _main() -> None:
    missing = [name for name in ("click", "streamlit", "altair", "safetensors") if not _installed(name)]
    if sys.argv[1:2] == ["demo"] and not _installed("torch"):
        missing.append("torch")
    if not missing:
        from app.cli import main as command_line

        command_line(prog_name="depthscope")
        return
    from app.bootstrap import BootstrapError, environment

    try:
        python = environment("probes")
    except BootstrapError as problem:
        sys.exit(str(problem))
    command = [str(python), "-m", "app", *sys.argv[1:]]
    if os.name == "nt":  # exec there would return to the shell at once
        sys.exit(subprocess.call(command))
    os.execv(python, command)


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


if __name__ == "__main__":
    main()
