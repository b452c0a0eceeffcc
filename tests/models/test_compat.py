"""Our operators inside models built from other code."""

import copy

import pytest
import torch
from torch import nn

from pansharp_fast import accelerate, compat, reference
from pansharp_fast.models import (
    Condition,
    FSAConfig,
    FSAStudent,
    FSATeacher,
    PANCrafter,
    PriorConfig,
    PriorNet,
    load_model,
    preset,
    save_model,
)
from pansharp_fast.models.condition import highpass
from pansharp_fast.nn import CM3A, Conv3x3, FrequencyAttention
from tests.support.backends import DEVICES


class ExpandedAttention(nn.Module):
    """Stands in for the public release's attention module: its attributes, its result, the expansion in memory."""

    def __init__(self, dim, num_heads, ms_channel, released, *, pan_ks=3, ms_ks=1):
        super().__init__()
        self.num_heads, self.head_dim, self.ka, self.ms_channel = num_heads, dim // num_heads, 3, ms_channel
        self.released = released
        self.dep_conv = nn.Conv2d(self.head_dim, 9 * self.head_dim, 3, padding=1, groups=self.head_dim)
        self.q = nn.Conv2d(dim + ms_channel, dim, pan_ks, padding=pan_ks // 2)
        self.k_pan = nn.Conv2d(dim + 1, dim, pan_ks, padding=pan_ks // 2)
        self.v_pan = nn.Conv2d(dim + 3, dim, pan_ks, padding=pan_ks // 2)
        self.kv_ms = nn.Conv2d(dim + ms_channel, 2 * dim, ms_ks, padding=ms_ks // 2)
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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("keys", ["released", "aligned"])
def test_accelerate_keeps_outputs_and_parameters(keys, device, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model = Host(released=keys == "released").to(device)
    x, *rest = (each.to(device) for each in (torch.randn(2, 16, 6, 6), *conditions()))
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
    with pytest.raises(ValueError, match="expected 3x3 convolutions or modules with the attributes num_heads"):
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


class DropPath(nn.Module):
    """Stochastic depth as image model libraries have it."""

    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        if not self.training or not self.drop_prob:
            return x
        keep = 1 - self.drop_prob
        return x * x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(keep) / keep


class PlainFrequencyAttention(nn.Module):
    """Stands in for the public release's frequency attention, in its order of children."""

    def __init__(self, channels, heads, drop_path=0.5):
        super().__init__()
        self.prenorm_x = nn.GroupNorm(1, channels)
        self.qkv = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False, groups=channels),
            nn.Conv2d(channels, 3 * channels, 1),
        )
        self.nheads, self.scale = heads, (channels // heads) ** -0.5
        self.attn_out, self.attn_res = nn.Conv2d(channels, channels, 1), nn.Identity()
        self.ffn = nn.Sequential(
            nn.Conv2d(channels, 2 * channels, 3, padding=1, bias=False),
            nn.SiLU(),
            nn.Conv2d(2 * channels, channels, 3, padding=1, bias=False),
            nn.Conv2d(channels, channels, 1),
        )
        self.ffn_drop_path = DropPath(drop_path)

    def forward(self, x):
        x = self.prenorm_x(x)
        q, k, v = self.qkv(x).chunk(3, dim=1)
        out = self.attn_out(reference.frequency_attention(q, k, v, num_heads=self.nheads)) + self.attn_res(x)
        return out + self.ffn_drop_path(self.ffn(out))


class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.freq = ExpandedAttention(16, 4, 3, True), PlainFrequencyAttention(16, 4)
        self.last = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x, *conditions):
        return self.last(self.freq(x + sum(self.attn(x, *conditions))))


def test_accelerate_keeps_order_random_numbers_and_training():
    """A run of the official code goes on with the accelerated network: same tensors, same optimizer, same losses."""
    plain, inputs = Both(), (torch.randn(2, 16, 6, 6), *conditions())

    def train(model, optimizer, seed):
        torch.manual_seed(seed)
        losses = []
        for _ in range(3):
            loss = model(*inputs).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    train(plain, optimizer, 5)
    fast = copy.deepcopy(plain)
    names, tensors = list(fast.state_dict()), [id(p) for p in fast.parameters()]
    state = torch.get_rng_state()
    accelerate(fast)
    assert torch.equal(torch.get_rng_state(), state)
    assert list(fast.state_dict()) == names
    assert [id(p) for p in fast.parameters()] == tensors
    resumed = torch.optim.AdamW(fast.parameters(), lr=1e-2)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert train(fast, resumed, 6) == pytest.approx(train(plain, optimizer, 6), rel=1e-3)


def test_accelerate_twice_and_of_our_own_networks():
    model = accelerate(Both())
    classes = [type(module) for module in model.modules()]
    assert accelerate(model) is model
    assert [type(module) for module in model.modules()] == classes
    assert classes.count(CM3A) == classes.count(FrequencyAttention) == 1
    assert type(model.last) is Conv3x3
    lms, pan = torch.rand(1, 4, 32, 32), torch.rand(1, 1, 32, 32)
    config = FSAConfig.preset("tiny", bands=4, teacher=False)
    for network, inputs in (
        (PriorNet(PriorConfig.preset("tiny", bands=4)), (lms, pan)),
        (FSAStudent(config), (lms, torch.zeros(1), Condition(lms, pan))),
        (PANCrafter(preset("tiny")), (pan, pan[..., ::4, ::4], lms[..., ::4, ::4], torch.ones(1))),
    ):
        network.eval()
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.1)
        with torch.no_grad():
            before = network(*inputs)
            assert accelerate(network) is network
            after = network(*inputs)
        ours, theirs = (each[0] if isinstance(each, tuple) else each for each in (after, before))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_accelerate_keeps_hooks():
    model, seen = Both(), []
    model.attn.register_forward_hook(lambda module, inputs, output: seen.append(type(module)))
    model.freq.qkv.register_forward_hook(lambda module, inputs, output: output * 0.5)
    inputs = torch.randn(2, 16, 32, 32), *conditions(32)
    model.eval()
    with torch.no_grad():
        expected = model(*inputs)
        accelerate(model)
        torch.testing.assert_close(model(*inputs), expected, rtol=1e-4, atol=1e-4)
    assert seen == [ExpandedAttention, CM3A]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.add_module("q_norm", nn.LayerNorm(4)), "q_norm: expected none or one that does nothing"),
        (lambda m: m.add_module("attn_drop", nn.Dropout(0.1)), r"attn_drop: expected none .* got Dropout\(p=0.1"),
        (lambda m: setattr(m, "proj_drop", 0.1), "proj_drop: expected 0 .* got 0.1"),
        (lambda m: setattr(m, "qk_norm", True), "qk_norm: expected 0 .* got True"),
        (lambda m: setattr(m, "scale", 1.0), "scale: expected 0.353553, as the public release has, got 1"),
        (
            lambda m: setattr(m, "released", False),
            "expected ExpandedAttention to compute the public release's attention",
        ),
    ],
)
def test_accelerate_refuses_what_it_cannot_carry_over(change, message):
    model = Host(released=True)
    change(model.rest[0])
    with pytest.raises(ValueError, match=message):
        accelerate(model)
    assert isinstance(model.first, ExpandedAttention)  # nothing was replaced


def test_accelerate_refuses_another_forward():
    class Other(ExpandedAttention):
        def forward(self, x, everything):
            return super().forward(x, *everything)

    with pytest.raises(ValueError, match=r"expected Other to take \(x, ms, lpan, pan, s\)"):
        accelerate(Other(16, 4, 3, True))


def test_accelerate_takes_options_that_do_nothing():
    model = ExpandedAttention(16, 4, 3, True)
    model.q_norm, model.attn_drop, model.proj_drop, model.qk_norm = (
        nn.Identity(),
        nn.Dropout(0.0),
        nn.Dropout(0.0),
        False,
    )
    assert isinstance(accelerate(model), CM3A)
    assert isinstance(accelerate(ExpandedAttention(16, 4, 3, False), attention_keys="aligned"), CM3A)


def peak_memory(run):
    """Largest number of bytes that tensors made in `run` hold at one time."""
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as trace:
        run()
    now = largest = 0
    for event in trace.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            largest = max(largest, now)
    return largest


def test_accelerated_attention_needs_no_more_memory():
    block, x = PlainFrequencyAttention(48, 8).eval(), torch.randn(1, 48, 96, 96)
    plain = peak_memory(lambda: block(x))
    fast = accelerate(block)
    assert 0 < peak_memory(lambda: fast(x)) <= plain


@pytest.mark.parametrize("wrap", [lambda d: {f"module.{k}": v for k, v in d.items()},
                                  lambda d: {"iterations": 3, "model_state_dict": d, "optimizer_state_dict": {}},
                                  lambda d: {"state_dict": {f"module.{k}": v for k, v in d.items()}}])  # fmt: skip
def test_from_official_takes_what_scripts_save(wrap):
    prior = PriorNet(PriorConfig.preset("released", bands=4))
    for parameter in prior.parameters():
        nn.init.normal_(parameter)
    loaded = compat.from_official("prior", {"spectral_num": 4}, wrap(prior.state_dict()))
    for name, tensor in prior.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_from_official_takes_every_argument_at_its_default():
    prior = PriorNet(PriorConfig.preset("released", bands=8)).state_dict()
    compat.from_official("prior", {"spectral_num": 8, "criterion": None, "channel": 64, "reg": True}, prior)
    more = {
        "with_noise_level_emb": True, "fourier_features": False, "fourier_min": 7, "fourier_max": 8, "fourier_step": 1,
        "pred_var": False,
    }  # fmt: skip
    config = {
        "in_channel": 4, "out_channel": 4, "inner_channel": 8, "lms_channel": 4, "pan_channel": 1, "norm_groups": 1,
        "channel_mults": (1, 2), "attn_res": (8,), "res_blocks": 1, "dropout": 0.2, "image_size": 64,
        "self_condition": True,
    }  # fmt: skip
    ours = {"bands": 4, "highpass_pan": True, "released_sampling": True}
    shared = {
        key: value for key, value in config.items() if "channel" not in key or key in ("inner_channel", "channel_mults")
    }
    student = FSAStudent(FSAConfig(**shared, **ours))
    compat.from_official("fsa_s", config | more, student.state_dict())
    with pytest.raises(ValueError, match="config: expected fourier_features=False, got True"):
        compat.from_official("fsa_s", config | {"fourier_features": True}, student.state_dict())


def test_from_official_joins_teacher_and_prior(tmp_path):
    bands = 4
    prior = PriorNet(PriorConfig.preset("released", bands=bands))
    config = {"in_channel": bands, "inner_channel": 8, "channel_mults": (1, 2), "res_blocks": 1}
    teacher = FSATeacher(FSAConfig(bands=bands, inner_channel=8, channel_mults=(1, 2), res_blocks=1, highpass_pan=True))
    for parameter in (*prior.parameters(), *teacher.parameters()):
        nn.init.normal_(parameter, std=0.1)
    saved = {"model_state_dict": {f"module.{k}": v for k, v in prior.state_dict().items()}}
    model = compat.from_official("fsa_t", config, teacher.state_dict(), prior=saved)
    lms, pan = torch.rand(1, bands, 16, 16), torch.rand(1, 1, 16, 16)
    expected = prior(lms, highpass(pan))
    condition = model.condition(lms, pan)
    torch.testing.assert_close(condition.pre_out, expected.out)
    torch.testing.assert_close(condition.pre_variance, expected.variance)
    save_model(tmp_path / "teacher.safetensors", model)
    assert load_model(tmp_path / "teacher.safetensors").config == model.config
    with pytest.raises(ValueError, match="prior: expected with name 'fsa_t' only"):
        compat.from_official("fsa_s", config, {}, prior=saved)
    with pytest.raises(ValueError, match=r"state_dict: expected tensors by name, .* got int as 'iterations'"):
        compat.from_official("fsa_t", config, {"iterations": 3})


def test_from_official_refuses():
    with pytest.raises(ValueError, match="name: expected one of"):
        compat.from_official("resnet", {}, {})
    with pytest.raises(ValueError, match="config: expected in_channels=1"):
        compat.from_official("pancrafter", {"in_channels": 2}, {})
    with pytest.raises(ValueError, match=r"official constructor, got \['colour'\]"):
        compat.from_official("pancrafter", {"colour": 2}, {})
