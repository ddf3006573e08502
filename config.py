"""Settings: `defaults` and presets of a yaml file, flags on top, typed by their defaults.

A preset's `tasks` maps names of tasks to settings for that task alone; it is no use with others.
A setting has a path such as `actor.entropy`. Presets and flags are both turned into pairs of path
and value that one function, `_assign`, checks and stores, so that both are held to the same rules.
"""

import copy
import difflib
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from tools import UserError, replacing

_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    type(None): "a single value",
}
_ANY = object()  # stands for the default of a key in a free-form group


class UnknownSetting(UserError):
    """A path that leads to no setting."""


class Config:
    """Settings by attribute, groups of them as `Config`s in turn; read-only. Lists are tuples."""

    __slots__ = ("_values",)

    def __init__(self, values: Mapping[str, Any]):
        frozen = {key: _frozen(value) for key, value in values.items()}
        object.__setattr__(self, "_values", frozen)

    def __getattr__(self, name: str) -> Any:
        if name not in self._values:
            raise AttributeError(f"no setting is called '{name}'{_nearest(name, self._values)}")
        return self._values[name]

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"settings are read-only: cannot set '{name}'")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"settings are read-only: cannot delete '{name}'")

    def __reduce__(self) -> tuple[type, tuple]:  # copy and pickle cannot set attributes
        return Config, (self.as_dict(),)

    def __repr__(self) -> str:
        return f"Config({self.as_dict()})"

    def as_dict(self) -> dict[str, Any]:
        """A copy as plain dicts, lists and scalars, in the order of the yaml file."""
        return {key: _thawed(value) for key, value in self._values.items()}


def _frozen(value: Any) -> Any:
    if isinstance(value, Mapping):
        return Config(value)
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def _thawed(value: Any) -> Any:
    if isinstance(value, Config):
        return value.as_dict()
    return list(map(_thawed, value)) if isinstance(value, tuple) else value


def load_config(
    argv: list[str],
    path: Path,
    required: Sequence[str] = ("logdir",),
    saved: Path | None = None,
) -> Config:
    """Resolves `defaults` of the yaml at `path`, then the presets of `--configs`, then the flags.

    `argv` is the command line without the program's name. Each key in `required` must end up with
    a value. `saved`, the file of a run's own settings, comes before the presets; a setting
    of it that is gone is ignored, with a warning. `--help` prints every key with its default and
    exits. Raises `UserError`.
    """
    path = Path(path)
    sections = {str(name): section or {} for name, section in read_yaml(path).items()}
    defaults = sections.pop("defaults", None)
    if not isinstance(defaults, dict):
        raise UserError(f"{path} has no group 'defaults'")
    # What the user has to give is text: a logdir called 2024 is no number.
    defaults |= {key: "" for key in required if defaults.get(key) is None}
    if "--help" in argv or "-h" in argv:
        _show(_usage(sections, defaults, _comments(path)))
        sys.exit(0)
    values = copy.deepcopy(defaults)
    flags = _parse(argv, defaults)
    if saved:
        for key, value in _leaves(read_yaml(saved)):
            try:
                _assign(values, defaults, key, value, f"{saved}: ")
            except UnknownSetting as error:  # of an older version; what it shaped is checked anyway
                warnings.warn(f"ignored: {error}", stacklevel=2)
    stack = _stack(flags, sections, path)
    said = [values, *(preset for _, preset in stack), *({key: words[0]} for key, words in flags)]
    task = next((settings["task"] for settings in reversed(said) if "task" in settings), None)
    for source, preset in stack:
        for key, value in _settings(preset, task, source):
            _assign(values, defaults, key, value, source)
    for key, words in flags:
        if key != "configs":
            _assign(values, defaults, key, _read(words, _lookup(defaults, key, "--")), "--")
    for key in required:
        if values[key] == "":
            raise UserError(f"--{key} is missing: give it as --{key} VALUE")
    return Config(values)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a yaml file. Raises `UserError` if there is none."""
    try:
        content = YAML(typ="safe", pure=True).load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"cannot read {path}: expected keys with values")
    return content


def save_config(config: Config, path: Path) -> None:
    """Writes the settings as yaml, whole or not at all; `read_yaml` gives `as_dict()` back."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # keep the order of the defaults
    with replacing(path) as file:
        yaml.dump(config.as_dict(), file)


def check_compatible(saved: Mapping[str, Any], config: Config, keys: Sequence[str]) -> None:
    """Raises `UserError` where `saved` and `config` differ in any of `keys`.

    A key may be a path such as `actor.entropy`, or a group, which is compared key by key.
    """
    before, now = (
        {key: value for key, value in _leaves(settings) if value != {}}
        for settings in (saved, config.as_dict())
    )
    differences = [
        f"{path}: saved {before.get(path, 'nothing')}, now {now.get(path, 'nothing')}"
        for path in {**now, **before}
        if before.get(path) != now.get(path)
        and any(path == key or path.startswith(f"{key}.") for key in keys)
    ]
    if differences:
        listed = "; ".join(differences)
        raise UserError(f"the saved run has other settings (--configs, flags): {listed}")


def _comments(path: Path) -> dict[str, str]:
    """What is said behind each key of `defaults`, on its own line, by the key's path."""

    def walk(group: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
        for key, value in group.items():
            if isinstance(value, Mapping):
                yield from walk(value, f"{prefix}{key}.")
            token = group.ca.items.get(key, [None] * 3)[2]
            if token and (line := token.value.partition("\n")[0]):
                yield f"{prefix}{key}", f"  {line}"

    return dict(walk(YAML(typ="rt", pure=True).load(path.read_text(encoding="utf-8"))["defaults"]))


def _usage(
    presets: Mapping[str, Any], defaults: Mapping[str, Any], comments: Mapping[str, str]
) -> str:
    rows = [
        (f"--{key}", f"{_shown(key, value):20}{comments.get(key, '')}".rstrip())
        for key, value in _leaves(defaults)
    ]
    width = max((len(flag) for flag, _ in rows), default=0)
    return "\n".join(
        [
            f"usage: python {Path(sys.argv[0]).name} [--configs PRESET ...] [--KEY VALUE ...]",
            f"presets: {' '.join(presets)}",
            "keys and their defaults:",
            *(f"  {flag:{width}}  {value}" for flag, value in rows),
        ]
    )


def _show(text: str) -> None:
    """Print a text, as far as anybody reads it."""
    try:
        print(text, flush=True)
    except BrokenPipeError:  # `--help | head` has seen enough; the rest goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _shown(key: str, value: Any) -> str:
    if isinstance(value, Mapping):
        return f"(any --{key}.NAME VALUE)"
    if isinstance(value, list):
        return " ".join(_shown(key, item) for item in value) or "[]"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value) or "''"


def _leaves(group: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting of nested groups as (path, value); an empty group stands for itself."""
    for key, value in group.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _parse(argv: list[str], defaults: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Splits a command line into (key, words); only lists and `configs` take several words."""
    flags: list[tuple[str, list[str]]] = []
    for token in argv:
        if token.startswith("--"):
            key, equals, word = token[2:].partition("=")
            flags.append((key, [word] if equals else []))
        elif not flags or (token.startswith("-") and isinstance(_number(token), str)):
            raise UserError(f"unexpected argument '{token}': write settings as --KEY VALUE")
        else:
            flags[-1][1].append(token)
    for key, words in flags:
        default = [""] if key == "configs" else _lookup(defaults, key, "--")
        if not words:
            raise UserError(f"--{key} needs a value: {_expected(default)}")
        if len(words) > 1 and not isinstance(default, list):
            raise UserError(f"unexpected argument '{words[1]}': --{key} takes one value")
    return flags


def _stack(
    flags: Sequence[tuple[str, list[str]]], sections: Mapping[str, Any], path: Path
) -> list[tuple[str, Mapping[str, Any]]]:
    """The presets of the last `--configs`, each after what an error about it begins with."""
    stacks = [words for key, words in flags if key == "configs"]
    presets = []
    for name in stacks[-1] if stacks else []:
        if name not in sections:
            raise UserError(f"--configs: unknown preset '{name}'{_nearest(name, sections)}")
        source = f"preset '{name}' of {path.name}: "
        if not isinstance(sections[name], dict):
            raise UserError(f"{source}expected keys with values")
        presets.append((source, sections[name]))
    return presets


def _settings(
    preset: Mapping[str, Any], task: str | None, source: str
) -> Iterator[tuple[str, Any]]:
    """The settings of a preset as (path, value), then those that its `tasks` hold for the task."""
    preset = dict(preset)
    tasks = preset.pop("tasks", None)
    yield from _leaves(preset)
    if tasks is None:
        return
    if not isinstance(tasks, Mapping) or not all(isinstance(x, Mapping) for x in tasks.values()):
        raise UserError(f"{source}tasks: expected tasks, each with keys and values")
    if task not in tasks:
        raise UserError(f"{source}nothing for task {task}; it has {', '.join(tasks)}")
    yield from _leaves(tasks[task])


def _lookup(defaults: Mapping[str, Any], path: str, source: str) -> Any:
    """The default that `path` leads to, `_ANY` in a free-form group (one that is empty)."""
    *parents, name = path.split(".")
    group: Any = defaults
    for parent in parents:
        group = group.get(parent) if isinstance(group, Mapping) else None
    if parents and group == {} and name:
        return _ANY
    if isinstance(group, Mapping) and name in group:
        return group[name]
    dashes = "--" if source == "--" else ""
    known = ["configs"] * bool(dashes) + [key for key, _ in _leaves(defaults)]
    free = [f"{key}.{name}" for key, value in _leaves(defaults) if value == {}]
    raise UnknownSetting(f"{source}{path}: no such setting{_nearest(path, known, free, dashes)}")


def _assign(
    values: dict[str, Any], defaults: Mapping[str, Any], path: str, value: Any, source: str
) -> None:
    """Stores `value` in `values` at `path` if it suits the default there; of a group, each part."""
    default = _lookup(defaults, path, source)
    if isinstance(default, Mapping):
        if isinstance(value, Mapping):
            for key, part in value.items():
                _assign(values, defaults, f"{path}.{key}", part, source)
            return
        keys = ", ".join(f"{path}.{key}" for key in default) or f"{path}.NAME"
        raise UserError(f"{source}{path}: a group has no value of its own; it has {keys}")
    try:
        typed = _typed(value, default)
    except (ValueError, OverflowError):
        raise UserError(f"{source}{path}: expected {_expected(default)}, got {value!r}") from None
    *groups, name = path.split(".")
    for group in groups:
        values = values[group]
    values[name] = typed


def _expected(default: Any) -> str:
    if isinstance(default, list):
        return f"a list, each item {_expected(default[0] if default else None)}"
    return "a value" if default is _ANY else _KINDS[type(default)]


def _typed(value: Any, default: Any) -> Any:
    """`value` as the type of `default`; raises `ValueError` if it is not one."""
    kind = type(default)
    if kind is list and type(value) is list:
        return [_typed(item, default[0] if default else None) for item in value]
    if kind is int and type(value) is float and value.is_integer():
        return int(value)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is kind or (default is None and type(value) in _KINDS):
        return value
    if default is _ANY and (type(value) in _KINDS or type(value) is list):
        return value
    raise ValueError


def _read(words: list[str], default: Any) -> Any:
    """The value that the words of a flag spell; words that spell none are left as text."""
    if isinstance(default, list):
        return [_read([word], default[0] if default else None) for word in words]
    (text,) = words
    if isinstance(default, str):
        return text
    if isinstance(default, bool):
        return {"true": True, "True": True, "false": False, "False": False}.get(text, text)
    if isinstance(default, int | float):
        return _number(text)
    with suppress(YAMLError):
        value = YAML(typ="safe", pure=True).load(text)
        if type(value) in {*_KINDS, list, dict}:  # a date, say, is left as text
            return value
    return text


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def _nearest(
    name: str, names: Iterable[str], otherwise: Sequence[str] = (), prefix: str = ""
) -> str:
    """The end of an error message: which of `names` may have been meant, or else `otherwise`."""
    names = list(names)
    same_leaf = [other for other in names if other.rpartition(".")[2] == name]
    close = difflib.get_close_matches(name, names, n=3)
    near = list(dict.fromkeys([*same_leaf, *close]))[:3] or otherwise
    if not near and len(names) > 12:
        return "; --help lists all"
    listed = ", ".join(prefix + other for other in near or names)
    return f"; {'nearest' if near else 'there are'}: {listed}"
