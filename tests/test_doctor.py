"""Shapes against the papers' numbers, predictions against the embedded run, refusals that name a key."""

from types import SimpleNamespace

import pytest
import torch

import doctor
from config import UserError, load_config
from lora import find_layout
from runtime import Run


def shapes(*words):
    cfg, _ = load_config(list(words))
    model = doctor.meta_model(cfg)
    layout = find_layout(
        model, cfg.model.rank, cfg.model.alpha, cfg.model.token_width, cfg.model.modules
    )
    return cfg, model, layout, doctor.token_shape(cfg, layout)


@pytest.mark.parametrize(
    "preset, lines",
    [
        (
            "qwen2.5-0.5b",
            ["4,296 tokens of (10,130)", "D = 4,399,104", "1,113,203,220 generator parameters"],
        ),
        (
            "qwen2.5-1.5b",
            ["4,508 tokens of (18,258)", "D = 18,464,768", "1,152,535,192 generator parameters"],
        ),
    ],
)
def test_the_papers_presets_offline(tmp_path, capsys, monkeypatch, preset, lines):
    """The papers' counts, without weights or network."""
    cfg, _ = load_config([f"config=configs/{preset}.yaml"])
    monkeypatch.setattr(doctor, "machine", lambda run: (128.0, 1000.0, 1e14))
    doctor.examine(cfg, Run(tmp_path, cfg, dtype=torch.bfloat16))
    text = capsys.readouterr().out
    assert all(line in text for line in lines) and "predicted, not measured" in text
    assert {"collect", "generator", "adapt", "evaluate"} <= {
        line.split()[0] for line in text.splitlines() if line
    }


@pytest.mark.parametrize("preset, count", [("qwen2.5-0.5b", 4.13e12), ("qwen2.5-1.5b", 6.84e12)])
def test_multiplications_are_those_of_the_flow(preset, count):
    """4.13 and 6.84 T multiply-adds a sample."""
    cfg, _, _, tokens = shapes(f"config=configs/{preset}.yaml")
    assert doctor.multiplications(cfg, tokens) == pytest.approx(count, rel=0.002)


def test_multiplications_against_a_count_of_the_modules():
    """The formula equals what torch counts on a small decoder, borders of the kernel included."""
    from torch.utils.flop_counter import FlopCounterMode

    from generator import HyperConvDecoder

    cfg = SimpleNamespace(generator=SimpleNamespace(flow=[[4, 16, 32], [4, 8, 16]], kernel=3))
    decoder = HyperConvDecoder([*cfg.generator.flow, [12, 4, 8]], 3)
    with FlopCounterMode(display=False) as counter:
        decoder(torch.randn(1, 4, 16, 32))
    assert counter.get_total_flops() == 2 * doctor.multiplications(cfg, (12, 4, 8))


def test_embedded_predictions_are_near_what_was_measured(tmp_path):
    """Within a factor of two and a half of the committed run's core-seconds, at one core's share of 750 GFLOP/s."""
    from config import ROOT
    from runtime import read_json

    cfg, model, layout, tokens = shapes("config=configs/smollm2.yaml")
    measured = read_json(ROOT / "results/smollm2/results.json")["seconds"]
    needs = doctor.predict(
        cfg, Run(tmp_path, cfg, dtype=torch.bfloat16), model, layout, tokens, 12_951_972, 375e9
    )
    for stage in ("collect", "generator"):
        assert 0.4 < 3600 * needs[stage].hours / measured[stage] < 2.5, stage


def test_what_cannot_fit_is_refused_by_key(tmp_path, monkeypatch):
    """Memory and disk faults come together, each with what to change."""
    cfg, _ = load_config(["config=configs/qwen2.5-1.5b.yaml"])
    monkeypatch.setattr(doctor, "machine", lambda run: (20.0, 10.0, 1e12))
    with pytest.raises(UserError) as e:
        doctor.examine(cfg, Run(tmp_path, cfg, dtype=torch.bfloat16))
    assert "stage=generator needs about" in str(e.value) and "generator.micro_batch" in str(e.value)
    assert "collect.save_last" in str(e.value)


def test_four_ranks_share_a_nodes_main_memory(tmp_path, monkeypatch):
    """On GPUs every rank holds the generator's targets in the node's main memory, and that is refused by key too."""
    cfg, model, layout, tokens = shapes("config=configs/qwen2.5-1.5b.yaml")
    run = Run(tmp_path, cfg, 0, 4, "cuda", torch.bfloat16)
    found = {}
    for beside in (1, 4):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(beside))
        found[beside] = doctor.predict(run, model, layout, tokens, 1_152_535_192, 1e14)["generator"]
    targets = 6 * 50 * 4 * 4508 * 18 * 258 / 2**30  # tasks, checkpoints, float32, tokens
    assert found[4].host - found[1].host == pytest.approx(3 * targets) and found[4].memory < 40
    monkeypatch.setattr(doctor, "host_memory", lambda: 64.0)
    with pytest.raises(UserError, match="main memory, 64 are there: lower collect.save_last"):
        doctor.refuse({"generator": found[4]}, 80.0, 1000.0, "cuda")


def test_only_the_stages_that_run_are_predicted(tmp_path):
    """MAML alone needs neither checkpoints nor generators."""
    cfg, model, layout, tokens = shapes("config=configs/tempo-maml-qvo-qwen2.5-0.5b.yaml")
    needs = doctor.predict(
        cfg, Run(tmp_path, cfg, dtype=torch.bfloat16), model, layout, tokens, 544_000_000, 1e14
    )
    assert set(needs) == {"baselines", "evaluate"}


def test_a_posterior_over_whole_matrices(tmp_path):
    """12.3 GB resident, measured on SmolLM2: two ranks were killed on 24 GiB."""
    cfg, model, layout, tokens = shapes(
        "config=configs/smollm2.yaml",
        "baselines.abmll.space=product",
        "evaluate.methods=[base, degaml_plus, abmll]",
    )
    needs = doctor.predict(
        cfg, Run(tmp_path, cfg, dtype=torch.bfloat16), model, layout, tokens, 12_951_972, 1e12
    )
    assert needs["baselines"].memory == pytest.approx(12.3e9 / 2**30, rel=0.15)


def test_an_unknown_model_says_where_shapes_come_from():
    with pytest.raises(
        UserError, match=r"model\.name=who/knows: .*config\.json.*configs/models\.yaml"
    ):
        doctor.meta_model(load_config(["model.name=who/knows"])[0])
