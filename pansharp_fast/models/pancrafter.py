"""PAN-Crafter (ICCV 2025, arXiv 2505.23367): a U-Net whose attention blocks let one query attend to PAN and to MS.

Tensor names are those of the public release, so that its state dicts load as they are.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.grid import RATIO, check_pair
from ..nn.cm3a import CM3A
from ..nn.convolution import Conv3x3, LayerNorm, gpu_inference, joined_conv, mlp, norm_silu_conv, two_convolutions
from ..nn.plain import hooked, is_plain, is_plain_conv, layers_of
from ..nn.recompute import recomputed
from ..ops import gated_sum, join
from ..options import ATTENTION_KEYS, NEIGHBOURS, check_fields, expect

#: Values of `mode`: which image the network reconstructs.
PAN_MODE, MS_MODE = 0, 1


@dataclasses.dataclass(frozen=True)
class PANCrafterConfig:
    """Everything that decides the network's shape; stored in checkpoints.

    bands: MS bands.
    hidden_sizes: width of each scale, finest first; each scale halves the size. The last one is the bottom.
    depth: residual blocks of each scale (in the encoder and again in the decoder).
    attention_scales: indices of the scales with attention blocks (one in the encoder, one in the decoder; bottom: one).
    stem_stride: 1, or 2 for a network that works at half of PAN's size throughout (pixel unshuffle before the stem,
        pixel shuffle after the head).
    num_heads, mlp_ratio, pan_ks, ms_ks, ka: of the attention blocks, see `nn.CM3A`.
    bottom_ks: kernel size of the bottom's projections.
    s_embed_size: length of the mode embedding (modulation "embedding").
    dropout: in the residual blocks, while training.
    norm: of the residual blocks, "group" (norm_groups groups; statistics over the whole image) or "layer" (over the
        channels of each pixel, so that a tile gives what the whole scene gives).
    modulation: per-channel scale, shift and gates from the mode, "embedding" (SiLU and a linear layer on a learned
        token) or "vectors" (learned for each mode).
    attention_keys, neighbours, pan_detail: see `nn.CM3A`; pan_detail also decides whether the stem sees LPAN and
        PAN - LPAN.
    """

    bands: int = 8
    hidden_sizes: tuple[int, ...] = (128, 128, 128, 128)
    depth: tuple[int, ...] = (2, 2, 2, 2)
    attention_scales: tuple[int, ...] = (1, 2, 3)
    stem_stride: int = 1
    num_heads: int = 8
    mlp_ratio: float = 4.0
    pan_ks: int = 3
    ms_ks: int = 3
    bottom_ks: int = 1
    ka: int = 3
    s_embed_size: int = 128
    dropout: float = 0.2
    norm: str = "group"
    norm_groups: int = 32
    modulation: str = "embedding"
    attention_keys: str = "released"
    neighbours: str = "learned"
    pan_detail: bool = True

    def __post_init__(self) -> None:
        for name in ("hidden_sizes", "depth", "attention_scales"):  # JSON and YAML give lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        sizes = dict.fromkeys(("hidden_sizes", "s_embed_size", "num_heads", "norm_groups"), (1, 16384))
        kernels = dict.fromkeys(("pan_ks", "ms_ks", "bottom_ks", "ka"), (1, 31))
        ranges = sizes | kernels | {"bands": (1, 1024), "depth": (1, 64), "attention_scales": (0, 7)}
        check_fields(self, mlp_ratio=(0.01, 64), dropout=(0, 1), **ranges)
        if len(self.hidden_sizes) < 2 or len(self.depth) != len(self.hidden_sizes):
            raise ValueError(
                f"depth: expected one entry for each of at least two hidden_sizes {self.hidden_sizes}, got {self.depth}"
            )
        if not set(self.attention_scales) <= set(range(len(self.hidden_sizes))):
            raise ValueError(
                f"attention_scales: expected indices below {len(self.hidden_sizes)}, got {self.attention_scales}"
            )
        if self.stem_stride not in (1, 2):
            raise ValueError(f"stem_stride: expected 1 or 2, got {self.stem_stride}")
        for name, allowed in (
            ("norm", ("group", "layer")),
            ("modulation", ("embedding", "vectors")),
            ("attention_keys", ATTENTION_KEYS),
            ("neighbours", NEIGHBOURS),
        ):
            expect(name, getattr(self, name), allowed)

    @property
    def multiple(self) -> int:
        """PAN sizes that the network itself takes are multiples of this; `PANCrafter.sharpen` pads to it."""
        return max(RATIO, self.stem_stride * 2 ** (len(self.hidden_sizes) - 1))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON or YAML; `PANCrafterConfig(**values)` restores it."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}


#: name -> configuration (8 bands unless asked otherwise).
PRESETS: dict[str, dict[str, Any]] = {
    # The public release, its overwritten attention keys included.
    "released": {},
    # The paper's equations. Stated there: three scales of 128 channels, attention at 1/2 and 1/4 of PAN's size, layer
    # norm, learned vectors for each mode, 3x3 neighbours, 7.17 M parameters. Not stated: heads, depth, MLP width, what
    # the stem sees; the depth here is one of those that give that count with the release's heads and MLP (7.16 M).
    "paper": {
        "hidden_sizes": (128, 128, 128),
        "depth": (2, 2, 4),
        "attention_scales": (1, 2),
        "bottom_ks": 3,
        "norm": "layer",
        "modulation": "vectors",
        "attention_keys": "aligned",
        "neighbours": "shift",
        "pan_detail": False,
    },
    # Ours: the paper's network without its full-size scale, narrow; for CPUs and shipped weights.
    "tiny": {
        "bands": 4,
        "hidden_sizes": (32, 64),
        "depth": (1, 3),
        "attention_scales": (0, 1),
        "stem_stride": 2,
        "num_heads": 4,
        "mlp_ratio": 2.0,
        "pan_ks": 1,
        "ms_ks": 1,
        "dropout": 0.0,
        "norm": "layer",
        "modulation": "vectors",
        "attention_keys": "aligned",
        "neighbours": "shift",
    },
}


def preset(name: str, **changes: Any) -> PANCrafterConfig:
    """Configuration `name` of `PRESETS`, with fields replaced by `changes` (for example `bands=4`).

    Raises:
        ValueError: no preset of that name, or a field has a value out of its range.
    """
    if name not in PRESETS:
        raise ValueError(f"preset: expected one of {sorted(PRESETS)}, got {name!r}")
    return PANCrafterConfig(**{**PRESETS[name], **changes})


def _norm(config: PANCrafterConfig, channels: int) -> nn.Module:
    return LayerNorm(channels) if config.norm == "layer" else nn.GroupNorm(config.norm_groups, channels)


def _modulation(config: PANCrafterConfig, channels: int, start: float) -> nn.Module:
    """Two values a channel from the mode: an embedding [B, E] or, for "vectors", the mode's index [B]."""
    if config.modulation == "embedding":
        return nn.Sequential(nn.SiLU(), nn.Linear(config.s_embed_size, 2 * channels))
    vectors = nn.Embedding(2, 2 * channels)
    nn.init.constant_(vectors.weight, start)
    return vectors


def _of_mode(modulation: nn.Module, c: Tensor | dict[nn.Module, Tensor]) -> Tensor:
    """What a `_modulation` makes of the mode, unless `_modulations` has it already."""
    return c[modulation] if isinstance(c, dict) else modulation(c)


def _modulations(network: nn.Module, c: Tensor) -> dict[nn.Module, Tensor] | None:
    """What the plain `_modulation`s by an embedding [B, E] make of it, in few launches; None where one is not plain."""
    found = [block.emb_layers if isinstance(block, ResBlock) else block.adaLN_modulation for block in _blocks(network)]
    pairs: list[Any] = [layers_of(each) for each in found]
    if not all(len(p) == 2 and is_plain(p[0], nn.SiLU) and is_plain(p[1], nn.Linear) for p in pairs):
        return None
    weight, bias = (torch.cat([getattr(linear, name) for _, linear in pairs]) for name in ("weight", "bias"))
    values = F.linear(F.silu(c), weight, bias).split([linear.out_features for _, linear in pairs], 1)
    return dict(zip(found, values, strict=True))


def _blocks(network: nn.Module) -> list[Any]:
    return [module for module in network.modules() if isinstance(module, (ResBlock, AttnBlock))]


class ResBlock(nn.Module):
    """Two 3x3 convolutions, the second one modulated by the mode (eq. 5 and 6). [B, C_in, H, W] -> [B, C_out, H, W]."""

    def __init__(self, config: PANCrafterConfig, inputs: int, outputs: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(_norm(config, inputs), nn.SiLU(), Conv3x3(inputs, outputs))
        self.emb_layers = _modulation(config, outputs, start=0.0)
        last = Conv3x3(outputs, outputs)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]
        self.out_layers = nn.Sequential(_norm(config, outputs), nn.SiLU(), nn.Dropout(config.dropout), last)
        self.skip_connection = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, c: Tensor | dict[nn.Module, Tensor]) -> Tensor:
        scale, shift = _of_mode(self.emb_layers, c).chunk(2, 1)
        layers = self.in_layers, self.out_layers, self.skip_connection
        return two_convolutions(*layers, x, modulation=(scale, shift))


class Mlp(nn.Module):
    """Per-pixel fc1, GELU (tanh form), fc2 on [B, C, H, W]."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        return mlp(self.fc1, self.fc2, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class AttnBlock(nn.Module):
    """CM3A and an MLP, both on layer-normed features; the mode gates the two branches (eq. 7 and 8)."""

    def __init__(self, config: PANCrafterConfig, channels: int, bottom: bool) -> None:
        super().__init__()
        self.norm = LayerNorm(channels, affine=False)
        self.attn = CM3A(
            channels,
            config.num_heads,
            ms_channel=config.bands,
            pan_ks=config.bottom_ks if bottom else config.pan_ks,
            ms_ks=config.bottom_ks if bottom else config.ms_ks,
            ka=config.ka,
            attention_keys=config.attention_keys,
            neighbours=config.neighbours,
            pan_detail=config.pan_detail,
        )
        self.mlp = Mlp(channels, int(config.mlp_ratio * channels))
        self.adaLN_modulation = _modulation(config, channels, start=1.0)

    def forward(
        self, x: Tensor, condition: tuple[Tensor, Tensor, Tensor], c: Tensor | dict[nn.Module, Tensor], s: Tensor
    ) -> Tensor:
        ms, lpan, pan = condition
        gate_ms, gate_pan = _of_mode(self.adaLN_modulation, c).chunk(2, 1)
        projections = self.attn.proj_ms, self.attn.proj_pan
        plain = is_plain(self.attn, CM3A) and all(is_plain_conv(each, 1, bias=True) for each in projections)
        if plain and gpu_inference(x):
            out_pan, out_ms = self.attn.attend(self.norm(x), ms, lpan, pan, s)
            terms = [F.conv2d(out, each.weight) for out, each in zip((out_ms, out_pan), projections, strict=True)]
            bias_a, bias_b = (each.bias for each in projections)
            x = gated_sum(x, *terms, bias_a=bias_a, bias_b=bias_b, gate_a=gate_ms, gate_b=gate_pan)
        else:
            x = recomputed(self._attend, x, condition, gate_ms, gate_pan, s)
        return x + recomputed(self._feed_forward, x)

    def _attend(
        self, x: Tensor, condition: tuple[Tensor, Tensor, Tensor], gate_ms: Tensor, gate_pan: Tensor, s: Tensor
    ) -> Tensor:
        x_pan, x_ms = self.attn(self.norm(x), *condition, s)
        x = torch.addcmul(x, gate_ms[:, :, None, None], x_ms)
        return torch.addcmul(x, gate_pan[:, :, None, None], x_pan)

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm(x))


class Down(nn.Module):
    """Halves the size with a 3x3 convolution of stride 2."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Up(nn.Module):
    """Doubles the size with a transposed 2x2 convolution."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(inputs, outputs, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def _beside(up: nn.Module, x: Tensor, skip: Tensor) -> Tensor:
    """The channels of up(x), then those of skip."""
    if isinstance(up, Up) and is_plain(up, Up) and is_plain(up.conv, nn.ConvTranspose2d) and gpu_inference(x):
        y = F.conv_transpose2d(x, up.conv.weight, stride=2)
        return join(y, skip, bias=up.conv.bias)
    return torch.cat([up(x), skip], 1)


def resize(x: Tensor, factor: float) -> Tensor:
    """Bicubic resize by `factor` without antialiasing, pixel areas aligned (`torch.nn.functional.interpolate`)."""
    return x if factor == 1 else F.interpolate(x, scale_factor=factor, mode="bicubic")


class PANCrafter(nn.Module):
    """The network. `forward` gives its raw output, a residual; `sharpen` takes and gives images."""

    architecture: ClassVar[str] = "pancrafter"
    config_class: ClassVar[type] = PANCrafterConfig

    def __init__(self, config: PANCrafterConfig) -> None:
        super().__init__()
        self.config = config
        widths, depth, bottom = config.hidden_sizes, config.depth, len(config.hidden_sizes) - 1
        if config.modulation == "embedding":
            self.s_token = nn.Parameter(torch.randn(2, config.s_embed_size))
        shuffled = config.stem_stride**2
        self.input = Conv3x3((config.bands + (3 if config.pan_detail else 1)) * shuffled, widths[0])

        def blocks(scale: int, inputs: int) -> nn.ModuleList:
            sizes = [inputs] + [widths[scale]] * depth[scale]
            return nn.ModuleList(ResBlock(config, a, b) for a, b in itertools.pairwise(sizes))

        def attention(name: str, scale: int) -> None:
            if scale in config.attention_scales:
                self.add_module(name, AttnBlock(config, widths[scale], scale == bottom))

        for scale in range(bottom):
            number = scale + 1
            self.add_module(f"encoder{number}", blocks(scale, widths[scale]))
            attention(f"cond{number}_e", scale)
            self.add_module(f"down{number}", Down(widths[scale], widths[scale + 1]))
            self.add_module(f"up{number}", Up(widths[scale + 1], widths[scale]))
            self.add_module(f"decoder{number}", blocks(scale, 2 * widths[scale]))
            attention(f"cond{number}_d", scale)
        self.middle = blocks(bottom, widths[bottom])
        attention(f"cond{bottom + 1}", bottom)
        head = Conv3x3(widths[0], config.bands * shuffled)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)  # type: ignore[arg-type]
        self.output = nn.Sequential(_norm(config, widths[0]), nn.SiLU(), head)
        # Convolutions hand the layout of their weights on to the features; this one is the faster on CPUs and GPUs.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, pan: Tensor, lpan: Tensor, ms: Tensor, mode: Tensor) -> Tensor:
        """The network's own output, without the up-sampled image that `sharpen` adds.

        Args:
            pan: [B, 1, 4h, 4w], sizes multiples of `config.multiple`. lpan: [B, 1, h, w]. ms: [B, bands, h, w].
                Values in [-1, 1]: 2·DN / peak - 1.
            mode: [B], 0: reconstruct PAN (repeated over the bands), 1: reconstruct MS.

        Returns:
            [B, bands, 4h, 4w], to be added to bicubic ×4 of ms (mode 1) or of lpan (mode 0).

        Raises:
            ValueError: shapes that do not fit together.
        """
        config, bottom = self.config, len(self.config.hidden_sizes) - 1
        self._check(pan, lpan, ms)
        s = mode.to(pan.dtype)
        c = self.s_token[mode.long()] if config.modulation == "embedding" else mode.long()
        low = torch.cat([ms, lpan], 1)

        def resized(factor: float) -> tuple[Tensor, Tensor]:
            """ms and lpan, in one call."""
            both = resize(low, factor)
            return both[:, : config.bands], both[:, config.bands :]

        up_ms, up_lpan = resized(RATIO)
        if config.pan_detail:
            x = torch.cat([pan, up_ms, up_lpan, pan - up_lpan], 1)
        else:
            x = torch.cat([pan, up_ms], 1)
        if config.stem_stride > 1:
            x = F.pixel_unshuffle(x, config.stem_stride)
        dtype = next(self.parameters()).dtype  # images may hold more than the network computes in
        x = joined_conv(self.input, x.to(dtype))

        conditions = {}
        for scale in config.attention_scales:
            factor = config.stem_stride * 2**scale  # PAN pixels per feature, in each direction
            conditions[scale] = (*resized(RATIO / factor), resize(pan, 1 / factor))

        def run(part: str, attention: str, x: Tensor, scale: int) -> Tensor:
            for block in self.get_submodule(part).children():
                x = block(x, modulations)
            return self.get_submodule(attention)(x, conditions[scale], modulations, s) if scale in conditions else x

        modulations: Tensor | dict[nn.Module, Tensor] = c
        if config.modulation == "embedding" and gpu_inference(x) and not any(map(hooked, self.modules())):
            modulations = _modulations(self, c) or c

        skips = []
        for scale in range(bottom):
            x = run(f"encoder{scale + 1}", f"cond{scale + 1}_e", x, scale)
            skips.append(x)
            x = self.get_submodule(f"down{scale + 1}")(x)
        x = run("middle", f"cond{bottom + 1}", x, bottom)
        for scale in reversed(range(bottom)):
            x = _beside(self.get_submodule(f"up{scale + 1}"), x, skips[scale])
            x = run(f"decoder{scale + 1}", f"cond{scale + 1}_d", x, scale)
        x = norm_silu_conv(self.output, x)
        return F.pixel_shuffle(x, config.stem_stride) if config.stem_stride > 1 else x

    def _check(self, pan: Tensor, lpan: Tensor, ms: Tensor) -> None:
        check_pair(pan, ms, self.config.bands)
        b, _, h, w = ms.shape
        if lpan.shape != (b, 1, h, w):
            raise ValueError(f"lpan: expected shape {[b, 1, h, w]}, got {list(lpan.shape)}")
        step = self.config.multiple
        if pan.shape[2] % step or pan.shape[3] % step:
            raise ValueError(
                f"pan: expected sizes that are multiples of {step} (sharpen pads), got {pan.shape[2]}x{pan.shape[3]}"
            )

    @torch.no_grad()
    def sharpen(self, pan: Tensor, ms: Tensor, peak: float, *, forward: Callable[..., Tensor] | None = None) -> Tensor:
        """Sharpen images in digital numbers.

        Args:
            pan: [B, 1, 4h, 4w], any h and w. ms: [B, bands, h, w]. Any real dtype; on the model's device.
            peak: the digital number that maps to 1, such as 2047 for 11 bits.
            forward: called instead of the network itself, such as a recording of it.

        Returns:
            [B, bands, 4h, 4w] float32 digital numbers, unrounded and unclipped. Sizes that the network does not take
            are padded by repeating the border.

        Raises:
            ValueError: shapes that do not fit together, another ratio than 4, or a peak that is not positive.
        """
        from ..data import lpan as low_pan

        check_pair(pan, ms, self.config.bands)
        if not peak > 0:
            raise ValueError(f"peak: expected a positive number, got {peak}")
        pan, ms = pan.float() * (2 / peak) - 1, ms.float() * (2 / peak) - 1
        h, w = pan.shape[2:]
        step = self.config.multiple
        to_h, to_w = -(-h // step) * step, -(-w // step) * step
        padded_pan = F.pad(pan, (0, to_w - w, 0, to_h - h), mode="replicate")
        padded_ms = F.pad(ms, (0, (to_w - w) // RATIO, 0, (to_h - h) // RATIO), mode="replicate")
        dtype = torch.promote_types(next(self.parameters()).dtype, torch.float32)  # differences are finer than halves
        mode = torch.full((len(pan),), MS_MODE, device=pan.device)
        inputs = padded_pan.to(dtype), low_pan(padded_pan).to(dtype), padded_ms.to(dtype), mode
        residual = (forward or self)(*inputs)
        out = resize(padded_ms, RATIO) + residual.float()
        return (out[:, :, :h, :w] + 1) * (peak / 2)
