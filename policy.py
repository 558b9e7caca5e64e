"""Stage 3: a policy LLM proposes a strategy as JSON, and the support set rewards what works.

    python degaml.py stage=policy config=…   (policy.mode=meta: DeGAML, Algorithm 2)
    python degaml.py stage=adapt config=…    -> adapted/<method>/<task>/

The policy is the base model with an adapter of its own. What a reader asks first:

What is the start?  The generated adapter, moved by the VAE in TEMPO; later in a chain
    (`policy.steps`) what the strategy before made.
What is rewarded?  A proposal that wins more support examples than it loses, against the start, by
    `policy.reward_margin` (`reward_of`).
What is a label-free strategy scored on?  On the whole support set: it has read no label of it.
Why is SFT cross-validated?  It trains on the support labels. An example that it was fitted on
    would reward memory, so each is scored by an adapter fitted on the others.
What keeps the start?  A strategy must win by a margin and also raise the mean gold
    log-probability; if none does, nothing is changed (`choose`).
What restarts from the base?  The policy's adapter, at every Improve step of ReST-EM
    (`improve_policy`). Proposals are sampled from the latest one.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import time
from collections import Counter
from dataclasses import dataclass

import torch
import yaml

import alignment
import answers
import conditions
import data
import generator
import lora
import methods
import proposals
import runtime
import scoring
import strategies
from config import UserError
from data import Task
from lora import Adapter, AdapterTrainer, Layout
from runtime import Run
from scoring import Row
from strategies import Source, Strategy, Target

MAX_SAMPLES = 10  # rewarded proposals per task, at most (ReST-EM)
# What is kept of an execution beside its result. `selected` of the `seen` prompts passed the gate
# of TTT. `changed` is false where nothing is other than before.
FACTS = ("changed", "selected", "seen", "seconds", "forwards", "backwards")
# the result of the generated adapter against itself, and of what is no strategy
NO_GAIN = {"wins": 0, "losses": 0, "gold_logp_gain": 0.0}


def make_target(
    run: Run,
    task: Task,
    left_out: str | None = None,
    aligned: bool = False,
) -> Target:
    """A task ready for strategies: its generated adapter, and whatever a strategy may draw on.

    The adapter comes from prompt batch 0, by the generator of `left_out` (default: the task's own).
    With `aligned` every drawn adapter has passed the Fusion VAE (TEMPO, stage 2).
    """
    cfg = run.cfg
    left_out = left_out or data.left_out_for(cfg, task.name)
    prompts = conditions.prompt_set(cfg, task.name, left_out)

    # TTS asks for several batches, and `evaluate` asks again: a batch is generated once
    @functools.cache
    def draw(batch):
        adapter, index = generator.generate_adapter(run, task.name, batch, left_out=left_out)
        if aligned:
            aligner = alignment.load_aligner(run, left_out)
            adapter = alignment.align_adapter(run, aligner, prompts, adapter)
        return adapter, index

    # first of all, so that a missing generator is what the user hears of
    start, _ = draw(0)
    source = Source(
        draw,
        texts=conditions.task_texts(run, prompts),
        pooled=conditions.load_pooled(run, prompts),
        embed=functools.partial(conditions.embed, run),
    )
    return Target(task.name, scoring.load_lm(run), start, cfg.strategies, cfg.seed, source)


class Rewards:
    """What strategies make of one task's support set, kept in files: none is executed twice.

    A file belongs to one configuration (its folder carries the hash) and to one starting adapter
    (`name`). SFT that starts from nothing of that adapter has a file that all methods share.

    Attributes: scores: of the support set with the starting adapter. reference: these, judged.
    Raises: UserError: the support examples have no options to compare.
    """

    def __init__(
        self,
        run: Run,
        name: str,
        target: Target,
        support: list,
    ):
        if any(example.gold is None for example in support):
            raise UserError(
                f"task {target.name}: its support examples have no options to compare; "
                "use data.math_form=choice"
            )
        # of the keys that a reward depends on: a change of policy.lr, say, keeps the files
        fingerprint = runtime.fingerprint(run.cfg, "rewards", unit=target.name)
        digest = hashlib.sha256(json.dumps(fingerprint).encode()).hexdigest()[:8]
        folder = run.path / f"adapted/rewards-{digest}"
        # two files: a plain start is the same for every method, but not for every support set
        drawn = runtime.seed_for(*(example.id for example in support))
        self.own_file = folder / f"{name}.jsonl"
        self.plain_file = folder / f"{target.name}.plain-{drawn:x}.jsonl"
        self.run = run
        self.target = target
        self.support = support
        # the metric of the run, be it of scores or of written answers
        self.tokens = answers.answer_tokens(run.cfg.evaluate, support)
        self.scores = answers.answer_examples(target.lm, target.start, support, tokens=self.tokens)
        self.reference = scoring.judge(self.scores, support, run.cfg.evaluate.metric)

    def of(self, strategy: Strategy, at_steps=()) -> dict:
        """{wins, losses, gold_logp_gain} against the start, and FACTS of the execution.

        Args: at_steps: lengths of other trainings that will be asked for, measured by the way.
        """
        # what a plain start is worth is the same for every method that trains it alike
        shared = strategy.plain and self.target.warm_up
        path = self.plain_file if shared else self.own_file
        kept = runtime.read_jsonl(path) if path.exists() else []
        # a run that was stopped finds here what it had measured
        rows = {row["strategy"]: row for row in kept}
        if str(strategy) not in rows:
            for key, found in self.measure(strategy, at_steps).items():
                rows.setdefault(key, {"strategy": key, **found})
            runtime.write_jsonl(path, list(rows.values()))

        # files keep what was measured; wins and losses depend on the start and are counted here
        row = rows[str(strategy)]
        facts = {key: row[key] for key in FACTS if key in row}
        return scoring.compare(row, self.reference) | facts

    def of_all(
        self,
        proposed: list[Strategy],
        label: str,
    ) -> dict[Strategy, dict]:
        """`of` several strategies. A longer SFT training goes first: it yields the shorter ones."""
        proposed = sorted(proposed, key=training_length, reverse=True)
        lengths = {s["sft_steps"] for s in proposed if s.family == "SFT"}
        results = {}
        for strategy in self.run.track(proposed, label):
            results[strategy] = self.of(strategy, lengths)
        return results

    def measure(self, strategy: Strategy, at_steps=()) -> dict[str, dict]:
        """Carry a strategy out and judge what it makes of the support set.

        Returns: {canonical JSON: {correct, gold_logp (one entry per example) and FACTS}}; for SFT
            also of the shorter trainings in `at_steps`.
        """
        target = self.target
        lm = target.lm
        began = time.monotonic()
        forwards = lm.forwards
        backwards = lm.backwards
        metric = self.run.cfg.evaluate.metric
        judged = {}
        facts = {}
        try:
            if strategy.family == "SFT":
                scores = self._cross_validate(strategy, at_steps)
            else:
                # it reads no label, so the whole support set may judge it
                refined = strategies.execute(target, strategy)
                facts = {"changed": strategies.changes(target, refined), **refined.notes}
                found = strategies.score_refined(
                    lm, refined, self.support, target.cache, self.tokens
                )
                scores = {strategy: found}
            for trained, found in scores.items():
                judged[str(trained)] = scoring.judge(found, self.support, metric)
        except FloatingPointError:  # a training that diverged lost every example
            size = len(self.support)
            judged[str(strategy)] = {"correct": [0] * size, "gold_logp": [-100.0] * size}

        facts |= {
            "seconds": round(time.monotonic() - began, 2),
            "forwards": lm.forwards - forwards,
            "backwards": lm.backwards - backwards,
        }
        return {key: found | facts for key, found in judged.items()}

    def _cross_validate(self, strategy, at_steps):
        """{Strategy: scores} by length. Nothing is scored by an adapter that was fitted on it.

        One trajectory per fold yields every number of steps in `at_steps` up to the strategy's own.
        """
        target = self.target
        support = self.support
        longest = strategy["sft_steps"]
        lengths = [steps for steps in sorted({*at_steps, longest}) if steps <= longest]
        scores = {length: [None] * len(support) for length in lengths}
        for held in fold_indices(target, len(support), self.run.cfg.policy.folds):
            fitted = [example for i, example in enumerate(support) if i not in held]
            held_out = [support[i] for i in held]
            # the rate is constant, so a short training is the beginning of a long one
            trained = strategies.train_on_support(target, strategy, fitted, lengths)
            for length, adapter in trained.items():
                found = answers.answer_examples(target.lm, adapter, held_out, tokens=self.tokens)
                # back to the place of its example: afterwards no place is empty
                for i, score in zip(held, found, strict=True):
                    scores[length][i] = score
        return {strategy.but(sft_steps=length): found for length, found in scores.items()}


def fold_indices(
    target: Target,
    n: int,
    folds: int,
) -> list[list[int]]:
    """Seeded folds of the support set."""
    order = runtime.rng_for(target.seed, "folds", target.name).permutation(n)
    return [order[i::folds].tolist() for i in range(folds)]


def training_length(strategy: Strategy) -> int:
    return strategy["sft_steps"] if strategy.family == "SFT" else 0


def reward_of(result: dict, policy_config) -> int:
    """Binary: better than the start by the paired margin (docs/choices.md, 9).

    What changed nothing earns nothing, whatever the margin.
    """
    better = result["wins"] - result["losses"] >= policy_config.reward_margin
    return int(better and result.get("changed", True))


def choose(results: dict[Strategy, dict], policy_config) -> tuple[Strategy, dict]:
    """The final choice, and its {wins, losses, gold_logp_gain}.

    The generated adapter is kept unless a strategy passes. To pass it must win at least
    `select_margin` (SFT: `sft_margin`) more examples than it loses, and raise the mean gold
    log-probability. On 20 examples chance alone gives either too easily.
    Of those that pass, by `select_by`:
    wins        most net wins; ties by the mean gold log-probability
    gold_logp   the highest mean gold log-probability, which says more per example; ties by net wins
    family      the family with most rewarded strategies, and of it the one with most net wins
    """
    rewarded_of = Counter()
    for strategy, result in results.items():
        rewarded_of[strategy.family] += reward_of(result, policy_config)

    ranks = {}
    for strategy, result in results.items():
        net = result["wins"] - result["losses"]
        gain = result["gold_logp_gain"]
        # SFT has a margin of its own: its result is cross-validated
        margin = policy_config.select_margin
        if strategy.family == "SFT":
            margin = policy_config.sft_margin
        if net >= margin and gain > 0:
            ranks[strategy] = (net, gain)
            if policy_config.select_by == "gold_logp":
                ranks[strategy] = (gain, net)
            if policy_config.select_by == "family":
                ranks[strategy] = (rewarded_of[strategy.family], net, gain)

    # the first of equals
    best = max(ranks, key=ranks.get, default=strategies.KEEP)
    result = results.get(best, NO_GAIN)
    return best, {key: result[key] for key in NO_GAIN}


def with_plain_twins(proposed: list[Strategy]) -> list[Strategy]:
    """The distinct proposals, and each SFT once more from the plain initialisation.

    A task that the generated adapter does not help must be able to leave it. Its share is the one
    field whose two ends are always tried; the plain end costs nothing, `no_meta` needs it too.
    """
    twins = [s.but(init_scale=0.0) for s in proposed if s.family == "SFT"]
    return list(dict.fromkeys([*proposed, *twins]))


def policy_layout(run: Run) -> Layout:
    """Layout of the policy's own adapter in the shared base model."""
    settings = run.cfg.policy
    model = scoring.load_lm(run).model
    layout = lora.find_layout(
        model, settings.rank, settings.alpha, 1, settings.modules, "policy.modules"
    )
    lora.attach_lora(model, layout)
    return layout


def improve_policy(
    run: Run,
    samples: dict[str, list[str]],
    name: str,
    method: str,
    iteration: int,
) -> Adapter | None:
    """One Improve step of ReST-EM: a fresh adapter, trained on the rewarded proposals.

    Args:
        samples: the proposals of each prompt.
        name: the task, or the left-out set, whose policy this is.
    Returns: None if there is no proposal.
    Raises: UserError: a loss that is not finite.
    Source: TEMPO, G.5. It restarts from the base, and its loss is on the proposals only.
    """
    if not any(samples.values()):
        return None
    lm = scoring.load_lm(run)
    layout = policy_layout(run)
    policy_config = run.cfg.policy
    seed = runtime.seed_for(run.cfg.seed, data.seed_name(name), method, iteration)
    rows = _improve_rows(lm, samples, policy_config, runtime.rng_for(seed, "policy"))
    # a fresh adapter, not the last policy: errors of one iteration do not add up
    fresh = lora.init_adapter(layout, runtime.seed_for(seed, "policy"))
    with AdapterTrainer(lm.model, layout, fresh) as trainer:
        for step, row in enumerate(rows):
            hidden, starts = scoring.hidden_states(lm, [row])
            log_p = scoring.branch_logprobs(lm, [row], hidden, starts)[0]
            # per token, or long proposals would count more than short ones
            lengths = [len(branch) for branch in row.branches]
            per_token = log_p / torch.tensor(lengths, device=log_p.device)
            loss = trainer.backward(-per_token.mean())
            if not math.isfinite(loss):
                raise UserError(
                    f"policy {name}/{method}: the loss is not finite at step {step + 1} of "
                    f"iteration {iteration + 1}; lower policy.lr"
                )
            trainer.step(lora.rate(step, len(rows), policy_config.lr, 0, "cosine"))
    return trainer.adapter()


def _improve_rows(lm, samples, policy_config, rng):
    """One row per update: a prompt with up to `batch_size` of its proposals as branches.

    So the prompt, far longer than a proposal, is computed once per update.
    """
    size = policy_config.batch_size
    prompts = [prompt for prompt, texts in samples.items() if texts]
    rows = []
    for _ in range(policy_config.epochs):
        for prompt in rng.permutation(prompts):
            texts = samples[prompt]
            branches = []
            for i in rng.permutation(len(texts)):
                ids = lm.tokenizer(texts[i], add_special_tokens=False)["input_ids"]
                # with the closing token, so that the policy learns to stop
                branches.append((*ids, lm.tokenizer.eos_token_id))
            context = tuple(scoring.encode(lm, prompt))
            for at in range(0, len(branches), size):
                batch = tuple(branches[at : at + size])
                starts = (0,) * len(batch)  # every token of a proposal is scored
                rows.append(Row(context, batch, starts, chars=(1,) * len(batch)))
    return rows


def rewarded(episodes: list[dict]) -> list[str]:
    """The distinct rewarded proposals, best first, at most MAX_SAMPLES."""
    rank = {}
    for episode in episodes:
        if episode["reward"]:
            # most net wins first, then the larger gain; a text that was sampled twice counts once
            net = episode["wins"] - episode["losses"]
            rank.setdefault(episode["text"], (-net, -episode["gold_logp_gain"]))
    return sorted(rank, key=rank.get)[:MAX_SAMPLES]


@dataclass
class Case:
    """One task as a method's policy meets it, with the adapter that is to be refined.

    Attributes: families: those the method may propose. prompt: what the policy reads. step: how
        many refinements lie behind its start (`policy.steps`).
    """

    task: Task
    rewards: Rewards
    families: list[str]
    prompt: str
    step: int = 0


def _open_case(run, task, method, left_out=None, draw=None):
    """Draw the starting adapter, score it on the support set, and write the prompt.

    Args:
        left_out: whose generator draws it, where that is not the task's own.
        draw: number of a support set drawn anew from the train split; None = the task's own.
    Raises: UserError: the support examples have no options to compare.
    """
    if draw is not None:
        task = _draw_support(run, task, draw)
    aligned = method in methods.ALIGNED
    target = make_target(run, task, left_out, aligned)

    # every starting adapter of a task has a reward file of its own, and every support set
    name = task.name
    if left_out:
        name += f".without_{left_out}"
    if draw is not None:
        name += f".draw_{draw}"
    if aligned:
        name += f".aligned-{lora.adapter_hash(target.start)[:8]}"
    families = methods.families_of(method, run.cfg.policy.families)
    return _make_case(run, task, target, name, families)


def _draw_support(run, task, draw):
    """The training task with other support examples, as many, of its train split."""
    rng = runtime.rng_for(run.cfg.seed, "support", task.name, draw)
    picked = rng.choice(len(task.train), len(task.support), replace=False)
    return dataclasses.replace(task, support=[task.train[i] for i in picked])


def _make_case(run, task, target, name, families, step=0):
    """Args: name: of its reward file."""
    cfg = run.cfg
    rewards = Rewards(run, name, target, list(task.support))
    # the state is the start's, and does not change between iterations
    prompt = proposals.proposal_prompt(
        target.lm,
        task,
        families,
        rewards.scores,
        cfg.evaluate.metric,
        cfg.policy.prompt,
    )
    return Case(task, rewards, families, prompt, step)


def _next_case(run, case, strategy, refined):
    """The case whose start is what a strategy made, or None where the chain ends with it.

    TTS and Latent make more than an adapter. SFT has read the support labels, so nothing after it
    could be judged by them. TTS is not offered any more: it draws generated adapters, and the chain
    would be lost.
    Source: DeGAML, Algorithm 2, lines 7-12.
    """
    step = case.step + 1
    if step == run.cfg.policy.steps or strategy.family not in strategies.CHAINED:
        return None
    (start,) = refined.adapters
    # what is known of the old start, such as scores and median surprise, is left behind
    target = dataclasses.replace(case.rewards.target, start=start, cache={})
    families = [family for family in case.families if family != "TTS"]
    name = f"{case.rewards.own_file.stem}.step-{lora.adapter_hash(start)[:8]}"
    return _make_case(run, case.task, target, name, families, step)


def _run_episodes(run, case, policy_adapter, iteration, label):
    """One round: sample proposals, carry each out, reward it. One record per proposal.

    Args: label: names the search, in seeds and in the log.
    """
    cfg = run.cfg
    name = case.task.name
    # propose: with the base model at first, then with the policy of the last iteration
    key = (cfg.seed, "propose", name, label, iteration)
    if case.step:
        key = (*key, "step", case.step)
    drawn = proposals.draw_proposals(
        scoring.load_lm(run),
        policy_layout(run),
        policy_adapter,
        case.prompt,
        case.families,
        cfg,
        key,
    )
    texts = [text for text, _ in drawn]
    proposed = [strategy for _, strategy in drawn]
    if cfg.policy.distinct and proposals.repeated_places(proposed):
        count = len(proposals.repeated_places(proposed))
        run.log(f"{label} {name}: {count} of {len(proposed)} proposals stay repeated or invalid")

    # execute, each strategy once
    valid = [strategy for strategy in proposed if strategy is not None]
    results = case.rewards.of_all(valid, f"{label} {name} iteration {iteration + 1}")

    # reward: what is no strategy earns nothing
    episodes = []
    for index, strategy in enumerate(proposed):
        episode = {"iteration": iteration, "index": index, "text": texts[index]}
        if case.step:
            episode["step"] = case.step
        episode |= {"strategy": {}, "valid": False, "reward": 0, **NO_GAIN}
        if strategy in results:
            result = results[strategy]
            episode |= {"strategy": strategy.as_dict(), "valid": True, **result}
            episode["reward"] = reward_of(result, cfg.policy)
            episode["cached"] = strategy in proposed[:index]
        episodes.append(episode)

    run.metric(
        stage="policy",
        unit=name,
        method=label,
        iteration=iteration,
        reward_mean=round(sum(e["reward"] for e in episodes) / len(episodes), 4),
    )
    return episodes


def check_search(cfg) -> None:
    """Check grid and template of the search. Raises: UserError: one of them is wrong."""
    strategies.check_grid(cfg.strategies)
    if cfg.policy.prompt:
        proposals.read_template(cfg.policy.prompt)


def _proposing(cfg):
    """The configured methods that have a policy."""
    return [method for method in methods.PROPOSING if method in cfg.evaluate.methods]


def train_policies(run: Run) -> dict:
    """policy.mode=meta: ReST-EM over the training tasks, a policy per left-out set and method."""
    cfg = run.cfg
    check_search(cfg)
    if cfg.policy.mode == "per_task":
        run.log("policy.mode=per_task: the policy is trained inside stage=adapt")
        return {}
    # targets out of domain share one left-out set, and so one policy
    units = list(itertools.product(data.left_out_sets(cfg), _proposing(cfg)))
    for left_out, method in run.deal(units):
        if not run.finished(f"policy/{left_out}/{method}", "policy", method):
            _meta_train(run, left_out, method)
    return {}


def _meta_train(run, left_out, method):
    """DeGAML, Algorithm 2, lines 6-17.

    Rewards come from the training tasks' support sets. Gradients reach the policy alone.
    """
    began = time.monotonic()
    unit = f"policy/{left_out}/{method}"

    # the left-out task is none of the cases, and the generator that draws for them never saw it;
    # every iteration draws their support examples anew
    tasks = data.load_tasks(run)
    names = data.training_tasks(run.cfg, left_out)

    def open_cases(iteration):
        return [_open_case(run, tasks[name], method, left_out, iteration) for name in names]

    label = f"{method}-without-{data.seed_name(left_out)}"
    episodes, policy_adapter = _run_rest_em(run, open_cases, left_out, method, label)

    # the base model as policy is an adapter with B = 0
    layout = policy_layout(run)
    kept = policy_adapter or lora.init_adapter(layout, 0)
    lora.save_adapter(run.path / unit, kept, layout, run.cfg.model)
    runtime.write_jsonl(run.path / unit / "episodes.jsonl", episodes)
    run.finish(unit, "policy", began, method)


def _run_rest_em(run, open_cases, name, method, label):
    """ReST-EM: every iteration proposes for all cases, and trains on what was rewarded.

    Args: open_cases: iteration -> the cases. name, method, label: see `improve_policy` and
        `_run_episodes`.
    Returns: the episodes, and the policy's adapter; None is the base model.
    """
    settings = run.cfg.policy
    policy_adapter = None
    episodes = []
    for iteration in range(settings.iterations):
        # every task's proposals come from the same policy
        samples = {}
        for case in open_cases(iteration):
            while case is not None:
                new = _run_episodes(run, case, policy_adapter, iteration, label)
                samples[case.prompt] = rewarded(new)
                # a policy that several tasks share keeps its episodes in one file
                if settings.mode == "meta":
                    new = [{"task": case.task.name, **episode} for episode in new]
                episodes += new
                # in a search for one task `_adapt_one` makes the steps
                if settings.mode == "per_task" or case.step + 1 == settings.steps:
                    break
                case = _accept(run, case, new, method)[-1]

        # per task, nobody would sample from a policy that the last iteration trained
        if settings.mode == "per_task" and iteration + 1 == settings.iterations:
            break
        # with nothing rewarded there is nothing to learn, and the policy stays
        trained = improve_policy(run, samples, name, method, iteration)
        policy_adapter = trained or policy_adapter
    return episodes, policy_adapter


def targets_by_cost(run: Run) -> list[Task]:
    """The targets of the run, the longest support set first, as ranks take them."""
    tasks = data.load_tasks(run)
    wanted = [tasks[name] for name in run.cfg.data.targets or tasks]
    return sorted(wanted, key=lambda task: -data.text_size(task.support))


def adapt_targets(run: Run) -> dict:
    """Each target: generate, propose, execute, select. Writes PEFT folders adapted/<method>/<task>.

    The unrefined adapters (`generator`, `aligned`) are methods of their own and are written too.
    """
    cfg = run.cfg
    check_search(cfg)
    unrefined = ["generator"]
    if "aligned" in cfg.evaluate.methods:
        unrefined.append("aligned")
    # a task stays on one rank: its methods share what strategies earned
    for task in run.deal(targets_by_cost(run)):
        for method in [*_proposing(cfg), *unrefined]:
            unit = f"adapted/{method}/{task.name}"
            if run.finished(unit, "adapt", method):
                continue
            if method not in unrefined:
                _adapt_one(run, task, method)
                continue
            began = time.monotonic()
            target = make_target(run, task, aligned=method in methods.ALIGNED)
            lora.save_adapter(run.path / unit, target.start, target.lm.layout, cfg.model)
            run.finish(unit, "adapt", began, method)
    # for the report: which examples the numbers are about
    if run.rank == 0:
        data.keep_example_ids(run)
    return {}


def _adapt_one(run, task, method):
    """Search for a strategy on one target, choose one, and carry it out.

    Raises: UserError: no options to compare, a policy that is missing, or a training that diverged.
    """
    began = time.monotonic()
    case = _open_case(run, task, method)
    support = case.rewards.support
    first = case

    # one refinement after the other, as long as the last one made an adapter to go on from
    episodes = []
    accepted = []
    kept = None
    while case is not None:
        found = _search(run, case, method)
        episodes += found
        strategy, result, refined, case = _accept(run, case, found, method)
        # a later step that finds nothing keeps what the earlier ones made
        if kept is None or strategy != strategies.KEEP:
            kept = refined
            accepted.append({"strategy": strategy.as_dict(), **result})

    # beside the adapter: what was proposed, what the policy had read, and why this was chosen
    folder = run.path / f"adapted/{method}/{task.name}"
    runtime.write_jsonl(folder / "episodes.jsonl", episodes)
    runtime.write_text(folder / "prompt.txt", first.prompt)
    facts = {
        **accepted[-1],
        "n_support": len(support),
        "notes": kept.notes,
        "support_accuracy_generated": sum(first.rewards.reference["correct"]) / len(support),
    }
    if len(accepted) > 1:
        facts["before"] = accepted[:-1]
    # of an ensemble only the first adapter is kept: `evaluate` draws the others again
    keep_adapted(run, method, task, kept.adapters[0], facts, began)


def _accept(run, case, episodes, method):
    """Choose among what was tried on a case, and carry the choice out.

    Returns: the strategy, its {wins, losses, gold_logp_gain}, what it made, and the next case of
        the chain or None.
    """
    # the choice is among everything that was tried, and the plain twins
    proposed = [Strategy.from_dict(e["strategy"]) for e in episodes if e["valid"]]
    label = f"{method} {case.task.name}"
    results = case.rewards.of_all(with_plain_twins(proposed), label)
    strategy, result = choose(results, run.cfg.policy)

    # nothing is measured on the support set any more: now SFT trains on all of it
    refined = strategies.execute_finite(case.rewards.target, strategy, case.rewards.support)
    return strategy, result, refined, _next_case(run, case, strategy, refined)


def keep_adapted(
    run: Run,
    method: str,
    task: Task,
    adapter: Adapter,
    facts: dict,
    began: float,
) -> None:
    """Write adapted/<method>/<task>: a PEFT folder, strategy.json, and the record of the unit."""
    unit = f"adapted/{method}/{task.name}"
    lora.save_adapter(run.path / unit, adapter, scoring.load_lm(run).layout, run.cfg.model)
    runtime.write_json(run.path / unit / "strategy.json", facts)
    run.finish(unit, "adapt", began, method)
    chosen = json.dumps(facts.get("strategy", {"family": "inner steps"}))
    counts = f"+{facts['wins']} -{facts['losses']}" if facts.get("wins") is not None else "fixed"
    took = time.monotonic() - began
    run.log(f"{method} {task.name}: {chosen} ({counts}) in {took:.0f} s", True)


def _search(run, case, method):
    """The episodes of one target.

    A meta-trained policy proposes once. Else ReST-EM trains one for this task alone, on the
    proposals that its own support set rewards.
    """
    name = case.task.name
    if run.cfg.policy.mode == "per_task":
        return _run_rest_em(run, lambda iteration: [case], name, method, method)[0]
    ready = f"policy/{data.left_out_for(run.cfg, name)}/{method}"
    if not run.finished(ready, "policy", method, redo=False):
        raise UserError(f"{run.path / ready}: not trained yet; run stage=policy")
    policy_adapter = lora.load_adapter(run.path / ready, policy_layout(run))
    return _run_episodes(run, case, policy_adapter, 0, method)


def write_contexts(run: Run) -> dict:
    """A context for every target without one, written by the base model from support examples.

    Source: TEMPO, G.6 (there: by a larger model). Writes contexts.yaml in the run folder; use it by
    policy.contexts=<that file>.
    """
    lm = scoring.load_lm(run)
    found = {}
    for name, task in data.load_tasks(run).items():
        found[name] = task.context
        if task.context:
            continue
        # four examples show the kind of question and of answer
        shown = []
        for example in task.support[:4]:
            answer = example.options[example.gold] if example.options else example.answer
            shown.append(f"{example.text} {answer}")
        prompt = scoring.chat_prompt(
            lm.tokenizer,
            "You describe benchmark tasks in plain, neutral English.",
            "Examples of a task:\n\n" + "\n\n".join(shown) + "\n\nIn one paragraph, say what the "
            "task asks and which skills it tests. Do not quote the examples.",
        )
        # whole: `data.max_tokens` is for rows that are scored
        row = Row(tuple(scoring.encode(lm, prompt)), (), (), ())
        text = answers.continue_rows(lm, [row], 120)[0]
        found[name] = " ".join(text.split())
        run.log(f"context of {name}: {found[name]}")
    path = run.path / "contexts.yaml"
    runtime.write_text(path, yaml.safe_dump(found, sort_keys=False, width=100))
    return {"contexts": str(path)}
