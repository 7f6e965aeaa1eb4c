"""Advice that can be copied: what is printed is what the shell and Hydra read back."""

import re
import shlex

import pytest
from mixerzoo.errors import ConfigError
from mixerzoo.training.cli.compose import compose_config, parse_overrides
from mixerzoo.training.cli.main import main
from mixerzoo.training.quoting import argument, literal

TEXTS = ["lr=0.1", "a/epoch=1.safetensors", "a b", "a,b", "a (1)", "it's", 'say "x"', "both ' and \"", "back\\slash"]
TEXTS += ["end\\", "1", "1e-3", "null", "true", "nan", "", "plain/path-1.txt", "~/home", "[x", "{x}", "a:b", "ä ö"]
TEXTS += ["a\\'b", '\\"']


@pytest.mark.parametrize("text", TEXTS)
def test_arguments_are_read_back(text):
    (word,) = shlex.split(argument("run_dir", text))
    (override,) = parse_overrides([word])
    assert override.key_or_group == "run_dir"
    assert override.value() == text
    assert parse_overrides([f"a={literal({'b': [text, 1, None, True, 0.5]})}"])[0].value() == {
        "b": [text, 1, None, True, 0.5]
    }


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        ("run_dir=lr=0.1", "'run_dir=\"lr=0.1\"'"),
        ("checkpoint=a/epoch=1.safetensors", "'checkpoint=\"a/epoch=1.safetensors\"'"),
        ("output_dir=runs (1)", "'output_dir=\"runs (1)\"'"),
        ("resume=lr=0.1", "'resume=\"lr=0.1\"'"),
        ("run_dir=a,b", "'run_dir=\"a,b\"'"),
    ],
)
def test_advice_works(given, advice, capsys):
    with pytest.raises(SystemExit) as stop:
        main([given])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert advice in err
    (word,) = shlex.split(advice)
    key, _, value = given.partition("=")
    assert getattr(compose_config([word]), key) == value


def test_brackets_are_not_advised_away():
    with pytest.raises(ConfigError, match="come in pairs") as caught:
        compose_config(["train.epochs=[1"])
    assert "As one text" not in str(caught.value)


def test_several_values_of_a_part():
    with pytest.raises(ConfigError, match=r"^mixer: attention,conv are several values: -m runs all of them\.$"):
        compose_config(["mixer=attention,conv"])


@pytest.mark.parametrize("model", ["transformer_tiny", "mamba_tiny", "mamba2_tiny", "metaformer_digits", "hybrid_tiny"])
@pytest.mark.parametrize("key", ["mixer", "model.mixer"])
def test_a_pattern_takes_the_place_of_whatever_the_model_has(model, key):
    config = compose_config([f"model={model}", f"{key}=[mamba2,attention]"])
    assert (config.model["mixer"], config.mixer) == (["mamba2", "attention"], None)
    config = compose_config([f"model={model}", f"{key}={{name: conv, kernel_size: 5}}"])
    assert config.model["mixer"] == {"name": "conv", "kernel_size": 5}


def test_a_mapping_without_a_name_is_merged():
    head = compose_config(["model.head={dropout: 0.2}"]).model["head"]
    assert head["dropout"] == 0.2
    assert set(head) > {"dropout"}


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["-m", "mixer=attention,conv", "--cfg", "job"], 0, ["# mixer=attention", "# mixer=conv", "kernel_size"]),
        (["--cfg", "job", "model=transformer_tiny", "mixer=[mamba2,attention]"], 0, ["- mamba2\n  - attention"]),
        (["--cfg=job", "task=imagefolder"], 0, ["root: ???"]),
        (["-c", "job", "seed=7"], 0, ["seed: 7"]),
        (["--cfg", "job", "task=digit"], 2, ['Did you mean "digits"']),
        (["--cfg", "job", "trian.epochs=3"], 2, ["trian"]),
        (["-m", "ablation=digits", "--cfg", "job"], 2, ["ablation=digits"]),
        (["--cfg", "job", "run_dir=a=b"], 2, ["'run_dir=\"a=b\"'"]),
    ],
)
def test_showing_a_configuration_never_ends_in_a_traceback(arguments, code, said, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    found = capsys.readouterr()
    assert stop.value.code == code, found.err
    text = found.out if code == 0 else found.err
    for part in said:
        assert part in text
    assert "replaced" not in re.sub(r"(?m)^#.*$", "", text)
    assert "Traceback" not in found.err
