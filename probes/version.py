"""The version of depthscope that is running."""

from importlib import metadata


def version() -> str:
    """The installed version, or "checkout" where depthscope is used without installing it."""
    try:
        return metadata.version("depthscope")
    except metadata.PackageNotFoundError:
        return "checkout"
