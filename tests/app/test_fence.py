"""The dashboard never imports torch: checked in a clean interpreter, and the check itself is checked."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

LOOK = """
import importlib, pkgutil, sys
import app
for module in pkgutil.walk_packages(app.__path__, "app."):
    if not module.name.startswith(("app.main", "app.pages_", "app.demo", "app.training", "app.attributing")):
        importlib.import_module(module.name)
from streamlit.testing.v1 import AppTest
sys.argv = ["main.py", FOLDER]
at = AppTest.from_file("app/main.py", default_timeout=60)
for page in ("runs", "dilution", "gradients", "depth_attention", "tokens", "attribution", "compare"):
    at.switch_page(f"pages_/{page}.py").run()
    assert not at.exception, at.exception
"""
CHECK = "print('torch' if any(name.split('.')[0] == 'torch' for name in sys.modules) else 'clean')"


def look(code: str, tmp_path: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", f"FOLDER = {str(tmp_path)!r}\nimport sys\n{code}\n{CHECK}"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip().splitlines()[-1]


def test_no_page_imports_torch(folder):
    assert look(LOOK, folder) == "clean"


def test_the_check_can_fail(tmp_path):
    (tmp_path / "torch.py").write_text("")
    assert look(f"sys.path.insert(0, {str(tmp_path)!r})\nimport torch", tmp_path) == "torch"


def test_the_command_line_is_quick_to_import(tmp_path):
    heavy = "assert not {'streamlit', 'altair', 'pandas', 'numpy'} & set(sys.modules)"
    assert look(f"import app.cli\n{heavy}", tmp_path) == "clean"
