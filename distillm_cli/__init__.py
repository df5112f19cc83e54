"""Provide the library of the command ``distillm``, which turns a large language model into a small one.

    import distillm_cli as distillm

    result = distillm.distill(recipe="quickstart", alpha=0.2)

Functions are imported when they are used, so that the import of the package takes no time.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distillm_cli.api import distill, evaluate, generate, load_recipe, pilot, plan, run, sft

    __version__: str

__all__ = ["__version__", "distill", "evaluate", "generate", "load_recipe", "pilot", "plan", "run", "sft"]


def __getattr__(name: str) -> Any:
    """Return a function of ``distillm_cli.api``, or ``__version__``."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name != "__version__":
        from distillm_cli import api

        return getattr(api, name)
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("distillm")
    except PackageNotFoundError:  # a source tree that was never installed
        return "0+source"


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
