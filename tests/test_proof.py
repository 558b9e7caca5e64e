"""The base model is proved before the hours: architectures that are read right, and others."""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from conftest import load_lm, save_tiny

import degaml
import proof
from config import UserError, load_config
from runtime import Run

ALL_ATTENTION = ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "cohere", "granite"]
HYBRID = {
    "qwen3_5_text": {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "gpt_oss": {},  # attention sinks
    "mamba": {},
}


def open_lm(folder, kind, modules=("q_proj", "v_proj"), **shape):
    return load_lm(save_tiny(folder, kind, **shape), 4, 8, 16, list(modules))


@pytest.mark.parametrize("kind", ALL_ATTENTION)
def test_layers_of_attention_are_ready(tmp_path, kind):
    lm = open_lm(tmp_path, kind)
    (line,) = proof.prove_model(lm)
    assert "down_proj (2)" in line
    assert "q_proj" not in line
    assert lm.model.config._attn_implementation == "packed"


@pytest.mark.parametrize("kind", HYBRID)
def test_other_layers_are_refused(tmp_path, kind):
    """In one sentence, with how far the scores are off or what the model's code says."""
    modules = ["in_proj"] if kind == "mamba" else ["q_proj", "v_proj"]
    lm = open_lm(tmp_path, kind, modules, **HYBRID[kind])
    with pytest.raises(UserError) as e:
        proof.prove_model(lm)
    assert "nats a token" in str(e.value) or "cannot compute" in str(e.value)
    assert "attention" in str(e.value)


def test_a_window_shorter_than_a_row_is_refused(tmp_path):
    """A mask of our own replaces the window: rows must fit into it."""
    shape = {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}
    lm = open_lm(tmp_path, "gemma3_text", **shape)
    lm.max_tokens = 48
    proof.prove_model(lm)
    lm.max_tokens = 256
    with pytest.raises(UserError, match="lower data.max_tokens below its window of 64"):
        proof.prove_model(lm)


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


def test_experts_without_an_adapter_are_named(tmp_path):
    (line,) = proof.prove_model(open_lm(tmp_path, "qwen3_moe", **EXPERTS))
    assert "experts' gate_up_proj (2)" in line


def test_layers_beside_experts_are_refused(tmp_path):
    """Their names are those of the experts, to PEFT: it would leave them out when it loads."""
    modules = ["q_proj", "gate_proj", "up_proj", "down_proj"]
    shape = EXPERTS | {"shared_expert_intermediate_size": 64}
    lm = open_lm(tmp_path, "qwen2_moe", modules, **shape)
    with pytest.raises(UserError, match="take down_proj, gate_proj, up_proj for the experts'"):
        proof.prove_model(lm)


def test_a_layer_that_does_more_than_multiply_is_refused(tmp_path):
    """BitNet scales its product: an adapter would see another layer than the bare model has."""

    class Scaled(torch.nn.Linear):
        def forward(self, x):
            return 0.25 * super().forward(x)

    lm = open_lm(tmp_path, "llama")
    for layer in lm.model.model.layers:
        layer.self_attn.v_proj.base.__class__ = Scaled
    with pytest.raises(UserError, match="an adapter that changes nothing moves scores by"):
        proof.prove_model(lm)


def test_a_module_without_gradient_is_named(tmp_path):
    """A layer that is there and not used."""
    lm = open_lm(tmp_path, "llama")
    attention = lm.model.model.layers[1].self_attn
    real = attention.forward
    attention.forward = lambda *args, **more: (0 * real(*args, **more)[0], None)
    with pytest.raises(UserError, match=r"such as model.layers.1.self_attn.q_proj"):
        proof.prove_model(lm)


def test_a_tokenizer_of_another_model(tmp_path):
    lm = open_lm(tmp_path, "llama", vocab_size=300)
    with pytest.raises(UserError, match="400 tokens and the embedding 300 rows"):
        proof.prove_model(lm)


def test_check_refuses_and_says_what_is_left_out(tiny_args, tmp_path, capsys):
    assert degaml.main([*tiny_args, "stage=check", "model.modules=[q_proj, v_proj]"]) == 0
    assert "not adapted, as model.modules does not name them: down_proj" in capsys.readouterr().out
    folder = save_tiny(tmp_path / "hybrid", "lfm2", **HYBRID["lfm2"])
    words = [f"model.name={folder}", "model.modules=[q_proj, v_proj]"]
    assert degaml.main([*tiny_args, "stage=check", *words]) == 2
    assert "its layers are of conv, full_attention" in capsys.readouterr().err


def test_a_cache_that_forgets_is_refused(tiny_lm, monkeypatch):
    """Written answers go on behind a cached prompt: it must be what it was."""
    decoder = tiny_lm.model.get_decoder()
    real = decoder.forward

    def forgetful(*args, past_key_values=None, **more):
        if past_key_values is not None:
            for layer in past_key_values.layers:
                layer.values = layer.values.roll(1, 2)
        return real(*args, past_key_values=past_key_values, **more)

    monkeypatch.setattr(decoder, "forward", forgetful)
    with pytest.raises(UserError, match="written answers differ behind a padded and cached prompt"):
        proof.prove_model(tiny_lm)


def test_a_template_that_thinks_is_named(tiny_lm):
    """Where thinking cannot be turned off a line says so; a template that fails is refused."""
    lm = dataclasses.replace(tiny_lm, form="letter")
    lm.tokenizer = copy.deepcopy(lm.tokenizer)
    lm.tokenizer.chat_template = "{{ messages[0].content }}{{ messages[-1].content }}<think>\n"
    assert "the chat template opens <think>" in proof.prove_model(lm)[0]
    lm.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match="chat template cannot be rendered .roles must alternate"):
        proof.prove_model(lm)


def test_the_record_is_trusted_until_something_changes(tiny_args, monkeypatch):
    """proof.json: one proof per model, format, dtype and length."""
    proved = []
    real = proof.prove_model
    monkeypatch.setattr(proof, "prove_model", lambda lm: proved.append(1) or real(lm))
    for words, times in (([], 1), ([], 1), (["data.max_tokens=64"], 2)):
        cfg, _ = load_config([*tiny_args, *words])
        run = Run(Path(cfg.run), cfg)
        run.path.mkdir(exist_ok=True)
        proof.ensure(run)
        assert len(proved) == times


def test_weights_that_are_not_there(tmp_path):
    """transformers fills them with random numbers; here they are named."""
    from safetensors.torch import load_file, save_file

    folder = save_tiny(tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"it lacks 1 weights, such as model\.layers\.1\.mlp"):
        load_lm(folder, 4, 8, 16, ["q_proj"])
