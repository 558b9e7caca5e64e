"""The recipes: what reaches each optimiser, step by step, against numbers computed by hand.

A loop that trains with another rate, without its noise or with a KL of another weight still runs
and still lowers its loss. So what it does is watched here where it does it.
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_run
from test_lora import random_adapter

import alignment
import baselines
import collect
import data
import generator
import lora
import policy
import scoring
import strategies
from lora import AdapterTrainer
from runtime import Run
from strategies import Strategy


@pytest.fixture
def run(trained) -> Run:
    return make_run(trained)


@pytest.fixture
def steps(monkeypatch) -> list[float]:
    """The rate of every AdapterTrainer's step, as it reaches AdamW."""
    rates = []
    real = AdapterTrainer.step

    def step(trainer, lr):
        real(trainer, lr)
        (group,) = trainer.optimizer.param_groups
        assert group["weight_decay"] == 0.0
        assert group["betas"] == (0.9, 0.999)
        assert float(trainer.master.grad.norm()) <= 1.0 + 1e-5, "clipped"
        rates.append(group["lr"])

    monkeypatch.setattr(AdapterTrainer, "step", step)
    return rates


def cosine(peak: float, step: int, steps: int) -> float:
    return peak * (1 + math.cos(math.pi * step / steps)) / 2


def test_a_gradient_is_clipped_to_norm_one(tiny_lm):
    """AdamW would hide a longer one for a step, not for two."""
    start = lora.init_adapter(tiny_lm.layout, 1)
    with AdapterTrainer(tiny_lm.model, tiny_lm.layout, start) as trainer:
        trainer.backward(1e3 * sum((leaf**2).sum() for leaf in trainer.leaves))
        assert float(trainer.master.grad.norm()) == pytest.approx(1.0, rel=1e-3)
        trainer.backward(1e-3 * sum((leaf**2).sum() for leaf in trainer.leaves))
        assert float(trainer.master.grad.norm()) < 0.5, "a short one stays"


def test_collection_has_two_phases(tiny_args, steps):
    """One warm-up step at half the rate, then 1e-2; the second phase at 1e-3 (DeGAML, E.4)."""
    run = make_run(tiny_args)
    collect.collect_one(run, data.load_tasks(run)["alpha"])
    assert steps == pytest.approx([5e-3, *[1e-2] * 5, *[1e-3] * 3])


def test_collection_passes_over_all_rows(tiny_args, monkeypatch):
    """Every example once before any comes again."""
    run = make_run(tiny_args)
    seen = []
    real = scoring.make_row
    monkeypatch.setattr(
        scoring, "make_row", lambda lm, example: seen.append(example.id) or real(lm, example)
    )
    task = data.load_tasks(run)["alpha"]
    collect.collect_one(run, task)
    assert len(seen) == len(set(seen)) == min(9 * 4, len(task.train))


def watch(monkeypatch, module, name: str) -> list[dict]:
    """Replace a module's optimiser by one that notes its settings at each step."""
    seen = []
    real = getattr(module, name)

    class Watched(real):
        def step(self, *args, **kwargs):
            (group,) = self.param_groups
            squares = sum(float((p.grad**2).sum()) for p in group["params"])
            seen.append({**group, "norm": math.sqrt(squares)})
            return super().step(*args, **kwargs)

    monkeypatch.setattr(module, name, Watched)
    return seen


def test_generator_anneals_by_a_cosine(collected, monkeypatch):
    """One warm-up step, then a cosine to zero; decay 0.1, clipped to 1 (Drag-and-Drop).

    Noise on the targets makes the gradients long, so that they have to be clipped.
    """
    more = ["generator.warmup_steps=1", "generator.weight_decay=0.1", "data.targets=[delta]"]
    more.append("generator.noise=300")
    run = make_run(collected, *more)
    seen = watch(monkeypatch, generator, "AdamW")
    generator.train_generators(run)
    expected = [0.5e-3, *[cosine(1e-3, step, 5) for step in range(5)]]
    assert [group["lr"] for group in seen] == pytest.approx(expected)
    assert {group["weight_decay"] for group in seen} == {0.1}
    assert {group["betas"] for group in seen} == {(0.9, 0.999)}
    assert [group["norm"] for group in seen] == pytest.approx([1.0] * 6, rel=1e-3)


def test_generator_targets_get_a_tenth_of_the_noise(collected, monkeypatch):
    """Conditions get noise of sd 2, targets of sd 0.2 (Drag-and-Drop, noise_enhance)."""
    run = make_run(collected, "generator.noise=2")
    seen = []

    def network(condition):
        seen.append(condition)
        return torch.zeros(4, 50, 10, 10)

    def pairs(*_):
        return torch.zeros(4, 50, 20, 20), torch.zeros(4, 50, 10, 10)

    monkeypatch.setattr(generator, "_load_pairs", pairs)
    training = SimpleNamespace(network=network, step=0)
    loss = generator._loss(run, training, SimpleNamespace(weight=None), [], 0)
    assert float(seen[0].std()) == pytest.approx(2, rel=0.02)
    assert float(loss) == pytest.approx(0.2**2, rel=0.05)

    # anew at every step and for every micro-batch, and the same when a step is done again
    for step, at in ((1, 0), (0, 4), (0, 0)):
        training.step = step
        generator._loss(run, training, SimpleNamespace(weight=None), [], at)
    first, later, beside, again = seen
    assert not torch.equal(later, first)
    assert not torch.equal(beside, first)
    assert torch.equal(again, first)


def test_kl_of_the_vae_rises_from_zero(trained, monkeypatch):
    """Linear over the meta-epochs; one SGD step inside, Adam outside (TEMPO).

    No pair of a query batch is in the support batch of its epoch.
    """
    run = make_run(trained, "align.meta_epochs=5", "align.kl_weight=0.005", "align.draws=2")
    weights = []
    real = alignment.fomaml_gradient

    def gradient(vae, support, query, inner_lr, kl_weight):
        assert inner_lr == run.cfg.align.inner_lr
        weights.append(kl_weight)
        return real(vae, support, query, inner_lr, kl_weight)

    batches = []
    real_batch = alignment.make_batch

    def batch(run, aligner, pairs, rng):
        batches.append({id(pair) for pair in pairs})
        return real_batch(run, aligner, pairs, rng)

    monkeypatch.setattr(alignment, "make_batch", batch)
    monkeypatch.setattr(alignment, "fomaml_gradient", gradient)
    seen = watch(monkeypatch, torch.optim, "Adam")
    alignment.make_aligner(run, "all")
    for epoch in range(5):
        support, query = batches[2 * epoch : 2 * epoch + 2]
        assert len(support) == len(query) == 2
        assert not support & query
    assert weights == pytest.approx([0, 0.00125, 0.0025, 0.00375, 0.005])
    assert [group["lr"] for group in seen] == [run.cfg.align.meta_lr] * 5
    assert {group["weight_decay"] for group in seen} == {0}


def test_rest_em_anneals_by_a_cosine(run, steps):
    """No warm-up, a cosine to zero, on a fresh adapter (TEMPO, G.5; SEAL)."""
    run.cfg.policy.epochs = 3
    samples = {"first": ["{}", "{1}", "{2}"], "second": ["{3}"]}
    policy.improve_policy(run, samples, "delta", "degaml", 0)
    # two proposals a row: the first prompt has two rows, the second one, in each of three epochs
    assert steps == pytest.approx([cosine(1e-3, step, 9) for step in range(9)])


def test_rest_em_weighs_proposals_alike(run, monkeypatch):
    """The loss is a mean over proposals of their mean over tokens, whatever their lengths."""
    losses = []
    real = AdapterTrainer.backward

    def backward(trainer, loss):
        losses.append(float(loss.detach()))
        return real(trainer, loss)

    monkeypatch.setattr(AdapterTrainer, "backward", backward)
    run.cfg.policy.epochs = 1
    samples = {"first": ["{}", '{"family": "TTT", "ttl_steps": 2}']}
    policy.improve_policy(run, samples, "delta", "degaml", 0)

    # the first step begins at the bare base model
    lm = scoring.load_lm(run)
    rng = np.random.default_rng(0)
    (row,) = policy._improve_rows(lm, samples, run.cfg.policy, rng)
    means = []
    for branch in row.branches:
        alone = scoring.Row(row.context, (branch,), (0,), (1,))
        means.append(float(scoring._mean_nll(lm, [alone]).detach()))
    assert losses == pytest.approx([sum(means) / 2], abs=1e-4)
    assert abs(means[0] - means[1]) > 0.1


def test_rest_em_learns_ten_proposals_at_most():
    """The best ten, each once."""
    episodes = []
    for wins in range(15):
        result = {"reward": 1, "wins": wins, "losses": 0, "gold_logp_gain": 0.0}
        episodes += [{"text": str(wins), **result}] * 2
    assert policy.rewarded(episodes) == [str(wins) for wins in range(14, 4, -1)]


def sft_of(steps: int) -> Strategy:
    fields = {"sft_steps": steps, "learning_rate": 0.03, "batch_size": 4, "loss": "lm"}
    return Strategy.from_dict({"family": "SFT", **fields, "init_scale": 1.0})


@pytest.mark.parametrize("warm_up, rates", [(True, [0.01, 0.02, 0.03, 0.03]), (False, [0.03] * 4)])
def test_sft_warms_up_for_two_steps(run, steps, warm_up, rates):
    """Proposed settings begin at a third and two thirds; those that a paper fixes do not."""
    task = data.load_tasks(run)["delta"]
    target = policy.make_target(run, task)
    target.warm_up = warm_up
    strategies.train_on_support(target, sft_of(4), list(task.support))
    assert steps == pytest.approx(rates)


def test_fixed_settings_of_a_baseline_have_one_rate(trained, steps):
    """baselines.sft is carried out as it is told."""
    fixed = "[{sft_steps: 4, learning_rate: 1e-4, batch_size: 4, loss: lm}]"
    run = make_run(trained, f"baselines.sft={fixed}", "evaluate.methods=[base, no_meta]")
    baselines._adapt_start(run, "no_meta", data.load_tasks(run)["delta"])
    assert steps == pytest.approx([1e-4] * 4)


def test_ttt_has_one_rate(run, steps):
    """A constant rate from the first step, on the generated adapter (TLM)."""
    run.cfg.strategies.ttl_threshold = 0.0
    target = policy.make_target(run, data.load_tasks(run)["delta"])
    fields = {"ttl_steps": 3, "learning_rate": 1e-4, "batch_size": 4, "shuffle_data": False}
    strategies.execute(target, Strategy.from_dict({"family": "TTT", **fields}))
    assert steps == pytest.approx([1e-4] * 3)


def test_union_is_the_shuffled_concatenation(tiny_args):
    """Every row of every task once per pass, whatever the task's size (DeGAML, footnote 3)."""
    run = make_run(tiny_args)
    draws = baselines.Draws(run, "alpha", "union")
    draws.tasks["beta"] = draws.tasks["beta"][:5]
    sizes = {name: len(train) for name, train in draws.tasks.items()}
    assert set(sizes) == {"beta", "gamma"}
    rows = {}
    for name, train in draws.tasks.items():
        rows |= {scoring.make_row(draws.lm, example): name for example in train}

    total = sum(sizes.values())
    batches = draws.union(total)
    passes = [next(batches) for _ in range(2)]
    for batch in passes:
        assert len(set(batch)) == total
        assert [rows[row] for row in batch].count("beta") == 5
    assert passes[0] != passes[1], "shuffled anew"


def test_union_trains_by_collections_rates(tiny_args, steps):
    """Both phases, each as much longer as there are tasks (DeGAML, footnote 3)."""
    run = make_run(tiny_args)
    baselines._train_union(run, baselines.Draws(run, "alpha", "union"))
    assert steps == pytest.approx([5e-3, *[1e-2] * 11, *[1e-3] * 6])


def abmll_run(trained, monkeypatch, counts: str) -> Run:
    """One outer step of which one term alone has a gradient: 1 per entry of a mean."""
    more = ["meta_steps=1", "tasks_per_step=1", "inner_steps=1", "beta=1", "outer_lr=0.01"]
    run = make_run(trained, *[f"baselines.abmll.{word}" for word in more])
    terms = {
        "gaussian_kl": lambda m, s, m0, s0: (counts == "gaussian_kl") * m.sum(),
        "negative_log_prior": lambda m, s: (counts == "negative_log_prior") * m.sum(),
    }
    for name, fn in terms.items():
        monkeypatch.setattr(baselines, name, fn)
    monkeypatch.setattr(scoring, "lm_loss", lambda lm, rows: 0 * zero_of(lm))
    return run


def zero_of(lm):
    total = 0
    for module in lm.model.modules():
        if getattr(module, "A", None) is not None:
            total = total + module.A.sum() + module.B.sum()
    return total


@pytest.mark.parametrize("counts", ["gaussian_kl", "negative_log_prior"])
def test_abmll_outer_loss_has_its_kl_and_its_prior(trained, monkeypatch, counts):
    """theta moves by the rate along the gradient of each, clipped and with no decay."""
    run = abmll_run(trained, monkeypatch, counts)
    seen = watch(monkeypatch, torch.optim, "AdamW")
    lm = scoring.load_lm(run)
    first = lora.flatten_adapter(lora.init_adapter(lm.layout, run.cfg.seed), lm.layout)
    start, _, losses, _ = baselines._train_abmll(run, baselines.Draws(run, "all", "abmll"))
    moved = lora.flatten_adapter(start, lm.layout) - first
    assert losses == [0.0]
    torch.testing.assert_close(moved, torch.full_like(moved, -0.01), rtol=1e-3, atol=1e-6)
    (group,) = seen
    assert group["weight_decay"] == 0.0
    assert group["norm"] == pytest.approx(1.0, rel=1e-3), "one per entry before"


def test_both_levels_of_maml_share_one_state(trained, monkeypatch):
    """Inner updates at the inner rate, then one outer update at its own; the moments go on."""
    settings = ["meta_steps=2", "tasks_per_step=1", "inner_lr=2e-3", "outer_lr=3e-3"]
    run = make_run(trained, *[f"baselines.maml.{word}" for word in settings])
    updates = []
    update = baselines.shared_update

    def watched_update(theta, grad, old, lr, decay):
        updates.append((old.t, lr, decay))
        return update(theta, grad, old, lr, decay)

    monkeypatch.setattr(baselines, "shared_update", watched_update)
    baselines._train_maml(run, baselines.Draws(run, "all", "maml"))
    decay = baselines.WEIGHT_DECAY
    rates = [2e-3, 3e-3, 2e-3, 3e-3]
    assert updates == [(t, rate, decay) for t, rate in enumerate(rates)]


def test_maml_qvo_trains_its_own_part_at_its_own_scale(trained, steps):
    """TEMPO, appendix H: q, v, o, alpha 16, ten steps at one rate; the folder fits the run."""
    more = ["modules=[q_proj, v_proj]", "alpha=16", "test_steps=10", "meta_steps=2"]
    words = [f"baselines.maml.{word}" for word in more]
    run = make_run(trained, *words, "evaluate.methods=[base, maml_qvo]", "data.targets=[delta]")
    baselines.train_baselines(run)
    assert steps == pytest.approx([run.cfg.baselines.maml.inner_lr] * 10)

    lm = scoring.load_lm(run)
    part = baselines.method_layout(run, "maml_qvo")
    assert part.alpha == 16
    assert {path.rsplit(".", 1)[-1] for path, *_ in part.modules} == {"q_proj", "v_proj"}
    adapter = lora.load_adapter(run.path / "adapted/maml_qvo/delta", lm.layout)
    for a, _, b, _ in lm.layout.keys():
        trained_here = "q_proj" in a or "v_proj" in a
        assert bool(adapter[b].any()) == trained_here


def test_a_part_does_in_the_whole_what_it_does_alone(trained):
    """An adapter of q and v at alpha 16 scores as the folder of the whole layout that holds it."""
    more = ["baselines.maml.modules=[q_proj, v_proj]", "baselines.maml.alpha=16"]
    run = make_run(trained, *more)
    lm = baselines.method_lm(run, "maml_qvo")
    adapter = random_adapter(lm.layout)
    examples = list(data.load_tasks(run)["delta"].test)
    alone = scoring.score_examples(lm, adapter, examples)
    folder = run.path / "baselines/maml_qvo/all"
    whole = baselines._save_start(run, folder, adapter, lm.layout)
    kept = scoring.score_examples(scoring.load_lm(run), whole, examples)
    for one, other in zip(alone, kept, strict=True):
        assert one.raw == pytest.approx(other.raw, abs=1e-4)
    back = baselines._load_start(run, "maml_qvo", data.load_tasks(run)["delta"])
    for key, value in adapter.items():
        torch.testing.assert_close(back[key], value)
