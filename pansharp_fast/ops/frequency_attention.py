"""Frequency-selective channel attention: two channel attentions, on amplitudes and on phases of the spectrum."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..reference import frequency_attention as reference
from . import _library
from ._backends import FLOATING, Operator, Sample, Support, cast, plainly, register, select


def frequency_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    num_heads: int,
    scale: float | None = None,
    normalize: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Channel attention in the Fourier domain, separately on amplitudes and phases (U-Know-DiffPAN's FTCA as released).

    With X = rfft2(x) (orthonormal) and per head of D = C / num_heads channels, sums running over the half spectrum:
    A = softmax_j(scale Σ_f |Q_i||K_j|), P = softmax_j(scale Σ_f ∠Q_i ∠K_j),
    out_i = irfft2(Σ_j A_ij |V_j| · exp(i Σ_j P_ij ∠V_j)).

    Phases lie in (-π, π]; ∠0 is 0 with gradient 0. At the at most four frequencies where the spectrum of a real map is
    real the phase is exactly 0 or π. float16 and bfloat16 are transformed and attended in float32.

    Args:
        q, k, v: [B, C, H, W], any H and W >= 1, any strides; float32, float64, bfloat16 or float16. Under autocast they
            may differ in dtype and are cast to that of autocast.
        num_heads: divides C; head h holds channels h·D to (h+1)·D - 1.
        scale: factor of the logits; None is D^-0.5.
        normalize: divide each pixel's C values by their L2 norm (at least 1e-12) before the transform.
        backend: see `pansharp_fast.ops.select`.

    Returns:
        [B, C, H, W], contiguous, dtype of q.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; H or W is 0; `num_heads` does not divide C.
        BackendError: the backend asked for cannot run the call.
    """
    if q.ndim != 4 or not q.is_floating_point():
        raise ValueError(f"q: expected a floating-point tensor [B, C, H, W], got {q.dtype} {list(q.shape)}")
    q, k, v = cast((q, k, v))
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape != q.shape or tensor.dtype != q.dtype or tensor.device != q.device:
            expected = f"{q.dtype} {list(q.shape)} on {q.device} as q"
            raise ValueError(f"{name}: expected {expected}, got {tensor.dtype} {list(tensor.shape)} on {tensor.device}")
    if q.shape[2] < 1 or q.shape[3] < 1:
        raise ValueError(f"q: expected height and width of at least 1, got {list(q.shape)}")
    if num_heads < 1 or q.shape[1] % num_heads or q.shape[1] == 0:
        raise ValueError(f"num_heads: expected a divisor of C = {q.shape[1]}, got {num_heads}")
    chosen = select(OPERATOR, (q, k, v), backend, num_heads=num_heads)
    scale = (q.shape[1] // num_heads) ** -0.5 if scale is None else float(scale)
    if chosen == "reference":
        with plainly(q):
            return reference(q, k, v, num_heads=num_heads, scale=scale, normalize=normalize)
    return _library.call("frequency_attention_fwd", chosen, q, k, v, num_heads, scale, normalize)[0]


# The halves are Python around torch's FFTs; what stands between those is compiled. A pass is found as
# `<passes>.frequency_attention_<pass>` in torch.ops.pansharp_fast or in the module of Triton kernels. Spectra are real
# views [B, C, H, W // 2 + 1, 2] that a pass may overwrite: each is used once.
_PASSES = (
    # [B, 1, H, W]: 1 / the norm over channels, in the type of the spectra.
    "inverse_norm(Tensor x) -> Tensor",
    # grad: of x * inverse_norm(x), becomes that of x.
    "normalize_bwd(Tensor x, Tensor inverse, Tensor(a!) grad) -> ()",
    # [B, num_heads, 2, D, D]: Gram matrices of amplitudes and of phases.
    "gram(Tensor q, Tensor k, int num_heads, int width) -> Tensor",
    # q and k become the spectra of their gradients.
    "gram_bwd(Tensor(a!) q, Tensor(b!) k, Tensor grad, int num_heads, int width) -> ()",
    # v becomes the spectrum of the result.
    "apply(Tensor(a!) v, Tensor attention, int num_heads, int width) -> ()",
    # v becomes the spectrum of its gradient; returns the attention's.
    "apply_bwd(Tensor(a!) v, Tensor grad, Tensor attention, int num_heads, int width) -> Tensor",
    # Compiled for the CPU alone. out [B, C, H, W] = re + im over the whole plane of frequencies; with it the inverse
    # transform is hartley(rfft2(hartley(spectrum))), half the time of torch's irfft2 there.
    "hartley(Tensor spectrum, Tensor(a!) out) -> ()",
    # For tests of their accuracy: [N, 2] -> amplitudes and phases [2, N], and phases [N] -> unit vectors [N, 2].
    "polar(Tensor values) -> Tensor",
    "unit(Tensor phases) -> Tensor",
)
for _schema in _PASSES:
    _library.define_pass(f"frequency_attention_{_schema}")

#: Bytes of one spectrum worked on at a time. Heads are independent: on the CPU a few of them pass through everything
#: while they stay in the cache; a GPU would rather have all of its work at once, as long as memory allows.
CHUNK_BYTES = {"cpu": 4 << 20, "gpu": 1 << 30}


def _dtype(x: Tensor) -> torch.dtype:
    """Of spectra: torch has no FFT of bfloat16."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _chunks(x: Tensor, num_heads: int) -> Iterator[tuple[slice, slice, slice]]:
    """Slices of the batch, of the heads and of the channels that are worked on together."""
    batch, channels, height, width = x.shape
    head_bytes = channels // num_heads * height * (width // 2 + 1) * 2 * _dtype(x).itemsize
    together = max(1, CHUNK_BYTES["cpu" if x.device.type == "cpu" else "gpu"] // head_bytes)
    images = min(batch, together)
    heads = min(num_heads, max(1, together // images))
    depth = channels // num_heads
    for image in range(0, batch, images):
        for head in range(0, num_heads, heads):
            last = min(head + heads, num_heads)
            yield slice(image, image + images), slice(head, last), slice(head * depth, last * depth)


class _Input:
    """q, k or v: spectra of its chunks, divided by its norm over channels if asked."""

    def __init__(self, passes: Any, x: Tensor, normalize: bool) -> None:
        # The passes take pixels that are one run of equal strides.
        in_order = not normalize or x.shape[2] == 1 or x.stride(2) == x.shape[3] * x.stride(3)
        # Not contiguous(): where H or W is 1 that returns x with the strides that it has.
        self.x = x if in_order else x.clone(memory_format=torch.contiguous_format)
        self.passes = passes
        self.inverse = passes.frequency_attention_inverse_norm(self.x) if normalize else None
        # The transform's own factor rides on this one: alone it is a pass of its own over the spectrum.
        self.factor = None if self.inverse is None else self.inverse * _orthonormal(x)

    def spectrum(self, images: slice, channels: slice) -> Tensor:
        chunk = self.x[images, channels]
        if self.factor is None:
            return _spectrum(chunk.to(_dtype(chunk)))
        return _spectrum(chunk * self.factor[images], norm="backward")

    def gradient(self, grad: Tensor) -> Tensor:
        """Gradient of x from that of its normalised form, which it overwrites."""
        if self.inverse is not None:
            self.passes.frequency_attention_normalize_bwd(self.x, self.inverse, grad)
        return grad.to(self.x.dtype)


def _orthonormal(x: Tensor) -> float:
    """The factor that makes `torch.fft.rfft2` of an image orthonormal."""
    return float((x.shape[-2] * x.shape[-1]) ** -0.5)


def _spectrum(x: Tensor, norm: str = "ortho") -> Tensor:
    return torch.view_as_real(torch.fft.rfft2(x, norm=norm).contiguous())


def _by_hartley(passes: Any, x: Tensor) -> bool:
    """Whether `_invert` goes the compiled way."""
    return passes is torch.ops.pansharp_fast and x.device.type == "cpu"


def _invert(passes: Any, spectrum: Tensor, out: Tensor, norm: str = "ortho") -> None:
    """irfft2 of a spectrum into `out` [B, C, H, W], a slice of a contiguous tensor.

    norm: "backward" where `_by_hartley` and the spectrum has the factor in it already.
    """
    if _by_hartley(passes, out):
        plane = out.new_empty(out.shape, dtype=spectrum.dtype)
        passes.frequency_attention_hartley(spectrum, plane)
        same = out.dtype == plane.dtype
        passes.frequency_attention_hartley(_spectrum(plane, norm), out if same else plane)
        if not same:
            out.copy_(plane)
    else:
        out.copy_(torch.fft.irfft2(torch.view_as_complex(spectrum), s=out.shape[-2:], norm="ortho"))


def _forward(
    passes: Any, q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float, normalize: bool
) -> tuple[Tensor, Tensor]:
    width = q.shape[3]
    out, attention = _forward_fake(q, k, v, num_heads, scale, normalize)
    if q.shape[0] == 0:
        return out, attention
    query, key, value = (_Input(passes, x, normalize) for x in (q, k, v))
    for images, heads, channels in _chunks(q, num_heads):
        count = heads.stop - heads.start
        gram = passes.frequency_attention_gram(
            query.spectrum(images, channels), key.spectrum(images, channels), count, width
        )
        part = torch.softmax(gram.mul_(scale), dim=-1).to(attention.dtype)
        attention[images, heads] = part
        spectrum, norm = value.spectrum(images, channels), "ortho"
        if _by_hartley(passes, q):
            # The inverse transform's factor rides on the amplitudes' attention.
            norm = "backward"
            part = torch.stack([part[:, :, 0] * _orthonormal(q), part[:, :, 1]], 2)
        passes.frequency_attention_apply(spectrum, part, count, width)
        _invert(passes, spectrum, out[images, channels], norm)
    return out, attention


def _gradients(
    passes: Any,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention: Tensor,
    num_heads: int,
    scale: float,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v. Everything but the attention is computed again."""
    if q.shape[0] == 0:
        return _backward_fake(grad, q, k, v, attention, num_heads, scale, normalize)
    width = q.shape[3]
    query, key, value = (_Input(passes, x, normalize) for x in (q, k, v))
    grad_q, grad_k, grad_v = (torch.empty(q.shape, dtype=_dtype(q), device=q.device) for _ in range(3))
    for images, heads, channels in _chunks(q, num_heads):
        count = heads.stop - heads.start
        part = attention[images, heads].contiguous()
        spectrum = value.spectrum(images, channels)
        grad_part = passes.frequency_attention_apply_bwd(
            spectrum, _spectrum(grad[images, channels].to(_dtype(q))), part, count, width
        )
        _invert(passes, spectrum, grad_v[images, channels])
        weighted = part * grad_part
        grad_gram = (scale * (weighted - part * weighted.sum(-1, keepdim=True))).to(_dtype(q))
        q_spectrum, k_spectrum = query.spectrum(images, channels), key.spectrum(images, channels)
        passes.frequency_attention_gram_bwd(q_spectrum, k_spectrum, grad_gram, count, width)
        _invert(passes, q_spectrum, grad_q[images, channels])
        _invert(passes, k_spectrum, grad_k[images, channels])
    return query.gradient(grad_q), key.gradient(grad_k), value.gradient(grad_v)


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float, normalize: bool
) -> tuple[Tensor, Tensor]:
    depth = q.shape[1] // num_heads
    return q.new_empty(q.shape), q.new_empty((q.shape[0], num_heads, 2, depth, depth), dtype=_dtype(q))


def _backward_fake(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, attention: Tensor, num_heads: int, scale: float, normalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], output[1])
    ctx.options = inputs[3:]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    gradients = _library.call("frequency_attention_bwd", ctx.backend, grad, *ctx.saved_tensors, *ctx.options)
    return (*gradients, None, None, None)


_OPTIONS = "int num_heads, float scale, bool normalize"
_library.define(
    "frequency_attention_fwd",
    f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)",
    fake=_forward_fake,
    triton_module="frequency_attention",
    setup_context=_setup_context,
    backward=_backward,
    implementation=_forward,
)
_library.define(
    "frequency_attention_bwd",
    f"(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor attention, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    triton_module="frequency_attention",
    implementation=_gradients,
)


def _selfcheck(backend: str, device: torch.device) -> None:
    """Forward and gradients on a tiny input against the reference; raises where they differ."""
    generator = torch.Generator().manual_seed(0)
    exact = [torch.randn(2, 6, 7, 10, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3)]
    leaves = [x.detach().to(device, torch.float32).requires_grad_() for x in exact]
    results = []
    for tensors, name in ((leaves, backend), (exact, "reference")):
        out = frequency_attention(*tensors, num_heads=2, scale=0.05, backend=name)
        results.append((out, *torch.autograd.grad(out.square().sum(), tensors)))
    for own, wanted in zip(*results, strict=True):
        torch.testing.assert_close(own.double().cpu(), wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())


def _head_fits(q: Tensor, *_: Tensor, num_heads: int | None = None) -> list[str]:
    """Reasons against the GPU kernels, which hold a head's channels in shared memory and registers."""
    most = 48 if q.dtype == torch.float64 else 64  # 99 KB a block, which every GPU from compute capability 8.0 on has
    if num_heads is None or q.shape[1] <= most * num_heads:
        return []
    return [f"channels of a head: expected at most {most}, got {q.shape[1] // num_heads}"]


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(0)
    # A small scale keeps the softmax away from saturation, where all gradients but v's vanish.
    for shape, heads, scale, normalize in (
        ((1, 4, 4, 5), 2, 0.1, True),
        ((2, 6, 3, 4), 3, 0.1, False),
        ((2, 8, 16, 16), 2, 0.02, True),
        ((1, 6, 17, 19), 2, 0.02, False),
        ((3, 9, 12, 1), 3, 0.1, True),
        ((1, 5, 1, 13), 1, 0.1, True),
        ((2, 8, 1, 1), 4, None, True),
        ((1, 40, 9, 14), 2, 0.01, True),
        ((1, 16, 24, 41), 4, 0.02, True),
    ):
        call = functools.partial(frequency_attention, num_heads=heads, scale=scale, normalize=normalize)
        yield Sample(
            f"{'x'.join(map(str, shape))} {heads} normalize={normalize}",
            lambda *tensors, backend, call=call: (call(*tensors, backend=backend),),
            tuple(torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3)),
            {"num_heads": heads},
        )


OPERATOR = register(
    Operator(
        "frequency_attention",
        {
            "cuda": Support(("cuda",), FLOATING, check=_head_fits),
            "triton": Support(("cuda", "xpu"), (torch.float32, torch.bfloat16, torch.float16), check=_head_fits),
            "cpu": Support(("cpu",), FLOATING),
            "reference": Support(("cpu", "cuda", "xpu", "mps"), FLOATING),
        },
        selfcheck=_selfcheck,
        samples=_samples,
    )
)
