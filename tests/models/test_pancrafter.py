"""PAN-Crafter: golden values of the public release, presets, any size, compilation."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pansharp_fast import compat, use_backend
from pansharp_fast.models import PRESETS, PANCrafter, PANCrafterConfig, preset
from pansharp_fast.nn import CM3A
from pansharp_fast.nn.cm3a import transposed_keys
from tests.support.backends import needs_interpreter


def load(path):
    data = np.load(path)
    groups = {"w": {}, "in": {}, "out": {}}
    for key in data.files:
        group, _, name = key.partition("/")
        if group in groups:
            groups[group][name] = torch.from_numpy(data[key])
    return json.loads(str(data["config"])), groups["w"], groups["in"], groups["out"]


def randomised(config, std=0.05):
    """A model in evaluation mode with no tensor left at zero, so that every part matters."""
    model = PANCrafter(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * std)
    return model


def small(name, **changes):
    """A preset at a size for tests."""
    widths = len(preset(name).hidden_sizes)
    return preset(
        name,
        **{
            "bands": 4,
            "hidden_sizes": (16,) * widths,
            "depth": (1,) * widths,
            "num_heads": 2,
            "norm_groups": 4,
            "s_embed_size": 8,
            **changes,
        },
    )


def images(h, w, bands=4, batch=1):
    return torch.rand(batch, 1, 4 * h, 4 * w), torch.rand(batch, 1, h, w), torch.rand(batch, bands, h, w)


def close(ours, golden, tolerance=1e-5):
    assert ours.shape == golden.shape
    assert (ours - golden).abs().max() <= tolerance * golden.abs().max()


@pytest.mark.parametrize("keys", ["released", "aligned"])
def test_golden_network(golden, keys):
    config, weights, inputs, out = load(golden / "pancrafter.npz")
    model = compat.from_official("pancrafter", config, weights, attention_keys=keys)
    with torch.no_grad():
        close(model(inputs["pan"], inputs["lpan"], inputs["ms"], inputs["s"]), out[keys])


def test_layout_follows_the_weights():
    """channels_last from the first features on, unless the weights are put into another layout."""
    seen = []
    model = randomised(small("released"))
    model.encoder1[-1].register_forward_hook(lambda *arguments: seen.append(arguments[-1]))
    arguments = (*images(8, 8), torch.ones(1))
    with torch.no_grad():
        last = model(*arguments)
        first = model.to(memory_format=torch.contiguous_format)(*arguments)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert seen[1].is_contiguous()
    close(first, last)


def test_golden_variants_differ(golden):
    _, _, _, out = load(golden / "pancrafter.npz")
    assert (out["released"] - out["aligned"]).abs().max() > 1e-3 * out["aligned"].abs().max()


def test_golden_attention(golden):
    config, weights, inputs, out = load(golden / "cm3a.npz")
    module = CM3A(**config)
    module.load_state_dict(weights)
    with torch.no_grad():
        x_pan, x_ms = module(**inputs)
    close(x_pan, out["aligned_pan"])
    close(x_ms, out["aligned_ms"])


@pytest.mark.parametrize("bands", [8, 4])
def test_official_names_load_strictly(golden, bands):
    shapes = json.loads((golden / "official_state_dict_keys.json").read_text())[f"PANCrafter(out_channels={bands})"]
    with torch.device("meta"):
        model = PANCrafter(preset("released", bands=bands))
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == shapes
    state = {name: torch.zeros(shape) for name, shape in shapes.items()}
    loaded = compat.from_official("pancrafter", {"in_channels": 1, "out_channels": bands}, state)
    assert loaded.config == preset("released", bands=bands)
    state.pop("s_token")
    with pytest.raises(RuntimeError, match="s_token"):
        compat.from_official("pancrafter", {"out_channels": bands}, state)


def test_parameter_counts():
    def count(name, **changes):
        with torch.device("meta"):
            return sum(p.numel() for p in PANCrafter(preset(name, **changes)).parameters())

    assert count("released") == 9_968_808  # the public release
    assert abs(count("paper") - 7.17e6) < 0.01 * 7.17e6  # Table 10 of the paper
    assert 4 * count("tiny") <= 3e6  # bytes of the shipped weights


@pytest.mark.parametrize("name", sorted(PRESETS))
@pytest.mark.parametrize(("h", "w"), [(1, 1), (5, 9), (8, 8), (1, 12)])
def test_sharpen_takes_any_multiple_of_four(name, h, w):
    model = randomised(small(name))
    pan, _, ms = images(h, w)
    out = model.sharpen(pan * 2047, ms * 2047, peak=2047)
    assert out.shape == (1, 4, 4 * h, 4 * w)
    assert out.isfinite().all()


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_fresh_network_is_bicubic(name):
    pan, _, ms = images(8, 8)
    out = PANCrafter(small(name)).eval().sharpen(pan * 1000, ms * 1000, peak=2047)
    close(out, 1000 * F.interpolate(ms, scale_factor=4, mode="bicubic"))


def test_sharpen_equals_forward_plus_residual():
    from pansharp_fast.data import lpan

    model = randomised(small("tiny"))
    pan, _, ms = images(8, 8, batch=2)
    raw = model(2 * pan - 1, lpan(2 * pan - 1), 2 * ms - 1, torch.ones(2)).detach()
    expected = (F.interpolate(2 * ms - 1, scale_factor=4, mode="bicubic") + raw + 1) / 2
    close(model.sharpen(pan * 2047, ms * 2047, peak=2047) / 2047, expected)


def test_sharpen_takes_integers():
    model = randomised(small("tiny"))
    pan, ms = torch.randint(0, 2048, (1, 1, 16, 16)), torch.randint(0, 2048, (1, 4, 4, 4))
    assert torch.equal(model.sharpen(pan, ms, 2047), model.sharpen(pan.float(), ms.float(), 2047))


def test_modes_differ_by_sample():
    model = randomised(small("released", attention_keys="aligned"))
    pan, lpan, ms = images(4, 4)
    twice = [torch.cat([x, x]) for x in (pan, lpan, ms)]
    with torch.no_grad():
        both = model(*twice, torch.tensor([0, 1]))
        for mode in (0, 1):
            close(model(pan, lpan, ms, torch.tensor([mode])), both[mode : mode + 1])
    assert (both[0] - both[1]).abs().max() > 1e-2 * both.abs().max()


@pytest.mark.parametrize("name", ["tiny", "paper"])
def test_layer_norm_networks_are_local(name):
    """A change far away leaves a pixel as it is: tiles give what the whole scene gives."""
    model = randomised(small(name))
    pan, lpan, ms = images(32, 32)
    far = pan.clone()
    far[..., :8] += 1
    mode = torch.ones(1)
    with torch.no_grad():
        change = (model(pan, lpan, ms, mode) - model(far, lpan, ms, mode)).abs().amax((0, 1, 2))
    assert change[:8].max() > 0
    assert change[8 + 56 :].max() == 0


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_gradients_reach_every_used_parameter(name):
    model = randomised(small(name))
    model(*images(8, 8, batch=2), torch.tensor([0, 1])).square().mean().backward()
    without = {key for key, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0}
    unused = {key for key, _ in model.named_parameters() if "k_pan" in key} if name == "released" else set()
    assert without == unused  # the release never uses its PAN keys


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_16_bits_and_autocast_stay_near_float32(name):
    model = randomised(small(name))
    pan, _, ms = (2047 * x for x in images(8, 8))
    exact = model.sharpen(pan, ms, 2047)
    with torch.autocast("cpu", torch.bfloat16):
        cast = model.sharpen(pan, ms, 2047)
    halves = [copy.deepcopy(model).to(dtype).sharpen(pan, ms, 2047) for dtype in (torch.bfloat16, torch.float16)]
    detail = (exact - F.interpolate(ms, scale_factor=4, mode="bicubic")).abs().max()
    for ours in (cast, *halves):
        assert ours.dtype == torch.float32
        assert 0 < (ours - exact).abs().max() < 0.05 * detail


@pytest.mark.parametrize("name", ["released", "tiny"])
def test_compiles_without_graph_breaks(name):
    model = randomised(small(name))
    arguments = (*images(8, 8), torch.ones(1))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        close(compiled(*arguments), model(*arguments))


@needs_interpreter
@pytest.mark.parametrize("gradient", [False, True])
def test_compiles_over_the_kernels_of_gpus(gradient):
    """Around cm3a's Triton kernel, which stays one call of an operator; norms are the compiler's."""
    model, arguments = randomised(small("released")), (*images(4, 4), torch.ones(1))
    seen = []

    def look(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    with torch.set_grad_enabled(gradient), use_backend("triton"):
        expected = model(*arguments)
        close(torch.compile(model, fullgraph=True, backend=look)(*arguments), expected)
    assert sum("cm3a_fwd_triton" in each for each in seen) == 5
    assert not any("norm_fwd" in each for each in seen)


@pytest.mark.parametrize(
    ("pan", "ms", "message"),
    [
        ((1, 1, 16, 16), (1, 4, 8, 8), "ratio 4 is the only one supported"),
        ((1, 1, 16, 16), (1, 3, 4, 4), "ms: expected 4 bands, got 3"),
        ((1, 2, 16, 16), (1, 4, 4, 4), "pan: expected shape"),
        ((2, 1, 16, 16), (1, 4, 4, 4), "ms: expected a batch of 2"),
        ((1, 16, 16), (1, 4, 4, 4), "pan: expected shape"),
        ((1, 1, 16, 16), (4, 4, 4), "ms: expected shape"),
        ((1, 1, 0, 16), (1, 4, 0, 4), "ms: expected at least one pixel"),
    ],
)
def test_shapes_that_do_not_fit(pan, ms, message):
    with pytest.raises(ValueError, match=message):
        PANCrafter(small("tiny")).sharpen(torch.zeros(pan), torch.zeros(ms), 2047)


def test_other_bad_arguments():
    model = PANCrafter(small("released"))
    pan, lpan, ms = images(3, 3)
    with pytest.raises(ValueError, match="multiples of 8"):
        model(pan, lpan, ms, torch.ones(1))
    with pytest.raises(ValueError, match="lpan: expected shape"):
        model(pan, pan, ms, torch.ones(1))
    with pytest.raises(ValueError, match="peak: expected a positive number, got 0"):
        model.sharpen(pan, ms, 0)
    with pytest.raises(ValueError, match="preset: expected one of"):
        preset("huge")


@pytest.mark.parametrize(
    "changes",
    [
        {"norm": "batch"},
        {"attention_keys": "mine"},
        {"depth": (1,)},
        {"stem_stride": 3},
        {"attention_scales": (7,)},
        {"bands": 0},
    ],
)
def test_bad_configurations(changes):
    with pytest.raises(ValueError, match=f"{next(iter(changes))}: expected"):
        preset("tiny", **changes)


def test_configuration_round_trip():
    config = preset("tiny", bands=8)
    assert PANCrafterConfig(**json.loads(json.dumps(config.to_dict()))) == config


@needs_interpreter
@pytest.mark.parametrize("name", PRESETS)
def test_passes_of_gpus(name):
    """The network by the Triton kernels, two modes in one batch."""
    model, arguments = randomised(small(name)), (*images(4, 8, batch=2), torch.tensor([1, 0]))
    with torch.no_grad():
        expected = model(*arguments)
        with use_backend("triton"):
            close(model(*arguments), expected)


def test_images_may_be_finer_than_the_network():
    """A network in bfloat16 forms differences of images in theirs."""
    model, arguments = randomised(small("released")), (*(0.7 + 0.02 * x for x in images(8, 8)), torch.ones(1))
    with torch.no_grad():
        expected = model(*arguments)
        model.bfloat16()
        fine, coarse = model(*arguments), model(*(each.bfloat16() for each in arguments))
    assert fine.dtype == torch.bfloat16
    assert (fine - expected).norm() < (coarse - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("heads", [2, 4])
def test_transposed_keys_keep_the_layout(heads):
    keys = torch.randn(2, 16, 8, 8)
    expected = transposed_keys(keys, heads)
    wide = torch.cat([keys, keys], 1).contiguous(memory_format=torch.channels_last)
    for given in (keys.contiguous(memory_format=torch.channels_last), wide[:, :16]):
        actual = transposed_keys(given, heads)
        assert torch.equal(actual, expected)
        assert actual.is_contiguous(memory_format=torch.channels_last)
