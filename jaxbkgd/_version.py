"""The version of this package, which may run from a folder that is not installed."""

import importlib.metadata


try:
    __version__ = importlib.metadata.version("jaxbkgd")
except importlib.metadata.PackageNotFoundError:
    __version__ = "(not installed)"
