"""Names for everything that can be added: one registry per kind of thing.

A file inside the registry's package registers what it defines by `@REGISTRY.register("name")`. A package
of somebody else does the same in a module that its entry point names, in the group
`cosearch.<kind>`, for example `[project.entry-points."cosearch.format"]  mine = "my_package.mine"`.
"""

import difflib
import importlib
import pkgutil
import threading
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from typing import Generic, TypeVar, cast

from cosearch.core.errors import UserError

T = TypeVar("T")
E = TypeVar("E")


class Registry(Generic[T]):
    """The things of one kind by name; they are imported when a name is first looked up."""

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self._package = package
        self._entries: dict[str, T] = {}
        self._loaded = self._loading = False
        self._lock = threading.RLock()

    def register(self, name: str) -> Callable[[E], E]:
        """Register the decorated object by `name`."""

        def add(entry: E) -> E:
            known = self._entries.get(name)
            if known is not None and known is not entry:
                raise ValueError(f"two entries of kind {self.kind!r} are named {name!r}")
            self._entries[name] = cast(T, entry)
            return entry

        return add

    def __getitem__(self, name: str) -> T:
        self._load()
        if name not in self._entries:
            raise UserError(f"unknown {self.kind} {name!r}{did_you_mean(name, self.names())}")
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        self._load()
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def names(self) -> tuple[str, ...]:
        """All registered names, sorted."""
        self._load()
        return tuple(sorted(self._entries))

    def _load(self) -> None:
        if self._loaded:
            return
        with self._lock:
            # A module may look a name up while it is imported; other threads wait until all names are there.
            if self._loaded or self._loading:
                return
            self._loading = True
            try:
                self._import_all()
                self._loaded = True
            finally:
                self._loading = False

    def _import_all(self) -> None:
        package = importlib.import_module(self._package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self._package}.{module.name}")
        for entry_point in entry_points(group=f"cosearch.{self.kind}"):
            entry_point.load()
            if entry_point.name not in self._entries:
                raise UserError(
                    f"the entry point {entry_point.name!r} in group 'cosearch.{self.kind}' loads "
                    f"{entry_point.value!r}, which registers no {self.kind} of that name"
                )


def did_you_mean(name: str, allowed: tuple[str, ...]) -> str:
    """The tail of a message about an unknown name: the nearest name, and all that are allowed."""
    near = difflib.get_close_matches(name, allowed, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{hint or '.'} Allowed: {', '.join(allowed) or 'none'}"
