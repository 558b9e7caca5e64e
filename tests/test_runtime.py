"""The run folder: whole writes, DONE records, the lock, seeds, and what the user reads when a disk
or a file fails."""

import errno
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import file_size_limit, run_command
from torch.distributed import HashStore

import config
import degaml
import runtime
from config import UserError
from runtime import DEPENDS, Run, fingerprint, read_json, seed_for, write_json


def make_run(tmp_path, *words) -> Run:
    cfg, _ = config.load_config([f"run={tmp_path}", *words])
    return Run(tmp_path, cfg, quiet=True)


def full_disk(source, target):
    """In place of os.replace."""
    raise OSError(errno.ENOSPC, "No space left on device", str(target))


def interrupted(source, target):
    raise KeyboardInterrupt


@pytest.mark.parametrize("fail, error", [(interrupted, KeyboardInterrupt), (full_disk, OSError)])
def test_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch, fail, error):
    """An interruption before the rename leaves files as they were; afterwards writing works."""
    text = tmp_path / "a.json"
    tensors = tmp_path / "a.safetensors"
    write_json(text, {"v": 1})
    runtime.save_tensors(tensors, {"x": torch.ones(3)})

    with monkeypatch.context() as patch:
        patch.setattr(runtime.os, "replace", fail)
        with pytest.raises(error):
            write_json(text, {"v": 2})
        with pytest.raises(error):
            runtime.save_tensors(tensors, {"x": torch.zeros(3)})
    assert read_json(text) == {"v": 1}
    assert torch.equal(runtime.load_tensors(tensors)["x"], torch.ones(3))

    write_json(text, {"v": 2})
    assert read_json(text) == {"v": 2}


def test_file_system_error_while_saving_tensors_is_an_oserror(tmp_path):
    """A disk that takes no more bytes raises OSError, which the command explains."""
    path = tmp_path / "a.safetensors"
    runtime.save_tensors(path, {"x": torch.ones(3)})
    with file_size_limit(200_000), pytest.raises(OSError, match="File too large") as caught:
        runtime.save_tensors(path, {"x": torch.zeros(100_000)})
    assert caught.value.errno == errno.EFBIG
    assert torch.equal(runtime.load_tensors(path)["x"], torch.ones(3))  # the old file stays


def test_full_disk_ends_with_a_message(tmp_path, tiny_args, monkeypatch, capsys):
    """In a stage: status 2, one error line that says what to do, and the old files intact."""
    monkeypatch.chdir(tmp_path)
    old = tmp_path / "run/config.yaml"
    runtime.write_text(old, "old: true\n")
    monkeypatch.setattr(runtime.os, "replace", full_disk)
    assert degaml.main(["stage=collect", *tiny_args]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "No space left on device" in error
    assert "free space" in error
    assert "Traceback" not in error
    assert old.read_text() == "old: true\n"


def test_other_system_errors_are_not_hidden(tmp_path, tiny_args, monkeypatch):
    """Only errors a user can mend are shortened; a programming error keeps its traceback."""

    def wrong(run):
        raise FileNotFoundError(errno.ENOENT, "No such file", "x")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(degaml.STAGES, "collect", wrong)
    with pytest.raises(FileNotFoundError):
        degaml.main(["stage=collect", *tiny_args])


def test_unit_is_finished_only_under_its_configuration(tmp_path):
    """A changed key is refused by name, with both values."""
    run = make_run(tmp_path)
    unit = "adapters/arc_e"
    (tmp_path / unit).mkdir(parents=True)
    assert not run.finished(unit, "collect")

    run.finish(unit, "collect", 0.0, note=3)
    done = read_json(tmp_path / unit / "DONE.json")
    assert done["stage"] == "collect"
    assert done["note"] == 3
    assert done["seconds"] > 0
    assert run.finished(unit, "collect")

    changed = make_run(tmp_path, "collect.pretrain_lr=2e-4")
    with pytest.raises(UserError, match="overwrite=true") as caught:
        changed.finished(unit, "collect")
    assert "(collect.pretrain_lr: 0.0001 -> 0.0002)" in str(caught.value)


def test_overwrite_removes_the_old_unit(tmp_path):
    """overwrite=true deletes a unit made differently, and keeps one made alike."""
    old = tmp_path / "u/old.txt"
    runtime.write_text(old, "x")
    make_run(tmp_path).finish("u", "collect", 0.0)
    assert make_run(tmp_path, "overwrite=true").finished("u", "collect")
    assert old.exists()
    assert not make_run(tmp_path, "overwrite=true", "seed=1").finished("u", "collect")
    assert not old.parent.exists()


def prints(tmp_path, stage, *words, method="") -> dict:
    return fingerprint(make_run(tmp_path, *words).cfg, stage, method)


@pytest.mark.parametrize(
    "stage, word",
    [
        ("collect", "seed=1"),
        ("collect", "data.num_train=10"),
        ("collect", "model.rank=4"),
        ("prompts", "data.prompts_from=test"),
        ("generator", "generator.lr=1e-4"),
        ("generator", "collect.warmup_steps=2"),
        ("policy", "policy.epochs=1"),
        ("adapt", "strategies.mix=magdir"),
        ("adapt", "evaluate.metric=raw"),
        ("evaluate", "evaluate.max_new_tokens=3"),
        ("evaluate", "evaluate.prompt_batches=7"),
        ("evaluate", "data.jsonl={arc_e: x.jsonl}"),
        ("evaluate", "data.skip_test=5"),
        ("study", "data.skip_test=5"),
        ("study", "study.around_steps=6"),
        ("study", "study.further_tasks=[anatomy]"),
    ],
)
def test_keys_that_change_an_output_change_its_fingerprint(tmp_path, stage, word):
    """A key that changes what a stage writes is part of the stage's record."""
    assert prints(tmp_path, stage, word) != prints(tmp_path, stage)


SFT = "baselines.sft=[{sft_steps: 1, learning_rate: 1e-3, batch_size: 1, loss: lm}]"


@pytest.mark.parametrize(
    "method, word, others",
    [
        ("maml", "baselines.maml.outer_lr=1e-3", ("degaml", "no_meta", "tempo")),
        ("no_meta", SFT, ("degaml", "aligned")),
        ("tempo", "align.latent=7", ("degaml", "maml")),
        ("aligned", "align.kl_weight=0", ("generator", "abmll")),
    ],
)
@pytest.mark.parametrize("stage", ["adapt", "evaluate"])
def test_a_method_depends_on_its_own_section(tmp_path, stage, method, word, others):
    """A baseline's or the alignment's settings make their own units stale and no others."""

    def changes(method):
        changed = prints(tmp_path, stage, word, method=method)
        return changed != prints(tmp_path, stage, method=method)

    assert changes(method)
    assert not any(changes(other) for other in others)


@pytest.mark.parametrize("stage", sorted(set(DEPENDS) - {"evaluate", "study"}))
def test_another_part_of_the_test_split_makes_nothing_else_stale(tmp_path, stage):
    """Only scores depend on which test examples are scored: adapters are kept."""
    assert prints(tmp_path, stage, "data.skip_test=5") == prints(tmp_path, stage)


@pytest.mark.parametrize("stage", DEPENDS)
def test_keys_that_change_no_output_leave_the_fingerprint(tmp_path, stage):
    """Names, folders, targets and methods make nothing stale; a record survives JSON."""
    both = ["data.jsonl={arc_e: x.jsonl}", "strategies.proposal_grid={LORA.lambda: [0.5]}"]
    words = [
        "data.targets=[arc_e]",
        "evaluate.methods=[base]",
        "name=x",
        "run=elsewhere",
        "device=cpu",
        "generator.save_every=7",
    ]
    found = prints(tmp_path, stage, *words, *both)
    assert found == prints(tmp_path, stage, *both)
    assert found == json.loads(json.dumps(found))


def test_dependencies_name_existing_keys(tmp_path):
    """A misspelt dependency would silently depend on nothing."""
    keys = list(config.flatten(make_run(tmp_path).cfg.model_dump()))
    named = list(runtime._CHOICES)
    for names in (*DEPENDS.values(), *runtime.METHOD_DEPENDS.values()):
        named += names
    for name in named:
        assert any(key == name or key.startswith(name + ".") for key in keys), name


def test_jsonl_torn_last_line_is_dropped(tmp_path):
    """A last line cut by a kill is dropped; damage anywhere else is an error with its line."""
    path = tmp_path / "a.jsonl"
    rows = [{"i": i} for i in range(3)]
    runtime.write_jsonl(path, rows)
    whole = path.read_text()
    path.write_text(whole + '{"i": 3, "te')
    assert runtime.read_jsonl(path) == rows
    path.write_text(whole.replace('{"i": 1}', '{"i": '))
    with pytest.raises(UserError, match=r"a\.jsonl:2: damaged"):
        runtime.read_jsonl(path)


@pytest.mark.parametrize(
    "text",
    [
        "plain",
        "é 雪 \U0001f600",
        "line\nbreak\r\ttab",
        'quo"te\\',
        "a\u2028b\u2029c",
        "a\x85b\x1cc\x0bd",
    ],
)
def test_jsonl_round_trip_of_any_text(tmp_path, text):
    """What is written is read back, whatever characters a question or an answer holds."""
    rows = [{"t": text}, {"t": 1}]
    runtime.write_jsonl(tmp_path / "a.jsonl", rows)
    assert runtime.read_jsonl(tmp_path / "a.jsonl") == rows


@pytest.mark.parametrize("keep", [slice(-7), slice(5), slice(0), None])
def test_corrupt_tensor_file_is_named(tmp_path, keep):
    """A truncated or overwritten safetensors file: its path and the way out."""
    path = tmp_path / "w.safetensors"
    runtime.save_tensors(path, {"x": torch.arange(9.0)})
    whole = path.read_bytes()
    path.write_bytes(whole[keep] if keep else b"\xff" * len(whole))
    with pytest.raises(UserError, match="run the same command again") as caught:
        runtime.load_tensors(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "read, text",
    [
        (runtime.load_tensors, "no.safetensors: no such file"),
        (read_json, "no.json: no such file"),
        (read_json, "bad.json: damaged JSON"),
    ],
)
def test_missing_and_damaged_files_are_named(tmp_path, read, text):
    (tmp_path / "bad.json").write_text('{"a": ')
    name, _, _ = text.partition(":")
    with pytest.raises(UserError, match=text):
        read(tmp_path / name)


def test_tensors_round_trip_bit_for_bit(tmp_path):
    """Also views and scalars survive; two saves give the same bytes."""
    tensors = {
        "view": torch.randn(4, 6).t(),
        "scalar": torch.tensor(3),
        "half": torch.randn(5).bfloat16(),
    }
    runtime.save_tensors(tmp_path / "a", tensors)
    runtime.save_tensors(tmp_path / "b", tensors)
    found = runtime.load_tensors(tmp_path / "a")
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert runtime.sha256(tmp_path / "a") == runtime.sha256(tmp_path / "b")


HOLD = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_second_process_in_the_folder_is_refused(tmp_path, tiny_args, monkeypatch, capsys):
    """While another process holds the run folder the status is 2; afterwards the command starts."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run/.lock")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as holder:  # ends with its input
        assert holder.stdout.readline() == b"held\n"
        assert degaml.main(["stage=config", *tiny_args]) == 2
        error = capsys.readouterr().err
        assert f"{tmp_path / 'run'}: another process is working in this folder" in error
    assert degaml.main(["stage=config", *tiny_args]) == 0


def test_folder_that_cannot_be_made(tmp_path, tiny_args, monkeypatch, capsys):
    """A run folder below a file is refused with the reason."""
    (tmp_path / "file").write_text("x")
    monkeypatch.chdir(tmp_path)
    assert degaml.main([*tiny_args, f"run={tmp_path / 'file/run'}"]) == 2
    assert "cannot write there" in capsys.readouterr().err


def test_device_that_is_not_there(monkeypatch, tiny_args):
    """An absent device is refused with those that are there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cfg, _ = config.load_config([*tiny_args, "device=cuda"])
    with pytest.raises(UserError, match="device=cuda: not available here; legal: .*cpu"):
        runtime.open_run(cfg, "config", [])


def test_run_folder_holds_its_provenance(tmp_path, tiny_args):
    """The configuration loads back; command and versions are kept, and no host name is."""
    cfg, _ = config.load_config(tiny_args)
    run = runtime.open_run(cfg, "collect", ["stage=collect", "seed=1"])
    assert config.load_config([f"config={run.path / 'config.yaml'}"])[0] == cfg
    assert (run.path / "command.txt").read_text() == "python degaml.py stage=collect seed=1\n"
    assert "stage collect" in (run.path / "log.txt").read_text()

    env = read_json(run.path / "env.json")
    assert env["torch"] == torch.__version__
    assert env["device"] == "cpu"
    assert env["dtype"] == "float32"
    host = os.uname().nodename
    assert host not in json.dumps(env) or len(host) < 4


def test_seeds_are_stable():
    """Golden values: the same on every machine and in every later version."""
    assert seed_for(999, "split", "arc_e") == 6320981990255165257
    assert seed_for("a", "bc") != seed_for("ab", "c")
    assert seed_for(1) == seed_for("1") < 2**63
    assert runtime.rng_for(999, "split", "arc_e").permutation(5).tolist() == [2, 3, 4, 1, 0]
    drawn = [runtime.rng_for(3, "x").random(4) for _ in range(2)]
    assert np.array_equal(*drawn)


def test_ranks_share_the_units():
    """Two ranks that draw from one counter do each unit once, in order; one alone does all."""
    cfg, _ = config.load_config([])
    units = list("abcdefg")
    store = HashStore()
    runs = [Run(None, cfg, rank, store=store) for rank in (0, 1)]
    for _ in range(2):  # a second deal starts its own count
        first = runs[0].deal(units)
        second = runs[1].deal(units)
        assert next(first) == "a"
        assert next(second) == "b"
        assert list(first) == list("cdefg")
        assert list(second) == []
    assert list(Run(None, cfg).deal(units)) == units


def test_metrics_are_appended_as_whole_lines(tmp_path):
    """Two runs on one folder add rows, never tear or replace them."""
    for step in range(2):
        make_run(tmp_path).metric(stage="collect", step=step, loss=0.5)
    rows = runtime.read_jsonl(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1]


def test_track_yields_every_item(tmp_path):
    """Progress changes nothing about what is iterated."""
    assert list(make_run(tmp_path).track(range(5), "x")) == list(range(5))


AMX = {"float32": 200.0, "bfloat16": 426.0, "float16": 90.0}
NO_AMX = {"float32": 157.0, "bfloat16": 84.0, "float16": 155.0}


@pytest.mark.parametrize("rates, want", [(AMX, "bfloat16"), (NO_AMX, "float32")])
def test_dtype_is_chosen_by_what_the_machine_does(tiny_args, monkeypatch, rates, want):
    """A Xeon with avx512_bf16 and without AMX multiplies bfloat16 at half of float32's rate."""
    cfg, _ = config.load_config(tiny_args)
    monkeypatch.setattr(runtime, "measure_rates", lambda names, *_: {n: rates[n] for n in names})
    assert runtime.choose_dtype(cfg, "cpu") == {"dtype": want, "gflops": rates}


def test_a_card_without_bfloat16_computes_in_float32(tiny_args, monkeypatch):
    """A T4 emulates it: PyTorch says so when it is asked for the hardware's own."""
    cfg, _ = config.load_config(tiny_args)
    asked = []
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: asked.append(1)
    )
    monkeypatch.setattr(runtime, "measure_rates", lambda names, *_: {n: AMX[n] for n in names})
    found = runtime.choose_dtype(cfg, "cuda")
    assert asked == [1]
    assert found["dtype"] == "float32"
    assert "bfloat16" not in found["gflops"]


def test_rates_are_measured():
    """Of products that are computed: finite, positive, and all three."""
    rates = runtime.measure_rates(["float32", "float16", "bfloat16"], "cpu", 64, 128)
    assert set(rates) == {"float32", "float16", "bfloat16"}
    assert min(rates.values()) > 0


def test_a_slow_dtype_does_not_hide_a_fast_one(monkeypatch):
    """A CPU without bf16 products needs a second for one of them; float32 is measured in full."""
    asked = []

    def seconds(weight, tokens):
        asked.append((weight.dtype, tokens))
        return tokens * 1e-6 if weight.dtype == torch.float32 else tokens * 1e-2

    monkeypatch.setattr(runtime, "_time_product", seconds)
    rates = runtime.measure_rates(["bfloat16", "float32"], "cpu", 576, 1536)
    assert rates == {"bfloat16": 0.2, "float32": 1769.5}
    # one product was enough to see that it is slow
    assert max(tokens for dtype, tokens in asked if dtype == torch.bfloat16) == 16
    assert (torch.float32, 128) in asked


def test_a_run_folder_keeps_its_dtype(tiny_args, monkeypatch, capsys):
    """Another machine, or a busy one, continues in what the folder began with."""
    words = [*tiny_args, "dtype=auto", "stage=collect"]
    choice = {"dtype": "bfloat16", "gflops": AMX}
    monkeypatch.setattr(runtime, "choose_dtype", lambda cfg, device: choice)
    assert run_command(words) == 0
    assert "dtype auto: bfloat16 | measured GFLOP/s: float32 200" in capsys.readouterr().out

    choice = {"dtype": "float32", "gflops": NO_AMX}
    assert run_command(words) == 0
    said = capsys.readouterr().out
    assert "dtype auto: bfloat16" in said
    assert "as when this run folder began" in said


def test_processors_of_one_name_are_told_apart(monkeypatch):
    """A cloud calls Zen 4 and Zen 5 alike; recorded times are compared within one kind only."""
    text = "model name\t: AMD EPYC\ncpu family\t: {}\nmodel\t\t: {}\n\nprocessor\t: 1\n"
    names = []
    for family, model in ((25, 17), (26, 2)):
        monkeypatch.setattr(
            runtime.Path, "read_text", lambda path, f=family, m=model: text.format(f, m)
        )
        names.append(runtime._cpu_name())
    assert names == ["AMD EPYC family 25 model 17", "AMD EPYC family 26 model 2"]
    monkeypatch.setattr(runtime.Path, "read_text", lambda path: "processor: 0\n")
    assert runtime._cpu_name() == ""
