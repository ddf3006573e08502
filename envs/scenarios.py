"""VMAS scenarios, found by name, file or module, and built with the arguments that they read."""

import contextlib
import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
import traceback
import warnings
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import gym_notices.notices

# VMAS imports gym for its spaces alone; gym's advice to migrate is not for our users.
gym_notices.notices.notices.clear()

import vmas  # noqa: E402
from vmas.simulator.environment import Environment as Simulator  # noqa: E402
from vmas.simulator.scenario import BaseScenario  # noqa: E402

_SHIPPED = {
    **dict.fromkeys(vmas.scenarios, "vmas.scenarios"),
    **dict.fromkeys(vmas.mpe_scenarios, "vmas.scenarios.mpe"),
    **dict.fromkeys(vmas.debug_scenarios, "vmas.scenarios.debug"),
}


class ScenarioError(ValueError):
    """A scenario that is unknown, unusable or wrongly configured; the message is one line."""


def scenario_names() -> list[str]:
    """Names of all scenarios that VMAS ships: the plain ones, mpe and debug."""
    return sorted(_SHIPPED)


def build(name: str, arguments: dict, **settings) -> Simulator:
    """Build the simulator, holding the scenario to the arguments it really reads."""
    scenario = _load(name)
    known = _argument_names(scenario)
    # VMAS would take these names for settings of its own.
    for key in inspect.signature(vmas.make_env).parameters:
        if key in arguments:
            raise ScenarioError(_unknown_argument(name, key, known))
    watched = {_Argument(key): value for key, value in arguments.items()}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Scenario kwargs")  # reported below
            simulator = vmas.make_env(scenario, **settings, **watched)
    except Exception as error:
        if isinstance(error, TypeError) and "unexpected keyword" in str(error):
            for key in watched:
                if not key.used:
                    raise ScenarioError(_unknown_argument(name, key, known)) from error
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        called = f"'{name}'" + (f" with {given}" if given else "")
        raise ScenarioError(f"VMAS cannot build scenario {called}: {reason(error)}") from error
    for key in watched:
        if not key.used:
            raise ScenarioError(_unknown_argument(name, key, known))
    if not simulator.n_agents:
        raise ScenarioError(f"scenario '{name}' has no agent to control, with these arguments")
    return simulator


@functools.cache
def digest(scenario: type) -> str:
    """What the source of a scenario, as it was first used, and the version of VMAS come to."""
    source = ""
    with contextlib.suppress(OSError, TypeError):  # there may be bytecode alone
        source = inspect.getsource(inspect.getmodule(scenario))
    return hashlib.sha256(f"{version('vmas')}\n{source}".encode()).hexdigest()


def reason(error: Exception) -> str:
    """An error in one line; a bare assertion shows the line that asserts."""
    text = str(error) or traceback.extract_tb(error.__traceback__)[-1].line or ""
    return f"{type(error).__name__}: {' '.join(text.split())}"


class _Argument(str):
    """A keyword that remembers whether anything has looked it up by name.

    Scenarios read their arguments from `**kwargs`, always a new dict: only its keys are ours.
    """

    used = False
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        same = str.__eq__(self, other)
        self.used |= same is True
        return same


def _load(name: str) -> BaseScenario:
    """Find a scenario by its name in VMAS, its file or its module."""
    try:
        if name in _SHIPPED:
            module = importlib.import_module(f"{_SHIPPED[name]}.{name}")
        else:
            module = _module_from_file(Path(name)) if name.endswith(".py") else _module(name)
        cls = getattr(module, "Scenario", None)
        if cls is None:
            raise ScenarioError(f"scenario '{name}' has no class Scenario")
        if not (inspect.isclass(cls) and issubclass(cls, BaseScenario)):
            raise ScenarioError(f"scenario '{name}': its Scenario is not a VMAS BaseScenario")
        return cls()
    except ScenarioError:
        raise
    except Exception as error:
        raise ScenarioError(f"cannot load scenario '{name}': {reason(error)}") from error


def _module_from_file(path: Path) -> ModuleType:
    """A scenario file as a module."""
    path = path.expanduser()
    if not path.is_file():
        raise ScenarioError(f"there is no scenario file {path.resolve()}")
    return _run_file(path.resolve())


@functools.cache
def _run_file(path: Path) -> ModuleType:
    """Run a file once: one that is edited meanwhile must not give evaluation another task."""
    spec = importlib.util.spec_from_file_location(f"scenario_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses, for one, look up their module by name
    spec.loader.exec_module(module)
    return module


def _module(name: str) -> ModuleType:
    """Import a scenario's module; a name that is no module is an unknown scenario."""
    unknown = f"unknown scenario '{name}'; "
    if not all(part.isidentifier() for part in name.split(".")):
        raise ScenarioError(unknown + _nearest(name, scenario_names()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if name == error.name or name.startswith(f"{error.name}."):
            missing = f"there is no module '{error.name}'" if "." in name else ""
            raise ScenarioError(unknown + _nearest(name, scenario_names(), missing)) from error
        raise


def _argument_names(scenario: BaseScenario) -> list[str]:
    """The argument names that can be read off a scenario's source, for error messages."""
    parameters = inspect.signature(scenario.make_world).parameters.values()
    names = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD} - {"batch_dim", "device"}
    for cls in type(scenario).__mro__:
        if cls is BaseScenario:
            break
        with contextlib.suppress(OSError, TypeError, SyntaxError):  # no source, or another by now
            source = inspect.getsource(cls)
            names |= set(re.findall(r"kwargs(?:\.pop\(|\.get\(|\[)\s*['\"](\w+)", source))
    return sorted(names)


def _unknown_argument(scenario: str, argument: str, known: list[str]) -> str:
    """The message that a scenario does not take an argument."""
    choices = _nearest(argument, known) if known else "it shows none"
    return f"scenario '{scenario}' has no argument '{argument}'; {choices}"


def _nearest(name: str, choices: list[str], otherwise: str = "") -> str:
    """The choices most like a name, for an error message; if none is, `otherwise`, or all."""
    if close := difflib.get_close_matches(name, choices):
        return f"nearest: {', '.join(close)}"
    return otherwise or f"choose from: {', '.join(choices)}"
