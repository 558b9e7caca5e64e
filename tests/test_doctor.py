"""Shapes against the papers' numbers, needs against the embedded run, refusals that name a key."""

from dataclasses import replace
from statistics import mean

import pytest
import torch
from transformers import AutoTokenizer

import data
import doctor
import limits
import runtime
import scoring
from config import ROOT, UserError, load_config
from doctor import GIB
from generator import HyperConvDecoder
from runtime import Run


@pytest.fixture
def untimed(monkeypatch):
    """Steps as on some GPU, so that nothing is timed here: seconds (twice), bytes; seconds."""
    monkeypatch.setattr(doctor, "time_layer", lambda run, model: (1e-3, 1e-4, 3e4))
    monkeypatch.setattr(doctor, "time_decoder", lambda run, flow: 1e-14)


def open_run(folder, preset: str, *words: str) -> Run:
    cfg, _ = load_config([f"config=configs/{preset}.yaml", *words])
    return Run(folder, cfg, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "preset, tokens, size, parameters, work",
    [
        ("qwen2.5-0.5b", "4,296 tokens of (10,130)", "4,399,104", "1,113,203,220", 4.13e12),
        ("qwen2.5-1.5b", "4,508 tokens of (18,258)", "18,464,768", "1,152,535,192", 6.84e12),
    ],
)
def test_the_papers_presets_offline(
    tmp_path, capsys, monkeypatch, untimed, preset, tokens, size, parameters, work
):
    """The papers' counts, without weights or network; multiply-adds of a sample."""
    run = open_run(tmp_path, preset)
    monkeypatch.setattr(doctor, "machine", lambda run: (128 * GIB, 1000 * GIB))
    doctor.examine(run)
    text = capsys.readouterr().out
    assert tokens in text
    assert f"D = {size}\n" in text
    assert f"{parameters} generator parameters" in text
    assert "predicted, not measured" in text
    named = {line.split()[0] for line in text.splitlines() if line}
    assert {"collect", "generator", "policy", "adapt", "evaluate"} <= named

    states = torch.empty(1, *run.cfg.generator.flow[0], device="meta")
    counted = doctor.count_multiplications(doctor.open_case(run).decoder, states)
    assert counted == pytest.approx(work, rel=0.002)


PRESETS = ["qwen2.5-0.5b", "qwen2.5-1.5b", "tempo-qwen2.5-0.5b", "tempo-qwen2.5-1.5b"]


@pytest.mark.parametrize("preset", [*PRESETS, "tempo-maml-qvo-qwen2.5-0.5b"])
def test_answers_and_the_policy_are_counted(tmp_path, untimed, preset):
    """Of all the papers' presets: generated answers take time, and a meta-trained policy too."""
    run = open_run(tmp_path, preset)
    case = doctor.open_case(run)
    needs = doctor.predict(case)
    assert ("policy" in needs) == (run.cfg.policy.mode == "meta")
    run.cfg.evaluate.generate = False
    scored = doctor.predict(case)
    for stage in {"policy", "adapt", "evaluate"} & set(needs):
        assert needs[stage].seconds > scored[stage].seconds
    if "policy" in needs:
        run.cfg.policy.iterations *= 3
        assert doctor.need_policy(case).seconds == pytest.approx(3 * scored["policy"].seconds)
        assert doctor.need_adapt(case).seconds == scored["adapt"].seconds, "it proposes once"


def test_multiplications_are_those_of_the_five_convolutions():
    """Equation 9 by hand on a small decoder, borders of the kernel included."""
    flow = [[4, 16, 32], [4, 8, 16], [12, 4, 8]]
    want = 0
    for (n, m, c), (n2, m2, c2) in zip(flow, flow[1:], strict=False):
        first = c * c2 * n * m + m * m2 * n * c2
        second = m * m2 * n * c + c * c2 * n * m2
        want += 9 * (first + second + n * n2 * m2 * c2)
    counted = doctor.count_multiplications(HyperConvDecoder(flow, 3), torch.randn(1, *flow[0]))
    assert counted == want


def test_kept_bytes_are_those_autograd_saves():
    """A linear layer keeps its input, tanh its output; weights are not counted."""
    network = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh())
    kept = doctor.count_kept(network, torch.randn(4, 8))
    assert kept == 4 * (4 * 8 + 4 * 16)


def test_embedded_predictions_are_near_what_was_measured(tmp_path, assets, one_thread):
    """Steps timed here: generator over collection as in the committed run, within 2.5 times."""
    run = open_run(tmp_path, "smollm2")
    needs = doctor.predict(doctor.open_case(run))
    measured = runtime.read_json(ROOT / "results/smollm2/results.json")["seconds"]
    predicted = needs["generator"].seconds / needs["collect"].seconds
    assert 0.4 < predicted * measured["collect"] / measured["generator"] < 2.5


@pytest.mark.parametrize("form", ["cloze", "letter"])
def test_row_tokens_are_those_of_the_embedded_tasks(tmp_path, assets, form):
    """Means over tasks of the first hundred rows, trained on and scored."""
    run = open_run(tmp_path, "smollm2", f"data.format={form}")
    lm = scoring.LM(None, AutoTokenizer.from_pretrained(ROOT / run.cfg.model.name), None, form)
    trained = []
    scored = []
    for task in data.load_tasks(run).values():
        scored.append(mean(scoring.make_row(lm, e).length for e in task.test[:100]))
        if task.name in run.cfg.data.train_tasks:
            rows = [scoring.gold_row(scoring.make_row(lm, e)) for e in task.train[:100]]
            trained.append(mean(row.length for row in rows))
    want = pytest.approx((mean(trained), mean(scored)), rel=0.02)
    assert doctor.ROW_TOKENS[form] == want


def test_what_cannot_fit_is_refused_by_key(tmp_path, monkeypatch, untimed):
    """Memory and disk faults come together, each with what to change."""
    monkeypatch.setattr(doctor, "machine", lambda run: (20 * GIB, 10 * GIB))
    with pytest.raises(UserError) as e:
        doctor.examine(open_run(tmp_path, "qwen2.5-1.5b"))
    assert "stage=generator needs about" in str(e.value)
    assert "generator.micro_batch" in str(e.value)
    assert "collect.save_last" in str(e.value)


def test_four_ranks_read_one_copy_of_the_targets(tmp_path, monkeypatch, untimed):
    """The generator's targets are files that all ranks map: 125 checkpoints of each task, once."""
    run = replace(open_run(tmp_path, "qwen2.5-1.5b"), world=4, device="cuda")
    case = doctor.open_case(run)
    needs = {}
    for ranks in (1, 4):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        needs[ranks] = doctor.predict(case)["generator"]
    targets = 6 * 125 * 4 * 4508 * 18 * 258  # tasks, checkpoints, float32, tokens
    assert needs[4].host == needs[1].host < 40 * GIB
    run.cfg.collect.save_last = 25
    fewer = doctor.predict(case)["generator"]
    assert needs[4].disk - fewer.disk == pytest.approx(0.8 * targets)
    assert needs[4].memory < 40 * GIB

    alone = doctor.predict(replace(case, run=replace(run, world=1)))["generator"]
    # moments go by whole weights: one rank keeps those of the last convolution, 65 % of all
    largest = 2048 * 4508 * 9 * 9
    spared = 8 * (doctor.size_of(case.decoder) - largest)
    assert alone.memory - needs[4].memory == pytest.approx(spared), "shared out"

    monkeypatch.setattr(limits, "total_memory", lambda: 16 * GIB)
    with pytest.raises(UserError, match="main memory, 16 are there: lower"):
        doctor.refuse({"generator": needs[4]}, 80 * GIB, 1000 * GIB, "cuda")


def test_only_the_stages_that_run_are_predicted(tmp_path, untimed):
    """MAML alone needs neither checkpoints nor generators."""
    case = doctor.open_case(open_run(tmp_path, "tempo-maml-qvo-qwen2.5-0.5b"))
    assert set(doctor.predict(case)) == {"baselines", "evaluate"}


def test_a_posterior_over_whole_matrices(tmp_path, untimed):
    """12.3 GB resident, measured on SmolLM2: two ranks were killed on 24 GiB."""
    words = ["baselines.abmll.space=product", "evaluate.methods=[base, degaml_plus, abmll]"]
    needs = doctor.predict(doctor.open_case(open_run(tmp_path, "smollm2", *words)))
    assert needs["baselines"].memory == pytest.approx(12.3e9, rel=0.15)


def test_an_unknown_model_says_where_shapes_come_from():
    cfg, _ = load_config(["model.name=who/knows"])
    with pytest.raises(UserError, match=r"model\.name=who/knows: .*config\.json.*models\.yaml"):
        doctor.meta_model(cfg)


def test_a_step_of_one_row_takes_as_long_as_a_kernel_launch(tmp_path, untimed):
    """MAML's 50,000 meta-steps on single rows: steps count there, and not rows."""
    run = open_run(tmp_path, "tempo-qwen2.5-0.5b")
    case = doctor.open_case(run)
    layers = case.model.config.num_hidden_layers
    few = doctor.lm_need(case, steps=100, batch=1).seconds
    many = doctor.lm_need(case, steps=100, batch=64).seconds
    assert few == pytest.approx(100 * 1e-3 * layers)
    assert many == pytest.approx(100 * 64 * 1e-4 * layers)
