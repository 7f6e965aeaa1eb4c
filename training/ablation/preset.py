"""An ablation as asked for: a preset of `configs/ablation/` and what the command line changes in it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from hydra.core.override_parser.types import Override

from ... import plugins
from ...errors import ConfigError, OptionError, unknown
from ...schema import Between, Positive, Seed, Size, build_dataclass
from ..cli.compose import OWN, load_named_plugins, parse_overrides
from ..config import CONFIGS
from . import claims

# Settings of the command line that say how, not what: they are not part of a plan.
HOW = ("launcher", "workers", "threads", "launcher_options", "retry", "dir")
# Groups of presets, by the key that chooses one.
PRESETS = ("ablation", "claim")
# What is read out of the results, which other runs do not change: written down, but not part of what is run.
ASKED = ("claim", "expect")


@dataclass(kw_only=True)
class Claim:
    """What a paper says.

    Attributes:
        paper: its title.
        says: the claim, in our words.
        arxiv: its number; None for a paper elsewhere.
        published: the figure that the paper gives for it, with its setting.
    """

    paper: str
    says: str
    arxiv: str | None = None
    published: str = ""


@dataclass(kw_only=True)
class Scaling:
    """How time and memory grow with the sequence length; measured, not trained.

    Attributes:
        lengths: tokens N.
        batch_size: sequences.
        rounds: timed passes for each arm and length.
        max_seconds: an arm stops where its next length would take longer for one training step.
        max_bytes: an arm stops where its next length would keep more activations.
    """

    lengths: list[Size]
    batch_size: Size = 1
    rounds: Size = 3
    max_seconds: Positive = 60.0
    max_bytes: Positive = 6e9

    def __post_init__(self) -> None:
        if len(self.lengths) < 2:
            raise OptionError("lengths", f"{self.lengths} are not at least two lengths.")


@dataclass(kw_only=True)
class Ablation:
    """What is compared, and how fairly.

    Attributes:
        name: of the ablation.
        title: for the report.
        description: for the report, a sentence or two.
        base: settings of all runs, as on the command line of `train.py`.
        arms: name -> settings of an arm; `mixer` is the name where it is not given.
        mixers: arms that are compared when `mixer=` is not given; by default all of `arms`.
        controls: those of them that serve as controls, marked in the report.
        reference: the arm that the others are matched to and compared with.
        vary: further settings -> values; each combination of values is a point at which all arms are compared.
        seeds: of the runs; empty for no training, only costs.
        lr: learning rates; the best on validation is used for an arm.
        lr_seeds: how many of the seeds, the first ones, choose it.
        match: what the arms have in common: "parameters", "flops" (of one sample) or "off".
        tolerance: largest relative difference that counts as matched.
        width_step: widths are multiples of it, if that is enough.
        scaling: growth with the sequence length; None to leave it out.
        costs: measure throughput, memory and decoding.
        launcher: "local", "joblib", "ray" or "submitit".
        workers: processes; more than one needs another launcher than "local".
        threads: of PyTorch in each; None divides the machine's cores among the workers.
        launcher_options: passed to the launcher: `ray.init` or submitit's `update_parameters`.
        claim: of a paper, which `expect` puts to the test; None for a comparison without one.
        expect: lines such as `strip.top1 > mlp_mixer.top1`, see `claims`; the report gives each a verdict.
        retry: repeat runs that failed; a loss that is not finite counts as an answer otherwise.
        dir: the folder; by default OUTPUT_DIR/ablation-NAME-HASH.
    """

    name: str
    title: str = ""
    description: str = ""
    base: list[str] = field(default_factory=list)
    arms: dict[str, Any] = field(default_factory=dict)
    mixers: list[str] = field(default_factory=list)
    controls: list[str] = field(default_factory=list)
    reference: str | None = None
    vary: dict[str, Any] = field(default_factory=dict)
    seeds: list[Seed] = field(default_factory=lambda: [0, 1, 2])
    lr: list[Positive] = field(default_factory=list)
    lr_seeds: Size = 1
    match: Literal["parameters", "flops", "off"] = "parameters"
    tolerance: Annotated[float, Between(0, 1, above=True, below=True)] = 0.02
    width_step: Size = 4
    scaling: Any = None
    costs: bool = True
    launcher: Literal["local", "joblib", "ray", "submitit"] = "local"
    workers: Size = 1
    threads: Size | None = None
    launcher_options: dict[str, Any] = field(default_factory=dict)
    claim: Any = None
    expect: list[str] = field(default_factory=list)
    retry: bool = False
    dir: str | None = None

    def __post_init__(self) -> None:
        def need(name: str, holds: bool, allowed: str) -> None:
            if not holds:
                raise OptionError(name, f"{getattr(self, name)!r} is not allowed; it must be {allowed}.")

        need("workers", self.workers == 1 or self.launcher != "local", "1 with ablation.launcher=local; see joblib")
        need("seeds", len(set(self.seeds)) == len(self.seeds), "free of repetitions")
        need("vary", all(isinstance(v, list) and v for v in self.vary.values()), "a mapping to lists of values")
        need("arms", all(a is None or isinstance(a, Mapping) for a in self.arms.values()), "a mapping to settings")
        self.mixers = self.mixers or list(self.arms)
        self.lr_seeds = min(self.lr_seeds, max(1, len(self.seeds)))
        if not self.mixers:
            raise OptionError("mixers", "nothing to compare; say mixer=A,B,...")
        if len(set(self.mixers)) < len(self.mixers):
            raise ConfigError(f"mixer: {', '.join(self.mixers)} names an arm twice.")
        if self.reference is None:
            self.reference = next((m for m in self.mixers if m not in self.controls), self.mixers[0])
        if self.scaling is not None and not isinstance(self.scaling, Scaling):
            if not isinstance(self.scaling, Mapping):
                raise OptionError("scaling", f"{self.scaling!r} is not a mapping.")
            self.scaling = build_dataclass(Scaling, self.scaling, key="scaling")
        if self.claim is not None and not isinstance(self.claim, Claim):
            if not isinstance(self.claim, Mapping):
                raise OptionError("claim", f"{self.claim!r} is not a mapping.")
            self.claim = build_dataclass(Claim, self.claim, key="claim")
        for i, line in enumerate(self.expect):
            claims.parse(line, key=f"expect[{i}]", arms=[*self.arms, *self.mixers])

    def points(self) -> list[dict[str, Any]]:
        """The combinations of the values that vary."""
        return [dict(zip(self.vary, values, strict=True)) for values in itertools.product(*self.vary.values())]

    def what(self) -> dict[str, Any]:
        """The part that decides which runs there are, in plain containers."""
        return {key: value for key, value in asdict(self).items() if key not in HOW + ASKED}

    def asked(self) -> dict[str, Any]:
        """The claim and what is expected, in plain containers."""
        return {key: value for key, value in asdict(self).items() if key in ASKED}


def list_ablations(kind: str = "ablation") -> list[str]:
    """Names of the presets in `configs/ablation/`, or of those in `configs/claim/`."""
    return sorted(_presets(kind))


def _presets(kind: str) -> dict[str, Path]:
    """The presets by name: ours, and those that plugins bring."""
    return {path.stem: path for path in (CONFIGS / kind).glob("*.yaml")} | plugins.config_files(kind)


def read_preset(name: str, kind: str = "ablation") -> dict[str, Any]:
    """A preset's mapping; `kind` is "ablation" or "claim".

    Raises:
        ConfigError: no such preset, or a damaged file.
    """
    presets = _presets(kind)
    if name not in presets:
        raise unknown(kind, name, presets)
    path = presets[name]
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{kind}: {path} cannot be read: {error}") from error
    return {"name": name, **content}


def make(values: Mapping[str, Any]) -> Ablation:
    """A checked ablation from a mapping.

    Raises:
        ConfigError: an unknown key or a wrong value.
    """
    values = dict(values)
    values["lr"] = [number(v) for v in values.get("lr", [])]
    return build_dataclass(Ablation, values, key="ablation")


def number(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 as text; this does not."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _choices(override: Override) -> list[str]:
    """The values of `key=a,b` or `key=range(...)`, as text; one value where nothing is swept."""
    if override.is_sweep_override():
        return list(override.sweep_string_iterator())
    return [str(override.input_line).partition("=")[2]]


def _plain(value: Any) -> Any:
    """A setting's text as the value that YAML reads."""
    return number(yaml.safe_load(value)) if isinstance(value, str) else value


def arm_name(choice: str) -> str:
    """`[a,b]`, a pattern over the layers, as the name `a-b`; other choices as they are."""
    return choice.strip("[]").replace(" ", "").replace(",", "-") if choice.startswith("[") else choice


def _plain_sweep(parsed: Sequence[Override]) -> dict[str, Any]:
    """What a sweep without a preset compares, and the key whose values are its arms; None for `mixer`."""
    swept = [str(o.key_or_group) for o in parsed if o.is_sweep_override()]
    mixer = next((o for o in parsed if o.key_or_group == "mixer"), None)
    own = OWN if mixer is None or mixer.value() is None else _choices(mixer)[0]
    values: dict[str, Any] = {"name": "sweep", "match": "off", "seeds": [0], "own": own}
    compared = [key for key in swept if key != "seed" and not key.startswith("ablation.")]
    values["title"] = f"{', '.join(compared)} side by side" if compared else "One arm"
    others = [key for key in swept if key not in ("mixer", "seed", "optimizer.lr") and not key.startswith("ablation.")]
    if "mixer" not in swept and others:
        values["makes_arms"] = others[0]
    elif mixer is None:
        values["arms"] = {"as it is": {"mixer": OWN}}
    return values


def from_command_line(overrides: Sequence[str]) -> Ablation:
    """The ablation that `ablation=NAME mixer=a,b seed=0,1 KEY=VALUE ... ablation.KEY=VALUE` asks for.

    `claim=NAME` is a preset of `configs/claim/`. `mixer=` chooses arms (of the preset, or any mixer, configuration of a
    mixer, or pattern), `seed=` the seeds, and `optimizer.lr=` the learning rates. Another key with several values is
    varied; with one value it holds for all runs.

    Without a preset it is a plain sweep: nothing is matched unless `ablation.match` says so, one seed is enough, and
    where `mixer` has one value the first other key with several makes the arms.

    Raises:
        ConfigError: an unknown preset or key, or a value that does not fit.
    """
    load_named_plugins(overrides)
    parsed = parse_overrides(overrides)
    names = [(str(o.key_or_group), o.value()) for o in parsed if o.key_or_group in PRESETS]
    if len(names) > 1 or (names and not isinstance(names[0][1], str)):
        raise ConfigError(f"{names[0][0]}: one at a time.")
    values: dict[str, Any] = read_preset(str(names[0][1]), names[0][0]) if names else _plain_sweep(parsed)
    makes_arms = values.pop("makes_arms", None)
    values["base"], values["vary"] = list(values.get("base", [])), dict(values.get("vary", {}))
    values["arms"] = {name: dict(arm or {}) for name, arm in (values.get("arms") or {}).items()}
    allowed = {f.name for f in fields(Ablation)} - {"base", "arms"}
    for override, text in zip(parsed, overrides, strict=True):
        key = str(override.key_or_group)
        if key in PRESETS:
            continue
        if key == "resume" and not names and override.value() in ("auto", None):  # a sweep does so by itself
            continue
        if key in ("resume", "run_dir"):
            raise ConfigError(f"{key}: an ablation goes on where it stopped by itself; leave this out.")
        if key.startswith("ablation."):
            option, _, inner = key.removeprefix("ablation.").partition(".")
            if option not in allowed:
                raise unknown("ablation", option, allowed)
            value = override.value()
            if inner:
                values[option] = {**(values.get(option) or {}), inner: value}
            else:
                values[option] = value
        elif key == makes_arms:
            for choice in _choices(override):
                arm = f"{key}={choice}" if key not in ("model", "task") else choice
                values["arms"][arm] = {"mixer": values["own"], key: _plain(choice)}
        elif key == "mixer" and makes_arms is None:
            chosen = _choices(override)
            for choice in chosen:
                values["arms"].setdefault(arm_name(choice), {"mixer": OWN if choice == "null" else choice})
            values["mixers"] = [arm_name(choice) for choice in chosen]
        elif key == "seed":
            values["seeds"] = [_plain(choice) for choice in _choices(override)]
        elif key == "optimizer.lr":
            values["lr"] = [_plain(choice) for choice in _choices(override)]
        elif override.is_sweep_override():
            values["vary"][key] = [_plain(choice) for choice in _choices(override)]
        else:
            values["vary"].pop(key, None)
            values["base"].append(text)
    values.pop("own", None)
    reference = values.get("reference")
    if reference is not None and reference not in values.get("mixers", values["arms"]):
        if any(o.key_or_group == "ablation.reference" for o in parsed):
            raise unknown("ablation.reference", reference, values.get("mixers", values["arms"]))
        values["reference"] = None  # the preset's reference was not asked for
    return make(values)
