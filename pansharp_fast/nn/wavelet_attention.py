"""The teacher's channel cross-attention against the wavelet condition (U-Know-DiffPAN, SWTCA)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .convolution import group_normed
from .frequency_attention import ChannelAttentionTail, depthwise_then_pointwise
from .fused import channels_at_once, fused, normalized, pixels, strips

#: Weight and bias of a 1x1 convolution.
Point = tuple[Tensor, Tensor]


class WaveletAttention(ChannelAttentionTail):
    """Linear attention over channels between features and the wavelet condition, then a feed-forward branch.

    With k softmaxed over image rows and v over image columns, per head:
    context[d, e] = Σ_pixels q[d] k[e], out[e] = scale Σ_d context[d, e] v[d], scale = (qkv_dim // nheads)^-0.5.

    Tensor names are those of the released decoder's `cond_inj_qk_v` and `cond_inj_q_kv`.

    Args:
        cond_dim: channels of the condition (bands + 3).
        fea_dim: channels of the features.
        qkv_dim: channels of each of q, k and v; a multiple of `nheads`.
        dim_out: channels of the output.
        condition: what the condition gives: "qk" (features give v) or "kv" (features give q).
        groups: groups of the group norm in front.
        nheads: heads.
        drop_path_prob: probability of dropping a sample's feed-forward branch in training.

    Raises:
        ValueError: `qkv_dim` is no multiple of `nheads`, `fea_dim` none of `groups`, or `condition` is neither name.
    """

    def __init__(
        self,
        cond_dim: int,
        fea_dim: int,
        qkv_dim: int,
        dim_out: int,
        condition: str,
        groups: int = 1,
        nheads: int = 8,
        drop_path_prob: float = 0.2,
    ) -> None:
        super().__init__(fea_dim, qkv_dim, dim_out, drop_path_prob)
        if qkv_dim % nheads:
            raise ValueError(f"qkv_dim: expected a multiple of nheads = {nheads}, got {qkv_dim}")
        if condition not in ("qk", "kv"):
            raise ValueError(f"condition: expected 'qk' or 'kv', got {condition!r}")
        self.nheads = nheads
        self.condition = condition
        self.qkv_dim = qkv_dim
        self.scale = (qkv_dim // nheads) ** -0.5
        self.prenorm_x = nn.GroupNorm(groups, fea_dim)
        if condition == "qk":
            self.qk = depthwise_then_pointwise(cond_dim, 2 * qkv_dim)
            self.v = depthwise_then_pointwise(fea_dim, qkv_dim)
        else:
            self.q = depthwise_then_pointwise(fea_dim, qkv_dim)
            self.kv = depthwise_then_pointwise(cond_dim, 2 * qkv_dim)

    def prepare(self, condition: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """What `attend` needs of the condition [B, cond_dim, H, W]; the same for every step of a sampling run."""
        if fused(self, condition) and self._reads():
            local, (first, second) = self._projections(self.qk if self.condition == "qk" else self.kv, condition)
            if self.condition == "qk":
                return self._context_of(self._keys(local, second), local, first)
            everything = slice(None)
            return torch.cat(list(self._keys(local, first)), 1), _values(local, second, everything, everything)
        if self.condition == "qk":
            q, k = self.qk(condition).chunk(2, dim=1)
            return self._context(q, k.softmax(dim=-2))
        k, v = self.kv(condition).chunk(2, dim=1)
        return k.softmax(dim=-2), v.softmax(dim=-1)

    def attend(self, x: Tensor, prepared: Tensor | tuple[Tensor, Tensor], *, overwrite: bool = False) -> Tensor:
        """x [B, fea_dim, H, W] and the result of `prepare` -> [B, dim_out, H, W].

        overwrite: x may be used as memory.
        """
        if fused(self, x) and self._reads():
            x = normalized(x, self.prenorm_x, overwrite)
            if isinstance(prepared, Tensor):
                local, [point] = self._projections(self.v, x)
                return self._finish_strips(x, prepared, partial(_values, local, point))
            keys, values = (each.contiguous(memory_format=torch.channels_last) for each in prepared)
            return self._cross(x, [keys], lambda image, rows: values[image, :, rows])
        x = group_normed(self.prenorm_x, x)
        if isinstance(prepared, Tensor):
            context, v = prepared, self.v(x).softmax(dim=-1)
        else:
            k, v = prepared
            context = self._context(self.q(x), k)
        return self.finish(torch.matmul(context, self._heads(v)).reshape(v.shape), x)

    def forward(self, x: Tensor, condition: Tensor, *, overwrite: bool = False) -> Tensor:
        """x [B, fea_dim, H, W], condition [B, cond_dim, H, W] -> [B, dim_out, H, W]; overwrite as in `attend`."""
        if self.condition == "kv" and fused(self, x) and self._reads():
            local, (k, v) = self._projections(self.kv, condition)
            x = normalized(x, self.prenorm_x, overwrite)
            return self._cross(x, self._keys(local, k), partial(_values, local, v))
        return self.attend(x, self.prepare(condition), overwrite=overwrite)

    def _heads(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(tensor.shape[0], self.nheads, -1, tensor.shape[-2] * tensor.shape[-1])

    def _context(self, q: Tensor, k: Tensor) -> Tensor:
        """Scaled sum over pixels [B, heads, e, d]: the scale rides on this small matrix."""
        return torch.matmul(self._heads(k), self._heads(q).transpose(-1, -2)) * self.scale

    def _reads(self) -> bool:
        return self._joins(*((self.qk, self.v) if self.condition == "qk" else (self.q, self.kv)))

    # At inference on a CPU there are no queries. With q = W l + b, where l comes from the depth-wise convolution, the
    # sum of k q over pixels is (sum of k l) Wᵀ + (sum of k) b, and a column's keys add up to 1. The context and the
    # projection behind it are one matrix. Keys come a few channels at a time, values a few rows.

    def _projections(self, projection: Any, x: Tensor) -> tuple[Tensor, list[Point]]:
        """l, and weight and bias of each of the 1x1 convolutions of it."""
        depthwise, point = projection
        parts = (tensor.split(self.qkv_dim) for tensor in (point.weight, point.bias))
        return depthwise(x.contiguous(memory_format=torch.channels_last)), list(zip(*parts, strict=True))

    def _keys(self, local: Tensor, point: Point) -> Iterator[Tensor]:
        parts = (tensor.split(channels_at_once(local)) for tensor in point)
        for weight, bias in zip(*parts, strict=True):
            yield F.conv2d(local, weight, bias).permute(0, 2, 3, 1).softmax(1).permute(0, 3, 1, 2)

    def _context_of(self, keys: Iterable[Tensor], local: Tensor, q: Point) -> Tensor:
        """`_context` [B, heads, e, d]."""
        # The narrower factor first: the matrix product is several times as fast.
        sums = torch.cat([torch.bmm(pixels(local).transpose(1, 2), pixels(k)) for k in keys], 2).transpose(1, 2)
        weight, bias = q[0].flatten(1).unflatten(0, (self.nheads, -1)), q[1].view(self.nheads, 1, -1)
        products = torch.einsum("bhec,hdc->bhed", sums.unflatten(1, (self.nheads, -1)), weight)
        return (products + local.shape[3] * bias) * self.scale

    def _cross(self, x: Tensor, keys: Iterable[Tensor], values: Callable[[slice, slice], Tensor]) -> Tensor:
        local, [q] = self._projections(self.q, x)
        context = self._context_of(keys, local, q)
        del local
        return self._finish_strips(x, context, values)

    def _finish_strips(self, x: Tensor, context: Tensor, values: Callable[[slice, slice], Tensor]) -> Tensor:
        """values: those of a slice of the batch and of the rows."""
        projection = self.attn_out.weight.flatten(1).unflatten(1, (self.nheads, -1))
        matrix = torch.einsum("bhed,ohe->bhdo", context, projection).flatten(1, 2)
        out = self.start_fused(x)
        del x
        for image, rows in strips(out, self.qkv_dim):
            pixels(out[image, :, rows]).baddbmm_(pixels(values(image, rows)), matrix[image])
        return self.finish_fused(out)


def _values(local: Tensor, point: Point, image: slice, rows: slice) -> Tensor:
    return F.conv2d(local[image, :, rows], *point).permute(0, 2, 3, 1).softmax(2).permute(0, 3, 1, 2)
