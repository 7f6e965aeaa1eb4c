"""Where parts come from: the modules of our folders, and plugins, which bring parts from outside of the package.

A plugin is a Python file, a module, or a folder with Python files and configurations (`model/*.yaml`,
`ablation/*.yaml` and the other groups of `configs/`). It is named in `plugins=[my_mixers.py]`, in the variable
`MIXERZOO_PLUGINS` (several with commas between them), or by an entry point in the group `mixerzoo.plugins` of an
installed package.

Its parts register themselves when it is imported, as ours do. Its code, with what it imports from its own folder, is
part of the identity of the runs that use it; see `used`.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import os
import pkgutil
import sys
import traceback
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import ConfigError
from .plugin_code import Code, code_of_script, digest, own_files

ENVIRONMENT = "MIXERZOO_PLUGINS"
ENTRY_POINTS = "mixerzoo.plugins"
# Files that are plugins become modules of these names, which no other module can have.
_PREFIX = "mixerzoo_plugin_"
_OURS = __name__.rpartition(".")[0]
# Where parts of ours register themselves.
_ROOMS = ("mixers", "models.parts", "models.conversion", "tasks", "training.schedules")


@dataclass(frozen=True)
class Part:
    """A registered part: its kind ("mixer", "norm", ...), its name, and the class or function itself."""

    kind: str
    name: str
    value: Any

    @property
    def is_ours(self) -> bool:
        return self.value.__module__.split(".")[0] == _OURS


@dataclass
class Plugin:
    """A loaded plugin.

    Attributes:
        spec: what loads it in another process: an absolute path or the name of a module.
        root: the folder that its files are named from.
        modules: names of its modules, those that were asked for.
        configs: its YAML files.
        sources: its code as it was loaded: its own Python files, with what they import from their own folder, and the
            configurations, each by its name below `root`.
    """

    spec: str
    root: Path
    modules: list[str] = field(default_factory=list)
    configs: list[Path] = field(default_factory=list)
    sources: dict[str, bytes] = field(default_factory=dict)

    def read(self) -> None:
        """Keep the code in mind; a file that is edited later does not change what was loaded."""
        entries = [Path(str(sys.modules[name].__file__)) for name in self.modules]
        files = sorted({*own_files(entries, self.root), *self.configs})
        self.sources = {path.relative_to(self.root).as_posix(): path.read_bytes() for path in files}


PARTS: list[Part] = []
PLUGINS: dict[str, Plugin] = {}


def note(kind: str, name: str, value: Any) -> None:
    """Keep in mind that a part was registered; all registries say so. The later one of a name counts."""
    PARTS[:] = [part for part in PARTS if (part.kind, part.name) != (kind, name)]
    PARTS.append(Part(kind, name, value))


def same_place(one: Any, other: Any) -> bool:
    """Whether two classes or functions are versions of one, as when a notebook's cell or a file is run again."""
    return (one.__module__, one.__qualname__) == (other.__module__, other.__qualname__)


# -- finding


@functools.cache
def import_all(package: str) -> None:
    """Import every module below a package once, folders included.

    Args:
        package: full name, e.g. `mixerzoo.mixers`.
    """
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, prefix=f"{package}."):
        importlib.import_module(module.name)


def discover(package: str) -> None:
    """Import every module below a package, and the plugins that the environment and installed packages name.

    Raises:
        ConfigError: a plugin that cannot be loaded.
    """
    import_all(package)
    load_outside()


_found = False


def load_outside() -> None:
    """Load, once, the plugins that the environment and installed packages name.

    Raises:
        ConfigError: one that cannot be loaded.
    """
    global _found
    if _found:
        return
    _found = True  # before: a plugin may ask for parts itself
    try:
        load_plugins(os.environ.get(ENVIRONMENT, "").split(","))
        for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
            load_plugins([entry.value.partition(":")[0]])
    except ConfigError:
        _found = False
        raise


def load_plugins(specs: Iterable[str], *, key: str = "plugins") -> list[Plugin]:
    """Load plugins that are not loaded yet; child processes load them, too.

    Args:
        specs: Python files, folders, or names of modules.
        key: where they are named, for messages.

    Raises:
        ConfigError: one that does not exist, has a fault (with its file and line), or registers no part.
    """
    loaded = []
    for spec in (text.strip() for text in specs):
        if not spec:
            continue
        full = _full(spec)
        is_path = full != spec or Path(spec).is_absolute()
        if full not in PLUGINS:
            for room in _ROOMS:  # a name that is ours is ours whoever comes first
                import_all(f"{_OURS}.{room}")
            before = len(PARTS), {id(part.value) for part in PARTS}
            plugin = _from_path(Path(full), key=key) if is_path else _from_module(spec, key=key)
            if not plugin.configs and all(id(part.value) in before[1] for part in PARTS):
                raise ConfigError(f"{key}: {_unnamed(plugin)}")
            plugin.read()
            PLUGINS[full] = plugin
            said = [_full(s) for s in os.environ.get(ENVIRONMENT, "").split(",") if s]  # wherever a child runs
            os.environ[ENVIRONMENT] = ",".join(dict.fromkeys([*said, full]))
        loaded.append(PLUGINS[full])
    return loaded


def _full(spec: str) -> str:
    """An absolute path where a file or folder is meant; the name of a module as it is."""
    path = Path(spec.strip()).expanduser()
    is_path = path.suffix == ".py" or path.is_dir() or "/" in spec
    return str(path.resolve()) if is_path else spec.strip()


def config_files(group: str) -> dict[str, Path]:
    """The configurations of a group, such as "model", that plugins bring: name -> file."""
    return {path.stem: path for plugin in PLUGINS.values() for path in plugin.configs if path.parent.name == group}


def _from_path(path: Path, *, key: str) -> Plugin:
    if path.is_dir():
        if (path / "__init__.py").is_file():  # a package: under its own name, for its relative imports
            files, root = [path / "__init__.py"], path.parent
        else:
            files, root = sorted(path.glob("*.py")), path
        plugin = Plugin(str(path), root, configs=sorted(path.glob("*/*.yaml")))
    elif path.is_file():
        files, plugin = [path], Plugin(str(path), path.parent)
    else:
        raise ConfigError(f"{key}: there is no file or folder {path}.")
    folder = str(plugin.root)
    if folder not in sys.path:
        sys.path.append(folder)  # its own helpers; behind all else, so that it hides nothing
    for file in files:
        plugin.modules.append(_import(file, key=key))
    return plugin


def _import(file: Path, *, key: str) -> str:
    """Import a file as a module of a name of its own; returns the name."""
    package = file.parent if file.name == "__init__.py" else None
    name = f"{_PREFIX}{(package or file).stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(
        name, file, submodule_search_locations=[str(package)] if package else None
    )
    if spec is None or spec.loader is None:
        raise ConfigError(f"{key}: {file} is not a Python file.")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if not isinstance(error, Exception):
            raise
        raise _fault(error, file.parent, key=key) from error
    return name


def _from_module(name: str, *, key: str) -> Plugin:
    sys.path_importer_cache.pop(os.getcwd(), None)  # a file may be younger than the last look
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        found = None
    if found is None or found.origin is None:
        hint = f" Did you mean {name}.py?" if Path(f"{name}.py").is_file() else ""
        raise ConfigError(f"{key}: there is no module {name}, nor a file of this name.{hint}")
    top = importlib.util.find_spec(name.partition(".")[0])
    assert top is not None
    assert top.origin is not None
    root = Path(top.origin).parent.parent if Path(top.origin).name == "__init__.py" else Path(top.origin).parent
    try:
        importlib.import_module(name)
    except Exception as error:
        raise _fault(error, root, key=key) from error
    folder = Path(found.origin).parent
    is_package = Path(found.origin).name == "__init__.py"
    return Plugin(name, root, [name], sorted(folder.glob("*/*.yaml")) if is_package else [])


def _fault(error: Exception, root: Path, *, key: str) -> ConfigError:
    """An error inside of a plugin as one line, with the place in the plugin's own code."""
    if isinstance(error, SyntaxError) and error.filename:
        return ConfigError(f"{key}: {_short(error.filename)}:{error.lineno}: {type(error).__name__}: {error.msg}.")
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if Path(f.filename).is_relative_to(root) and "site-packages" not in f.filename]
    place = own[-1] if own else frames[-1]
    what = str(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
    if isinstance(error, ImportError) and "relative import" in what:
        what += "; a plugin that is one file imports its neighbours by their names (import helper)"
    if isinstance(error, TypeError) and "__init_subclass__() takes no keyword" in what:
        what += '; a mixer is a class of Mixer: class Mine(Mixer, name="mine"), with from mixerzoo import Mixer'
    return ConfigError(f"{key}: {_short(place.filename)}:{place.lineno}: {' '.join(what.split())}")


def _short(path: str) -> str:
    """A path as a user writes it, seen from here."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path


def _unnamed(plugin: Plugin) -> str:
    """What is missing in a plugin without parts."""
    for name in plugin.modules:
        for value in vars(sys.modules[name]).values():
            if isinstance(value, type) and value.__module__ == name and any(hasattr(c, "axes") for c in value.__mro__):
                place = f"{_short(str(sys.modules[name].__file__))}:{inspect.getsourcelines(value)[1]}"
                example = f'class {value.__name__}(Mixer, name="{value.__name__.lower()}")'
                return f"{place}: this class registers no part. Name it: {example}."
    return f'{_short(plugin.spec)} registers no part. A mixer is a class: class Mine(Mixer, name="mine").'


# -- what a run or a file needs


def words(value: Any) -> set[str]:
    """All texts in nested containers, those among them that may be names of parts."""
    if isinstance(value, Mapping):
        return set().union(*map(words, value.values()))
    return set().union(*map(words, value)) if isinstance(value, (list, tuple)) else {value} & {str(value)}


def used(names: Collection[str], specs: Iterable[str] = ()) -> list[Code]:
    """The code from outside that parts of these names are made of, and that of the plugins which are named.

    Args:
        names: every word of a run's configuration; those that are names of parts from outside count.
        specs: of plugins that count in any case.
    """
    load_outside()
    parts = [part for part in PARTS if not part.is_ours and part.name in names]
    always = {plugin.spec for plugin in load_plugins(specs)}
    done = []
    for plugin in PLUGINS.values():
        own = [part for part in parts if _belongs(part.value.__module__, plugin)]
        parts = [part for part in parts if part not in own]
        brings = any(path.stem in names for path in plugin.configs)
        if own or brings or plugin.spec in always:
            kinds = [(part.kind, part.name) for part in own]
            done.append(Code(plugin.spec, kinds, digest(sorted(plugin.sources.items())), plugin.sources))
    for module in dict.fromkeys(part.value.__module__ for part in parts):
        own = [part for part in parts if part.value.__module__ == module]
        done.append(code_of_script(module, [(part.kind, part.name, part.value) for part in own]))
    return done


def _belongs(module: str, plugin: Plugin) -> bool:
    file = getattr(sys.modules.get(module), "__file__", None)
    if module in plugin.modules or file is None:
        return module in plugin.modules
    path = Path(file).resolve()
    return path.is_relative_to(plugin.root) and path.relative_to(plugin.root).as_posix() in plugin.sources


def needed(names: Collection[str]) -> list[dict[str, Any]]:
    """What a saved model says of the plugins that it needs: of each its name, its parts, and the hash of its code.

    The name is that of the file or module; where it lies is nobody's business who gets the model.

    Args:
        names: every word of the model's configuration.
    """
    return [
        {
            "plugin": None if code.spec is None else Path(code.spec).name,
            "parts": [{"kind": kind, "name": name} for kind, name in code.parts],
            "sha256": code.sha256,
        }
        for code in used(names)
        if code.parts
    ]


def require(plugins: Iterable[Mapping[str, Any]] | None, *, where: object) -> None:
    """Refuse a saved model whose plugins are not loaded. Nothing is loaded by what a file says.

    Other code under the names of the parts is a warning.

    Args:
        plugins: as of `needed`.
        where: the file, for messages.

    Raises:
        ConfigError: naming the part, its plugin, and how to give it.
    """
    plugins = list(plugins or ())
    if plugins:
        load_outside()
    for one in plugins:
        parts = _pairs(one)
        there = {(part.kind, part.name) for part in PARTS}
        missing = [f'{kind} "{name}"' for kind, name in parts if (kind, name) not in there]
        file = one["plugin"]
        if missing and file is None:
            raise ConfigError(f"{where} needs the {', '.join(missing)} of a script or a notebook; define it first.")
        if missing:
            raise ConfigError(
                f"{where} needs the {', '.join(missing)} of the plugin {file}, which is not loaded. Set "
                f"{ENVIRONMENT}=PATH/{file}, or plugins=[PATH/{file}] on a command line, or call "
                f'mixerzoo.plugins.load_plugins(["PATH/{file}"]) before.'
            )
        if all(code.sha256 != one["sha256"] for code in used([name for _, name in parts])):
            said = ", ".join(f'{kind} "{name}"' for kind, name in parts)
            warnings.warn(f"{where} was saved with other code of the {said} than is loaded.", stacklevel=4)


def load_kept(run: Path) -> list[str]:
    """Load the parts from outside that a run used, unless they are there already.

    From where they were, if the code there is still the same, else from the copy in the run's folder.

    Args:
        run: its folder.

    Returns:
        What loads them again: paths and names of modules.

    Raises:
        ConfigError: a plugin that is gone, or another version of it that is loaded.
    """
    path = run / "plugins" / "plugins.json"
    if not path.is_file():
        return []
    specs: list[str] = []
    try:
        kept_codes = json.loads(path.read_text(encoding="utf-8"))["plugins"]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"load: {path} cannot be read: {error}.") from error
    for code in kept_codes:
        names = {part["name"] for part in code["parts"]}
        loaded = used(names)
        there = next((found for found in loaded if found.sha256 == code["sha256"]), None)
        if there is not None:
            specs += [there.spec] if there.spec is not None else []
            continue
        kept, spec = run / code["kept"], Path(code["spec"] or "")
        said = ", ".join(f'{part["kind"]} "{part["name"]}"' for part in code["parts"])
        if any((kind, name) in found.parts for found in loaded for kind, name in _pairs(code)):
            raise ConfigError(
                f"load: {run} was trained with other code of the {said} than is loaded. In a new process, without "
                f"that plugin, the copy in {kept} is used."
            )
        if code["spec"] and spec.suffix == ".py" and (kept / spec.name).is_file():
            same = all(
                (now := spec.parent / file.relative_to(kept)).is_file() and now.read_bytes() == file.read_bytes()
                for file in kept.rglob("*.*")
                if file.is_file() and file.suffix in (".py", ".yaml")
            )
            specs += [plugin.spec for plugin in load_plugins([str(spec if same else kept / spec.name)], key="load")]
        elif code["spec"]:
            specs += [plugin.spec for plugin in load_plugins([code["spec"]], key="load")]
        elif names:
            raise ConfigError(f"load: {run} uses the {said} of a script or a notebook; define it first, as in {kept}.")
    return specs


def _pairs(code: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(part["kind"], part["name"]) for part in code["parts"]]
