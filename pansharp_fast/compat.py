"""Use of the public releases' networks: their state dicts in our models, our operators in their models."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from .models.fsa import PRESETS as FSA_PRESETS
from .models.fsa import FSAConfig, FSAStudent, FSATeacher
from .models.pancrafter import PANCrafter, PANCrafterConfig
from .models.prior import PriorConfig, PriorNet
from .nn.cm3a import CM3A
from .nn.frequency_attention import FrequencyAttention


def from_official(name: str, config: Mapping[str, Any], state_dict: Mapping[str, Tensor], **options: Any) -> nn.Module:
    """Our network with an official network's weights, in evaluation mode.

    Args:
        name: "pancrafter", or of U-Know-DiffPAN "prior", "fsa_t" (teacher) or "fsa_s" (student).
        config: keyword arguments of the official constructor; missing ones have the release's values.
        state_dict: official tensor names; every tensor must be there and fit. Read a file with
            `torch.load(path, weights_only=True)`.
        options: fields of our configuration. For "pancrafter": `attention_keys`, "released" (as published: the PAN keys
            are overwritten, square maps only) unless told otherwise, or "aligned". For U-Know-DiffPAN `highpass_pan`
            and `released_sampling`, both True unless told otherwise.

    Returns:
        The model on the CPU, in the tensors' shapes and float32.

    Raises:
        ValueError: unknown name, argument, or a setting that the official network has and ours has not.
        RuntimeError: tensors missing, left over or of another shape (as `load_state_dict`).
    """
    if name not in _OFFICIAL:
        raise ValueError(f"name: expected one of {sorted(_OFFICIAL)}, got {name!r}")
    model = _OFFICIAL[name](dict(config), options)
    model.load_state_dict(dict(state_dict))
    return model.eval()


def _pancrafter(config: dict[str, Any], options: dict[str, Any]) -> nn.Module:
    for key, only in (("in_channels", 1), ("use_scale_shift_norm", True)):
        if config.pop(key, only) != only:
            raise ValueError(f"config: expected {key}={only}, got another value")
    names = {"out_channels": "bands", "hidden_size": "hidden_sizes"}
    same = ("s_embed_size", "dropout", "depth", "num_heads", "mlp_ratio", "pan_ks", "ms_ks", "ka")
    unknown = sorted(set(config) - {*names, *same})
    if unknown:
        raise ValueError(f"config: expected arguments of the official constructor, got {unknown}")
    return PANCrafter(PANCrafterConfig(**{names.get(key, key): value for key, value in config.items()}, **options))


def _prior(config: dict[str, Any], options: dict[str, Any]) -> nn.Module:
    bands = config.pop("spectral_num", 8)
    if config:
        raise ValueError(f"config: expected spectral_num, got {sorted(config)}")
    return PriorNet(PriorConfig(**{"bands": bands, "highpass_pan": True, **options}))


def _fsa(model: type[FSATeacher | FSAStudent]) -> Callable[[dict[str, Any], dict[str, Any]], nn.Module]:
    def build(config: dict[str, Any], options: dict[str, Any]) -> nn.Module:
        bands = config.pop("in_channel", config.get("lms_channel", 8))
        for key, only in (("out_channel", bands), ("lms_channel", bands), ("pan_channel", 1)):
            if config.pop(key, only) != only:
                raise ValueError(f"config: expected {key}={only}, got another value")
        ours = {"bands", "prior", "prediction", "highpass_pan", "released_sampling"}
        same = {field.name for field in dataclasses.fields(FSAConfig)} - ours
        unknown = sorted(set(config) - same)
        if unknown:
            raise ValueError(f"config: expected arguments of the official constructor, got {unknown}")
        released = {**FSA_PRESETS["released"], "res_blocks": 3 if model is FSATeacher else 2}
        return model(FSAConfig(**{**released, "bands": bands, **config, **options}))

    return build


_OFFICIAL: dict[str, Callable[[dict[str, Any], dict[str, Any]], nn.Module]] = {
    "pancrafter": _pancrafter,
    "prior": _prior,
    "fsa_t": _fsa(FSATeacher),
    "fsa_s": _fsa(FSAStudent),
}

_CM3A_ATTRIBUTES = (
    "num_heads", "head_dim", "ka", "ms_channel", "q", "k_pan", "v_pan", "kv_ms", "dep_conv", "proj_pan", "proj_ms",
)  # fmt: skip


_FREQUENCY_ATTRIBUTES = ("prenorm_x", "qkv", "attn_out", "ffn")
_HEADS_ATTRIBUTES = ("nheads", "num_heads", "n_heads", "heads")


def accelerate(model: nn.Module, *, attention_keys: str = "released") -> nn.Module:
    """Replace the attention modules of a network built from the official code by fused ones, in place.

    PAN-Crafter's cross-modal attention and the frequency attention of U-Know-DiffPAN's teacher; recognised by their
    attributes, not by their class. Parameters are shared with the modules they replace: state dicts, optimizers and
    outputs stay the same.

    Args:
        model: any module that holds such attention modules, or is one (then the replacement is returned).
        attention_keys: of PAN-Crafter: "released" for the release as published, "aligned" for code in which each branch
            uses its own keys.

    Returns:
        model.

    Raises:
        ValueError: the model holds no attention module that could be replaced.
    """
    replacement = _replacement(model, attention_keys)
    if replacement is not None:
        return replacement
    found = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            replacement = _replacement(child, attention_keys)
            if replacement is not None:
                setattr(parent, name, replacement)
                found += 1
    if not found:
        raise ValueError(
            f"model: expected modules with the attributes {', '.join(_CM3A_ATTRIBUTES)} or "
            f"{', '.join(_FREQUENCY_ATTRIBUTES)}, got none in {type(model).__name__}"
        )
    return model


def _replacement(module: nn.Module, attention_keys: str) -> nn.Module | None:
    """The fused twin of an official attention module, None of any other module."""
    if _is_official_cm3a(module):
        return _fused_cm3a(module, attention_keys)
    if _is_official_frequency_attention(module):
        return _fused_frequency_attention(module)
    return None


def _is_official_frequency_attention(module: nn.Module) -> bool:
    return (
        not isinstance(module, FrequencyAttention)
        and all(hasattr(module, name) for name in _FREQUENCY_ATTRIBUTES)
        and isinstance(module.prenorm_x, nn.GroupNorm)
        and any(isinstance(getattr(module, name, None), int) for name in _HEADS_ATTRIBUTES)
    )


def _fused_frequency_attention(module: Any) -> FrequencyAttention:
    heads = next(getattr(module, name) for name in _HEADS_ATTRIBUTES if isinstance(getattr(module, name, None), int))
    drop_path = getattr(module, "drop_path", None)
    fused = FrequencyAttention(
        module.prenorm_x.num_channels,
        module.qkv[-1].out_channels // 3,
        module.attn_out.out_channels,
        module.prenorm_x.num_groups,
        heads,
        float(getattr(drop_path, "drop_prob", getattr(module, "drop_path_prob", 0.2))),
    )
    _share(fused, module)
    return fused.train(module.training)


def _share(fused: nn.Module, module: nn.Module) -> None:
    """Put the children of `module` in the place of those of `fused` that have tensors."""
    for name, own in list(fused.named_children()):
        shapes = [tuple(p.shape) for p in own.parameters()]
        if not shapes:
            continue
        given = getattr(module, name)
        if shapes != [tuple(p.shape) for p in given.parameters()]:
            raise ValueError(f"{name}: expected the tensors of the public release's attention module, got other shapes")
        setattr(fused, name, given)


def _is_official_cm3a(module: nn.Module) -> bool:
    return not isinstance(module, CM3A) and all(hasattr(module, name) for name in _CM3A_ATTRIBUTES)


def _fused_cm3a(module: Any, attention_keys: str) -> CM3A:
    dim = module.num_heads * module.head_dim
    fused = CM3A(
        dim,
        module.num_heads,
        pan_channel=module.k_pan.in_channels - dim,
        ms_channel=module.ms_channel,
        pan_ks=module.q.kernel_size[0],
        ms_ks=module.kv_ms.kernel_size[0],
        ka=module.ka,
        qkv_bias=module.q.bias is not None,
        attention_keys=attention_keys,
    )
    _share(fused, module)
    return fused.train(module.training)
