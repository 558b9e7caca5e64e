"""The Fusion VAE: geometry, known answers, leave-one-out training and the methods that start from it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import alignment
from alignment import (
    FusionVAE,
    align_adapter,
    collect_pairs,
    fomaml_gradient,
    kl_to_standard_normal,
    load_aligner,
    standardisation,
    task_vector,
    train_aligners,
    vae_loss,
)
from collect import collect_adapters, load_checkpoints
from config import load_config
from data import load_tasks
from evaluate import evaluate_methods
from generator import from_tokens, generate_adapter, to_tokens, train_generators
from lora import init_adapter, swap_adapter
from policy import adapt_targets, make_target
from runtime import Run, read_json, read_jsonl
from scoring import load_lm, score_examples

FAST = [
    "align.meta_epochs=4",
    "align.draws=3",
    "align.prompts=4",
    "align.latent=8",
    "data.targets=[alpha, delta]",
]


def make_run(args: list[str], *more: str) -> Run:
    cfg, _ = load_config([*args, *more])
    Path(cfg.run).mkdir(parents=True, exist_ok=True)
    return Run(Path(cfg.run), cfg, quiet=True)


def small(size: int = 3000, residual: bool = False, **more) -> FusionVAE:
    torch.manual_seed(0)
    return FusionVAE(size, 6, 8, more.get("pos_table", True), residual)


def test_parameters_are_those_of_the_description():
    """Convolutions as paper T's layers count them, and the whole at 0.5B's D with latent 256."""
    with torch.device("meta"):
        vae = FusionVAE(4_399_104, 896, 256, True, True)
    count = {n: sum(p.numel() for p in m.parameters()) for n, m in vae.named_children()}
    assert count["encoder"] == 697_440 and count["decoder"] == 696_929
    assert vae.blocks == 4296 and vae.position.shape == (512, 4296)
    total = sum(p.numel() for p in vae.parameters())
    assert total == pytest.approx(25.3e6, rel=0.01)


@pytest.mark.parametrize("size", [1, 1023, 1024, 1025, 3000, 40_000])
def test_any_number_of_weights_goes_through(size):
    """D that is no multiple of 1,024, smaller than one block, or beyond the pooled length."""
    vae = small(size)
    out, mean, log_var = vae(torch.randn(2, size), torch.randn(2, 6))
    assert out.shape == (2, size) and mean.shape == log_var.shape == (2, 8)


def test_untrained_residual_network_is_the_identity():
    """So that a short training cannot begin by destroying the adapter."""
    x = torch.randn(2, 3000)
    assert torch.equal(small(residual=True)(x, torch.randn(2, 6))[0], x)
    assert not torch.equal(small()(x, torch.randn(2, 6))[0], x)


def test_every_weight_can_be_reached():
    """Without the position table neighbouring blocks are nearly equal; with it each has a vector of its own."""
    vae = small(5000)
    out = vae(torch.randn(1, 5000), torch.randn(1, 6))[0]
    out[0, 4096:].sum().backward()
    assert (
        float(vae.position.grad[:, 4].abs().sum()) > 0
        and float(vae.position.grad[:, 0].abs().sum()) == 0
    )
    assert small(5000, pos_table=False).position is None


def test_kl_of_a_standard_normal_is_zero():
    """And the closed form elsewhere: summed over the latent, averaged over the batch."""
    assert float(kl_to_standard_normal(torch.zeros(3, 4), torch.zeros(3, 4))) == 0
    mean, log_var = torch.randn(3, 4), torch.randn(3, 4)
    want = (
        torch.distributions.kl_divergence(
            torch.distributions.Normal(mean, (0.5 * log_var).exp()),
            torch.distributions.Normal(0.0, 1.0),
        )
        .sum(1)
        .mean()
    )
    torch.testing.assert_close(kl_to_standard_normal(mean, log_var), want)


def test_one_pair_is_overfitted():
    """Plain Adam on one pair reaches R² > 0.99: the decoder can write what it is asked to."""
    vae = small(2048)
    g = torch.Generator().manual_seed(1)
    x, task, goal = (
        torch.randn(1, 2048, generator=g),
        torch.randn(1, 6, generator=g),
        torch.randn(1, 2048, generator=g),
    )
    opt = torch.optim.Adam(vae.parameters(), lr=2e-3)
    for _ in range(150):
        opt.zero_grad()
        loss, _, _ = vae_loss(vae, dict(vae.named_parameters()), (x, task, goal), None, 0.0)
        loss.backward()
        opt.step()
    vae.requires_grad_(False)
    assert (
        1 - float(((vae(x, task)[0] - goal) ** 2).sum() / ((goal - goal.mean()) ** 2).sum()) > 0.99
    )


def test_fomaml_gradient_is_taken_after_the_inner_step():
    """By hand: one SGD step on the support pairs, then the plain gradient of the query pairs there."""
    vae = small(1024)
    batch = [(torch.randn(2, 1024), torch.randn(2, 6), torch.randn(2, 1024)) for _ in range(2)]
    noise = [torch.randn(2, 8) for _ in range(2)]
    grads, mse, kl = fomaml_gradient(vae, *batch, noise, 0.05, 1, 0.01)
    twin = small(1024)
    loss, _, _ = vae_loss(twin, dict(twin.named_parameters()), batch[0], noise[0], 0.01)
    loss.backward()
    with torch.no_grad():
        for p in twin.parameters():
            p -= 0.05 * p.grad
            p.grad = None
    loss, want_mse, want_kl = vae_loss(
        twin, dict(twin.named_parameters()), batch[1], noise[1], 0.01
    )
    loss.backward()
    assert (mse, kl) == (
        pytest.approx(float(want_mse.detach())),
        pytest.approx(float(want_kl.detach())),
    )
    for name, p in twin.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-4, atol=1e-6)


def test_standardisation_is_per_parameter_tensor(tiny_lm):
    """Each A and each B has one mean and one deviation, in the order of the tokens."""
    lm, g = tiny_lm, torch.Generator().manual_seed(0)
    adapters = []
    for _ in range(3):
        a = init_adapter(lm.layout, 1)
        adapters.append(
            {
                k: (i + 1) + 0.1 * (i + 1) * torch.randn(v.shape, generator=g)
                for i, (k, v) in enumerate(a.items())
            }
        )
    mean, std = standardisation(
        lm.layout, torch.stack([to_tokens(a, lm.layout).reshape(-1) for a in adapters])
    )
    back_mean, back_std = (
        from_tokens(x.view(-1, lm.layout.rank, lm.layout.width), lm.layout) for x in (mean, std)
    )
    for k in adapters[0]:
        stack = torch.stack([a[k] for a in adapters])
        torch.testing.assert_close(
            back_mean[k], stack.mean().expand(back_mean[k].shape), rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(
            back_std[k], stack.std().expand(back_std[k].shape), rtol=1e-3, atol=1e-5
        )


@pytest.fixture
def trained(tiny_args) -> Run:
    run = make_run(
        tiny_args,
        *FAST,
        "evaluate.methods=[base, generator, degaml, degaml_plus, aligned, tempo, tempo_plus]",
    )
    collect_adapters(run)
    train_generators(run)
    return run


def test_task_vector_is_the_shift_of_the_last_hidden_state(trained):
    """Against the model called plainly, prompt by prompt."""
    run, lm = trained, load_lm(trained)
    adapter = load_checkpoints(run, lm, "alpha")[-1]
    shifts = []
    for text in load_tasks(run)["alpha"].prompts[:4]:
        ids = torch.tensor([lm.tokenizer(text, add_special_tokens=False)["input_ids"]])
        states = []
        for a in (adapter, None):
            swap_adapter(lm.model, lm.layout, a)
            with torch.no_grad():
                states.append(lm.model.get_decoder()(ids).last_hidden_state[0, -1])
        shifts.append(states[0] - states[1])
    torch.testing.assert_close(
        task_vector(run, "alpha", adapter), torch.stack(shifts).mean(0), rtol=1e-3, atol=1e-4
    )
    assert float(task_vector(run, "alpha", init_adapter(lm.layout, 1)).abs().max()) == 0, (
        "no update, no shift"
    )


@pytest.mark.parametrize(
    "kind, kinds", [("gen2ckpt", {"gc", "cc"}), ("ckpt2ckpt", {"cc"}), ("alg1", {"gg"})]
)
def test_pairs_are_what_their_name_says(trained, kind, kinds):
    """Inputs and targets are generated adapters (g) or checkpoints (c); the held-out checkpoint is in none."""
    run, lm = trained, load_lm(trained)
    run.cfg.align.pairs = kind
    pairs, held = collect_pairs(run, "alpha")
    assert set(pairs) == set(held) == {"beta", "gamma"}
    for task, made in pairs.items():
        stored = load_checkpoints(run, lm, task)
        known = {
            "c": [to_tokens(a, lm.layout).reshape(-1) for a in stored],
            "g": [
                to_tokens(generate_adapter(run, task, b, left_out="alpha")[0], lm.layout).reshape(
                    -1
                )
                for b in range(3)
            ],
        }

        def kind_of(x, known=known):
            return next(k for k, vs in known.items() if any(torch.equal(x, v) for v in vs))

        assert {kind_of(x) + kind_of(y) for x, _, y in made} == kinds
        spared = to_tokens(held[task], lm.layout).reshape(-1)
        assert not any(torch.equal(spared, v) for x, _, y in made for v in (x, y))


def test_aligned_and_tempo_go_through_every_stage(trained):
    """VAEs leave the target out, aligned adapters are what is refined and scored, results are stored."""
    run = trained
    train_aligners(run)
    adapt_targets(run)
    evaluate_methods(run)
    lm = load_lm(run)
    for left_out in ("alpha", "none"):
        done = read_json(run.path / f"align/{left_out}/DONE.json")
        assert {"r2", "r2_generated", "r2_before", "kl"} <= set(done) and done["r2"] <= 1
    vectors = {p.name.split(".")[0] for p in (run.path / "align/vectors").iterdir()}
    assert vectors == {"alpha", "beta", "gamma"}, "of training tasks alone"
    for task, left_out in (("alpha", "alpha"), ("delta", "none")):
        aligner = load_aligner(run, left_out)
        want = align_adapter(run, aligner, task, generate_adapter(run, task, 0)[0])
        stored = load_file(run.path / f"adapted/aligned/{task}/adapter_model.safetensors")
        assert all(torch.equal(stored[k], want[k]) for k in want)
        assert any(
            not torch.equal(want[k], v) for k, v in generate_adapter(run, task, 0)[0].items()
        ), "it moved"
        for method in ("aligned", "tempo", "tempo_plus"):
            assert len(read_jsonl(run.path / f"scores/{method}/{task}.jsonl")) == 12
        target = make_target(run, load_tasks(run)[task], aligned=True)
        test = list(load_tasks(run)[task].test)
        picks = [
            [s.pick("norm") for s in score_examples(lm, target.draw(b)[0], test)] for b in range(2)
        ]
        for i, row in enumerate(read_jsonl(run.path / f"scores/aligned/{task}.jsonl")):
            assert row["correct_norm"] == sum(p[i] == row["gold"] for p in picks) / 2
    rewards = {p.name for p in run.path.glob("adapted/rewards*/delta*")}
    assert "delta.jsonl" in rewards and any(n.startswith("delta.aligned-") for n in rewards), (
        "a file per start"
    )


def test_training_is_the_same_each_time_and_resumes(trained, monkeypatch):
    """Two trainings give equal bits; what is done is not done again."""
    run = trained
    train_aligners(run)
    first = {p: p.read_bytes() for p in run.path.glob("align/*/vae.safetensors")}
    monkeypatch.setattr(alignment, "_train_one", lambda *a: pytest.fail("trained again"))
    train_aligners(run)
    monkeypatch.undo()
    for p in first:
        (p.parent / "DONE.json").unlink()
    train_aligners(run)
    assert first == {p: p.read_bytes() for p in first}
