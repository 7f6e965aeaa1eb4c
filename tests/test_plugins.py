"""Parts from outside: every door, what counts as their code, and one line for every fault."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from mixerzoo import ConfigError, create_mixer, create_model, list_mixers, list_models, plugins
from mixerzoo.mixers.base import MIXERS
from mixerzoo.training.cli.compose import compose_config
from mixerzoo.training.config import identity, run_name

ROOT = Path(__file__).resolve().parent.parent

MIXER = '''
from torch import Tensor, nn
from mixerzoo import Mixer


class Scaled(Mixer, name="{name}"):
    """Scales the tokens."""

    axes = (1, 2)
    alternatives = {{"rate": 0.5}}

    def __init__(self, dim: int, *, rate: float = 0.9) -> None:
        super().__init__()
        self.rate, self.proj = rate, nn.Linear(dim, dim)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return self.proj(x) * self.rate
'''


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """What a plugin changes in the process is taken back."""
    monkeypatch.setenv(plugins.ENVIRONMENT, "")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(plugins, "PLUGINS", {})
    monkeypatch.setattr(plugins, "PARTS", list(plugins.PARTS))
    monkeypatch.chdir(tmp_path)
    list_mixers()  # ours are all there before
    before, modules = dict(MIXERS), set(sys.modules)
    yield
    MIXERS.clear()
    MIXERS.update(before)
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def forget() -> None:
    """As in a new process."""
    for plugin in plugins.PLUGINS.values():
        for name in plugin.modules:
            sys.modules.pop(name, None)
    plugins.PLUGINS.clear()


def test_a_file(tmp_path: Path) -> None:
    spec = write(tmp_path / "mine.py", MIXER.format(name="mine"))
    plugins.load_plugins(["mine.py"])
    assert create_mixer("mine", 8, rate=0.1)(torch.randn(2, 5, 8)).shape == (2, 5, 8)
    assert os.environ[plugins.ENVIRONMENT] == spec  # for child processes
    assert plugins.load_plugins([spec]) == list(plugins.PLUGINS.values())  # once


def test_a_module_and_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    write(tmp_path / "my_package" / "__init__.py", "from .inner import part\n")
    write(tmp_path / "my_package" / "inner" / "__init__.py", "from . import part\n")
    write(tmp_path / "my_package" / "inner" / "part.py", MIXER.format(name="inner_mine"))
    (plugin,) = plugins.load_plugins(["my_package"])
    assert set(plugin.sources) == {f"my_package/{f}" for f in ("__init__.py", "inner/__init__.py", "inner/part.py")}
    assert create_mixer("inner_mine", 4).rate == 0.9


def test_a_folder_with_configurations(tmp_path: Path) -> None:
    write(tmp_path / "kit" / "mixers.py", MIXER.format(name="kit_mixer"))
    write(tmp_path / "kit" / "model" / "kit_model.yaml", "base: metaformer_digits\nmixer: kit_mixer\n")
    write(tmp_path / "kit" / "ablation" / "kit_ablation.yaml", "arms: {kit_mixer: , identity: }\nseeds: [0]\n")
    write(tmp_path / "kit" / "mixer" / "kit_half.yaml", "name: kit_mixer\nrate: 0.5\n")
    config = compose_config(["plugins=[kit]", "model=kit_model", "mixer=kit_half"])
    assert config.mixer == {"name": "kit_mixer", "rate": 0.5}
    assert "kit_model" in list_models()
    assert "kit_mixer" in str(create_model("kit_model", num_classes=3, in_chans=1).model_config)
    from mixerzoo.training.ablation.preset import list_ablations, read_preset

    assert "kit_ablation" in list_ablations()
    assert read_preset("kit_ablation")["seeds"] == [0]


def test_the_variable_and_entry_points_reach_other_processes(tmp_path: Path) -> None:
    write(tmp_path / "mine.py", MIXER.format(name="by_variable"))
    site = tmp_path / "site"
    write(site / "their_package.py", MIXER.format(name="by_entry_point"))
    write(site / "theirs-1.0.dist-info" / "METADATA", "Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    write(site / "theirs-1.0.dist-info" / "entry_points.txt", "[mixerzoo.plugins]\nany = their_package\n")
    link = tmp_path / "path"
    link.mkdir()
    (link / "mixerzoo").symlink_to(ROOT)
    environment = {**os.environ, "PYTHONPATH": f"{link}:{site}", plugins.ENVIRONMENT: "mine.py"}
    script = "import mixerzoo; print({'by_variable', 'by_entry_point'} <= set(mixerzoo.list_mixers()))"
    done = subprocess.run([sys.executable, "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr[-2000:]


def test_identity_holds_the_code_and_not_the_place(tmp_path: Path) -> None:
    settings = ["mixer=mine", "task=digits"]

    def of(folder: str, text: str, helper: str) -> str:
        forget()
        write(tmp_path / folder / "my_helper.py", helper)
        write(tmp_path / folder / "mine.py", text)
        sys.modules.pop("my_helper", None)
        config = compose_config([f"plugins=[{folder}/mine.py]", *settings])
        assert run_name(config, identity(config, "code")).startswith("digits-metaformer_digits-mine-seed0-")
        return identity(config, "code")

    text = "import my_helper\n" + MIXER.format(name="mine")
    first = of("a", text, "RATE = 1")
    assert of("a", text, "RATE = 1") == first
    assert of("a", text.replace("0.9", "0.8"), "RATE = 1") != first
    assert of("a", text, "RATE = 2") != first  # what it imports from its own folder counts
    MIXERS.pop("mine")
    assert of("elsewhere", text, "RATE = 1") == first
    write(tmp_path / "elsewhere" / "unrelated.py", "X = 1")
    assert of("elsewhere", text, "RATE = 1") == first


def test_runs_without_the_plugin_keep_their_identity(tmp_path: Path) -> None:
    plain = identity(compose_config(["mixer=pooling"]), "code")
    plugins.load_plugins([write(tmp_path / "mine.py", MIXER.format(name="mine"))])
    assert identity(compose_config(["mixer=pooling"]), "code") == plain
    assert identity(compose_config(["model.mixer=[mine,pooling]", "mixer=null"]), "code") != plain


def test_a_part_defined_in_a_notebook_counts() -> None:
    def define(rate: str, constant: str) -> str:
        code = f"FACTOR = {constant}\n" + MIXER.format(name="cell_mixer").replace("0.9", rate)
        code = code.replace("* self.rate", "* self.rate * FACTOR")
        namespace = {"__name__": "a_notebook"}  # a module without a file
        exec(compile(code, "<cell 1>", "exec"), namespace)
        return identity(compose_config(["mixer=cell_mixer"]), "code")

    first = define("0.9", "1.0")
    assert define("0.9", "1.0") == first
    assert define("0.8", "1.0") != first
    assert define("0.9", "2.0") != first


FAULTS = {
    "syntax": ("def f(:\n", "mine.py:1: SyntaxError: invalid syntax"),
    "indentation": ("if True:\nx = 1\n", "mine.py:2: IndentationError"),
    "missing import": ("x = 1\nimport nonexistent_library\n", "mine.py:2: ModuleNotFoundError"),
    "error on import": ("x = 1\n\nx.nothing\n", "mine.py:3: AttributeError"),
    "relative import": ("from .helper import x\n", "imports its neighbours by their names"),
    "no part": ("x = 1\n", 'registers no part. A mixer is a class: class Mine(Mixer, name="mine")'),
    "no name": (
        MIXER.format(name="mine").replace(', name="mine"', ""),
        'mine.py:6: this class registers no part. Name it: class Scaled(Mixer, name="',
    ),
    "a name that exists": (MIXER.format(name="pooling"), 'mine.py:6: mixer "pooling" exists already'),
    "**kwargs": (
        MIXER.format(name="mine").replace("*, rate: float = 0.9", "**kwargs"),
        'mine.py:6: mixer "mine": the option "kwargs" must be keyword-only',
    ),
    "positional option": (
        MIXER.format(name="mine").replace("*, rate", "rate"),
        'mine.py:6: mixer "mine": the option "rate" must be keyword-only',
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_one_line(fault: str, tmp_path: Path) -> None:
    text, said = FAULTS[fault]
    write(tmp_path / "mine.py", text)
    with pytest.raises(ConfigError) as caught:
        plugins.load_plugins(["mine.py"])
    message = str(caught.value)
    assert said in message, message
    assert message.startswith("plugins: ")
    assert "\n" not in message
    assert not plugins.PLUGINS
    write(tmp_path / "mine.py", MIXER.format(name="mine"))  # mended, it loads
    assert plugins.load_plugins(["mine.py"])


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("nothing.py", "there is no file or folder"),
        ("no_such_module", "there is no module no_such_module"),
        ("mine", "Did you mean mine.py?"),
        ("kit/", "there is no file or folder"),
    ],
)
def test_names_that_lead_nowhere(spec: str, said: str, tmp_path: Path) -> None:
    write(tmp_path / "mine.py", MIXER.format(name="mine"))
    with pytest.raises(ConfigError, match=said.replace("?", r"\?")):
        plugins.load_plugins([spec])


def test_the_command_line_says_how(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"One of your own: plugins=\[FILE.py\] mixer=NAME"):
        compose_config(["mixer=my_own_decay"])
    with pytest.raises(ConfigError, match=r"plugins: .* is not a list of files or modules"):
        compose_config(["plugins=[1,2]"])
    with pytest.raises(ConfigError) as caught:
        compose_config(["mixer=owm"])
    assert "_own_" not in str(caught.value)
