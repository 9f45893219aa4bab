# SPDX-License-Identifier: Apache-2.0
"""Putting zipfast's functions and classes in the place of those of an imported checkout, and back.

An object is replaced wherever a module of the checkout holds *it*: as an attribute of the module (``from x import f``), as
an attribute of one of its classes, or as a default of one of its functions (``def transform(..., transform_fn=f)``).
Nothing is imported or run from files; before anything is replaced, both sides compute the same small problems.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType, ModuleType, TracebackType
from typing import Any

OWN = __name__.partition(".")[0]


@dataclass(frozen=True)
class Name:
    """One public name: the file that defines it, ours, and how far two candidates are apart on small problems.

    ``distance(theirs, ours)`` is the largest difference, relative to the size of the values; at most `within` passes.
    ``unnamed`` are parameters of theirs that ours takes without naming them.
    """

    file: str
    name: str
    ours: Any
    distance: Callable[[Any, Any], float]
    within: float = 0.0
    unnamed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tool:
    """A public code: what the errors call it, its names, and which module a user imports to get them all."""

    op: str
    source: str
    names: Sequence[Name]
    example: str


@dataclass
class Installed:
    """What :func:`install` replaced; ends with :meth:`uninstall` or at the end of a ``with`` block.

    replaced: places, such as ``model_merger.match_tensors_zipit``. elsewhere: places outside the checkout that still hold
    an original, as your own script does after ``from matching_functions import ...``; import there after the installation,
    or name that module in ``also``. difference: per name, how far both were apart on the small problems (0: equal bits).
    """

    replaced: tuple[str, ...]
    elsewhere: tuple[str, ...]
    difference: dict[str, float]
    _undo: Callable[[], None] = field(repr=False)

    def uninstall(self) -> None:
        """Put the originals back wherever ours stand now; a second call does nothing."""
        self._undo()

    def __enter__(self) -> Installed:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.uninstall()


def check(tool: Tool, checkout: ModuleType | None = None, names: Sequence[str] | None = None) -> dict[str, float]:
    """How far ours and the imported checkout's are apart, by name; 0 means equal bits.

    Raises:
        ImportError: no such module has been imported.
        ValueError: an unknown name, several checkouts, one that zipfast serves already, or a result that differs.
    """
    chosen = _chosen(tool, names)
    return _compare(tool, _Checkout(tool, checkout), chosen)


def install(
    tool: Tool,
    checkout: ModuleType | None = None,
    names: Sequence[str] | None = None,
    also: Sequence[ModuleType] = (),
) -> Installed:
    """Replace the names in an imported checkout, after `check`; see there for the errors."""
    chosen = _chosen(tool, names)
    found = _Checkout(tool, checkout)
    difference = _compare(tool, found, chosen)
    pairs = [(vars(m)[n.name], n.ours) for n in chosen for m in found.files(n.file) if n.name in vars(m)]
    ours = {id(mine): theirs for theirs, mine in pairs}
    kept = {p.name for p in _places(found.modules(also), ours)}  # what uses ours of its own accord keeps it
    done = _places(found.modules(also), {id(theirs): mine for theirs, mine in pairs})
    for place in done:
        place.set(place.after)
    inside = found.modules(also)
    others = [m for m in list(sys.modules.values()) if isinstance(m, ModuleType) and m not in inside]
    originals = {id(theirs) for theirs, _ in pairs}
    elsewhere = [
        f"{vars(m).get('__name__')}.{k}" for m in others for k, v in list(vars(m).items()) if id(v) in originals
    ]

    def undo() -> None:
        for place in done:
            if place.now() is place.after:
                place.set(place.before)
        for place in _places(found.modules(also), ours):  # of modules imported in between, from patched ones
            if place.name not in kept:
                place.set(place.after)
        done.clear()
        ours.clear()

    return Installed(tuple(p.name for p in done), tuple(elsewhere), difference, undo)


class _Checkout:
    """The modules of one folder, as far as they are imported."""

    folder: Path

    def __init__(self, tool: Tool, named: ModuleType | None) -> None:
        files = {n.file for n in tool.names}
        self.named = named
        if named is None:
            folders = {p.parent for _, p in _modules() if p.stem in files}
            if not folders:
                raise ImportError(
                    f"{tool.op}: the checkout of {tool.source} must be imported first, got none of "
                    f"{', '.join(sorted(files))} in sys.modules; put its folder on sys.path and import {tool.example}"
                )
            if len(folders) > 1:
                seen = ", ".join(sorted(map(str, folders)))
                raise ValueError(f"{tool.op}: 'checkout' must name one of the imported checkouts, got None and {seen}")
            (self.folder,) = folders
            return
        path = _path(named)
        if path is None:
            raise ValueError(f"{tool.op}: 'checkout' must be an imported module with a file, got {named!r}")
        for folder in path.parents:  # the file itself may lie in a folder of the checkout
            self.folder = folder
            if any(self.files(f) for f in files):
                return
        raise ValueError(
            f"{tool.op}: 'checkout' must be a module of {tool.source} beside one of {', '.join(sorted(files))}, "
            f"imported, got {path}"
        )

    def modules(self, also: Sequence[ModuleType] = ()) -> list[ModuleType]:
        """All of the folder, as imported now; zipfast's own never, wherever they are installed."""
        found = [m for m, p in _modules() if p.is_relative_to(self.folder)]
        return list(dict.fromkeys([*found, *([] if self.named is None else [self.named]), *also]))

    def files(self, stem: str) -> list[ModuleType]:
        """The modules of one file: it may have been imported under several names."""
        found = [m for m, p in _modules() if p.stem == stem and p.parent == self.folder]
        own = self.named is not None and _path(self.named) == self.folder / f"{stem}.py" and self.named not in found
        return [*found, self.named] if own and self.named is not None else found


def _chosen(tool: Tool, names: Sequence[str] | None) -> list[Name]:
    known = list(dict.fromkeys(n.name for n in tool.names))
    for name in names or ():
        if name not in known:
            raise ValueError(f"{tool.op}: 'names' must be of {', '.join(known)}, got {name!r}")
    return [n for n in tool.names if names is None or n.name in names]


def _compare(tool: Tool, found: _Checkout, chosen: list[Name]) -> dict[str, float]:
    difference: dict[str, float] = {}
    for name in chosen:
        for module in found.files(name.file):
            theirs = vars(module).get(name.name)
            if theirs is None:  # an older or cut-down checkout: nothing to replace
                continue
            if theirs is name.ours:
                raise ValueError(
                    f"{tool.op}: the checkout in {found.folder} must hold its own {name.name}, got zipfast's; uninstall() "
                    "what the first install returned"
                )
            refusal = (
                f"{tool.op}: {name.file}.{name.name} in {found.folder} must compute what {tool.source} computes, got "
                "{}; leave it out with names=..."
            )
            more = _parameters(theirs) - _parameters(name.ours) - {*name.unnamed}
            if more:  # an option that ours would refuse, or swallow
                raise ValueError(refusal.format(f"the parameter {min(more)}, which zipfast's has not"))
            try:
                apart = name.distance(theirs, name.ours)
            except Exception as e:  # whatever a changed fork raises, it is not the code that ours replaces
                raise ValueError(refusal.format(f"{type(e).__name__} ({e}) on a small problem")) from e
            if not apart <= name.within:
                raise ValueError(refusal.format(f"a difference of {apart:.1e} on a small problem"))
            difference[name.name] = max(apart, difference.get(name.name, 0.0))
    if not difference:
        raise ValueError(
            f"{tool.op}: the checkout in {found.folder} must have one of the names, got none; see names=..."
        )
    return difference


def _parameters(call: Any) -> set[str]:
    """Names of the parameters; of a class, of its constructor and, with the method's name before them, its methods."""
    if not isinstance(call, type):
        return set(inspect.signature(call).parameters)
    found = {f"__init__({p})" for p in inspect.signature(call).parameters}
    for name, method in inspect.getmembers(call, inspect.isfunction):
        if not name.startswith("_"):
            found |= {f"{name}()", *(f"{name}({p})" for p in inspect.signature(method).parameters)}
    return found


@dataclass(frozen=True)
class _Place:
    """An attribute of a module, class or function that holds, or contains, an object to replace."""

    name: str
    owner: Any
    attribute: str
    before: Any
    after: Any

    def now(self) -> Any:
        """What stands there, without the binding that ``getattr`` does for classes."""
        inner = isinstance(self.owner, (ModuleType, type))
        return vars(self.owner).get(self.attribute) if inner else getattr(self.owner, self.attribute)

    def set(self, value: Any) -> None:
        setattr(self.owner, self.attribute, value)


def _places(modules: Sequence[ModuleType], new: dict[int, Any]) -> list[_Place]:
    """Where the objects with these ids stand, found by identity, and what shall stand there."""
    found: list[_Place] = []
    for module in modules:
        for attribute, value in list(vars(module).items()):
            if id(value) in new:
                found.append(_Place(f"{module.__name__}.{attribute}", module, attribute, value, new[id(value)]))
            elif getattr(value, "__module__", None) != module.__name__:
                continue  # defined elsewhere
            elif isinstance(value, FunctionType):
                found += _in_defaults(value, new)
            elif isinstance(value, type):
                found += _in_class(value, new)
    return found


def _in_class(owner: type, new: dict[int, Any]) -> list[_Place]:
    found: list[_Place] = []
    for attribute, value in list(vars(owner).items()):
        inner = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
        name = f"{owner.__module__}.{owner.__qualname__}.{attribute}"
        if id(value) in new:
            found.append(_Place(name, owner, attribute, value, new[id(value)]))
        elif isinstance(value, staticmethod) and id(inner) in new:
            found.append(_Place(name, owner, attribute, value, staticmethod(new[id(inner)])))
        elif isinstance(inner, FunctionType):
            found += _in_defaults(inner, new)
    return found


def _in_defaults(function: FunctionType, new: dict[int, Any]) -> list[_Place]:
    name = f"{function.__module__}.{function.__qualname__} (defaults)"
    pairs = [(k, getattr(function, k)) for k in ("__defaults__", "__kwdefaults__")]
    return [_Place(name, function, k, v, _mapped(v, new)) for k, v in pairs if _mapped(v, new) is not v]


def _mapped(value: Any, new: dict[int, Any]) -> Any:
    """With replacements in tuples and dictionaries, nested too; the value itself where there is none."""
    if id(value) in new:
        return new[id(value)]
    if type(value) is tuple:
        items = tuple(_mapped(v, new) for v in value)
        return items if any(a is not b for a, b in zip(items, value)) else value
    if type(value) is dict:
        entries = {k: _mapped(v, new) for k, v in value.items()}
        return entries if any(entries[k] is not value[k] for k in value) else value
    return value


def _modules() -> list[tuple[ModuleType, Path]]:
    """The imported modules that have a file, apart from zipfast's own."""
    found = dict.fromkeys(m for m in list(sys.modules.values()) if isinstance(m, ModuleType))
    pairs = ((m, _path(m)) for m in found if str(vars(m).get("__name__")).partition(".")[0] != OWN)
    return [(m, p) for m, p in pairs if p is not None]


def _path(module: ModuleType) -> Path | None:
    file = vars(module).get("__file__")
    return _resolved(file) if isinstance(file, str) else None


@functools.lru_cache(maxsize=65536)  # thousands of modules, looked through several times
def _resolved(file: str) -> Path:
    return Path(file).resolve()
