"""CM3A, the cross-modal local attention of PAN-Crafter (ICCV 2025, arXiv 2505.23367, eq. 9-12), as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.cm3a import cm3a
from ..options import ATTENTION_KEYS, NEIGHBOURS, expect
from .convolution import Conv3x3, joined_conv, joined_convs
from .plain import is_plain_conv


class CM3A(nn.Module):
    """One query attends to the neighbourhoods of PAN and MS features; tensor names as in the public release.

    Args:
        dim: channels of the features, a multiple of num_heads.
        num_heads: attention heads; channel = head·(dim / num_heads) + d.
        pan_channel, ms_channel: channels of PAN (and its low-resolution version) and of MS.
        pan_ks, ms_ks: odd kernel sizes of the query/PAN and of the MS projections.
        ka: odd side of the attended window.
        qkv_bias: whether the projections have a bias.
        qk_norm: must be False; the released networks normalise neither queries nor keys.
        attention_keys: "aligned": each branch attends with its own keys (the paper). "released": as the public release
            computes it, where the PAN branch attends with the MS keys and the MS branch with the MS keys in transposed
            memory order: [B, heads, D, H, W] moved to [B, heads, W, D, H] and read back row by row.
        neighbours: "learned": a depth-wise convolution `dep_conv` forms the ka² neighbours (the release). "shift":
            neighbour j is the pixel at offset j (the paper); there is no `dep_conv`.
        pan_detail: whether the PAN values also see PAN and PAN - LPAN (the release) or only x and LPAN (the paper).

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        pan_channel: int = 1,
        ms_channel: int = 8,
        pan_ks: int = 3,
        ms_ks: int = 3,
        ka: int = 3,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        *,
        attention_keys: str = "aligned",
        neighbours: str = "learned",
        pan_detail: bool = True,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim: expected a multiple of num_heads {num_heads}, got {dim}")
        if qk_norm:
            raise ValueError("qk_norm: expected False (no released network uses it), got True")
        expect("attention_keys", attention_keys, ATTENTION_KEYS)
        expect("neighbours", neighbours, NEIGHBOURS)
        for name, size in (("pan_ks", pan_ks), ("ms_ks", ms_ks), ("ka", ka)):
            if size < 1 or size % 2 == 0:
                raise ValueError(f"{name}: expected an odd size, got {size}")
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.ka, self.ms_channel = ka, ms_channel
        self.attention_keys, self.pan_detail = attention_keys, pan_detail

        def projection(inputs: int, outputs: int, size: int) -> nn.Conv2d:
            if size == 3:
                return Conv3x3(inputs, outputs, bias=qkv_bias)
            return nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=qkv_bias)

        self.q = projection(dim + ms_channel, dim, pan_ks)
        self.k_pan = projection(dim + pan_channel, dim, pan_ks)
        self.v_pan = projection(dim + (3 if pan_detail else 1) * pan_channel, dim, pan_ks)
        self.kv_ms = projection(dim + ms_channel, 2 * dim, ms_ks)
        self.dep_conv = (
            nn.Conv2d(self.head_dim, self.head_dim * ka * ka, ka, padding=ka // 2, groups=self.head_dim)
            if neighbours == "learned"
            else None
        )
        self.proj_pan = nn.Conv2d(dim, dim, 1)
        self.proj_ms = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, ms: Tensor, lpan: Tensor, pan: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Attend and project.

        Args:
            x: features [B, dim, H, W].
            ms: [B, ms_channel, H, W]. lpan, pan: [B, pan_channel, H, W]. All at the features' size.
            s: mode of each sample [B]: 0 PAN, 1 MS (values between blend the query's condition).

        Returns:
            (x_pan, x_ms), each [B, dim, H, W].
        """
        out_pan, out_ms = self.attend(x, ms, lpan, pan, s)
        return self.proj_pan(out_pan), self.proj_ms(out_ms)

    def attend(self, x: Tensor, ms: Tensor, lpan: Tensor, pan: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """As `forward`, without the projections at its end."""
        blend = s.to(ms.dtype).view(-1, 1, 1, 1)
        q = joined_conv(self.q, x, torch.lerp(lpan.expand_as(ms), ms, blend))
        v_pan = (
            joined_conv(self.v_pan, x, lpan, pan, pan - lpan) if self.pan_detail else joined_conv(self.v_pan, x, lpan)
        )
        k_ms, v_ms = joined_convs(self.kv_ms, 2, x, ms)
        if self.attention_keys == "released":
            k_pan, k_ms = k_ms, transposed_keys(k_ms, self.num_heads)
        else:
            k_pan = joined_conv(self.k_pan, x, lpan)
        weight = bias = None
        if self.dep_conv is not None:
            if not is_plain_conv(self.dep_conv, self.ka, groups=self.head_dim, bias=True):
                return self._attend(q, k_pan, v_pan), self._attend(q, k_ms, v_ms)
            weight = self.dep_conv.weight.view(self.head_dim, self.ka**2, self.ka, self.ka)
            bias = self.dep_conv.bias.view(self.head_dim, self.ka**2)  # type: ignore[union-attr]
        return cm3a(q, k_pan, v_pan, k_ms, v_ms, weight, bias, num_heads=self.num_heads, window=self.ka)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One branch by calls of `dep_conv`, for one that users changed; all neighbours stand in memory."""
        assert self.dep_conv is not None
        b, c, h, w = q.shape
        heads = (b * self.num_heads, self.head_dim, h, w)
        keys, values = (self.dep_conv(t.reshape(heads)).view(heads[0], self.head_dim, -1, h, w) for t in (k, v))
        logits = (q.reshape(heads).unsqueeze(2) * keys).sum(1, keepdim=True) * self.head_dim**-0.5
        return (logits.softmax(2) * values).sum(2).view(b, c, h, w)


def transposed_keys(keys: Tensor, num_heads: int) -> Tensor:
    """The released MS branch's keys: [B, heads, D, H, W] moved to [B, heads, W, D, H] and read back row by row."""
    b, c, h, w = keys.shape
    dim = c // num_heads
    if h == w and w % dim == 0 and c > 1 and keys.stride(1) == 1:
        # One copy, that keeps the layout: the new pixel is (column within its block, channel), row.
        pixels = keys.permute(0, 2, 3, 1).reshape(b, h, dim, w // dim, num_heads, dim)
        return pixels.permute(0, 3, 5, 1, 4, 2).reshape(b, h, w, c).permute(0, 3, 1, 2)
    moved = keys.reshape(b, num_heads, c // num_heads, h, w).permute(0, 1, 4, 2, 3)
    return moved.reshape(b, c, h, w)
