"""The papers' presets, run: every stage under their own code paths, on a small random Qwen2."""

import pytest
from conftest import as_words, run_command, save_tiny

import config
import methods
import runtime

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
    "data.train_tasks": ["alpha", "beta", "gamma"],
    "data.test_tasks": ["delta"],
    "data.targets": ["alpha", "delta"],
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
    "report.paper": "none",
}


PRESETS = ["qwen2.5-0.5b", "tempo-qwen2.5-0.5b", "tempo-maml-qvo-qwen2.5-0.5b"]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_stage_runs_on_a_small_copy(
    preset, tmp_path, tiny_encoder_dir, tiny_jsonl, one_thread
):
    """Each method on each task, generated answers and log-likelihoods scored."""
    folder = tmp_path / "run"
    settings = SMALL | {
        "config": f"configs/{preset}.yaml",
        "run": str(folder),
        "model.name": str(save_tiny(tmp_path / "qwen", "qwen2", **SHAPES)),
        "generator.encoder": str(tiny_encoder_dir),
        "data.jsonl": tiny_jsonl,
    }
    # of 60 rows 8 are the support set; a training task keeps half of the rest
    scored = {"alpha": 6, "delta": 6}
    few_methods = preset.startswith("tempo-maml")
    if few_methods:  # so all the test examples that the preset asks for and a task has
        settings["data.num_test"] = 5000
        scored = {"alpha": 26, "delta": 52}
    words = as_words(settings)
    cfg, _ = config.load_config(words)
    assert cfg.data.format == "letter"
    assert cfg.evaluate.generate
    assert cfg.generator.scale_code == "dnd"

    assert run_command([*words, "stage=all"]) == 0
    # only where a method needs them
    assert (folder / "adapters").exists() != few_methods
    assert (folder / "generator").exists() != few_methods
    results = runtime.read_json(folder / "report/results.json")
    for task, count in scored.items():
        entries = results["tasks"][task]["methods"]
        wanted = set(cfg.evaluate.methods)
        if task == "delta":
            wanted = {m for m in wanted if methods.METHODS[m].domain == "both"}
        assert set(entries) == wanted
        for entry in entries.values():
            assert {"acc_strict", "acc_lenient", "acc_raw", "acc_norm"} <= set(entry)
            assert entry["n"] == count
