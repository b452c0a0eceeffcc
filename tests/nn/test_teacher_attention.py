"""The teacher's frequency and wavelet attention blocks."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from pansharp_fast import accelerate, reference
from pansharp_fast.nn import FrequencyAttention, WaveletAttention


def load(path):
    with np.load(path) as file:
        config = json.loads(str(file["config"]))
        weights = {key[2:]: torch.from_numpy(file[key]) for key in file.files if key.startswith("w/")}
        return config, weights, torch.from_numpy(file["in/x"]), torch.from_numpy(file["out/out"])


def test_golden(golden):
    config, weights, x, expected = load(golden / "freq_attention.npz")
    block = FrequencyAttention(**config).eval()
    block.load_state_dict(weights)
    with torch.no_grad():
        out = block(x)
    assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_released_tensor_names(shared):
    """Both wavelet blocks and the frequency block take the official decoder's tensors by name."""
    with np.load(shared / "golden" / "fsa_t.npz") as file:
        keys = {key: file[key].shape for key in file.files}
    blocks = {
        "fourier_CA": FrequencyAttention(48, 48, 48),
        "cond_inj_qk_v": WaveletAttention(7, 48, 48, 48, "qk"),
        "cond_inj_q_kv": WaveletAttention(7, 48, 48, 16, "kv"),
    }
    for name, block in blocks.items():
        prefix = f"w/ups.3.{name}."
        official = {key.removeprefix(prefix): shape for key, shape in keys.items() if key.startswith(prefix)}
        assert {key: tuple(tensor.shape) for key, tensor in block.state_dict().items()} == official


@pytest.mark.parametrize("condition", ["qk", "kv"])
def test_wavelet_attention_follows_its_equation(condition):
    block = WaveletAttention(5, 8, 8, 6, condition, nheads=2).double().eval()
    x = torch.randn(2, 8, 5, 7, dtype=torch.float64)
    wavelets = torch.randn(2, 5, 5, 7, dtype=torch.float64)
    normed = block.prenorm_x(x)
    if condition == "qk":
        q, k = block.qk(wavelets).split(8, dim=1)
        v = block.v(normed)
    else:
        q = block.q(normed)
        k, v = block.kv(wavelets).split(8, dim=1)
    k = k.exp() / k.exp().sum(2, keepdim=True)
    v = v.exp() / v.exp().sum(3, keepdim=True)
    q, k, v = (t.reshape(2, 2, 4, 5, 7) for t in (q, k, v))
    context = torch.einsum("bhdyx,bheyx->bhde", q, k)
    out = torch.einsum("bhde,bhdyx->bheyx", context, v * 4**-0.5).reshape(2, 8, 5, 7)
    out = block.attn_out(out) + block.attn_res(normed)
    expected = out + block.ffn(out)
    torch.testing.assert_close(block(x, wavelets), expected)


@pytest.mark.parametrize("size", [(1, 1), (5, 7)])
def test_stochastic_depth_drops_whole_samples(size):
    block = FrequencyAttention(8, 8, 8, nheads=2, drop_path_prob=0.5).train()
    x = torch.randn(1, 8, *size).expand(64, -1, -1, -1)
    with torch.no_grad():
        trained = block(x)
        kept = block.eval()(x)
        block.ffn[-1].weight.zero_()
        block.ffn[-1].bias.zero_()
        without = block(x)
    dropped = torch.tensor([torch.allclose(a, b, atol=1e-5) for a, b in zip(trained, without, strict=True)])
    scaled = without + 2 * (kept - without)
    same = torch.tensor([torch.allclose(a, b, atol=1e-4) for a, b in zip(trained, scaled, strict=True)])
    assert bool((dropped | same).all())
    assert 10 < int(dropped.sum()) < 54


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"qkv_dim: expected a multiple of nheads = 3, got 8"):
        FrequencyAttention(8, 8, 8, nheads=3)
    with pytest.raises(ValueError, match=r"condition: expected 'qk' or 'kv', got 'v'"):
        WaveletAttention(5, 8, 8, 8, "v")


class Stranger(nn.Module):
    """Another implementation of the block with the released tensor names, on plain PyTorch."""

    def __init__(self, block):
        super().__init__()
        self.num_heads = block.nheads
        for name in ("prenorm_x", "qkv", "attn_out", "ffn"):
            setattr(self, name, getattr(block, name))

    def forward(self, x):
        x = self.prenorm_x(x)
        q, k, v = self.qkv(x).chunk(3, dim=1)
        out = self.attn_out(reference.frequency_attention(q, k, v, num_heads=self.num_heads)) + x
        return out + self.ffn(out)


def test_accelerate_recognises_the_released_block():
    stranger = Stranger(FrequencyAttention(8, 8, 8, nheads=2)).double().eval()
    model = nn.Sequential(nn.Conv2d(8, 8, 1).double(), stranger)
    x = torch.randn(1, 8, 6, 7, dtype=torch.float64)
    expected, keys = model(x), set(model.state_dict())
    assert accelerate(model) is model
    assert isinstance(model[1], FrequencyAttention)
    assert set(model.state_dict()) == keys
    assert model[1].qkv is stranger.qkv
    torch.testing.assert_close(model(x), expected)
