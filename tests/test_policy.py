"""Proposals, rewards, ReST-EM, selection and evaluation, on tiny random models."""

import json
import re
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import policy
from baselines import candidate_sft, train_baselines
from collect import collect_adapters
from config import UserError, load_config
from data import load_tasks
from evaluate import evaluate_methods
from generator import load_generator, train_generators
from lora import adapter_hash, init_adapter, swap_adapter
from policy import (
    FAMILIES_OF,
    Rewards,
    adapt_targets,
    choose,
    evaluate_strategy,
    fold_indices,
    make_target,
    plan_families,
    policy_layout,
    proposal_prompt,
    reward_of,
    rewarded,
    sample_proposals,
    train_policies,
    train_policy,
    with_plain_twins,
)
from runtime import Run, read_json, read_jsonl, write_json
from scoring import Row, branch_logprobs, encode, hidden_states, load_lm, score_examples
from strategies import KEEP, Strategy, parse_strategy, proposal_schema

FAMILIES = ["TTT", "LORA", "TTS", "Latent", "SFT"]
_READY: dict = {}


def strategy(family: str, **fields) -> Strategy:
    return Strategy(family, tuple(fields.items()))


def sft(steps: int, loss: str = "lm") -> Strategy:
    return strategy(
        "SFT", sft_steps=steps, learning_rate=1e-2, batch_size=4, loss=loss, init_scale=1.0
    )


def make_run(args: list[str], *more: str) -> Run:
    cfg, _ = load_config([*args, *more])
    Path(cfg.run).mkdir(parents=True, exist_ok=True)
    return Run(Path(cfg.run), cfg, quiet=True)


@pytest.fixture
def trained(tiny_args, tmp_path, tmp_path_factory) -> list[str]:
    """Arguments of a run folder in which checkpoints and all generators are trained."""
    if "trained" not in _READY:
        folder = tmp_path_factory.mktemp("trained") / "run"
        run = make_run(tiny_args, f"run={folder}")
        collect_adapters(run)
        train_generators(run)
        _READY["trained"] = folder
    shutil.copytree(_READY["trained"], tmp_path / "run")
    return tiny_args


@pytest.fixture
def run(trained) -> Run:
    return make_run(trained)


def ready(run: Run, name: str = "delta"):
    """(target, support, scores of the generated adapter) of a task."""
    task = load_tasks(run)[name]
    target = make_target(run, task)
    return target, list(task.support), score_examples(target.lm, target.start, list(task.support))


# -------------------------------------------------------------------------------------------------- proposals


@pytest.mark.parametrize("grid", [True, False], ids=["grid", "open"])
@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_proposals_always_parse(run, family, grid):
    """What an untrained model samples under the grammar is a valid strategy, on the grid if there is one."""
    bounds = (
        run.cfg.strategies if grid else run.cfg.strategies.model_copy(update={"proposal_grid": {}})
    )
    hot = run.cfg.policy.model_copy(
        update={"temperature": 3.0, "top_p": 1.0, "top_k": 400, "max_new_tokens": 600}
    )
    lm, layout = load_lm(run), policy_layout(run)
    texts = sample_proposals(
        lm, layout, None, "Adapt.", [proposal_schema(bounds, [family])] * 6, hot, seed=3
    )
    assert len(texts) == 6
    for text in texts:
        s = parse_strategy(text, bounds, [family])
        assert (
            sorted(json.loads(text)) == sorted(["family", *dict(s.fields)]) and s.family == family
        )
        for name, value in s.fields:
            assert value in bounds.proposal_grid.get(f"{family}.{name}", [value])
    if not grid:
        assert len(set(texts)) > 1 or family == "LORA"


def test_free_samples_use_every_family(run):
    """An untied sample may be of any offered family and of no other."""
    p = run.cfg.policy.model_copy(update={"temperature": 5.0, "top_p": 1.0})
    schemas = [proposal_schema(run.cfg.strategies, FAMILIES[:4])] * 24
    texts = sample_proposals(load_lm(run), policy_layout(run), None, "Adapt.", schemas, p, seed=1)
    found = {parse_strategy(t, run.cfg.strategies, FAMILIES[:4]).family for t in texts}
    assert len(found) >= 2 and "SFT" not in found


def test_sampling_is_seeded_and_leaves_the_base_bare(run):
    """One seed gives one set of proposals; the policy's adapter is out of the model afterwards."""
    lm, layout = load_lm(run), policy_layout(run)
    schemas = [proposal_schema(run.cfg.strategies, FAMILIES)] * 4
    ids = torch.arange(30)[None]
    with torch.no_grad():
        before = lm.model(ids).logits
    own = {k: v + 0.3 for k, v in init_adapter(layout, 0).items()}
    first = sample_proposals(lm, layout, own, "Adapt.", schemas, run.cfg.policy, seed=7)
    assert first == sample_proposals(lm, layout, own, "Adapt.", schemas, run.cfg.policy, seed=7)
    with torch.no_grad():
        assert torch.equal(lm.model(ids).logits, before)
    spread = run.cfg.policy.model_copy(update={"temperature": 5.0, "top_p": 1.0})
    others = {
        tuple(sample_proposals(lm, layout, None, "Adapt.", schemas, spread, seed=s))
        for s in range(3)
    }
    assert len(others) > 1


def test_batched_samples_equal_single_ones(run):
    """With one legal token a step, sharing the prompt's cache between samples changes nothing."""
    greedy = run.cfg.policy.model_copy(update={"top_k": 1})
    lm, layout = load_lm(run), policy_layout(run)
    schemas = [proposal_schema(run.cfg.strategies, [f]) for f in FAMILIES]
    together = sample_proposals(lm, layout, None, "Adapt this.", schemas, greedy, seed=0)
    alone = [
        sample_proposals(lm, layout, None, "Adapt this.", [s], greedy, seed=0)[0] for s in schemas
    ]
    assert together == alone


def test_plan_gives_every_family_its_minimum():
    """`minimum` samples are tied to each family, the rest may use any; never more than `count`."""
    plan = plan_families(["A", "B", "C"], 8, 2)
    assert plan == [["A"], ["A"], ["B"], ["B"], ["C"], ["C"], ["A", "B", "C"], ["A", "B", "C"]]
    assert plan_families(["A", "B"], 3, 0) == [["A", "B"]] * 3
    assert plan_families(["A", "B"], 3, 2) == [["A"], ["A"], ["B"]]


def test_prompt_states_task_and_performance(run):
    """The policy reads context, support performance and each offered family once; nothing of the test set."""
    task = load_tasks(run)["delta"]
    _, support, reference = ready(run)
    text = proposal_prompt(load_lm(run), task, FAMILIES[:4], reference, "norm")
    right = sum(s.pick("norm") == e.gold for s, e in zip(reference, support, strict=True))
    assert f"{right} of {len(support)}" in text
    assert all(text.count(f'"family": "{f}"') == 1 for f in FAMILIES[:4]) and '"SFT"' not in text
    assert not any(e.text in text for e in task.test)


# ---------------------------------------------------------------------------------------------------- rewards


@pytest.mark.parametrize(
    "wins, losses, margin, ties, reward",
    [
        (2, 1, 1, False, 1),
        (1, 1, 1, False, 0),
        (0, 0, 1, False, 0),
        (0, 1, 1, False, 0),
        (3, 1, 2, False, 1),
        (2, 1, 2, False, 0),
        (1, 1, 1, True, 1),
        (1, 2, 1, True, 0),
        (2, 1, 2, True, 0),
        (0, 0, 0, False, 1),
    ],
)
def test_reward_margin_and_ties(run, wins, losses, margin, ties, reward):
    """Reward is binary: net wins reach the margin, or tie where ties count."""
    p = run.cfg.policy.model_copy(update={"reward_margin": margin, "tie_reward": ties})
    assert reward_of({"wins": wins, "losses": losses, "gold_logp_gain": 9.0}, p) == reward


def result(wins, losses, gain) -> dict:
    return {"wins": wins, "losses": losses, "gold_logp_gain": gain}


def margins(label_free: int, sft: int = 0) -> SimpleNamespace:
    return SimpleNamespace(select_margin=label_free, sft_margin=sft, select_by="wins")


def test_choose_takes_net_wins_then_log_probability():
    """Most net wins, ties by gain; below the margin or without a gain, the adapter is kept."""
    a, b, c = (str(strategy("LORA", **{"lambda": v})) for v in (0.1, 0.2, 0.3))
    results = {a: result(3, 1, 0.1), b: result(2, 0, 0.4), c: result(4, 3, 9.0)}
    best, found = choose(results, margins(1))
    assert best["lambda"] == 0.2 and found == results[b]
    assert choose(results, margins(2))[0]["lambda"] == 0.2
    assert choose(results, margins(3)) == (KEEP, result(0, 0, 0.0))
    assert choose({a: result(5, 0, -0.1), b: result(1, 0, 0.1)}, margins(1))[0]["lambda"] == 0.2
    assert (
        choose({a: result(5, 0, 0.0)}, margins(1))[0] == KEEP and choose({}, margins(1))[0] == KEEP
    )
    assert choose({a: result(0, 0, 0.1)}, margins(0))[0]["lambda"] == 0.1
    assert choose({a: result(0, 1, 5.0)}, margins(0))[0] == KEEP
    sft = '{"family": "SFT", "sft_steps": 5}'
    assert choose({sft: result(1, 0, 0.1)}, margins(2, sft=1))[0].family == "SFT"
    assert choose({sft: result(1, 0, 0.1)}, margins(1, sft=2))[0] == KEEP


def test_choose_by_log_probability():
    """The margins hold as before; among what passes them the higher log-probability wins, ties by net wins."""
    by = SimpleNamespace(select_margin=3, sft_margin=1, select_by="gold_logp")
    free, sft_, other = str(strategy("LORA", **{"lambda": 0.1})), str(sft(2)), str(sft(4))
    assert (
        choose({free: result(2, 0, 9.0), sft_: result(0, 0, 9.0), other: result(5, 0, 0.0)}, by)[0]
        == KEEP
    )
    assert choose({sft_: result(1, 0, 0.2), other: result(5, 0, 0.1)}, by)[0] == sft(2)
    assert choose({sft_: result(1, 0, 0.1), free: result(3, 0, 0.2)}, by)[0].family == "LORA"
    assert choose({sft_: result(1, 0, 0.1), other: result(2, 0, 0.1)}, by)[0] == sft(4)


def test_rewarded_is_distinct_best_first_and_capped():
    """Equal texts count once; more net wins first, then larger gain; at most `cap`; nothing unrewarded."""
    rows = [
        ("c", 1, 0.1, 1),
        ("a", 3, 0.1, 1),
        ("c", 1, 0.1, 1),
        ("x", 5, 1.0, 0),
        ("b", 1, 0.9, 1),
    ]
    episodes = [{"text": t, "reward": r, **result(w, 0, g)} for t, w, g, r in rows]
    assert rewarded(episodes, "p", 10) == [("p", "a"), ("p", "b"), ("p", "c")]
    assert rewarded(episodes, "p", 2) == [("p", "a"), ("p", "b")]


@pytest.mark.parametrize("n, folds", [(8, 2), (20, 4), (7, 3)])
def test_folds_partition_the_support(run, n, folds):
    """Every example is held out exactly once, in folds of nearly equal size, the same each time."""
    target, *_ = ready(run)
    got = fold_indices(target, n, folds)
    assert sorted(i for f in got for i in f) == list(range(n)) and len(got) == folds
    assert max(map(len, got)) - min(map(len, got)) <= 1 and got == fold_indices(target, n, folds)


def test_sft_reward_scores_no_fitted_example(run, monkeypatch):
    """No support example is scored by an adapter trained on it, and each is scored once per length."""
    target, support, reference = ready(run)
    fitted, scored = {}, Counter()
    real_train, real_score = policy.train_on_support, policy.score_examples

    def train(target, s, labelled, at_steps=()):
        out = real_train(target, s, labelled, at_steps)
        fitted.update({id(a): {e.id for e in labelled} for a in out.values()})
        train.alive.append(out)  # ids stay unique while the adapters live
        return out

    train.alive = []

    def score(lm, adapter, examples, **kwargs):
        assert len(fitted[id(adapter)]) == 4, "two folds of eight"
        assert not fitted[id(adapter)] & {e.id for e in examples}
        scored.update(e.id for e in examples)
        return real_score(lm, adapter, examples, **kwargs)

    monkeypatch.setattr(policy, "train_on_support", train)
    monkeypatch.setattr(policy, "score_examples", score)
    found = evaluate_strategy(target, sft(4), support, "norm", 2, [2, 4])
    assert set(found) == {str(sft(2)), str(sft(4))}
    assert scored == {e.id: 2 for e in support}


def test_shorter_trainings_come_from_the_longer_one(run):
    """Results of s steps read off a longer training are those of a training of s steps, to the last digit."""
    target, support, reference = ready(run)
    both = evaluate_strategy(target, sft(6, "choice"), support, "norm", 2, [2, 6])
    alone = evaluate_strategy(target, sft(2, "choice"), support, "norm", 2)
    keys = ("correct", "gold_logp")
    assert [both[str(sft(2, "choice"))][k] for k in keys] == [
        alone[str(sft(2, "choice"))][k] for k in keys
    ]
    assert alone[str(sft(2, "choice"))]["backwards"] == 2 * 2 * 4, (
        "two folds of two steps of four rows"
    )


def test_keeping_the_adapter_changes_nothing(run):
    """Against itself the generated adapter neither wins nor loses."""
    target, support, reference = ready(run)
    found = Rewards(run, "delta", target, support, reference).of(KEEP)
    assert (found["wins"], found["losses"], found["gold_logp_gain"]) == (0, 0, 0)
    assert (found["forwards"], found["backwards"]) == (8, 0)


def test_an_identical_strategy_is_executed_once(run, monkeypatch):
    """Results are kept in the file: a second request, also by another method's object, executes nothing."""
    target, support, reference = ready(run)
    done, real = [], policy.execute
    monkeypatch.setattr(policy, "execute", lambda t, s, *a: done.append(str(s)) or real(t, s, *a))
    s = strategy("LORA", **{"lambda": 0.5})
    rewards = Rewards(run, "delta", target, support, reference)
    first = rewards.of(s)
    assert rewards.of(s) == first
    assert Rewards(run, "delta", target, support, reference).of(s) == first
    assert done == [str(s)]


def test_a_diverged_training_loses(run, monkeypatch):
    """A strategy whose loss is not finite earns nothing and stops nothing."""
    target, support, reference = ready(run)

    def diverge(target, s, *args):
        raise FloatingPointError(0, float("nan"), {})

    monkeypatch.setattr(policy, "execute", diverge)
    found = Rewards(run, "delta", target, support, reference).of(
        strategy("LORA", **{"lambda": 0.5})
    )
    assert found["wins"] == 0 and found["losses"] > 0 and reward_of(found, run.cfg.policy) == 0


def test_no_strategy_is_evaluated_twice_by_two_methods(run, monkeypatch):
    """degaml_plus finds what degaml measured; an SFT length comes from the longest of its kind."""
    asked, real = [], policy.evaluate_strategy

    def evaluate(target, s, *args, **kwargs):
        asked.append((target.name, str(s)))
        return real(target, s, *args, **kwargs)

    monkeypatch.setattr(policy, "evaluate_strategy", evaluate)
    adapt_targets(run)
    assert asked and len(asked) == len(set(asked))
    for task in load_tasks(run):
        told = [
            read_jsonl(run.path / f"adapted/{m}/{task}/episodes.jsonl")
            for m in ("degaml", "degaml_plus")
        ]
        assert all(len(e) == 10 for e in told)
        texts = [{json.dumps(x["strategy"], sort_keys=True) for x in e if x["valid"]} for e in told]
        assert texts[0] & texts[1], "the two methods proposed something in common"
        plain = {
            json.dumps(json.loads(t) | {"init_scale": 0.0}, sort_keys=True)
            for t in texts[1]
            if "SFT" in t
        }
        assert len([n for n, _ in asked if n == task]) <= len(texts[0] | texts[1] | plain)
        assert not any(x["strategy"].get("family") == "SFT" for x in told[0])


def test_policy_gradient_does_not_reach_the_generator(run):
    """ReST-EM changes the policy only: the generator gathers no gradient and keeps its weights."""
    target, *_ = ready(run)
    decoder = load_generator(run, "none").decoder
    before = {k: v.clone() for k, v in decoder.state_dict().items()}
    base = {k: v.clone() for k, v in load_lm(run).model.state_dict().items()}
    prompt, text = "Adapt.", '{"family":"LORA","lambda":0.5}'
    assert train_policy(run, policy_layout(run), [(prompt, text)], 0) is not None
    _, support, reference = ready(run)
    evaluate_strategy(target, sft(2), support, "norm", 2)
    assert all(p.grad is None and not p.requires_grad for p in decoder.parameters())
    assert all(torch.equal(v, before[k]) for k, v in decoder.state_dict().items())
    assert not any(v.requires_grad for v in target.start.values())
    now = {k.replace(".base.", "."): v for k, v in load_lm(run).model.state_dict().items()}
    assert all(torch.equal(v, now[k.replace(".base.", ".")]) for k, v in base.items())


# ---------------------------------------------------------------------------------------------------- ReST-EM


def test_without_rewarded_samples_there_is_no_policy(run):
    """Nothing to learn from: the base stays the policy."""
    assert train_policy(run, policy_layout(run), [], 0) is None


def test_training_raises_the_probability_of_what_was_rewarded(run):
    """After one Improve step the rewarded text is likelier under its prompt than before."""
    lm, layout = load_lm(run), policy_layout(run)
    texts = ['{"family":"LORA","lambda":0.5}', '{"family":"Latent","slot_steps":2,"slot_lr":0.1}']
    run.cfg.policy.epochs = 4
    learnt = train_policy(run, layout, [("Adapt this.", t) for t in texts], 0)
    branches = tuple((*lm.tokenizer(t)["input_ids"], lm.tokenizer.eos_token_id) for t in texts)
    row = Row(tuple(encode(lm, "Adapt this.")), branches, (0, 0), (1, 1))

    @torch.no_grad()
    def logp(adapter):
        swap_adapter(lm.model, layout, adapter)
        value = branch_logprobs(lm, [row], *hidden_states(lm, [row]))[0]
        swap_adapter(lm.model, layout, None)
        return value

    assert bool((logp(learnt) > logp(None) + 1.0).all())
    again = train_policy(run, layout, [("Adapt this.", t) for t in texts], 0)
    assert adapter_hash(again) == adapter_hash(learnt)


def test_each_improve_step_restarts_from_the_base(run, monkeypatch):
    """The second iteration samples from the trained policy; its training starts afresh."""
    used, starts = [], []
    real_sample, real_train = policy.sample_proposals, policy.train_adapter

    def sample(lm, layout, adapter, *args):
        used.append(None if adapter is None else adapter_hash(adapter))
        return real_sample(lm, layout, adapter, *args)

    def train(model, layout, adapter, *args, **kwargs):
        starts.append(adapter)
        return real_train(model, layout, adapter, *args, **kwargs)

    monkeypatch.setattr(policy, "sample_proposals", sample)
    monkeypatch.setattr(policy, "train_adapter", train)
    run.cfg.policy.iterations, run.cfg.policy.tie_reward = 3, True
    run.cfg.data.targets, run.cfg.evaluate.methods = ["delta"], ["degaml_plus"]
    adapt_targets(run)
    assert used[0] is None and None not in used[1:] and len(used) == 3
    assert len(starts) == 2 and all(
        not v.any() for a in starts for k, v in a.items() if "lora_B" in k
    )


# ---------------------------------------------------------------------------------------------- meta-training


def test_meta_policy_never_touches_the_left_out_task(trained, monkeypatch):
    """Algorithm 2 for target t reads supports, prompts and generators of the other training tasks only."""
    run = make_run(trained, "policy.mode=meta", "policy.iterations=1")
    touched, scored = set(), set()
    real_generate, real_score = policy.generate_adapter, policy.score_examples

    def generate(run, name, batch, *args, left_out=None, **kwargs):
        touched.add((name, left_out))
        return real_generate(run, name, batch, *args, left_out=left_out, **kwargs)

    def score(lm, adapter, examples, **kwargs):
        scored.update(e.id for e in examples)
        return real_score(lm, adapter, examples, **kwargs)

    monkeypatch.setattr(policy, "generate_adapter", generate)
    monkeypatch.setattr(policy, "score_examples", score)
    policy._meta_train(run, "alpha", "degaml_plus")
    tasks = load_tasks(run)
    assert {n for n, _ in touched} == {"beta", "gamma"} and {left for _, left in touched} == {
        "alpha"
    }
    assert scored == {e.id for t in ("beta", "gamma") for e in tasks[t].support}
    episodes = read_jsonl(run.path / "policy/alpha/degaml_plus/episodes.jsonl")
    assert {e["task"] for e in episodes} == {"beta", "gamma"}


def test_meta_mode_end_to_end(trained):
    """One policy per left-out set and method; each target is then adapted with a single proposal round."""
    run = make_run(
        trained,
        "policy.mode=meta",
        "policy.iterations=1",
        "policy.tie_reward=true",
        "data.targets=[alpha, delta]",
        "evaluate.methods=[base, degaml, degaml_plus]",
    )
    train_policies(run)
    made = {p.parent.parts[-2:] for p in run.path.glob("policy/*/*/DONE.json")}
    assert made == {
        (left, method) for left in ("alpha", "none") for method in ("degaml", "degaml_plus")
    }
    adapt_targets(run)
    evaluate_methods(run)
    for task in ("alpha", "delta"):
        for method in ("degaml", "degaml_plus"):
            episodes = read_jsonl(run.path / f"adapted/{method}/{task}/episodes.jsonl")
            assert len(episodes) == 5 and {e["iteration"] for e in episodes} == {0}
            assert len(read_jsonl(run.path / f"scores/{method}/{task}.jsonl")) == 12


def test_meta_mode_asks_for_its_policy(trained):
    """Adapting before stage=policy says what is missing."""
    run = make_run(trained, "policy.mode=meta", "data.targets=[delta]")
    with pytest.raises(UserError, match="policy/none/degaml.*stage"):
        adapt_targets(run)


# ------------------------------------------------------------------------------------------------- evaluation


def adapted_files(folder: Path) -> dict:
    """Everything a target's adaptation left, without the times it took."""
    out = {}
    for p in sorted(folder.glob("adapted/**/*")):
        key = re.sub(r"rewards-\w+", "rewards", str(p.relative_to(folder)))
        if p.suffix == ".safetensors":
            out[key] = p.read_bytes()
        elif p.name == "prompt.txt":
            out[key] = p.read_text()
        elif p.suffix == ".jsonl":
            out[key] = [{k: v for k, v in r.items() if k != "seconds"} for r in read_jsonl(p)]
        elif p.name == "strategy.json":
            out[key] = read_json(p)
    return out


def test_test_labels_reach_evaluation_only(tiny_args, tiny_jsonl, tmp_path):
    """With every test gold changed, all up to the baselines is byte-identical; the evaluation is not."""
    bad, files = tmp_path / "corrupted", {}
    bad.mkdir()
    loose = [
        "policy.select_margin=0",
        "policy.sft_margin=0",
        "policy.tie_reward=true",
        "data.targets=[alpha, delta, epsilon]",
    ]
    clean = make_run(tiny_args, *loose)
    for name, task in load_tasks(clean).items():
        hit = {e.id for e in task.test}
        rows = [json.loads(line) for line in Path(tiny_jsonl[name]).read_text().splitlines()]
        rows = [
            r | {"gold": (r["gold"] + 1) % len(r["choices"])} if r["id"] in hit else r for r in rows
        ]
        files[name] = str(bad / f"{name}.jsonl")
        Path(files[name]).write_text("".join(json.dumps(r) + "\n" for r in rows))
    wrong = make_run(
        tiny_args, *loose, f"run={tmp_path / 'wrong'}", f"data.jsonl={json.dumps(files)}"
    )
    for name, task in load_tasks(wrong).items():
        same = load_tasks(clean)[name]
        assert [e.id for e in task.test] == [
            e.id for e in same.test
        ] and task.support == same.support
        assert all(a.gold != b.gold for a, b in zip(task.test, same.test, strict=True))
    for run in (clean, wrong):
        for stage in (
            collect_adapters,
            train_generators,
            adapt_targets,
            train_baselines,
            evaluate_methods,
        ):
            stage(run)
    found = adapted_files(clean.path)
    assert len([k for k in found if k.endswith(".safetensors")]) == 3 * 4
    assert {v["strategy"]["family"] for k, v in found.items() if k.endswith("strategy.json")} > {
        "none"
    }
    assert adapted_files(wrong.path) == found
    a, b = (read_jsonl(run.path / "scores/degaml_plus/delta.jsonl") for run in (clean, wrong))
    assert [r["raw"] for r in a] == [r["raw"] for r in b] and [r["gold"] for r in a] != [
        r["gold"] for r in b
    ]


def adapted_by_hand(run: Run, method: str, task: str, s: Strategy) -> None:
    write_json(run.path / f"adapted/{method}/{task}/strategy.json", {"strategy": s.as_dict()})


def test_ensembles_are_never_taken_for_one_another(run):
    """Results shared between methods are those of the same adapters and the same combination."""
    cfg, lm, task = run.cfg, load_lm(run), load_tasks(run)["delta"]
    target, memo = make_target(run, task), {}
    kinds = [
        (m, method)
        for method in ("sum_logprobs", "majority_vote", "max_confidence", "avg_prompt_embed")
        for m in (1, 2, 3, 4)
    ]
    for m, method in kinds:
        adapted_by_hand(
            run, "degaml", "delta", strategy("TTS", num_prompt_batches=m, method=method)
        )
        shared = evaluate._test_rows(run, lm, task, target, "degaml", memo)
        assert shared == evaluate._test_rows(run, lm, task, target, "degaml", {}), (m, method)


def test_what_was_chosen_is_what_is_evaluated(run):
    """Test scores of a stored choice are those of executing it again; steering is part of it."""
    cfg, lm, task = run.cfg, load_lm(run), load_tasks(run)["delta"]
    target = make_target(run, task)
    for s in (
        strategy("Latent", slot_steps=2, slot_lr=0.1),
        strategy("TTS", num_prompt_batches=2, method="max_confidence"),
    ):
        adapted_by_hand(run, "degaml", "delta", s)
        rows = evaluate._test_rows(run, lm, task, target, "degaml", {})
        want = policy.score_refined(target, policy.execute(target, s), list(task.test))
        assert [r["raw"] for r in rows] == [[round(x, 4) for x in w.raw] for w in want]
        assert [r["pred_norm"] for r in rows] == [w.pick("norm") for w in want]
        assert [r["correct_norm"] for r in rows] == [
            float(w.pick("norm") == e.gold) for w, e in zip(want, task.test, strict=True)
        ]


def test_generator_is_averaged_over_prompt_batches(run):
    """Correctness of method `generator` is the mean over its prompt batches."""
    cfg, lm, task = run.cfg, load_lm(run), load_tasks(run)["beta"]
    target, test = make_target(run, task), list(task.test)
    rows = evaluate._test_rows(run, lm, task, target, "generator", {})
    picks = [
        [s.pick("norm") for s in score_examples(lm, target.draw(b)[0], test)] for b in range(2)
    ]
    for i, (row, e) in enumerate(zip(rows, test, strict=True)):
        assert row["correct_norm"] == sum(p[i] == e.gold for p in picks) / 2
    adapted_by_hand(run, "degaml", "beta", KEEP)
    assert evaluate._test_rows(run, lm, task, target, "degaml", {}) == rows, (
        "kept: scored as the generator is"
    )


# ---------------------------------------------------------------------------------------------- stale results


def results_of(run: Run, task: str = "delta") -> dict:
    """What each proposed strategy of a task was found to be worth."""
    files = run.path.glob(f"adapted/degaml*/{task}/episodes.jsonl")
    return {
        r["text"]: (r["wins"], r["losses"], r["gold_logp_gain"])
        for p in files
        for r in read_jsonl(p)
    }


FEW = ["data.targets=[delta]", "evaluate.methods=[degaml, degaml_plus]"]


def test_redone_adaptation_uses_no_old_rewards(trained, tmp_path):
    """overwrite=true under another configuration measures every strategy again."""
    shutil.copytree(tmp_path / "run", tmp_path / "fresh")
    run = make_run(trained, *FEW)
    adapt_targets(run)
    change = [*FEW, "generator.seed=2", "overwrite=true"]
    again, fresh = (
        make_run(trained, *change),
        make_run(trained, *change, f"run={tmp_path / 'fresh'}"),
    )
    for r in (again, fresh):
        train_generators(r.cfg, r)
        adapt_targets(r.cfg, r)
    assert results_of(again) == results_of(fresh)


def test_interrupted_adaptation_is_not_mixed_with_another_configuration(
    trained, tmp_path, monkeypatch
):
    """Rewards measured under the old configuration are refused or measured again, never reused in silence."""
    shutil.copytree(tmp_path / "run", tmp_path / "fresh")
    run = make_run(trained, *FEW)
    monkeypatch.setattr(policy, "choose", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        adapt_targets(run)
    monkeypatch.undo()
    assert next(run.path.glob("adapted/rewards*/delta.jsonl"))
    change = [*FEW, "policy.folds=4", "strategies.ttl_threshold=0"]
    fresh = make_run(trained, *change, f"run={tmp_path / 'fresh'}")
    adapt_targets(fresh.cfg, fresh)
    again = make_run(trained, *change)
    try:
        adapt_targets(again.cfg, again)
    except UserError as e:
        assert "policy.folds" in str(e)
    else:
        assert results_of(again) == results_of(fresh)


# -------------------------------------------------------------------------------------------------- baselines


def test_plain_twins_join_the_proposals():
    """Every proposed SFT is a candidate from the plain start too, once; longer trainings first; the rest unchanged."""
    lora = strategy("LORA", **{"lambda": 0.5})
    got = with_plain_twins(
        [lora, sft(2), sft(4).but(init_scale=0.5), sft(2).but(init_scale=0.0), sft(2)]
    )
    want = [
        sft(4).but(init_scale=0.5),
        sft(4).but(init_scale=0.0),
        sft(2),
        sft(2).but(init_scale=0.0),
        lora,
    ]
    assert sorted(map(str, got)) == sorted(map(str, want)) and got[-1] == lora
    assert [s["sft_steps"] for s in got[:-1]] == [4, 4, 2, 2] and with_plain_twins([lora]) == [lora]


def test_no_meta_starts_plain_with_the_proposed_settings(run, monkeypatch):
    """Its candidates are degaml_plus' SFT proposals from a plain start: measured already, and the same training."""
    run.cfg.data.targets = ["delta"]
    adapt_targets(run)
    told = read_jsonl(run.path / "adapted/degaml_plus/delta/episodes.jsonl")
    proposed = {
        json.dumps(e["strategy"] | {"init_scale": 0.0}, sort_keys=True)
        for e in told
        if e["strategy"].get("family") == "SFT"
    }
    rows = {
        r["strategy"]: r
        for r in read_jsonl(next(run.path.glob("adapted/rewards*/delta.plain.jsonl")))
    }
    assert proposed and proposed <= set(rows)
    assert all(json.loads(k)["init_scale"] == 0 for k in rows), (
        "nothing of a generated adapter is shared"
    )
    real = policy.evaluate_strategy
    monkeypatch.setattr(policy, "evaluate_strategy", None)
    train_baselines(run)  # measures nothing again
    assert {str(s) for s in candidate_sft(run, "delta", 0.0)} == proposed
    target, support, _ = ready(run)
    target.start = init_adapter(target.lm.layout, run.cfg.seed)
    s = candidate_sft(run, "delta", 0.0)[0]
    want = real(target, s.but(init_scale=1.0), support, "norm", run.cfg.policy.folds)[
        str(s.but(init_scale=1.0))
    ]
    assert all(rows[str(s)][k] == want[k] for k in ("correct", "gold_logp"))


def test_no_meta_without_proposals_is_refused(trained):
    """With nothing proposed there is nothing to choose from: say so, do not store the base as a baseline."""
    with pytest.raises(UserError, match="degaml_plus"):
        run = make_run(trained, "evaluate.methods=[base, no_meta]", "data.targets=[delta]")
        train_baselines(run)


def test_families_of_the_two_methods(run):
    """SFT belongs to degaml_plus alone, whatever the configuration lists."""
    run.cfg.policy.families = ["TTT", "SFT", "LORA"]
    assert FAMILIES_OF["degaml"](run.cfg) == ["TTT", "LORA"]
    assert FAMILIES_OF["degaml_plus"](run.cfg) == ["TTT", "LORA", "SFT"]
