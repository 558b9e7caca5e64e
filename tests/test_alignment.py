"""The Fusion VAE: geometry, known answers, leave-one-out training, and what begins from it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributions import Normal, kl_divergence
from torch.func import functional_call, grad

import alignment
import collect
import data
import evaluate
import generator
import lora
import policy
import runtime
import scoring
from alignment import FusionVAE
from config import load_config
from runtime import Run

FAST = [
    "align.meta_epochs=4",
    "align.draws=3",
    "align.prompts=4",
    "align.latent=8",
    "data.targets=[alpha, delta]",
    "evaluate.methods=[base, generator, degaml, degaml_plus, aligned, tempo, tempo_plus]",
]


def small_vae(size: int = 3000, residual: bool = False, pos_table: bool = True) -> FusionVAE:
    torch.manual_seed(0)
    return FusionVAE(size, 6, 8, pos_table, residual)


def random_batch(rows: int, size: int):
    """(sources, task vectors, goals, noise)."""
    sources = torch.randn(rows, size)
    vectors = torch.randn(rows, 6)
    goals = torch.randn(rows, size)
    return sources, vectors, goals, torch.randn(rows, 8)


def test_parameters_are_those_of_the_description():
    """Convolutions as TEMPO's layers count them, and the whole at 0.5B's D with latent 256."""
    with torch.device("meta"):
        vae = FusionVAE(4_399_104, 896, 256, True, True)
    count = {}
    for name, part in vae.named_children():
        count[name] = sum(p.numel() for p in part.parameters())
    assert count["encoder"] == 697_440
    assert count["decoder"] == 696_929
    assert vae.blocks == 4296
    assert vae.position.shape == (512, 4296)
    total = sum(p.numel() for p in vae.parameters())
    assert total == pytest.approx(25.3e6, rel=0.01)


@pytest.mark.parametrize("size", [1, 1023, 1024, 1025, 3000, 40_000])
def test_any_number_of_weights_goes_through(size):
    """D that is no multiple of 1,024, smaller than one block, or beyond the pooled length."""
    out, mean, log_var = small_vae(size)(torch.randn(2, size), torch.randn(2, 6))
    assert out.shape == (2, size)
    assert mean.shape == log_var.shape == (2, 8)


def test_untrained_residual_network_is_the_identity():
    """So that a short training cannot begin by destroying the adapter."""
    x = torch.randn(2, 3000)
    task = torch.randn(2, 6)
    assert torch.equal(small_vae(residual=True)(x, task)[0], x)
    assert not torch.equal(small_vae()(x, task)[0], x)


def test_every_weight_can_be_reached():
    """The position table gives each block a vector of its own; without it neighbours are alike."""
    vae = small_vae(5000)
    out, _, _ = vae(torch.randn(1, 5000), torch.randn(1, 6))
    out[0, 4096:].sum().backward()
    reached = vae.position.grad.abs().sum(0)
    assert float(reached[4]) > 0
    assert float(reached[0]) == 0
    assert small_vae(5000, pos_table=False).position is None


def test_kl_of_a_standard_normal_is_zero():
    """And the closed form elsewhere: summed over the latent, averaged over the batch."""
    zeros = torch.zeros(3, 4)
    assert float(alignment.kl_to_standard_normal(zeros, zeros)) == 0
    mean = torch.randn(3, 4)
    log_var = torch.randn(3, 4)
    want = kl_divergence(Normal(mean, (0.5 * log_var).exp()), Normal(0.0, 1.0)).sum(1).mean()
    torch.testing.assert_close(alignment.kl_to_standard_normal(mean, log_var), want)


def test_one_pair_is_overfitted():
    """Plain Adam on one pair reaches R² > 0.99: the decoder can write what it is asked to."""
    vae = small_vae(2048)
    torch.manual_seed(1)
    source, task, goal, _ = random_batch(1, 2048)
    opt = torch.optim.Adam(vae.parameters(), lr=2e-3)
    for _ in range(150):
        opt.zero_grad()
        loss, _, _ = alignment.vae_loss(vae, (source, task, goal, None), 0.0)
        loss.backward()
        opt.step()
    left = ((vae(source, task)[0] - goal) ** 2).sum()
    r2 = 1 - left / ((goal - goal.mean()) ** 2).sum()
    assert float(r2.detach()) > 0.99


def test_fomaml_gradient_is_taken_after_the_inner_step():
    """By functional calls: one SGD step on the support pairs, then the query pairs' gradient."""
    vae = small_vae(1024)
    support = random_batch(2, 1024)
    query = random_batch(2, 1024)

    def loss_at(parameters, batch):
        sources, vectors, goals, noise = batch
        out, mean, log_var = functional_call(vae, parameters, (sources, vectors, noise))
        mse = ((out - goals) ** 2).mean()
        kl = alignment.kl_to_standard_normal(mean, log_var)
        return mse + 0.01 * kl, (mse, kl)

    start = {name: p.detach().clone() for name, p in vae.named_parameters()}
    inner, _ = grad(loss_at, has_aux=True)(start, support)
    stepped = {name: p - 0.05 * inner[name] for name, p in start.items()}
    want, (want_mse, want_kl) = grad(loss_at, has_aux=True)(stepped, query)

    mse, kl = alignment.fomaml_gradient(vae, support, query, 0.05, 0.01)
    assert mse == pytest.approx(float(want_mse))
    assert kl == pytest.approx(float(want_kl))
    for name, p in vae.named_parameters():
        torch.testing.assert_close(p.grad, want[name], rtol=1e-4, atol=1e-6)
        assert torch.equal(p, start[name]), "the gradient is there, the step is not taken"


def test_standardisation_is_per_parameter_tensor(tiny_lm):
    """Each A and each B has one mean and one deviation, in the order of the tokens."""
    layout = tiny_lm.layout
    torch.manual_seed(0)
    adapters = []
    for _ in range(3):
        adapter = lora.init_adapter(layout, 1)
        for i, (name, value) in enumerate(adapter.items()):
            adapter[name] = (i + 1) * (1 + 0.1 * torch.randn(value.shape))
        adapters.append(adapter)
    vectors = torch.stack([alignment.to_vector(a, layout) for a in adapters])
    mean, std = alignment.standardisation(layout, vectors)

    shape = (-1, layout.rank, layout.width)
    means = generator.from_tokens(mean.view(shape), layout)
    stds = generator.from_tokens(std.view(shape), layout)
    for name in adapters[0]:
        stack = torch.stack([a[name] for a in adapters])
        want = stack.mean().expand(means[name].shape)
        torch.testing.assert_close(means[name], want, rtol=1e-4, atol=1e-5)
        want = stack.std().expand(stds[name].shape)
        torch.testing.assert_close(stds[name], want, rtol=1e-3, atol=1e-5)


@pytest.fixture
def trained(tiny_args) -> Run:
    """A run with checkpoints and generators."""
    cfg, _ = load_config([*tiny_args, *FAST])
    Path(cfg.run).mkdir(parents=True)
    run = Run(Path(cfg.run), cfg, quiet=True)
    collect.collect_adapters(run)
    generator.train_generators(run)
    return run


def test_task_vector_is_the_shift_of_the_last_hidden_state(trained):
    """Against the model called plainly, prompt by prompt."""
    lm = scoring.load_lm(trained)
    adapter = list(collect.load_checkpoints(trained, lm, "alpha"))[-1]

    def last_state(ids, swapped):
        lora.swap_adapter(lm.model, lm.layout, swapped)
        with torch.no_grad():
            return lm.model.get_decoder()(ids).last_hidden_state[0, -1]

    shifts = []
    for text in data.load_tasks(trained)["alpha"].prompts[:4]:
        ids = torch.tensor([lm.tokenizer(text, add_special_tokens=False)["input_ids"]])
        shifts.append(last_state(ids, adapter) - last_state(ids, None))
    want = torch.stack(shifts).mean(0)
    got = alignment.task_vector(trained, "alpha", adapter)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    unchanged = alignment.task_vector(trained, "alpha", lora.init_adapter(lm.layout, 1))
    assert float(unchanged.abs().max()) == 0, "no update, no shift"


@pytest.mark.parametrize(
    "kind, kinds", [("gen2ckpt", {"gc", "cc"}), ("ckpt2ckpt", {"cc"}), ("alg1", {"gg"})]
)
def test_pairs_are_what_their_name_says(trained, kind, kinds):
    """Sources and goals are generated (g) or checkpoints (c); the held-out one is in none."""
    run = trained
    run.cfg.align.pairs = kind
    lm = scoring.load_lm(run)
    pairs, held = alignment.collect_pairs(run, "alpha")
    assert set(pairs) == set(held) == {"beta", "gamma"}
    for task, made in pairs.items():
        known = [("c", a) for a in collect.load_checkpoints(run, lm, task)]
        for draw in range(3):
            adapter, _ = generator.generate_adapter(run, task, draw, left_out="alpha")
            known.append(("g", adapter))
        spared = alignment.to_vector(held[task], lm.layout)
        found = set()
        for source, _, goal in made:
            name = ""
            for vector in (source, goal):
                assert not torch.equal(vector, spared)
                name += next(
                    k for k, a in known if torch.equal(vector, alignment.to_vector(a, lm.layout))
                )
            found.add(name)
        assert found == kinds


def test_aligned_and_tempo_go_through_every_stage(trained):
    """VAEs leave the target out; aligned adapters are refined, scored and stored."""
    run = trained
    alignment.train_aligners(run)
    policy.adapt_targets(run)
    evaluate.evaluate_methods(run)
    for left_out in ("alpha", "all"):
        done = runtime.read_json(run.path / f"align/{left_out}/DONE.json")
        assert {"r2", "r2_generated", "r2_before", "kl"} <= set(done)
        assert done["r2"] <= 1
    vectors = {p.name.split(".")[0] for p in (run.path / "align/vectors").iterdir()}
    assert vectors == {"alpha", "beta", "gamma"}, "of training tasks alone"

    for task, left_out in (("alpha", "alpha"), ("delta", "all")):
        aligner = alignment.load_aligner(run, left_out)
        generated, _ = generator.generate_adapter(run, task, 0)
        want = alignment.align_adapter(run, aligner, task, generated)
        stored = load_file(run.path / f"adapted/aligned/{task}/adapter_model.safetensors")
        assert all(torch.equal(stored[k], want[k]) for k in want)
        assert not all(torch.equal(want[k], generated[k]) for k in want), "it moved"
        check_sampling(run, aligner, task, generated, want)
        rows = {}
        for method in ("aligned", "tempo", "tempo_plus"):
            rows[method] = runtime.read_jsonl(run.path / f"scores/{method}/{task}.jsonl")
            assert len(rows[method]) == 12
        check_scores(run, data.load_tasks(run)[task], rows["aligned"])

    rewards = {p.name for p in run.path.glob("adapted/rewards*/delta*")}
    assert "delta.jsonl" in rewards
    assert any(n.startswith("delta.aligned-") for n in rewards), "a file per start"


def check_sampling(run: Run, aligner, task: str, generated, of_mean) -> None:
    """With align.sample the latent is one draw (TEMPO, F.5): seeded, and another per task."""
    run.cfg.align.sample = True
    drawn = alignment.align_adapter(run, aligner, task, generated)
    again = alignment.align_adapter(run, aligner, task, generated)
    run.cfg.align.sample = False
    assert all(torch.equal(drawn[k], again[k]) for k in drawn)
    assert not all(torch.equal(drawn[k], of_mean[k]) for k in drawn)


def check_scores(run: Run, task, rows: list[dict]) -> None:
    """`aligned` is scored by its first two drawn adapters, each aligned."""
    target = policy.make_target(run, task, aligned=True)
    picks = []
    for batch in range(2):
        adapter, _ = target.source.draw(batch)
        scores = scoring.score_examples(scoring.load_lm(run), adapter, list(task.test))
        picks.append([s.pick("norm") for s in scores])
    for row, first, second in zip(rows, *picks, strict=True):
        right = (first == row["gold"]) + (second == row["gold"])
        assert row["correct_norm"] == right / 2


def test_training_is_the_same_each_time_and_resumes(trained, monkeypatch):
    """Two trainings give equal bits; what is done is not done again."""
    alignment.train_aligners(trained)
    first = {p: p.read_bytes() for p in trained.path.glob("align/*/vae.safetensors")}
    with monkeypatch.context() as patched:
        patched.setattr(alignment, "train_vae", lambda *a: pytest.fail("trained again"))
        alignment.train_aligners(trained)
    for path in first:
        (path.parent / "DONE.json").unlink()
    alignment.train_aligners(trained)
    assert first == {path: path.read_bytes() for path in first}
