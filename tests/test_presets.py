"""A dress rehearsal: every preset of the papers from start to end on a small random Qwen2.

What a preset chooses stays chosen. Places are ours, for there is no hub here. Numbers are smaller.
"""

import math
from pathlib import Path

import numpy as np
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
# where things are: another model, other tasks, local files
PLACES = (
    "run",
    "device",
    "model.name",
    "generator.encoder",
    "data.source",
    "data.jsonl",
    "data.train_tasks",
    "data.test_tasks",
    "data.targets",
)
# the one number that grows: with 400 words in the vocabulary the same JSON has more tokens
GROWS = ("policy.max_new_tokens",)
SMALLER = {
    "model.token_width": 16,
    "data.num_train": 24,
    "data.num_support": 4,
    "data.num_prompts": 12,
    "data.max_tokens": 512,
    "collect.pretrain_steps": 3,
    "collect.finetune_steps": 2,
    "collect.batch_size": 4,
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
    "strategies.max_ttl_steps": 2,
    "strategies.max_prompt_batches": 2,
    "strategies.max_slot_steps": 2,
    "strategies.max_sft_steps": 2,
    "strategies.max_batch_size": 2,
    "policy.proposals": 10,
    "policy.iterations": 1,
    "policy.epochs": 1,
    "policy.folds": 2,
    "policy.max_new_tokens": 200,
    "baselines.union.step_share": 0.2,
    "baselines.maml.meta_steps": 2,
    "baselines.maml.test_steps": 2,
    "baselines.abmll.meta_steps": 2,
    "evaluate.prompt_batches": 1,
    "evaluate.max_new_tokens": 4,
    "evaluate.token_budget": 1024,
}
PRESETS = sorted(path.stem for path in Path(config.ROOT / "configs").glob("*qwen2.5*.yaml"))


def needless(preset: str, settings: dict) -> list[str]:
    """The overridden keys that are neither a place nor a smaller number than the preset's."""
    cfg, _ = config.load_config([f"config=configs/{preset}.yaml"])
    shipped = config.flatten(cfg.model_dump())
    found = []
    for key, value in settings.items():
        if key in (*PLACES, *GROWS):
            continue
        before = shipped[key]
        if key == "generator.flow":
            fewer = math.prod(np.ravel(value).tolist()) < math.prod(np.ravel(before).tolist())
        else:
            fewer = type(before) in (int, float) and value < before
        if not fewer:
            found.append(key)
    return found


@pytest.mark.parametrize(
    "key, value",
    [
        ("evaluate.metric", "norm"),
        ("evaluate.generate", False),
        ("strategies.proposal_grid", {"TTT.ttl_steps": [2]}),
        ("policy.mode", "per_task"),
        ("policy.distinct", False),
        ("generator.condition", "input"),
        ("collect.save_last", 2),
        ("data.num_test", 6),
        ("data.prompts_from", "train"),
        ("evaluate.methods", ["base"]),
        ("generator.steps", 4000),
    ],
)
def test_a_choice_of_the_preset_may_not_be_overridden(key, value):
    """The rehearsal shows the preset as it is shipped, or it shows nothing."""
    assert needless("qwen2.5-0.5b", {key: value}) == [key]


def fewer_rows(tiny_jsonl, folder) -> dict[str, str]:
    """The first 26 rows of each task: with `num_test: all` the rest of them are the test."""
    files = {}
    for task in ("alpha", "beta", "gamma", "delta"):
        rows = runtime.read_jsonl(Path(tiny_jsonl[task]))
        runtime.write_jsonl(folder / f"{task}.jsonl", rows[:26])
        files[task] = str(folder / f"{task}.jsonl")
    return files


@pytest.mark.parametrize("preset", PRESETS)
def test_every_stage_runs_on_a_small_copy(
    preset, tmp_path, tiny_encoder_dir, tiny_jsonl, one_thread
):
    """Each method on each task, generated answers and log-likelihoods scored, then the analysis."""
    folder = tmp_path / "run"
    settings = SMALLER | {
        "run": str(folder),
        "device": "cpu",
        "model.name": str(save_tiny(tmp_path / "qwen", "qwen2", **SHAPES)),
        "generator.encoder": str(tiny_encoder_dir),
        "data.source": "jsonl",
        "data.jsonl": fewer_rows(tiny_jsonl, tmp_path),
        "data.train_tasks": ["alpha", "beta", "gamma"],
        "data.test_tasks": ["delta"],
        "data.targets": ["alpha", "delta"],
    }
    shipped, _ = config.load_config([f"config=configs/{preset}.yaml"])
    if shipped.collect.save_last != "all":
        settings["collect.save_last"] = 4
    if len(shipped.baselines.sft):  # its own settings are carried out as they are
        settings = {key: v for key, v in settings.items() if not key.startswith("strategies.")}
    assert needless(preset, settings) == []
    words = as_words({"config": f"configs/{preset}.yaml", **settings})
    cfg, _ = config.load_config(words)

    assert run_command([*words, "stage=check"]) == 0
    assert run_command([*words, "stage=all"]) == 0
    # only where a method needs them
    few_methods = preset.startswith("tempo-maml")
    assert (folder / "adapters").exists() != few_methods
    assert (folder / "generator").exists() != few_methods
    results = runtime.read_json(folder / "report/results.json")
    for task in ("alpha", "delta"):
        entries = results["tasks"][task]["methods"]
        wanted = set(cfg.evaluate.methods)
        if task == "delta":
            wanted = {m for m in wanted if methods.METHODS[m].domain == "both"}
        assert set(entries) == wanted
        for entry in entries.values():
            assert {"acc_strict", "acc_lenient", "acc_raw", "acc_norm"} <= set(entry)

    # TEMPO's comparison, both sides filled where the preset has both
    assert run_command([*words, "stage=analyze"]) == 0
    found = runtime.read_json(folder / "analysis/analysis.json")
    compared = {m for m in cfg.evaluate.methods if m in found["compared"]}
    assert compared <= set(found["gradients"])
    if preset.startswith("tempo-qwen"):
        assert compared >= {"tempo", "degaml", "maml", "maml_qvo"}
        report = (folder / "report/report.md").read_text()
        assert "DeGAML's avg (6 tasks)" in report
        assert "TEMPO's avg (6 tasks)" in report
