"""Diffusion networks of U-Know-DiffPAN (CVPR 2025, arXiv 2412.06243): teacher FSA-T and student FSA-S.

Both predict the residual x0 = HRMS - lms from its noisy version, images divided by the peak. Tensor names are those of
the public release.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.grid import check_pair
from ..nn import Conv3x3, FrequencyAttention, WaveletAttention
from ..nn.convolution import group_normed, joined_conv, norm_silu_conv, two_convolutions
from ..nn.fused import fused
from ..nn.plain import hooked, is_plain
from ..nn.recompute import recomputed
from ..options import PREDICTIONS, check_fields, expect
from .condition import Condition, highpass, wavelet_condition
from .prior import PriorConfig, PriorNet

#: Length of the vector that the teacher extracts from the prior network's results.
_PRIOR_WIDTH = 128
_HEADS = 8


@dataclass(frozen=True)
class FSAConfig:
    """Configuration of `FSATeacher` and `FSAStudent`.

    bands: of the multispectral image. inner_channel: width at full size; channel_mults: its multiples, halving the
    image between them. res_blocks: blocks a level. attn_res: nominal resolutions with spatial self-attention, where the
    full size counts as image_size, whatever the real input. self_condition: the network also sees an estimate of x0.
    highpass_pan: PAN goes through `highpass` first. released_sampling: sharpening feeds the respaced step index as time
    and the noisy residual as self-condition. prediction: what the network's output is: sample (x0), epsilon or
    v_prediction.
    """

    bands: int = 8
    inner_channel: int = 32
    norm_groups: int = 1
    channel_mults: tuple[int, ...] = (1, 2, 2, 4)
    attn_res: tuple[int, ...] = (8,)
    res_blocks: int = 2
    dropout: float = 0.2
    image_size: int = 64
    self_condition: bool = True
    highpass_pan: bool = False
    released_sampling: bool = False
    prediction: str = "sample"
    prior: PriorConfig | None = None

    def __post_init__(self) -> None:
        for name in ("channel_mults", "attn_res"):  # lists where the configuration was read from JSON
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if isinstance(self.prior, dict):
            object.__setattr__(self, "prior", PriorConfig(**self.prior))
        expect("prediction", self.prediction, PREDICTIONS)
        sizes = dict.fromkeys(("inner_channel", "norm_groups", "attn_res", "image_size"), (1, 65536))
        check_fields(self, bands=(1, 1024), channel_mults=(1, 64), res_blocks=(1, 64), dropout=(0, 1), **sizes)
        if self.inner_channel < 1 or self.inner_channel % _HEADS:
            raise ValueError(f"inner_channel: expected a positive multiple of {_HEADS}, got {self.inner_channel}")

    @classmethod
    def preset(cls, name: str, *, bands: int, teacher: bool) -> FSAConfig:
        """Configuration called `name`: released, paper or tiny; a teacher's has one block more a level.

        Raises:
            ValueError: no preset of that name.
        """
        if name not in PRESETS:
            raise ValueError(f"preset: expected one of {sorted(PRESETS)}, got {name!r}")
        prior = PriorConfig.preset(name, bands=bands) if teacher else None
        return cls(**{"bands": bands, "prior": prior, "res_blocks": 3 if teacher else 2, **PRESETS[name]})

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON or YAML; `FSAConfig(**values)` restores it."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}


#: name -> what differs from `FSAConfig`'s defaults.
PRESETS: dict[str, dict[str, Any]] = {
    # The public release, its sampling included.
    "released": {"highpass_pan": True, "released_sampling": True},
    # The paper's equations 3 and 15: no self-condition, PAN as it is.
    "paper": {"self_condition": False},
    # Ours: a quarter of the width, three levels; for tests and for training on a CPU.
    "tiny": {"inner_channel": 8, "channel_mults": (1, 2, 2), "attn_res": (16,), "res_blocks": 1, "dropout": 0.0},
}


class Prediction(NamedTuple):
    """What a network says about a noisy residual.

    out: its prediction [B, C, H, W]. variance: the teacher's uncertainty, of the same shape; None from a student.
    features: on request the input of every module that is no block (stem, down-sampling, up-sampling), of the padded
    size; the first is the network's own input, the others are what distillation compares.
    """

    out: Tensor
    variance: Tensor | None = None
    features: tuple[Tensor, ...] | None = None


class Prepared(NamedTuple):
    """What does not change over the steps of a sampling run, made by `prepare`. shape: of the residual."""

    shape: tuple[int, ...]
    images: Tensor
    downs: dict[int, Any]
    ups: dict[int, Any]


class TimeEmbedding(nn.Module):
    """Sine and cosine of t at `width` / 2 geometrically falling frequencies: [B] -> [B, width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, time: Tensor) -> Tensor:
        half = self.width // 2
        rates = torch.exp(torch.arange(half, device=time.device, dtype=torch.float32) * (-math.log(1e4) / half))
        angles = time.to(torch.float32)[:, None] * rates
        return torch.cat([angles.sin(), angles.cos()], 1)


class _NoiseLevel(nn.Sequential):
    """A time embedding, computed in float32 as it is fine, then layers in the network's dtype."""

    def forward(self, time: Tensor, dtype: torch.dtype) -> Tensor:  # type: ignore[override]
        embedding, *layers = self
        x = embedding(time).to(dtype)
        for layer in layers:
            x = layer(x)
        return x


class _Block(nn.Module):
    """GroupNorm, SiLU, dropout, 3x3 convolution."""

    def __init__(self, channels: int, out: int, groups: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.GroupNorm(groups, channels),
            nn.SiLU(),
            nn.Dropout(dropout) if dropout else nn.Identity(),
            Conv3x3(channels, out),
        )

    def forward(self, x: Tensor, extra: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """Image [B, channels, H, W] -> [B, out, H, W], with extra [B, out] and residual of the result's shape added."""
        return norm_silu_conv(self.block, x, shift=extra, residual=residual)


class _TimeBias(nn.Module):
    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.noise_func = nn.Sequential(nn.Linear(width, channels))

    def forward(self, time: Tensor) -> Tensor:
        return self.noise_func(time)


class ResnetBlock(nn.Module):
    """Two convolution blocks, the time embedding added between them, and a shortcut."""

    def __init__(self, channels: int, out: int, config: FSAConfig) -> None:
        super().__init__()
        self.noise_func = _TimeBias(config.inner_channel, out)
        self.block1 = _Block(channels, out, config.norm_groups)
        self.block2 = _Block(out, out, config.norm_groups, config.dropout)
        self.res_conv = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        if is_plain(self.block1, _Block) and is_plain(self.block2, _Block):
            layers = self.block1.block, self.block2.block, self.res_conv
            return two_convolutions(*layers, x, shift=self.noise_func(time))
        return self.block2(self.block1(x, self.noise_func(time)), residual=self.res_conv(x))


class SelfAttention(nn.Module):
    """Full spatial softmax attention; the logits' scale is 1 / sqrt(channels), not of a head's width, as released."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=False)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        qkv = self.qkv(group_normed(self.norm, x)).reshape(batch, _HEADS, 3 * (channels // _HEADS), height * width)
        q, k, v = qkv.transpose(2, 3).contiguous().chunk(3, -1)  # fused kernels want a head's channels side by side
        y = F.scaled_dot_product_attention(q, k, v, scale=channels**-0.5)
        return self.out(y.transpose(2, 3).reshape(batch, channels, height, width)) + x


class _StudentBlock(nn.Module):
    """Residual blocks in a row, then self-attention on request. place: down, mid or up."""

    def __init__(self, place: str, channels: int, out: int, attention: bool, config: FSAConfig) -> None:
        super().__init__()
        if place != "up":
            self.first = "enc_res_block"
        elif attention:
            self.first = "mid_res_block"
        else:
            self.time_emd_block = ResnetBlock(channels, channels, config)
            self.first = "dec_res_block"
        self.add_module(self.first, ResnetBlock(channels, out, config))
        self.res_block = ResnetBlock(out, out, config)
        self.attn = SelfAttention(out) if attention else nn.Identity()

    def forward(self, x: Tensor, time: Tensor, prepared: None = None) -> Tensor:
        if hasattr(self, "time_emd_block"):
            x = self.time_emd_block(x, time)
        x = self.get_submodule(self.first)(x, time)
        return self.attn(self.res_block(x, time))


class _PriorResidual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv21 = Conv3x3(width, width)
        self.conv22 = Conv3x3(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.conv22(F.relu(self.conv21(x))))


class _PriorExtractor(nn.Module):
    """Prior network's results [B, 2 bands, H, W] -> vector [B, 128]."""

    def __init__(self, bands: int, width: int) -> None:
        super().__init__()
        leaky = nn.LeakyReLU(0.1, inplace=True)
        self.E_12 = nn.Sequential(Conv3x3(2 * bands, width), leaky, *(_PriorResidual(width) for _ in range(3)))
        widths = (width, 2 * width, 2 * width, 2 * width)
        layers: list[nn.Module] = []
        for channels, out in itertools.pairwise(widths):
            layers += [Conv3x3(channels, out), leaky]
        self.E3 = nn.Sequential(*layers)
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(2 * width, _PRIOR_WIDTH))

    def forward(self, out: Tensor, variance: Tensor) -> Tensor:
        return self.mlp(self.E3(self.E_12(torch.cat([out, variance], 1))).mean((2, 3)))


class _PriorInjection(nn.Module):
    """Scale and shift by the prior vector, then a gated pair of depth-wise branches (the paper's FFA)."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.kernel = nn.Sequential(nn.SiLU(), nn.Linear(_PRIOR_WIDTH, 2 * channels, bias=False))
        self.x_conv, self.x_attn = (
            nn.Sequential(
                nn.Conv2d(channels, 2 * channels, 3, padding=1, groups=channels, bias=False),
                nn.Conv2d(2 * channels, channels, 1),
            )
            for _ in range(2)
        )
        self.project_out = nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        shift, scale = modulation.chunk(2, 1)
        y = torch.addcmul(shift, x, 1 + scale)
        return self.project_out(torch.addcmul(x, self.x_conv(y), F.gelu(self.x_attn(y))))


class _TeacherBlock(nn.Module):
    """Prior injection on the way down, frequency and wavelet attention on the way up. place: down, mid or up."""

    def __init__(self, place: str, channels: int, out: int, attention: bool, config: FSAConfig) -> None:
        super().__init__()
        if place == "down":
            self.prior_cond_inj = _PriorInjection(channels, out)
        elif place == "up" and attention:
            self.dec_res_block = ResnetBlock(channels, out, config)
        elif place == "up":
            condition = config.bands + 3
            self.time_emd_block = ResnetBlock(channels, channels, config)
            self.fourier_CA = FrequencyAttention(channels, channels, channels, nheads=_HEADS)
            self.cond_inj_qk_v = WaveletAttention(condition, channels, channels, channels, "qk", nheads=_HEADS)
            self.cond_inj_q_kv = WaveletAttention(condition, channels, channels, out, "kv", nheads=_HEADS)
            self.attn_res = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()
        self.res_block = ResnetBlock(out, out, config)
        self.attn = SelfAttention(out) if attention else nn.Identity()

    def forward(self, x: Tensor, time: Tensor, prepared: Any) -> Tensor:
        if hasattr(self, "prior_cond_inj"):
            x = self.prior_cond_inj(x, prepared)
        elif hasattr(self, "dec_res_block"):
            x = self.dec_res_block(x, time)
        elif hasattr(self, "fourier_CA"):
            # Who listens to a layer may keep what it sees, and what stands in its place may know no such argument.
            ours = is_plain(self.fourier_CA, FrequencyAttention) and not any(map(hooked, self.modules()))
            options = {"overwrite": True} if ours and _wavelet_blocks(self) else {}
            y = self.time_emd_block(x, time)
            first, second = self.cond_inj_qk_v, self.cond_inj_q_kv
            steps: Any
            if isinstance(prepared, Tensor):  # the wavelets
                steps = (self.fourier_CA, ()), (first, (prepared,)), (second, (prepared,))
            else:
                steps = (self.fourier_CA, ()), (first.attend, prepared[:1]), (second.attend, prepared[1:])
            for step, given in steps:
                y = recomputed(functools.partial(step, **options), y, *given, random=True)
            x = self.attn_res(x) + y
        return self.attn(self.res_block(x, time))


def _wavelet_blocks(block: Any) -> list[WaveletAttention]:
    """A decoder block's wavelet attention, if it is still what the constructor made."""
    blocks = [block.cond_inj_qk_v, block.cond_inj_q_kv]
    return blocks if all(is_plain(each, WaveletAttention) for each in blocks) else []


class _Resize(nn.Module):
    def __init__(self, channels: int, up: bool) -> None:
        super().__init__()
        self.up = up
        self.conv = Conv3x3(channels, channels) if up else nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest") if self.up else x)


def _laid_out(module: nn.Module, x: Tensor) -> Tensor:
    """x in the memory layout that the module computes in fastest; what it makes of it keeps that."""
    return x.contiguous(memory_format=torch.channels_last) if fused(module, x) else x


class _FSA(nn.Module):
    """The U-Net that teacher and student share; they differ in their blocks."""

    config_class: ClassVar[type] = FSAConfig
    block: ClassVar[type[nn.Module]]
    heads: ClassVar[int]

    def __init__(self, config: FSAConfig) -> None:
        super().__init__()
        self.config = config
        width = config.inner_channel
        self.noise_level_mlp = _NoiseLevel(
            TimeEmbedding(width), nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width)
        )
        channels, resolution = width, config.image_size
        inputs = config.bands * (3 if config.self_condition else 2) + 1
        downs: list[nn.Module] = [Conv3x3(inputs, width)]
        skips = [width]
        last = len(config.channel_mults) - 1
        for level, mult in enumerate(config.channel_mults):
            for _ in range(config.res_blocks):
                downs.append(self.block("down", channels, width * mult, resolution in config.attn_res, config))
                channels = width * mult
                skips.append(channels)
            if level < last:
                downs.append(_Resize(channels, up=False))
                skips.append(channels)
                resolution //= 2
        ups: list[nn.Module] = []
        self.downs = nn.ModuleList(downs)
        self.mid = nn.ModuleList(
            [self.block("mid", channels, channels, attention, config) for attention in (True, False)]
        )
        for level in range(last, -1, -1):
            out = width * config.channel_mults[level]
            for _ in range(config.res_blocks + 1):
                ups.append(self.block("up", channels + skips.pop(), out, resolution in config.attn_res, config))
                channels = out
            if level > 0:
                ups.append(_Resize(channels, up=True))
                resolution *= 2
        self.ups = nn.ModuleList(ups)
        # By number, as a user may wrap a block.
        self.down_blocks, self.up_blocks = (
            frozenset(number for number, layer in enumerate(layers) if isinstance(layer, self.block))
            for layers in (downs, ups)
        )
        self.final_conv = _Block(channels, self.heads * config.bands, config.norm_groups)
        for parameter in self.final_conv.block[3].parameters():
            nn.init.zeros_(parameter)  # a fresh network's residual is 0: it sharpens to lms
        # Features follow: GPUs norm and convolve them faster, CPUs as fast.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def multiple(self) -> int:
        """Sides of the features are padded to a multiple of this."""
        return 2 ** (len(self.config.channel_mults) - 1)

    def _cast(self, x: Tensor) -> Tensor:
        return x.to(next(self.parameters()).dtype)

    def _pad(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        amounts = (0, -width % self.multiple, 0, -height % self.multiple)
        return F.pad(x, amounts, mode="replicate") if any(amounts) else x

    def _check(self, cond: Condition) -> None:
        check_pair(cond.pan, cond.lms, self.config.bands, ratio=1, name="lms")

    def prepare(self, cond: Condition, *, keep: bool = True) -> Prepared:
        """Compute once what every step of a sampling run needs from the condition.

        keep: hold what each block makes of the wavelets, too; a single step needs less memory without.

        Raises:
            ValueError: the condition's tensors disagree with each other or with the configuration.
        """
        self._check(cond)
        padded = cond.map(self._pad)
        images = torch.cat([padded.lms, padded.pan], 1)
        return Prepared(tuple(cond.lms.shape), images, *self._prepare(padded, keep))

    def _prepare(self, cond: Condition, keep: bool) -> tuple[dict[int, Any], dict[int, Any]]:
        """What the blocks in `downs` and in `ups` need, by their number there."""
        return {}, {}

    def _head(self, y: Tensor, features: tuple[Tensor, ...] | None) -> Prediction:
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        cond: Condition | Prepared,
        self_cond: Tensor | None = None,
        *,
        return_features: bool = False,
    ) -> Prediction:
        """Predict from a noisy residual.

        Args:
            x: noisy residual [B, C, H, W]; sides that are no multiple of 8 are padded and the result is cropped.
            time: [B], the step that the noise belongs to (or whatever the network was trained to take for it).
            cond: what to condition on, or the result of `prepare` for it.
            self_cond: an estimate of the clean residual [B, C, H, W]; None means x. Ignored where
                `config.self_condition` is off.
            return_features: fill `Prediction.features`.

        Raises:
            ValueError: shapes that disagree.
        """
        prepared = self.prepare(cond, keep=False) if isinstance(cond, Condition) else cond
        expected = list(prepared.shape)
        for name, tensor in (("x", x), ("self_cond", x if self_cond is None else self_cond)):
            if list(tensor.shape) != expected:
                raise ValueError(f"{name}: expected {expected} as the condition, got {list(tensor.shape)}")
        if list(time.shape) != [x.shape[0]]:
            raise ValueError(f"time: expected [{x.shape[0]}], got {list(time.shape)}")
        x = self._pad(x)
        parts = [prepared.images, x]
        if self.config.self_condition:
            parts.insert(0, x if self_cond is None else self._pad(self_cond))
        x = _laid_out(self, torch.cat(parts, 1))
        embedding = self.noise_level_mlp(time, x.dtype)
        features: list[Tensor] = []
        skips: list[Tensor] = []
        for number, layer in enumerate(self.downs):
            if number in self.down_blocks:
                x = layer(x, embedding, prepared.downs.get(number))
            else:
                if return_features:
                    features.append(x)
                x = joined_conv(cast(nn.Conv2d, layer), x) if number == 0 and x.is_cuda else layer(x)
            skips.append(x)
        for layer in self.mid:
            x = layer(x, embedding, None)
        for number, layer in enumerate(self.ups):
            if number in self.up_blocks:
                x = torch.cat([x, skips.pop()], 1)
                x = layer(x, embedding, prepared.ups.get(number))
            else:
                if return_features:
                    features.append(x)
                x = layer(x)
        y = self.final_conv(x)[..., : expected[2], : expected[3]]
        return self._head(y, tuple(features) if return_features else None)


class FSAStudent(_FSA):
    """Student FSA-S, conditioned on lms and PAN alone."""

    architecture = "uknow-student"
    block = _StudentBlock
    heads = 1

    def condition(self, lms: Tensor, pan: Tensor) -> Condition:
        """The network's condition, in its dtype, from lms [B, C, H, W] and PAN [B, 1, H, W], both divided by the peak.

        Images may be finer than the network: details are taken before they are cast.
        """
        check_pair(pan, lms, self.config.bands, ratio=1, name="lms")
        return Condition(lms, highpass(pan) if self.config.highpass_pan else pan).map(self._cast)

    def _head(self, y: Tensor, features: tuple[Tensor, ...] | None) -> Prediction:
        return Prediction(y, None, features)


class FSATeacher(_FSA):
    """Teacher FSA-T, conditioned on the prior network's results and on wavelets too.

    `prior` holds the prior network where the configuration names one (then `condition` can be called); it is frozen.
    """

    architecture = "uknow-teacher"
    block = _TeacherBlock
    heads = 2

    def __init__(self, config: FSAConfig) -> None:
        super().__init__(config)
        self.prior_cond_extractor = _PriorExtractor(config.bands, config.inner_channel)
        self.prior = PriorNet(config.prior).requires_grad_(False) if config.prior is not None else None

    def condition(self, lms: Tensor, pan: Tensor) -> Condition:
        """The network's condition, in its dtype, from lms [B, C, H, W] and PAN [B, 1, H, W], both divided by the peak.

        Images may be finer than the network: details are taken before they are cast.

        Raises:
            ValueError: the configuration names no prior network, or shapes disagree.
        """
        if self.prior is None:
            raise ValueError("config.prior: expected the prior network's configuration, got None")
        check_pair(pan, lms, self.config.bands, ratio=1, name="lms")
        wavelets = wavelet_condition(lms, pan)
        if self.config.highpass_pan:
            pan = highpass(pan)
        lms, pan, wavelets = map(self._cast, (lms, pan, wavelets))
        with torch.no_grad():
            out, variance = self.prior(lms, pan)
        return Condition(lms, pan, out, variance, wavelets)

    def _check(self, cond: Condition) -> None:
        super()._check(cond)
        for name, extra in (("pre_out", 0), ("pre_variance", 0), ("wavelets", 3)):
            tensor = getattr(cond, name)
            expected = [cond.lms.shape[0], self.config.bands + extra, *cond.lms.shape[2:]]
            if tensor is None or list(tensor.shape) != expected:
                raise ValueError(f"{name}: expected {expected}, got {None if tensor is None else list(tensor.shape)}")

    def _prepare(self, cond: Condition, keep: bool) -> tuple[dict[int, Any], dict[int, Any]]:
        assert cond.pre_out is not None
        assert cond.pre_variance is not None
        assert cond.wavelets is not None
        vector = self.prior_cond_extractor(*(_laid_out(self, each) for each in (cond.pre_out, cond.pre_variance)))
        layers: list[Any] = list(self.downs)
        downs = {number: layers[number].prior_cond_inj.kernel(vector)[:, :, None, None] for number in self.down_blocks}
        ups: dict[int, Any] = {}
        height, width = cond.wavelets.shape[2:]
        shrink, wavelets = self.multiple, None
        for number, layer in enumerate(self.ups):
            if number not in self.up_blocks:
                shrink, wavelets = shrink // 2, None
            elif hasattr(layer, "fourier_CA"):
                if wavelets is None:
                    size = (height // shrink, width // shrink)
                    wavelets = F.interpolate(cond.wavelets, size=size, mode="bilinear", align_corners=False)
                    wavelets = _laid_out(self, wavelets)
                ups[number] = wavelets
                if keep and (blocks := _wavelet_blocks(layer)):
                    ups[number] = tuple(block.prepare(wavelets) for block in blocks)
        return downs, ups

    def _head(self, y: Tensor, features: tuple[Tensor, ...] | None) -> Prediction:
        out, raw = y.chunk(2, 1)
        return Prediction(out, F.softplus(raw), features)
