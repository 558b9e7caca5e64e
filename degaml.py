"""The command: one stage of the pipeline, or all of them, on a run folder.

    python degaml.py stage=all config=configs/smollm2.yaml
    torchrun --nproc-per-node=2 degaml.py stage=generator generator.lr=1e-3

Order: default < config=file.yaml < key=value. The same command continues after an interruption.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import sys
import time

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import torch.distributed as dist

import alignment
import analysis
import assets
import baselines
import collect
import config
import doctor
import evaluate
import export
import generator
import methods
import own_task
import policy
import report
import runtime
import study
from config import UserError
from runtime import Run

# The pipeline in order. Each stage is a function of the run that returns its summary metrics.
PIPELINE = {
    "collect": collect.collect_adapters,
    "generator": generator.train_generators,
    "align": alignment.train_aligners,
    "policy": policy.train_policies,
    "adapt": policy.adapt_targets,
    "baselines": baselines.train_baselines,
    "evaluate": evaluate.evaluate_methods,
    "report": report.make_report,
}


def run_all(run: Run) -> dict:
    """Every stage in order, except those whose results no method of `evaluate.methods` uses."""
    idle = methods.idle_stages(run.cfg.evaluate.methods)
    summary: dict = {}
    for name in PIPELINE:
        if name not in idle:
            summary |= run_stage(name, run)
    return summary


def prepare(run: Run) -> dict:
    """What an adapter for your own task needs of a run: its checkpoints, and one generator.

    The generator is the one that is trained on all tasks, as nothing is left out for a new one.
    """
    cfg = run.cfg
    # no target of the run's own: for a new task nothing is left out
    sections = {
        "data": cfg.data.model_copy(update={"targets": ["all"], "test_tasks": []}),
        "evaluate": cfg.evaluate.model_copy(update={"methods": list(methods.OWN_TASK)}),
    }
    # and so there is one generator to train, by all ranks together
    sections["data_parallel"] = True
    narrow = dataclasses.replace(run, cfg=cfg.model_copy(update=sections))
    if run.rank == 0:
        run.log(doctor.forecast(narrow))
    summary: dict = {}
    for name in ("collect", "generator", "policy"):
        summary |= run_stage(name, narrow)
    return summary


STAGES = {
    "all": run_all,
    "prepare": prepare,
    **PIPELINE,
    "analyze": analysis.analyze,
    "study": study.run_study,
    "export": export.export_adapter,
    "predict": own_task.predict,
    "contexts": policy.write_contexts,
    "assets": assets.fetch_assets,
    "check": doctor.check,
    "config": doctor.show_config,
    "doctor": doctor.examine,
}


# what a full disk or a forbidden place raises
DISK_FAULTS = (
    errno.ENOSPC,
    errno.EFBIG,
    errno.EDQUOT,
    errno.EACCES,
    errno.EROFS,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENOTDIR,
)


def run_stage(name: str, run: Run) -> dict:
    """Run one stage on every rank; keep its seconds and peak memory in stages/<name>.json."""
    began = time.monotonic()
    own_task_given = name == "adapt" and run.cfg.task
    stage = own_task.adapt_own if own_task_given else STAGES[name]
    summary = stage(run)
    run.barrier()

    part_of_the_run = name in PIPELINE and not run.cfg.task
    if run.rank == 0 and part_of_the_run:
        runtime.record_stage(run, name, time.monotonic() - began, summary)
    return summary


def print_help() -> None:
    """The module's text, then every stage with the first line of its docstring."""
    print(__doc__, "\nstages:")
    for name, stage in STAGES.items():
        print(f"  {name:10} {stage.__doc__.splitlines()[0]}")


def main(argv: list[str]) -> int:
    """Parse, open the run folder, run the stage.

    Returns: the exit status: 0, or 2 for a mistake the user can mend.
    """
    if argv in (["-h"], ["--help"], ["help"]):
        print_help()
        return 0
    try:
        cfg, stage = config.load_config(argv)
        if stage not in STAGES:
            raise UserError(f"stage={stage}: unknown; legal: {', '.join(STAGES)}")
        os.chdir(config.ROOT)  # relative paths in a configuration mean the repository's
        # before anything asks for the model: from here on it is a folder or a hub id
        cfg.model.name, copied = assets.open_model(cfg.model.name)
        run = runtime.open_run(cfg, stage, argv)
        if copied:
            run.log(copied)
        run_stage(stage, run)
        # a stage that makes no part of the run must not describe it anew
        if run.rank == 0 and not cfg.task and stage not in config.ASIDE:
            runtime.write_config(run)
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        if error.errno not in DISK_FAULTS:
            raise
        print(
            f"error: {error.filename or 'run folder'}: {error.strerror}; free space or choose "
            "another place (run=..., output=...); what is finished is kept, the same command "
            "continues",
            file=sys.stderr,
        )
    return 2


if __name__ == "__main__":
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("stopped; what is finished is kept, the same command continues", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        # `... | head` has read enough; Python flushes what is left once more as it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    if dist.is_available() and dist.is_initialized():
        if code:
            os._exit(code)  # at once: another rank may wait in a collective that this one left
        dist.destroy_process_group()
    sys.exit(code)
