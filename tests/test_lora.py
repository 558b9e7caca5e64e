"""Adapters: token order and codes, the swap, the fine-tuning loop, and PEFT as the independent reference."""

import hashlib
import json
import math
import warnings

import pytest
import torch
from conftest import MODULES, tiny_rows
from torch import Tensor

from config import UserError
from data import make_example
from generator import TokenCode, frame_tokens, from_tokens, to_tokens, unframe_tokens
from lora import (
    Layout,
    LoraLinear,
    attach_lora,
    average_adapters,
    clear_adapters,
    find_layout,
    init_adapter,
    load_adapter,
    position_code,
    rate,
    save_adapter,
    swap_adapter,
    train_adapter,
)
from scoring import gold_row, lm_loss, make_row

# type, layers, hidden, inner, heads, key-value heads, width, rank -> tokens, D
PAPER_MODELS = [
    ("qwen2", 24, 896, 4864, 14, 2, 128, 8, 4296, 4_399_104),
    ("qwen2", 28, 1536, 8960, 12, 2, 256, 16, 4508, 18_464_768),
    ("llama", 30, 576, 1536, 9, 3, 192, 8, 1590, 2_442_240),
]


def random_adapter(layout: Layout, seed: int = 0, b_scale: float = 0.1) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    out = {}
    for a, a_shape, b, b_shape in layout.keys():
        out[a], out[b] = (
            torch.randn(a_shape, generator=g),
            b_scale * torch.randn(b_shape, generator=g),
        )
    return out


def digest(adapter) -> str:
    h = hashlib.sha256()
    for k in sorted(adapter):
        h.update(k.encode() + adapter[k].contiguous().numpy().tobytes())
    return h.hexdigest()


def examples(lm, count: int = 6):
    return [make_example("beta", r, "cloze") for r in tiny_rows("beta", count)]


# ----------------------------------------------------------------------------------------------- layout


@pytest.mark.parametrize(
    "kind, layers, hidden, inner, heads, kv, width, rank, tokens, size", PAPER_MODELS
)
def test_paper_models_token_counts(
    kind, layers, hidden, inner, heads, kv, width, rank, tokens, size
):
    """Token count and D of the three real models, from their shapes alone."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        kind,
        vocab_size=8,
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=kv,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layout = find_layout(model, rank, 2 * rank, width, MODULES)
    assert (layout.num_tokens, layout.size, layout.scale) == (tokens, size, 2.0)
    assert layout.num_tokens * rank * width == size and len(layout.modules) == 7 * layers


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text"])
def test_layout_of_any_decoder(kind, tiny_architecture):
    """The adapted linears are found by name in every architecture, in token order, also once they
    are wrapped."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_architecture(kind))
    layout = find_layout(model, 4, 8, 16, MODULES)
    assert [(p.rsplit(".", 1)[1], layer) for p, layer, *_ in layout.modules] == [
        (m, layer) for layer in (0, 1) for m in MODULES
    ]
    assert [m[2:] for m in layout.modules[:7]] == [
        (32, 32),
        (32, 16),
        (32, 16),
        (32, 32),
        (32, 64),
        (32, 64),
        (64, 32),
    ]
    assert layout.num_tokens == 2 * (4 + 3 + 3 + 4 + 6 + 6 + 6)
    attach_lora(model, layout)
    attach_lora(model, layout)  # once is enough
    assert find_layout(model, 4, 8, 16, MODULES) == layout
    wrapped = [m for m in model.modules() if isinstance(m, LoraLinear)]
    assert len(wrapped) == 14 and not any(isinstance(m.base, LoraLinear) for m in wrapped)
    assert not any(p.requires_grad for p in model.parameters())


def test_layout_faults_name_the_way_out(tiny_lm):
    """A module name that matches nothing lists those there are; a width that divides nothing lists
    those that do."""
    with pytest.raises(UserError, match=r"\['c_attn'\] not found .*'down_proj', 'gate_proj'"):
        find_layout(tiny_lm.model, 4, 8, 16, ["q_proj", "c_attn"])
    with pytest.raises(
        UserError, match=r"model\.token_width: 24 .*\[16, 32, 64\]; legal: \[8, 16\]"
    ):
        find_layout(tiny_lm.model, 4, 8, 24, MODULES)


def test_token_order_golden(tiny_lm):
    """Layers ascending; q, k, v, o, up, gate, down inside a layer (up before gate); all A blocks before all
    B blocks."""
    layout = tiny_lm.layout
    adapter, expected = {}, []
    for n, ((path, layer, d_in, d_out), (a, a_shape, b, b_shape)) in enumerate(
        zip(layout.modules, layout.keys(), strict=True)
    ):
        assert path.endswith(MODULES[n % 7]) and layer == n // 7
        adapter[a], adapter[b] = torch.full(a_shape, n + 0.25), torch.full(b_shape, n + 0.75)
        expected += [n + 0.25] * (d_in // 16) + [n + 0.75] * (d_out // 16)
    tokens = to_tokens(adapter, layout)
    assert tokens.shape == (64, 4, 16) and tokens[:, 0, 0].tolist() == expected
    assert tokens.std((1, 2)).max() == 0  # no block mixes two parameters
    up, gate = ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_proj")
    names = [m[0] for m in layout.modules]
    assert names.index(up) + 1 == names.index(gate)


def test_tokens_of_asymmetric_shapes_golden():
    """A (r, d_in) is cut along its columns, B (d_out, r) along its rows and transposed."""
    layout = Layout((("m.layers.0.q_proj", 0, 4, 6),), 2, 4, 2)
    ((a, _, b, _),) = layout.keys()
    adapter = {a: torch.arange(8.0).view(2, 4), b: torch.arange(12.0).view(6, 2)}
    prefix = "base_model.model.m.layers.0.q_proj"
    assert (a, b) == (f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight")
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
    """from_tokens(to_tokens(x)) is x bit for bit, and to_tokens(from_tokens(t)) is t, in any shape."""
    layout = Layout(modules, rank, 2 * rank, width)
    adapter = random_adapter(layout)
    tokens = to_tokens(adapter, layout)
    back = from_tokens(tokens, layout)
    assert tokens.shape == (layout.num_tokens, rank, width) and list(back) == list(adapter)
    assert all(torch.equal(back[k], adapter[k]) and back[k].is_contiguous() for k in adapter)
    noise = torch.randn_like(tokens)
    assert torch.equal(to_tokens(from_tokens(noise, layout), layout), noise)
    with pytest.raises(ValueError, match="this layout has"):
        from_tokens(tokens[1:], layout)


# ------------------------------------------------------------------------------------------ weight codes


def checkpoints(layout: Layout, count: int = 5, seed: int = 0) -> Tensor:
    """(C, T, r, k) tokens as training leaves them: A at its initialisation plus drift, B small."""
    start, out = init_adapter(layout, 1), []
    for i in range(count):
        drift = random_adapter(layout, seed + i)
        out.append(
            to_tokens(
                {k: start[k] + (1e-3 if "lora_A" in k else 2e-2) * drift[k] for k in start}, layout
            )
        )
    return torch.stack(out)


@pytest.mark.parametrize("kind", ["dnd", "zlog", "fixed", "element"])
def test_code_round_trip(kind, tiny_lm):
    """decode(encode(x)) is x to 1e-6 of the weights' scale, for one checkpoint or a batch, in the
    announced shape."""
    tokens = checkpoints(tiny_lm.layout)
    code = TokenCode.fit(kind, tiny_lm.layout, tokens)
    framed = kind in ("dnd", "zlog")
    coded = code.encode(tokens)
    assert code.shape == ((64, 6, 18) if framed else (64, 4, 16)) and coded.shape == (
        5,
        *code.shape,
    )
    assert coded.dtype == torch.float32 and torch.isfinite(coded).all()
    assert (code.decode(coded) - tokens).abs().max() < 1e-6
    assert torch.equal(code.encode(tokens[2]), coded[2])
    assert torch.equal(code.decode(coded[2]), code.decode(coded)[2])
    kept = TokenCode(kind, tiny_lm.layout, code.constants)  # as read back from a generator file
    assert torch.equal(kept.decode(coded), code.decode(coded))


@pytest.mark.parametrize("kind", ["dnd", "zlog", "fixed", "element"])
def test_code_of_zero_blocks(kind, tiny_lm):
    """B = 0, as before the first step, is coded without NaN and decodes to zero."""
    tokens = torch.stack(
        [to_tokens(init_adapter(tiny_lm.layout, s), tiny_lm.layout) for s in range(4)]
    )
    zero = tokens.abs().amax((0, 2, 3)) == 0
    assert zero.sum() == 32  # the B tokens, half of all
    code = TokenCode.fit(kind, tiny_lm.layout, tokens)
    coded = code.encode(tokens)
    back = code.decode(coded)
    assert torch.isfinite(coded).all() and (back - tokens).abs().max() < 1e-6
    assert back[:, zero].abs().max() < 1e-7


@pytest.mark.parametrize("kind", ["dnd", "zlog", "fixed", "element"])
def test_code_of_weights_that_never_change(kind, tiny_lm):
    """Weights equal in all checkpoints have no spread: nothing divides by zero and they decode to
    themselves."""
    tokens = checkpoints(tiny_lm.layout, 1).expand(7, -1, -1, -1)
    code = TokenCode.fit(kind, tiny_lm.layout, tokens)
    coded = code.encode(tokens)
    assert torch.isfinite(coded).all() and (code.decode(coded) - tokens).abs().max() < 1e-6


def test_codes_are_standardised(tiny_lm):
    """element: every element has mean 0 and variance 1 over checkpoints; fixed: one pair per
    parameter tensor."""
    tokens = checkpoints(tiny_lm.layout, 6)
    z = TokenCode.fit("element", tiny_lm.layout, tokens).encode(tokens)
    assert z.mean(0).abs().max() < 1e-3 and (z.std(0) - 1).abs().max() < 1e-3
    code = TokenCode.fit("fixed", tiny_lm.layout, tokens)
    assert code.constants["mean"].shape == (64, 1, 1) and len(code.constants["std"].unique()) == 28
    q_a = torch.cat([t[:2].reshape(-1) for t in tokens])  # the two A tokens of layer 0's q_proj
    assert torch.allclose(code.constants["std"][:2].reshape(-1), q_a.std().expand(2))
    assert torch.allclose(code.constants["mean"][:2].reshape(-1), q_a.mean().expand(2))


def test_dnd_frame_golden():
    """One (2, 2) block by hand: content standardised, m = 8 mu, s = ln(0.9 sd + 0.1) + 1.6, tiles [[m,
    s], [m, s]]."""
    layout = Layout((("l.0.a", 0, 2, 2),), 2, 4, 2)
    block = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    sd = math.sqrt(5 / 3)
    c, m, s = (
        [[(x - 2.5) / sd for x in row] for row in block.tolist()],
        20.0,
        math.log(0.9 * sd + 0.1) + 1.6,
    )
    coded = TokenCode("dnd", layout, {}).encode(block[None])
    expected = torch.tensor([[[*c[0], m, s], [*c[1], m, s], [m, s, m, s], [m, s, m, s]]])
    assert torch.allclose(coded, expected, atol=1e-6)
    assert TokenCode("dnd", layout, {}).shape == (2, 4, 4)


def test_frame_is_read_back_as_the_mean_of_both_sides():
    """Codes are the mean over the bottom tiles and over the right tiles, averaged; scrambled content
    changes nothing."""
    m, s = torch.tensor([3.0, -1.0]), torch.tensor([0.5, 2.0])
    framed = frame_tokens(torch.randn(2, 4, 6), m, s)
    assert framed.shape == (2, 6, 8)
    scrambled = framed.clone()
    scrambled[:, :4, :6] = torch.randn(2, 4, 6) * 100
    _, m2, s2 = unframe_tokens(scrambled)
    assert torch.allclose(m2, m) and torch.allclose(s2, s)
    one = framed.clone()
    one[0, 5, 0] += 8.0  # one of 8 bottom cells of m (2 rows x 4 tiles): 8/8/2
    one[0, 0, 7] += 6.0  # one of 6 right cells of s: 6/6/2
    _, m3, s3 = unframe_tokens(one)
    assert torch.allclose(m3, m + torch.tensor([0.5, 0.0]))
    assert torch.allclose(s3, s + torch.tensor([0.5, 0.0]))


@pytest.mark.parametrize("kind", ["dnd", "zlog"])
def test_scrambled_content_keeps_the_scale(kind, tiny_lm):
    """Mean and spread of a decoded block come from the frame, not from the content around it."""
    tokens = checkpoints(tiny_lm.layout)
    code = TokenCode.fit(kind, tiny_lm.layout, tokens)
    coded = code.encode(tokens[0])
    noise = torch.randn(64, 4, 16)
    noise = (noise - noise.mean((1, 2), keepdim=True)) / noise.std((1, 2), keepdim=True)
    coded[:, :4, :16] = noise
    back = code.decode(coded)
    assert torch.allclose(back.mean((1, 2)), tokens[0].mean((1, 2)), atol=1e-6)
    assert torch.allclose(back.std((1, 2)), tokens[0].std((1, 2)), atol=1e-6, rtol=1e-4)


def test_negative_predicted_spread_is_zero():
    """s below its value at sd = 0 would flip the sign of a block; it decodes to the block's mean instead."""
    layout = Layout((("l.0.a", 0, 2, 2),), 2, 4, 2)
    code = TokenCode("dnd", layout, {})
    low = frame_tokens(
        torch.tensor([[[1.0, -1.0], [2.0, -2.0]]]), torch.tensor([4.0]), torch.tensor([-1.0])
    )
    assert math.log(0.1) + 1.6 > -1.0 and torch.equal(code.decode(low), torch.full((1, 2, 2), 0.5))


def test_codes_decode_in_float32(tiny_lm):
    """A prediction in bfloat16 is decoded in float32."""
    tokens = checkpoints(tiny_lm.layout)
    code = TokenCode.fit("dnd", tiny_lm.layout, tokens)
    assert code.decode(code.encode(tokens).bfloat16()).dtype == torch.float32


def test_position_code_golden(tiny_lm):
    """Half the channels number the token in its layer, half the layer; all rows differ; width must
    divide by 4."""
    code = position_code(tiny_lm.layout, 8)
    assert code.shape == (64, 8) and len(torch.unique(code, dim=0)) == 64
    assert torch.allclose(code[0], torch.tensor([0.0, 0, 1, 1, 0, 0, 1, 1]))
    second_layer_third = torch.tensor(
        [
            math.sin(2),
            math.sin(0.02),
            math.cos(2),
            math.cos(0.02),
            math.sin(1),
            math.sin(0.01),
            math.cos(1),
            math.cos(0.01),
        ]
    )
    assert torch.allclose(code[32 + 2], second_layer_third, atol=1e-6)
    with pytest.raises(ValueError, match="multiple of 4"):
        position_code(tiny_lm.layout, 6)


# -------------------------------------------------------------------------------------------------- swap


def test_base_model_is_restored_bit_for_bit(tiny_lm):
    """Logits after swap and clear, or swap of None, equal those of the untouched model; weights
    never change."""
    ids = torch.randint(0, 400, (2, 17), generator=torch.Generator().manual_seed(0))
    before = {k: v.clone() for k, v in tiny_lm.model.state_dict().items()}
    with torch.no_grad():
        bare = tiny_lm.model(ids).logits
        swap_adapter(tiny_lm.model, tiny_lm.layout, random_adapter(tiny_lm.layout))
        changed = tiny_lm.model(ids).logits
        clear_adapters(tiny_lm.model)
        cleared = tiny_lm.model(ids).logits
        swap_adapter(tiny_lm.model, tiny_lm.layout, random_adapter(tiny_lm.layout, b_scale=0.0))
        zero = tiny_lm.model(ids).logits
        swap_adapter(tiny_lm.model, tiny_lm.layout, None)
        none = tiny_lm.model(ids).logits
    assert torch.equal(bare, cleared) and torch.equal(bare, none) and torch.equal(bare, zero)
    assert (bare - changed).abs().max() > 0.1
    assert all(torch.equal(v, before[k]) for k, v in tiny_lm.model.state_dict().items())


def test_lora_linear_by_hand():
    """y = W x + b + (alpha/r) B A x, the same with and without gradients."""
    torch.manual_seed(0)
    base = torch.nn.Linear(6, 4).requires_grad_(False)
    layer, x = LoraLinear(base, 2.0), torch.randn(3, 5, 6)
    layer.A, layer.B = torch.randn(2, 6), torch.randn(4, 2)
    expected = base(x) + 2.0 * x @ layer.A.t() @ layer.B.t()
    assert torch.allclose(layer(x), expected, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(layer(x), expected, atol=1e-5)
    layer.A = layer.B = None
    assert torch.equal(layer(x), base(x))


def test_layouts_of_two_ranks_share_a_model(tiny_lm):
    """The policy's adapter and a task adapter take turns in one model, each with its own scale."""
    other = find_layout(tiny_lm.model, 2, 2, 1, ["q_proj", "v_proj"])
    attach_lora(tiny_lm.model, other)
    ids = torch.tensor([[5, 6, 7, 8]])
    adapter, small = random_adapter(tiny_lm.layout), random_adapter(other, 1)
    with torch.no_grad():
        swap_adapter(tiny_lm.model, tiny_lm.layout, adapter)
        first = tiny_lm.model(ids).logits
        clear_adapters(tiny_lm.model)
        swap_adapter(tiny_lm.model, other, small)
        second = tiny_lm.model(ids).logits
        clear_adapters(tiny_lm.model)
        swap_adapter(tiny_lm.model, tiny_lm.layout, adapter)
        assert torch.equal(tiny_lm.model(ids).logits, first) and not torch.allclose(first, second)
    assert tiny_lm.model.model.layers[0].self_attn.q_proj.scale == 2.0


def test_initial_adapter(tiny_lm):
    """One A for all tasks: two calls give the same bytes, B is zero, A is Kaiming-uniform; another
    seed differs."""
    a, b = init_adapter(tiny_lm.layout, 999), init_adapter(tiny_lm.layout, 999)
    assert digest(a) == digest(b) != digest(init_adapter(tiny_lm.layout, 998))
    for a_key, (_, d_in), b_key, _ in tiny_lm.layout.keys():
        bound = 1 / math.sqrt(d_in)
        assert a[b_key].abs().max() == 0 and 0.9 * bound < a[a_key].abs().max() <= bound
        assert a[a_key].std() == pytest.approx(bound / math.sqrt(3), rel=0.15)


def test_average_of_adapters(tiny_lm):
    """Element-wise mean."""
    a, b = random_adapter(tiny_lm.layout, 0), random_adapter(tiny_lm.layout, 1)
    assert all(torch.allclose(v, (a[k] + b[k]) / 2) for k, v in average_adapters([a, b]).items())


# -------------------------------------------------------------------------------------------------- PEFT


def peft_model(folder):
    """PEFT's own loading of an adapter folder on the plain model; what it warns about (odd keys) is
    an error."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    name = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    base = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)  # of the libraries about each other
        return PeftModel.from_pretrained(base, folder).eval()


def test_saved_adapter_loads_in_peft(tiny_lm, tiny_model_dir, tmp_path):
    """PeftModel.from_pretrained: no missing or unexpected key, the same weights, and the same
    logits as ours."""
    adapter = random_adapter(tiny_lm.layout)
    save_adapter(tmp_path / "a", adapter, tiny_lm.layout, str(tiny_model_dir))
    model = peft_model(tmp_path / "a")
    got = {k.replace(".default", ""): v for k, v in model.state_dict().items() if "lora_" in k}
    assert {k: v.shape for k, v in got.items()} == {k: v.shape for k, v in adapter.items()}
    assert all(torch.equal(got[k], adapter[k]) for k in adapter)
    ids = torch.randint(0, 400, (2, 23), generator=torch.Generator().manual_seed(1))
    swap_adapter(tiny_lm.model, tiny_lm.layout, adapter)
    with torch.no_grad():
        ours, theirs = tiny_lm.model(ids).logits, model(ids).logits
        with model.disable_adapter():
            assert (model(ids).logits - theirs).abs().max() > 0.1
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_peft_complains_about_a_missing_key(tiny_lm, tiny_model_dir, tmp_path):
    """The check above would notice: a key left out is a warning of PEFT's."""
    adapter = random_adapter(tiny_lm.layout)
    adapter.popitem()
    save_adapter(tmp_path / "a", adapter, tiny_lm.layout, str(tiny_model_dir))
    with pytest.raises(UserWarning, match="missing"):
        peft_model(tmp_path / "a")


def test_peft_adapter_loads_in_ours(tiny_lm, tiny_model_dir, tmp_path):
    """An adapter saved by PEFT is read by `load_adapter`, bit for bit."""
    adapter = random_adapter(tiny_lm.layout)
    save_adapter(tmp_path / "a", adapter, tiny_lm.layout, str(tiny_model_dir))
    peft_model(tmp_path / "a").save_pretrained(tmp_path / "b")
    back = load_adapter(tmp_path / "b", tiny_lm.layout)
    assert list(sorted(back)) == sorted(adapter) and all(
        torch.equal(back[k], adapter[k]) for k in adapter
    )


def test_adapter_of_another_shape_is_refused(tiny_lm, tmp_path):
    """Another rank, another module set and a missing file are refused; the odd key, both shapes and the file
    are named."""
    layout = tiny_lm.layout
    other = Layout(layout.modules, 2, 4, layout.width)
    save_adapter(tmp_path / "rank", random_adapter(other), other, "x")
    with pytest.raises(
        UserError,
        match=r"rank/adapter_model\.safetensors: .*lora_A.* is \(2, 64\), expected \(4, 64\)",
    ):
        load_adapter(tmp_path / "rank", layout)
    part = Layout(layout.modules[:3], 4, 8, layout.width)
    save_adapter(tmp_path / "part", random_adapter(part), part, "x")
    with pytest.raises(UserError, match=r"is absent, expected \(4, 64\)"):
        load_adapter(tmp_path / "part", layout)
    with pytest.raises(UserError, match="expected no such key"):
        load_adapter(tmp_path / "rank", Layout(other.modules[:3], 2, 4, 16))
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"none/adapter_model\.safetensors"):
        load_adapter(tmp_path / "none", layout)


# ---------------------------------------------------------------------------------------------- training


def train(lm, start=None, steps=8, lr=5e-3, **more):
    rows = [make_row(lm, e) for e in examples(lm)]
    losses = []
    out = train_adapter(
        lm.model,
        lm.layout,
        start or init_adapter(lm.layout, 0),
        [rows] * steps,
        lambda b: lm_loss(lm, b),
        lr=lambda s: lr,
        clip=1.0,
        on_step=lambda s, value, _: losses.append(value),
        **more,
    )
    return out, losses


def test_training_lowers_the_loss_and_leaves_the_base_alone(tiny_lm):
    """The loss falls on the rows trained on; the base weights and the bare model are as before; A and B
    both moved."""
    before = {k: v.clone() for k, v in tiny_lm.model.state_dict().items()}
    start = init_adapter(tiny_lm.layout, 0)
    keep = {k: v.clone() for k, v in start.items()}
    out, losses = train(tiny_lm, start, steps=15)
    assert losses[-1] < losses[0] - 0.5
    assert all(torch.equal(v, before[k]) for k, v in tiny_lm.model.state_dict().items())
    assert all(m.A is None for m in tiny_lm.model.modules() if isinstance(m, LoraLinear))
    assert all(torch.equal(start[k], keep[k]) for k in keep)  # the start is shared by all tasks
    assert all((out[k] - start[k]).abs().max() > 1e-4 for k in out)
    assert not any(v.requires_grad for v in out.values())


def test_training_is_deterministic(tiny_lm):
    """The same start and rows give the same bytes."""
    assert digest(train(tiny_lm)[0]) == digest(train(tiny_lm)[0])


def test_snapshots_are_copies(tiny_lm):
    """What on_step keeps of one step is not changed by the next."""
    kept = []
    rows = [make_row(tiny_lm, e) for e in examples(tiny_lm, 2)]
    out = train_adapter(
        tiny_lm.model,
        tiny_lm.layout,
        init_adapter(tiny_lm.layout, 0),
        [rows] * 3,
        lambda b: lm_loss(tiny_lm, b),
        lr=lambda s: 1e-2,
        clip=1.0,
        on_step=lambda s, _, snapshot: kept.append(snapshot()),
    )
    assert len({digest(k) for k in kept}) == 3 and digest(kept[-1]) == digest(out)


def test_loss_that_is_not_finite_stops(tiny_lm):
    """FloatingPointError with the step, the last finite loss and the adapter before it; the model is
    left bare."""
    rows = [make_row(tiny_lm, e) for e in examples(tiny_lm, 2)]
    seen = []

    def loss_fn(batch):
        seen.append(lm_loss(tiny_lm, batch))
        return seen[-1] * (float("nan") if len(seen) == 4 else 1.0)

    kept = []
    with pytest.raises(FloatingPointError) as e:
        train_adapter(
            tiny_lm.model,
            tiny_lm.layout,
            init_adapter(tiny_lm.layout, 0),
            [rows] * 6,
            loss_fn,
            lr=lambda s: 1e-2,
            clip=1.0,
            on_step=lambda s, _, snapshot: kept.append(snapshot()),
        )
    step, last, adapter = e.value.args
    assert step == 3 and last == seen[2].item() and digest(adapter) == digest(kept[2])
    assert all(m.A is None for m in tiny_lm.model.modules() if isinstance(m, LoraLinear))


def test_batches_without_a_loss_are_skipped(tiny_lm):
    """No part with a loss (no sample selected) makes no update and counts as a step of the schedule."""
    rows, steps = [make_row(tiny_lm, e) for e in examples(tiny_lm, 2)], []
    out = train_adapter(
        tiny_lm.model,
        tiny_lm.layout,
        init_adapter(tiny_lm.layout, 0),
        [None, rows, None],
        lambda b: () if b is None else lm_loss(tiny_lm, b),
        lr=lambda s: 1e-3,
        clip=1.0,
        on_step=lambda s, *_: steps.append(s),
    )
    assert steps == [1] and digest(out) != digest(init_adapter(tiny_lm.layout, 0))


def trainable(model) -> dict[str, Tensor]:
    """PEFT's A and B by our keys, taking gradients."""
    return {
        k.replace(".default", ""): p.requires_grad_()
        for k, p in model.named_parameters()
        if "lora_" in k
    }


def peft_loss(model, rows) -> Tensor:
    """Mean over rows of the mean NLL of the right answer's tokens, one plain forward pass each."""
    total = 0.0
    for r in map(gold_row, rows):
        ids = [*r.context, *r.branches[0]]
        scored = list(range(len(r.context) + r.starts[0], len(ids)))
        logp = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)
        total = total - torch.stack([logp[i - 1, ids[i]] for i in scored]).mean()
    return total / len(rows)


def test_gradient_equals_peft(tiny_lm, tiny_model_dir, tmp_path):
    """Loss and every gradient equal autograd through PEFT's model, one plain forward per example."""
    adapter = random_adapter(tiny_lm.layout)
    save_adapter(tmp_path / "a", adapter, tiny_lm.layout, str(tiny_model_dir))
    model = peft_model(tmp_path / "a")
    rows = [make_row(tiny_lm, e) for e in examples(tiny_lm, 4)]
    theirs = trainable(model)
    loss = peft_loss(model, rows)
    loss.backward()
    leaves = {k: v.clone().requires_grad_() for k, v in adapter.items()}
    swap_adapter(tiny_lm.model, tiny_lm.layout, leaves)
    ours = lm_loss(tiny_lm, rows)
    assert ours.item() == pytest.approx(loss.item(), abs=1e-5)
    for k, g in zip(leaves, torch.autograd.grad(ours, list(leaves.values())), strict=True):
        assert (g - theirs[k].grad).abs().max() < 1e-5 + 1e-4 * theirs[k].grad.abs().max(), k


def test_training_equals_peft_with_adamw(tiny_lm, tiny_model_dir, tmp_path):
    """Three steps with clipping equal torch's AdamW and clip_grad_norm_ on PEFT's parameters."""
    adapter = random_adapter(tiny_lm.layout)
    save_adapter(tmp_path / "a", adapter, tiny_lm.layout, str(tiny_model_dir))
    model = peft_model(tmp_path / "a")
    theirs = trainable(model)
    opt = torch.optim.AdamW(theirs.values(), lr=1e-2, weight_decay=0.0)
    rows, norms = [make_row(tiny_lm, e) for e in examples(tiny_lm, 4)], []
    for step in range(3):
        opt.param_groups[0]["lr"] = 1e-2 / (step + 1)
        opt.zero_grad()
        peft_loss(model, rows).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(theirs.values(), 0.5)))
        opt.step()
    ours = train_adapter(
        tiny_lm.model,
        tiny_lm.layout,
        adapter,
        [rows] * 3,
        lambda b: lm_loss(tiny_lm, b),
        lr=lambda s: 1e-2 / (s + 1),
        clip=0.5,
    )
    assert min(norms) > 0.5  # the clip is active
    assert max((ours[k] - theirs[k]).abs().max().item() for k in ours) < 2e-4
    moved = torch.cat([(theirs[k] - adapter[k]).reshape(-1) for k in ours])
    apart = torch.cat([(theirs[k] - ours[k]).reshape(-1) for k in ours])
    assert apart.norm() < 1e-3 * moved.norm()


@pytest.mark.parametrize("step, expected", [(0, 0.25), (1, 0.5), (2, 0.75), (3, 1.0), (9, 1.0)])
def test_constant_rate(step, expected):
    """Linear warm-up over three steps, then the peak."""
    assert rate(step, 10, 1.0, 3, "constant") == pytest.approx(expected)


def test_cosine_rate():
    """From the peak after the warm-up to nearly zero at the end; never negative; half-way is half."""
    values = [rate(s, 22, 2.0, 2, "cosine") for s in range(22)]
    assert values[2] == 2.0 and values[12] == pytest.approx(1.0) and 0 < values[-1] < 0.02
    assert all(a > b for a, b in zip(values[2:], values[3:], strict=False))
