"""LoRA trajectories of the training tasks, on tiny models."""

import re
from pathlib import Path

import pytest
from conftest import make_run

import proof
import scoring
from collect import collect_adapters, load_checkpoints
from config import UserError
from generator import train_generators
from lora import adapter_hash, load_adapter
from runtime import read_json, sha256
from scoring import load_lm


def test_tasks_share_one_initialisation(collected):
    """Every task starts from the same A, and the last `save_last` steps are kept."""
    run = make_run(collected)
    manifests = [
        read_json(run.path / f"adapters/{t}/manifest.json") for t in run.cfg.data.train_tasks
    ]
    assert len({m["init_sha"] for m in manifests}) == 1
    for m in manifests:
        assert sorted(m["sha256"]) == [f"step_000{i}.safetensors" for i in (7, 8, 9)]
        assert m["losses"][-1] < m["losses"][0]
        for name, digest in m["sha256"].items():
            assert sha256(run.path / f"adapters/{m['task']}/{name}") == digest


def test_checkpoints_of_two_tasks_differ(collected):
    """The trajectories are the tasks', not one shared one."""
    run = make_run(collected)
    last = [list(load_checkpoints(run, load_lm(run), t))[-1] for t in run.cfg.data.train_tasks]
    assert len({adapter_hash(a) for a in last}) == len(last)


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_damaged_checkpoint_is_named(collected, damage):
    """A checkpoint that is not what collection wrote is refused by name, with what to do."""
    run = make_run(collected)
    file = run.path / "adapters/beta/step_0008.safetensors"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "altered":
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(bytes(data))
    else:
        file.unlink()
    with pytest.raises(UserError) as e:
        train_generators(run)
    assert (
        str(file) in str(e.value) and "stage=collect" in str(e.value) and "delete" in str(e.value)
    )


def test_collect_names_the_step_of_a_non_finite_loss(tiny_args, monkeypatch):
    """The step, the state saved before it and a way out; afterwards the same command works."""
    run, real, calls = make_run(tiny_args), scoring.lm_loss, []

    def poisoned(lm, rows):
        calls.append(1)
        return real(lm, rows) * (float("nan") if len(calls) == 3 else 1)

    proof.ensure(run)  # which trains a step itself
    monkeypatch.setattr(scoring, "lm_loss", poisoned)
    with pytest.raises(UserError, match=r"step 3 .*last finite") as e:
        collect_adapters(run)
    saved = Path(re.search(r"\S+before_failure\.safetensors", str(e.value))[0])
    assert load_adapter(saved, load_lm(run).layout)
    assert not (saved.parent / "DONE.json").exists()
    monkeypatch.undo()
    collect_adapters(run)
    assert not saved.exists() and (saved.parent / "DONE.json").exists()
