"""Where a figure comes from: the command, the commit and the processor."""

import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path


def command(benchmark: str, arguments: list[str] | None) -> str:
    given = sys.argv[1:] if arguments is None else arguments
    return shlex.join(["python", "-m", f"benchmarks.{benchmark}", *given])


def commit() -> str:
    """The commit that runs, and whether files differ from it."""

    def git(*words: str) -> str:
        root = Path(__file__).resolve().parent
        return subprocess.run(["git", "-C", root, *words], capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + (", with changes" if changed else "")


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    name = names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"
