"""The state of any object as plain data: what a checkpoint can hold of a simulator.

Scenarios keep tensors wherever they like: on agents, on the world, on themselves, in lists. They
are found by walking from object to object; a twin built in the same way takes them up by path.
"""

import collections
import random
from collections.abc import Callable
from enum import Enum
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class _Stream(NamedTuple):
    """How the state of a source of random numbers is taken, and put back."""

    kind: type
    take: Callable[[Any], Any]
    put: Callable[[Any, Any], None]


_STREAMS = (
    _Stream(torch.Generator, torch.Generator.get_state, lambda g, s: g.set_state(s.cpu())),
    _Stream(random.Random, random.Random.getstate, random.Random.setstate),
    _Stream(
        np.random.Generator,
        lambda g: g.bit_generator.state,
        lambda g, s: setattr(g.bit_generator, "state", s),
    ),
)
_FOREIGN = ("torch", "numpy", "gym", "pyglet", "builtins")  # whose objects are left as they are


def take(root: object) -> dict[str, dict]:
    """What can be reached from `root`: values, and links from object to object, by owner and name.

    The tensors are not copied: save them before anything else happens.
    """
    owners = _owners(root)
    paths = {id(owner): path for path, owner in owners.items()}
    values, links = {}, {}
    for path, owner in owners.items():
        fields = [(name, value) for name, _, value in _fields(owner)]
        values[path] = {name: _saved(value) for name, value in fields if _is_plain(value)}
        links[path] = {name: paths[id(value)] for name, value in fields if id(value) in paths}
    return {"values": values, "links": links}


def put(root: object, state: dict[str, dict]) -> None:
    """Give `root` what `take` found in its twin. Raises ValueError if it is built otherwise."""
    owners = _owners(root)
    missing = [path for path in state["values"] if path not in owners]
    missing += [
        f"{path}/{name}"
        for path, owner in owners.items()
        if isinstance(owner, list)
        for name in state["values"].get(path, {}) | state["links"].get(path, {})
        if name >= len(owner)
    ]
    if missing:
        rest = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(f"the simulator has no {', '.join(missing[:3])}{rest}")
    for path, owner in owners.items():
        links = {name: owners[to] for name, to in state["links"].get(path, {}).items()}
        keys = {name: key for name, key, _ in _fields(owner)}
        for name, value in (state["values"].get(path, {}) | links).items():
            _set(owner, keys.get(name, name), value)


def _owners(root: object) -> dict[str, Any]:
    """Everything that holds values, once each, by the shortest path that leads there."""
    owners, seen = {"": root}, {id(root)}
    waiting = collections.deque(owners.items())
    while waiting:
        path, owner = waiting.popleft()
        for name, _, value in _fields(owner):
            if id(value) not in seen and not _is_plain(value) and _is_owner(value):
                seen.add(id(value))
                owners[f"{path}/{name}"] = value
                waiting.append((f"{path}/{name}", value))
    return owners


def _fields(owner: Any) -> list[tuple[Any, Any, Any]]:
    """(name in a checkpoint, key, value) of all that is in an object, dict, list or tuple."""
    if isinstance(owner, list | tuple):
        return [(index, index, value) for index, value in enumerate(owner)]
    items = owner if isinstance(owner, dict) else vars(owner)
    return [
        # A plain text is a name, of a class of its own or not; of other keys their place is.
        (str(key) if isinstance(key, str) else place, key, value)
        for place, (key, value) in enumerate(items.items())
    ]


def _set(owner: Any, key: Any, value: Any) -> None:
    if isinstance(owner, tuple):
        return  # cannot change
    items = owner if isinstance(owner, dict | list) else vars(owner)
    old = items[key] if isinstance(owner, list) else items.get(key)
    items[key] = _like(old, value)


def _like(old: Any, value: Any) -> Any:
    """A saved value as the twin's own are: by the type and the device of its `old` one."""
    if isinstance(old, Tensor) and isinstance(value, Tensor):
        return value.to(old.device)
    if isinstance(old, np.ndarray):
        return value.cpu().numpy()
    if isinstance(old, np.generic):
        return type(old)(value)
    if isinstance(old, collections.deque):
        return collections.deque(value, old.maxlen)
    if isinstance(old, set):
        return set(value)
    if stream := _stream(old):
        stream.put(old, value)
        return old
    if isinstance(old, Enum) and isinstance(value, str) and value in type(old).__members__:
        return type(old)[value]
    return value


def _stream(value: Any) -> _Stream | None:
    return next((stream for stream in _STREAMS if isinstance(value, stream.kind)), None)


def _is_owner(value: Any) -> bool:
    if isinstance(value, list | tuple | dict):
        return True
    if isinstance(value, type | ModuleType | Enum) or callable(value):
        return False
    module = type(value).__module__
    known = module.startswith("torch.distributions") or module.split(".")[0] not in _FOREIGN
    return hasattr(value, "__dict__") and known


def _is_plain(value: Any) -> bool:
    """Whether it is, or can be saved as, what `torch.load` takes back without running code."""
    if isinstance(value, collections.deque | set):
        return all(map(_is_simple, value))
    return isinstance(value, Enum | np.generic) or bool(_stream(value)) or _is_simple(value)


def _is_simple(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return type(value) in (list, tuple) and all(map(_is_simple, value))
    if isinstance(value, dict):
        plain = all(isinstance(key, str | int) for key in value) and type(value) is dict
        return plain and all(map(_is_simple, value.values()))
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "biufc"  # no texts, no objects
    return value is None or isinstance(value, bool | int | float | str | Tensor)


def _saved(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, collections.deque | set):
        return list(map(_saved, value))
    if stream := _stream(value):
        return _saved(stream.take(value))
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value if min(value.strides, default=0) >= 0 else value.copy())
    if isinstance(value, list | tuple):
        return type(value)(map(_saved, value))
    if isinstance(value, dict):
        return {_saved(key): _saved(entry) for key, entry in value.items()}
    for kind in (bool, int, float, str):  # of a class of its own, it could not be loaded
        if isinstance(value, kind):
            return kind(value)
    return value
