"""The teacher's channel cross-attention against the wavelet condition (U-Know-DiffPAN, SWTCA)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .frequency_attention import ChannelAttentionTail, depthwise_then_pointwise


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
        if self.condition == "qk":
            q, k = self.qk(condition).chunk(2, dim=1)
            return self._context(q, k.softmax(dim=-2))
        k, v = self.kv(condition).chunk(2, dim=1)
        return k.softmax(dim=-2), v.softmax(dim=-1)

    def attend(self, x: Tensor, prepared: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """x [B, fea_dim, H, W] and the result of `prepare` -> [B, dim_out, H, W]."""
        x = self.prenorm_x(x)
        if isinstance(prepared, Tensor):
            context, v = prepared, self.v(x).softmax(dim=-1)
        else:
            k, v = prepared
            context = self._context(self.q(x), k)
        return self.finish(torch.matmul(context, self._heads(v)).reshape(v.shape), x)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x [B, fea_dim, H, W], condition [B, cond_dim, H, W] -> [B, dim_out, H, W]."""
        return self.attend(x, self.prepare(condition))

    def _heads(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(tensor.shape[0], self.nheads, -1, tensor.shape[-2] * tensor.shape[-1])

    def _context(self, q: Tensor, k: Tensor) -> Tensor:
        """Scaled sum over pixels [B, heads, e, d]: the scale rides on this small matrix."""
        return torch.matmul(self._heads(k), self._heads(q).transpose(-1, -2)) * self.scale
