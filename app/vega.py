"""The chart library for the browser: Vega from the vl-convert wheel, bundled once a version and kept. No network."""

import functools
import hashlib
import os
import tempfile
from importlib.metadata import version
from pathlib import Path

SNIPPET = "window.depthscopeVega = {vegaEmbed};"


@functools.cache
def library() -> str:
    """JavaScript, about 0.9 MB, that leaves `window.depthscopeVega` behind; from the cache where it is there."""
    made_of = hashlib.sha256(SNIPPET.encode()).hexdigest()[:8]
    kept = _cache() / f"vega-{version('vl-convert-python')}-{made_of}.js"
    try:
        return kept.read_text(encoding="utf-8")
    except OSError:
        pass
    import vl_convert

    made = vl_convert.javascript_bundle(SNIPPET)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(f".{os.getpid()}")
        part.write_text(made, encoding="utf-8")
        part.replace(kept)
    except OSError:
        pass  # nowhere to keep it: the next start makes it again
    return made


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    if home:
        return Path(home) / "depthscope"
    try:
        return Path.home() / ".cache" / "depthscope"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / "depthscope"
