"""The papers' presets, run: every stage under their own code paths, on a random Qwen2 of one eighth of the shapes."""

import json

import pytest
from conftest import run_command, save_tiny

from config import load_config
from runtime import read_json

# Qwen2.5-0.5B's 896, 4,864, 14 and 2 over eight; two of 24 layers
SHAPES = {
    "hidden_size": 112,
    "intermediate_size": 608,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
}
SMALL = {  # sizes and lengths only: what a preset chooses stays chosen
    "device": "cpu",
    "model.token_width": 16,
    "data.source": "jsonl",
    "data.num_train": 24,
    "data.num_support": 8,
    "data.num_test": 6,
    "data.num_prompts": 12,
    "data.max_tokens": 512,
    "collect.pretrain_steps": 3,
    "collect.finetune_steps": 2,
    "collect.batch_size": 4,
    "collect.save_last": 2,
    "generator.max_length": 16,
    "generator.num_prompts": 4,
    "generator.flow": [[4, 16, 32], [8, 8, 16]],
    "generator.steps": 3,
    "generator.pairs_per_task": 6,
    "generator.batch_size": 4,
    "generator.micro_batch": 2,
    "align.draws": 2,
    "align.prompts": 2,
    "align.latent": 4,
    "align.meta_epochs": 2,
    "strategies.proposal_grid": {
        "TTT.ttl_steps": [2],
        "TTT.batch_size": [2],
        "TTS.num_prompt_batches": [2],
        "Latent.slot_steps": [2],
        "SFT.sft_steps": [2],
    },
    "policy.proposals": 5,
    "policy.iterations": 1,
    "policy.epochs": 1,
    "policy.max_new_tokens": 160,
    "baselines.union.step_share": 0.2,
    "baselines.maml.meta_steps": 2,
    "baselines.abmll.meta_steps": 2,
    "evaluate.prompt_batches": 1,
    "evaluate.max_new_tokens": 4,
    "evaluate.token_budget": 1024,
}


@pytest.mark.parametrize(
    "preset", ["qwen2.5-0.5b", "tempo-qwen2.5-0.5b", "tempo-maml-qvo-qwen2.5-0.5b"]
)
def test_every_stage_runs_on_a_small_copy(
    preset, tmp_path_factory, tmp_path, tiny_encoder_dir, tiny_jsonl, one_thread
):
    """Every stage that a method of the preset needs: each method on each task, generated answers and log-likelihoods
    scored."""
    model = save_tiny(tmp_path_factory.mktemp("qwen"), "qwen2", **SHAPES)
    words = [
        f"config=configs/{preset}.yaml",
        f"run={tmp_path / 'run'}",
        f"model.name={model}",
        f"generator.encoder={tiny_encoder_dir}",
        f"data.jsonl={json.dumps(tiny_jsonl)}",
        "data.train_tasks=[alpha, beta, gamma]",
        "data.test_tasks=[delta]",
        "data.targets=[alpha, delta]",
        "report.paper=none",
        *(f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in SMALL.items()),
    ]
    if preset.startswith(
        "tempo-maml"
    ):  # few methods: all the test examples that the preset asks for and a task has
        words.append("data.num_test=5000")
    cfg, _ = load_config(words)
    assert (
        cfg.data.format == "letter" and cfg.evaluate.generate and cfg.generator.scale_code == "dnd"
    )
    assert run_command([*words, "stage=all"]) == 0
    for folder in ("adapters", "generator"):
        assert (tmp_path / "run" / folder).exists() == ("maml-qvo" not in preset), (
            "only where a method needs it"
        )
    results = read_json(tmp_path / "run/report/results.json")
    for task in ("alpha", "delta"):
        entries = results["tasks"][task]["methods"]
        assert set(entries) == {m for m in cfg.evaluate.methods if m != "own" or task == "alpha"}
        for entry in entries.values():
            assert {"acc_strict", "acc_lenient", "acc_raw", "acc_norm"} <= set(entry)
            # of 60 rows 8 are the support set; a training task keeps half of the rest
            assert entry["n"] == (6 if cfg.data.num_test == 6 else {"alpha": 26, "delta": 52}[task])
