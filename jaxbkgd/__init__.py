"""The background of single-molecule localization microscopy movies, in JAX."""

import lazy_loader


# `__init__.pyi` lists the names. They are imported when they are first used (SPEC 1 of
# Scientific Python), so that the command can answer Ctrl-C while JAX is imported.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
