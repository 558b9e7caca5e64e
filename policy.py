"""Stage 3: the policy LLM proposes a strategy as JSON, rewards come from the support set, ReST-EM improves it.

    python degaml.py stage=policy config=…     (policy.mode=meta: paper D, Algorithm 2)
    python degaml.py stage=adapt config=…      -> adapted/<degaml | degaml_plus>/<task>/
    python degaml.py stage=evaluate config=…   -> scores/<method>/<task>.jsonl

The policy is the base model with an adapter of its own. Test labels are read by `evaluate_methods` alone.
"""

from __future__ import annotations

import functools
import hashlib
import json
import time
from pathlib import Path

import torch
import yaml

from alignment import align_adapter, load_aligner
from config import ALIGNED, GENERATED, META_TRAINED, UserError
from data import Task, describe_tasks, load_tasks
from generator import (
    adapter_hash,
    encode_texts,
    generate_adapter,
    last_checkpoint,
    left_out_for,
    load_pooled,
    mean_adapter,
    save_generated,
    task_texts,
    training_tasks,
)
from lora import (
    Adapter,
    Layout,
    attach_lora,
    clear_adapters,
    draw_adapter,
    find_layout,
    init_adapter,
    load_adapter,
    load_posterior,
    rate,
    save_adapter,
    swap_adapter,
    train_adapter,
)
from runtime import (
    Run,
    fingerprint,
    read_json,
    read_jsonl,
    rng_for,
    seed_for,
    to_device,
    write_json,
    write_jsonl,
    write_text,
)
from scoring import (
    LM,
    Row,
    Scores,
    accuracy,
    branch_logprobs,
    chat_prompt,
    compare,
    encode,
    generate_answers,
    gold_logprob,
    hidden_states,
    judge,
    load_lm,
    match_answer,
    parse_letter,
    score_examples,
)
from strategies import (
    KEEP,
    Refined,
    Strategy,
    Target,
    check_grid,
    execute,
    execute_finite,
    parse_strategy,
    pool_scores,
    proposal_schema,
    score_refined,
    train_on_support,
)

FAMILIES_OF = {"degaml": lambda cfg: [f for f in cfg.policy.families if f != "SFT"],
               "degaml_plus": lambda cfg: [*(f for f in cfg.policy.families if f != "SFT"), "SFT"]}
FAMILIES_OF |= {"tempo": FAMILIES_OF["degaml"], "tempo_plus": FAMILIES_OF["degaml_plus"]}   # from the aligned adapter

SYSTEM = ("You are a specialist in adapting language models. You choose how a model's adapter is refined for a task "
          "it has not seen, and you answer with one JSON object and nothing else.")
DESCRIPTIONS = {
    "TTT": "Test-time training: gradient steps that lower the perplexity of the task's unlabelled questions.\n"
           '{"family": "TTT", "ttl_steps": <integer>, "learning_rate": <float>, "batch_size": <integer>, '
           '"shuffle_data": <boolean>}',
    "LORA": "LoRA subspace mixing: blends the two halves of the adapter's rank by a ratio from 0 to 1.\n"
            '{"family": "LORA", "lambda": <float>}',
    "TTS": "Test-time scaling: several adapters from different question batches, routed or ensembled.\n"
           '{"family": "TTS", "num_prompt_batches": <integer>, "method": "<avg_sim_score | avg_prompt_embed | '
           'max_confidence | majority_vote | sum_logprobs>"}',
    "Latent": "Latent steering: a vector added to the last hidden state, optimised on each question.\n"
              '{"family": "Latent", "slot_steps": <integer>, "slot_lr": <float>}',
    "SFT": "Supervised steps on the few labelled examples, starting from a share of the generated adapter, 0 to 1.\n"
           '{"family": "SFT", "sft_steps": <integer>, "learning_rate": <float>, "batch_size": <integer>, '
           '"loss": "<lm | choice>", "init_scale": <float>}',
}


# ---------------------------------------------------------------------------------------------------------- proposals

def proposal_prompt(lm: LM, task: Task, families: list[str], support: list[Scores], metric: str) -> str:
    """What the policy reads: task context, the state (support performance of the generated adapter), the families.

    Source: paper T, G.6 for structure and fields; paper D, section 2.2 for the state. The wording is ours.
    """
    right = sum(s.pick(metric) == e.gold for s, e in zip(support, task.support, strict=True))
    log_p = sum(gold_logprob(support, list(task.support), metric)) / len(support)
    order = rng_for("families", task.name).permutation(families)   # the first one listed is proposed too often
    options = "\n".join(f"({i + 1}) {DESCRIPTIONS[f]}" for i, f in enumerate(order))
    user = (f"Task: {task.title}. {task.context or 'No description is available.'}\n"
            f"State: with the generated adapter the model answers {right} of {len(task.support)} labelled examples "
            f"correctly; mean log-probability of the right answer {log_p:.2f}.\n"
            "Choose the one strategy family and the settings that should help most. Families and their JSON:\n"
            f"{options}\n"
            f"Give only the JSON object for {task.title}.")
    return chat_prompt(lm.tokenizer, SYSTEM, user)


@torch.no_grad()
def sample_proposals(lm: LM, layout: Layout, adapter: Adapter | None, prompt: str, schemas: list[dict], policy,
                     seed: int) -> list[str]:
    """One constrained sample per schema, all in one batch behind one cached prompt.

    Sampling at `temperature`, then top-k, then top-p, among the tokens the grammar allows (paper T, G.5).
    """
    import llguidance.numpy as llnp
    from llguidance import LLMatcher
    n, vocab = len(schemas), lm.model.get_output_embeddings().weight.shape[0]
    tokenizer = _grammar_tokenizer(lm.tokenizer, vocab)
    matchers = [LLMatcher(tokenizer, LLMatcher.grammar_from_json_schema(
        json.dumps(s), overrides={"whitespace_flexible": False})) for s in schemas]
    if error := next((m.get_error() for m in matchers if m.is_error()), ""):
        raise RuntimeError(f"the strategy grammar does not compile: {error}")
    bits, places = llnp.allocate_token_bitmask(n, vocab), torch.arange(8, device=lm.model.device)
    rng = torch.Generator().manual_seed(seed)
    out: list[list[int]] = [[] for _ in range(n)]
    swap_adapter(lm.model, layout, adapter)
    try:
        lm.forwards += 1
        step = lm.model(torch.tensor([encode(lm, prompt)], device=lm.model.device), use_cache=True, logits_to_keep=1)
        cache, logits = step.past_key_values, step.logits[:, -1].float().expand(n, -1)
        cache.batch_repeat_interleave(n)
        for _ in range(policy.max_new_tokens):
            live = [not m.is_stopped() for m in matchers]
            if not any(live):
                break
            for i, m in enumerate(matchers):
                if live[i]:
                    llnp.fill_next_token_bitmask(m, bits, i)
            mask = to_device(torch.from_numpy(bits.view("uint8").copy()), logits.device)
            allowed = ((mask[:, :, None] >> places) & 1).view(n, -1)[:, :vocab].bool()
            chosen = _sample(logits.masked_fill(~allowed, float("-inf")), policy, rng)
            for i, token in enumerate(chosen):
                if live[i] and matchers[i].consume_token(token) and not (matchers[i].is_stopped()
                                                                         and token == lm.tokenizer.eos_token_id):
                    out[i].append(token)
            lm.forwards += n
            logits = lm.model(torch.tensor(chosen, device=lm.model.device)[:, None], past_key_values=cache,
                              use_cache=True).logits[:, -1].float()
    finally:
        clear_adapters(lm.model)
    return [lm.tokenizer.decode(o, skip_special_tokens=True) for o in out]


@functools.lru_cache(maxsize=4)
def _grammar_tokenizer(tokenizer, vocab: int):
    """The grammar library's own form of a tokenizer, which takes a second to make."""
    import llguidance.hf
    return llguidance.hf.from_tokenizer(tokenizer, n_vocab=vocab)


def _sample(logits, policy, rng) -> list[int]:
    """Temperature, top-k, top-p. Rows with no allowed token (finished sequences) give any; it is not read."""
    logits = torch.where(torch.isinf(logits).all(-1, keepdim=True), torch.zeros_like(logits), logits)
    values, index = (x.cpu() for x in (logits / policy.temperature).topk(min(policy.top_k, logits.shape[-1])))
    p = torch.softmax(values, -1)
    p = torch.where(p.cumsum(-1) - p < policy.top_p, p, 0.0)   # the token that crosses top_p stays
    return index.gather(1, torch.multinomial(p, 1, generator=rng))[:, 0].tolist()


def plan_families(families: list[str], count: int, minimum: int) -> list[list[str]]:
    """Which families each of `count` samples may use: `minimum` tied to each family, to explore, the rest free."""
    tied = [[f] for f in families for _ in range(minimum)][:count]
    return tied + [list(families)] * (count - len(tied))


# ------------------------------------------------------------------------------------------------------------ rewards

def make_target(run: Run, task: Task, left_out: str | None = None, aligned: bool = False) -> Target:
    """A task ready for strategies: its generated adapter (prompt batch 0) and everything a strategy may draw on.

    With `aligned` every drawn adapter has passed the Fusion VAE (paper T, stage 2).
    """
    cfg, lm = run.cfg, load_lm(run)
    drawn: dict[int, tuple] = {}

    def draw(batch: int):
        if batch not in drawn:
            adapter, index = generate_adapter(run, task.name, batch, left_out=left_out)
            if aligned:
                aligner = load_aligner(run, left_out_for(cfg, task.name) if left_out is None else left_out)
                adapter = align_adapter(run, aligner, task.name, adapter)
            drawn[batch] = adapter, index
        return drawn[batch]

    return Target(task.name, lm, draw(0)[0], draw, task_texts(run, task.name), load_pooled(run, task.name),
                  lambda texts: encode_texts(run, texts)[1], cfg.strategies, cfg.seed)


def evaluate_strategy(target: Target, strategy: Strategy, support: list, metric: str, folds: int,
                      at_steps: list[int] = ()) -> dict[str, dict]:
    """What a strategy makes of the support examples.

    A label-free strategy is executed once. SFT reads labels, so its scores come from `folds`-fold cross-validation
    inside the support set: no example is scored by an adapter that was fitted on it.
    Returns: {canonical JSON: {correct, gold_logp (one entry per example), seconds, forwards, backwards}}; for SFT also
        of the shorter trainings in `at_steps`, which the same trajectory yields.
    """
    lm, start, passes = target.lm, time.monotonic(), (target.lm.forwards, target.lm.backwards)
    if strategy.family != "SFT":
        found = {strategy: score_refined(target, execute(target, strategy), support)}
    else:
        steps = sorted({*(s for s in at_steps if s < strategy["sft_steps"]), strategy["sft_steps"]})
        out = {s: [None] * len(support) for s in steps}
        for held in fold_indices(target, len(support), folds):
            fit = [e for i, e in enumerate(support) if i not in held]
            for s, adapter in train_on_support(target, strategy, fit, steps).items():
                for i, score in zip(held, score_examples(lm, adapter, [support[i] for i in held]), strict=True):
                    out[s][i] = score
        found = {strategy.but(sft_steps=s): v for s, v in out.items()}
    seconds = time.monotonic() - start
    cost = {"seconds": round(seconds, 2), "forwards": lm.forwards - passes[0], "backwards": lm.backwards - passes[1]}
    return {str(k): judge(v, support, metric) | cost for k, v in found.items()}


def fold_indices(target: Target, n: int, folds: int) -> list[list[int]]:
    """Seeded folds of the support set."""
    order = rng_for(target.seed, "folds", target.name).permutation(n).tolist()
    return [order[i::folds] for i in range(folds)]


def reward_of(result: dict, policy) -> int:
    """Binary reward: strictly better than the generated adapter by the paired margin (docs/choices.md, 9)."""
    net = result["wins"] - result["losses"]
    return int(net >= policy.reward_margin or (policy.tie_reward and net == 0))


def choose(results: dict[str, dict], policy) -> tuple[Strategy, dict]:
    """The final choice among the strategies that the paired counts confirm.

    The generated adapter is kept unless a strategy wins at least `select_margin` (SFT: `sft_margin`) more examples than
    it loses and also raises the mean gold log-probability: on 20 examples either alone is too easily had by chance. Of
    those that pass, the one with most net wins (`select_by: wins`) or with the highest mean gold log-probability
    (`gold_logp`, which says more per example than right or wrong does); ties by the other.
    """
    def net(key):
        return results[key]["wins"] - results[key]["losses"]

    def passes(key):
        margin = policy.sft_margin if json.loads(key)["family"] == "SFT" else policy.select_margin
        return net(key) >= margin and results[key]["gold_logp_gain"] > 0

    def rank(key):
        both = net(key), results[key]["gold_logp_gain"]
        return both if policy.select_by == "wins" else both[::-1]

    best = max(filter(passes, results), key=rank, default=None)
    if best is None:
        return KEEP, {"wins": 0, "losses": 0, "gold_logp_gain": 0.0}
    return Strategy.from_dict(json.loads(best)), results[best]


def with_plain_twins(proposed: list[Strategy]) -> list[Strategy]:
    """The distinct proposals, and each SFT once more from the plain initialisation, longest training first.

    A task the generated adapter does not help must be able to leave it: its share is the one field whose two ends are
    always tried. The other end costs nothing, `no_meta` needs it too.
    """
    found = {str(s): s for s in [*proposed, *(s.but(init_scale=0.0) for s in proposed if s.family == "SFT")]}
    return sorted(found.values(), key=lambda s: -s["sft_steps"] if s.family == "SFT" else 0)


class Rewards:
    """What strategies make of one task's support set, kept in files so that no strategy is executed twice.

    A file belongs to one configuration (its folder carries the hash) and one starting adapter (`name`). SFT that starts
    from nothing of that adapter has a file of its own, shared by every method.
    """

    def __init__(self, run: Run, name: str, target: Target, support: list, reference: list[Scores]):
        key = hashlib.sha256(json.dumps(fingerprint(run.cfg, "rewards", unit=target.name)).encode()).hexdigest()[:8]
        self.folder, self.name = run.path / f"adapted/rewards-{key}", name
        self.run, self.target, self.support = run, target, support
        self.reference = judge(reference, support, run.cfg.evaluate.metric)
        self.known: dict[str, dict[str, dict]] = {}   # per file

    def of(self, strategy: Strategy, at_steps: list[int] = ()) -> dict:
        """{wins, losses, gold_logp_gain, seconds, forwards, backwards} against the starting adapter."""
        key, p = str(strategy), self.run.cfg.policy
        path = self.folder / f"{self.target.name + '.plain' if strategy.plain else self.name}.jsonl"
        if path not in self.known:
            self.known[path] = {r["strategy"]: r for r in (read_jsonl(path) if path.exists() else [])}
        known = self.known[path]
        if key not in known:
            try:
                found = evaluate_strategy(self.target, strategy, self.support, self.run.cfg.evaluate.metric, p.folds,
                                          at_steps)
            except FloatingPointError:   # a training that diverged lost every example
                n = len(self.support)
                found = {key: {"correct": [0] * n, "gold_logp": [-100.0] * n, "diverged": True}}
            path.parent.mkdir(parents=True, exist_ok=True)
            known |= {k: {"strategy": k, **r} for k, r in found.items() if k not in known}
            write_jsonl(path, list(known.values()))
        row = known[key]
        return compare(row, self.reference) | {k: row[k] for k in row if k not in ("strategy", "correct", "gold_logp")}


# ------------------------------------------------------------------------------------------------------------ ReST-EM

def policy_layout(run: Run) -> Layout:
    """Layout of the policy's own adapter in the shared base model."""
    p, lm = run.cfg.policy, load_lm(run)
    layout = find_layout(lm.model, p.rank, p.alpha, 1, p.modules)
    attach_lora(lm.model, layout)
    return layout


def train_policy(run: Run, layout: Layout, samples: list[tuple[str, str]], seed: int) -> Adapter | None:
    """One Improve step: fine-tune a fresh adapter on the base with the rewarded proposals; None if there are none.

    Implements: ReST-EM (paper T, G.5): restart from the base, loss on the proposals only. Samples of one prompt are
    branches of one row, so the prompt is computed once per update.
    """
    if not samples:
        return None
    p, lm = run.cfg.policy, load_lm(run)
    rng = rng_for(seed, "policy")
    eos = lm.tokenizer.eos_token_id
    by_prompt: dict[str, list[str]] = {}
    for prompt, text in samples:
        by_prompt.setdefault(prompt, []).append(text)
    rows = []
    for _ in range(p.epochs):
        for prompt in rng.permutation(list(by_prompt)):
            texts = [by_prompt[prompt][i] for i in rng.permutation(len(by_prompt[prompt]))]
            for at in range(0, len(texts), p.batch_size):
                branches = [(*lm.tokenizer(t, add_special_tokens=False)["input_ids"], eos)
                            for t in texts[at:at + p.batch_size]]
                rows.append(Row(tuple(encode(lm, prompt)), tuple(branches), (0,) * len(branches),
                                (1,) * len(branches)))

    def loss_fn(row):
        sums = branch_logprobs(lm, [row], *hidden_states(lm, [row]))[0]
        return -(sums / torch.tensor([len(b) for b in row.branches], device=sums.device)).mean()

    return train_adapter(lm.model, layout, init_adapter(layout, seed_for(seed, "policy")), rows, loss_fn,
                         lr=lambda s: rate(s, len(rows), p.lr, 0, "cosine"), clip=1.0)


def run_episodes(run: Run, task: Task, rewards: Rewards, families: list[str], prompt: str, layout: Layout,
                 policy: Adapter | None, iteration: int, label: str) -> list[dict]:
    """Sample proposals, execute each, reward it. Longer SFT trainings go first: they yield the shorter ones."""
    cfg, lm = run.cfg, load_lm(run)
    p = cfg.policy
    key = (cfg.seed, "propose", task.name, label, iteration)
    plan, rng = plan_families(families, p.proposals, p.min_per_family), rng_for(*key, "explore")
    schemas = [proposal_schema(cfg.strategies, f, rng if len(f) < len(families) else None) for f in plan]
    texts = sample_proposals(lm, layout, policy, prompt, schemas, p, seed_for(*key))
    parsed = []
    for text in texts:
        try:
            parsed.append(parse_strategy(text, cfg.strategies, families))
        except ValueError:
            parsed.append(None)   # an invalid proposal earns nothing
    at_steps = sorted({s["sft_steps"] for s in parsed if s is not None and s.family == "SFT"})
    order = sorted((i for i, s in enumerate(parsed) if s is not None),
                   key=lambda i: -parsed[i]["sft_steps"] if parsed[i].family == "SFT" else 0)
    for i in run.track(order, f"{label} {task.name} iteration {iteration + 1}"):
        rewards.of(parsed[i], at_steps)
    episodes = []
    for i, (text, s) in enumerate(zip(texts, parsed, strict=True)):
        if s is None:
            episodes.append({"iteration": iteration, "index": i, "text": text, "strategy": {}, "valid": False,
                             "reward": 0, "wins": 0, "losses": 0, "gold_logp_gain": 0.0})
        else:
            r = rewards.of(s)
            episodes.append({"iteration": iteration, "index": i, "text": text, "strategy": s.as_dict(), "valid": True,
                             "reward": reward_of(r, p), **r,
                             "cached": any(str(x) == str(s) for x in parsed[:i] if x is not None)})
    rate_ = sum(e["reward"] for e in episodes) / len(episodes)
    run.metric(stage="policy", unit=task.name, method=label, iteration=iteration, reward_mean=round(rate_, 4))
    return episodes


def rewarded(episodes: list[dict], prompt: str, cap: int) -> list[tuple[str, str]]:
    """Distinct rewarded proposals of one prompt, at most `cap`, best first."""
    best: dict[str, tuple] = {}
    for e in episodes:
        if e["reward"]:
            best.setdefault(e["text"], (e["losses"] - e["wins"], -e["gold_logp_gain"]))
    return [(prompt, t) for t in sorted(best, key=best.get)[:cap]]


# -------------------------------------------------------------------------------------------------- meta-training (D)

def train_policies(cfg, run: Run) -> dict:
    """policy.mode=meta: ReST-EM over the meta-training tasks, one policy per left-out task and method."""
    check_grid(cfg.strategies)
    if cfg.policy.mode == "per_task":
        run.log("policy.mode=per_task: the policy is trained inside stage=adapt")
        return {}
    targets = cfg.data.targets or cfg.data.train_tasks + cfg.data.test_tasks
    methods = [m for m in FAMILIES_OF if m in cfg.evaluate.methods]
    for unit in run.deal([(left, m) for left in sorted({left_out_for(cfg, t) for t in targets}) for m in methods]):
        if not run.finished(f"policy/{unit[0]}/{unit[1]}", "policy", unit[1]):
            _meta_train(cfg, run, *unit)
    return {}


def _meta_train(cfg, run: Run, left_out: str, method: str) -> None:
    """Paper D, Algorithm 2, lines 6-17: rewards on the training tasks' support sets, gradients on the policy only."""
    start, lm, layout = time.monotonic(), load_lm(run), policy_layout(run)
    root = run.path / f"policy/{left_out}"
    tasks = load_tasks(run)
    states = []
    for name in training_tasks(cfg, left_out):
        task = tasks[name]
        target = make_target(run, task, left_out, aligned=method in ALIGNED)
        support = list(task.support)
        reference = score_examples(lm, target.start, support)
        rewards = Rewards(run, f"{name}.without_{left_out}{_start_name(target, method)}", target, support, reference)
        states.append((task, rewards, proposal_prompt(lm, task, FAMILIES_OF[method](cfg), reference,
                                                      cfg.evaluate.metric)))
    policy, episodes = None, []
    for it in range(cfg.policy.iterations):
        samples = []
        for task, rewards, prompt in states:
            new = run_episodes(run, task, rewards, FAMILIES_OF[method](cfg), prompt, layout, policy, it,
                               f"{method}-without-{left_out}")
            episodes += [{"task": task.name, **e} for e in new]
            samples += rewarded(new, prompt, cfg.policy.max_samples)
        policy = train_policy(run, layout, samples, seed_for(cfg.seed, left_out, method, it)) or policy
    save_adapter(root / method, policy or init_adapter(layout, 0), layout, cfg.model.name, cfg.model.revision)
    write_jsonl(root / method / "episodes.jsonl", episodes)
    run.finish(f"policy/{left_out}/{method}", "policy", start, method)


# -------------------------------------------------------------------------------------------------------------- adapt

def adapt_targets(cfg, run: Run) -> dict:
    """Each target: generate, propose, execute, select. Writes adapted/<method>/<task>/ as a PEFT folder."""
    check_grid(cfg.strategies)
    tasks = load_tasks(run)
    wanted = [tasks[t] for t in cfg.data.targets or tasks]
    methods = [m for m in FAMILIES_OF if m in cfg.evaluate.methods]
    for task in run.deal(sorted(wanted, key=lambda t: -sum(len(e.prompt) for e in t.support))):
        for method in methods:
            if not run.finished(f"adapted/{method}/{task.name}", "adapt", method):
                _adapt_one(cfg, run, task, method)
        for method in [m for m in ("generator", "aligned") if m == "generator" or m in cfg.evaluate.methods]:
            folder, start = f"adapted/{method}/{task.name}", time.monotonic()
            if not run.finished(folder, "adapt", method):
                save_generated(run.path / folder, make_target(run, task, aligned=method in ALIGNED).start, run)
                run.finish(folder, "adapt", start, method)
    if run.rank == 0:
        _keep_example_ids(run, wanted)
    return {}


def _adapt_one(cfg, run: Run, task: Task, method: str) -> None:
    start, lm, folder = time.monotonic(), load_lm(run), run.path / f"adapted/{method}/{task.name}"
    if any(e.gold is None for e in task.support):
        raise UserError(f"task {task.name}: its support examples have no options to compare; use data.math_form=choice")
    families, layout, support = FAMILIES_OF[method](cfg), policy_layout(run), list(task.support)
    target = make_target(run, task, aligned=method in ALIGNED)
    reference = score_examples(lm, target.start, support)
    rewards = Rewards(run, task.name + _start_name(target, method), target, support, reference)
    prompt = proposal_prompt(lm, task, families, reference, cfg.evaluate.metric)
    policy, episodes, iterations = None, [], cfg.policy.iterations
    if cfg.policy.mode == "meta":   # the policy is ready; it proposes once
        ready = f"policy/{left_out_for(cfg, task.name)}/{method}"
        if not run.finished(ready, "policy", method, redo=False):
            raise UserError(f"{run.path / ready}: not trained yet; run stage=policy")
        policy = load_adapter(run.path / ready, layout)
        iterations = 1
    for it in range(iterations):
        new = run_episodes(run, task, rewards, families, prompt, layout, policy, it, method)
        episodes += new
        if it + 1 < iterations:
            policy = train_policy(run, layout, rewarded(new, prompt, cfg.policy.max_samples),
                                  seed_for(cfg.seed, task.name, method, it)) or policy
    candidates = with_plain_twins([Strategy.from_dict(e["strategy"]) for e in episodes if e["valid"]])
    steps = sorted({s["sft_steps"] for s in candidates if s.family == "SFT"})
    strategy, result = choose({str(s): rewards.of(s, steps) for s in candidates}, cfg.policy)
    refined = execute_finite(target, strategy, support)
    save_generated(folder, refined.adapters[0], run)
    write_jsonl(folder / "episodes.jsonl", episodes)
    write_text(folder / "prompt.txt", prompt)
    write_json(folder / "strategy.json", {
        "strategy": strategy.as_dict(), "wins": result["wins"], "losses": result["losses"],
        "gold_logp_gain": result["gold_logp_gain"], "n_support": len(support), "notes": refined.notes,
        "support_accuracy_generated": accuracy(reference, support, cfg.evaluate.metric)})
    run.finish(f"adapted/{method}/{task.name}", "adapt", start, method)
    run.log(f"adapt {method} {task.name}: {strategy} (+{result['wins']} -{result['losses']} of {len(support)}) in "
            f"{time.monotonic() - start:.0f} s", True)


def _start_name(target: Target, method: str) -> str:
    """What distinguishes the reward files of different starts on one task."""
    return f".aligned-{adapter_hash(target.start)[:8]}" if method in ALIGNED else ""


def _keep_example_ids(run: Run, wanted: list[Task]) -> None:
    if not run.cfg.task:   # the report is about the run's own tasks
        write_json(run.path / "tasks.json", describe_tasks({t.name: t for t in wanted}, run.cfg.data.prompts_from))


def load_refined(run: Run, target: Target, folder: Path) -> Refined:
    """What `adapt` chose for a target, ready to score: its adapter, or an ensemble or steering rebuilt from it."""
    strategy = Strategy.from_dict(read_json(folder / "strategy.json")["strategy"])
    if strategy.family in ("TTS", "Latent", "none"):   # made from the generator alone, exactly again
        return execute(target, strategy)
    return Refined([load_adapter(folder, load_lm(run).layout)])


# ----------------------------------------------------------------------------------------------------------- evaluate

def evaluate_methods(cfg, run: Run) -> dict:
    """Score every configured method on every target's test examples. Writes scores/<method>/<task>.jsonl."""
    tasks = load_tasks(run)
    wanted = [tasks[t] for t in cfg.data.targets or tasks]
    if run.rank == 0:
        _keep_example_ids(run, wanted)
    methods = cfg.evaluate.methods
    groups = [[m for m in methods if m in GENERATED], *([m] for m in methods if m not in GENERATED)]
    passes = {"generator": cfg.evaluate.prompt_batches, "abmll": cfg.baselines.abmll.test_samples}

    def cost(unit):
        task, group = unit
        return sum(len(e.prompt + "".join(e.options)) for e in task.test) * sum(passes.get(m, 1) for m in group)
    for task, group in run.deal(sorted(((t, g) for t in wanted for g in groups), key=cost, reverse=True)):
        _evaluate_task(cfg, run, task, group)
    return {}


def _evaluate_task(cfg, run: Run, task: Task, methods: list[str]) -> None:
    """Score methods on a task's test examples, an adapter that several of them share once."""
    lm, todo = load_lm(run), []
    for method in methods:
        if method == "own" and task.domain != "id":
            continue
        if not run.finished(f"scores/{method}/{task.name}", "evaluate", method):
            (run.path / f"scores/{method}/{task.name}.jsonl").unlink(missing_ok=True)   # another configuration's
            todo.append(method)
    drawn = {m in ALIGNED for m in todo if m in FAMILIES_OF or m in ("generator", "aligned")}
    targets = {aligned: make_target(run, task, aligned=aligned) for aligned in drawn}
    memo: dict = {}
    for method in run.track(todo, f"evaluate {task.name}"):
        start, passes = time.monotonic(), lm.forwards
        rows = _test_rows(cfg, run, lm, task, targets.get(method in ALIGNED), method, memo)
        folder = run.path / f"scores/{method}"
        write_jsonl(folder / f"{task.name}.jsonl", rows)
        write_json(folder / f"{task.name}.meta.json", {"seconds": round(time.monotonic() - start, 1),
                                                      "forwards": lm.forwards - passes})
        run.finish(f"scores/{method}/{task.name}", "evaluate", start, method)


def wrong_prompts_task(cfg, name: str) -> str:
    """Whose prompts the control `wrong_prompts` conditions on: two places on in the task list, so never a twin."""
    names = cfg.data.train_tasks + cfg.data.test_tasks
    return names[(names.index(name) + 2) % len(names)]


def _variants(cfg, run: Run, lm: LM, task: Task, target: Target | None, method: str) -> list[Refined]:
    """The adapters of a method on a task; `generator` is several, whose results are averaged.

    A method that kept the adapter it started from counts as `generator` (or `aligned`), so that its difference to it is
    zero, not the chance by which its own prompt batch was a better or a worse one.
    """
    if method == "base":
        return [Refined([None])]
    if method == "mean":
        return [Refined([mean_adapter(run, lm, task.name)])]
    if method == "own":
        return [Refined([last_checkpoint(run, lm, task.name)])]
    if method == "wrong_prompts":
        return [Refined([generate_adapter(run, task.name, 0, wrong_prompts_task(cfg, task.name))[0]])]
    folder = run.path / f"adapted/{method}/{task.name}"
    if method in FAMILIES_OF and read_json(folder / "strategy.json")["strategy"] == KEEP.as_dict():
        method = "aligned" if method in ALIGNED else "generator"
    if method in ("generator", "aligned"):
        return [Refined([target.draw(b)[0]]) for b in range(cfg.evaluate.prompt_batches)]
    if method == "abmll":
        b, rng = cfg.baselines.abmll, torch.Generator().manual_seed(seed_for(cfg.seed, "posterior"))
        posterior = load_posterior(folder, lm.layout)
        return [Refined([draw_adapter(posterior, lm.layout, b.space, b.init_log_sd, rng)
                         for _ in range(b.test_samples)], "mean_probability")]
    if method in ("no_meta", "maml_matched", *META_TRAINED):
        return [Refined([load_adapter(folder, lm.layout)])]
    return [load_refined(run, target, folder)]


def _test_rows(cfg, run: Run, lm: LM, task: Task, target: Target | None, method: str, memo: dict) -> list[dict]:
    """One row per test example; correctness is averaged over a method's variants.

    Generated answers (strict, lenient) come from the first adapter of an ensemble.
    """
    test = list(task.test)
    scored, written = [], []
    for refined in _variants(cfg, run, lm, task, target, method):
        key = (refined.combine, refined.slot, *(a and adapter_hash(a) for a in refined.adapters))
        if key not in memo:
            memo[key] = score_refined(target, refined, test) if target else \
                pool_scores([score_examples(lm, a, test) for a in refined.adapters], refined.combine)
        scored.append(memo[key])
        if cfg.evaluate.generate or not test[0].options:
            tokens = cfg.evaluate.max_new_tokens if test[0].options else max(256, cfg.evaluate.max_new_tokens)
            key = ("answers", refined.adapters[0] and adapter_hash(refined.adapters[0]))
            if key not in memo:
                memo[key] = generate_answers(lm, refined.adapters[0], test, tokens)
            written.append(memo[key])
    rows = []
    for i, e in enumerate(test):
        row: dict = {"id": e.id, "gold": e.gold}
        if e.options:
            for metric in ("norm", "raw"):
                picks = [s[i].pick(metric) for s in scored]
                row |= {f"pred_{metric}": picks[0],
                        f"correct_{metric}": sum(p == e.gold for p in picks) / len(picks)}
            row["logp_gold"] = scored[0][i].raw[e.gold]
            row["raw"] = [round(x, 4) for x in scored[0][i].raw]
        for kind in ("strict", "lenient") if written else ():
            right = [parse_letter(w[i], len(e.options), kind == "strict") == e.gold if e.options
                     else match_answer(w[i], e.answer, kind == "strict") for w in written]
            row[kind] = sum(right) / len(right)
        if written:
            row["text"] = written[0][i]
        if method == "base":
            row |= {"prompt": e.text, "options": list(e.options)}
        rows.append(row)
    return rows


# ----------------------------------------------------------------------------------------------------------- contexts

def write_contexts(cfg, run: Run) -> dict:
    """A task context per target without one, written by the base model from support inputs and answers.

    Source: paper T, G.6 (there: by a larger model). Writes contexts.yaml in the run folder; use it by
    policy.contexts=<that file>.
    """
    lm, found = load_lm(run), {}
    for name, task in load_tasks(run).items():
        if task.context:
            found[name] = task.context
            continue
        shown = "\n\n".join(f"{e.text} {e.options[e.gold] if e.options else e.answer}" for e in task.support[:4])
        prompt = chat_prompt(lm.tokenizer, "You describe benchmark tasks in plain, neutral English.",
                             f"Examples of a task:\n\n{shown}\n\nIn one paragraph, say what the task asks and which "
                             "skills it tests. Do not quote the examples.")
        ids = torch.tensor([encode(lm, prompt)], device=lm.model.device)
        text = lm.model.generate(ids, max_new_tokens=120, do_sample=False, repetition_penalty=1.0,
                                 pad_token_id=lm.tokenizer.eos_token_id)
        found[name] = " ".join(lm.tokenizer.decode(text[0, ids.shape[1]:], skip_special_tokens=True).split())
        run.log(f"context of {name}: {found[name]}")
    write_text(run.path / "contexts.yaml", yaml.safe_dump(found, sort_keys=False, width=100))
    return {"contexts": str(run.path / "contexts.yaml")}
