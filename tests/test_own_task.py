"""A user's own task: from a file to an exported folder and to answers, on the tiny run."""

import csv
import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import run_command, tiny_rows
from safetensors.torch import load_file, save_file

import data
import export as export_room
import lora
import own_task
import policy
import records
import scoring
import strategies
from config import UserError, load_config
from runtime import Run, read_json, read_jsonl, write_json
from strategies import TTS_METHODS, Strategy

DEFAULT = "config=configs/default.yaml"

pytestmark = pytest.mark.usefixtures("one_thread")


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def fresh_rows(count: int, start: int = 0) -> list[dict]:
    """Rows no task of the run holds."""
    rows = tiny_rows("alpha", start + count)[start:]
    for i, row in enumerate(rows):
        row["id"] = f"own-{i}"
        row["question"] = f"Own case {i}. {row['question']}"
    return rows


def unlabelled(rows: list[dict]) -> list[dict]:
    return [{"question": row["question"]} for row in rows]


@pytest.fixture
def own(tmp_path):
    return write_rows(tmp_path / "my task.jsonl", fresh_rows(30))


@pytest.fixture
def new(tmp_path):
    return write_rows(tmp_path / "new.jsonl", fresh_rows(2))


@pytest.fixture
def answers(tmp_path):
    return tmp_path / "answers.jsonl"


def adapt(copy, task, *more) -> int:
    return run_command([f"run={copy}", "stage=adapt", f"task={task}", *more])


def export(copy, *more) -> int:
    return run_command([f"run={copy}", "stage=export", *more])


def predict(copy, source, answers, *more) -> int:
    words = [f"run={copy}", "stage=predict", f"input={source}", f"output={answers}"]
    return run_command([*words, *more])


def task_of(copy, source, *more) -> data.Task:
    """The task that stage=adapt reads."""
    cfg, _ = load_config([f"run={copy}", "stage=adapt", f"task={source}", *more])
    return data.load_task(cfg, cfg.task)


def change_json(path, **changes) -> None:
    write_json(path, read_json(path) | changes)


def test_file_to_adapter_and_answers(copy, own, answers, tmp_path, capsys):
    """One command from a file: gains on held-out rows, a folder PEFT loads, and answers from it."""
    described = [copy / name for name in ("config.yaml", "tasks.json", "command.txt")]
    before = [path.read_bytes() for path in described]
    assert adapt(copy, own) == 0
    said = capsys.readouterr().out
    assert "my_task: 8 unlabelled prompts, 8 support and 22 held-out" in said
    for text in (
        "degaml_plus",
        "against the base model",
        "Wrong prompts (control)",
        "verdict: ",
        "AutoPeftModelForCausalLM",
        "vllm serve",
        "lm_eval",
    ):
        assert text in said
    # the run is still described as what it was
    assert [path.read_bytes() for path in described] == before

    folder = copy / "export/my_task"
    facts = read_json(folder / "strategy.json")
    assert facts["task"] == "my_task"
    assert facts["method"] == "degaml_plus"

    asked = fresh_rows(9, 40)
    for row in asked:
        del row["gold"]
    source = write_rows(tmp_path / "asked.jsonl", asked)
    assert predict(copy, source, answers, f"adapter={folder}") == 0
    for i, (answer, row) in enumerate(zip(read_jsonl(answers), asked, strict=True)):
        assert answer["id"] == f"own-{i}"
        assert answer["prediction"] == row["choices"][answer["index"]]


def test_held_out_rows_are_not_among_prompts_or_support(copy, own):
    """The rows the gain is measured on have shaped nothing."""
    task = task_of(copy, own)
    assert [len(rows) for rows in (task.test, task.support, task.train)] == [22, 8, 0]
    held_out = {example.text for example in task.test}
    assert not held_out & {example.text for example in task.support}
    assert not held_out & set(task.prompts)


@pytest.mark.parametrize(
    "labelled, support, test, prompts",
    [(0, 0, 0, 20), (5, 0, 5, 20), (8, 8, 0, 20), (14, 8, 6, 20)],
)
def test_a_file_of_any_size(copy, tmp_path, capsys, labelled, support, test, prompts):
    """Prompts alone make a generated adapter; labels are the support set first, then the test."""
    rows = fresh_rows(20 + labelled)
    file = tmp_path / "few.jsonl"
    write_rows(file, [*rows[:labelled], *unlabelled(rows[labelled:])])
    task = task_of(copy, file, "data.num_prompts=40")
    assert (len(task.support), len(task.test), len(task.prompts)) == (support, test, prompts)
    if support:
        return
    assert adapt(copy, file) == 0
    said = capsys.readouterr().out
    assert read_json(copy / "export/few/strategy.json")["method"] == "generator"
    assert "not refined" in said
    assert ("no labelled rows" in said) == (labelled == 0)


def test_a_label_free_task_edits_no_configuration(copy):
    """The run it works on is a copy: other methods, the same loaded model and tasks."""
    cfg, _ = load_config([f"run={copy}", "stage=export", "task=delta"])
    wanted = list(cfg.evaluate.methods)
    run = Run(copy, cfg)
    label_free = own_task._label_free(run)
    assert "degaml_plus" in wanted
    assert "degaml_plus" not in label_free.cfg.evaluate.methods
    assert cfg.evaluate.methods == wanted
    assert label_free.cache is run.cache


def test_a_small_file_lends_its_support_inputs_as_prompts(copy, tmp_path):
    """With nothing else unlabelled the support inputs are the prompts, never the held-out rows."""
    task = task_of(copy, write_rows(tmp_path / "small.jsonl", fresh_rows(10)))
    assert len(task.test) == 2
    assert set(task.prompts) == {example.text for example in task.support}


@pytest.mark.parametrize("names, letters", [(["choice1", "choice2"], False), (["A", "B"], True)])
def test_csv_and_jsonl_are_the_same_task(copy, own, tmp_path, names, letters):
    """Columns choice1, choice2, …, or A, B, … are the options; gold is an index or a letter."""
    file = tmp_path / "my_task.csv"
    with open(file, "w", newline="") as f:
        out = csv.writer(f)
        out.writerow(["id", "question", *names, "gold"])
        for row in read_jsonl(own):
            gold = "AB"[row["gold"]] if letters else row["gold"]
            out.writerow([row["id"], row["question"], *row["choices"], gold])
    assert same_examples(task_of(copy, file), task_of(copy, own))


def same_examples(task, other) -> bool:
    """Two tasks that differ in nothing but the file they were read from."""
    return dataclasses.replace(task, data={}) == dataclasses.replace(other, data={})


def test_json_array_is_the_same_task(copy, own, tmp_path):
    """The rows of a file may stand in one JSON array."""
    file = tmp_path / "my_task.json"
    file.write_text(json.dumps(read_jsonl(own), indent=2))
    assert same_examples(task_of(copy, file), task_of(copy, own))


def test_released_file_by_name(copy, tmp_path):
    """A file of the papers' releases needs no preparation, labelled or not."""
    labelled = []
    for row in fresh_rows(30):
        one, two = row["choices"]
        prompt = f"{row['question']}\nA: {one}\nB: {two}"
        response = f"[{'AB'[row['gold']]}]"
        labelled.append({"prompt": prompt, "response": response, "system": "Pick one."})
    file = tmp_path / "released.json"
    file.write_text(json.dumps(labelled))
    task = task_of(copy, file)
    assert (len(task.test), len(task.support), len(task.prompts)) == (22, 8, 8)
    assert {e.answer for e in task.test} == {"always"}  # as in the rows they were made of

    for row in labelled:
        del row["response"]
    file.write_text(json.dumps(labelled))
    task = task_of(copy, file)
    assert (len(task.test), len(task.support), len(task.prompts)) == (0, 0, 16)


def test_hub_data_set_by_name(copy, tmp_path):
    """task=hf:folder goes through load_dataset, columns mapped; a missing test split is cut."""
    folder = tmp_path / "openbook"
    folder.mkdir()
    records = []
    for row in fresh_rows(30):
        choices = {"text": row["choices"], "label": ["A", "B"]}
        answer = "AB"[row["gold"]]
        records.append({"stem": row["question"], "choices": choices, "answerKey": answer})
    write_rows(folder / "train.jsonl", records)
    columns = "{question: stem, choices: choices, gold: answerKey}"
    task = task_of(copy, f"hf:{folder}", f"data.columns={{openbook: {columns}}}")
    assert (len(task.test), len(task.support)) == (22, 8)
    assert task.test[0].options
    # the columns have usual names: they need not be given
    assert same_examples(task_of(copy, f"hf:{folder}"), task)
    with pytest.raises(UserError, match=r"org/name/configuration"):
        task_of(copy, "hf:org/nothing")


def test_changed_file_is_not_mixed_with_its_old_adapter(copy, own, capsys):
    """Other rows under the same name are refused until they are asked to replace the old ones."""
    assert adapt(copy, own) == 0
    write_rows(own, fresh_rows(30, start=20))
    assert adapt(copy, own) == 2
    assert "data.jsonl" in capsys.readouterr().err
    assert adapt(copy, own, "overwrite=true") == 0


def test_from_nothing_to_an_adapter(words, own, tmp_path, capsys):
    """What `make adapter` runs: the checkpoints and one generator, then the adapter; no more."""
    run = tmp_path / "new"
    settings = [*words, f"run={run}"]
    assert run_command([*settings, "stage=check", DEFAULT, f"task={own}"]) == 0
    assert run_command([*settings, "stage=prepare"]) == 0
    said = capsys.readouterr().out
    assert "minutes to the adapter, if nothing is there yet (collect " in said
    assert [path.name for path in (run / "generator").iterdir()] == ["all"]
    assert not (run / "adapted").exists()
    made = [path.stat().st_mtime_ns for path in sorted(run.rglob("DONE.json"))]

    assert adapt(run, own) == 0
    assert "verdict: " in capsys.readouterr().out
    # a second time nothing is trained again, and the run is no other than it was
    assert run_command([*settings, "stage=prepare"]) == 0
    kept = [path for path in sorted(run.rglob("DONE.json")) if "my_task" not in str(path)]
    assert [path.stat().st_mtime_ns for path in kept] == made
    assert load_config([f"run={run}", "stage=report"])[0].data.targets == []


def test_long_rows_are_counted(copy, tmp_path, capsys):
    """What is cut is said in a line."""
    rows = fresh_rows(20)
    for row in rows[:3]:
        row["question"] = "very " * 600 + row["question"]
    assert adapt(copy, write_rows(tmp_path / "long.jsonl", rows)) == 0
    assert "long: 3 of 20 rows have more than data.max_tokens=" in capsys.readouterr().out


def test_a_faulty_file_is_found_before_the_hours(words, tmp_path, capsys):
    """`check` reads the file too."""
    bad = write_rows(tmp_path / "bad.jsonl", [*fresh_rows(9), {"question": " "}])
    settings = [*words, f"run={tmp_path / 'new'}"]
    assert run_command([*settings, "stage=check", DEFAULT, f"task={bad}"]) == 2
    assert "bad.jsonl:10: `question` is missing or empty" in capsys.readouterr().err


def test_two_files_of_one_name(copy, tmp_path, capsys):
    """The second gets a name of its own; neither takes the other's adapter."""
    files = []
    for folder, start in (("a", 0), ("b", 20)):
        (tmp_path / folder).mkdir()
        files.append(write_rows(tmp_path / folder / "x.jsonl", fresh_rows(30, start)))
    assert adapt(copy, files[0]) == 0
    assert export(copy, f"task={files[1]}") == 2
    assert "task=x_2: generator was not adapted" in capsys.readouterr().err
    assert adapt(copy, files[1]) == 0
    assert read_json(copy / "export/x_2/strategy.json")["task"] == "x_2"
    assert task_of(copy, files[0]).name == "x" and task_of(copy, files[1]).name == "x_2"


def test_replaced_by_prompts_alone_it_is_not_the_old_refined_adapter(copy, own):
    """Labels gone, the refined adapter of the old file is not what is exported."""
    assert adapt(copy, own) == 0
    write_rows(own, unlabelled(fresh_rows(20)))
    assert adapt(copy, own, "overwrite=true") == 0
    assert read_json(copy / "export/my_task/strategy.json")["method"] == "generator"


def test_overwrite_never_clears_what_is_only_read(copy, own, capsys):
    """A setting the generator was not trained with is refused; overwrite=true leaves it there."""
    assert adapt(copy, own, "data.num_support=4", "overwrite=true") == 2
    err = capsys.readouterr().err
    assert "data.num_support: 8 -> 4" in err
    assert "overwrite=true" not in err
    assert (copy / "generator/all/generator.safetensors").is_file()


def test_using_a_run_does_not_change_it(copy, own, new, answers):
    """predict, and an own task's rows, leave the run's record, curves and costs as they were."""
    assert run_command([f"run={copy}", "stage=report"]) == 0
    kept = [copy / name for name in ("config.yaml", "metrics.jsonl", "env.json", "command.txt")]
    before = [path.read_bytes() for path in kept]
    budget = read_json(copy / "report/results.json")["budget"]
    assert adapt(copy, own) == 0
    assert predict(copy, new, answers, f"adapter={copy / 'export/my_task'}") == 0
    assert [path.read_bytes() for path in kept] == before
    assert run_command([f"run={copy}", "stage=report"]) == 0
    assert read_json(copy / "report/results.json")["budget"] == budget

    # a record that does hold such words, of an older command, is read without them
    record = copy / "config.yaml"
    record.write_text(record.read_text().replace("adapter: ''", "adapter: elsewhere"))
    cfg, _ = load_config([f"run={copy}", "stage=export", "task=delta"])
    assert cfg.adapter == ""


def test_predict_writes_prompts_as_the_task_has_them(copy, new, answers, monkeypatch):
    """An adapter of a benchmark gets that benchmark's prompts, whatever the command's tasks are."""
    assert export(copy, "task=delta") == 0
    folder = copy / "export/delta"
    change_json(folder / "strategy.json", task="boolq")
    seen = []
    real = data.make_example

    def make_example(name, *rest):
        seen.append(name)
        return real(name, *rest)

    monkeypatch.setattr(data, "make_example", make_example)
    assert predict(copy, new, answers, f"adapter={folder}") == 0
    assert seen == ["boolq", "boolq"]


def test_a_question_listed_twice_stays_held_out(copy, tmp_path):
    """An unlabelled copy of a held-out row is no prompt."""
    rows = fresh_rows(14)
    file = write_rows(tmp_path / "twice.jsonl", [*rows, *unlabelled(rows)])
    task = task_of(copy, file, "data.num_prompts=40")
    assert (len(task.test), len(task.prompts)) == (6, 8)
    assert not {example.text for example in task.test} & set(task.prompts)


def test_a_gap_among_a_csv_rows_options_is_a_fault(tmp_path):
    """Dropping an empty cell would shift the gold index."""
    file = tmp_path / "gap.csv"
    file.write_text("question,A,B,C,D,gold\nWhich?,one,,three,four,C\n")
    with pytest.raises(UserError, match=r"gap\.csv:2: option 1 is empty"):
        records.read_file(file)
    file.write_text("question,A,B,C,D,gold\nWhich?,one,two,,,B\n")
    assert records.read_file(file)[0]["choices"] == ["one", "two"]


def test_classes_of_the_task_are_options_of_new_rows(copy, answers, tmp_path):
    """Adapted to reviews that are good or bad, it answers new ones with these words."""
    rows = []
    for i, row in enumerate(fresh_rows(30)):
        rows.append({"text": row["question"], "label": ("good", "bad")[i % 2]})
    assert adapt(copy, write_rows(tmp_path / "reviews.jsonl", rows)) == 0
    folder = copy / "export/reviews"
    assert read_json(folder / "strategy.json")["options"] == ["bad", "good"]
    new = write_rows(tmp_path / "new.jsonl", [{"text": "It is fine."}] * 2)
    assert predict(copy, new, answers, f"adapter={folder}") == 0
    assert {row["prediction"] for row in read_jsonl(answers)} <= {"bad", "good"}
    assert len(read_jsonl(answers)) == 2


PREDICT = ["stage=predict", "input=a.jsonl", "output=b.jsonl"]


@pytest.mark.parametrize(
    "mistake, complaint",
    [
        (
            ["stage=adapt", "task=nothing.txt"],
            "expected a file (.jsonl, .json, .csv, .tsv, .parquet)",
        ),
        (["stage=collect", "task=a.jsonl"], "stage=adapt, check, export or predict"),
        (["stage=adapt", "task=alpha.jsonl"], "rename it"),
        (["stage=adapt", "task=all.jsonl"], "rename it"),
        (["stage=adapt", "task=a.jsonl", "data.jsonl=text"], "data.jsonl (command line)"),
        (
            ["stage=adapt", "task=a.jsonl", "data.train_tasks=alpha"],
            "data.train_tasks (command line)",
        ),
        (["stage=adapt", "task=missing.jsonl"], "cannot read"),
        (["stage=export"], "needs task="),
        (["stage=export", "task=delta", "method=tempo"], "method= may be"),
        (["stage=export", "task=unheard"], "run stage=adapt task="),
        (["stage=predict"], "needs input="),
        (PREDICT, "stage=export"),
        ([*PREDICT, "adapter=nowhere"], "stage=export"),
    ],
)
def test_mistakes_are_named(full, mistake, capsys, complaint):
    """One line, exit 2, and what to do instead."""
    assert run_command([f"run={full}", *mistake]) == 2
    err = capsys.readouterr().err
    assert complaint in err
    assert "Traceback" not in err


def test_without_a_trained_run(tmp_path, own, capsys):
    """What is missing and the two commands that make it."""
    folder = tmp_path / "none"
    assert adapt(folder, own) == 2
    assert "make demo" in capsys.readouterr().err
    assert not folder.exists()


def test_export_of_a_task_of_the_run(full, copy, tmp_path):
    """The exported folder is the adapted one, which PEFT loads (tests/test_pipeline.py)."""
    out = tmp_path / "mine"
    assert export(copy, "task=beta", "method=generator", f"output={out}") == 0
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        adapted = full / "adapted/generator/beta" / name
        assert (out / name).read_bytes() == adapted.read_bytes()


NO_ADAPTER = [{"family": "Latent", "slot_steps": 2, "slot_lr": 0.1}]
for method in TTS_METHODS:
    NO_ADAPTER.append({"family": "TTS", "num_prompt_batches": 2, "method": method})


@pytest.mark.parametrize("chosen", NO_ADAPTER, ids=lambda s: s.get("method", s["family"]))
def test_predict_executes_what_is_no_adapter(copy, tmp_path, capsys, chosen):
    """An exported ensemble or steering answers exactly as it does inside the run."""
    change_json(copy / "adapted/degaml/delta/strategy.json", strategy=chosen)
    out = tmp_path / "out"
    assert export(copy, "task=delta", "method=degaml", f"output={out}") == 0
    assert "is not one adapter" in capsys.readouterr().out

    cfg, _ = load_config([f"run={copy}", "stage=export", "task=delta"])
    run = Run(copy, cfg)
    lm = scoring.load_lm(run)
    task = data.load_task(cfg, "delta")
    test = list(task.test)
    inside = strategies.execute(policy.make_target(run, task), Strategy.from_dict(chosen))
    _, name, _, exported = export_room.load_exported(out, run)
    want = strategies.score_refined(lm, inside, test)
    got = strategies.score_refined(lm, exported, test)
    assert name == "delta"
    for a, b in zip(want, got, strict=True):
        np.testing.assert_allclose(a.raw, b.raw, atol=1e-5)

    # not just the first adapter
    plain = scoring.score_examples(lm, lora.load_adapter(out, lm.layout), test)
    assert any(abs(a.raw[0] - b.raw[0]) > 1e-4 for a, b in zip(plain, got, strict=True))


def test_steering_behind_a_chain_is_exported_with_the_chains_adapter(copy, tmp_path):
    """`policy.steps`: it steers what the strategies before it made, not the generated adapter."""
    folder = copy / "adapted/degaml/delta"
    change_json(folder / "strategy.json", strategy=NO_ADAPTER[0], before=[])
    made = {
        key: value + 0.5 for key, value in load_file(folder / "adapter_model.safetensors").items()
    }
    save_file(made, folder / "adapter_model.safetensors")
    assert export(copy, "task=delta", "method=degaml", f"output={tmp_path}") == 0
    exported = load_file(tmp_path / "adapter_model.safetensors")
    assert all(torch.equal(exported[key], made[key]) for key in made)


def test_predict_writes_free_answers_and_counts_gold(copy, tmp_path, answers, capsys):
    """Rows without options are answered by generation; with gold a right accuracy is printed."""
    rows = fresh_rows(6)
    mixed = write_rows(tmp_path / "mixed.jsonl", [*rows[:4], *unlabelled(rows[4:])])
    assert export(copy, "task=delta") == 0
    assert predict(copy, mixed, answers, "task=delta") == 0
    got = read_jsonl(answers)
    for answer in got[:4]:
        assert set(answer) == {"id", "prediction", "index", "logprobs"}
    for answer in got[4:]:
        assert set(answer) == {"id", "prediction"}
    assert len(got) == 6
    right = sum(a["index"] == row["gold"] for a, row in zip(got[:4], rows[:4], strict=True))
    assert f"{right} of 4 rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    "damage, complaint",
    [
        ({"adapters": 10**6}, "outside"),
        ({"adapters": "x"}, "expected a folder made by"),
        ({"slot": [10**9, 0.1]}, "outside"),
        ({"slot": [2]}, "expected a folder made by"),
        ({"base_model": "other"}, "model.name"),
        ({"adapters": 2}, "combine is ''"),
        ({"adapters": 2, "combine": "majority_vote"}, "no such file"),
        ({"adapters": 2, "combine": "avg_sim_score"}, "no such file"),
        ({"combine": "eval"}, "combine is 'eval'"),
        ({"format": "letter"}, "data.format"),
    ],
)
def test_damaged_exports_are_refused(copy, new, answers, capsys, damage, complaint):
    """No exported folder can ask for more work than the configuration allows, or go unnoticed."""
    assert export(copy, "task=delta") == 0
    change_json(copy / "export/delta/strategy.json", **damage)
    assert predict(copy, new, answers, "task=delta") == 2
    assert complaint in capsys.readouterr().err
    assert not answers.exists()


def test_pickles_are_never_loaded(copy, new, answers, capsys):
    """A folder with weights in any other format than safetensors counts as empty."""
    assert export(copy, "task=delta") == 0
    folder = copy / "export/delta"
    torch.save({}, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    shutil.copy(folder / "adapter_model.bin", folder / "adapter_model.pt")
    assert predict(copy, new, answers, "task=delta") == 2
    assert "adapter_model.safetensors: no such file" in capsys.readouterr().err
