"""The whole command on tiny models: results, reruns, ranks, kills, refusals and portable adapters."""

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from conftest import FULL_RUN, run_command
from filelock import FileLock
from safetensors.torch import load_file

import scoring
from config import ROOT, load_config
from generator import load_generator
from lora import load_adapter, swap_adapter
from methods import idle_stages
from runtime import Run, read_json, read_jsonl, write_json
from scoring import load_lm

pytestmark = pytest.mark.usefixtures("one_thread")
TASKS = {"alpha": "id", "beta": "id", "gamma": "id", "delta": "ood", "epsilon": "ood"}
METHODS = [
    "base",
    "mean",
    "wrong_prompts",
    "full_data",
    "generator",
    "degaml",
    "degaml_plus",
    "no_meta",
]


def environment() -> dict:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def results_of(folder: Path) -> dict:
    return json.loads((folder / "report/results.json").read_text())


def stable(tree, drop=("seconds", "provenance")):
    """Results without the times they took and without how they were made."""
    if isinstance(tree, dict):
        return {k: stable(v, drop) for k, v in tree.items() if not k.startswith(drop)}
    return [stable(v, drop) for v in tree] if isinstance(tree, list) else tree


def weights_of(folder: Path) -> dict[str, bytes]:
    parts = ("adapters", "generator", "adapted")
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for part in parts
        for p in sorted(folder.glob(f"{part}/**/*.safetensors"))
    }


# ------------------------------------------------------------------------------------------------ a whole run


def test_results_have_the_promised_shape(full):
    """Every method on every task, with accuracy and error; averages per domain; seconds per stage."""
    results = results_of(full)
    assert results["config"] == "tiny" and results["seed"] == 1 and results["model"]
    assert set(results["tasks"]) == set(TASKS)
    for name, task in results["tasks"].items():
        assert (
            task["domain"] == TASKS[name] and task["n_test"] == 12 and task["stand_in_for"] is None
        )
        assert 0 < task["chance"] < 1 and 0 < task["majority"] <= 1
        wanted = [m for m in METHODS if m != "full_data" or TASKS[name] == "id"]
        assert set(task["methods"]) == set(wanted)
        for entry in task["methods"].values():
            assert 0 <= entry["acc"] <= 1 and entry["se"] >= 0
        assert task["strategy"]["degaml"]["strategy"]["family"]
    for domain in ("id", "ood"):
        mine = [t["methods"] for n, t in results["tasks"].items() if TASKS[n] == domain]
        for method in METHODS:
            if method != "full_data" or domain == "id":
                mean = sum(t[method]["acc"] for t in mine) / len(mine)
                assert results["averages"][domain][method]["acc"] == pytest.approx(mean)
    assert {"collect", "generator", "adapt", "baselines", "evaluate"} <= set(results["seconds"])
    assert (full / "report/report.html").stat().st_size > 10_000 and (
        full / "report/report.md"
    ).exists()


def test_accuracies_are_those_of_the_score_files(full):
    """A number in results.json can be recomputed from the stored rows by hand."""
    results = results_of(full)
    for task, method in (("alpha", "generator"), ("delta", "degaml_plus"), ("epsilon", "base")):
        rows = read_jsonl(full / f"scores/{method}/{task}.jsonl")
        assert len({r["id"] for r in rows}) == 12
        acc = sum(r["correct_norm"] for r in rows) / 12
        assert results["tasks"][task]["methods"][method]["acc"] == pytest.approx(acc)


def test_several_families_were_chosen(full):
    """The run above exercises more than keeping the adapter (or the tests on it would be hollow)."""
    chosen = {
        read_json(full / f"adapted/{m}/{t}/strategy.json")["strategy"]["family"]
        for m in ("degaml", "degaml_plus")
        for t in TASKS
    }
    assert len(chosen - {"none"}) >= 2, chosen


def test_test_ids_are_disjoint_from_train_and_support(full, words):
    """No example scored in the end was a support or training example."""
    tasks = read_json(full / "tasks.json")
    for name, task in tasks.items():
        scored = {r["id"] for r in read_jsonl(full / f"scores/base/{name}.jsonl")}
        assert scored == set(task["test_ids"]) and not scored & set(task["support_ids"])


def test_second_invocation_skips_everything(full, words, monkeypatch):
    """The same command again makes nothing, runs no model, and reports the same results."""

    def stamps():
        parts = ("adapters", "prompts", "generator", "adapted", "scores")
        return {
            str(p): p.stat().st_mtime_ns
            for d in parts
            for p in full.glob(f"{d}/**/*")
            if p.is_file()
        }

    def never(*args, **kwargs):
        raise AssertionError("a model ran")

    before, files = results_of(full), stamps()
    monkeypatch.setattr(scoring, "hidden_states", never)
    start = time.monotonic()
    assert run_command([*words, "stage=all", f"run={full}"]) == 0
    took = time.monotonic() - start
    assert stamps() == files
    assert took < max(5.0, FULL_RUN["seconds"] / 2)
    assert stable(results_of(full), ("seconds", "command")) == stable(
        before, ("seconds", "command")
    )


def test_a_rerun_keeps_the_seconds_of_the_work(full, words):
    """Skipping does not overwrite what the stages cost."""
    before, record = results_of(full)["seconds"], read_json(full / "stages/adapt.json")
    assert 0.05 < record["memory_gib"] < 50
    write_json(full / "stages/adapt.json", record | {"memory_gib": 99.0})
    assert run_command([*words, "stage=adapt", f"run={full}"]) == 0
    after = read_json(full / "stages/adapt.json")
    assert after["seconds"] == before["adapt"] > 0 and after["memory_gib"] == 99.0
    write_json(full / "stages/adapt.json", record)


@pytest.mark.parametrize(
    "method_ids, needed",
    [
        (["base"], set()),
        (["base", "maml"], {"baselines"}),
        (["base", "full_data"], {"collect"}),
        (["mean"], {"collect"}),
        (["base", "wrong_prompts"], {"collect", "generator", "adapt"}),
        (["aligned"], {"collect", "generator", "align", "adapt"}),
        (["degaml"], {"collect", "generator", "policy", "adapt"}),
        (["tempo"], {"collect", "generator", "align", "policy", "adapt"}),
        (["maml_matched"], {"collect", "generator", "adapt", "baselines"}),
        (["degaml_plus", "no_meta"], {"collect", "generator", "policy", "adapt", "baselines"}),
    ],
)
def test_stages_that_no_method_needs(method_ids, needed):
    """They are left out of stage=all, and of what the doctor asks for."""
    every_stage = {"collect", "generator", "align", "policy", "adapt", "baselines"}
    assert idle_stages(method_ids) == every_stage - needed


def test_one_generator_is_held_at_a_time(full, words):
    """The papers' take 4 GiB of a GPU each."""
    run = Run(full, load_config(words)[0], quiet=True)
    for left_out in ("alpha", "all", "all"):
        assert load_generator(run, left_out).left_out == left_out
        assert [k for k in run.cache if k.startswith("generator/")] == [f"generator/{left_out}"]


# -------------------------------------------------------------------------------------------- ranks and kills


def ranks(*words: str) -> list[str]:
    """The command under torchrun with two ranks."""
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "degaml.py",
        *words,
    ]


def test_two_ranks_give_the_results_of_one(full, words, tmp_path):
    """Ranks change speed only: same results, same weights, bit for bit."""
    log = tmp_path / "ranks.log"
    command = ranks(*words, "stage=all", f"run={tmp_path / 'two'}")
    with open(log, "w") as out:
        done = subprocess.run(
            command, cwd=ROOT, env=environment(), stdout=out, stderr=out, timeout=150
        )
    assert done.returncode == 0, log.read_text()[-3000:]
    assert read_json(tmp_path / "two/env.json")["ranks"] == 2
    assert stable(results_of(tmp_path / "two")) == stable(results_of(full))
    ours, theirs = weights_of(full), weights_of(tmp_path / "two")
    assert set(ours) == set(theirs) and [k for k in ours if ours[k] != theirs[k]] == []
    text = (tmp_path / "two/log.txt").read_text()
    assert "[0] " in text and "[1] " in text, "both ranks took units"


def test_two_ranks_train_one_generator_together(full, words, tmp_path):
    """The command with data_parallel; tests/test_generator.py compares the weights."""
    folder = tmp_path / "two"
    shutil.copytree(full, folder, ignore=shutil.ignore_patterns("generator"))
    log = tmp_path / "ranks.log"
    command = ranks(*words, "stage=generator", f"run={folder}", "data_parallel=true")
    with open(log, "w") as out:
        done = subprocess.run(
            command, cwd=ROOT, env=environment(), stdout=out, stderr=out, timeout=150
        )
    assert done.returncode == 0, log.read_text()[-3000:]
    assert "Warning" not in log.read_text()
    for left_out in ("all", "alpha", "beta", "gamma"):
        one = read_json(full / f"generator/{left_out}/DONE.json")
        two = read_json(folder / f"generator/{left_out}/DONE.json")
        assert two["ranks"] == 2
        assert two["recon_mse"] == pytest.approx(one["recon_mse"], rel=1e-6)


BEGUN = {  # the first trace each stage leaves
    "collect": "adapters/*/step_*.safetensors",
    "generator": "generator/*/state.safetensors",
    "adapt": "adapted/rewards*/*.jsonl",
    "baselines": "adapted/no_meta/*/adapter_model.safetensors",
    "evaluate": "scores/*/*.jsonl",
}


def kill_in(stage: str, command: list[str], folder: Path, log: Path) -> None:
    """Start the command and kill it, without warning, as soon as the stage has left a trace."""
    with open(log, "w") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=out, stderr=out, start_new_session=True
        )
    try:
        limit = time.monotonic() + 90
        while not next(folder.glob(BEGUN[stage]), None):
            assert process.poll() is None, f"ended before {stage} began: {log.read_text()[-2000:]}"
            assert time.monotonic() < limit, f"{stage} never began: {log.read_text()[-2000:]}"
            time.sleep(0.001)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not (folder / f"stages/{stage}.json").exists(), f"{stage} was over before the kill"


def test_killed_in_every_stage(full, words, tmp_path):
    """Killed in each stage in turn, the same command ends in an uninterrupted run's results and weights."""
    folder = tmp_path / "killed"
    mine = [*words, "stage=all", f"run={folder}"]
    for stage in BEGUN:
        kill_in(stage, [sys.executable, "degaml.py", *mine], folder, tmp_path / f"{stage}.log")
    assert run_command(mine) == 0
    # what several ensembles share is scored again after a restart: passes are a cost, like seconds
    drop = ("seconds", "provenance", "forwards", "backwards")
    assert stable(results_of(folder), drop) == stable(results_of(full), drop)
    ours, theirs = weights_of(full), weights_of(folder)
    assert set(ours) == set(theirs) and [k for k in ours if ours[k] != theirs[k]] == []


def children_of(pid: int) -> list[int]:
    return [
        int(c)
        for t in Path(f"/proc/{pid}/task").iterdir()
        for c in (t / "children").read_text().split()
    ]


def wait_for(pattern: str, folder: Path, process, log: Path) -> None:
    limit = time.monotonic() + 90
    while not next(folder.glob(pattern), None):
        assert process.poll() is None and time.monotonic() < limit, log.read_text()[-2000:]
        time.sleep(0.001)


def test_a_dead_worker_is_restarted(full, words, tmp_path):
    """torchrun's elastic agent starts the ranks again, and they go on from what is finished: the same results."""
    log, folder = tmp_path / "elastic.log", tmp_path / "elastic"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "--max-restarts=2",
        "degaml.py",
        *words,
        "stage=all",
        f"run={folder}",
    ]
    with open(log, "w") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=out, stderr=out)
    try:
        for i, stage in enumerate(("generator", "adapt")):
            wait_for(BEGUN[stage], folder, process, log)
            while (
                len((folder / "command.txt").read_text().splitlines()) <= i
            ):  # the ranks are up again
                time.sleep(0.1)
            os.kill(children_of(process.pid)[i], signal.SIGKILL)
        assert process.wait(timeout=150) == 0, log.read_text()[-3000:]
    finally:
        process.kill()
    assert len((folder / "command.txt").read_text().splitlines()) == 3, "begun thrice"
    drop = ("seconds", "provenance", "forwards", "backwards")
    assert stable(results_of(folder), drop) == stable(results_of(full), drop)


def test_two_nodes_give_the_results_of_one_process(full, words, tmp_path):
    """The README's two-node line, both agents on this machine: one run folder, one rank each, the same results."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        "--nproc-per-node=1",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=localhost:{port}",
        "--max-restarts=3",
        "degaml.py",
        *words,
        "stage=all",
        f"run={tmp_path / 'two'}",
    ]
    logs, nodes = [tmp_path / "head.log", tmp_path / "other.log"], []
    try:
        for log in logs:
            with open(log, "w") as out:
                nodes.append(
                    subprocess.Popen(
                        command,
                        cwd=ROOT,
                        stdout=out,
                        stderr=out,
                        env=environment() | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
                    )
                )
        for node, log in zip(nodes, logs, strict=True):
            assert node.wait(timeout=200) == 0, log.read_text()[-3000:]
    finally:
        for node in nodes:
            node.kill()
    assert stable(results_of(tmp_path / "two")) == stable(results_of(full))
    text = (tmp_path / "two/log.txt").read_text()
    assert "[0] " in text and "[1] " in text, "both nodes took units"


@pytest.mark.parametrize(
    "number, status", [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)]
)
def test_asked_to_stop_it_goes_at_once(words, tmp_path, number, status):
    """Without a traceback; the generator's last save is there to go on from."""
    log, folder = tmp_path / "stop.log", tmp_path / "stopped"
    mine = [*words, "stage=all", f"run={folder}", "generator.steps=100000"]
    with open(log, "w") as out:
        process = subprocess.Popen(
            [sys.executable, "degaml.py", *mine],
            cwd=ROOT,
            env=environment(),
            stdout=out,
            stderr=out,
        )
    try:
        wait_for("generator/*/state.safetensors", folder, process, log)
        process.send_signal(number)
        assert process.wait(timeout=20) == status
    finally:
        process.kill()
    text = log.read_text()
    assert "Traceback" not in text
    assert ("the same command continues" in text) == (number == signal.SIGINT)
    state = load_file(next(folder.glob("generator/*/state.safetensors")))
    assert int(state["step"]) > 0


def test_one_process_per_folder(full, words, capsys):
    """A folder another process works in is refused, not shared."""
    with FileLock(full / ".lock"):
        assert run_command([*words, "stage=report", f"run={full}"]) == 2
    assert str(full) in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "stage, file",
    [
        ("generator", "adapters/beta/step_0008.safetensors"),
        ("evaluate", "adapted/no_meta/delta/adapter_model.safetensors"),
        ("evaluate", "generator/all/generator.safetensors"),
        ("generator", "prompts/beta/states.npy"),
        ("evaluate", "prompts/delta/pooled.npy"),
    ],
)
def test_truncated_file_is_named(copy, words, capsys, stage, file):
    """A file cut short ends in status 2 and one line with its name and what to do."""
    (copy / file).write_bytes((copy / file).read_bytes()[:-64])
    shutil.rmtree(copy / ("generator" if stage == "generator" else "scores"))
    assert run_command([*words, f"stage={stage}"]) == 2
    err = capsys.readouterr().err
    assert str(copy / file) in err and "delete" in err and "Traceback" not in err


@pytest.mark.parametrize(
    "stage, gone, file",
    [
        ("collect", "adapters", "adapters/alpha/step_0007.safetensors"),
        ("generator", "prompts", "prompts/alpha/states.npy"),
        ("generator", "generator", "generator/all/generator.safetensors"),
        ("adapt", "adapted/rewards* adapted/degaml*", "adapted/rewards*/delta.jsonl"),
        ("adapt", "adapted/degaml*", "adapted/degaml/delta/episodes.jsonl"),
        ("baselines", "adapted/no_meta", "adapted/no_meta/delta/adapter_model.safetensors"),
        ("evaluate", "scores", "scores/generator/delta.jsonl"),
        ("report", "report", "report/results.json"),
        ("report", "report", "report/report.html"),
        ("report", "report", "report/figures/gains.png"),
    ],
)
def test_a_disk_that_fills_up(copy, full, words, capsys, stage, gone, file):
    """Where a file of this kind finds no room (here: none may grow to its size) the run ends with status 2 and a
    line that says so; the same command with room gives what an undisturbed run gave."""
    before, room = results_of(full), next(full.glob(file)).stat().st_size // 2
    for folder in [f for pattern in gone.split() for f in copy.glob(pattern)]:
        shutil.rmtree(folder)
    for grows in ("log.txt", "metrics.jsonl", "command.txt"):
        (copy / grows).unlink()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        status = run_command([*words, f"stage={stage}"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    err = capsys.readouterr().err
    assert (
        status == 2
        and "free space" in err
        and "the same command continues" in err
        and "Traceback" not in err
    )
    assert (
        run_command([*words, f"stage={stage}"]) == 0 and run_command([*words, "stage=report"]) == 0
    )
    drop = ("seconds", "provenance", "forwards", "backwards")
    assert stable(results_of(copy), drop) == stable(before, drop)
    assert weights_of(copy) == weights_of(full)


@pytest.mark.parametrize(
    "word",
    [
        "collect.pretrain_lr=5e-3",
        "generator.steps=21",
        "policy.folds=4",
        "strategies.ttl_threshold=0",
        "evaluate.metric=raw",
        "data.num_support=9",
        "model.rank=2",
        "seed=2",
    ],
)
def test_changed_configuration_is_refused_by_name(copy, words, capsys, word):
    """A finished unit made under another value is never mixed with the new one; nothing is touched."""
    files = weights_of(copy)
    assert run_command([*words, "stage=all", word]) == 2
    err = capsys.readouterr().err
    assert word.split("=")[0] in err and "overwrite=true" in err
    assert weights_of(copy) == files


def test_a_refused_command_does_not_describe_the_folder(copy, words):
    """config.yaml says how the folder's contents were made; a refused command made none of them."""

    def described():
        return {
            k: v
            for k, v in yaml.safe_load((copy / "config.yaml").read_text()).items()
            if k != "run"
        }

    before = described()
    assert run_command([*words, "stage=all", "seed=2"]) == 2
    assert described() == before and before["seed"] == 1


def test_other_number_of_prompt_batches_is_not_ignored(copy, words, capsys):
    """Averaged `generator` scores belong to one number of batches: they are made again, or it is refused."""
    stamp = (copy / "scores/generator/delta.jsonl").stat().st_mtime_ns
    if run_command([*words, "stage=evaluate", "evaluate.prompt_batches=1"]) == 2:
        assert "evaluate.prompt_batches" in capsys.readouterr().err
    else:
        assert (copy / "scores/generator/delta.jsonl").stat().st_mtime_ns != stamp


def test_overwrite_redoes_what_changed(copy, words, tmp_path):
    """overwrite=true: the results are a fresh adaptation's under the new configuration."""
    change = [
        *words,
        "data.targets=[delta]",
        "evaluate.methods=[base, degaml, degaml_plus]",
        "overwrite=true",
        "strategies.ttl_threshold=0",
        "policy.folds=4",
    ]
    shutil.copytree(copy, tmp_path / "fresh")
    for part in ("adapted", "scores", "stages"):
        shutil.rmtree(tmp_path / "fresh" / part)
    found = {}
    for folder in (copy, tmp_path / "fresh"):
        for stage in ("adapt", "evaluate"):
            assert run_command([*change, f"stage={stage}", f"run={folder}"]) == 0
        for method in ("degaml", "degaml_plus"):
            mine = folder / f"adapted/{method}/delta"
            found.setdefault(method, []).append(
                (
                    stable(read_jsonl(mine / "episodes.jsonl"), ("seconds",)),
                    read_json(mine / "strategy.json"),
                    read_jsonl(folder / f"scores/{method}/delta.jsonl"),
                )
            )
    for method, (redone, fresh) in found.items():
        assert redone == fresh, method


def test_unknown_stage_is_a_users_mistake(words, capsys):
    """Status 2 and the legal names."""
    assert run_command([*words, "stage=adpat"]) == 2
    err = capsys.readouterr().err
    assert "adpat" in err and "adapt" in err and "evaluate" in err


# -------------------------------------------------------------------------------------- seeds and portability


def test_second_generator_seed(copy, words):
    """generator.seed alone: the collected checkpoints are kept, generators and generated adapters differ."""
    before = weights_of(copy)
    for part in ("generator", "adapted", "scores"):
        shutil.rmtree(copy / part)
    for stage in ("collect", "generator", "adapt"):
        assert (
            run_command(
                [
                    *words,
                    f"stage={stage}",
                    "generator.seed=2",
                    "data.targets=[alpha, delta]",
                    "evaluate.methods=[degaml]",
                ]
            )
            == 0
        )
    after = weights_of(copy)
    assert {
        f"adapted/{m}/{t}/adapter_model.safetensors"
        for m in ("degaml", "generator")
        for t in ("alpha", "delta")
    } < set(after)
    for key in after:
        assert (before[key] == after[key]) == key.startswith("adapters/"), key


def test_runs_of_several_seeds_are_pooled(words, tmp_path, capsys):
    """Each seed in a folder of its own, with its own splits and generator; one report pools them."""
    words = [*words, "data.targets=[delta]", "evaluate.methods=[base, generator]"]
    first, second = (tmp_path / f"seed{seed}" for seed in (1, 2))
    for seed, folder in ((1, first), (2, second)):
        mine = [*words, "stage=all", f"run={folder}", f"seed={seed}", f"generator.seed={seed}"]
        assert run_command(mine) == 0
    pooling = ["stage=report", f"run={first}", f"report.seed_runs=[{second}]"]
    assert run_command([*words, "seed=1", *pooling]) == 0

    pooled = results_of(first)["seeds"]
    assert [r["seed"] for r in pooled["runs"]] == [1, 2] and "seeds" not in results_of(second)
    values = [results_of(f)["averages"]["ood"]["generator"]["acc"] for f in (first, second)]
    spread = pooled["pooled"]["averages"]["ood"]["generator"]["seed_std"]
    assert spread == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    assert "pooled over seeds 1, 2" in capsys.readouterr().out
    splits = [read_json(f / "tasks.json")["delta"]["test_ids"] for f in (first, second)]
    assert splits[0] != splits[1]


@pytest.mark.parametrize("task", ["beta", "delta"])
def test_adapted_folder_loads_elsewhere(full, words, tiny_model_dir, task):
    """The adapted folder is a complete adapter for its base model: every weight arrives, the logits agree."""
    from peft import PeftModel, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    folder = full / f"adapted/degaml_plus/{task}"
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        bare = base(ids).logits
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(base, folder).eval()
    assert not [str(w.message) for w in caught if "key" in str(w.message).lower()]
    stored, loaded = (
        load_file(folder / "adapter_model.safetensors"),
        get_peft_model_state_dict(model),
    )
    assert set(stored) == set(loaded) and all(torch.equal(stored[k], loaded[k]) for k in stored)
    assert any(v.any() for k, v in stored.items() if "lora_B" in k)
    cfg, _ = load_config([*words, f"run={full}"])
    lm = load_lm(Run(full, cfg, quiet=True))
    swap_adapter(lm.model, lm.layout, load_adapter(folder, lm.layout))
    with torch.no_grad():
        ours, theirs = lm.model(ids).logits, model(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (theirs - bare).abs().max() > 1e-3
