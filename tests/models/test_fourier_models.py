"""Blocks and models of the Fourier family and Sparsifiner: official numbers, parameter counts, other resolutions."""

from __future__ import annotations

import pytest
from mixerzoo.mixers.fourier import AFF
from mixerzoo.models.mobile_parts import ChannelsFirstBlock, ConvFusion
from mixerzoo.tests.utils import check_golden, load_golden
from torch import nn

NORMS = {"layer_norm_2d": "group_norm", "layer_norm": "std_layer_norm"}
ACTS = {"swish": "silu", "relu": "relu"}


def _aff_block_names(state):
    """Official names of AFFNet's `Block` to ours."""
    rename = {
        "filter.": "mixer.",
        "mlp.block.exp_1x1.block.": "channel_mixer.expand.",
        "mlp.block.conv_3x3.block.": "channel_mixer.depthwise.",
        "mlp.block.red_1x1.block.": "channel_mixer.reduce.",
    }
    out = {}
    for key, value in state.items():
        for theirs, ours in rename.items():
            key = key.replace(theirs, ours)
        out[key] = value
    return out


def _aff_block(dim, ratio, act, norm, **options):
    channel_mixer = {"name": "inverted_residual", "ratio": ratio, "act": act}
    mixer = AFF(dim, num_blocks=8, activation=act)
    return ChannelsFirstBlock(dim, mixer=mixer, norm=norm, channel_mixer=channel_mixer, **options)


@pytest.mark.parametrize("name", ["aff_block", "aff_block_ln"])
def test_golden_block(name):
    golden = load_golden(name)
    options = golden.kwargs
    block = _aff_block(
        options["dim"],
        options["mlp_ratio"],
        ACTS[options["opts_"]["model.activation.name"]],
        NORMS[options["attn_norm_layer"]],
        double_skip=options["double_skip"],
    )
    check_golden(
        golden,
        block,
        _aff_block_names,
        to_ours=lambda x: x.permute(0, 2, 3, 1),
        to_theirs=lambda y: y.permute(0, 3, 1, 2),
    )


class _Stage(nn.Module):
    def __init__(self, blocks, fusion):
        super().__init__()
        self.blocks, self.fusion = nn.ModuleList(blocks), fusion

    def forward(self, x):
        y = x
        for block in self.blocks:
            y = block(y)
        return self.fusion(x, y)


def test_golden_fused_stage():
    golden = load_golden("aff_affblock")
    options = golden.kwargs
    dim, depth = options["transformer_dim"], options["n_transformer_blocks"]
    act = ACTS[options["opts_"]["model.activation.name"]]
    norm = NORMS[options["attn_norm_layer"]]
    blocks = [_aff_block(dim, options["ffn_dim"] / dim, act, norm) for _ in range(depth)]
    stage = _Stage(blocks, ConvFusion(dim, norm=norm, act=act))

    def convert(state):
        rename = {
            f"global_rep.{depth}.": "fusion.norm.",
            "conv_proj.block.": "fusion.project.",
            "fusion.block.": "fusion.joint.",
            "global_rep.": "blocks.",
        }
        out = {}
        for key, value in _aff_block_names(state).items():
            for theirs, ours in rename.items():
                if key.startswith(theirs):
                    key = ours + key.removeprefix(theirs)
                    break
            out[key] = value
        return out

    check_golden(
        golden,
        stage,
        convert,
        to_ours=lambda x: x.permute(0, 2, 3, 1),
        to_theirs=lambda y: y.permute(0, 3, 1, 2),
    )
