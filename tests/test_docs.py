"""The documents say what is so: examples run, commands parse, lists are complete."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
from conftest import ROOT, run_command, tiny_rows

import config
import runtime
from config import load_config
from degaml import STAGES

DOCS = {path.name: path.read_text() for path in (ROOT / "README.md", *ROOT.glob("docs/*.md"))}
README = DOCS["README.md"]
ALL = "\n".join(DOCS.values())
# fields of a line of metrics.jsonl that say where it belongs, and a keyword of round()
NO_METRICS = {"unit", "step", "method", "iteration", "task", "ndigits"}


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    """Paths in the documents are relative to it."""
    monkeypatch.chdir(ROOT)


def section(text: str, title: str) -> str:
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", text, re.M | re.S)[1]


def blocks(text: str, language: str = "") -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S)
    return [body for of, body in found if of == language]


def commands(text: str) -> list[list[str]]:
    """The words of every `python degaml.py` and torchrun line in code blocks."""
    lines = "".join(blocks(text)).replace("\\\n", " ").splitlines()
    found = [re.search(r"(?:python|torchrun[^#]*?) degaml\.py ([^;]*)", line) for line in lines]
    return [shlex.split(match[1], comments=True) for match in found if match]


def run_python(code: str, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)


def apply_patch(diff: str, folder: Path) -> None:
    """Apply hunks by their text: each must occur exactly once, as a reader would look it up."""
    for part in re.split(r"^--- .*\n", diff, flags=re.M)[1:]:
        name, *hunks = re.split(r"^@@.*\n", part, flags=re.M)
        path = folder / name.removeprefix("+++ b/").strip()
        text = path.read_text() if path.exists() else ""
        for hunk in hunks:
            lines = hunk.splitlines()
            old = "".join(line[1:] + "\n" for line in lines if not line.startswith("+"))
            new = "".join(line[1:] + "\n" for line in lines if not line.startswith("-"))
            assert not old or text.count(old) == 1, f"{path.name} does not hold this once:\n{old}"
            text = text.replace(old, new) if old else new
        path.write_text(text)


@pytest.mark.parametrize("title", ["Add a strategy", "Add a task", "Add a base model"])
def test_worked_examples(tmp_path, title):
    """The patch applies to the code as it is, and its check passes."""
    for path in (*Path().glob("*.py"), *Path().glob("configs/*")):
        copy = tmp_path / path
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(path, copy)
    text = section(DOCS["extend.md"], title)
    [check] = blocks(text, "python")
    [diff] = blocks(text, "diff")

    before = run_python(check, tmp_path)
    assert before.returncode != 0, "the check passes without the patch: it checks nothing"

    apply_patch(diff, tmp_path)
    after = run_python(check, tmp_path)
    assert after.returncode == 0, after.stderr


def test_the_adapter_loads_as_shown(full, tiny_model_dir):
    """The README's five lines of Python, with the tiny run's adapter and model."""
    [code] = blocks(README, "python")
    code = code.replace("runs/demo/adapted/degaml_plus/arc_e", f"{full}/adapted/degaml_plus/alpha")
    code = code.replace("assets/models/smollm2-135m-instruct", str(tiny_model_dir))
    done = run_python(code, ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("words", commands(ALL), ids=" ".join)
def test_commands_are_legal(words, monkeypatch):
    """Every command shown parses: stages exist, keys are known, values are in range."""
    monkeypatch.setattr(config, "_trained_run", lambda run: "configs/demo.yaml")
    assert load_config(words)[1] in STAGES


def write_own_files(folder: Path) -> None:
    """What the reader has: a task as JSON lines, as CSV and as a hub data set, and new inputs."""
    rows = pandas.DataFrame(tiny_rows("alpha", 140))
    rows["question"] = "Own case. " + rows["question"]
    for name, count in {"my_task": 140, "new": 9}.items():
        rows.head(count).to_json(folder / f"{name}.jsonl", orient="records", lines=True)
    (folder / "openbookqa").mkdir()
    theirs = {"question": "question_stem", "gold": "answerKey"}
    openbook = rows.head(60).rename(columns=theirs)
    openbook.to_json(folder / "openbookqa/train.jsonl", orient="records", lines=True)
    rows[["A", "B"]] = rows.pop("choices").tolist()
    rows.head(40).to_csv(folder / "my_other_task.csv", index=False)


def test_commands_run(copy, words, tmp_path, monkeypatch, capsys):
    """The commands for one machine, in order, in a user's own folder, on the tiny run and model."""
    write_own_files(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for name in ("demo", "smollm2"):
        (tmp_path / name).symlink_to(copy)
    shown = DOCS["own-task.md"] + section(README, "Your own task")
    shown += section(README, "Edit YAML and rerun")
    shown = shown.replace("hf:allenai/openbookqa/main", "hf:openbookqa")  # a folder
    shown = shown.replace("=runs/", f"={tmp_path}/").replace("=divlogic", "=delta")
    [files] = [word for word in words if word.startswith("data.jsonl=")]
    mine = files.replace("{", f'{{"mytask": "{tmp_path}/my_task.jsonl", ')
    shown = shown.replace("data.jsonl='{mytask: my_task.jsonl}'", f"'{mine}'")

    assert len(commands(shown)) == 14
    for argv in commands(shown):
        if "config=configs/smollm2.yaml" in argv and argv[0] != "stage=doctor":
            argv.remove("config=configs/smollm2.yaml")
            argv = [*words, *argv]
        argv = [f"run={tmp_path}/demo", "device=cpu", *argv]
        monkeypatch.chdir(tmp_path)  # each command moves to the repository
        assert run_command(argv) == 0, (argv, capsys.readouterr().err)

    for name in ("my_task", "my_other_task", "openbookqa"):
        assert (copy / f"export/{name}/adapter_model.safetensors").exists()
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 9
    results = runtime.read_json(tmp_path / "mytask/report/results.json")
    assert "mytask" in results["tasks"]


def test_the_reliability_script(words, tmp_path, monkeypatch):
    """What `make reliability` does, on the tiny run: kills in different stages, equal outcomes."""
    import reliability

    small = [word for word in words if not word.startswith("run=")]
    monkeypatch.setattr(reliability, "WORDS", [*small, "stage=all"])
    assert reliability.main(2, 0, str(tmp_path / "found.json"), str(tmp_path / "runs")) == 0
    found = runtime.read_json(tmp_path / "found.json")
    assert found["kills"] == found["equal"] == sum(found["per_stage"].values()) == 2


def test_make_targets(monkeypatch):
    """Every target named is there; what `make demo` and `make reproduce` come to is legal."""
    monkeypatch.setattr(config, "_trained_run", lambda run: "configs/demo.yaml")
    targets = re.findall(r"^([a-z-]+):", Path("Makefile").read_text(), re.M)
    shown = re.findall(r"(?:`|^)make (([a-z-]+)[^`#\n]*)", ALL, re.M)
    assert len(shown) > 20
    for line, target in shown:
        assert target in targets
        if target in ("demo", "reproduce", "reproduce-all"):
            make = ["make", "-n", "-B", *shlex.split(line)]
            made = subprocess.check_output(make, text=True).replace("$seed", "1")
            found = commands(f"```\n{made}```\n")
            stages = [load_config(argv)[1] for argv in found]
            assert {"assets", "check", "all"} <= set(stages) <= set(STAGES)


def test_every_metric_has_a_line_in_the_glossary():
    """What the code writes to metrics.jsonl is what the glossary explains, field by field."""
    written = set()
    for path in ROOT.glob("*.py"):
        calls = re.findall(r"run\.metric\(\s*stage=\"(\w+)\",(.*?)\)\n", path.read_text(), re.S)
        for stage, fields in calls:
            written.update((stage, name) for name in re.findall(r"(\w+)=", fields))
    glossary = section(DOCS["metrics.md"], "Metrics in `metrics.jsonl`")
    rows = re.findall(r"^\| `stage: (\w+)`, `(\w+)` \|", glossary, re.M)
    assert sorted(rows) == sorted(row for row in written if row[1] not in NO_METRICS)


def test_every_metric_of_the_results_has_a_line(full):
    """What results.json says of a method, a task and a strategy is in the second glossary."""
    fields = {"chance", "majority"}
    for task in runtime.read_json(full / "report/results.json")["tasks"].values():
        fields = fields.union(*task["methods"].values())
        for strategy in filter(None, task["strategy"].values()):
            fields |= {"wins", "losses", "gold_logp_gain"} & set(strategy)
    glossary = section(DOCS["metrics.md"], "Metrics in `results.json`")
    first_cells = " ".join(re.findall(r"^\| (`.*?) \|", glossary, re.M))
    assert len(fields) > 10 and fields <= set(re.findall(r"`(\w+)`", first_cells))


def test_every_file_and_stage_is_named():
    """The README's tree has each module once and no other; the tour names all, and every stage."""
    listed = re.findall(r"^(\w+\.py) ", section(README, "Where things are"), re.M)
    modules = sorted(path.name for path in ROOT.glob("*.py"))
    assert sorted(listed) == modules
    for name in [*modules, *STAGES]:
        assert f"`{name}`" in DOCS["tour.md"]


def test_the_tour_names_what_exists():
    """`module.name()` of the documents is a function or a class of that module."""
    for module, name in re.findall(r"`(\w+)\.(\w+)\(\)`", ALL):
        code = Path(f"{module}.py").read_text()
        assert re.search(rf"^(?:def|class) {name}\b", code, re.M), f"{module}.{name}"


def test_troubleshooting_messages_exist():
    """Each message of the table is one the code can print."""
    code = "".join(path.read_text() for path in ROOT.glob("*.py")).replace("`", "")
    code = re.sub(r'"\s*\n\s*f?"', "", code)
    for message in re.findall(r"^\| `([^`]+)`", DOCS["troubleshooting.md"], re.M):
        for part in re.split(r"…|\[…\]|\(key: a -> b\)", message):
            assert part.strip() in code, part


def test_readme_is_short():
    assert len(README) <= 12_000


def test_links_lead_somewhere():
    """Relative links and pictures of the documents point at files of the repository."""
    for name, text in DOCS.items():
        folder = ROOT if name == "README.md" else ROOT / "docs"
        for target in re.findall(r'(?:\]\(|src="|srcset=")(?!https?:)([^)#"]+)', text):
            assert (folder / target).exists(), f"{name}: {target}"
