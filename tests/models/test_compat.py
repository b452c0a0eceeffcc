"""Our operators inside models built from other code."""

import copy

import pytest
import torch
from torch import nn

from pansharp_fast import accelerate, compat
from pansharp_fast.models import PANCrafter, preset
from pansharp_fast.nn import CM3A


class ExpandedAttention(nn.Module):
    """Stands in for the public release's attention module: its attributes, its result, the expansion in memory."""

    def __init__(self, dim, num_heads, ms_channel, released, *, pan_ks=3, ms_ks=1):
        super().__init__()
        self.num_heads, self.head_dim, self.ka, self.ms_channel = num_heads, dim // num_heads, 3, ms_channel
        self.released = released
        self.q = nn.Conv2d(dim + ms_channel, dim, pan_ks, padding=pan_ks // 2)
        self.k_pan = nn.Conv2d(dim + 1, dim, pan_ks, padding=pan_ks // 2)
        self.v_pan = nn.Conv2d(dim + 3, dim, pan_ks, padding=pan_ks // 2)
        self.kv_ms = nn.Conv2d(dim + ms_channel, 2 * dim, ms_ks, padding=ms_ks // 2)
        self.dep_conv = nn.Conv2d(self.head_dim, 9 * self.head_dim, 3, padding=1, groups=self.head_dim)
        self.proj_pan = nn.Conv2d(dim, dim, 1)
        self.proj_ms = nn.Conv2d(dim, dim, 1)

    def forward(self, x, ms, lpan, pan, s):
        b, c, h, w = x.shape
        s = s.view(b, 1, 1, 1)
        q = self.q(torch.cat([x, s * ms + (1 - s) * lpan.repeat(1, self.ms_channel, 1, 1)], 1))
        k_pan = self.k_pan(torch.cat([x, lpan], 1))
        v_pan = self.v_pan(torch.cat([x, lpan, pan, pan - lpan], 1))
        k_ms, v_ms = self.kv_ms(torch.cat([x, ms], 1)).chunk(2, 1)
        if self.released:
            k_pan = k_ms
            k_ms = k_ms.view(b, self.num_heads, self.head_dim, h, w).permute(0, 1, 4, 2, 3).reshape(b, c, h, w)

        def heads(k):
            neighbours = self.dep_conv(k.reshape(b * self.num_heads, self.head_dim, h, w))
            return neighbours.view(b, self.num_heads, self.head_dim, 9, h, w)

        def attend(k, v):
            logits = (q.view(b, self.num_heads, self.head_dim, 1, h, w) * heads(k)).sum(2, keepdim=True)
            return ((logits * self.head_dim**-0.5).softmax(3) * heads(v)).sum(3).view(b, c, h, w)

        return self.proj_pan(attend(k_pan, v_pan)), self.proj_ms(attend(k_ms, v_ms))


class Host(nn.Module):
    """A model that holds two attention modules, one of them in a list."""

    def __init__(self, released):
        super().__init__()
        self.first = ExpandedAttention(16, 4, 3, released)
        self.rest = nn.ModuleList([ExpandedAttention(16, 2, 3, released), nn.Conv2d(16, 16, 1)])

    def forward(self, x, *conditions):
        for module in (self.first, self.rest[0]):
            x = x + sum(module(x, *conditions))
        return self.rest[1](x)


def conditions(size=6):
    return (torch.randn(2, 3, size, size), torch.randn(2, 1, size, size), torch.randn(2, 1, size, size), torch.rand(2))


@pytest.mark.parametrize("keys", ["released", "aligned"])
def test_accelerate_keeps_outputs_and_parameters(keys):
    model = Host(released=keys == "released")
    x, *rest = torch.randn(2, 16, 6, 6), *conditions()
    before = model(x, *rest)
    before.sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    parameters = dict(model.named_parameters())
    model.zero_grad()

    assert accelerate(model, attention_keys=keys) is model
    assert isinstance(model.first, CM3A)
    assert isinstance(model.rest[0], CM3A)
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in parameters.items()}
    after = model(x, *rest)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    after.sum().backward()
    for name, gradient in gradients.items():
        torch.testing.assert_close(parameters[name].grad, gradient, rtol=1e-4, atol=1e-4)


def test_accelerate_by_default_takes_the_release_as_published():
    module = ExpandedAttention(16, 4, 3, released=True).eval()
    fused = accelerate(module)
    assert isinstance(fused, CM3A)
    assert not fused.training
    x, *rest = torch.randn(2, 16, 6, 6), *conditions()
    for ours, theirs in zip(fused(x, *rest), module(x, *rest), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_accelerate_refuses_models_without_attention():
    with pytest.raises(ValueError, match="expected modules with the attributes num_heads"):
        accelerate(nn.Conv2d(1, 1, 1))
    module = ExpandedAttention(16, 4, 3, released=True)
    module.proj_ms = nn.Conv2d(16, 8, 1)
    with pytest.raises(ValueError, match="proj_ms: expected the tensors of the public release"):
        accelerate(module)


@pytest.mark.parametrize("size", [(64, 96), (96, 64), (72, 40)])
def test_oblong_images_by_released_keys(size):
    """The release reinterprets memory, whatever the sizes."""
    changes = {"bands": 4, "hidden_sizes": (16,) * 4, "depth": (1,) * 4, "num_heads": 2, "norm_groups": 4}
    model = PANCrafter(preset("released", **changes)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    plain = copy.deepcopy(model)
    for block in plain.modules():
        if isinstance(getattr(block, "attn", None), CM3A):
            ours = block.attn
            block.attn = ExpandedAttention(
                16, 2, 4, True, ms_ks=ours.kv_ms.kernel_size[0], pan_ks=ours.q.kernel_size[0]
            )
            block.attn.load_state_dict(ours.state_dict())
    pan, ms = torch.rand(2, 1, *size) * 2000, torch.rand(2, 4, size[0] // 4, size[1] // 4) * 2000
    with torch.no_grad():
        expected, result = plain.sharpen(pan, ms, 2047), model.sharpen(pan, ms, 2047)
    assert (result - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert accelerate(plain) is plain
    accelerated = plain.sharpen(pan, ms, 2047)
    assert (accelerated - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_from_official_refuses():
    with pytest.raises(ValueError, match="name: expected one of"):
        compat.from_official("resnet", {}, {})
    with pytest.raises(ValueError, match="config: expected in_channels=1"):
        compat.from_official("pancrafter", {"in_channels": 2}, {})
    with pytest.raises(ValueError, match=r"official constructor, got \['colour'\]"):
        compat.from_official("pancrafter", {"colour": 2}, {})
