"""Files of earlier versions, in which some parameters had other names and shapes, give what they gave then."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from mixerzoo.mixers import create_mixer
from mixerzoo.models import create_model, save_model
from mixerzoo.models.parts.language_heads import MaskedLMHead
from mixerzoo.models.parts.stems import STEMS
from mixerzoo.tests.utils import load_golden, relative_error
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

State = dict[str, Tensor]
MLP = {"w1": "fc1.weight", "b1": "fc1.bias", "w2": "fc2.weight", "b2": "fc2.bias"}
AXES = {f"{axis}.{old}": f"{axis}.{new}" for axis in ("vertical", "horizontal") for old, new in MLP.items()}


def random(seed: int, *shape: int) -> Tensor:
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)


def token_mlp() -> tuple[nn.Module, State, Tensor, Tensor]:
    old = {"w1": random(1, 5, 6), "b1": random(2, 5), "w2": random(3, 6, 5), "b2": random(4, 6)}
    x = random(9, 2, 2, 3, 4)
    y = mlp(x.flatten(1, 2).mT, **old).mT.unflatten(1, (2, 3))
    return create_mixer("mlp_mixer", 4, grid=(2, 3), token_hidden=5), old, x, y


def token_matrix() -> tuple[nn.Module, State, Tensor, Tensor]:
    old = {"weight": random(1, 6, 6), "bias": random(2, 6)}
    x = random(9, 2, 2, 3, 4)
    y = F.linear(x.flatten(1, 2).mT, **old).mT.unflatten(1, (2, 3))
    return create_mixer("resmlp", 4, grid=(2, 3)), old, x, y


def token_gate() -> tuple[nn.Module, State, Tensor, Tensor]:
    old = {"weight": random(1, 6, 6), "bias": random(2, 6), "norm.weight": 1 + random(3, 4), "norm.bias": random(4, 4)}
    old |= {
        "fc1.weight": random(5, 8, 3),
        "fc1.bias": random(6, 8),
        "fc2.weight": random(7, 3, 4),
        "fc2.bias": random(8, 3),
    }
    x = random(9, 2, 6, 3)
    u, v = F.gelu(F.linear(x, old["fc1.weight"], old["fc1.bias"])).chunk(2, -1)
    v = F.layer_norm(v, (4,), old["norm.weight"], old["norm.bias"])
    gate = F.linear(v.mT, old["weight"], old["bias"]).mT
    y = F.linear(u * gate, old["fc2.weight"], old["fc2.bias"])
    return create_mixer("gmlp", 3, grid=(6,), ratio=8 / 3), old, x, y


def causal_token_mlp() -> tuple[nn.Module, State, Tensor, Tensor]:
    """Of the causal form, one hidden unit for each position: the names are what they were."""
    old = {"w1": random(1, 6, 6), "b1": random(2, 6), "w2": random(3, 6, 6), "b2": random(4, 6)}
    x = random(9, 2, 6, 4)
    y = mlp(x.mT, old["w1"].tril(), old["b1"], old["w2"].tril(), old["b2"]).mT
    return create_mixer("mlp_mixer", 4, grid=(6,), causal=True, token_hidden=6), old, x, y


def raft() -> tuple[nn.Module, State, Tensor, Tensor]:
    old: State = {}
    y = x = random(9, 2, 3, 4, 6)
    for i, (axis, size) in enumerate((("vertical", 3), ("horizontal", 4))):
        n = 2 * size
        own = {
            "w1": random(i, 2 * n, n),
            "b1": random(i + 2, 2 * n),
            "w2": random(i + 4, n, 2 * n),
            "b2": random(i + 6, n),
        }
        old |= {f"{axis}.{k}": v for k, v in own.items()}
        old |= {f"{axis}.norm.weight": 1 + random(i, 6), f"{axis}.norm.bias": random(i + 1, 6)}
        y = y.transpose(1, 2) if i else y
        v = F.layer_norm(y, (6,), old[f"{axis}.norm.weight"], old[f"{axis}.norm.bias"], 1e-5)
        lines = v.unflatten(-1, (2, 3)).permute(0, 2, 4, 3, 1).flatten(3)  # (B, S', O, R S)
        y = y + mlp(lines, **own).unflatten(3, (2, size)).permute(0, 4, 1, 3, 2).flatten(3)
        y = y.transpose(1, 2) if i else y
    return create_mixer("raft", 6, grid=(3, 4), residual=True), old, x, y


def published(name: str, fixture: str, renamed: Mapping[str, str], *, channels_first: bool = False, **options: int):
    """Golden numbers, from their parameters under the former names."""

    def make() -> tuple[nn.Module, State, Tensor, Tensor]:
        golden = load_golden(fixture)
        kwargs = golden.kwargs
        x = golden["input"] if "input" in golden.tensors else golden["input.hidden_states"]
        y = golden["output"]
        if channels_first:
            x, y = x.permute(0, 2, 3, 1), y.permute(0, 2, 3, 1)
        mixer = create_mixer(name, x.shape[-1], grid=tuple(x.shape[1:-1]), **{k: kwargs[v] for k, v in options.items()})
        state = type(mixer).convert_official(golden.params)
        back = {new: old for old, new in renamed.items()}
        return mixer, {back.get(k, k): v for k, v in state.items()}, x, y

    return make


def conv() -> tuple[nn.Module, State, Tensor, Tensor]:
    """With biases, and the depthwise weight as a sequence has it."""
    old = {
        "fc1.weight": random(1, 8, 4),
        "fc1.bias": random(2, 8),
        "fc2.weight": random(3, 4, 8),
        "fc2.bias": random(4, 4),
    }
    old |= {
        "act_scale": 1 + random(5, 1),
        "act_bias": random(6, 1),
        "weight": random(7, 8, 1, 3),
        "conv_bias": random(8, 8),
    }
    x = random(9, 2, 7, 4)
    hidden = old["act_scale"] * F.relu(F.linear(x, old["fc1.weight"], old["fc1.bias"])) ** 2 + old["act_bias"]
    hidden = F.conv1d(F.pad(hidden.mT, (2, 0)), old["weight"], old["conv_bias"], groups=8).mT
    y = F.linear(hidden, old["fc2.weight"], old["fc2.bias"])
    return create_mixer("conv", 4, kernel_size=3, bias=True, causal=True), old, x, y


def masked_head() -> tuple[nn.Module, State, Tensor, Tensor]:
    old = {"dense.weight": random(1, 4, 4), "dense.bias": random(2, 4), "weight": random(3, 7, 4), "bias": random(4, 7)}
    old |= {"norm.weight": 1 + random(5, 4), "norm.bias": random(6, 4)}
    x = random(9, 2, 3, 4)
    hidden = F.gelu(F.linear(x, old["dense.weight"], old["dense.bias"]))
    hidden = F.layer_norm(hidden, (4,), old["norm.weight"], old["norm.bias"], 1e-6)
    head = MaskedLMHead(
        4, vocab_size=7, tie_embeddings=False, norm={"name": "layer_norm", "eps": 1e-6}, head_act="gelu"
    )
    return head, old, x, F.linear(hidden, old["weight"], old["bias"])


def stem() -> tuple[nn.Module, State, Tensor, Tensor]:
    """The smaller patch lies in the middle of the larger one."""
    old = {"weights.0": random(1, 5, 3, 2, 2), "weights.1": random(2, 5, 3, 4, 4), "bias": random(3, 5)}
    x = random(9, 2, 6, 8, 3)
    weight = F.pad(old["weights.0"], (1, 1, 1, 1)) + old["weights.1"]
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, old["bias"], 2, 1).permute(0, 2, 3, 1)
    return STEMS.build({"name": "multi_scale", "kernels": [2, 4]}, 3, 5, key="stem"), old, x, y


SEPARABLE = {"act_scale": "act.scale", "act_bias": "act.bias", "weight": "conv.weight"}
MAMBA = {"d_state": "state_size", "d_conv": "conv_kernel", "expand": "expand", "dt_rank": "time_step_rank"}
NINFORMER = {"token_hidden": "token_dim", "channel_hidden": "channel_dim"}
FORMERLY: dict[str, Callable[[], tuple[nn.Module, State, Tensor, Tensor]]] = {
    "mlp_mixer": token_mlp,
    "resmlp": token_matrix,
    "gmlp": token_gate,
    "mlp_mixer-causal": causal_token_mlp,
    "ninformer": published(
        "ninformer", "ninformer_mgu", {f"token_mixer.{k}": f"token_mixer.{v}" for k, v in MLP.items()}, **NINFORMER
    ),
    "raft": raft,
    "mamba": published("mamba", "mamba1_mixer", {"dt_proj.bias": "dt_bias"}, **MAMBA),
    "conv": published("conv", "metaformer_sepconv", SEPARABLE, channels_first=True),
    "conv-causal": conv,
    "masked_lm_head": masked_head,
    "multi_scale": stem,
}


@pytest.mark.parametrize("name", FORMERLY)
def test_former_names_give_the_former_numbers(name: str) -> None:
    module, old, x, expected = FORMERLY[name]()
    missing, unexpected = module.eval().load_state_dict(old)
    assert not missing
    assert not unexpected
    with torch.no_grad():
        assert relative_error(module(x), expected) < 1e-5
    present = dict(module.state_dict())  # the present names load as they are
    module.load_state_dict(present)
    with torch.no_grad():
        assert relative_error(module(x), expected) < 1e-5


@pytest.mark.parametrize(
    ("model", "options", "old"),
    [
        ("mixer_s16", {"dim": 8, "depth": 2, "image_size": 32, "num_classes": 2}, MLP),
        (
            "raftmlp_s",
            {"dims": [4, 8, 8, 8], "depths": [1, 1, 1, 1], "image_size": 64, "num_classes": 2},
            {**AXES, "stem.bias": "stem.convs.0.bias", "stem.weights.1": "stem.convs.1.weight"},
        ),
    ],
    ids=["mixer_s16", "raftmlp_s"],
)
def test_a_whole_file_of_former_names(tmp_path: Path, model: str, options: dict, old: Mapping[str, str]) -> None:
    torch.manual_seed(0)
    ours = create_model(model, **options).eval()
    save_model(ours, tmp_path / "present.safetensors")
    state = load_file(tmp_path / "present.safetensors")
    back = {new: name for name, new in old.items()}
    former = {}
    for key, value in state.items():
        prefix, at, rest = key.partition("mixer.")
        found = f"{prefix}{at}{back[rest]}" if at and rest in back and "channel_" not in prefix else back.get(key, key)
        former[found] = value
    assert len(set(former) - set(state)) >= len(old)
    save_file(former, tmp_path / "former.safetensors")
    again = create_model(model, **options, checkpoint=tmp_path / "former.safetensors").eval()
    x = random(5, 2, 3, options["image_size"], options["image_size"])
    with torch.no_grad():
        assert torch.equal(again(x), ours(x))
