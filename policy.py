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
import math
import time

import torch
import yaml

import alignment
import data
import generator
import lora
import methods
import runtime
import scoring
import strategies
from config import UserError
from data import Task
from lora import Adapter, AdapterTrainer, Layout
from runtime import Run
from scoring import Row, Scores
from strategies import Source, Strategy, Target

MAX_SAMPLES = 10  # rewarded proposals per task, at most (ReST-EM)
SYSTEM = (
    "You are a specialist in adapting language models. You choose how a model's adapter is refined for a task "
    "it has not seen, and you answer with one JSON object and nothing else."
)
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


def proposal_prompt(
    lm: scoring.LM, task: Task, families: list[str], support: list[Scores], metric: str
) -> str:
    """What the policy reads: task context, the state (support performance of the generated adapter), the families.

    Source: paper T, G.6 for structure and fields; paper D, section 2.2 for the state. The wording is ours.
    """
    right = sum(s.pick(metric) == e.gold for s, e in zip(support, task.support, strict=True))
    log_p = sum(scoring.gold_logprob(support, list(task.support), metric)) / len(support)
    order = runtime.rng_for("families", task.name).permutation(
        families
    )  # the first one listed is proposed too often
    options = "\n".join(f"({i + 1}) {DESCRIPTIONS[f]}" for i, f in enumerate(order))
    user = (
        f"Task: {task.title}. {task.context or 'No description is available.'}\n"
        f"State: with the generated adapter the model answers {right} of {len(task.support)} labelled examples "
        f"correctly; mean log-probability of the right answer {log_p:.2f}.\n"
        "Choose the one strategy family and the settings that should help most. Families and their JSON:\n"
        f"{options}\n"
        f"Give only the JSON object for {task.title}."
    )
    return scoring.chat_prompt(lm.tokenizer, SYSTEM, user)


@torch.no_grad()
def sample_proposals(
    lm: scoring.LM,
    layout: Layout,
    adapter: Adapter | None,
    prompt: str,
    schemas: list[dict],
    policy,
    seed: int,
) -> list[str]:
    """One constrained sample per schema, all in one batch behind one cached prompt.

    Sampling at `temperature`, then top-k, then top-p, among the tokens the grammar allows (paper T, G.5).
    """
    import llguidance.numpy as llnp
    from llguidance import LLMatcher

    n, vocab = len(schemas), lm.model.get_output_embeddings().weight.shape[0]
    tokenizer = _grammar_tokenizer(lm.tokenizer, vocab)
    matchers = [
        LLMatcher(
            tokenizer,
            LLMatcher.grammar_from_json_schema(
                json.dumps(s), overrides={"whitespace_flexible": False}
            ),
        )
        for s in schemas
    ]
    if error := next((m.get_error() for m in matchers if m.is_error()), ""):
        raise RuntimeError(f"the strategy grammar does not compile: {error}")
    bits, places = llnp.allocate_token_bitmask(n, vocab), torch.arange(8, device=lm.model.device)
    rng = torch.Generator().manual_seed(seed)
    out: list[list[int]] = [[] for _ in range(n)]
    lora.swap_adapter(lm.model, layout, adapter)
    try:
        lm.forwards += 1
        step = lm.model(
            torch.tensor([scoring.encode(lm, prompt)], device=lm.model.device),
            use_cache=True,
            logits_to_keep=1,
        )
        cache, logits = step.past_key_values, step.logits[:, -1].float().expand(n, -1)
        cache.batch_repeat_interleave(n)
        for _ in range(policy.max_new_tokens):
            live = [not m.is_stopped() for m in matchers]
            if not any(live):
                break
            for i, m in enumerate(matchers):
                if live[i]:
                    llnp.fill_next_token_bitmask(m, bits, i)
            mask = runtime.to_device(torch.from_numpy(bits.view("uint8").copy()), logits.device)
            allowed = ((mask[:, :, None] >> places) & 1).view(n, -1)[:, :vocab].bool()
            chosen = _sample(logits.masked_fill(~allowed, float("-inf")), policy, rng)
            for i, token in enumerate(chosen):
                if (
                    live[i]
                    and matchers[i].consume_token(token)
                    and not (matchers[i].is_stopped() and token == lm.tokenizer.eos_token_id)
                ):
                    out[i].append(token)
            lm.forwards += n
            logits = (
                lm.model(
                    torch.tensor(chosen, device=lm.model.device)[:, None],
                    past_key_values=cache,
                    use_cache=True,
                )
                .logits[:, -1]
                .float()
            )
    finally:
        lora.clear_adapters(lm.model)
    return [lm.tokenizer.decode(o, skip_special_tokens=True) for o in out]


@functools.lru_cache(maxsize=4)
def _grammar_tokenizer(tokenizer, vocab: int):
    """The grammar library's own form of a tokenizer, which takes a second to make."""
    import llguidance.hf

    return llguidance.hf.from_tokenizer(tokenizer, n_vocab=vocab)


def _sample(logits, policy, rng) -> list[int]:
    """Temperature, top-k, top-p. Rows with no allowed token (finished sequences) give any; it is not read."""
    logits = torch.where(
        torch.isinf(logits).all(-1, keepdim=True), torch.zeros_like(logits), logits
    )
    values, index = (
        x.cpu() for x in (logits / policy.temperature).topk(min(policy.top_k, logits.shape[-1]))
    )
    p = torch.softmax(values, -1)
    p = torch.where(p.cumsum(-1) - p < policy.top_p, p, 0.0)  # the token that crosses top_p stays
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
    cfg, lm = run.cfg, scoring.load_lm(run)
    drawn: dict[int, tuple] = {}

    def draw(batch: int):
        if batch not in drawn:
            adapter, index = generator.generate_adapter(run, task.name, batch, left_out=left_out)
            if aligned:
                aligner = alignment.load_aligner(
                    run, data.left_out_for(cfg, task.name) if left_out is None else left_out
                )
                adapter = alignment.align_adapter(run, aligner, task.name, adapter)
            drawn[batch] = adapter, index
        return drawn[batch]

    source = Source(
        draw,
        texts=generator.task_texts(run, task.name),
        pooled=generator.load_pooled(run, task.name),
        embed=lambda texts: generator.encode_texts(run, texts)[1],
    )
    return Target(task.name, lm, draw(0)[0], cfg.strategies, cfg.seed, source)


def evaluate_strategy(
    target: Target,
    strategy: Strategy,
    support: list,
    metric: str,
    folds: int,
    at_steps: list[int] = (),
) -> dict[str, dict]:
    """What a strategy makes of the support examples.

    A label-free strategy is executed once. SFT reads labels, so its scores come from `folds`-fold cross-validation
    inside the support set: no example is scored by an adapter that was fitted on it.
    Returns: {canonical JSON: {correct, gold_logp (one entry per example), seconds, forwards, backwards}}; for SFT also
        of the shorter trainings in `at_steps`, which the same trajectory yields.
    """
    lm, start, passes = target.lm, time.monotonic(), (target.lm.forwards, target.lm.backwards)
    if strategy.family != "SFT":
        found = {
            strategy: strategies.score_refined(
                lm, strategies.execute(target, strategy), support, target.cache
            )
        }
    else:
        steps = sorted({*(s for s in at_steps if s < strategy["sft_steps"]), strategy["sft_steps"]})
        out = {s: [None] * len(support) for s in steps}
        for held in fold_indices(target, len(support), folds):
            fit = [e for i, e in enumerate(support) if i not in held]
            for s, adapter in strategies.train_on_support(target, strategy, fit, steps).items():
                for i, score in zip(
                    held,
                    scoring.score_examples(lm, adapter, [support[i] for i in held]),
                    strict=True,
                ):
                    out[s][i] = score
        found = {strategy.but(sft_steps=s): v for s, v in out.items()}
    seconds = time.monotonic() - start
    cost = {
        "seconds": round(seconds, 2),
        "forwards": lm.forwards - passes[0],
        "backwards": lm.backwards - passes[1],
    }
    return {str(k): scoring.judge(v, support, metric) | cost for k, v in found.items()}


def fold_indices(target: Target, n: int, folds: int) -> list[list[int]]:
    """Seeded folds of the support set."""
    order = runtime.rng_for(target.seed, "folds", target.name).permutation(n).tolist()
    return [order[i::folds] for i in range(folds)]


def reward_of(result: dict, policy) -> int:
    """Binary reward: strictly better than the generated adapter by the paired margin (docs/choices.md, 9)."""
    net = result["wins"] - result["losses"]
    return int(net >= policy.reward_margin)


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
        return strategies.KEEP, {"wins": 0, "losses": 0, "gold_logp_gain": 0.0}
    return Strategy.from_dict(json.loads(best)), results[best]


def with_plain_twins(proposed: list[Strategy]) -> list[Strategy]:
    """The distinct proposals, and each SFT once more from the plain initialisation, longest training first.

    A task the generated adapter does not help must be able to leave it: its share is the one field whose two ends are
    always tried. The other end costs nothing, `no_meta` needs it too.
    """
    found = {
        str(s): s
        for s in [*proposed, *(s.but(init_scale=0.0) for s in proposed if s.family == "SFT")]
    }
    return sorted(found.values(), key=lambda s: -s["sft_steps"] if s.family == "SFT" else 0)


class Rewards:
    """What strategies make of one task's support set, kept in files so that no strategy is executed twice.

    A file belongs to one configuration (its folder carries the hash) and one starting adapter (`name`). SFT that starts
    from nothing of that adapter has a file of its own, shared by every method.
    """

    def __init__(self, run: Run, name: str, target: Target, support: list, reference: list[Scores]):
        key = hashlib.sha256(
            json.dumps(runtime.fingerprint(run.cfg, "rewards", unit=target.name)).encode()
        ).hexdigest()[:8]
        self.folder, self.name = run.path / f"adapted/rewards-{key}", name
        self.run, self.target, self.support = run, target, support
        self.reference = scoring.judge(reference, support, run.cfg.evaluate.metric)
        self.known: dict[str, dict[str, dict]] = {}  # per file

    def of(self, strategy: Strategy, at_steps: list[int] = ()) -> dict:
        """{wins, losses, gold_logp_gain, seconds, forwards, backwards} against the starting adapter."""
        key, p = str(strategy), self.run.cfg.policy
        path = self.folder / f"{self.target.name + '.plain' if strategy.plain else self.name}.jsonl"
        if path not in self.known:
            self.known[path] = {
                r["strategy"]: r for r in (runtime.read_jsonl(path) if path.exists() else [])
            }
        known = self.known[path]
        if key not in known:
            try:
                found = evaluate_strategy(
                    self.target,
                    strategy,
                    self.support,
                    self.run.cfg.evaluate.metric,
                    p.folds,
                    at_steps,
                )
            except FloatingPointError:  # a training that diverged lost every example
                n = len(self.support)
                found = {key: {"correct": [0] * n, "gold_logp": [-100.0] * n, "diverged": True}}
            path.parent.mkdir(parents=True, exist_ok=True)
            known |= {k: {"strategy": k, **r} for k, r in found.items() if k not in known}
            runtime.write_jsonl(path, list(known.values()))
        row = known[key]
        return scoring.compare(row, self.reference) | {
            k: row[k] for k in row if k not in ("strategy", "correct", "gold_logp")
        }


# ------------------------------------------------------------------------------------------------------------ ReST-EM


def policy_layout(run: Run) -> Layout:
    """Layout of the policy's own adapter in the shared base model."""
    p, lm = run.cfg.policy, scoring.load_lm(run)
    layout = lora.find_layout(lm.model, p.rank, p.alpha, 1, p.modules)
    lora.attach_lora(lm.model, layout)
    return layout


def train_policy(
    run: Run, layout: Layout, samples: list[tuple[str, str]], seed: int
) -> Adapter | None:
    """One Improve step: fine-tune a fresh adapter on the base with the rewarded proposals; None if there are none.

    Implements: ReST-EM (paper T, G.5): restart from the base, loss on the proposals only. Samples of one prompt are
    branches of one row, so the prompt is computed once per update.
    """
    if not samples:
        return None
    p, lm = run.cfg.policy, scoring.load_lm(run)
    rng = runtime.rng_for(seed, "policy")
    eos = lm.tokenizer.eos_token_id
    by_prompt: dict[str, list[str]] = {}
    for prompt, text in samples:
        by_prompt.setdefault(prompt, []).append(text)
    rows = []
    for _ in range(p.epochs):
        for prompt in rng.permutation(list(by_prompt)):
            texts = [by_prompt[prompt][i] for i in rng.permutation(len(by_prompt[prompt]))]
            for at in range(0, len(texts), p.batch_size):
                branches = [
                    (*lm.tokenizer(t, add_special_tokens=False)["input_ids"], eos)
                    for t in texts[at : at + p.batch_size]
                ]
                rows.append(
                    Row(
                        tuple(scoring.encode(lm, prompt)),
                        tuple(branches),
                        (0,) * len(branches),
                        (1,) * len(branches),
                    )
                )

    start = lora.init_adapter(layout, runtime.seed_for(seed, "policy"))
    with AdapterTrainer(lm.model, layout, start) as trainer:
        for step, row in enumerate(rows):
            hidden, starts = scoring.hidden_states(lm, [row])
            sums = scoring.branch_logprobs(lm, [row], hidden, starts)[0]
            lengths = torch.tensor([len(branch) for branch in row.branches], device=sums.device)
            loss = trainer.backward(-(sums / lengths).mean())
            if not math.isfinite(loss):
                raise FloatingPointError(f"policy, step {step + 1}")
            trainer.step(lora.rate(step, len(rows), p.lr, 0, "cosine"))
    return trainer.adapter()


def run_episodes(
    run: Run,
    task: Task,
    rewards: Rewards,
    families: list[str],
    prompt: str,
    layout: Layout,
    policy: Adapter | None,
    iteration: int,
    label: str,
) -> list[dict]:
    """Sample proposals, execute each, reward it. Longer SFT trainings go first: they yield the shorter ones."""
    cfg, lm = run.cfg, scoring.load_lm(run)
    p = cfg.policy
    key = (cfg.seed, "propose", task.name, label, iteration)
    plan, rng = (
        plan_families(families, p.proposals, p.min_per_family),
        runtime.rng_for(*key, "explore"),
    )
    schemas = [
        strategies.proposal_schema(cfg.strategies, f, rng if len(f) < len(families) else None)
        for f in plan
    ]
    texts = sample_proposals(lm, layout, policy, prompt, schemas, p, runtime.seed_for(*key))
    parsed = []
    for text in texts:
        try:
            parsed.append(strategies.parse_strategy(text, cfg.strategies, families))
        except ValueError:
            parsed.append(None)  # an invalid proposal earns nothing
    at_steps = sorted({s["sft_steps"] for s in parsed if s is not None and s.family == "SFT"})
    order = sorted(
        (i for i, s in enumerate(parsed) if s is not None),
        key=lambda i: -parsed[i]["sft_steps"] if parsed[i].family == "SFT" else 0,
    )
    for i in run.track(order, f"{label} {task.name} iteration {iteration + 1}"):
        rewards.of(parsed[i], at_steps)
    episodes = []
    for i, (text, s) in enumerate(zip(texts, parsed, strict=True)):
        if s is None:
            episodes.append(
                {
                    "iteration": iteration,
                    "index": i,
                    "text": text,
                    "strategy": {},
                    "valid": False,
                    "reward": 0,
                    "wins": 0,
                    "losses": 0,
                    "gold_logp_gain": 0.0,
                }
            )
        else:
            r = rewards.of(s)
            episodes.append(
                {
                    "iteration": iteration,
                    "index": i,
                    "text": text,
                    "strategy": s.as_dict(),
                    "valid": True,
                    "reward": reward_of(r, p),
                    **r,
                    "cached": any(str(x) == str(s) for x in parsed[:i] if x is not None),
                }
            )
    rate_ = sum(e["reward"] for e in episodes) / len(episodes)
    run.metric(
        stage="policy",
        unit=task.name,
        method=label,
        iteration=iteration,
        reward_mean=round(rate_, 4),
    )
    return episodes


def rewarded(episodes: list[dict], prompt: str, cap: int) -> list[tuple[str, str]]:
    """Distinct rewarded proposals of one prompt, at most `cap`, best first."""
    best: dict[str, tuple] = {}
    for e in episodes:
        if e["reward"]:
            best.setdefault(e["text"], (e["losses"] - e["wins"], -e["gold_logp_gain"]))
    return [(prompt, t) for t in sorted(best, key=best.get)[:cap]]


# -------------------------------------------------------------------------------------------------- meta-training (D)


def train_policies(run: Run) -> dict:
    """policy.mode=meta: ReST-EM over the meta-training tasks, one policy per left-out task and method."""
    cfg = run.cfg
    strategies.check_grid(cfg.strategies)
    if cfg.policy.mode == "per_task":
        run.log("policy.mode=per_task: the policy is trained inside stage=adapt")
        return {}
    targets = cfg.data.targets or cfg.data.train_tasks + cfg.data.test_tasks
    wanted_methods = [m for m in methods.PROPOSING if m in cfg.evaluate.methods]
    for unit in run.deal(
        [
            (left, m)
            for left in sorted({data.left_out_for(cfg, t) for t in targets})
            for m in wanted_methods
        ]
    ):
        if not run.finished(f"policy/{unit[0]}/{unit[1]}", "policy", unit[1]):
            _meta_train(run, *unit)
    return {}


def _meta_train(run: Run, left_out: str, method: str) -> None:
    """Paper D, Algorithm 2, lines 6-17: rewards on the training tasks' support sets, gradients on the policy only."""
    cfg = run.cfg
    start, lm, layout = time.monotonic(), scoring.load_lm(run), policy_layout(run)
    root = run.path / f"policy/{left_out}"
    tasks = data.load_tasks(run)
    states = []
    for name in data.training_tasks(cfg, left_out):
        task = tasks[name]
        target = make_target(run, task, left_out, aligned=method in methods.ALIGNED)
        support = list(task.support)
        reference = scoring.score_examples(lm, target.start, support)
        rewards = Rewards(
            run,
            f"{name}.without_{left_out}{_start_name(target, method)}",
            target,
            support,
            reference,
        )
        states.append(
            (
                task,
                rewards,
                proposal_prompt(
                    lm,
                    task,
                    methods.families_of(method, cfg.policy.families),
                    reference,
                    cfg.evaluate.metric,
                ),
            )
        )
    policy, episodes = None, []
    for it in range(cfg.policy.iterations):
        samples = []
        for task, rewards, prompt in states:
            new = run_episodes(
                run,
                task,
                rewards,
                methods.families_of(method, cfg.policy.families),
                prompt,
                layout,
                policy,
                it,
                f"{method}-without-{data.seed_name(left_out)}",
            )
            episodes += [{"task": task.name, **e} for e in new]
            samples += rewarded(new, prompt, MAX_SAMPLES)
        policy = (
            train_policy(
                run,
                layout,
                samples,
                runtime.seed_for(cfg.seed, data.seed_name(left_out), method, it),
            )
            or policy
        )
    lora.save_adapter(
        root / method,
        policy or lora.init_adapter(layout, 0),
        layout,
        cfg.model.name,
        cfg.model.revision,
    )
    runtime.write_jsonl(root / method / "episodes.jsonl", episodes)
    run.finish(f"policy/{left_out}/{method}", "policy", start, method)


# -------------------------------------------------------------------------------------------------------------- adapt


def adapt_targets(run: Run) -> dict:
    """Each target: generate, propose, execute, select. Writes adapted/<method>/<task>/ as a PEFT folder."""
    cfg = run.cfg
    strategies.check_grid(cfg.strategies)
    tasks = data.load_tasks(run)
    wanted = [tasks[t] for t in cfg.data.targets or tasks]
    wanted_methods = [m for m in methods.PROPOSING if m in cfg.evaluate.methods]
    for task in run.deal(sorted(wanted, key=lambda t: -sum(len(e.prompt) for e in t.support))):
        for method in wanted_methods:
            if not run.finished(f"adapted/{method}/{task.name}", "adapt", method):
                _adapt_one(run, task, method)
        for method in [
            m for m in ("generator", "aligned") if m == "generator" or m in cfg.evaluate.methods
        ]:
            folder, start = f"adapted/{method}/{task.name}", time.monotonic()
            if not run.finished(folder, "adapt", method):
                generator.save_generated(
                    run.path / folder,
                    make_target(run, task, aligned=method in methods.ALIGNED).start,
                    run,
                )
                run.finish(folder, "adapt", start, method)
    if run.rank == 0:
        data.keep_example_ids(run, wanted)
    return {}


def _adapt_one(run: Run, task: Task, method: str) -> None:
    cfg = run.cfg
    start, lm, folder = (
        time.monotonic(),
        scoring.load_lm(run),
        run.path / f"adapted/{method}/{task.name}",
    )
    if any(e.gold is None for e in task.support):
        raise UserError(
            f"task {task.name}: its support examples have no options to compare; use data.math_form=choice"
        )
    families, layout, support = (
        methods.families_of(method, cfg.policy.families),
        policy_layout(run),
        list(task.support),
    )
    target = make_target(run, task, aligned=method in methods.ALIGNED)
    reference = scoring.score_examples(lm, target.start, support)
    rewards = Rewards(run, task.name + _start_name(target, method), target, support, reference)
    prompt = proposal_prompt(lm, task, families, reference, cfg.evaluate.metric)
    policy, episodes, iterations = None, [], cfg.policy.iterations
    if cfg.policy.mode == "meta":  # the policy is ready; it proposes once
        ready = f"policy/{data.left_out_for(cfg, task.name)}/{method}"
        if not run.finished(ready, "policy", method, redo=False):
            raise UserError(f"{run.path / ready}: not trained yet; run stage=policy")
        policy = lora.load_adapter(run.path / ready, layout)
        iterations = 1
    for it in range(iterations):
        new = run_episodes(run, task, rewards, families, prompt, layout, policy, it, method)
        episodes += new
        if it + 1 < iterations:
            policy = (
                train_policy(
                    run,
                    layout,
                    rewarded(new, prompt, MAX_SAMPLES),
                    runtime.seed_for(cfg.seed, task.name, method, it),
                )
                or policy
            )
    candidates = with_plain_twins(
        [Strategy.from_dict(e["strategy"]) for e in episodes if e["valid"]]
    )
    steps = sorted({s["sft_steps"] for s in candidates if s.family == "SFT"})
    strategy, result = choose({str(s): rewards.of(s, steps) for s in candidates}, cfg.policy)
    refined = strategies.execute_finite(target, strategy, support)
    generator.save_generated(folder, refined.adapters[0], run)
    runtime.write_jsonl(folder / "episodes.jsonl", episodes)
    runtime.write_text(folder / "prompt.txt", prompt)
    runtime.write_json(
        folder / "strategy.json",
        {
            "strategy": strategy.as_dict(),
            "wins": result["wins"],
            "losses": result["losses"],
            "gold_logp_gain": result["gold_logp_gain"],
            "n_support": len(support),
            "notes": refined.notes,
            "support_accuracy_generated": scoring.accuracy(reference, support, cfg.evaluate.metric),
        },
    )
    run.finish(f"adapted/{method}/{task.name}", "adapt", start, method)
    run.log(
        f"adapt {method} {task.name}: {strategy} (+{result['wins']} -{result['losses']} of {len(support)}) in "
        f"{time.monotonic() - start:.0f} s",
        True,
    )


def _start_name(target: Target, method: str) -> str:
    """What distinguishes the reward files of different starts on one task."""
    return f".aligned-{lora.adapter_hash(target.start)[:8]}" if method in methods.ALIGNED else ""


# ----------------------------------------------------------------------------------------------------------- contexts


def write_contexts(run: Run) -> dict:
    """A task context per target without one, written by the base model from support inputs and answers.

    Source: paper T, G.6 (there: by a larger model). Writes contexts.yaml in the run folder; use it by
    policy.contexts=<that file>.
    """
    lm, found = scoring.load_lm(run), {}
    for name, task in data.load_tasks(run).items():
        if task.context:
            found[name] = task.context
            continue
        shown = "\n\n".join(
            f"{e.text} {e.options[e.gold] if e.options else e.answer}" for e in task.support[:4]
        )
        prompt = scoring.chat_prompt(
            lm.tokenizer,
            "You describe benchmark tasks in plain, neutral English.",
            f"Examples of a task:\n\n{shown}\n\nIn one paragraph, say what the task asks and which "
            "skills it tests. Do not quote the examples.",
        )
        ids = torch.tensor([scoring.encode(lm, prompt)], device=lm.model.device)
        text = lm.model.generate(
            ids,
            max_new_tokens=120,
            do_sample=False,
            repetition_penalty=1.0,
            pad_token_id=lm.tokenizer.eos_token_id,
        )
        found[name] = " ".join(
            lm.tokenizer.decode(text[0, ids.shape[1] :], skip_special_tokens=True).split()
        )
        run.log(f"context of {name}: {found[name]}")
    runtime.write_text(
        run.path / "contexts.yaml", yaml.safe_dump(found, sort_keys=False, width=100)
    )
    return {"contexts": str(run.path / "contexts.yaml")}
