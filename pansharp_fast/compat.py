"""Use of the public releases' networks: their state dicts in our models, our operators in their models."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .models.fsa import PRESETS as FSA_PRESETS
from .models.fsa import FSAConfig, FSAStudent, FSATeacher
from .models.pancrafter import PANCrafter, PANCrafterConfig
from .models.prior import PriorConfig, PriorNet
from .nn.cm3a import CM3A
from .nn.convolution import Conv3x3
from .nn.frequency_attention import FrequencyAttention
from .nn.plain import hooked, pads_with_zeros
from .options import ATTENTION_KEYS, expect, shortened

# -- weights -----------------------------------------------------------------------------------------------------------

#: Keys under which training scripts keep a network's tensors beside other things.
_STATE_KEYS = ("model_state_dict", "state_dict", "model")


def from_official(
    name: str,
    config: Mapping[str, Any],
    state_dict: Mapping[str, Any],
    *,
    prior: Mapping[str, Any] | None = None,
    **options: Any,
) -> nn.Module:
    """Our network with an official network's weights, in evaluation mode. `docs/official.md` shows whole examples.

    Args:
        name: "pancrafter", or of U-Know-DiffPAN "prior", "fsa_t" (teacher) or "fsa_s" (student).
        config: keyword arguments of the official constructor; missing ones have the values of the official training
            scripts.
        state_dict: what the official scripts save: official tensor names, with or without "module." in front, or a
            dictionary that holds them as "model_state_dict". Every tensor must be there and fit. Read a file with
            `torch.load(path, weights_only=True)` or `safetensors.torch.load_file(path)`.
        prior: for "fsa_t", the state dict of the prior network that it was trained with, likewise; then the teacher
            sharpens by itself.
        options: fields of our configuration. For "pancrafter": `attention_keys`, "released" (as published: the PAN keys
            are overwritten) unless told otherwise, or "aligned". For U-Know-DiffPAN `highpass_pan` and
            `released_sampling`, both True unless told otherwise.

    Returns:
        The model on the CPU, in the tensors' shapes and float32.

    Raises:
        ValueError: unknown name, argument, or a setting that the official network has and ours has not.
        RuntimeError: tensors missing, left over or of another shape (as `load_state_dict`).
    """
    if name not in _OFFICIAL:
        raise ValueError(f"name: expected one of {sorted(_OFFICIAL)}, got {name!r}")
    tensors = _tensors("state_dict", state_dict)
    if prior is not None:
        if name != "fsa_t":
            raise ValueError(f"prior: expected with name 'fsa_t' only, got it with {name!r}")
        highpass = options.get("highpass_pan", True)
        options["prior"] = PriorConfig(bands=_bands(dict(config)), highpass_pan=highpass)
        tensors |= {f"prior.{key}": value for key, value in _tensors("prior", prior).items()}
    model = _OFFICIAL[name](dict(config), options)
    model.load_state_dict(tensors)
    return model.eval()


def _tensors(name: str, state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors by the network's own names."""
    for key in _STATE_KEYS:
        if isinstance(state_dict.get(key), Mapping):
            return _tensors(name, state_dict[key])
    for key, value in state_dict.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{name}: expected tensors by name, or those as one of {', '.join(_STATE_KEYS)}, "
                f"got {type(value).__name__} as {key!r}"
            )
    for prefix in ("module.", "_orig_mod.", "module."):  # what nn.DataParallel and its kind, and torch.compile add
        if state_dict and all(key.startswith(prefix) for key in state_dict):
            state_dict = {key.removeprefix(prefix): value for key, value in state_dict.items()}
    return dict(state_dict)


def _only(config: dict[str, Any], **settings: Any) -> None:
    """Take these arguments out of `config`; each may have one value alone."""
    for key, only in settings.items():
        if (value := config.pop(key, only)) != only:
            raise ValueError(f"config: expected {key}={only}, got {value!r}")


def _known(config: dict[str, Any], names: set[str]) -> None:
    unknown = sorted(set(config) - names)
    if unknown:
        raise ValueError(f"config: expected arguments of the official constructor, got {unknown}")


def _pancrafter(config: dict[str, Any], options: dict[str, Any]) -> nn.Module:
    _only(config, in_channels=1, use_scale_shift_norm=True)
    names = {"out_channels": "bands", "hidden_size": "hidden_sizes"}
    same = ("s_embed_size", "dropout", "depth", "num_heads", "mlp_ratio", "pan_ks", "ms_ks", "ka")
    _known(config, {*names, *same})
    return PANCrafter(PANCrafterConfig(**{names.get(key, key): value for key, value in config.items()}, **options))


def _prior(config: dict[str, Any], options: dict[str, Any]) -> nn.Module:
    _only(config, channel=64)
    bands = config.pop("spectral_num", 8)
    _known(config, {"criterion", "reg"})  # kept by the release and never used
    return PriorNet(PriorConfig(**{"bands": bands, "highpass_pan": True, **options}))


def _bands(config: dict[str, Any]) -> int:
    return config.get("in_channel", config.get("lms_channel", 8))


def _fsa(model: type[FSATeacher | FSAStudent]) -> Callable[[dict[str, Any], dict[str, Any]], nn.Module]:
    def build(config: dict[str, Any], options: dict[str, Any]) -> nn.Module:
        bands = _bands(config)
        _only(config, in_channel=bands, out_channel=bands, lms_channel=bands, pan_channel=1)
        _only(config, with_noise_level_emb=True, fourier_features=False, pred_var=False)
        for key in ("fourier_min", "fourier_max", "fourier_step"):  # of the Fourier features alone
            config.pop(key, None)
        ours = {"bands", "prior", "prediction", "highpass_pan", "released_sampling"}
        _known(config, {field.name for field in dataclasses.fields(FSAConfig)} - ours)
        released = {**FSA_PRESETS["released"], "res_blocks": 3 if model is FSATeacher else 2}
        return model(FSAConfig(**{**released, "bands": bands, **config, **options}))

    return build


_OFFICIAL: dict[str, Callable[[dict[str, Any], dict[str, Any]], nn.Module]] = {
    "pancrafter": _pancrafter,
    "prior": _prior,
    "fsa_t": _fsa(FSATeacher),
    "fsa_s": _fsa(FSAStudent),
}

# -- modules -----------------------------------------------------------------------------------------------------------

_CM3A_ATTRIBUTES = (
    "num_heads", "head_dim", "ka", "ms_channel", "q", "k_pan", "v_pan", "kv_ms", "dep_conv", "proj_pan", "proj_ms",
)  # fmt: skip
_FREQUENCY_ATTRIBUTES = ("prenorm_x", "qkv", "attn_out", "ffn")
_HEADS_ATTRIBUTES = ("nheads", "num_heads", "n_heads", "heads")


def accelerate(model: nn.Module, *, attention_keys: str = "released") -> nn.Module:
    """Make a network built from the official code compute with fused operators, in place.

    PAN-Crafter's cross-modal attention and the frequency attention of U-Know-DiffPAN's teacher are replaced; 3x3
    convolutions with a border of zeros become `nn.Conv3x3`, which is faster at inference on the CPU. Attention is
    recognised by its attributes, not by its class, and PAN-Crafter's is compared on a small image. Tensors, children in
    their order and hooks are those of the modules that are replaced: state dicts, optimizers (their states' order too)
    and outputs stay the same, and no random number is drawn. A second call changes nothing.

    Args:
        model: any module that holds such modules, or is an attention module (then the replacement is returned).
        attention_keys: of PAN-Crafter: "released" for the release as published, "aligned" for code in which each branch
            uses its own keys.

    Returns:
        model.

    Raises:
        ValueError: the model holds nothing that could be replaced, or attention with an option that the fused form has
            not (normalised queries or keys, dropout of attention), or that computes something else.
    """
    twin = _twin(model, attention_keys)
    if twin is not None:
        return accelerate(twin)
    twins = {module: twin for module in model.modules() if (twin := _twin(module, attention_keys)) is not None}
    for parent in list(model.modules()):
        parent._modules.update({name: twins[child] for name, child in parent._modules.items() if child in twins})
    for module in model.modules():
        if type(module) is nn.Conv2d and pads_with_zeros(module, 3):
            module.__class__ = Conv3x3
    if not any(isinstance(module, CM3A | FrequencyAttention | Conv3x3) for module in model.modules()):
        raise ValueError(
            f"model: expected 3x3 convolutions or modules with the attributes {', '.join(_CM3A_ATTRIBUTES)} or "
            f"{', '.join(_FREQUENCY_ATTRIBUTES)}, got none in {type(model).__name__}"
        )
    return model


def _twin(module: nn.Module, attention_keys: str) -> nn.Module | None:
    """The fused twin of an official attention module, None of any other module."""
    if isinstance(module, CM3A | FrequencyAttention):
        return None
    if all(hasattr(module, name) for name in _CM3A_ATTRIBUTES):
        return _fused_cm3a(module, attention_keys)
    if (
        all(hasattr(module, name) for name in _FREQUENCY_ATTRIBUTES)
        and isinstance(module.prenorm_x, nn.GroupNorm)
        and any(isinstance(getattr(module, name, None), int) for name in _HEADS_ATTRIBUTES)
    ):
        return _fused_frequency_attention(module)
    return None


def _adopt(kind: type[nn.Module], module: nn.Module, **attributes: Any) -> Any:
    """A module of class `kind` with everything that PyTorch keeps of `module`: tensors, children, hooks, mode."""
    twin = kind.__new__(kind)
    twin.__dict__.update({name: vars(module)[name] for name in vars(nn.Module()) if name in vars(module)})
    twin.__dict__["_modules"] = dict(module._modules)
    for name, value in attributes.items():
        setattr(twin, name, value)
    return twin


def _expect_defaults(module: nn.Module, known: tuple[str, ...], scale: float) -> None:
    """Raise ValueError where an option of the official constructor makes the module compute something more."""
    for name, child in module.named_children():
        if name in known or isinstance(child, nn.Identity) or (isinstance(child, nn.Dropout) and child.p == 0):
            continue
        raise ValueError(
            f"{name}: expected none or one that does nothing (no fused form has it), got {' '.join(str(child).split())}"
        )
    for name, value in vars(module).items():
        switched = name.startswith("qk_norm") or "drop" in name
        if switched and isinstance(value, int | float) and value and name != "drop_path_prob":
            raise ValueError(f"{name}: expected 0 (no fused form has it), got {value}")
    if not math.isclose(given := float(getattr(module, "scale", scale)), scale, rel_tol=1e-6):
        raise ValueError(f"scale: expected {scale:g}, as the public release has, got {given:g}")


def _expect_shapes(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in shapes.items():
        layer: Any = module.get_submodule(name)
        given = tuple(layer.weight.shape)
        if given != shape:
            raise ValueError(
                f"{name}: expected the tensors of the public release's attention module, {list(shape)}, "
                f"got {list(given)}"
            )


def _fused_cm3a(module: Any, attention_keys: str) -> CM3A:
    expect("attention_keys", attention_keys, ATTENTION_KEYS)
    heads, size, window = module.num_heads, module.head_dim, module.ka
    dim, ms = heads * size, module.ms_channel
    pan = module.k_pan.in_channels - dim
    side, side_ms = module.q.kernel_size, module.kv_ms.kernel_size
    _expect_defaults(module, _CM3A_ATTRIBUTES, size**-0.5)
    _expect_shapes(
        module,
        {
            "q": (dim, dim + ms, *side),
            "k_pan": (dim, dim + pan, *side),
            "v_pan": (dim, dim + 3 * pan, *side),
            "kv_ms": (2 * dim, dim + ms, *side_ms),
            "dep_conv": (size * window**2, 1, window, window),
            "proj_pan": (dim, dim, 1, 1),
            "proj_ms": (dim, dim, 1, 1),
        },
    )
    twin = _adopt(
        CM3A, module, num_heads=heads, head_dim=size, ka=window, ms_channel=ms, pan_detail=True,
        attention_keys=attention_keys,
    )  # fmt: skip
    _compare(module, twin, (dim, ms, pan, pan))
    return twin


@torch.no_grad()
def _compare(module: nn.Module, twin: nn.Module, channels: tuple[int, ...]) -> None:
    """Raise ValueError unless both compute the same of a small image. Not done where it would be seen (hooks)."""
    like = next(module.parameters())
    if like.is_meta or any(map(hooked, module.modules())):
        return
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, count, 5, 4, generator=generator).to(like.device, like.dtype) for count in channels]
    inputs.append(torch.tensor([0, 1]).to(like.device, like.dtype))
    modes = [(each, each.training) for each in {*module.modules(), *twin.modules()}]
    module.eval()
    twin.eval()
    try:
        expected, results = module(*inputs), twin(*inputs)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"model: expected {type(module).__name__} to take (x, ms, lpan, pan, s) as the public release's attention, "
            f"got {shortened(error)}"
        ) from error
    finally:
        for each, mode in modes:
            each.training = mode
    tolerance = {torch.float32: 1e-3, torch.float64: 1e-6}.get(like.dtype, 0.1)
    for theirs, ours in zip(expected, results, strict=True):
        difference = float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30))
        if difference > tolerance:
            raise ValueError(
                f"model: expected {type(module).__name__} to compute the public release's attention (attention_keys "
                f"released, or aligned), got results that differ by {difference:.1%} of the largest value"
            )


def _fused_frequency_attention(module: Any) -> FrequencyAttention:
    heads = next(getattr(module, name) for name in _HEADS_ATTRIBUTES if isinstance(getattr(module, name, None), int))
    fea, qkv, out = module.prenorm_x.num_channels, module.qkv[-1].out_channels // 3, module.attn_out.out_channels
    drops = [name for name, child in module.named_children() if hasattr(child, "drop_prob")]
    _expect_defaults(module, (*_FREQUENCY_ATTRIBUTES, "attn_res", *drops), (qkv // heads) ** -0.5)
    _expect_shapes(
        module,
        {
            "qkv.0": (fea, 1, 3, 3),
            "qkv.1": (3 * qkv, fea, 1, 1),
            "attn_out": (out, qkv, 1, 1),
            "ffn.0": (2 * out, out, 3, 3),
            "ffn.2": (out, 2 * out, 3, 3),
            "ffn.3": (out, out, 1, 1),
        },
    )
    # The official way of dropping a branch stays, and with it the random numbers that it draws.
    probability = 0.0 if drops else float(getattr(module, "drop_path_prob", 0.0))
    twin = _adopt(FrequencyAttention, module, nheads=heads, drop_path_prob=probability, drops=tuple(drops))
    if not hasattr(twin, "attn_res"):
        twin.attn_res = nn.Identity()
    return twin
