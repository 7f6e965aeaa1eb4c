"""`python -m mixerzoo VERB`: what is listed and shown is what there is, and mistakes are one line."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from mixerzoo import plugins
from mixerzoo.mixers import list_mixers, mixer_options
from mixerzoo.mixers.base import MIXERS
from mixerzoo.models import create_model, list_models
from mixerzoo.schema import keyword_options
from mixerzoo.training.cli import verb
from mixerzoo.training.cli.explain import explained
from mixerzoo.training.cli.help import print_help
from mixerzoo.training.cli.program import program
from mixerzoo.training.config import PACKAGE, RunConfig, TrainConfig
from mixerzoo.training.cost import count_parameters


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert verb.main(arguments) == 0
    return capsys.readouterr().out


def test_every_verb_is_named_and_explained(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "--help")
    for name, help_text in verb.verbs().items():
        assert re.search(rf"^  {name} +\w", text, re.M), name
        if name != "train":
            assert said(capsys, name, "--help").strip() == help_text.strip()


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    first = [line.split()[0] for line in said(capsys, "list", "mixers").splitlines()]
    assert first == list_mixers()
    some = [line.split()[0] for line in said(capsys, "list", "mixers", "causal=true", "streams=true").splitlines()]
    assert some == list_mixers(causal=True, streams=True)
    assert said(capsys, "list", "models", "caformer_*").split() == list_models("caformer_*")
    assert "layer_norm" in said(capsys, "list", "norms")
    assert "digits" in said(capsys, "list", "ablations")
    assert said(capsys, "list", "models", "nothing*").strip() == "(none)"


@pytest.mark.parametrize("name", ["metaformer_digits", "mamba2_tiny", "transformer_tiny"])
def test_show_a_model(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "show", name)
    total = count_parameters(create_model(name))
    assert f"{total / 1e6:.2f} M parameters" in text or f"{total / 1e3:.2f} k parameters" in text
    assert "blocks.0" in text
    assert ("decoding state" in text) == (name != "metaformer_digits")


def test_show_with_settings(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "show", "metaformer_digits", "mixer=pooling", "image_size=16")
    assert "Pooling" in text
    assert "x 16 x 16:" in text


@pytest.mark.parametrize("name", ["pooling", "mamba2", "afno"])
def test_show_a_mixer(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "show", name)
    for option in mixer_options(name):
        assert re.search(rf"^{option} ", text, re.M), option


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lst"], 'Did you mean "list"?'),
        (["list", "mixer"], 'Did you mean "mixers"?'),
        (["list", "mixers", "causl=true"], 'Did you mean "causal"?'),
        (["list", "models", "causal=true"], "only mixers are listed by what they can do"),
        (["show", "caformer_s19"], 'Did you mean "caformer_s18"?'),
        (["show"], "show: one name"),
        (["show", "pooling", "a=1"], "only models take settings"),
        (["show", "metaformer_digits", "imagesize=3"], "imagesize"),
        (["list", "--all"], "there is no such option"),
        (["list", "mixers", "plugins=[nowhere.py]"], "there is no file"),
    ],
)
def test_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert verb.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_help_names_every_setting_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    print_help()
    text = capsys.readouterr().out
    for key in [*(k for k in keyword_options(RunConfig) if k != "train"), *keyword_options(TrainConfig)]:
        line = re.search(rf'^  (train\.)?{key} +(\S+) +(["\w].*)$', text, re.M)
        assert line is not None, key
        assert len(line[3]) > 10, key
    assert "Hydra" not in text
    print_help(["mixer=pooling"])
    assert "pool_size" in capsys.readouterr().out


def test_what_a_docstring_says_of_an_option() -> None:
    class Base:
        """A base.

        Args:
            one, two: both of them,
                on two lines.
        """

    class Derived(Base):
        """Derived.

        Args:
            three: `code`.
        """

    assert explained(Derived, "two") == "both of them, on two lines."
    assert explained(Derived, "three") == "code."
    assert explained(Derived, "four") == ""


@pytest.mark.parametrize(
    ("first", "package", "name"),
    [
        ("/somewhere/train.py", None, "python train.py"),
        ("/somewhere/train.py", "mixerzoo", "python -m mixerzoo.train"),
        ("/usr/bin/mixerzoo-train", None, "mixerzoo-train"),
        (str(PACKAGE / "__main__.py"), "mixerzoo", "python -m mixerzoo train"),
        ("/somewhere/pytest/__main__.py", "pytest", "python train.py"),
    ],
)
def test_commands_that_are_printed_are_what_was_typed(
    first: str, package: str | None, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [first])
    monkeypatch.setattr(sys.modules["__main__"], "__package__", package)
    assert program() == name


def test_a_verb_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "extra.py").write_text('"""Something more."""\n')
    monkeypatch.setattr(verb, "_ROOT", tmp_path)
    monkeypatch.setattr(verb, "ROOMS", ("a.b",))
    assert verb.verbs() == {"extra": "Something more."}


BROKEN = '''
import torch
from torch import Tensor, nn
from mixerzoo import Mixer


class Leaky(Mixer, name="leaky_example"):
    """Says that it honours masks, and does not."""

    axes = (1,)
    masks = True

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return self.proj(x + x.mean(1, keepdim=True))
'''


def test_check_names_the_promise_that_a_mixer_breaks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(plugins.ENVIRONMENT, "")
    monkeypatch.setattr(plugins, "PLUGINS", {})
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "leaky.py").write_text(BROKEN)
    try:
        assert verb.main(["check", str(tmp_path / "leaky.py"), "only=[padding]"]) == 1
    finally:
        MIXERS.pop("leaky_example", None)
        plugins.PARTS[:] = [part for part in plugins.PARTS if part.name != "leaky_example"]
    said = capsys.readouterr().out
    assert 'mixer "leaky_example" breaks `padding_is_never_read`' in said
    assert verb.main(["check", "mixer", "identity", "only=[padding]"]) == 0
    assert verb.main(["check", "mixer", "identify"]) == 2
    assert 'Did you mean "identity"?' in capsys.readouterr().err
