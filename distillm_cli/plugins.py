"""Define the registries of divergences, methods, metrics and data sets, built-in and from other packages.

A package adds its own through an entry point, which names a module (or an object of it) whose import registers them:

    [project.entry-points."distillm.divergences"]
    squared = "my_package.squared"

The groups are ``distillm.divergences``, ``distillm.methods``, ``distillm.metrics`` and ``distillm.datasets``. A registry
imports its built-in modules and its entry points when it is first read. An entry point that cannot be imported is
reported by a PluginWarning and in ``failures``; everything else works without it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from distillm_cli.errors import UsageError

if TYPE_CHECKING:
    from distillm_cli.config.methods import Method
    from distillm_cli.data.known import KnownDataset
    from distillm_cli.evaluation.metrics import Metric
    from distillm_cli.losses.divergences import DivergenceEntry

_T = TypeVar("_T")


class PluginWarning(UserWarning):
    """Warn about an entry point that cannot be imported."""


@dataclass(frozen=True)
class PluginFailure:
    """Describe an entry point that could not be imported: its group, its name, its distribution and the cause."""

    group: str
    name: str
    distribution: str
    cause: str

    def __str__(self) -> str:
        return (
            f"plug-in {self.name} of {self.distribution} ({self.group}) cannot be loaded; {self.cause}; "
            f"fix or uninstall {self.distribution}"
        )


class Registry(Mapping[str, _T], Generic[_T]):
    """Map names to the entries of one group, in the order of their registration.

    group: what the entries are, such as "divergences". builtin: dotted modules whose import registers the built-in ones.
    check: called with each entry of another package; one that it raises an error for is left out, with a PluginWarning.
    """

    def __init__(self, group: str, *builtin: str, check: Callable[[_T], None] | None = None):
        self.group = group
        self.builtin = builtin
        self.check = check
        self.failures: list[PluginFailure] = []
        self._entries: dict[str, _T] = {}
        self._origins: dict[str, str] = {}
        self._distributions: dict[str, str] = {}  # of entries of other packages
        self._is_loaded = False
        self._loading: str | None = None
        self._closed_by: str | None = None

    def register(self, name: str, entry: _T, origin: str | None = None) -> None:
        """Add an entry. Raises UsageError for a name in use.

        origin: the module that it comes from, for messages; None: the module that is being loaded.
        """
        origin = origin or self._loading or "this program"
        if name in self._entries:
            raise UsageError(
                "usage.invalid_plugin",
                f"{self.group}: {name} is registered twice",
                where=f"by {self._origins[name]} and by {origin}",
                hint="give one of them another name",
            )
        if self._closed_by is not None:
            raise UsageError(
                "usage.invalid_plugin",
                f"{self.group}: {name} is registered too late",
                where=f"{self._closed_by} exists already",
                hint=f"register it through an entry point of distillm.{self.group}, or import {origin} earlier",
            )
        self._entries[name] = entry
        self._origins[name] = origin

    def close(self, built: str) -> None:
        """Load everything and refuse later entries. built: the product of the entries, for the message."""
        self._load()
        self._closed_by = built

    def __getitem__(self, name: str) -> _T:
        if name not in self._entries:
            self._load()
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(self._entries)

    def __len__(self) -> int:
        self._load()
        return len(self._entries)

    def _load(self) -> None:
        """Import the built-in modules and the entry points, once."""
        if self._is_loaded:
            return
        self._is_loaded = True  # the imported modules may read the registry
        for module in self.builtin:
            self._loading = module
            import_module(module)
        for entry_point in metadata.entry_points(group=f"distillm.{self.group}"):
            self._loading = entry_point.value
            self._load_plugin(entry_point)
        self._loading = None
        self._check_entries()

    def _load_plugin(self, entry_point: metadata.EntryPoint) -> None:
        """Import an entry point. One that fails leaves no entry in any registry."""
        registries: tuple[Registry[Any], ...] = (self, divergences, methods, metrics, datasets)
        before = [dict(registry._entries) for registry in registries]
        distribution = entry_point.dist.name if entry_point.dist is not None else entry_point.value
        try:
            entry_point.load()
        except Exception as error:
            for registry, entries in zip(registries, before, strict=True):
                registry._remove(registry._added_since(entries))
            self._report(entry_point.name, distribution, error)
        for registry, entries in zip(registries, before, strict=True):
            registry._distributions |= dict.fromkeys(registry._added_since(entries), distribution)

    def _added_since(self, entries: Mapping[str, _T]) -> list[str]:
        """Return the new entries of other packages. New built-in ones come from a plug-in that imports their module."""
        return [name for name in self._entries if name not in entries and not self._is_builtin(name)]

    def _remove(self, names: list[str]) -> None:
        for name in names:
            del self._entries[name]

    def _check_entries(self) -> None:
        """Reject the entries of other packages that do not pass the check."""
        foreign = [name for name in self._entries if not self._is_builtin(name)]
        if self.check is None:
            return
        for name in foreign:
            try:
                self.check(self._entries[name])
            except Exception as error:
                self.reject(name, error)

    def _is_builtin(self, name: str) -> bool:
        return self._origins[name].startswith(f"{__package__}.")

    def reject(self, name: str, error: Exception) -> None:
        """Remove an unusable entry of another package. Raises the error if the entry is built-in."""
        if self._is_builtin(name):
            raise error
        del self._entries[name]
        self._report(name, self._distributions.get(name, self._origins[name]), error)

    def _report(self, name: str, distribution: str, error: Exception) -> None:
        cause = str(error) if isinstance(error, UsageError) else f"{type(error).__name__}: {error}"
        failure = PluginFailure(f"distillm.{self.group}", name, distribution, " ".join(cause.split()))
        self.failures.append(failure)
        warnings.warn(str(failure), PluginWarning, stacklevel=2)


divergences: Registry[DivergenceEntry] = Registry(
    "divergences",
    "distillm_cli.losses.divergences",
    "distillm_cli.losses.families",
    check=lambda entry: entry.check(),
)
methods: Registry[Method] = Registry("methods", "distillm_cli.config.methods")
metrics: Registry[Metric] = Registry("metrics", "distillm_cli.evaluation.metrics")
datasets: Registry[KnownDataset] = Registry("datasets", "distillm_cli.data.known")


def failures() -> list[PluginFailure]:
    """Return the entry points that could not be imported so far."""
    return [failure for registry in (divergences, methods, metrics, datasets) for failure in registry.failures]
