"""Proposals, rewards, ReST-EM and the choice, on tiny random models."""

import json
import shutil
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import make_run

import baselines
import data
import evaluate
import generator
import lora
import methods
import policy
import proposals
import runtime
import scoring
import strategies
from config import UserError
from policy import Rewards
from runtime import Run
from scoring import Row
from strategies import KEEP, Strategy, Target

FAMILIES = ["TTT", "LORA", "TTS", "Latent", "SFT"]
LABEL_FREE = FAMILIES[:4]


def strategy(family: str, **fields) -> Strategy:
    return Strategy(family, tuple(fields.items()))


def mixing(ratio: float) -> Strategy:
    return strategy("LORA", **{"lambda": ratio})


def sft(steps: int, loss: str = "lm", share: float = 1.0) -> Strategy:
    return strategy(
        "SFT",
        sft_steps=steps,
        learning_rate=1e-2,
        batch_size=4,
        loss=loss,
        init_scale=share,
    )


@pytest.fixture
def run(trained) -> Run:
    return make_run(trained)


def delta(run: Run) -> tuple[Target, list]:
    """The target delta and its support examples."""
    task = data.load_tasks(run)["delta"]
    return policy.make_target(run, task), list(task.support)


def rewards_of(run: Run) -> Rewards:
    target, support = delta(run)
    return Rewards(run, "delta", target, support)


def sampled(run: Run, families: list[str], **changes) -> list[str]:
    """Samples of the base model, one per entry of `families`, or under changed settings."""
    seed = changes.pop("seed", 0)
    adapter = changes.pop("adapter", None)
    bounds = changes.pop("bounds", run.cfg.strategies)
    settings = run.cfg.policy.model_copy(update=changes)
    schemas = [strategies.proposal_schema(bounds, offered) for offered in families]
    lm = scoring.load_lm(run)
    layout = policy.policy_layout(run)
    return proposals.sample_proposals(lm, layout, adapter, "Adapt.", schemas, settings, seed)


def episodes_of(run: Run, method: str, task: str) -> list[dict]:
    return runtime.read_jsonl(run.path / f"adapted/{method}/{task}/episodes.jsonl")


@pytest.mark.parametrize("grid", [True, False], ids=["grid", "open"])
@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_proposals_always_parse(run, family, grid):
    """What an untrained model samples under the grammar is a valid strategy, on the grid if any."""
    bounds = run.cfg.strategies
    if not grid:
        bounds = bounds.model_copy(update={"proposal_grid": {}})
    hot = {"temperature": 3.0, "top_p": 1.0, "top_k": 400, "max_new_tokens": 600}
    texts = sampled(run, [[family]] * 6, seed=3, bounds=bounds, **hot)
    assert len(texts) == 6
    for text in texts:
        parsed = strategies.parse_strategy(text, bounds, [family])
        assert parsed.family == family
        assert set(json.loads(text)) == {"family", *dict(parsed.fields)}
        for name, value in parsed.fields:
            assert value in bounds.proposal_grid.get(f"{family}.{name}", [value])
    if not grid:
        assert len(set(texts)) > 1 or family == "LORA"


def test_free_samples_use_every_family(run):
    """An untied sample may be of any offered family and of no other."""
    texts = sampled(run, [LABEL_FREE] * 24, seed=1, temperature=5.0, top_p=1.0)
    bounds = run.cfg.strategies
    found = {strategies.parse_strategy(text, bounds, LABEL_FREE).family for text in texts}
    assert len(found) >= 2
    assert "SFT" not in found


def test_sampling_is_seeded_and_leaves_the_base_bare(run):
    """One seed gives one set of proposals; the policy's adapter is out of the model afterwards."""
    lm = scoring.load_lm(run)
    ids = torch.arange(30)[None]
    with torch.no_grad():
        before = lm.model(ids).logits
    plain = lora.init_adapter(policy.policy_layout(run), 0)
    adapter = {key: value + 0.3 for key, value in plain.items()}
    first = sampled(run, [FAMILIES] * 4, seed=7, adapter=adapter)
    assert sampled(run, [FAMILIES] * 4, seed=7, adapter=adapter) == first
    with torch.no_grad():
        assert torch.equal(lm.model(ids).logits, before)

    others = set()
    for seed in range(3):
        texts = sampled(run, [FAMILIES] * 4, seed=seed, temperature=5.0, top_p=1.0)
        others.add(tuple(texts))
    assert len(others) > 1


def test_batched_samples_equal_single_ones(run):
    """With one legal token a step, sharing the prompt's cache between samples changes nothing."""
    together = sampled(run, [[family] for family in FAMILIES], top_k=1)
    alone = [sampled(run, [[family]], top_k=1)[0] for family in FAMILIES]
    assert together == alone


def test_plan_gives_every_family_its_minimum():
    """`minimum` samples are tied to each family, the rest may use any; never more than `count`."""
    every = ["A", "B", "C"]
    tied = [["A"], ["A"], ["B"], ["B"], ["C"], ["C"]]
    assert proposals.plan_families(every, 8, 2) == [*tied, every, every]
    assert proposals.plan_families(["A", "B"], 3, 0) == [["A", "B"]] * 3
    assert proposals.plan_families(["A", "B"], 3, 2) == [["A"], ["A"], ["B"]]


def test_prompt_states_task_and_performance(run):
    """It holds the support performance and each offered family once; nothing of the test set."""
    task = data.load_tasks(run)["delta"]
    rewards = rewards_of(run)
    lm = scoring.load_lm(run)
    text = proposals.proposal_prompt(lm, task, LABEL_FREE, rewards.scores, "norm")
    right = 0
    for scores, example in zip(rewards.scores, task.support, strict=True):
        right += scores.pick("norm") == example.gold
    assert f"{right} of {len(task.support)}" in text
    for family in LABEL_FREE:
        assert text.count(f'"family": "{family}"') == 1
    assert '"SFT"' not in text
    assert not any(example.text in text for example in task.test)


@pytest.mark.parametrize(
    "wins, losses, margin, reward",
    [
        (2, 1, 1, 1),
        (1, 1, 1, 0),
        (0, 0, 1, 0),
        (0, 1, 1, 0),
        (3, 1, 2, 1),
        (2, 1, 2, 0),
        (0, 0, 0, 1),
        (1, 1, 0, 1),
        (1, 2, 0, 0),
    ],
)
def test_reward_margin(run, wins, losses, margin, reward):
    """Reward is binary: net wins reach the margin, whatever the log-probabilities say."""
    settings = run.cfg.policy.model_copy(update={"reward_margin": margin})
    assert policy.reward_of(result(wins, losses, 9.0), settings) == reward


def result(wins: int, losses: int, gain: float) -> dict:
    return {"wins": wins, "losses": losses, "gold_logp_gain": gain}


def chosen(results: dict, label_free: int, sft: int = 0, by: str = "wins") -> Strategy:
    settings = SimpleNamespace(
        reward_margin=1, select_margin=label_free, sft_margin=sft, select_by=by
    )
    best, found = policy.choose(results, settings)
    assert found == results.get(best, result(0, 0, 0.0))
    return best


def test_choose_takes_net_wins_then_log_probability():
    """Most net wins, ties by gain; below the margin or without a gain, the adapter is kept."""
    a = mixing(0.1)
    b = mixing(0.2)
    c = mixing(0.3)
    results = {a: result(3, 1, 0.1), b: result(2, 0, 0.4), c: result(4, 3, 9.0)}
    assert chosen(results, 1) == b
    assert chosen(results, 2) == b
    assert chosen(results, 3) == KEEP
    assert chosen({a: result(5, 0, -0.1), b: result(1, 0, 0.1)}, 1) == b
    assert chosen({a: result(5, 0, 0.0)}, 1) == KEEP
    assert chosen({}, 1) == KEEP
    assert chosen({a: result(0, 0, 0.1)}, 0) == a
    assert chosen({a: result(0, 1, 5.0)}, 0) == KEEP
    assert chosen({sft(5): result(1, 0, 0.1)}, 2, sft=1) == sft(5)
    assert chosen({sft(5): result(1, 0, 0.1)}, 1, sft=2) == KEEP


def test_choose_by_log_probability():
    """The margins hold; of what passes, the higher log-probability is taken, ties by net wins."""
    free = mixing(0.1)
    short = sft(2)
    long = sft(4)

    def best(results: dict) -> Strategy:
        return chosen(results, 3, sft=1, by="gold_logp")

    below = {free: result(2, 0, 9.0), short: result(0, 0, 9.0), long: result(5, 0, 0.0)}
    assert best(below) == KEEP
    assert best({short: result(1, 0, 0.2), long: result(5, 0, 0.1)}) == short
    assert best({short: result(1, 0, 0.1), free: result(3, 0, 0.2)}) == free
    assert best({short: result(1, 0, 0.1), long: result(2, 0, 0.1)}) == long


def test_rewarded_is_distinct_best_first_and_capped(monkeypatch):
    """Equal texts count once; more net wins first, then larger gain; nothing unrewarded."""
    episodes = [
        {"text": "c", "reward": 1, **result(1, 0, 0.1)},
        {"text": "a", "reward": 1, **result(3, 0, 0.1)},
        {"text": "c", "reward": 1, **result(1, 0, 0.1)},
        {"text": "x", "reward": 0, **result(5, 0, 1.0)},
        {"text": "b", "reward": 1, **result(1, 0, 0.9)},
    ]
    assert policy.MAX_SAMPLES == 10
    assert policy.rewarded(episodes) == ["a", "b", "c"]
    monkeypatch.setattr(policy, "MAX_SAMPLES", 2)
    assert policy.rewarded(episodes) == ["a", "b"]


@pytest.mark.parametrize("n, folds", [(8, 2), (20, 4), (7, 3)])
def test_folds_partition_the_support(run, n, folds):
    """Every example is held out exactly once, in folds of nearly equal size, the same each time."""
    target, _ = delta(run)
    found = policy.fold_indices(target, n, folds)
    assert sorted(sum(found, [])) == list(range(n))
    assert len(found) == folds
    sizes = [len(fold) for fold in found]
    assert max(sizes) - min(sizes) <= 1
    assert policy.fold_indices(target, n, folds) == found


def test_sft_reward_scores_no_fitted_example(run, monkeypatch):
    """No support example is scored by an adapter fitted on it; each is scored once per length."""
    rewards = rewards_of(run)
    alive = []  # ids stay unique while the adapters live
    fitted = {}
    scored = Counter()
    real_train = strategies.train_on_support
    real_score = scoring.score_examples

    def train(target, s, labelled, at_steps=()):
        adapters = real_train(target, s, labelled, at_steps)
        alive.append(adapters)
        for adapter in adapters.values():
            fitted[id(adapter)] = {example.id for example in labelled}
        return adapters

    def score(lm, adapter, examples, **kwargs):
        ids = [example.id for example in examples]
        assert len(fitted[id(adapter)]) == 4, "two folds of eight"
        assert not fitted[id(adapter)].intersection(ids)
        scored.update(ids)
        return real_score(lm, adapter, examples, **kwargs)

    monkeypatch.setattr(strategies, "train_on_support", train)
    monkeypatch.setattr(scoring, "score_examples", score)
    found = rewards.measure(sft(4), [2, 4])
    assert set(found) == {str(sft(2)), str(sft(4))}
    assert scored == {example.id: 2 for example in rewards.support}


def test_shorter_trainings_come_from_the_longer_one(run):
    """s steps of a longer training are worth what a training of s steps is, to the last digit."""
    rewards = rewards_of(run)
    short = str(sft(2, "choice"))
    both = rewards.measure(sft(6, "choice"), [2, 6])[short]
    alone = rewards.measure(sft(2, "choice"))[short]
    assert both["correct"] == alone["correct"]
    assert both["gold_logp"] == alone["gold_logp"]
    assert alone["backwards"] == 2 * 2 * 4, "two folds of two steps of four rows"


def test_keeping_the_adapter_changes_nothing(run):
    """Against itself the generated adapter neither wins nor loses."""
    found = rewards_of(run).of(KEEP)
    found.pop("seconds")
    assert found == {**policy.NO_GAIN, "changed": False, "forwards": 8, "backwards": 0}
    settings = run.cfg.policy.model_copy(update={"reward_margin": 0})
    assert policy.reward_of(found, settings) == 0, "whatever the margin"
    assert policy.reward_of(found | {"changed": True}, settings) == 1


def test_an_identical_strategy_is_executed_once(run, monkeypatch):
    """Results are kept in the file: a second request, of another object too, executes nothing."""
    done = []
    real = strategies.execute

    def execute(target, s, *args):
        done.append(s)
        return real(target, s, *args)

    monkeypatch.setattr(strategies, "execute", execute)
    rewards = rewards_of(run)
    first = rewards.of(mixing(0.5))
    assert rewards.of(mixing(0.5)) == first
    assert rewards_of(run).of(mixing(0.5)) == first
    assert done == [mixing(0.5)]


def test_a_diverged_training_loses(run, monkeypatch):
    """A strategy whose loss is not finite earns nothing and stops nothing."""

    def diverge(*args):
        raise FloatingPointError

    monkeypatch.setattr(strategies, "execute", diverge)
    found = rewards_of(run).of(mixing(0.5))
    assert found["wins"] == 0
    assert found["losses"] > 0
    assert policy.reward_of(found, run.cfg.policy) == 0


def test_no_strategy_is_evaluated_twice_by_two_methods(run, monkeypatch):
    """degaml_plus finds what degaml measured; an SFT length comes from the longest of its kind."""
    asked = []
    real = Rewards.measure

    def measure(self, s, at_steps=()):
        asked.append((self.target.name, s))
        return real(self, s, at_steps)

    monkeypatch.setattr(Rewards, "measure", measure)
    policy.adapt_targets(run)
    assert asked
    assert len(asked) == len(set(asked))
    for task in data.load_tasks(run):
        free = episodes_of(run, "degaml", task)
        plus = episodes_of(run, "degaml_plus", task)
        assert len(free) == len(plus) == 10
        assert not any(e["strategy"].get("family") == "SFT" for e in free)

        found_free = {Strategy.from_dict(e["strategy"]) for e in free if e["valid"]}
        found_plus = {Strategy.from_dict(e["strategy"]) for e in plus if e["valid"]}
        assert found_free & found_plus, "the two methods proposed something in common"
        twins = {s.but(init_scale=0.0) for s in found_plus if s.family == "SFT"}
        measured = [s for name, s in asked if name == task]
        assert len(measured) <= len(found_free | found_plus | twins)


def test_policy_gradient_does_not_reach_the_generator(run):
    """ReST-EM changes the policy only: the generator gathers no gradient and keeps its weights."""
    rewards = rewards_of(run)
    decoder = generator.load_generator(run, "all").decoder
    model = scoring.load_lm(run).model
    before = {key: value.clone() for key, value in decoder.state_dict().items()}
    base = {key: value.clone() for key, value in model.state_dict().items()}
    samples = {"Adapt.": ['{"family":"LORA","lambda":0.5}']}
    assert policy.improve_policy(run, samples, "delta", "degaml", 0) is not None
    rewards.measure(sft(2))

    for parameter in decoder.parameters():
        assert parameter.grad is None
        assert not parameter.requires_grad
    for key, value in decoder.state_dict().items():
        assert torch.equal(value, before[key])
    assert not any(value.requires_grad for value in rewards.target.start.values())
    # the policy's layout may have wrapped further layers, which renames their weights
    now = {key.replace(".base.", "."): value for key, value in model.state_dict().items()}
    for key, value in base.items():
        assert torch.equal(value, now[key.replace(".base.", ".")])


def test_without_rewarded_samples_there_is_no_policy(run):
    """Nothing to learn from: the base stays the policy."""
    assert policy.improve_policy(run, {}, "delta", "degaml", 0) is None
    assert policy.improve_policy(run, {"Adapt.": []}, "delta", "degaml", 0) is None


@pytest.mark.parametrize("name", ["delta", "all"])
def test_a_diverged_policy_names_its_unit_and_the_rate(run, monkeypatch, name):
    """A loss that is not finite is one line for the user: whose policy, where, and what to do."""
    monkeypatch.setattr(lora.AdapterTrainer, "backward", lambda *args: float("nan"))
    samples = {"Adapt.": ['{"family":"LORA","lambda":0.5}']}
    with pytest.raises(UserError) as error:
        policy.improve_policy(run, samples, name, "degaml", 1)
    text = str(error.value)
    assert text.startswith(f"policy {name}/degaml: the loss is not finite at step 1 of iteration 2")
    assert "policy.lr" in text
    assert "\n" not in text


def test_training_raises_the_probability_of_what_was_rewarded(run):
    """After one Improve step the rewarded text is likelier under its prompt than before."""
    lm = scoring.load_lm(run)
    layout = policy.policy_layout(run)
    texts = ['{"family":"LORA","lambda":0.5}', '{"family":"Latent","slot_steps":2,"slot_lr":0.1}']
    samples = {"Adapt this.": texts}
    run.cfg.policy.epochs = 4
    learnt = policy.improve_policy(run, samples, "delta", "degaml", 0)
    branches = []
    for text in texts:
        branches.append((*lm.tokenizer(text)["input_ids"], lm.tokenizer.eos_token_id))
    row = Row(tuple(scoring.encode(lm, "Adapt this.")), tuple(branches), (0, 0), (1, 1))

    @torch.no_grad()
    def log_p(adapter):
        lora.swap_adapter(lm.model, layout, adapter)
        hidden, starts = scoring.hidden_states(lm, [row])
        value = scoring.branch_logprobs(lm, [row], hidden, starts)[0]
        lora.swap_adapter(lm.model, layout, None)
        return value

    assert bool((log_p(learnt) > log_p(None) + 1.0).all())
    again = policy.improve_policy(run, samples, "delta", "degaml", 0)
    assert lora.adapter_hash(again) == lora.adapter_hash(learnt)


def test_each_improve_step_restarts_from_the_base(run, monkeypatch):
    """The second iteration samples from the trained policy; its training starts afresh."""
    used = []
    starts = []
    real_sample = proposals.sample_proposals

    def sample(lm, layout, policy_adapter, *args):
        used.append(policy_adapter)
        return real_sample(lm, layout, policy_adapter, *args)

    class Trainer(lora.AdapterTrainer):
        def __init__(self, model, layout, adapter):
            starts.append(adapter)
            super().__init__(model, layout, adapter)

    monkeypatch.setattr(proposals, "sample_proposals", sample)
    monkeypatch.setattr(policy, "AdapterTrainer", Trainer)
    run.cfg.policy.iterations = 3
    run.cfg.policy.reward_margin = 0
    run.cfg.data.targets = ["delta"]
    run.cfg.evaluate.methods = ["degaml_plus"]
    policy.adapt_targets(run)
    assert [adapter is None for adapter in used] == [True, False, False]
    assert len(starts) == 2
    for adapter in starts:
        for key, value in adapter.items():
            assert "lora_A" in key or not value.any()


def test_meta_policy_never_touches_the_left_out_task(trained, monkeypatch):
    """Algorithm 2 for target t reads supports, prompts and generators of the other tasks only."""
    run = make_run(trained, "policy.mode=meta", "policy.iterations=1")
    touched = set()
    scored = set()
    real_generate = generator.generate_adapter
    real_score = scoring.score_examples

    def generate(run, name, batch, *args, left_out=None):
        touched.add((name, left_out))
        return real_generate(run, name, batch, *args, left_out=left_out)

    def score(lm, adapter, examples, **kwargs):
        scored.update(example.id for example in examples)
        return real_score(lm, adapter, examples, **kwargs)

    monkeypatch.setattr(generator, "generate_adapter", generate)
    monkeypatch.setattr(scoring, "score_examples", score)
    policy._meta_train(run, "alpha", "degaml_plus")
    tasks = data.load_tasks(run)
    trained_on = [*tasks["beta"].train, *tasks["gamma"].train]
    assert touched == {("beta", "alpha"), ("gamma", "alpha")}
    assert scored < {example.id for example in trained_on}
    episodes = runtime.read_jsonl(run.path / "policy/alpha/degaml_plus/episodes.jsonl")
    assert {episode["task"] for episode in episodes} == {"beta", "gamma"}


def test_every_iteration_of_meta_training_draws_its_examples(trained, monkeypatch):
    """Algorithm 2, line 5: other support examples per iteration, of the train split alone."""
    run = make_run(trained, "policy.mode=meta", "policy.iterations=3")
    drawn = []
    real = policy._make_case

    def make_case(run, task, target, name, *args):
        drawn.append((task.name, name, frozenset(e.id for e in task.support)))
        return real(run, task, target, name, *args)

    monkeypatch.setattr(policy, "_make_case", make_case)
    policy._meta_train(run, "alpha", "degaml")
    tasks = data.load_tasks(run)
    for name in ("beta", "gamma"):
        sets = [ids for task, _, ids in drawn if task == name]
        files = {file for task, file, _ in drawn if task == name}
        assert len(set(sets)) == len(files) == 3
        for ids in sets:
            assert len(ids) == len(tasks[name].support)
            assert ids <= {example.id for example in tasks[name].train}
            assert not ids & {example.id for example in tasks[name].test}


STEPS = ["policy.steps=2", "policy.iterations=1", "evaluate.methods=[base, degaml]"]


def accept(monkeypatch, *families: str) -> list[Strategy]:
    """Choose the first proposal of the given family at each step, whatever it earns."""
    accepted = []

    def choose(results, settings):
        family = families[len(accepted)]
        best = KEEP
        for strategy in results:
            if strategy.family == family:
                best = strategy
        accepted.append(best)
        return best, {"wins": 1, "losses": 0, "gold_logp_gain": 0.1}

    monkeypatch.setattr(policy, "choose", choose)
    return accepted


def test_a_strategy_refines_what_the_last_one_made(trained, monkeypatch):
    """Algorithm 2, lines 7-12: the accepted adapter is the next start, with a state of its own."""
    run = make_run(trained, *STEPS)
    accepted = accept(monkeypatch, "LORA", "Latent")
    task = data.load_tasks(run)["delta"]
    first = policy._open_case(run, task, "degaml")
    policy._adapt_one(run, task, "degaml")
    folder = run.path / "adapted/degaml/delta"
    facts = runtime.read_json(folder / "strategy.json")
    assert [s.family for s in accepted] == ["LORA", "Latent"]
    assert facts["strategy"] == accepted[1].as_dict()
    assert [before["strategy"] for before in facts["before"]] == [accepted[0].as_dict()]

    # the second search began from the mixed adapter, without TTS, in a reward file of its own
    mixed = strategies.execute(first.rewards.target, accepted[0]).adapters[0]
    episodes = episodes_of(run, "degaml", "delta")
    later = [e["strategy"]["family"] for e in episodes if e.get("step") == 1 and e["valid"]]
    assert later
    assert "TTS" not in later
    assert len(list(run.path.glob("adapted/rewards-*/delta.step-*.jsonl"))) == 1
    layout = first.rewards.target.lm.layout
    assert lora.adapter_hash(lora.load_adapter(folder, layout)) == lora.adapter_hash(mixed)

    # what is evaluated is the steering of the mixed adapter
    target = policy.make_target(run, task)
    (refined,) = evaluate.method_variants(run, task, target, "degaml")
    assert lora.adapter_hash(refined.adapters[0]) == lora.adapter_hash(mixed)
    assert refined.slot is not None


@pytest.mark.parametrize("family", ["TTS", "Latent", "none"])
def test_a_chain_ends_with_what_is_no_adapter(trained, monkeypatch, family):
    """There is no second search after an ensemble or steering, nor after nothing at all."""
    run = make_run(trained, *STEPS)
    accepted = accept(monkeypatch, family)
    policy._adapt_one(run, data.load_tasks(run)["delta"], "degaml")
    assert [s.family for s in accepted] == [family]
    assert "before" not in runtime.read_json(run.path / "adapted/degaml/delta/strategy.json")


def test_a_later_step_that_finds_nothing_keeps_the_earlier(trained, monkeypatch):
    """The last strategy that was accepted is the result, with its adapter."""
    run = make_run(trained, *STEPS)
    accepted = accept(monkeypatch, "LORA", "none")
    policy._adapt_one(run, data.load_tasks(run)["delta"], "degaml")
    assert accepted[1] == KEEP
    facts = runtime.read_json(run.path / "adapted/degaml/delta/strategy.json")
    assert facts["strategy"] == accepted[0].as_dict()


def test_steps_in_meta_training(trained, monkeypatch):
    """A policy for all tasks learns at every step of the chain."""
    run = make_run(trained, "policy.mode=meta", *STEPS)
    accept(monkeypatch, *["LORA"] * 9)
    seen = {}
    monkeypatch.setattr(policy, "improve_policy", lambda run, samples, *args: seen.update(samples))
    policy._meta_train(run, "alpha", "degaml")
    episodes = runtime.read_jsonl(run.path / "policy/alpha/degaml/episodes.jsonl")
    assert {(e["task"], e.get("step", 0)) for e in episodes} == {
        ("beta", 0),
        ("beta", 1),
        ("gamma", 0),
        ("gamma", 1),
    }
    assert len(seen) == 4, "a prompt per task and step: the state line is refreshed"


def test_choose_by_family():
    """The family with most rewarded strategies, and of it the one with most net wins."""
    steering = Strategy("Latent", (("slot_steps", 3), ("slot_lr", 0.1)))
    results = {
        mixing(0.1): result(2, 0, 0.1),
        mixing(0.2): result(3, 0, 0.1),
        mixing(0.3): result(0, 4, -0.1),
        steering: result(9, 0, 0.9),
    }
    assert chosen(results, 1, by="family") == mixing(0.2)
    assert chosen(results, 1, by="wins") == steering
    assert chosen(results, 4, by="family") == steering, "the margin comes first"


def test_meta_mode_end_to_end(trained):
    """One policy per left-out set and method; each target is adapted with a single round."""
    run = make_run(
        trained,
        "policy.mode=meta",
        "policy.iterations=1",
        "policy.reward_margin=0",
        "data.targets=[alpha, delta]",
        "evaluate.methods=[base, degaml, degaml_plus]",
    )
    policy.train_policies(run)
    for left_out in ("alpha", "all"):
        for method in ("degaml", "degaml_plus"):
            assert (run.path / f"policy/{left_out}/{method}/DONE.json").is_file()
    assert len(list(run.path.glob("policy/*/*/DONE.json"))) == 4

    policy.adapt_targets(run)
    evaluate.evaluate_methods(run)
    for task in ("alpha", "delta"):
        for method in ("degaml", "degaml_plus"):
            episodes = episodes_of(run, method, task)
            assert len(episodes) == 5
            assert {episode["iteration"] for episode in episodes} == {0}
            assert len(runtime.read_jsonl(run.path / f"scores/{method}/{task}.jsonl")) == 12


def test_meta_mode_asks_for_its_policy(trained):
    """Adapting before stage=policy says what is missing."""
    run = make_run(trained, "policy.mode=meta", "data.targets=[delta]")
    with pytest.raises(UserError, match=r"policy/all/degaml.*stage"):
        policy.adapt_targets(run)


FEW = ["data.targets=[delta]", "evaluate.methods=[degaml, degaml_plus]"]


def worth(run: Run) -> dict:
    """What each proposed strategy of delta was found to be worth."""
    found = {}
    for method in ("degaml", "degaml_plus"):
        for episode in episodes_of(run, method, "delta"):
            found[episode["text"]] = [episode[key] for key in policy.NO_GAIN]
    return found


def test_redone_adaptation_uses_no_old_rewards(trained, tmp_path):
    """overwrite=true under another configuration measures every strategy again."""
    shutil.copytree(tmp_path / "run", tmp_path / "fresh")
    policy.adapt_targets(make_run(trained, *FEW))
    change = [*FEW, "generator.seed=2", "overwrite=true"]
    again = make_run(trained, *change)
    fresh = make_run(trained, *change, f"run={tmp_path / 'fresh'}")
    for run in (again, fresh):
        generator.train_generators(run)
        policy.adapt_targets(run)
    assert worth(again) == worth(fresh)


def test_interrupted_adaptation_is_not_mixed_with_another_configuration(
    trained, tmp_path, monkeypatch
):
    """Rewards measured under the old configuration are measured again, never reused in silence."""
    shutil.copytree(tmp_path / "run", tmp_path / "fresh")

    def interrupt(*args):
        raise KeyboardInterrupt

    run = make_run(trained, *FEW)
    with monkeypatch.context() as patch:
        patch.setattr(policy, "choose", interrupt)
        with pytest.raises(KeyboardInterrupt):
            policy.adapt_targets(run)
    assert next(run.path.glob("adapted/rewards*/delta.jsonl"))

    change = [*FEW, "policy.folds=4", "strategies.ttl_threshold=0"]
    fresh = make_run(trained, *change, f"run={tmp_path / 'fresh'}")
    policy.adapt_targets(fresh)
    again = make_run(trained, *change)
    policy.adapt_targets(again)
    assert worth(again) == worth(fresh)


def test_plain_twins_join_the_proposals():
    """Every proposed SFT is a candidate from the plain start too, once; the rest is unchanged."""
    other = mixing(0.5)
    half = sft(4, share=0.5)
    plain = sft(2, share=0.0)
    found = policy.with_plain_twins([other, sft(2), half, plain, sft(2)])
    assert len(found) == 5
    assert set(found) == {other, sft(2), half, plain, sft(4, share=0.0)}
    assert policy.with_plain_twins([other]) == [other]


def test_longer_trainings_are_measured_first(run):
    """So that the shorter ones come for nothing; SFT goes before the other families."""
    results = rewards_of(run).of_all([KEEP, sft(2), sft(4), sft(2)], "test")
    assert list(results) == [sft(4), sft(2), KEEP]
    assert results[sft(2)]["backwards"] == results[sft(4)]["backwards"], "one trajectory"


def test_no_meta_starts_plain_with_the_proposed_settings(run, monkeypatch):
    """Its candidates are degaml_plus' proposals from a plain start, which are measured already."""
    run.cfg.data.targets = ["delta"]
    policy.adapt_targets(run)
    proposed = set()
    for episode in episodes_of(run, "degaml_plus", "delta"):
        if episode["strategy"].get("family") == "SFT":
            proposed.add(Strategy.from_dict(episode["strategy"]).but(init_scale=0.0))
    path = next(run.path.glob("adapted/rewards*/delta.plain-*.jsonl"))
    rows = {}
    for row in runtime.read_jsonl(path):
        found = Strategy.from_dict(json.loads(row["strategy"]))
        assert found["init_scale"] == 0, "nothing of a generated adapter is shared"
        rows[found] = row
    assert proposed
    assert proposed <= set(rows)

    with monkeypatch.context() as patch:
        patch.setattr(Rewards, "measure", None)  # nothing is measured again
        baselines.train_baselines(run)
    candidates = baselines.candidate_sft(run, "delta", 0.0)
    assert set(candidates) == proposed

    # the whole of a plain start is the same training as nothing of a generated one
    target, support = delta(run)
    target.start = lora.init_adapter(target.lm.layout, run.cfg.seed)
    whole = candidates[0].but(init_scale=1.0)
    want = Rewards(run, "plain", target, support).measure(whole)[str(whole)]
    for key in ("correct", "gold_logp"):
        assert rows[candidates[0]][key] == want[key]


def test_no_meta_without_proposals_is_refused(trained):
    """With nothing proposed there is nothing to choose from, and the base is no baseline."""
    with pytest.raises(UserError, match="degaml_plus"):
        make_run(trained, "evaluate.methods=[base, no_meta]", "data.targets=[delta]")


def test_families_of_the_two_methods():
    """SFT belongs to degaml_plus alone, whatever the configuration lists."""
    wanted = ["TTT", "SFT", "LORA"]
    assert methods.families_of("degaml", wanted) == ["TTT", "LORA"]
    assert methods.families_of("degaml_plus", wanted) == ["TTT", "LORA", "SFT"]


def test_a_plain_start_is_shared_by_one_support_set_alone(run):
    """Another draw of labels has rewards of its own."""
    target, support = delta(run)
    rest = list(data.load_tasks(run)["delta"].test)[: len(support)]
    first = Rewards(run, "delta.draw_0", target, support)
    second = Rewards(run, "delta.draw_1", target, rest)
    plain = sft(2, share=0.0)
    first.of(plain)
    assert first.plain_file != second.plain_file
    second.of(plain)
    assert second.plain_file.exists()
    # another method on the same labels finds them there
    assert Rewards(run, "other", target, support).plain_file == first.plain_file


def test_modules_of_the_policy_are_named_by_their_own_key(run):
    run.cfg.policy.modules = ["qkv_proj"]
    with pytest.raises(UserError, match=r"^policy.modules: \['qkv_proj'\] not found"):
        policy.policy_layout(run)
