"""distillm: turn a large language model into a small one, from the command line."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("distillm")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+source"
