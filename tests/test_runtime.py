"""The run folder: whole writes, DONE records, the lock, seeds, and what the user reads when a disk or a
file fails."""

import errno
import json
import os
import resource
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.distributed import HashStore

import degaml
import runtime
from config import UserError, flatten, load_config
from runtime import (
    DEPENDS,
    Run,
    fingerprint,
    load_tensors,
    open_run,
    read_json,
    read_jsonl,
    rng_for,
    save_tensors,
    seed_for,
    sha256,
    write_json,
    write_jsonl,
    write_text,
)


def make_run(tmp_path, *words) -> Run:
    return Run(tmp_path, load_config([f"run={tmp_path}", *words])[0], quiet=True)


@pytest.mark.parametrize(
    "failure", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")]
)
def test_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch, failure):
    """An interruption before the rename leaves text and tensor files as they were; afterwards writing
    works again."""
    text, tensors = tmp_path / "a.json", tmp_path / "a.safetensors"
    write_json(text, {"v": 1})
    save_tensors(tensors, {"x": torch.ones(3)})

    def fail(*_):
        raise failure

    with monkeypatch.context() as m:
        m.setattr(runtime.os, "replace", fail)
        for write in (
            lambda: write_json(text, {"v": 2}),
            lambda: save_tensors(tensors, {"x": torch.zeros(3)}),
        ):
            with pytest.raises(type(failure)):
                write()
    assert read_json(text) == {"v": 1} and torch.equal(load_tensors(tensors)["x"], torch.ones(3))
    write_json(text, {"v": 2})
    assert read_json(text) == {"v": 2}


def test_file_system_error_while_saving_tensors_is_an_oserror(tmp_path):
    """A disk that takes no more bytes (here: a file size limit) raises OSError, which the command explains;
    the old file stays."""
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"x": torch.ones(3)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(OSError, match="File too large") as e:
            save_tensors(path, {"x": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert e.value.errno == errno.EFBIG
    assert torch.equal(load_tensors(path)["x"], torch.ones(3))


def test_full_disk_ends_with_a_message(tmp_path, tiny_args, monkeypatch, capsys):
    """ENOSPC in a stage: status 2, one error line that says what to do, no traceback, old files intact."""
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "run/config.yaml", "old: true\n")

    def full(src, dst):
        raise OSError(errno.ENOSPC, "No space left on device", str(dst))

    monkeypatch.setattr(runtime.os, "replace", full)
    assert degaml.main(["stage=collect", *tiny_args]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and "No space left on device" in err and "free space" in err
    assert "Traceback" not in err and (tmp_path / "run/config.yaml").read_text() == "old: true\n"


def test_other_system_errors_are_not_hidden(tmp_path, tiny_args, monkeypatch):
    """Only errors a user can mend are shortened; a programming error keeps its traceback."""

    def wrong(run):
        raise FileNotFoundError(errno.ENOENT, "No such file", "x")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(degaml.STAGES, "collect", wrong)
    with pytest.raises(FileNotFoundError):
        degaml.main(["stage=collect", *tiny_args])


def test_unit_is_finished_only_under_its_configuration(tmp_path):
    """No record: not finished. Same configuration: finished. A changed key is refused by name, both
    values shown."""
    run = make_run(tmp_path)
    (tmp_path / "adapters/arc_e").mkdir(parents=True)
    assert not run.finished("adapters/arc_e", "collect")
    run.finish("adapters/arc_e", "collect", 0.0, note=3)
    done = read_json(tmp_path / "adapters/arc_e/DONE.json")
    assert done["stage"] == "collect" and done["note"] == 3 and done["seconds"] > 0
    assert run.finished("adapters/arc_e", "collect")
    with pytest.raises(UserError) as e:
        make_run(tmp_path, "collect.pretrain_lr=2e-4").finished("adapters/arc_e", "collect")
    assert "(collect.pretrain_lr: 0.0001 -> 0.0002)" in str(e.value) and "overwrite=true" in str(
        e.value
    )


def test_overwrite_removes_the_old_unit(tmp_path):
    """overwrite=true deletes a unit made differently, and keeps one made alike."""
    run = make_run(tmp_path)
    (tmp_path / "u").mkdir()
    (tmp_path / "u/old.txt").write_text("x")
    run.finish("u", "collect", 0.0)
    assert (
        make_run(tmp_path, "overwrite=true").finished("u", "collect")
        and (tmp_path / "u/old.txt").exists()
    )
    assert not make_run(tmp_path, "overwrite=true", "seed=1").finished("u", "collect")
    assert not (tmp_path / "u").exists()


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
    ],
)
def test_keys_that_change_an_output_change_its_fingerprint(tmp_path, stage, word):
    """A key that changes what a stage writes is part of the stage's record."""
    assert fingerprint(make_run(tmp_path, word).cfg, stage) != fingerprint(
        make_run(tmp_path).cfg, stage
    )


@pytest.mark.parametrize(
    "method, word, others",
    [
        ("maml", "baselines.maml.outer_lr=1e-3", ("degaml", "no_meta", "tempo")),
        (
            "no_meta",
            "baselines.sft=[{sft_steps: 1, learning_rate: 1e-3, batch_size: 1, loss: lm}]",
            ("degaml", "aligned"),
        ),
        ("tempo", "align.latent=7", ("degaml", "maml")),
        ("aligned", "align.kl_weight=0", ("generator", "abmll")),
    ],
)
def test_a_method_depends_on_its_own_section(tmp_path, method, word, others):
    """A baseline's or the alignment's settings make their own units stale and no other method's."""
    plain, changed = make_run(tmp_path).cfg, make_run(tmp_path, word).cfg
    for stage in ("adapt", "evaluate"):
        assert fingerprint(plain, stage, method) != fingerprint(changed, stage, method)
        for other in others:
            assert fingerprint(plain, stage, other) == fingerprint(changed, stage, other)


@pytest.mark.parametrize("stage", sorted(set(DEPENDS) - {"evaluate"}))
def test_another_part_of_the_test_split_makes_nothing_else_stale(tmp_path, stage):
    """Only scores depend on which test examples are scored: adapters are kept."""
    assert fingerprint(make_run(tmp_path, "data.skip_test=5").cfg, stage) == fingerprint(
        make_run(tmp_path).cfg, stage
    )


@pytest.mark.parametrize("stage", DEPENDS)
def test_keys_that_change_no_output_leave_the_fingerprint(tmp_path, stage):
    """Names, folders and the choice of targets and methods do not make finished work stale; a record
    survives JSON."""
    words = [
        "data.targets=[arc_e]",
        "evaluate.methods=[base]",
        "name=x",
        "run=elsewhere",
        "device=cpu",
        "generator.save_every=7",
        "data.jsonl={arc_e: x.jsonl}",
        "strategies.proposal_grid={LORA.lambda: [0.5]}",
    ]
    a = fingerprint(make_run(tmp_path, *words).cfg, stage)
    assert a == fingerprint(make_run(tmp_path, *words[-2:]).cfg, stage) == json.loads(json.dumps(a))


def test_dependencies_name_existing_keys(tmp_path):
    """A misspelt dependency would silently depend on nothing."""
    keys = list(flatten(make_run(tmp_path).cfg.model_dump()))
    for wanted in (
        *(d for v in (*DEPENDS.values(), *runtime.METHOD_DEPENDS.values()) for d in v),
        *runtime._CHOICES,
    ):
        assert any(k == wanted or k.startswith(wanted + ".") for k in keys), wanted


def test_jsonl_torn_last_line_is_dropped(tmp_path):
    """A last line cut by a kill is dropped; damage anywhere else is an error that names the line."""
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [{"i": i} for i in range(3)])
    whole = path.read_text()
    path.write_text(whole + '{"i": 3, "te')
    assert read_jsonl(path) == [{"i": 0}, {"i": 1}, {"i": 2}]
    path.write_text(whole.replace('{"i": 1}', '{"i": '))
    with pytest.raises(UserError, match=r"a\.jsonl:2: damaged"):
        read_jsonl(path)


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
    write_jsonl(tmp_path / "a.jsonl", [{"t": text}, {"t": 1}])
    assert read_jsonl(tmp_path / "a.jsonl") == [{"t": text}, {"t": 1}]


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-7], lambda b: b[:5], lambda b: b"", lambda b: b"\xff" * len(b)]
)
def test_corrupt_tensor_file_is_named(tmp_path, damage):
    """A truncated or overwritten safetensors file gives a UserError with its path and the way out."""
    path = tmp_path / "w.safetensors"
    save_tensors(path, {"x": torch.arange(9.0)})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match="run the same command again") as e:
        load_tensors(path)
    assert str(path) in str(e.value)


def test_missing_and_damaged_files_are_named(tmp_path):
    """Missing tensors, missing JSON and damaged JSON each name the file."""
    (tmp_path / "bad.json").write_text('{"a": ')
    for call, text in (
        (lambda: load_tensors(tmp_path / "no.safetensors"), "no.safetensors: no such file"),
        (lambda: read_json(tmp_path / "no.json"), "no.json: no such file"),
        (lambda: read_json(tmp_path / "bad.json"), "bad.json: damaged JSON"),
    ):
        with pytest.raises(UserError, match=text):
            call()


def test_tensors_round_trip_bit_for_bit(tmp_path):
    """Also views and scalars survive; two saves give the same bytes."""
    x = {"a": torch.randn(4, 6).t(), "s": torch.tensor(3), "h": torch.randn(5).bfloat16()}
    save_tensors(tmp_path / "a", x)
    save_tensors(tmp_path / "b", x)
    got = load_tensors(tmp_path / "a")
    assert set(got) == set(x) and all(
        torch.equal(got[k], x[k]) and got[k].dtype == x[k].dtype for k in x
    )
    assert sha256(tmp_path / "a") == sha256(tmp_path / "b")


def test_second_process_in_the_folder_is_refused(tmp_path, tiny_args, monkeypatch, capsys):
    """While another process holds the run folder the command ends with status 2; afterwards it starts."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); "
            "print('held', flush=True); sys.stdin.read()",
            str(tmp_path / "run/.lock"),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        assert degaml.main(["stage=config", *tiny_args]) == 2
        assert "another process is working in this folder" in capsys.readouterr().err
    finally:
        holder.communicate()
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
    cfg, _ = load_config([*tiny_args, "device=cuda"])
    with pytest.raises(UserError, match="device=cuda: not available here; legal: .*cpu"):
        open_run(cfg, "config", [])


def test_run_folder_holds_its_provenance(tmp_path, tiny_args):
    """The stored configuration loads back to the same one; the command and the versions are kept, no
    host name is."""
    cfg, _ = load_config(tiny_args)
    run = open_run(cfg, "collect", ["stage=collect", "seed=1"])
    assert load_config([f"config={run.path / 'config.yaml'}"])[0] == cfg
    assert (run.path / "command.txt").read_text() == "python degaml.py stage=collect seed=1\n"
    env = read_json(run.path / "env.json")
    assert (
        env["torch"] == torch.__version__ and env["device"] == "cpu" and env["dtype"] == "float32"
    )
    assert os.uname().nodename not in json.dumps(env) or len(os.uname().nodename) < 4
    assert "stage collect" in (run.path / "log.txt").read_text()


def test_seeds_are_stable():
    """Golden values: the same on every machine and in every later version."""
    assert seed_for(999, "split", "arc_e") == 6320981990255165257
    assert seed_for("a", "bc") != seed_for("ab", "c") and seed_for(1) == seed_for("1") < 2**63
    assert rng_for(999, "split", "arc_e").permutation(5).tolist() == [2, 3, 4, 1, 0]
    assert np.array_equal(rng_for(3, "x").random(4), rng_for(3, "x").random(4))


def test_ranks_share_the_units():
    """Two ranks that draw from one counter do each unit exactly once, in order; one rank alone does all."""
    cfg, units = load_config([])[0], list("abcdefg")
    store = HashStore()
    runs = [Run(None, cfg, rank, store=store) for rank in (0, 1)]
    for _ in range(2):  # a second deal starts its own count
        first, second = (r.deal(units) for r in runs)
        taken = [[next(first)], [next(second)]]
        taken[0] += list(first)
        taken[1] += list(second)
        assert taken == [["a", *"cdefg"], ["b"]]
    assert list(Run(None, cfg).deal(units)) == units


def test_metrics_are_appended_as_whole_lines(tmp_path):
    """Two runs on one folder add rows, never tear or replace them."""
    for i in range(2):
        make_run(tmp_path).metric(stage="collect", step=i, loss=0.5)
    assert [r["step"] for r in read_jsonl(tmp_path / "metrics.jsonl")] == [0, 1]


def test_track_yields_every_item(tmp_path):
    """Progress changes nothing about what is iterated."""
    run = make_run(tmp_path)
    assert list(run.track(range(5), "x")) == list(range(5))
