"""The teacher's frequency attention block (U-Know-DiffPAN; `FreqCA` of the public release)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import frequency_attention
from .convolution import Conv3x3, group_normed
from .fused import conv_silu_conv, fused, normalized, pixels, pointwise
from .plain import hooked, is_plain, is_plain_conv, layers_of


def depthwise_then_pointwise(inputs: int, outputs: int) -> nn.Sequential:
    """Depth-wise 3x3 convolution without bias, then 1x1 with bias."""
    return nn.Sequential(
        nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs, bias=False), nn.Conv2d(inputs, outputs, 1)
    )


def _projects(projection: nn.Module) -> bool:
    """Whether a projection is one of `depthwise_then_pointwise` whose second convolution may be read."""
    layers = layers_of(projection)
    return len(layers) == 2 and is_plain_conv(layers[1], 1, bias=True)


class ChannelAttentionTail(nn.Module):
    """What follows every channel attention of the teacher: projection, residual, feed-forward with stochastic depth.

    Subclasses call `finish(attended, residual)`.

    Attributes:
        drops: names of children that the feed-forward branch goes through, in modules taken over from other code.
    """

    drops: tuple[str, ...] = ()

    def __init__(self, fea_dim: int, qkv_dim: int, dim_out: int, drop_path_prob: float) -> None:
        super().__init__()
        self.attn_out = nn.Conv2d(qkv_dim, dim_out, 1)
        self.attn_res = nn.Conv2d(fea_dim, dim_out, 1) if fea_dim != dim_out else nn.Identity()
        self.ffn = nn.Sequential(
            Conv3x3(dim_out, 2 * dim_out, bias=False),
            nn.SiLU(),
            Conv3x3(2 * dim_out, dim_out, bias=False),
            nn.Conv2d(dim_out, dim_out, 1),
        )
        self.drop_path_prob = drop_path_prob

    def finish(self, attended: Tensor, residual: Tensor) -> Tensor:
        out = self.attn_out(attended) + self.attn_res(residual)
        branch = self.ffn(out)
        if self.training and self.drop_path_prob > 0:
            # Stochastic depth: a whole sample's branch is dropped, the others are scaled up.
            branch = branch * torch.dropout(branch.new_ones(branch.shape[0], 1, 1, 1), self.drop_path_prob, True)
        for name in self.drops:
            branch = self.get_submodule(name)(branch)
        return out + branch

    # The same at inference on a CPU, in two parts.

    def _joins(self, *projections: nn.Module) -> bool:
        """Whether the layers, `projections` among them, are those that the joined form reads."""
        ffn = layers_of(self.ffn)
        return (
            not any(hooked(self.get_submodule(name)) for name in self.drops)
            and len(ffn) == 4
            and is_plain_conv(ffn[0], 3, bias=False)
            and is_plain(ffn[1], nn.SiLU)
            and is_plain_conv(ffn[2], 3, bias=False)
            and is_plain_conv(ffn[3], 1, bias=True)
            and is_plain_conv(self.attn_out, 1, bias=True)
            and (is_plain(self.attn_res, nn.Identity) or is_plain_conv(self.attn_res, 1))
            and is_plain(self.get_submodule("prenorm_x"), nn.GroupNorm)
            and all(_projects(projection) for projection in projections)
        )

    def start_fused(self, residual: Tensor) -> Tensor:
        """What the attention's projection is to be added to; takes the memory of residual."""
        bias = self.attn_out.bias
        assert bias is not None
        if isinstance(self.attn_res, nn.Conv2d):
            return self.attn_res(residual).add_(bias[:, None, None])
        return residual.add_(bias[:, None, None])

    def finish_fused(self, out: Tensor) -> Tensor:
        ffn: Any = self.ffn
        first, _, second, last = ffn
        # Nothing stands between the last two convolutions: they are one.
        weight = (last.weight.flatten(1) @ second.weight.flatten(1)).view_as(second.weight)
        return conv_silu_conv(out, first.weight, weight, last.bias)


class FrequencyAttention(ChannelAttentionTail):
    """Channel attention on the amplitudes and phases of the features' spectrum, then a feed-forward branch.

    Constructor arguments and tensor names are those of the released block.

    Args:
        fea_dim: channels of the input.
        qkv_dim: channels of each of q, k and v; a multiple of `nheads`.
        dim_out: channels of the output.
        groups: groups of the group norm in front.
        nheads: heads.
        drop_path_prob: probability of dropping a sample's feed-forward branch in training.

    Raises:
        ValueError: `qkv_dim` is no multiple of `nheads`, or `fea_dim` none of `groups`.
    """

    def __init__(
        self, fea_dim: int, qkv_dim: int, dim_out: int, groups: int = 1, nheads: int = 8, drop_path_prob: float = 0.2
    ) -> None:
        super().__init__(fea_dim, qkv_dim, dim_out, drop_path_prob)
        if qkv_dim % nheads:
            raise ValueError(f"qkv_dim: expected a multiple of nheads = {nheads}, got {qkv_dim}")
        self.nheads = nheads
        self.prenorm_x = nn.GroupNorm(groups, fea_dim)
        self.qkv = depthwise_then_pointwise(fea_dim, 3 * qkv_dim)

    def forward(self, x: Tensor, *, overwrite: bool = False) -> Tensor:
        """[B, fea_dim, H, W] -> [B, dim_out, H, W], any H and W; with `overwrite` x may be used as memory."""
        if fused(self, x) and self._joins(self.qkv):
            x = normalized(x, self.prenorm_x, overwrite)
            q, k, v = self._qkv(x)
            attended = frequency_attention(q, k, v, num_heads=self.nheads)
            del q, k, v
            out = self.start_fused(x)
            matrix = self.attn_out.weight.flatten(1).t().expand(len(x), -1, -1)
            pixels(out).baddbmm_(attended.flatten(2).transpose(1, 2), matrix)
            del attended, x
            return self.finish_fused(out)
        x = group_normed(self.prenorm_x, x)
        q, k, v = self.qkv(x).chunk(3, dim=1)
        return self.finish(frequency_attention(q, k, v, num_heads=self.nheads), x)

    def _qkv(self, x: Tensor) -> Iterator[Tensor]:
        qkv: Any = self.qkv
        depthwise, point = qkv
        x = depthwise(x)
        parts = zip(point.weight.chunk(3), point.bias.chunk(3), strict=True)
        return (pointwise(x, weight, bias) for weight, bias in parts)
