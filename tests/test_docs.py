"""The documents say what is so: worked examples run, commands parse, glossaries and file lists are complete."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run_command, tiny_rows

import config
from config import load_config
from degaml import STAGES

README = (ROOT / "README.md").read_text()
EXTEND = (ROOT / "docs/extend.md").read_text()


def section(text: str, title: str) -> str:
    return re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.M | re.S).group(1)


def block(text: str, language: str) -> str:
    found = re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)
    assert len(found) == 1
    return found[0]


def apply_patch(diff: str, folder: Path) -> None:
    """Apply hunks by their text: each must occur exactly once, as a reader would look it up."""
    for part in re.split(r"^--- .*\n", diff, flags=re.M)[1:]:
        name, *hunks = re.split(r"^@@.*\n", part, flags=re.M)
        path = folder / name.removeprefix("+++ b/").strip()
        text = path.read_text() if path.exists() else ""
        for hunk in hunks:
            lines = hunk.rstrip("\n").split("\n")
            old = "".join(line[1:] + "\n" for line in lines if not line.startswith("+"))
            new = "".join(line[1:] + "\n" for line in lines if not line.startswith("-"))
            assert not old or text.count(old) == 1, f"{path.name} does not hold this once:\n{old}"
            text = text.replace(old, new) if old else new
        path.write_text(text)


@pytest.mark.parametrize("title", ["Add a strategy", "Add a task", "Add a base model"])
def test_worked_examples(tmp_path, title):
    """The patch applies to the code as it is, and its check passes."""
    for path in [*ROOT.glob("*.py"), *(ROOT / "configs").iterdir()]:
        to = tmp_path / path.relative_to(ROOT)
        to.parent.mkdir(exist_ok=True)
        shutil.copy(path, to)
    text = section(EXTEND, title)
    check = block(text, "python")
    before = subprocess.run(
        [sys.executable, "-c", check], cwd=tmp_path, capture_output=True, text=True
    )
    assert before.returncode != 0, "the check passes without the patch: it checks nothing"
    apply_patch(block(text, "diff"), tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", check], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


def commands(text: str) -> list[list[str]]:
    """The words of every `python degaml.py` and torchrun line in code blocks."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").split("\n")
    found = [re.search(r"(?:python|torchrun[^#]*?) degaml\.py (.*)", line) for line in lines]
    return [shlex.split(m.group(1), comments=True) for m in found if m]


@pytest.mark.parametrize(
    "words", commands(README) + commands((ROOT / "run.sh").read_text()), ids=" ".join
)
def test_commands_are_legal(words, monkeypatch):
    """Every command shown parses: stages exist, keys are known, values are in range."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(config, "_trained_run", lambda run: "configs/demo.yaml")
    cfg, stage = load_config(words)
    assert stage in STAGES


def tiny(argv: list[str], words: list[str], trained: Path, folder: Path) -> list[str]:
    """A command of the README with the tiny run's model, data and sizes in place of the preset it names."""
    given = dict(a.split("=", 1) for a in argv)
    if given["stage"] in (
        "adapt",
        "export",
        "predict",
    ):  # with a trained run, which the README's reader has
        local = {"hf:allenai/openbookqa/main": "hf:openbookqa", "divlogic": "delta"}
        return [f"{k}={local.get(v, v)}" for k, v in (given | {"run": str(trained)}).items()]
    preset = dict(w.split("=", 1) for w in words)
    if "data.jsonl" in given:
        own = {t: str(folder / f) for t, f in config.parse_yaml(given["data.jsonl"], "").items()}
        given["data.jsonl"] = json.dumps(json.loads(preset["data.jsonl"]) | own)
    given.pop("data.num_test", None)  # the tiny tasks have less
    if given["stage"] in ("report", "analyze"):  # by the run's own configuration
        return [f"stage={given['stage']}", f"run={folder / given['run']}"]
    if given["stage"] == "doctor":
        return [
            "stage=doctor",
            f"config={ROOT / given['config']}",
            f"run={folder / 'doctor'}",
            "device=cpu",
        ]
    where = {"run": str(folder / given["run"])} if "run" in given else {}
    return [f"{k}={v}" for k, v in (preset | given | where).items() if k != "config"]


def test_commands_run(copy, words, tmp_path, monkeypatch, capsys):
    """The README's commands for one machine, in their order, from a user's own folder: each exits 0, and what it says
    it writes is there."""
    monkeypatch.chdir(tmp_path)
    rows = [
        r | {"id": f"own-{i}", "question": f"Own case {i}. {r['question']}"}
        for i, r in enumerate(tiny_rows("alpha", 140))
    ]
    for name, some in (
        ("my_task.jsonl", rows),
        ("new.jsonl", rows[:9]),
        ("openbookqa/train.jsonl", rows[:60]),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("".join(json.dumps(r) + "\n" for r in some))
    (tmp_path / "my_other_task.csv").write_text(
        "id,question,A,B,gold\n"
        + "".join(
            f"{r['id']},{r['question']},{','.join(r['choices'])},{r['gold']}\n" for r in rows[:40]
        )
    )
    done = commands(section(README, "Your own task")) + commands(
        section(README, "Edit YAML and rerun")
    )
    assert len(done) == 12
    for argv in done:
        assert run_command(tiny(argv, words, copy, tmp_path)) == 0, (argv, capsys.readouterr().err)
        monkeypatch.chdir(tmp_path)  # the command moves to the repository
    for name in ("my_task", "my_other_task", "openbookqa"):
        assert (copy / f"export/{name}/adapter_model.safetensors").exists()
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 9
    assert (
        "mytask" in json.loads((tmp_path / "runs/mytask/report/results.json").read_text())["tasks"]
    )


def test_the_reliability_script(words, tmp_path, monkeypatch):
    """What `make reliability` does, on the tiny run: an undisturbed run, kills in different stages, equal outcomes."""
    import reliability

    monkeypatch.setattr(
        reliability, "WORDS", [*(w for w in words if not w.startswith("run=")), "stage=all"]
    )
    assert reliability.main(2, 0, str(tmp_path / "found.json"), str(tmp_path / "runs")) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["kills"] == found["equal"] == 2 and sum(found["per_stage"].values()) == 2


def test_make_targets_run_legal_commands(monkeypatch):
    """What `make demo`, `reproduce`, `reproduce-all` and the README's variables come to, without doing it."""
    monkeypatch.chdir(ROOT)
    shown = re.findall(
        r"^make (demo|reproduce\b.*|reproduce-all)$",
        "\n".join(re.findall(r"^```\n(.*?)^```", re.sub(r" +# .*", "", README), re.M | re.S)),
        re.M,
    )
    assert len(shown) >= 4
    for line in shown:
        made = subprocess.run(
            ["make", "-n", "-B", *shlex.split(line)], capture_output=True, text=True, check=True
        )
        found = commands(f"```\n{made.stdout}```\n")
        assert len(found) >= 3  # assets, check, all
        for argv in found:
            cfg, stage = load_config(argv)
            assert stage in STAGES


def test_every_stage_is_documented():
    """A stage the command has is named in the README."""
    assert [s for s in STAGES if f"`{s}`" not in README and f"stage={s}" not in README] == []


def test_every_metric_has_a_line_in_the_glossary():
    """What the code writes to metrics.jsonl is what the glossary explains, stage by stage, field by field."""
    written = set()
    for path in ROOT.glob("*.py"):
        for call in re.findall(r"run\.metric\(stage=\"(\w+)\",(.*?)\)\n", path.read_text(), re.S):
            fields = set(re.findall(r"(\w+)=", call[1])) - {
                "unit",
                "step",
                "method",
                "iteration",
                "task",
                "ndigits",
            }
            written |= {(call[0], f) for f in fields}
    rows = re.findall(
        r"^\| `stage: (\w+)`, `(\w+)` \|", section(README, "Metrics in `metrics.jsonl`"), re.M
    )
    assert set(rows) == written and len(rows) == len(set(rows))


def test_every_metric_of_the_results_has_a_line(full):
    """What results.json says of a method on a task, and of the chosen strategy, is in the second glossary."""
    tasks = json.loads((full / "report/results.json").read_text())["tasks"]
    fields = {k for t in tasks.values() for m in t["methods"].values() for k in m} | {
        "chance",
        "majority",
    }
    fields |= {k for t in tasks.values() for s in t["strategy"].values() if s for k in s} & {
        "wins",
        "losses",
        "gold_logp_gain",
    }
    listed = re.findall(
        r"`(\w+)`",
        " ".join(re.findall(r"^\| (`.*?) \|", section(README, "Metrics in `results.json`"), re.M)),
    )
    assert len(fields) > 10 and fields <= set(listed)


def test_every_file_is_on_the_list():
    """The README's reading order names each module once, and nothing that is not there; the tour names them all."""
    listed = re.findall(r"^(\w+\.py) ", section(README, "Files, in reading order"), re.M)
    modules = sorted(p.name for p in ROOT.glob("*.py"))
    assert sorted(listed) == modules
    tour = (ROOT / "docs/tour.md").read_text()
    assert [m for m in modules if f"`{m}`" not in tour and m != "assets.py"] == []


def test_troubleshooting_messages_exist():
    """Each message of the table is one the code can print."""
    code = " ".join(re.sub(r'"\s*\n\s*f?"', "", p.read_text()) for p in ROOT.glob("*.py"))
    for message in re.findall(r"^\| `([^`]+)`", section(README, "Troubleshooting"), re.M):
        for part in (p.strip() for p in re.split(r"…|\[…\]|\(key: a -> b\)", message)):
            assert part in code or part.replace("`", "") in code.replace("`", ""), part


def test_links_lead_somewhere():
    """Relative links of the documents point at files of the repository."""
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name}: {target}"
