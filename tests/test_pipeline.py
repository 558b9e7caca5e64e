"""The whole command on tiny models: results, reruns, ranks, kills, refusals, portable adapters."""

import contextlib
import os
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
from conftest import FULL_RUN, file_size_limit, run_command
from safetensors.torch import load_file

import lora
import methods
import runtime
import scoring
from config import ROOT, load_config
from generator import load_generator
from runtime import Run, read_json, read_jsonl

pytestmark = pytest.mark.usefixtures("one_thread")
TASKS = {"alpha": "id", "beta": "id", "gamma": "id", "delta": "ood", "epsilon": "ood"}
METHODS = ("base", "icl", "mean", "wrong_prompts", "generator", "degaml", "degaml_plus", "no_meta")
METHODS_IN = {"id": {*METHODS, "full_data"}, "ood": set(METHODS)}

# What may differ between two runs of one configuration: how long it took, and how it was made.
MADE = ("seconds", "provenance")
# What several ensembles share is scored again after a restart: passes are a cost, like seconds.
INTERRUPTED = (*MADE, "forwards", "backwards")


def environment() -> dict:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def results_of(folder: Path) -> dict:
    return read_json(folder / "report/results.json")


def stable(tree, drop=MADE):
    """A tree of results without the keys that begin with one of `drop`."""
    if isinstance(tree, dict):
        return {k: stable(v, drop) for k, v in tree.items() if not k.startswith(drop)}
    if isinstance(tree, list):
        return [stable(item, drop) for item in tree]
    return tree


def weights_of(folder: Path) -> dict[str, bytes]:
    found = {}
    for part in ("adapters", "generator", "adapted"):
        for path in folder.glob(f"{part}/**/*.safetensors"):
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def assert_same_outcome(folder: Path, full: Path, drop=MADE) -> None:
    """The same results and, bit for bit, the same weights."""
    assert stable(results_of(folder), drop) == stable(results_of(full), drop)
    found = weights_of(folder)
    wanted = weights_of(full)
    assert set(found) == set(wanted)
    assert [name for name in wanted if found[name] != wanted[name]] == []


def test_results_have_the_promised_shape(full):
    """Every method on every task, with accuracy and error; seconds per stage; the report."""
    results = results_of(full)
    assert results["config"] == "tiny"
    assert results["seed"] == 1
    assert results["model"]
    assert {"collect", "generator", "adapt", "baselines", "evaluate"} <= set(results["seconds"])
    assert set(results["tasks"]) == set(TASKS)
    for name, task in results["tasks"].items():
        assert task["domain"] == TASKS[name]
        assert task["n_test"] == 12
        assert task["stand_in_for"] is None
        assert 0 < task["chance"] < 1
        assert 0 < task["majority"] <= 1
        assert task["strategy"]["degaml"]["strategy"]["family"]
        assert set(task["methods"]) == METHODS_IN[TASKS[name]]
        for entry in task["methods"].values():
            assert 0 <= entry["acc"] <= 1
            assert entry["se"] >= 0
    assert (full / "report/report.html").stat().st_size > 10_000
    assert (full / "report/report.md").exists()


@pytest.mark.parametrize("domain", ["id", "ood"])
def test_averages_are_means_over_the_tasks_of_a_domain(full, domain):
    results = results_of(full)
    for method in METHODS_IN[domain]:
        accuracies = []
        for name, task in results["tasks"].items():
            if TASKS[name] == domain:
                accuracies.append(task["methods"][method]["acc"])
        mean = sum(accuracies) / len(accuracies)
        assert results["averages"][domain][method]["acc"] == pytest.approx(mean)


@pytest.mark.parametrize(
    "task, method", [("alpha", "generator"), ("delta", "degaml_plus"), ("epsilon", "base")]
)
def test_accuracies_are_those_of_the_score_files(full, task, method):
    """A number in results.json can be recomputed from the stored rows by hand."""
    rows = read_jsonl(full / f"scores/{method}/{task}.jsonl")
    assert len({row["id"] for row in rows}) == 12
    accuracy = sum(row["correct_norm"] for row in rows) / 12
    entry = results_of(full)["tasks"][task]["methods"][method]
    assert entry["acc"] == pytest.approx(accuracy)


def test_several_families_were_chosen(full):
    """The run exercises more than keeping the adapter (or the tests on it would be hollow)."""
    chosen = set()
    for path in full.glob("adapted/degaml*/*/strategy.json"):
        chosen.add(read_json(path)["strategy"]["family"])
    assert len(chosen - {"none"}) >= 2, chosen


def test_test_ids_are_disjoint_from_the_support_set(full):
    """No example scored in the end was a support example."""
    for name, task in read_json(full / "tasks.json").items():
        scored = {row["id"] for row in read_jsonl(full / f"scores/base/{name}.jsonl")}
        assert scored == set(task["test_ids"])
        assert not scored & set(task["support_ids"])


def test_second_invocation_skips_everything(full, words, monkeypatch):
    """The same command again makes nothing, runs no model, and reports the same results."""

    def stamps() -> dict:
        found = {}
        for part in ("adapters", "prompts", "generator", "adapted", "scores"):
            for path in full.glob(f"{part}/**/*.*"):
                found[path] = path.stat().st_mtime_ns
        return found

    def never(*args, **kwargs):
        raise AssertionError("a model ran")

    drop = ("seconds", "command")
    results = stable(results_of(full), drop)
    files = stamps()
    monkeypatch.setattr(scoring, "hidden_states", never)
    began = time.monotonic()
    assert run_command([*words, "stage=all", f"run={full}"]) == 0
    took = time.monotonic() - began
    assert stamps() == files
    assert took < max(5.0, FULL_RUN["seconds"] / 2)
    assert stable(results_of(full), drop) == results


def test_a_rerun_keeps_the_seconds_of_the_work(copy, words):
    """Skipping does not overwrite what the stages cost."""
    file = copy / "stages/adapt.json"
    record = read_json(file)
    assert 0.05 < record["memory_gib"] < 50
    runtime.write_json(file, record | {"memory_gib": 99.0})
    assert run_command([*words, "stage=adapt"]) == 0
    after = read_json(file)
    assert after["seconds"] == results_of(copy)["seconds"]["adapt"] > 0
    assert after["memory_gib"] == 99.0


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
    assert methods.idle_stages(method_ids) == every_stage - needed


def test_one_generator_is_held_at_a_time(full, words):
    """The papers' take 4 GiB of a GPU each."""
    run = Run(full, load_config(words)[0], quiet=True)
    for left_out in ("alpha", "all", "all"):
        assert load_generator(run, left_out).left_out == left_out
        held = [key for key in run.cache if key.startswith("generator/")]
        assert held == [f"generator/{left_out}"]


TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def ranks(*words: str) -> list[str]:
    """The command under torchrun with two ranks."""
    return [*TORCHRUN, "--standalone", "--nproc-per-node=2", "degaml.py", *words]


@contextlib.contextmanager
def running(command: list[str], log: Path, **env):
    """A process that writes to a log; leaving the block kills it without warning."""
    with open(log, "w") as out:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment() | env,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def assert_ends(process, log: Path, status: int = 0) -> None:
    assert process.wait(timeout=200) == status, log.read_text()[-3000:]


def wait_for(pattern: str, folder: Path, process, log: Path) -> None:
    """Until there is such a file."""
    limit = time.monotonic() + 90
    while not next(folder.glob(pattern), None):
        assert process.poll() is None, log.read_text()[-2000:]
        assert time.monotonic() < limit, log.read_text()[-2000:]
        time.sleep(0.001)


def assert_both_worked(folder: Path) -> None:
    text = (folder / "log.txt").read_text()
    assert "[0] " in text
    assert "[1] " in text


def test_two_ranks_give_the_results_of_one(full, words, tmp_path):
    """Ranks change speed only."""
    log = tmp_path / "ranks.log"
    folder = tmp_path / "two"
    with running(ranks(*words, "stage=all", f"run={folder}"), log) as process:
        assert_ends(process, log)
    assert read_json(folder / "env.json")["ranks"] == 2
    assert_same_outcome(folder, full)
    assert_both_worked(folder)


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


def test_killed_in_every_stage(full, words, tmp_path):
    """Killed in each stage in turn, the same command ends as an uninterrupted run does."""
    folder = tmp_path / "killed"
    mine = [*words, "stage=all", f"run={folder}"]
    for stage, trace in BEGUN.items():
        log = tmp_path / f"{stage}.log"
        with running([sys.executable, "degaml.py", *mine], log) as process:
            wait_for(trace, folder, process, log)
        assert process.returncode == -signal.SIGKILL
        assert not (folder / f"stages/{stage}.json").exists(), f"{stage} was over before the kill"
    assert run_command(mine) == 0
    assert_same_outcome(folder, full, INTERRUPTED)


def children_of(pid: int) -> list[int]:
    found = []
    for thread in Path(f"/proc/{pid}/task").iterdir():
        found += [int(child) for child in (thread / "children").read_text().split()]
    return found


def test_a_dead_worker_is_restarted(full, words, tmp_path):
    """torchrun's elastic agent starts the ranks again, and they go on from what is finished."""
    log = tmp_path / "elastic.log"
    folder = tmp_path / "elastic"
    options = ["--standalone", "--nproc-per-node=2", "--max-restarts=2"]
    mine = [*words, "stage=all", f"run={folder}"]

    def starts() -> int:
        return len((folder / "command.txt").read_text().splitlines())

    with running([*TORCHRUN, *options, "degaml.py", *mine], log) as process:
        for i, stage in enumerate(("generator", "adapt")):
            wait_for(BEGUN[stage], folder, process, log)
            while starts() <= i:  # until the ranks are up again
                time.sleep(0.1)
            os.kill(children_of(process.pid)[i], signal.SIGKILL)
        assert_ends(process, log)
    assert starts() == 3
    assert_same_outcome(folder, full, INTERRUPTED)


def test_two_nodes_give_the_results_of_one_process(full, words, tmp_path):
    """The two-node line of docs/many-gpus.md, both agents on this machine, one run folder."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    folder = tmp_path / "two"
    options = ["--nnodes=2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d"]
    meeting = f"--rdzv-endpoint=localhost:{port}"
    mine = [*words, "stage=all", f"run={folder}"]
    command = [*TORCHRUN, *options, meeting, "degaml.py", *mine]
    own_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    logs = [tmp_path / "head.log", tmp_path / "other.log"]
    head_runs = running(command, logs[0], **own_store)
    other_runs = running(command, logs[1], **own_store)
    with head_runs as head, other_runs as other:
        assert_ends(head, logs[0])
        assert_ends(other, logs[1])
    assert_same_outcome(folder, full)
    assert_both_worked(folder)


def assert_ends_by(process, number, status) -> None:
    """Asked again after a while: Python drops an interrupt that falls into a destructor."""
    for _ in range(4):
        process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            assert process.wait(timeout=20) == status
            return
    raise AssertionError("it does not stop")


@pytest.mark.parametrize(
    "number, status", [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)]
)
def test_asked_to_stop_it_goes_at_once(words, tmp_path, number, status):
    """Without a traceback; the generator's last save is there to go on from."""
    log = tmp_path / "stop.log"
    folder = tmp_path / "stopped"
    mine = [*words, "stage=all", f"run={folder}", "generator.steps=100000"]
    with running([sys.executable, "degaml.py", *mine], log) as process:
        wait_for(BEGUN["generator"], folder, process, log)
        assert_ends_by(process, number, status)
    text = log.read_text()
    assert "Traceback" not in text
    assert ("the same command continues" in text) == (number == signal.SIGINT)
    state = load_file(next(folder.glob(BEGUN["generator"])))
    assert int(state["step"]) > 0


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
    path = copy / file
    path.write_bytes(path.read_bytes()[:-64])
    made = {"generator": "generator", "evaluate": "scores"}
    shutil.rmtree(copy / made[stage])
    assert run_command([*words, f"stage={stage}"]) == 2
    error = capsys.readouterr().err
    assert str(path) in error
    assert "delete" in error
    assert "Traceback" not in error


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
        ("report", "report", "report/figures/*.png"),
    ],
)
def test_a_disk_that_fills_up(copy, full, words, capsys, stage, gone, file):
    """Where a file of this kind finds no room, status 2 and a line that says so.

    Here none may grow to its size. The same command with room gives what an undisturbed run gave.
    """
    for pattern in gone.split():
        for folder in copy.glob(pattern):
            shutil.rmtree(folder)
    for grows in ("log.txt", "metrics.jsonl", "command.txt"):
        (copy / grows).unlink()
    size = next(full.glob(file)).stat().st_size
    with file_size_limit(size // 2):
        assert run_command([*words, f"stage={stage}"]) == 2
    error = capsys.readouterr().err
    assert "free space" in error
    assert "the same command continues" in error
    assert "Traceback" not in error

    assert run_command([*words, f"stage={stage}"]) == 0
    assert run_command([*words, "stage=report"]) == 0
    assert_same_outcome(copy, full, INTERRUPTED)


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
    """A finished unit made under another value is never mixed with the new one."""
    files = weights_of(copy)
    assert run_command([*words, "stage=all", word]) == 2
    error = capsys.readouterr().err
    assert word.split("=")[0] in error
    assert "overwrite=true" in error
    assert weights_of(copy) == files


def test_a_refused_command_does_not_describe_the_folder(copy, words):
    """config.yaml says how the contents were made; a refused command made none of them."""
    file = copy / "config.yaml"
    before = file.read_text()
    assert run_command([*words, "stage=all", "seed=2"]) == 2
    assert file.read_text() == before
    assert "\nseed: 1\n" in before


def test_other_number_of_prompt_batches_is_not_ignored(copy, words, capsys):
    """`generator` scores average over so many batches: they are made again, or it is refused."""
    file = copy / "scores/generator/delta.jsonl"
    stamp = file.stat().st_mtime_ns
    if run_command([*words, "stage=evaluate", "evaluate.prompt_batches=1"]) == 2:
        assert "evaluate.prompt_batches" in capsys.readouterr().err
    else:
        assert file.stat().st_mtime_ns != stamp


def test_overwrite_redoes_what_changed(copy, words, tmp_path):
    """overwrite=true: the results are a fresh adaptation's under the new configuration."""
    change = [
        "data.targets=[delta]",
        "evaluate.methods=[base, degaml, degaml_plus]",
        "overwrite=true",
        "strategies.ttl_threshold=0",
        "policy.folds=4",
    ]
    fresh = tmp_path / "fresh"
    made_later = shutil.ignore_patterns("adapted", "scores", "stages")
    shutil.copytree(copy, fresh, ignore=made_later)
    for folder in (copy, fresh):
        for stage in ("adapt", "evaluate"):
            assert run_command([*words, *change, f"stage={stage}", f"run={folder}"]) == 0

    def outcome(folder: Path, method: str) -> tuple:
        adapted = folder / f"adapted/{method}/delta"
        return (
            stable(read_jsonl(adapted / "episodes.jsonl"), ("seconds",)),
            read_json(adapted / "strategy.json"),
            read_jsonl(folder / f"scores/{method}/delta.jsonl"),
        )

    for method in ("degaml", "degaml_plus"):
        assert outcome(copy, method) == outcome(fresh, method)


def test_unknown_stage_is_a_users_mistake(words, capsys):
    """Status 2 and the legal names."""
    assert run_command([*words, "stage=adpat"]) == 2
    error = capsys.readouterr().err
    for name in ("adpat", "adapt", "evaluate"):
        assert name in error


def test_second_generator_seed(copy, words):
    """generator.seed alone: checkpoints are kept, generators and generated adapters differ."""
    before = weights_of(copy)
    for part in ("generator", "adapted", "scores"):
        shutil.rmtree(copy / part)
    less = ["generator.seed=2", "data.targets=[alpha, delta]", "evaluate.methods=[degaml]"]
    for stage in ("collect", "generator", "adapt"):
        assert run_command([*words, *less, f"stage={stage}"]) == 0
    after = weights_of(copy)
    for method in ("degaml", "generator"):
        for task in ("alpha", "delta"):
            assert f"adapted/{method}/{task}/adapter_model.safetensors" in after
    for key in after:
        assert (before[key] == after[key]) == key.startswith("adapters/"), key


def test_runs_of_several_seeds_are_pooled(words, tmp_path, capsys):
    """Each seed in a folder of its own, with its own splits and generator; one report pools."""
    words = [*words, "data.targets=[delta]", "evaluate.methods=[base, generator]"]
    folders = [tmp_path / "seed1", tmp_path / "seed2"]
    for seed, folder in enumerate(folders, 1):
        mine = ["stage=all", f"run={folder}", f"seed={seed}", f"generator.seed={seed}"]
        assert run_command([*words, *mine]) == 0
    first, second = folders
    pooling = ["stage=report", f"run={first}", "seed=1", f"report.seed_runs=[{second}]"]
    assert run_command([*words, *pooling]) == 0
    assert "pooled over seeds 1, 2" in capsys.readouterr().out
    assert "seeds" not in results_of(second)

    pooled = results_of(first)["seeds"]
    assert [row["seed"] for row in pooled["runs"]] == [1, 2]
    values = [results_of(f)["averages"]["ood"]["generator"]["acc"] for f in folders]
    assert pooled["pooled"]["averages"]["ood"]["generator"]["by_seed"]["acc"] == values
    splits = [read_json(folder / "tasks.json")["delta"]["test_ids"] for folder in folders]
    assert splits[0] != splits[1]


@pytest.mark.parametrize("task", ["beta", "delta"])
def test_adapted_folder_loads_elsewhere(full, words, tiny_model_dir, task):
    """The adapted folder is a complete adapter: every weight arrives, the logits agree."""
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
    assert not [w for w in caught if "key" in str(w.message).lower()]

    stored = load_file(folder / "adapter_model.safetensors")
    loaded = get_peft_model_state_dict(model)
    assert set(stored) == set(loaded)
    assert all(torch.equal(stored[key], loaded[key]) for key in stored)
    assert any(stored[key].any() for key in stored if "lora_B" in key)

    run = Run(full, load_config(words)[0], quiet=True)
    lm = scoring.load_lm(run)
    lora.swap_adapter(lm.model, lm.layout, lora.load_adapter(folder, lm.layout))
    with torch.no_grad():
        ours = lm.model(ids).logits
        theirs = model(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (theirs - bare).abs().max() > 1e-3
