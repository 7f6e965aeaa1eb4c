"""From a command line to checked configurations, through Hydra, with errors that a user can act on."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, OverrideType
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, InterpolationKeyError, MissingMandatoryValue, OmegaConfBaseException

from ... import plugins
from ...errors import ConfigError, unknown
from ...mixers import list_mixers, mixer_options
from ...models import list_models, model_config
from ...tasks import list_tasks, task_options
from ..config import CONFIGS, RunConfig, parse
from ..quoting import argument, quote

GROUPS = ("model", "mixer", "task", "optimizer")
# Entries of a model that the data decide. A model file gives native values only; what a user says must agree.
FROM_DATA = ("num_classes", "in_chans", "image_size", "frames", "vocab_size", "sequence_length", "objective")

# The choice of `mixer=` that stands for null, the model's own: Hydra cannot sweep over null. No word that a user says.
OWN = "_own_"
# Where values are set aside that are not merged into what is there.
_REPLACED = "replaced"


def _without_file(group: str, names: Iterable[str]) -> list[str]:
    from_plugins = plugins.config_files(group)
    return [name for name in names if not (CONFIGS / group / f"{name}.yaml").exists() and name not in from_plugins]


def _defaults(options: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if value is inspect.Parameter.empty:
            return "???"
        if isinstance(value, (tuple, list, set, frozenset)):
            return [plain(v) for v in value]
        return {k: plain(v) for k, v in value.items()} if isinstance(value, Mapping) else value

    return {name: plain(option.default) for name, option in options.items()}


def register_groups(overrides: Sequence[str] = ()) -> None:
    """Make every registered mixer, task and timm optimizer without a YAML file a choice of its Hydra group.

    So do the YAML files that plugins bring. timm is asked for its optimizers only where the command line names one
    without a file: loading it takes 2 s.
    """
    store = ConfigStore.instance()
    for group in GROUPS:
        for name, path in plugins.config_files(group).items():
            store.store(group=group, name=name, node=_read_model(path) if group == "model" else _read_yaml(group, path))
    store.store(group="mixer", name=OWN, node={})
    for name in _without_file("mixer", list_mixers()):
        store.store(group="mixer", name=name, node={"name": name, **_defaults(mixer_options(name))})
    for name in _without_file("task", list_tasks()):
        store.store(group="task", name=name, node={"name": name, **_defaults(task_options(name))})
    chosen = [name for text in overrides if text.startswith("optimizer=") for name in text.partition("=")[2].split(",")]
    if _without_file("optimizer", chosen):
        from timm.optim import list_optimizers

        for name in _without_file("optimizer", map(str, list_optimizers())):
            # options that timm leaves to the optimizer stay out: `optimizer.NAME=...` adds them
            store.store(group="optimizer", name=name, node={"name": name, "lr": 1e-3, "weight_decay": 0.05})


def _read_yaml(group: str, path: Path) -> dict[str, Any]:
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{group}: {path} is not a readable YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{group}: {path} holds no mapping.")
    return {str(key): value for key, value in content.items()}


def _read_model(path: Path) -> dict[str, Any]:
    return model_config(_read_yaml("model", path))


def _model_files(value: str) -> str:
    """Register the YAML files among the choices of `model=`, and put names in their place."""
    names = []
    for choice in value.split(","):
        path = Path(choice.strip("'\"")).expanduser()
        if path.suffix not in (".yaml", ".yml"):
            names.append(choice)
            continue
        if not path.is_file():
            raise ConfigError(f"model: there is no file {path}. Models by name: {', '.join(list_models()[:12])}, ...")
        name = path.stem + ("-file" if path.stem in list_models() else "")
        ConfigStore.instance().store(group="model", name=name, node=_read_model(path))
        names.append(name)
    return ",".join(names)


def parse_overrides(overrides: Sequence[str]) -> list[Override]:
    """Hydra's parse of `key=value` arguments.

    Raises:
        ConfigError: not of this form.
    """
    for text in overrides:
        if "=" not in text and not text.startswith("~"):
            raise ConfigError(f'"{text}": arguments are written key=value, such as train.epochs=5.')
    parser, done = OverridesParser.create(), []
    for text in overrides:
        try:
            done += parser.parse_overrides([text])
        except HydraException as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise ConfigError(f"{text}: this argument cannot be read: {reason}. {_advice(text)}") from error
    return done


def _advice(text: str) -> str:
    """How an argument that cannot be read is written."""
    key, _, value = text.partition("=")
    unpaired = any(value.count(mark) % 2 for mark in "\"'") or value.startswith(("[", "{"))
    if not unpaired:
        try:
            parsed: Any = OverridesParser.create().parse_overrides([f"{key}={quote(value)}"])[0].value()
        except HydraException:
            parsed = None
        if parsed == value:
            return f"As one text it is written {argument(key, value)}"
    return "Quotes, brackets and braces come in pairs; a list is written [a,b], a mapping {key:value}."


def refuse_several_values(overrides: Sequence[str]) -> None:
    """Refuse `key=a,b` outside of a sweep, saying what can be meant.

    Raises:
        ConfigError: such an argument.
    """
    for override in parse_overrides(overrides):
        if override.is_sweep_override():
            key, _, value = str(override.input_line).partition("=")
            key = key.lstrip("+")
            text = "" if key in GROUPS else f", [{value}] is a list, and one text is written {argument(key, value)}"
            raise ConfigError(f"{key}: {value} are several values: -m runs all of them{text}.")


def load_named_plugins(overrides: Sequence[str]) -> None:
    """Load what `plugins=` names on a command line, before anything asks which parts there are.

    Raises:
        ConfigError: a plugin that cannot be loaded, or a value that is no list of names.
    """
    for override in parse_overrides([text for text in overrides if text.split("=")[0] == "plugins"]):
        value = override.value()
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(spec, str) for spec in value):
            raise ConfigError(f"plugins: {override.input_line} is not a list of files or modules: plugins=[FILE.py].")
        plugins.load_plugins(value)


def rewrite(overrides: Sequence[str]) -> list[str]:
    """What a user writes in the form that Hydra needs; plugins are loaded.

    Options of models, mixers, tasks and optimizers may be set whether or not their file names them (they are checked
    against the schema of the part that was chosen); `model=FILE.yaml` works; `mixer=[a,b]` is a pattern over the model.
    """
    load_named_plugins(overrides)
    done = []
    for text, override in zip(overrides, parse_overrides(overrides), strict=True):
        key, _, value = text.partition("=")
        if key == "plugins" and not value.startswith("["):
            text = f"plugins=[{value}]"
        section = key.split(".")[0]
        if override.type == OverrideType.CHANGE and key == "mixer" and not value.startswith(("[", "{")):
            text = f"mixer={','.join(OWN if choice == 'null' else choice for choice in value.split(','))}"
        elif override.type == OverrideType.CHANGE and key in GROUPS and value == "null":
            raise ConfigError(f"{key}: nothing is chosen; say {key}=NAME.")
        elif override.type == OverrideType.CHANGE and key == "model":
            text = f"model={_model_files(value)}"
        elif override.type == OverrideType.CHANGE and key == "mixer" and value.startswith(("[", "{")):
            text = f"++{_REPLACED}.model.mixer={value}"
        elif override.type == OverrideType.CHANGE and key in GROUPS and value.startswith(("[", "{")):
            raise ConfigError(f"{key}: {value} is not a name; {key}=NAME chooses one, {key}.OPTION=... changes it.")
        elif override.type == OverrideType.CHANGE and "." in key and section in GROUPS and "@" not in key:
            text = f"++{_REPLACED}.{text}" if _stands_alone(override) else f"++{text}"
        done.append(text)
    return done


def _stands_alone(override: Override) -> bool:
    """Whether a value takes the place of what was there; Hydra merges into it, which cannot turn a mapping into a list,
    and would leave options of another part."""
    value: Any = override.value()
    values = value.list if isinstance(value, ChoiceSweep) else [value]
    return any(isinstance(v, list) or (isinstance(v, Mapping) and "name" in map(str, v)) for v in values)


def put_in_place(config: DictConfig, overrides: Sequence[str]) -> None:
    """Move the values that `rewrite` set aside to where they belong."""
    for override in parse_overrides(overrides):
        key = override.key_or_group
        if key.startswith(f"{_REPLACED}."):
            value = OmegaConf.select(config, key)
            OmegaConf.update(config, key.removeprefix(f"{_REPLACED}."), value, merge=False, force_add=True)
    if _REPLACED in config:
        OmegaConf.set_struct(config, False)
        config.pop(_REPLACED)


def _paths(config: Any, prefix: str = "") -> list[str]:
    found = []
    for key, value in config.items():
        found.append(f"{prefix}{key}")
        if isinstance(value, Mapping):
            found += _paths(value, f"{prefix}{key}.")
    return found


def _unknown_key(key: str) -> ConfigError:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        known = _paths(OmegaConf.to_container(compose("train"), throw_on_missing=False))
    leaf = key.split(".")[-1]
    same = [path for path in known if path.split(".")[-1] == leaf]
    near = same[:1] or difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    near = near or [p for p in known if difflib.get_close_matches(leaf, [p.split(".")[-1]], cutoff=0.75)][:1]
    parent = key.rpartition(".")[0]
    siblings = [p for p in known if p.rpartition(".")[0] == parent] or [p for p in known if "." not in p]
    hint = f' Did you mean "{near[0]}"?' if near else ""
    return ConfigError(f"{key}: there is no such key.{hint} Allowed here: {', '.join(siblings)}.")


def _explain(error: Exception, overrides: Sequence[str]) -> ConfigError:
    """Hydra's error as ours."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        problem = unknown(group or "config", name, [o for o in error.options or () if o != OWN], limit=60)
        if group in ("mixer", "task", "model"):
            problem = ConfigError(f"{problem} One of your own: plugins=[FILE.py] {group}=NAME.")
        return problem
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, (ConfigKeyError, AttributeError)) and getattr(cause, "full_key", None):
            return _unknown_key(str(getattr(cause, "full_key")))  # noqa: B009 - only OmegaConf's errors have it
        if isinstance(cause, (MissingMandatoryValue, InterpolationKeyError)):
            break
        cause = cause.__cause__
    message = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    for override in parse_overrides(overrides):
        key = override.get_key_element()
        if f"'{key}'" in message and "/" not in key:
            return _unknown_key(key.lstrip("+~"))
    return ConfigError(message)


def finalise(config: DictConfig, choices: Mapping[str, Any], overrides: Sequence[str]) -> RunConfig:
    """A checked configuration from what Hydra composed.

    Args:
        config: composed, without Hydra's own part.
        choices: what was chosen in each group.
        overrides: the rewritten command line.
    """
    put_in_place(config, overrides)
    try:
        values: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        key = error.full_key or str(error)
        raise ConfigError(f"{key}: needed; say {key}=...") from error
    except OmegaConfBaseException as error:
        raise ConfigError(" ".join(str(error).split())) from error
    said = {override.key_or_group.removeprefix(f"{_REPLACED}.") for override in parse_overrides(overrides)}
    for key in FROM_DATA:
        if f"model.{key}" not in said and isinstance(values.get("model"), dict):
            values["model"].pop(key, None)
    mixer = values["mixer"] = values.get("mixer") or None
    if isinstance(mixer, dict) and "name" not in mixer:
        given = ", ".join(f"mixer.{k}" for k in mixer)
        raise ConfigError(f"{given}: no mixer is chosen that has this option; say mixer=NAME too.")
    for group in ("model", "task", "optimizer"):
        if not values.get(group):
            raise ConfigError(f"{group}: nothing is chosen; say {group}=NAME.")
    values["model_name"] = values.get("model_name") or choices.get("model")
    values["plugins"] = [plugin.spec for plugin in plugins.load_plugins(values.get("plugins") or [])]
    return parse(values)


def compose_config(overrides: Sequence[str] = ()) -> RunConfig:
    """The checked configuration of a command line, e.g. `compose_config(["task=digits", "train.epochs=2"])`.

    Raises:
        ConfigError: anything that does not fit, with the full path of its key.
    """
    rewritten = rewrite(overrides)
    register_groups(rewritten)
    return compose_rewritten(rewritten)


def composed(overrides: Sequence[str]) -> tuple[DictConfig, dict[str, Any]]:
    """What Hydra composes of what `rewrite` gave, without its own part, and the choices in its groups.

    Raises:
        ConfigError: Hydra refuses it, or there are several values.
    """
    refuse_several_values(overrides)
    try:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            config = compose("train", overrides=list(overrides), return_hydra_config=True)
            choices = dict(config.hydra.runtime.choices)
            OmegaConf.set_struct(config, False)
            config.pop("hydra")
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise _explain(error, overrides) from error
    return config, choices


def compose_rewritten(overrides: Sequence[str]) -> RunConfig:
    """As `compose_config`, for what `rewrite` gave."""
    config, choices = composed(overrides)
    return finalise(config, choices, overrides)


def sweep_jobs(overrides: Sequence[str]) -> list[list[str]] | None:
    """The command lines of a multirun, or None where another sweeper than Hydra's basic one makes them."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    parsed = parse_overrides(overrides)
    if any(o.key_or_group == "hydra/sweeper" for o in parsed):
        return None
    batches = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    return [list(job) for batch in batches for job in batch]
