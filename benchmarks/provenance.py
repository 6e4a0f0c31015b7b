"""Where a figure comes from: the command and the commit."""

import os
import shlex
import subprocess
import sys
from pathlib import Path


def command(benchmark: str, arguments: list[str] | None) -> str:
    """As it was given; of a path on this machine the name alone."""
    given = sys.argv[1:] if arguments is None else arguments
    given = [Path(each).name if Path(each).is_absolute() else each for each in given]
    return shlex.join(["python", "-m", f"benchmarks.{benchmark}", *given])


COMMIT = "DEPTHSCOPE_COMMIT"


def commit() -> str:
    """The commit that runs, and whether files differ from it; outside a repository or without git what the environment
    says it is (`COMMIT`), else "unknown"."""

    def git(*words: str) -> str:
        root = Path(__file__).resolve().parent
        try:
            return subprocess.run(["git", "-C", root, *words], capture_output=True, text=True).stdout.strip()
        except FileNotFoundError:
            return ""

    changed = git("status", "--porcelain", "--untracked-files=no")
    return (git("rev-parse", "--short", "HEAD") or os.environ.get(COMMIT, "unknown")) + (
        ", with changes" if changed else ""
    )
