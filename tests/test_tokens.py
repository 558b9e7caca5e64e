"""Weight tokens: their order, the way back, and the codes a generator learns them in."""

import math

import pytest
import torch
from conftest import MODULES
from test_lora import random_adapter, same

import lora
from generator import TokenCode, frame_tokens, from_tokens, to_tokens, unframe_tokens
from lora import Layout

ONE_BLOCK = Layout((("l.0.a", 0, 2, 2),), 2, 4, 2)  # two tokens: A and B, (2, 2) each
KINDS = ["dnd", "element"]


def test_token_order_golden(tiny_lm):
    """Layers ascend; in each q, k, v, o, up, gate, down (up before gate); A before B."""
    layout = tiny_lm.layout
    adapter = {}
    expected = []
    for n, (a_key, a_shape, b_key, b_shape) in enumerate(layout.keys()):
        path, layer, d_in, d_out = layout.modules[n]
        assert path.endswith(MODULES[n % 7])
        assert layer == n // 7
        adapter[a_key] = torch.full(a_shape, n + 0.25)
        adapter[b_key] = torch.full(b_shape, n + 0.75)
        expected += [n + 0.25] * (d_in // 16) + [n + 0.75] * (d_out // 16)
    tokens = to_tokens(adapter, layout)
    assert tokens.shape == (64, 4, 16)
    assert tokens[:, 0, 0].tolist() == expected
    assert tokens.std((1, 2)).max() == 0  # no block mixes two parameters
    names = [module[0] for module in layout.modules]
    up = names.index("model.layers.0.mlp.up_proj")
    assert names[up + 1] == "model.layers.0.mlp.gate_proj"


def test_tokens_of_asymmetric_shapes_golden():
    """A (r, d_in) is cut along its columns, B (d_out, r) along its rows and transposed."""
    layout = Layout((("m.layers.0.q_proj", 0, 4, 6),), 2, 4, 2)
    prefix = "base_model.model.m.layers.0.q_proj"
    adapter = {
        f"{prefix}.lora_A.weight": torch.arange(8.0).view(2, 4),
        f"{prefix}.lora_B.weight": torch.arange(12.0).view(6, 2),
    }
    assert list(layout.shapes()) == list(adapter)
    assert to_tokens(adapter, layout).tolist() == [
        [[0, 1], [4, 5]],
        [[2, 3], [6, 7]],
        [[0, 2], [1, 3]],
        [[4, 6], [5, 7]],
        [[8, 10], [9, 11]],
    ]


@pytest.mark.parametrize(
    "modules, rank, width",
    [
        ((("l.0.a", 0, 6, 10), ("l.0.b", 0, 4, 2), ("l.1.a", 1, 2, 8)), 3, 2),
        ((("l.0.a", 0, 35, 14),), 2, 7),
        ((("l.0.a", 0, 5, 3),), 4, 1),
    ],
)
def test_token_round_trip_is_exact(modules, rank, width):
    """There and back is exact in any shape, from an adapter and from tokens."""
    layout = Layout(modules, rank, 2 * rank, width)
    adapter = random_adapter(layout)
    tokens = to_tokens(adapter, layout)
    assert tokens.shape == (layout.num_tokens, rank, width)
    back = from_tokens(tokens, layout)
    assert list(back) == list(adapter)
    assert same(back, adapter)
    assert all(tensor.is_contiguous() for tensor in back.values())
    noise = torch.randn_like(tokens)
    assert torch.equal(to_tokens(from_tokens(noise, layout), layout), noise)
    with pytest.raises(ValueError, match="this layout has"):
        from_tokens(tokens[1:], layout)


def checkpoints(layout, count=5):
    """(C, T, r, k) tokens as training leaves them: A at its initialisation plus drift, B small."""
    start = lora.init_adapter(layout, 1)
    found = []
    for i in range(count):
        adapter = {}
        drift = random_adapter(layout, i)
        for a_key, _, b_key, _ in layout.keys():
            adapter[a_key] = start[a_key] + 1e-3 * drift[a_key]
            adapter[b_key] = start[b_key] + 2e-2 * drift[b_key]
        found.append(to_tokens(adapter, layout))
    return torch.stack(found)


@pytest.mark.parametrize("kind, shape", [("dnd", (64, 6, 18)), ("element", (64, 4, 16))])
def test_code_round_trip(kind, shape, tiny_lm):
    """decode(encode(x)) is x to 1e-6, for one checkpoint or a batch, in the announced shape."""
    tokens = checkpoints(tiny_lm.layout)
    code = TokenCode.fit(kind, tiny_lm.layout, tokens)
    coded = code.encode(tokens)
    decoded = code.decode(coded)
    assert code.shape == shape
    assert coded.shape == (5, *shape)
    assert coded.dtype == torch.float32
    assert torch.isfinite(coded).all()
    assert (decoded - tokens).abs().max() < 1e-6
    assert torch.equal(code.encode(tokens[2]), coded[2])
    assert torch.equal(code.decode(coded[2]), decoded[2])
    kept = TokenCode(kind, tiny_lm.layout, code.constants)  # as read back from a generator file
    assert torch.equal(kept.decode(coded), decoded)


@pytest.mark.parametrize("kind", KINDS)
def test_code_of_zero_blocks(kind, tiny_lm):
    """B = 0, as before the first step, is coded without NaN and decodes to zero."""
    layout = tiny_lm.layout
    starts = [lora.init_adapter(layout, seed) for seed in range(4)]
    tokens = torch.stack([to_tokens(start, layout) for start in starts])
    zero = tokens.abs().amax((0, 2, 3)) == 0
    assert zero.sum() == 32  # the B tokens, half of all
    code = TokenCode.fit(kind, layout, tokens)
    coded = code.encode(tokens)
    back = code.decode(coded)
    assert torch.isfinite(coded).all()
    assert (back - tokens).abs().max() < 1e-6
    assert back[:, zero].abs().max() < 1e-7


@pytest.mark.parametrize("kind", KINDS)
def test_code_of_weights_that_never_change(kind, tiny_lm):
    """Weights equal in all checkpoints: nothing divides by zero and they decode to themselves."""
    tokens = checkpoints(tiny_lm.layout, 1).expand(7, -1, -1, -1)
    code = TokenCode.fit(kind, tiny_lm.layout, tokens)
    coded = code.encode(tokens)
    assert torch.isfinite(coded).all()
    assert (code.decode(coded) - tokens).abs().max() < 1e-6


def test_element_code_is_standardised(tiny_lm):
    """Every element has mean 0 and variance 1 over the checkpoints."""
    tokens = checkpoints(tiny_lm.layout, 6)
    coded = TokenCode.fit("element", tiny_lm.layout, tokens).encode(tokens)
    assert coded.mean(0).abs().max() < 1e-3
    assert (coded.std(0) - 1).abs().max() < 1e-3


def test_dnd_frame_golden():
    """One block by hand: standardised, and framed by tiles of 8 mu and ln(0.9 sd + 0.1) + 1.6."""
    block = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    sd = math.sqrt(5 / 3)
    (a, b), (c, d) = ((block[0] - 2.5) / sd).tolist()
    m = 20.0
    s = math.log(0.9 * sd + 0.1) + 1.6
    code = TokenCode("dnd", ONE_BLOCK, {})
    expected = torch.tensor([[[a, b, m, s], [c, d, m, s], [m, s, m, s], [m, s, m, s]]])
    assert torch.allclose(code.encode(block), expected, atol=1e-6)
    assert code.shape == (2, 4, 4)


def test_frame_is_read_back_as_the_mean_of_both_sides():
    """The mean over the bottom tiles and over the right tiles, averaged, whatever the content."""
    m = torch.tensor([3.0, -1.0])
    s = torch.tensor([0.5, 2.0])
    framed = frame_tokens(torch.randn(2, 4, 6), m, s)
    assert framed.shape == (2, 6, 8)
    scrambled = framed.clone()
    scrambled[:, :4, :6] = torch.randn(2, 4, 6) * 100
    _, m_read, s_read = unframe_tokens(scrambled)
    assert torch.allclose(m_read, m)
    assert torch.allclose(s_read, s)

    framed[0, 5, 0] += 8.0  # one of 8 bottom cells of m (2 rows x 4 tiles): 8/8/2
    framed[0, 0, 7] += 6.0  # one of 6 right cells of s: 6/6/2
    _, m_read, s_read = unframe_tokens(framed)
    shift = torch.tensor([0.5, 0.0])
    assert torch.allclose(m_read, m + shift)
    assert torch.allclose(s_read, s + shift)


def test_scrambled_content_keeps_the_scale(tiny_lm):
    """Mean and spread of a decoded block come from the frame, not from the content around it."""
    tokens = checkpoints(tiny_lm.layout)
    code = TokenCode.fit("dnd", tiny_lm.layout, tokens)
    coded = code.encode(tokens[0])
    noise = torch.randn(64, 4, 16)
    noise -= noise.mean((1, 2), keepdim=True)
    coded[:, :4, :16] = noise / noise.std((1, 2), keepdim=True)
    back = code.decode(coded)
    assert torch.allclose(back.mean((1, 2)), tokens[0].mean((1, 2)), atol=1e-6)
    assert torch.allclose(back.std((1, 2)), tokens[0].std((1, 2)), atol=1e-6, rtol=1e-4)


def test_negative_predicted_spread_is_zero():
    """s below its value at sd = 0 would flip a block's sign; it decodes to the block's mean."""
    content = torch.tensor([[[1.0, -1.0], [2.0, -2.0]]])
    assert math.log(0.1) + 1.6 > -1.0
    low = frame_tokens(content, torch.tensor([4.0]), torch.tensor([-1.0]))
    back = TokenCode("dnd", ONE_BLOCK, {}).decode(low)
    assert torch.equal(back, torch.full((1, 2, 2), 0.5))


def test_codes_decode_in_float32(tiny_lm):
    """A prediction in bfloat16 is decoded in float32."""
    tokens = checkpoints(tiny_lm.layout)
    code = TokenCode.fit("dnd", tiny_lm.layout, tokens)
    predicted = code.encode(tokens).bfloat16()
    assert code.decode(predicted).dtype == torch.float32
