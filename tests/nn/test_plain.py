"""Layers that users changed: inference on the CPU gives what plain PyTorch gives, whatever was attached or replaced."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, prune

from pansharp_fast import use_backend
from pansharp_fast.models import FSAConfig, FSAStudent, FSATeacher, PANCrafter, Universal, UniversalConfig, preset
from pansharp_fast.nn import CM3A, Conv3x3
from pansharp_fast.nn.convolution import LayerNorm
from pansharp_fast.nn.plain import is_plain, is_plain_conv


class LowRank(nn.Module):
    """What adapter libraries put in place of a linear layer: the same attributes, more in forward."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.in_features, self.out_features = base.in_features, base.out_features
        self.down = nn.Parameter(torch.randn(4, base.in_features) * 0.1)
        self.up = nn.Parameter(torch.randn(base.out_features, 4) * 0.1)

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x):
        return self.base(x) + (x @ self.down.T) @ self.up.T

    def merged(self):
        linear = copy.deepcopy(self.base)
        linear.weight.data += self.up @ self.down
        return linear


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def randomised(model):
    """Every tensor: fresh networks start with zeros that hide what stands before them."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.08)
    return model.eval()


def pancrafter(name="tiny"):
    changes = {
        "tiny": {},
        "released": {"bands": 4, "hidden_sizes": (32, 32), "depth": (1, 1), "attention_scales": (0, 1)},
    }
    model = randomised(PANCrafter(preset(name, **changes[name])))
    torch.manual_seed(1)
    inputs = torch.randn(1, 1, 72, 64), torch.randn(1, 1, 18, 16), torch.randn(1, 4, 18, 16), torch.ones(1)
    return model, lambda model: model(*inputs)


def unet(cls):
    config = FSAConfig.preset("tiny", bands=4, teacher=cls is FSATeacher)
    model = randomised(cls(FSAConfig(**{**config.to_dict(), "inner_channel": 24, "channel_mults": (1, 2)})))
    if cls is FSATeacher:
        model.requires_grad_(False)
    torch.manual_seed(1)
    lms, pan, x = torch.rand(1, 4, 32, 40), torch.rand(1, 1, 32, 40), torch.randn(1, 4, 32, 40)

    def run(model):
        return model(x, torch.tensor([7]), model.prepare(model.condition(lms, pan))).out

    return model, run


def universal():
    model = randomised(Universal(UniversalConfig()))
    torch.manual_seed(1)
    pan, ms = torch.rand(1, 1, 80, 72) * 1000, torch.rand(1, 2, 20, 18) * 1000
    return model, lambda model: model.sharpen_registered(pan, ms, ratio=4, gains=[0.3, 0.3])


NETWORKS = {
    "universal": universal,
    "pancrafter-tiny": pancrafter,
    "pancrafter-released": lambda: pancrafter("released"),
    "student": lambda: unet(FSAStudent),
    "teacher": lambda: unet(FSATeacher),
}


def relu(model):
    for module in model.modules():
        if isinstance(module, nn.Sequential):
            for i, layer in enumerate(module):
                if isinstance(layer, nn.SiLU):
                    module[i] = nn.ReLU()


def reflect(model):
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            module.padding_mode, module._reversed_padding_repeated_twice = "reflect", [1, 1, 1, 1]


def each(kind, change):
    def apply(model):
        for module in list(model.modules()):
            if isinstance(module, kind):
                change(module)

    return apply


def halve(*results):
    return results[-1] * 0.5


def override(module):
    forward = module.forward
    module.forward = lambda x: forward(x) * 0.5


CHANGES = {
    "relu": relu,
    "reflect": reflect,
    "hooks on convolutions": each(nn.Conv2d, lambda module: module.register_forward_hook(halve)),
    "hooks on sequences": each(nn.Sequential, lambda module: module.register_forward_hook(halve)),
    "hooks on norms": each((nn.GroupNorm, LayerNorm), lambda module: module.register_forward_hook(halve)),
    "hooks before": each(nn.Conv2d, lambda module: module.register_forward_pre_hook(lambda m, x: (x[0] * 0.5,))),
    "forward overridden": each((nn.Conv2d, nn.Linear), override),
    "weight norm by hooks": each(nn.Conv2d, lambda module: nn.utils.weight_norm(module).weight_g.data.mul_(1.2)),
    "weight norm": each(
        nn.Conv2d,
        lambda module: parametrizations.weight_norm(module).parametrizations.weight.original0.data.mul_(1.2),
    ),
    "pruned": each(
        Conv3x3, lambda module: prune.custom_from_mask(module, "weight", torch.rand_like(module.weight) < 0.5)
    ),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize(
    ("network", "change"),
    [pair for pair in itertools.product(NETWORKS, CHANGES) if pair != ("universal", "relu")],  # has no such modules
)
def test_changed_layers_count(network, change):
    model, run = NETWORKS[network]()
    with torch.no_grad():
        before = run(model)
    CHANGES[change](model)
    model.eval()
    with torch.no_grad():
        fast = run(model)
        with use_backend("reference"):
            plain = run(model)
    recorded = run(model).detach()
    tolerance = 3e-2 if network == "teacher" else 1e-4  # phases jump at their cut
    assert (before - plain).norm() > 2 * tolerance * plain.norm()
    assert (fast - plain).norm() <= tolerance * plain.norm()
    assert (recorded - plain).norm() <= tolerance * plain.norm()


@pytest.mark.parametrize("network", ["pancrafter-tiny", "pancrafter-released"])
def test_adapters_are_their_merged_weights(network):
    model, run = NETWORKS[network]()
    with torch.no_grad():
        plain = run(model)
        for module in model.modules():
            if hasattr(module, "fc1"):
                module.fc1, module.fc2 = LowRank(module.fc1), LowRank(module.fc2)
        adapted = run(model)
        for module in model.modules():
            if hasattr(module, "fc1"):
                module.fc1, module.fc2 = module.fc1.merged(), module.fc2.merged()
        merged = run(model)
    assert (plain - merged).abs().max() > 1e-2 * merged.abs().max()
    assert (adapted - merged).abs().max() <= 1e-4 * merged.abs().max()


@pytest.mark.filterwarnings("ignore")
def test_quantised_layers():
    model, run = pancrafter()
    with torch.no_grad():
        exact = run(model)
        linear = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
        assert any("quantized" in type(module).__module__ for module in linear.modules())
        rough = run(linear)
    assert 0 < (rough - exact).norm() < 0.1 * exact.norm()


def test_hooks_of_every_module():
    model, run = pancrafter()
    seen = []
    handle = register_module_forward_hook(lambda module, inputs, output: seen.append(type(module).__name__))
    try:
        with torch.no_grad():
            run(model)
    finally:
        handle.remove()
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    assert sum(name in ("Conv2d", "Conv3x3") for name in seen) == convolutions


@pytest.mark.parametrize("name", ["time_emd_block", "fourier_CA", "cond_inj_qk_v", "cond_inj_q_kv"])
def test_what_a_hook_keeps_is_not_overwritten(name):
    model, run = unet(FSATeacher)
    kept = []
    for block in model.ups:
        if hasattr(block, name):
            block.get_submodule(name).register_forward_hook(lambda m, x, y: kept.append((y, y.clone())))
    with torch.no_grad():
        run(model)
    assert kept
    assert all(torch.equal(now, then) for now, then in kept)


def test_blocks_may_be_wrapped():
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("inner"), name)

        def forward(self, *inputs):
            return self.inner(*inputs)

    for cls in (FSAStudent, FSATeacher):
        model, run = unet(cls)
        with torch.no_grad():
            expected = run(model)
            for layers, numbers in ((model.downs, model.down_blocks), (model.ups, model.up_blocks)):
                for number in numbers:
                    layers[number] = Wrapper(layers[number])
            torch.testing.assert_close(run(model), expected)


@pytest.mark.parametrize("change", ["hook", "weight_norm", "reflect"])
@pytest.mark.parametrize("keys", ["released", "aligned"])
def test_neighbours_by_a_changed_convolution(keys, change):
    torch.manual_seed(0)
    block = CM3A(16, 4, ms_channel=3, attention_keys=keys).double().eval()
    inputs = [torch.randn(2, c, 6, 5, dtype=torch.float64) for c in (16, 3, 1, 1)] + [torch.tensor([0.0, 1.0])]
    before = block(*inputs)
    if change == "hook":
        block.dep_conv.register_forward_hook(lambda module, x, y: y)
        scaled = block(*inputs)  # the same values, by calls
        for ours, theirs in zip(scaled, before, strict=True):
            torch.testing.assert_close(ours, theirs)
        return
    if change == "weight_norm":
        parametrizations.weight_norm(block.dep_conv).parametrizations.weight.original0.data.mul_(1.2)
        twin = CM3A(16, 4, ms_channel=3, attention_keys=keys).double().eval()
        state = {name: value for name, value in block.state_dict().items() if "parametrizations" not in name}
        twin.load_state_dict(state | {"dep_conv.weight": block.dep_conv.weight.detach()})
        for ours, theirs in zip(block(*inputs), twin(*inputs), strict=True):
            torch.testing.assert_close(ours, theirs)
        return
    block.dep_conv.padding_mode, block.dep_conv._reversed_padding_repeated_twice = "reflect", [1, 1, 1, 1]
    for after, old in zip(block(*inputs), before, strict=True):
        torch.testing.assert_close(after[..., 1:-1, 1:-1], old[..., 1:-1, 1:-1])  # projections there are 1x1
        assert not torch.allclose(after, old)


def test_predicate():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    assert is_plain_conv(conv, 3)
    assert is_plain_conv(Conv3x3(4, 4), 3, bias=True)
    assert not is_plain_conv(conv, 1)
    assert not is_plain_conv(conv, 3, bias=False)
    for other in (
        nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, padding=1, stride=2), nn.Conv2d(4, 4, 3, padding=1, groups=2),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2), nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(4, 4, 3, padding="same"), nn.Linear(3, 3), nn.Identity(),
    ):  # fmt: skip
        assert not is_plain_conv(other, 3)
    assert not is_plain(nn.Dropout(0.5), nn.Dropout)
    assert is_plain(nn.Dropout(0.5).eval(), nn.Dropout)
    handle = conv.register_full_backward_hook(lambda *_: None)
    assert not is_plain_conv(conv, 3)
    handle.remove()
    assert is_plain_conv(conv, 3)


def test_transforms_and_traces_take_the_plain_form():
    model, _ = pancrafter()
    other = pancrafter()[0]
    inputs = torch.randn(1, 1, 72, 64), torch.randn(1, 1, 18, 16), torch.randn(1, 4, 18, 16), torch.ones(1)
    larger = torch.randn(1, 1, 80, 96), torch.randn(1, 1, 20, 24), torch.randn(1, 4, 20, 24), torch.ones(1)
    parameters, _ = torch.func.stack_module_state([model, other])
    with torch.no_grad():
        expected = torch.stack([each(*inputs) for each in (model, other)])
        both = torch.func.vmap(lambda p: torch.func.functional_call(model, p, inputs))(parameters)
        traced = torch.jit.trace(model, inputs)
        assert (both - expected).abs().max() <= 1e-4 * expected.abs().max()
        for arguments in (inputs, larger):
            result = model(*arguments)
            assert (traced(*arguments) - result).abs().max() <= 1e-4 * result.abs().max()
