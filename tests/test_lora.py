"""Adapters: their layout, the swap, the trainer, and PEFT as the independent reference."""

import json
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from conftest import MODULES, tiny_rows

import data
import lora
import scoring
from config import UserError
from lora import AdapterTrainer, Layout, LoraLinear

# type, layers, hidden, inner, heads, key-value heads, width, rank -> tokens, D
PAPER_MODELS = [
    ("qwen2", 24, 896, 4864, 14, 2, 128, 8, 4296, 4_399_104),
    ("qwen2", 28, 1536, 8960, 12, 2, 256, 16, 4508, 18_464_768),
    ("llama", 30, 576, 1536, 9, 3, 192, 8, 1590, 2_442_240),
]


def random_adapter(layout, seed=0, b_scale=0.1):
    rng = torch.Generator().manual_seed(seed)
    adapter = {}
    for a_key, a_shape, b_key, b_shape in layout.keys():
        adapter[a_key] = torch.randn(a_shape, generator=rng)
        adapter[b_key] = b_scale * torch.randn(b_shape, generator=rng)
    return adapter


def same(first, second):
    """Bit for bit."""
    if first.keys() != second.keys():
        return False
    return all(torch.equal(first[key], second[key]) for key in first)


def copy_of(tensors):
    return {key: tensor.clone() for key, tensor in tensors.items()}


def rows_of(lm, count=6):
    rows = []
    for record in tiny_rows("beta", count):
        example = data.make_example("beta", record, "cloze")
        rows.append(scoring.make_row(lm, example))
    return rows


def random_ids(*shape):
    return torch.randint(0, 400, shape, generator=torch.Generator().manual_seed(0))


def wrapped_layers(model):
    return [module for module in model.modules() if isinstance(module, LoraLinear)]


def is_bare(model):
    layers = wrapped_layers(model)
    left = [layer for layer in layers if layer.A is not None or layer.B is not None]
    return bool(layers) and not left


@torch.no_grad()
def logits_with(lm, layout, adapter, ids):
    lora.swap_adapter(lm.model, layout, adapter)
    return lm.model(ids).logits


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
    layout = lora.find_layout(model, rank, 2 * rank, width, MODULES)
    assert layout.num_tokens == tokens
    assert layout.size == size == tokens * rank * width
    assert layout.scale == 2.0
    assert len(layout.modules) == 7 * layers


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text"])
def test_layout_of_any_decoder(kind, tiny_architecture):
    """The adapted linears are found by name, in token order, also once they are wrapped."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_architecture(kind))
    layout = lora.find_layout(model, 4, 8, 16, MODULES)
    found = [(path.rsplit(".", 1)[1], layer) for path, layer, *_ in layout.modules]
    assert found == [(name, layer) for layer in (0, 1) for name in MODULES]
    sizes = [module[2:] for module in layout.modules[:7]]
    attention = [(32, 32), (32, 16), (32, 16), (32, 32)]
    assert sizes == [*attention, (32, 64), (32, 64), (64, 32)]
    assert layout.num_tokens == 2 * (4 + 3 + 3 + 4 + 6 + 6 + 6)

    lora.attach_lora(model, layout)
    lora.attach_lora(model, layout)  # once is enough
    assert lora.find_layout(model, 4, 8, 16, MODULES) == layout
    layers = wrapped_layers(model)
    assert len(layers) == 14
    assert not any(isinstance(layer.base, LoraLinear) for layer in layers)
    assert not any(p.requires_grad for p in model.parameters())


def test_a_vision_tower_is_not_adapted():
    """Of a model of images and text the layout is that of the text decoder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    shape["num_attention_heads"] = 4
    text = shape | {"vocab_size": 400, "num_key_value_heads": 2, "head_dim": 8}
    vision = shape | {"image_size": 28, "patch_size": 14}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layout = lora.find_layout(model, 4, 8, 16, ["q_proj"])
    assert [path for path, *_ in layout.modules] == [
        f"model.language_model.layers.{i}.self_attn.q_proj" for i in (0, 1)
    ]


def test_layout_faults_name_the_way_out(tiny_lm):
    """A module name that matches nothing, a width that divides nothing: the legal are listed."""
    with pytest.raises(UserError, match=r"\['c_attn'\] not found .*'down_proj', 'gate_proj'"):
        lora.find_layout(tiny_lm.model, 4, 8, 16, ["q_proj", "c_attn"])
    expected = r"model\.token_width: 24 .*\[16, 32, 64\]; legal: \[8, 16\]"
    with pytest.raises(UserError, match=expected):
        lora.find_layout(tiny_lm.model, 4, 8, 24, MODULES)


def test_flat_vector_and_back(tiny_lm):
    """Module by module, A before B; back again bit for bit, as views."""
    layout = tiny_lm.layout
    adapter = random_adapter(layout)
    vector = lora.flatten_adapter(adapter, layout)
    assert vector.shape == (layout.size,)
    first = f"base_model.model.{layout.modules[0][0]}.lora_A.weight"
    assert torch.equal(vector[: 4 * 32], adapter[first].flatten())
    back = lora.unflatten_adapter(vector, layout)
    assert list(back) == list(adapter) and same(back, adapter)
    vector.zero_()
    assert back[first].abs().max() == 0


def test_base_model_is_restored_bit_for_bit(tiny_lm):
    """Logits after a clear, or a swap of None, are the untouched model's; weights never change."""
    model, layout = tiny_lm.model, tiny_lm.layout
    ids = random_ids(2, 17)
    before = copy_of(model.state_dict())
    with torch.no_grad():
        bare = model(ids).logits
        changed = logits_with(tiny_lm, layout, random_adapter(layout), ids)
        lora.clear_adapters(model)
        cleared = model(ids).logits
    zero = logits_with(tiny_lm, layout, random_adapter(layout, b_scale=0.0), ids)
    none = logits_with(tiny_lm, layout, None, ids)
    assert torch.equal(bare, cleared)
    assert torch.equal(bare, none)
    assert torch.equal(bare, zero)
    assert (bare - changed).abs().max() > 0.1
    assert same(dict(model.state_dict()), before)


def test_lora_linear_by_hand():
    """y = W x + b + (alpha/r) B A x, the same with and without gradients."""
    torch.manual_seed(0)
    base = torch.nn.Linear(6, 4).requires_grad_(False)
    layer = LoraLinear(base, 2.0)
    x = torch.randn(3, 5, 6)
    layer.A = torch.randn(2, 6)
    layer.B = torch.randn(4, 2)
    expected = base(x) + 2.0 * x @ layer.A.t() @ layer.B.t()
    assert torch.allclose(layer(x), expected, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(layer(x), expected, atol=1e-5)
    layer.A = layer.B = None
    assert torch.equal(layer(x), base(x))


def test_gradients_of_an_adapted_product():
    """For x, A and B, and gradients of these gradients, against finite differences."""
    torch.manual_seed(0)
    weight = torch.randn(4, 6, dtype=torch.float64)
    bias = torch.randn(4, dtype=torch.float64)
    x, a, b = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in ((5, 6), (2, 6), (4, 2))
    )

    def product(x, a, b):
        return lora.AdaptedProduct.apply(x, weight, bias, a, b, 2.0)

    assert torch.autograd.gradcheck(product, (x, a, b))
    assert torch.autograd.gradgradcheck(product, (x, a, b))


def test_layouts_of_two_ranks_share_a_model(tiny_lm):
    """The policy's adapter and a task adapter take turns in one model, each with its own scale."""
    layout = tiny_lm.layout
    other = lora.find_layout(tiny_lm.model, 2, 2, 1, ["q_proj", "v_proj"])
    lora.attach_lora(tiny_lm.model, other)
    ids = torch.tensor([[5, 6, 7, 8]])
    adapter = random_adapter(layout)
    first = logits_with(tiny_lm, layout, adapter, ids)
    lora.clear_adapters(tiny_lm.model)
    second = logits_with(tiny_lm, other, random_adapter(other, 1), ids)
    lora.clear_adapters(tiny_lm.model)
    assert torch.equal(logits_with(tiny_lm, layout, adapter, ids), first)
    assert not torch.allclose(first, second)
    assert tiny_lm.model.model.layers[0].self_attn.q_proj.scale == 2.0


def test_initial_adapter(tiny_lm):
    """One A for all tasks: two calls give the same bytes. B is zero, A is Kaiming-uniform."""
    adapter = lora.init_adapter(tiny_lm.layout, 999)
    again = lora.init_adapter(tiny_lm.layout, 999)
    other = lora.init_adapter(tiny_lm.layout, 998)
    assert same(adapter, again)
    assert lora.adapter_hash(adapter) == lora.adapter_hash(again) != lora.adapter_hash(other)
    for a_key, (_, d_in), b_key, _ in tiny_lm.layout.keys():
        bound = 1 / math.sqrt(d_in)
        assert adapter[b_key].abs().max() == 0
        assert 0.9 * bound < adapter[a_key].abs().max() <= bound
        assert adapter[a_key].std() == pytest.approx(bound / math.sqrt(3), rel=0.15)


def test_average_of_adapters(tiny_lm):
    """Element-wise mean."""
    first = random_adapter(tiny_lm.layout, 0)
    second = random_adapter(tiny_lm.layout, 1)
    for key, mean in lora.average_adapters([first, second]).items():
        assert torch.allclose(mean, (first[key] + second[key]) / 2)


def peft_model(folder):
    """PEFT's own loading of an adapter folder on the plain model; its warnings are errors."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    name = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    base = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)  # of the libraries about each other
        return PeftModel.from_pretrained(base, folder).eval()


def model_config(name) -> SimpleNamespace:
    """What a PEFT folder says of the section `model`."""
    return SimpleNamespace(name=str(name), revision="main")


def trainable(model):
    """PEFT's A and B by our keys, taking gradients."""
    found = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            found[name.replace(".default", "")] = parameter.requires_grad_()
    return found


@pytest.fixture
def saved(tiny_lm, tiny_model_dir, tmp_path):
    """A random adapter, and the folder it is saved in."""
    adapter = random_adapter(tiny_lm.layout)
    lora.save_adapter(tmp_path / "a", adapter, tiny_lm.layout, model_config(tiny_model_dir))
    return adapter, tmp_path / "a"


def test_saved_adapter_loads_in_peft(tiny_lm, saved):
    """PEFT's own loading: no key missing or unexpected, the same weights and logits as ours."""
    adapter, folder = saved
    model = peft_model(folder)
    assert same(trainable(model), adapter)

    ids = random_ids(2, 23)
    ours = logits_with(tiny_lm, tiny_lm.layout, adapter, ids)
    with torch.no_grad():
        theirs = model(ids).logits
        with model.disable_adapter():
            assert (model(ids).logits - theirs).abs().max() > 0.1
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_the_saved_configuration_is_pefts(tiny_lm, tiny_model_dir, saved):
    """LoraConfig reads all that was said back, and no temporary file stays."""
    from peft import LoraConfig

    _, folder = saved
    config = LoraConfig.from_pretrained(folder)
    assert config.base_model_name_or_path == str(tiny_model_dir)
    assert config.revision == "main"
    assert (config.r, config.lora_alpha) == (4, 8)
    assert config.target_modules == set(MODULES)
    assert config.inference_mode
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors"]


def test_peft_complains_about_a_missing_key(tiny_lm, tiny_model_dir, tmp_path):
    """The check above would notice: a key left out is a warning of PEFT's."""
    adapter = random_adapter(tiny_lm.layout)
    adapter.popitem()
    lora.save_adapter(tmp_path / "a", adapter, tiny_lm.layout, model_config(tiny_model_dir))
    with pytest.raises(UserWarning, match="missing"):
        peft_model(tmp_path / "a")


def test_peft_adapter_loads_in_ours(tiny_lm, saved, tmp_path):
    """An adapter saved by PEFT is read by `load_adapter`, bit for bit."""
    adapter, folder = saved
    peft_model(folder).save_pretrained(tmp_path / "b")
    assert same(lora.load_adapter(tmp_path / "b", tiny_lm.layout), adapter)


def test_adapter_of_another_shape_is_refused(tiny_lm, tmp_path):
    """Another rank, module set or scale and a missing file are refused; what and where is named."""
    layout = tiny_lm.layout
    rank = Layout(layout.modules, 2, 4, 16)
    part = Layout(layout.modules[:3], 4, 8, 16)
    scale = Layout(layout.modules, 4, 4, 16)
    for name, other in (("rank", rank), ("part", part), ("scale", scale)):
        lora.save_adapter(tmp_path / name, random_adapter(other), other, model_config("x"))
    (tmp_path / "none").mkdir()
    refused = [
        ("rank", layout, r"rank/adapter_model\.safetensors: .*lora_A.* is \(2, 64\), .*\(4, 64\)"),
        ("part", layout, r"is absent, expected \(4, 64\)"),
        ("rank", Layout(layout.modules[:3], 2, 4, 16), "expected no such key"),
        (
            "scale",
            layout,
            r"scale/adapter_config\.json: lora_alpha is 4, .* a scale of 1, expected 2",
        ),
        ("none", layout, r"none/adapter_model\.safetensors"),
    ]
    for name, expected, message in refused:
        with pytest.raises(UserError, match=message):
            lora.load_adapter(tmp_path / name, expected)


def train(lm, start, steps):
    rows = rows_of(lm)
    losses = []
    with AdapterTrainer(lm.model, lm.layout, start) as trainer:
        for _ in range(steps):
            losses.append(trainer.backward(scoring.lm_loss(lm, rows)))
            trainer.step(5e-3)
    return trainer.adapter(), losses


@pytest.fixture
def start(tiny_lm):
    return lora.init_adapter(tiny_lm.layout, 0)


def test_training_lowers_the_loss_and_leaves_the_base_alone(tiny_lm, start):
    """The base weights, the shared start and the bare model are as before; A and B both moved."""
    before = copy_of(tiny_lm.model.state_dict())
    kept = copy_of(start)
    trained, losses = train(tiny_lm, start, steps=15)
    assert losses[-1] < losses[0] - 0.5
    assert same(dict(tiny_lm.model.state_dict()), before)
    assert is_bare(tiny_lm.model)
    assert same(start, kept)
    for key, tensor in trained.items():
        assert (tensor - start[key]).abs().max() > 1e-4
        assert not tensor.requires_grad


def test_training_is_deterministic(tiny_lm, start):
    """The same start and rows give the same bytes."""
    assert same(train(tiny_lm, start, 8)[0], train(tiny_lm, start, 8)[0])


def test_snapshots_are_copies(tiny_lm, start):
    """The adapter of one step is not changed by the next."""
    rows = rows_of(tiny_lm, 2)
    kept = []
    with AdapterTrainer(tiny_lm.model, tiny_lm.layout, start) as trainer:
        for _ in range(3):
            trainer.backward(scoring.lm_loss(tiny_lm, rows))
            trainer.step(1e-2)
            kept.append(trainer.adapter())
    assert len({lora.adapter_hash(adapter) for adapter in kept}) == 3
    assert same(kept[-1], trainer.adapter())


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_loss_that_is_not_finite_is_nan(tiny_lm, start, factor):
    """backward says nan, the adapter before it is kept, and the model is left bare."""
    rows = rows_of(tiny_lm, 2)
    with AdapterTrainer(tiny_lm.model, tiny_lm.layout, start) as trainer:
        assert math.isfinite(trainer.backward(scoring.lm_loss(tiny_lm, rows)))
        trainer.step(1e-2)
        before = trainer.adapter()
        assert math.isnan(trainer.backward(factor * scoring.lm_loss(tiny_lm, rows)))
        assert same(trainer.adapter(), before)
    assert is_bare(tiny_lm.model)


def test_the_model_is_left_bare_after_an_error(tiny_lm, start):
    with pytest.raises(KeyError), AdapterTrainer(tiny_lm.model, tiny_lm.layout, start):
        raise KeyError
    assert is_bare(tiny_lm.model)


def test_no_part_makes_no_update(tiny_lm, start):
    """No part with a loss (no sample selected): None, and the adapter stays."""
    with AdapterTrainer(tiny_lm.model, tiny_lm.layout, start) as trainer:
        assert trainer.backward(()) is None
        assert same(trainer.adapter(), start)


def test_parts_equal_the_whole(tiny_lm, monkeypatch):
    """Two unequal parts give the loss and the gradient of the whole, one part its very bits."""
    rows = rows_of(tiny_lm)
    losses = []
    gradients = []
    adapter = random_adapter(tiny_lm.layout)
    with AdapterTrainer(tiny_lm.model, tiny_lm.layout, adapter) as trainer:
        whole = scoring.lm_loss(tiny_lm, rows)
        one = scoring.loss_in_parts(tiny_lm, rows, scoring.lm_loss)
        for loss in (whole, one):
            losses.append(trainer.backward(loss))
            gradients.append(trainer.master.grad)
        monkeypatch.setattr(scoring, "parts_of", lambda lm, rows: [rows[:2], rows[2:]])
        parts = scoring.loss_in_parts(tiny_lm, rows, scoring.lm_loss)
        loss = trainer.backward(parts)
    assert losses[0] == losses[1] == pytest.approx(loss, abs=1e-6)
    assert torch.equal(gradients[0], gradients[1])
    gap = trainer.master.grad - gradients[0]
    assert gap.norm() < 1e-5 * gradients[0].norm()


def test_masters_are_float32(tiny_model_dir):
    """Steps too small for bfloat16 add up in the masters, until the model sees them."""
    model, _ = scoring.load_base(str(tiny_model_dir), "main", torch.bfloat16, "cpu")
    layout = lora.find_layout(model, 4, 8, 16, ["q_proj"])
    lora.attach_lora(model, layout)
    start = {key: torch.ones(shape) for key, shape in layout.shapes().items()}
    layer = model.model.layers[0].self_attn.q_proj
    with AdapterTrainer(model, layout, start) as trainer:
        for _ in range(3):  # AdamW moves every entry by lr
            trainer.backward(sum(leaf.sum() for leaf in trainer.leaves))
            trainer.step(1e-3)
            seen = layer.A.float()
            assert layer.A.dtype == torch.bfloat16
        for tensor in trainer.adapter().values():
            assert tensor.dtype == torch.float32
            assert torch.allclose(tensor, torch.full_like(tensor, 0.997), atol=1e-5)
        assert torch.equal(seen, torch.full_like(seen, 0.997).bfloat16().float())


def peft_loss(model, rows):
    """Mean over rows of the mean NLL of the right answer's tokens, one plain forward pass each."""
    total = 0.0
    for row in map(scoring.gold_row, rows):
        ids = [*row.context, *row.branches[0]]
        scored = range(len(row.context) + row.starts[0], len(ids))
        logp = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)
        total = total - torch.stack([logp[i - 1, ids[i]] for i in scored]).mean()
    return total / len(rows)


def test_gradient_equals_peft(tiny_lm, saved):
    """Loss and every gradient equal autograd through PEFT's model, one forward per example."""
    adapter, folder = saved
    model = peft_model(folder)
    rows = rows_of(tiny_lm, 4)
    theirs = trainable(model)
    loss = peft_loss(model, rows)
    loss.backward()

    leaves = {key: tensor.clone().requires_grad_() for key, tensor in adapter.items()}
    lora.swap_adapter(tiny_lm.model, tiny_lm.layout, leaves)
    ours = scoring.lm_loss(tiny_lm, rows)
    assert ours.item() == pytest.approx(loss.item(), abs=1e-5)
    gradients = torch.autograd.grad(ours, list(leaves.values()))
    for key, gradient in zip(leaves, gradients, strict=True):
        expected = theirs[key].grad
        assert (gradient - expected).abs().max() < 1e-5 + 1e-4 * expected.abs().max(), key


def test_training_equals_peft_with_adamw(tiny_lm, saved, monkeypatch):
    """Three steps with clipping equal torch's AdamW and clip_grad_norm_ on PEFT's parameters."""
    monkeypatch.setattr(lora, "CLIP", 0.5)
    adapter, folder = saved
    model = peft_model(folder)
    theirs = trainable(model)
    optimizer = torch.optim.AdamW(theirs.values(), lr=1e-2, weight_decay=0.0)
    rows = rows_of(tiny_lm, 4)
    for step in range(3):
        optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)
        optimizer.zero_grad()
        peft_loss(model, rows).backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.values(), 0.5)
        assert norm > 0.5  # the clip is active
        optimizer.step()

    with AdapterTrainer(tiny_lm.model, tiny_lm.layout, adapter) as trainer:
        for step in range(3):
            trainer.backward(scoring.lm_loss(tiny_lm, rows))
            trainer.step(1e-2 / (step + 1))
    ours = lora.flatten_adapter(trainer.adapter(), tiny_lm.layout)
    before = lora.flatten_adapter(adapter, tiny_lm.layout)
    expected = lora.flatten_adapter(theirs, tiny_lm.layout).detach()
    assert (ours - expected).abs().max() < 2e-4
    assert (ours - expected).norm() < 1e-3 * (expected - before).norm()


@pytest.mark.parametrize("step, expected", [(0, 0.25), (1, 0.5), (2, 0.75), (3, 1.0), (9, 1.0)])
def test_constant_rate(step, expected):
    """Linear warm-up over three steps, then the peak."""
    assert lora.rate(step, 10, 1.0, 3, "constant") == pytest.approx(expected)


def test_cosine_rate():
    """From the peak after the warm-up to nearly zero at the end; half-way is half."""
    values = [lora.rate(step, 22, 2.0, 2, "cosine") for step in range(22)]
    assert values[2] == 2.0
    assert values[12] == pytest.approx(1.0)
    assert 0 < values[-1] < 0.02
    falling = values[2:]
    assert falling == sorted(falling, reverse=True)
    assert len(set(falling)) == len(falling)
