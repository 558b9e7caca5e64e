"""Baselines that see exactly what DeGAML sees of a target: its support labels, nothing else.

no_meta   SFT from a plain initialisation, with the settings the policy proposed for `degaml_plus`, chosen among them by
          the same cross-validation; keeping the base model is always a candidate.
"""

from __future__ import annotations

import json
import time

from data import load_tasks
from lora import init_adapter, save_adapter
from policy import Rewards, choose, make_target
from runtime import Run, read_jsonl, write_json
from scoring import load_lm, score_examples
from strategies import Strategy, execute


def train_baselines(cfg, run: Run) -> dict:
    """Every configured baseline on every target. Writes adapted/<method>/<task>/ as a PEFT folder."""
    tasks = load_tasks(run)
    wanted = [tasks[t] for t in cfg.data.targets or tasks]
    if "no_meta" in cfg.evaluate.methods:
        for task in run.deal(sorted(wanted, key=lambda t: -sum(len(e.prompt) for e in t.support))):
            if not run.finished(f"adapted/no_meta/{task.name}", "adapt"):
                _train_no_meta(cfg, run, task)
    return {}


def proposed_sft(run: Run, task: str) -> list[Strategy]:
    """The distinct SFT settings the policy proposed for a task, longest first; the start they share is the plain one."""
    path = run.path / f"adapted/degaml_plus/{task}/episodes.jsonl"
    found = {}
    for e in read_jsonl(path) if path.exists() else []:
        if e["valid"] and e["strategy"]["family"] == "SFT":
            obj = e["strategy"] | {"init_scale": 0.0}
            found[json.dumps(obj, sort_keys=True)] = Strategy(obj.pop("family"), tuple(obj.items()))
    return sorted(found.values(), key=lambda s: -s["sft_steps"])


def _train_no_meta(cfg, run: Run, task) -> None:
    start, lm, support = time.monotonic(), load_lm(run), list(task.support)
    target = make_target(run, task)
    target.start = init_adapter(lm.layout, cfg.seed)
    reference = score_examples(lm, None, support)
    rewards = Rewards(run, f"{task.name}.no_meta", target, support, reference)
    candidates = proposed_sft(run, task.name)
    steps = sorted({s["sft_steps"] for s in candidates})
    results = {str(s): rewards.of(s, steps) for s in run.track(candidates, f"no_meta {task.name}")}
    strategy, result = choose(results, cfg.policy)
    folder = run.path / f"adapted/no_meta/{task.name}"
    save_adapter(folder, execute(target, strategy, support).adapters[0], lm.layout, cfg.model.name, cfg.model.revision)
    write_json(folder / "strategy.json", {"strategy": strategy.as_dict(), "wins": result["wins"],
                                          "losses": result["losses"], "n_support": len(support),
                                          "gold_logp_gain": result["gold_logp_gain"]})
    run.finish(f"adapted/no_meta/{task.name}", "adapt", start)
    run.log(f"no_meta {task.name}: {strategy} (+{result['wins']} -{result['losses']} of {len(support)}) in "
            f"{time.monotonic() - start:.0f} s", True)
