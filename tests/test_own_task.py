"""A user's own task: from a file to an exported folder and to answers, on the tiny run."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import run_command, tiny_rows

import own_task
from config import UserError, load_config
from data import load_task, make_example, read_user_file
from lora import load_adapter
from own_task import load_exported
from runtime import Run, read_json, read_jsonl, write_json
from scoring import load_lm, score_examples
from strategies import METHODS, Strategy, execute

pytestmark = pytest.mark.usefixtures("one_thread")


def write_rows(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def fresh_rows(count: int, start: int = 0) -> list[dict]:
    """Rows no task of the run holds."""
    rows = tiny_rows("alpha", start + count)[start:]
    return [
        {**r, "id": f"own-{i}", "question": f"Own case {i}. {r['question']}"}
        for i, r in enumerate(rows)
    ]


@pytest.fixture
def own(tmp_path):
    return write_rows(tmp_path / "my task.jsonl", fresh_rows(30))


def adapt(copy, task, *more) -> int:
    return run_command([f"run={copy}", "stage=adapt", f"task={task}", *more])


def test_file_to_adapter_and_answers(copy, own, tmp_path, capsys):
    """One command from a file: gains on held-out rows, a folder PEFT loads, and the same answers from stage=predict."""
    before = {
        p: p.read_bytes() for p in (copy / "config.yaml", copy / "tasks.json", copy / "command.txt")
    }
    assert adapt(copy, own) == 0
    said = capsys.readouterr().out
    assert "my_task: 10 unlabelled prompts, 8 support and 12 held-out" in said
    for text in (
        "degaml_plus",
        "vs base",
        "vs wrong_prompts",
        "PeftModel",
        "vllm serve",
        "lm_eval",
    ):
        assert text in said
    assert all(p.read_bytes() == b for p, b in before.items()), (
        "the run is still described as what it was"
    )
    folder = copy / "export/my_task"
    facts = read_json(folder / "strategy.json")
    assert facts["task"] == "my_task" and facts["method"] == "degaml_plus"
    answers = tmp_path / "answers.jsonl"
    new = write_rows(
        tmp_path / "new.jsonl",
        [{k: r[k] for k in ("id", "question", "choices")} for r in fresh_rows(9, 40)],
    )
    assert (
        run_command(
            [
                f"run={copy}",
                "stage=predict",
                f"adapter={folder}",
                f"input={new}",
                f"output={answers}",
            ]
        )
        == 0
    )
    rows = read_jsonl(answers)
    assert [r["id"] for r in rows] == [f"own-{i}" for i in range(9)]
    assert all(
        r["prediction"] == q["choices"][r["index"]]
        for r, q in zip(rows, read_jsonl(new), strict=True)
    )


def test_held_out_rows_are_not_among_prompts_or_support(copy, own):
    """The rows the gain is measured on have shaped nothing."""
    cfg, _ = load_config([f"run={copy}", "stage=adapt", f"task={own}"])
    task = load_task(cfg, "my_task")
    test = {e.text for e in task.test}
    assert len(task.test) == 12 and len(task.support) == 8 and len(task.train) == 10
    assert not test & {e.text for e in task.support} and not test & set(task.prompts)


@pytest.mark.parametrize(
    "labelled, support, test, prompts",
    [(0, 0, 0, 20), (5, 0, 5, 20), (8, 8, 0, 20), (14, 8, 6, 20)],
)
def test_a_file_of_any_size(copy, tmp_path, capsys, labelled, support, test, prompts):
    """Prompts alone make a generated adapter; the support set comes first, what is left of the labels tests."""
    rows = fresh_rows(20 + labelled)
    bare = [{"question": r["question"]} for r in rows[labelled:]]
    file = write_rows(tmp_path / "few.jsonl", rows[:labelled] + bare)
    cfg, _ = load_config([f"run={copy}", "stage=adapt", f"task={file}", "data.num_prompts=40"])
    task = load_task(cfg, "few")
    assert (len(task.support), len(task.test), len(task.prompts)) == (support, test, prompts)
    if labelled in (0, 5):
        assert adapt(copy, file) == 0
        said = capsys.readouterr().out
        assert (
            read_json(copy / "export/few/strategy.json")["method"] == "generator"
            and "not refined" in said
        )
        assert ("no labelled rows" in said) == (labelled == 0)


def test_a_small_file_lends_its_support_inputs_as_prompts(copy, tmp_path):
    """With nothing else unlabelled the support inputs condition the generator, never the held-out rows."""
    file = write_rows(tmp_path / "small.jsonl", fresh_rows(10))
    cfg, _ = load_config([f"run={copy}", "stage=adapt", f"task={file}"])
    task = load_task(cfg, "small")
    assert len(task.test) == 2 and set(task.prompts) == {e.text for e in task.support}


def test_csv_and_jsonl_are_the_same_task(copy, own, tmp_path):
    """Columns choice1, choice2, …, or A, B, … are the options; gold is an index or a letter."""
    rows = read_jsonl(own)
    for names, letter in ((["choice1", "choice2"], False), (["A", "B"], True)):
        with open(tmp_path / "my_task.csv", "w", newline="") as f:
            out = csv.writer(f)
            out.writerow(["id", "question", *names, "gold"])
            out.writerows(
                [r["id"], r["question"], *r["choices"], "AB"[r["gold"]] if letter else r["gold"]]
                for r in rows
            )
        cfg, _ = load_config([f"run={copy}", "stage=adapt", f"task={tmp_path / 'my_task.csv'}"])
        want, _ = load_config([f"run={copy}", "stage=adapt", f"task={own}"])
        assert load_task(cfg, "my_task") == load_task(want, "my_task")


def test_hub_data_set_by_name(copy, tmp_path):
    """task=hf:folder goes through load_dataset, with columns mapped; without a test split ours is cut."""
    folder = tmp_path / "openbook"
    folder.mkdir()
    write_rows(
        folder / "train.jsonl",
        [
            {
                "stem": r["question"],
                "choices": {"text": r["choices"], "label": ["A", "B"]},
                "answerKey": "AB"[r["gold"]],
            }
            for r in fresh_rows(30)
        ],
    )
    words = [f"run={copy}", "stage=adapt", f"task=hf:{folder}"]
    cfg, _ = load_config([*words, "data.columns={openbook: {question: stem}}"])
    task = load_task(cfg, "openbook")
    assert len(task.test) == 12 and len(task.support) == 8 and task.test[0].options
    with pytest.raises(UserError, match=r"data\.columns\.openbook.*question"):
        load_task(load_config(words)[0], "openbook")
    with pytest.raises(UserError, match=r"org/name/configuration"):
        load_task(load_config([f"run={copy}", "stage=adapt", "task=hf:org/nothing"])[0], "nothing")


def test_changed_file_is_not_mixed_with_its_old_adapter(copy, own, capsys):
    """Other rows under the same name are refused until they are asked to replace the old ones."""
    assert adapt(copy, own) == 0
    write_rows(own, fresh_rows(30, start=20))
    assert adapt(copy, own) == 2
    assert "data.jsonl" in capsys.readouterr().err
    assert adapt(copy, own, "overwrite=true") == 0


def test_replaced_by_prompts_alone_it_is_not_the_old_refined_adapter(copy, own):
    """Labels gone, the refined adapter of the old file is not what is exported."""
    assert adapt(copy, own) == 0
    write_rows(own, [{"question": r["question"]} for r in fresh_rows(20)])
    assert adapt(copy, own, "overwrite=true") == 0
    assert read_json(copy / "export/my_task/strategy.json")["method"] == "generator"


def test_overwrite_never_clears_what_is_only_read(copy, own, capsys):
    """A setting the generator was not trained with is refused, and the generator survives overwrite=true."""
    assert adapt(copy, own, "data.num_support=4", "overwrite=true") == 2
    err = capsys.readouterr().err
    assert "data.num_support: 8 -> 4" in err and "overwrite=true" not in err
    assert (copy / "generator/none/generator.safetensors").is_file()


def test_using_a_run_does_not_change_it(copy, own, tmp_path):
    """predict without task=, and an own task's rows, leave the run's record, curves and costs as they were."""
    assert run_command([f"run={copy}", "stage=report"]) == 0
    kept = [copy / "config.yaml", copy / "metrics.jsonl"]
    before = [p.read_bytes() for p in kept]
    budget = read_json(copy / "report/results.json")["budget"]
    assert adapt(copy, own) == 0
    new = write_rows(tmp_path / "new.jsonl", fresh_rows(2))
    assert (
        run_command(
            [
                f"run={copy}",
                "stage=predict",
                f"adapter={copy / 'export/my_task'}",
                f"input={new}",
                f"output={tmp_path / 'out.jsonl'}",
            ]
        )
        == 0
    )
    assert [p.read_bytes() for p in kept] == before
    assert run_command([f"run={copy}", "stage=report"]) == 0
    assert read_json(copy / "report/results.json")["budget"] == budget
    # a record that does hold such words, of an older command, is read without them
    (copy / "config.yaml").write_text(
        (copy / "config.yaml").read_text().replace("adapter: ''", "adapter: elsewhere")
    )
    assert load_config([f"run={copy}", "stage=export", "task=delta"])[0].adapter == ""


def test_predict_writes_prompts_as_the_task_has_them(copy, tmp_path, monkeypatch):
    """A benchmark's own prompt form is used for an adapter of that benchmark, whatever the command says of tasks."""
    assert run_command([f"run={copy}", "stage=export", "task=delta"]) == 0
    folder = copy / "export/delta"
    write_json(folder / "strategy.json", read_json(folder / "strategy.json") | {"task": "boolq"})
    seen = []
    monkeypatch.setattr(
        own_task, "make_example", lambda name, *rest: seen.append(name) or make_example(name, *rest)
    )
    new = write_rows(tmp_path / "new.jsonl", fresh_rows(2))
    assert (
        run_command(
            [
                f"run={copy}",
                "stage=predict",
                f"adapter={folder}",
                f"input={new}",
                f"output={tmp_path / 'out.jsonl'}",
            ]
        )
        == 0
    )
    assert seen == ["boolq"] * 2


def test_a_question_listed_twice_stays_held_out(copy, tmp_path):
    """An unlabelled copy of a held-out row is no prompt."""
    rows = fresh_rows(14)
    file = write_rows(tmp_path / "twice.jsonl", rows + [{"question": r["question"]} for r in rows])
    task = load_task(
        load_config([f"run={copy}", "stage=adapt", f"task={file}", "data.num_prompts=40"])[0],
        "twice",
    )
    assert (
        len(task.test) == 6
        and not {e.text for e in task.test} & set(task.prompts)
        and len(task.prompts) == 8
    )


def test_a_gap_among_a_csv_rows_options_is_a_fault(tmp_path):
    """Dropping an empty cell would shift the gold index."""
    file = tmp_path / "gap.csv"
    file.write_text("question,A,B,C,D,gold\nWhich?,one,,three,four,C\n")
    with pytest.raises(UserError, match=r"gap\.csv:2: option 1 is empty"):
        read_user_file(file)
    file.write_text("question,A,B,C,D,gold\nWhich?,one,two,,,B\n")
    assert read_user_file(file)[0]["choices"] == ["one", "two"]


@pytest.mark.parametrize(
    "mistake, complaint",
    [
        (["stage=adapt", "task=nothing.txt"], "expected a .jsonl or .csv file"),
        (["stage=collect", "task=a.jsonl"], "stage=adapt, export or predict"),
        (["stage=adapt", "task=alpha.jsonl"], "rename it"),
        (["stage=adapt", "task=none.jsonl"], "rename it"),
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
        (["stage=predict", "input=a.jsonl", "output=b.jsonl"], "stage=export"),
        (["stage=predict", "input=a.jsonl", "output=b.jsonl", "adapter=nowhere"], "stage=export"),
    ],
)
def test_mistakes_are_named(full, mistake, capsys, complaint):
    """One line, exit 2, and what to do instead."""
    assert run_command([f"run={full}", *mistake]) == 2
    err = capsys.readouterr().err
    assert complaint in err and "Traceback" not in err


def test_without_a_trained_run(tmp_path, own, capsys):
    """What is missing and the two commands that make it."""
    assert run_command(["stage=adapt", f"task={own}", f"run={tmp_path / 'none'}"]) == 2
    assert "make demo" in capsys.readouterr().err and not (tmp_path / "none").exists()


# ------------------------------------------------------------------------------------------------------------- export


def test_export_of_a_task_of_the_run(full, copy, tmp_path):
    """The exported folder is the adapted one, which PEFT loads (tests/test_pipeline.py)."""
    out = tmp_path / "mine"
    assert (
        run_command(
            [f"run={copy}", "stage=export", "task=beta", "method=generator", f"output={out}"]
        )
        == 0
    )
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (out / name).read_bytes() == (full / "adapted/generator/beta" / name).read_bytes()


CHOSEN = [
    *({"family": "TTS", "num_prompt_batches": 2, "method": m} for m in METHODS),
    {"family": "Latent", "slot_steps": 2, "slot_lr": 0.1},
]


@pytest.mark.parametrize("chosen", CHOSEN, ids=lambda s: s.get("method", s["family"]))
def test_predict_executes_what_is_no_adapter(copy, tmp_path, capsys, chosen):
    """An exported ensemble or steering answers exactly as it does inside the run."""
    write_json(
        copy / "adapted/degaml/delta/strategy.json",
        read_json(copy / "adapted/degaml/delta/strategy.json") | {"strategy": chosen},
    )
    out = tmp_path / "out"
    assert (
        run_command([f"run={copy}", "stage=export", "task=delta", "method=degaml", f"output={out}"])
        == 0
    )
    assert "is not one adapter" in capsys.readouterr().out
    cfg, _ = load_config([f"run={copy}", "stage=export", "task=delta"])
    run = Run(copy, cfg)
    from policy import make_target
    from strategies import score_refined

    task = load_task(cfg, "delta")
    target = make_target(run, task)
    want = score_refined(target, execute(target, Strategy.from_dict(chosen)), list(task.test))
    got = score_refined(*load_exported(out, run), list(task.test))
    for a, b in zip(want, got, strict=True):
        np.testing.assert_allclose(a.raw, b.raw, atol=1e-5)
    plain = score_examples(load_lm(run), load_adapter(out, load_lm(run).layout), list(task.test))
    assert any(abs(a.raw[0] - b.raw[0]) > 1e-4 for a, b in zip(plain, got, strict=True)), (
        "not just the first adapter"
    )


def test_predict_writes_free_answers_and_counts_gold(copy, tmp_path, capsys):
    """Rows without options are answered by generation; with gold the accuracy is printed and is right."""
    rows = fresh_rows(6)
    mixed = write_rows(
        tmp_path / "mixed.jsonl", [*rows[:4], *({"question": r["question"]} for r in rows[4:])]
    )
    out = tmp_path / "out.jsonl"
    assert run_command([f"run={copy}", "stage=export", "task=delta"]) == 0
    assert (
        run_command(
            [f"run={copy}", "stage=predict", "task=delta", f"input={mixed}", f"output={out}"]
        )
        == 0
    )
    got = read_jsonl(out)
    assert [set(r) for r in got] == [{"id", "prediction", "index", "logprobs"}] * 4 + [
        {"id", "prediction"}
    ] * 2
    right = sum(r["index"] == q["gold"] for r, q in zip(got[:4], rows, strict=False))
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
def test_damaged_exports_are_refused(copy, tmp_path, capsys, damage, complaint):
    """Nothing in an exported folder can ask for more work than the configuration allows, or go unnoticed."""
    assert run_command([f"run={copy}", "stage=export", "task=delta"]) == 0
    folder = copy / "export/delta"
    write_json(folder / "strategy.json", read_json(folder / "strategy.json") | damage)
    new = write_rows(tmp_path / "new.jsonl", fresh_rows(2))
    assert (
        run_command(
            [
                f"run={copy}",
                "stage=predict",
                "task=delta",
                f"input={new}",
                f"output={tmp_path / 'o'}",
            ]
        )
        == 2
    )
    assert complaint in capsys.readouterr().err and not (tmp_path / "o").exists()


def test_pickles_are_never_loaded(copy, tmp_path, capsys):
    """A folder with weights in any other format than safetensors counts as empty."""
    assert run_command([f"run={copy}", "stage=export", "task=delta"]) == 0
    folder = copy / "export/delta"
    torch.save({}, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    shutil.copy(folder / "adapter_model.bin", folder / "adapter_model.pt")
    new = write_rows(tmp_path / "new.jsonl", fresh_rows(2))
    assert (
        run_command(
            [
                f"run={copy}",
                "stage=predict",
                "task=delta",
                f"input={new}",
                f"output={tmp_path / 'o'}",
            ]
        )
        == 2
    )
    assert "adapter_model.safetensors: no such file" in capsys.readouterr().err
