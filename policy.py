"""Stage 3: a policy LLM proposes a strategy as JSON, and the support set rewards what works.

    python degaml.py stage=policy config=…   (policy.mode=meta: DeGAML, Algorithm 2)
    python degaml.py stage=adapt config=…    -> adapted/<method>/<task>/

The policy is the base model with an adapter of its own. What a reader asks first:

What is rewarded?  A proposal that wins more support examples than it loses, against the generated
    adapter, by `policy.reward_margin` (`reward_of`).
What is a label-free strategy scored on?  On the whole support set: it has read no label of it.
Why is SFT cross-validated?  It trains on the support labels. An example that it was fitted on
    would reward memory, so each is scored by an adapter fitted on the others.
What keeps the generated adapter?  A strategy must win by a margin and also raise the mean gold
    log-probability; if none does, nothing is changed (`choose`).
What restarts from the base?  The policy's adapter, at every Improve step of ReST-EM
    (`improve_policy`). Proposals are sampled from the latest one.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import time
from dataclasses import dataclass

import numpy as np
import torch
import yaml

import alignment
import answers
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
from scoring import LM, Row, Scores
from strategies import Source, Strategy, Target

MAX_SAMPLES = 10  # rewarded proposals per task, at most (ReST-EM)
# the result of the generated adapter against itself, and of what is no strategy
NO_GAIN = {"wins": 0, "losses": 0, "gold_logp_gain": 0.0}
SYSTEM = (
    "You are a specialist in adapting language models. You choose how a model's adapter is refined "
    "for a task it has not seen, and you answer with one JSON object and nothing else."
)
# one entry per family that `strategies.schema` knows
DESCRIPTIONS = {
    "TTT": "Test-time training: gradient steps that lower the perplexity of the task's unlabelled "
    "questions.\n"
    '{"family": "TTT", "ttl_steps": <integer>, "learning_rate": <float>, "batch_size": <integer>, '
    '"shuffle_data": <boolean>}',
    "LORA": "LoRA subspace mixing: blends the two halves of the adapter's rank by a ratio from 0 "
    "to 1.\n"
    '{"family": "LORA", "lambda": <float>}',
    "TTS": "Test-time scaling: several adapters from different question batches, routed or "
    "ensembled.\n"
    '{"family": "TTS", "num_prompt_batches": <integer>, "method": "<avg_sim_score | '
    'avg_prompt_embed | max_confidence | majority_vote | sum_logprobs>"}',
    "Latent": "Latent steering: a vector added to the last hidden state, optimised on each "
    "question.\n"
    '{"family": "Latent", "slot_steps": <integer>, "slot_lr": <float>}',
    "SFT": "Supervised steps on the few labelled examples, starting from a share of the generated "
    "adapter, 0 to 1.\n"
    '{"family": "SFT", "sft_steps": <integer>, "learning_rate": <float>, "batch_size": <integer>, '
    '"loss": "<lm | choice>", "init_scale": <float>}',
}


def proposal_prompt(
    lm: LM,
    task: Task,
    families: list[str],
    support: list[Scores],
    metric: str,
) -> str:
    """What the policy reads: the task's context, the state, and the families it may choose from.

    The state is how the generated adapter does on the support set: `support` are its scores.
    Source: TEMPO, G.6 (structure, fields); DeGAML, section 2.2 (state). The wording is ours.
    """
    # the state: with it the policy can tell a task that needs help from one that does not
    examples = list(task.support)
    right = sum(scoring.judge(support, examples, metric)["correct"])
    log_p = sum(scoring.gold_logprob(support, examples, metric)) / len(examples)

    # the first family listed is proposed too often, so every task lists them in its own order
    order = runtime.rng_for("families", task.name).permutation(families)
    listed = []
    for number, family in enumerate(order, 1):
        listed.append(f"({number}) {DESCRIPTIONS[family]}")

    user = "\n".join(
        [
            f"Task: {task.title}. {task.context or 'No description is available.'}",
            f"State: with the generated adapter the model answers {right} of {len(examples)} "
            f"labelled examples correctly; mean log-probability of the right answer {log_p:.2f}.",
            "Choose the one strategy family and the settings that should help most. "
            "Families and their JSON:",
            *listed,
            f"Give only the JSON object for {task.title}.",
        ]
    )
    return scoring.chat_prompt(lm.tokenizer, SYSTEM, user)


@torch.no_grad()
def sample_proposals(
    lm: LM,
    layout: Layout,
    policy_adapter: Adapter | None,
    prompt: str,
    schemas: list[dict],
    policy_config,
    seed: int,
) -> list[str]:
    """One constrained sample per schema, all in one batch behind one cached prompt."""
    import llguidance.numpy as llnp

    # every sample has a grammar of its own, and a row of bits for its legal next tokens
    model = lm.model
    vocabulary = model.get_output_embeddings().weight.shape[0]
    matchers = [_compile_grammar(lm, schema, vocabulary) for schema in schemas]
    count = len(schemas)
    legal = llnp.allocate_token_bitmask(count, vocabulary)
    rng = torch.Generator().manual_seed(seed)
    written = [[] for _ in schemas]
    lora.swap_adapter(model, layout, policy_adapter)
    try:
        # the prompt is read once; every sample continues from a copy of its cache
        lm.forwards += 1
        ids = torch.tensor([scoring.encode(lm, prompt)], device=model.device)
        output = model(ids, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        cache.batch_repeat_interleave(count)
        logits = output.logits[:, -1].expand(count, -1)

        for _ in range(policy_config.max_new_tokens):
            live = [i for i, matcher in enumerate(matchers) if not matcher.is_stopped()]
            if not live:
                break
            # finished samples stay in the batch, so that its shape does not change
            for i in live:
                llnp.fill_next_token_bitmask(matchers[i], legal, i)
            chosen = _sample(logits.float(), legal, policy_config, rng)
            for i in live:
                if matchers[i].consume_token(chosen[i]):
                    written[i].append(chosen[i])
            lm.forwards += count
            ids = torch.tensor(chosen, device=model.device)[:, None]
            output = model(ids, past_key_values=cache, use_cache=True)
            logits = output.logits[:, -1]
    finally:
        lora.clear_adapters(model)
    return lm.tokenizer.batch_decode(written, skip_special_tokens=True)


def _compile_grammar(lm, schema, vocabulary):
    """What follows one sample through its JSON schema; compact JSON, for white space never ends."""
    from llguidance import LLMatcher

    compact = {"whitespace_flexible": False}
    grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=compact)
    matcher = LLMatcher(_grammar_tokenizer(lm.tokenizer, vocabulary), grammar)
    if matcher.is_error():
        raise RuntimeError(f"the strategy grammar does not compile: {matcher.get_error()}")
    return matcher


@functools.lru_cache(maxsize=4)
def _grammar_tokenizer(tokenizer, vocabulary):
    """The grammar library's own form of a tokenizer, which takes a second to make."""
    import llguidance.hf

    return llguidance.hf.from_tokenizer(tokenizer, n_vocab=vocabulary)


def _sample(logits, legal, policy_config, rng):
    """One token per sample, among the legal ones, by temperature, top-k and top-p (TEMPO, G.5).

    Args:
        logits: (samples, V) tensor.
        legal: (samples, V / 32) array of int32, a bit per token. A finished sample keeps its last
            bits: it gets some token, and nobody reads it.
    """
    # the grammar: an illegal token gets no probability at all
    vocabulary = logits.shape[1]
    bits = np.unpackbits(legal.view("uint8"), axis=1, count=vocabulary, bitorder="little")
    allowed = torch.as_tensor(bits, dtype=torch.bool, device=logits.device)
    logits = logits.masked_fill(~allowed, -math.inf) / policy_config.temperature

    # top-k first: what follows is small, and the draw is made on the CPU, alike on every device
    values, index = logits.topk(min(policy_config.top_k, vocabulary))
    p = torch.softmax(values.cpu(), -1)
    # top-p: the token that crosses the limit stays
    mass_before = p.cumsum(-1) - p
    p = torch.where(mass_before < policy_config.top_p, p, 0.0)
    drawn = torch.multinomial(p, 1, generator=rng)
    return index.cpu().gather(1, drawn).squeeze(1).tolist()


def plan_families(
    families: list[str],
    count: int,
    minimum: int,
) -> list[list[str]]:
    """Which families each of `count` samples may use.

    `minimum` samples are tied to each family, so that every family is explored; the rest are free.
    """
    plan = []
    for family in families:
        plan += [[family]] * minimum
    plan += [families] * count
    return plan[:count]  # with few samples the first families go first


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

    # TTS asks for several batches, and `evaluate` asks again: a batch is generated once
    @functools.cache
    def draw(batch):
        adapter, index = generator.generate_adapter(run, task.name, batch, left_out=left_out)
        if aligned:
            aligner = alignment.load_aligner(run, left_out)
            adapter = alignment.align_adapter(run, aligner, task.name, adapter)
        return adapter, index

    # first of all, so that a missing generator is what the user hears of
    start, _ = draw(0)
    source = Source(
        draw,
        texts=generator.task_texts(run, task.name),
        pooled=generator.load_pooled(run, task.name),
        embed=lambda texts: generator.encode_texts(run, texts)[1],
    )
    return Target(task.name, scoring.load_lm(run), start, cfg.strategies, cfg.seed, source)


class Rewards:
    """What strategies make of one task's support set, kept in files: none is executed twice.

    A file belongs to one configuration (its folder carries the hash) and to one starting adapter
    (`name`). SFT that starts from nothing of that adapter has a file that all methods share.

    Attributes: scores: of the support set with the starting adapter. reference: these, judged.
    """

    def __init__(
        self,
        run: Run,
        name: str,
        target: Target,
        support: list,
    ):
        # of the keys that a reward depends on: a change of policy.lr, say, keeps the files
        fingerprint = runtime.fingerprint(run.cfg, "rewards", unit=target.name)
        digest = hashlib.sha256(json.dumps(fingerprint).encode()).hexdigest()[:8]
        folder = run.path / f"adapted/rewards-{digest}"
        # two files, because a plain start is the same for every method
        self.own_file = folder / f"{name}.jsonl"
        self.plain_file = folder / f"{target.name}.plain.jsonl"
        self.run = run
        self.target = target
        self.support = support
        # the metric of the run, be it of scores or of written answers
        self.tokens = answers.answer_tokens(run.cfg.evaluate, support)
        self.scores = answers.answer_examples(target.lm, target.start, support, tokens=self.tokens)
        self.reference = scoring.judge(self.scores, support, run.cfg.evaluate.metric)

    def of(self, strategy: Strategy, at_steps=()) -> dict:
        """{wins, losses, gold_logp_gain, seconds, forwards, backwards}, against the start.

        Args: at_steps: lengths of other trainings that will be asked for, measured by the way.
        """
        path = self.plain_file if strategy.plain else self.own_file
        kept = runtime.read_jsonl(path) if path.exists() else []
        # a run that was stopped finds here what it had measured
        rows = {row["strategy"]: row for row in kept}
        if str(strategy) not in rows:
            for key, found in self.measure(strategy, at_steps).items():
                rows.setdefault(key, {"strategy": key, **found})
            runtime.write_jsonl(path, list(rows.values()))

        # files keep what was measured; wins and losses depend on the start and are counted here
        row = rows[str(strategy)]
        cost = {key: row.get(key, 0) for key in ("seconds", "forwards", "backwards")}
        return scoring.compare(row, self.reference) | cost

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

        Returns: {canonical JSON: {correct, gold_logp (one entry per example), seconds, forwards,
            backwards}}; for SFT also of the shorter trainings in `at_steps`.
        """
        target = self.target
        lm = target.lm
        began = time.monotonic()
        forwards = lm.forwards
        backwards = lm.backwards
        metric = self.run.cfg.evaluate.metric
        judged = {}
        try:
            if strategy.family == "SFT":
                scores = self._cross_validate(strategy, at_steps)
            else:
                # it reads no label, so the whole support set may judge it
                refined = strategies.execute(target, strategy)
                found = strategies.score_refined(
                    lm, refined, self.support, target.cache, self.tokens
                )
                scores = {strategy: found}
            for trained, found in scores.items():
                judged[str(trained)] = scoring.judge(found, self.support, metric)
        except FloatingPointError:  # a training that diverged lost every example
            size = len(self.support)
            judged[str(strategy)] = {"correct": [0] * size, "gold_logp": [-100.0] * size}

        cost = {
            "seconds": round(time.monotonic() - began, 2),
            "forwards": lm.forwards - forwards,
            "backwards": lm.backwards - backwards,
        }
        return {key: found | cost for key, found in judged.items()}

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
    """Binary: better than the generated adapter by the paired margin (docs/choices.md, 9)."""
    return int(result["wins"] - result["losses"] >= policy_config.reward_margin)


def choose(results: dict[Strategy, dict], policy_config) -> tuple[Strategy, dict]:
    """The final choice, and its {wins, losses, gold_logp_gain}.

    The generated adapter is kept unless a strategy passes. To pass it must win at least
    `select_margin` (SFT: `sft_margin`) more examples than it loses, and raise the mean gold
    log-probability. On 20 examples chance alone gives either too easily.
    Of those that pass: most net wins (`select_by: wins`), or the highest mean gold log-probability
    (`gold_logp`, which says more per example than right or wrong does); ties by the other.
    """
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
    layout = lora.find_layout(model, settings.rank, settings.alpha, 1, settings.modules)
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
    """One task as a method's policy meets it.

    Attributes: families: those the method may propose. prompt: what the policy reads.
    """

    task: Task
    rewards: Rewards
    families: list[str]
    prompt: str


def _open_case(run, task, method, left_out=None):
    """Draw the starting adapter, score it on the support set, and write the prompt.

    Args: left_out: whose generator draws it, where that is not the task's own.
    Raises: UserError: the support examples have no options to compare.
    """
    cfg = run.cfg
    support = list(task.support)
    if any(example.gold is None for example in support):
        raise UserError(
            f"task {task.name}: its support examples have no options to compare; "
            "use data.math_form=choice"
        )
    aligned = method in methods.ALIGNED
    target = make_target(run, task, left_out, aligned)

    # every starting adapter of a task has a reward file of its own
    name = task.name
    if left_out:
        name += f".without_{left_out}"
    if aligned:
        name += f".aligned-{lora.adapter_hash(target.start)[:8]}"
    rewards = Rewards(run, name, target, support)

    # one prompt per task: the state is the start's, and does not change between iterations
    families = methods.families_of(method, cfg.policy.families)
    prompt = proposal_prompt(target.lm, task, families, rewards.scores, cfg.evaluate.metric)
    return Case(task, rewards, families, prompt)


def _run_episodes(run, case, policy_adapter, iteration, label):
    """One round: sample proposals, carry each out, reward it. One record per proposal.

    Args: label: names the search, in seeds and in the log.
    """
    cfg = run.cfg
    name = case.task.name
    # propose: with the base model at first, then with the policy of the last iteration
    key = (cfg.seed, "propose", name, label, iteration)
    texts = sample_proposals(
        scoring.load_lm(run),
        policy_layout(run),
        policy_adapter,
        case.prompt,
        _round_schemas(cfg, case.families, runtime.rng_for(*key, "explore")),
        cfg.policy,
        runtime.seed_for(*key),
    )
    proposed = [_parse(text, cfg.strategies, case.families) for text in texts]

    # execute, each strategy once
    valid = [strategy for strategy in proposed if strategy is not None]
    results = case.rewards.of_all(valid, f"{label} {name} iteration {iteration + 1}")

    # reward: what is no strategy earns nothing
    episodes = []
    for index, strategy in enumerate(proposed):
        episode = {"iteration": iteration, "index": index, "text": texts[index]}
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


def _parse(text, bounds, families):
    """None: a grammar promises neither a value in bounds nor an end before max_new_tokens."""
    try:
        return strategies.parse_strategy(text, bounds, families)
    except ValueError:
        return None


def _round_schemas(cfg, families, explore):
    """The grammar of each sample of a round."""
    settings = cfg.policy
    schemas = []
    for offered in plan_families(families, settings.proposals, settings.min_per_family):
        # left alone, a small policy proposes the same few settings every time: a sample that is
        # tied to a family sees a random half of them
        tied = len(offered) < len(families)
        half = explore if tied else None
        schemas.append(strategies.proposal_schema(cfg.strategies, offered, half))
    return schemas


def _proposing(cfg):
    """The configured methods that have a policy."""
    return [method for method in methods.PROPOSING if method in cfg.evaluate.methods]


def train_policies(run: Run) -> dict:
    """policy.mode=meta: ReST-EM over the training tasks, a policy per left-out set and method."""
    cfg = run.cfg
    strategies.check_grid(cfg.strategies)
    if cfg.policy.mode == "per_task":
        run.log("policy.mode=per_task: the policy is trained inside stage=adapt")
        return {}
    # targets out of domain share one left-out set, and so one policy
    targets = cfg.data.targets or cfg.data.train_tasks + cfg.data.test_tasks
    left_out_sets = sorted({data.left_out_for(cfg, target) for target in targets})
    units = list(itertools.product(left_out_sets, _proposing(cfg)))
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

    # the left-out task is none of the cases, and the generator that draws for them never saw it
    tasks = data.load_tasks(run)
    cases = []
    for name in data.training_tasks(run.cfg, left_out):
        cases.append(_open_case(run, tasks[name], method, left_out))
    label = f"{method}-without-{data.seed_name(left_out)}"
    episodes, policy_adapter = _run_rest_em(run, cases, left_out, method, label)

    # the base model as policy is an adapter with B = 0
    layout = policy_layout(run)
    kept = policy_adapter or lora.init_adapter(layout, 0)
    lora.save_adapter(run.path / unit, kept, layout, run.cfg.model)
    runtime.write_jsonl(run.path / unit / "episodes.jsonl", episodes)
    run.finish(unit, "policy", began, method)


def _run_rest_em(run, cases, name, method, label):
    """ReST-EM: every iteration proposes for all cases, and trains on what was rewarded.

    Args: name, method, label: see `improve_policy` and `_run_episodes`.
    Returns: the episodes, and the policy's adapter; None is the base model.
    """
    settings = run.cfg.policy
    policy_adapter = None
    episodes = []
    for iteration in range(settings.iterations):
        # every task's proposals come from the same policy
        samples = {}
        for case in cases:
            new = _run_episodes(run, case, policy_adapter, iteration, label)
            samples[case.prompt] = rewarded(new)
            # a policy that several tasks share keeps its episodes in one file
            if settings.mode == "meta":
                new = [{"task": case.task.name, **episode} for episode in new]
            episodes += new

        # per task, nobody would sample from a policy that the last iteration trained
        if settings.mode == "per_task" and iteration + 1 == settings.iterations:
            break
        # with nothing rewarded there is nothing to learn, and the policy stays
        trained = improve_policy(run, samples, name, method, iteration)
        policy_adapter = trained or policy_adapter
    return episodes, policy_adapter


def targets_by_cost(run: Run) -> list[Task]:
    """The targets of the run, the longest support set first, as ranks take them."""

    def length(task):
        return sum(len(example.prompt) for example in task.support)

    tasks = data.load_tasks(run)
    wanted = [tasks[name] for name in run.cfg.data.targets or tasks]
    return sorted(wanted, key=length, reverse=True)


def adapt_targets(run: Run) -> dict:
    """Each target: generate, propose, execute, select. Writes PEFT folders adapted/<method>/<task>.

    The unrefined adapters (`generator`, `aligned`) are methods of their own and are written too.
    """
    cfg = run.cfg
    strategies.check_grid(cfg.strategies)
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
    cfg = run.cfg
    began = time.monotonic()
    case = _open_case(run, task, method)
    episodes = _search(run, case, method)

    # the choice is among everything that was tried, and the plain twins
    proposed = [Strategy.from_dict(e["strategy"]) for e in episodes if e["valid"]]
    results = case.rewards.of_all(with_plain_twins(proposed), f"{method} {task.name}")
    strategy, result = choose(results, cfg.policy)

    # nothing is measured on the support set any more: now SFT trains on all of it
    support = case.rewards.support
    refined = strategies.execute_finite(case.rewards.target, strategy, support)

    # beside the adapter: what was proposed, what the policy had read, and why this was chosen
    folder = run.path / f"adapted/{method}/{task.name}"
    runtime.write_jsonl(folder / "episodes.jsonl", episodes)
    runtime.write_text(folder / "prompt.txt", case.prompt)
    facts = {
        "strategy": strategy.as_dict(),
        **result,
        "n_support": len(support),
        "notes": refined.notes,
        "support_accuracy_generated": sum(case.rewards.reference["correct"]) / len(support),
    }
    # of an ensemble only the first adapter is kept: `evaluate` draws the others again
    keep_adapted(run, method, task, refined.adapters[0], facts, began)


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
        return _run_rest_em(run, [case], name, method, method)[0]
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
        text = answers.continue_rows(lm, [scoring.prompt_row(lm, prompt)], 120)[0]
        found[name] = " ".join(text.split())
        run.log(f"context of {name}: {found[name]}")
    path = run.path / "contexts.yaml"
    runtime.write_text(path, yaml.safe_dump(found, sort_keys=False, width=100))
    return {"contexts": str(path)}
