"""Hostile and careless input: whatever comes in, a legal value or one clear refusal comes out."""

import csv
import io
import json
import math
import re
import string

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import policy
from config import FREE_MAPS, UserError, flatten, load_config, parse_yaml
from data import is_labelled, read_user_file
from lora import load_adapter
from policy import FAMILIES_OF
from runtime import read_json, read_jsonl, save_tensors
from strategies import parse_strategy, schema

settings.register_profile(
    "ours",
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("ours")

CFG, _ = load_config([])
FAMILIES = FAMILIES_OF["degaml_plus"](CFG)
KEYS = sorted(flatten(CFG.model_dump()))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


# ------------------------------------------------------------------------------------------------------ configuration


@given(st.text(max_size=200))
@example("a: [1, 2")
@example("- !!python/object/apply:os.system ['true']")
@example("a: &x [*x]")
@example("? [1]\n: 2")
def test_yaml_parses_or_is_refused(text):
    """Arbitrary text is a plain value or a UserError; tags that would build objects are refused."""
    try:
        value = parse_yaml(text, "fuzz")
    except UserError as e:
        assert "fuzz" in str(e)
    else:
        assert value is None or type(value).__module__ in ("builtins", "datetime")


@given(st.sampled_from(KEYS), JSON)
def test_any_value_of_any_key_is_typed_or_refused(key, value):
    """A key given anything at all is validated, or refused by its name and where it was given."""
    try:
        cfg, _ = load_config([f"{key}={json.dumps(value)}"])
    except UserError as e:
        assert (
            "command line" in str(e)
            or "configs/default.yaml" in str(e)
            or key in ("task", "run", *FREE_MAPS)
        )
    else:
        assert key in flatten(cfg.model_dump())


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=30), max_size=4))
def test_any_command_line_is_read_or_refused(words):
    """No words of a command line end in a traceback."""
    try:
        load_config(words)
    except UserError as e:
        assert str(e)


# --------------------------------------------------------------------------------------------------------- user files


@given(st.binary(max_size=300))
@example(b"\xff\xfe{}")
@example(b"[" * 5000)
@example(b'{"question": "q", "choices": ["a", "b"], "gold": 1e400}')
@example(b'{"question": "q", "choices": ["a", "b"], "gold": true}')
def test_any_bytes_as_jsonl(tmp_path, raw):
    """Arbitrary bytes are rows or a UserError that names the file."""
    file = tmp_path / "fuzz.jsonl"
    file.write_bytes(raw)
    for labels in (True, False):
        try:
            rows = read_user_file(file, labels=labels)
        except UserError as e:
            assert "fuzz.jsonl" in str(e)
        else:
            assert rows and (not labels or all(map(is_labelled, rows)))


ROW = st.fixed_dictionaries(
    {},
    optional={
        "id": st.text(max_size=4) | st.integers(),
        "question": JSON,
        "prompt": JSON,
        "context": JSON,
        "gold": JSON,
        "choices": st.lists(st.text(max_size=3), max_size=4) | JSON,
        "answer": JSON,
    },
)


@given(st.lists(ROW, min_size=1, max_size=4), st.booleans())
def test_any_rows_are_checked(tmp_path, rows, labels):
    """What passes has a question, a unique id, and a gold index that points at one of two or more options."""
    file = tmp_path / "fuzz.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    try:
        found = read_user_file(file, labels=labels)
    except UserError as e:
        assert "fuzz.jsonl:" in str(e)
        return
    assert len({r["id"] for r in found}) == len(found) == len(rows)
    for r in found:
        assert r["question"].strip()
        if "choices" in r:
            assert len(r["choices"]) >= 2 and all(c.strip() for c in r["choices"])
        if r.get("gold") is not None:
            assert type(r["gold"]) is int and 0 <= r["gold"] < len(r["choices"])


@given(st.lists(st.lists(st.text(max_size=6), max_size=5), max_size=4))
def test_any_cells_as_csv(tmp_path, table):
    """A CSV of arbitrary cells is rows or a UserError that names the file."""
    out = io.StringIO()
    csv.writer(out).writerows(table)
    file = tmp_path / "fuzz.csv"
    file.write_bytes(out.getvalue().encode("utf-8", "replace"))
    try:
        assert read_user_file(file, labels=False)
    except UserError as e:
        assert "fuzz.csv" in str(e)


# ------------------------------------------------------------------------------------------------------- model output

NAMES = st.sampled_from(
    ["family", *sorted({n for f in schema(CFG.strategies).values() for n in f}), "extra"]
)
VALUES = (
    st.sampled_from(
        [
            *FAMILIES,
            "none",
            "ttl",
            0,
            -1,
            1,
            5,
            1e9,
            10**30,
            math.nan,
            math.inf,
            0.5,
            "lm",
            "3",
            True,
            None,
            [],
            {},
        ]
    )
    | JSON
)


@given(st.one_of(st.text(max_size=120), st.dictionaries(NAMES, VALUES, max_size=8).map(json.dumps)))
@example('{"family": "TTT", "ttl_steps": 1e308}')
@example("{" * 3000)
@example('{"family": "LORA", "lambda": NaN}')
@example('{"family": ["TTT"]}')
def test_no_proposal_exceeds_the_bounds(text):
    """What a model writes is a strategy inside the action space, or a ValueError: it can ask for no more compute."""
    try:
        s = parse_strategy(text, CFG.strategies, FAMILIES)
    except ValueError:
        return
    spec = schema(CFG.strategies)[s.family]
    assert s.family in FAMILIES and set(dict(s.fields)) == set(spec)
    for name, value in s.fields:
        if "minimum" in spec[name]:
            assert math.isfinite(value) and spec[name]["minimum"] <= value <= spec[name]["maximum"]
        elif "enum" in spec[name]:
            assert value in spec[name]["enum"]


def test_model_output_is_data(monkeypatch):
    """Nothing that reads model output can run it."""
    source = "".join(
        open(m.__file__).read() for m in (policy, __import__("strategies"), __import__("scoring"))
    )
    assert (
        re.findall(
            r"(?<![.\w])(?:eval|exec|compile|__import__)\(|subprocess|os\.system|pickle", source
        )
        == []
    )


# ---------------------------------------------------------------------------------------------------------- run files


@given(st.binary(max_size=400))
@example(b"")
@example(b"\xff" * 8 + b"{}")
@example((10**15).to_bytes(8, "little") + b"{}")
@example(b"\x80\x04\x95" + b"cos\nsystem\n(S'true'\ntR.")
def test_any_bytes_as_an_adapter(tmp_path, tiny_lm_once, raw):
    """Bytes that are no safetensors file of the right shapes are refused by name, and never unpickled."""
    (tmp_path / "adapter_model.safetensors").write_bytes(raw)
    with pytest.raises(UserError, match=r"adapter_model\.safetensors"):
        load_adapter(tmp_path, tiny_lm_once)


@given(
    st.dictionaries(
        st.text(string.ascii_letters + "._", min_size=1, max_size=12), st.integers(1, 5), max_size=4
    )
)
def test_any_tensors_as_an_adapter(tmp_path, tiny_lm_once, sizes):
    """Well-formed tensors of other names or shapes are refused, naming one of them."""
    import torch

    save_tensors(
        tmp_path / "adapter_model.safetensors", {k: torch.zeros(n) for k, n in sizes.items()}
    )
    with pytest.raises(UserError, match="belongs to another model"):
        load_adapter(tmp_path, tiny_lm_once)


@given(st.binary(max_size=100))
def test_any_bytes_as_records(tmp_path, raw):
    """Damaged JSON of a run folder is named, whatever it holds."""
    for name, read in (("a.json", read_json), ("a.jsonl", read_jsonl)):
        (tmp_path / name).write_bytes(raw)
        try:
            read(tmp_path / name)
        except UserError as e:
            assert name in str(e)


@pytest.fixture(scope="module")
def tiny_lm_once(tiny_model_dir):
    """The tiny model's layout."""
    import torch
    from conftest import MODULES

    from lora import find_layout
    from scoring import load_base

    return find_layout(
        load_base(str(tiny_model_dir), "main", torch.float32, "cpu")[0], 4, 8, 16, MODULES
    )
