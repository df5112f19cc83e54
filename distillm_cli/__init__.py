"""distillm: turn a large language model into a small one, from the command line."""


def __getattr__(name: str) -> str:
    """``__version__``, looked up when it is asked for: every start would wait for it."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("distillm")
    except PackageNotFoundError:  # a source tree that was never installed
        return "0+source"
