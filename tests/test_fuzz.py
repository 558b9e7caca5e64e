"""Hostile and careless input: whatever comes in, a legal value or one clear refusal comes out."""

import csv
import io
import json
import math
import re
import string
from pathlib import Path

import pytest
import torch
from conftest import MODULES
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import config
import lora
import methods
import policy
import records
import runtime
import scoring
import strategies
from config import UserError

settings.register_profile(
    "ours",
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("ours")

CFG, _ = config.load_config([])
FAMILIES = methods.families_of("degaml_plus", CFG.policy.families)
KEYS = sorted(config.flatten(CFG.model_dump()))
SCHEMA = strategies.schema(CFG.strategies)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


# Configuration


@given(st.text(max_size=200))
@example("a: [1, 2")
@example("- !!python/object/apply:os.system ['true']")
@example("a: &x [*x]")
@example("? [1]\n: 2")
def test_yaml_parses_or_is_refused(text):
    """Arbitrary text is a plain value or a UserError; tags that would build objects are refused."""
    try:
        value = config.parse_yaml(text, "fuzz")
    except UserError as e:
        assert "fuzz" in str(e)
    else:
        assert value is None or type(value).__module__ in ("builtins", "datetime")


@given(st.sampled_from(KEYS), JSON)
def test_any_value_of_any_key_is_typed_or_refused(key, value):
    """A key given anything at all is validated, or refused by its name and where it was given."""
    try:
        cfg, _ = config.load_config([f"{key}={json.dumps(value)}"])
    except UserError as e:
        named = "command line" in str(e) or "configs/default.yaml" in str(e)
        assert named or key in ("task", "run", *config.FREE_MAPS)
    else:
        assert key in config.flatten(cfg.model_dump())


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=30), max_size=4))
def test_any_command_line_is_read_or_refused(words):
    """No words of a command line end in a traceback."""
    try:
        config.load_config(words)
    except UserError as e:
        assert str(e)


# The user's files


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
            rows = records.read_file(file, labels=labels)
        except UserError as e:
            assert "fuzz.jsonl" in str(e)
        else:
            assert rows and (not labels or all(map(records.is_labelled, rows)))


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
    """What passes has a question, a unique id, and a gold index of one of two or more options."""
    file = tmp_path / "fuzz.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    try:
        found = records.read_file(file, labels=labels)
    except UserError as e:
        assert "fuzz.jsonl:" in str(e)
        return
    assert len({row["id"] for row in found}) == len(found) == len(rows)
    for row in found:
        assert row["question"].strip()
        if "choices" in row:
            assert len(row["choices"]) >= 2 and all(choice.strip() for choice in row["choices"])
        if row.get("gold") is not None:
            assert type(row["gold"]) is int and 0 <= row["gold"] < len(row["choices"])


@given(st.lists(st.lists(st.text(max_size=6), max_size=5), max_size=4))
def test_any_cells_as_csv(tmp_path, table):
    """A CSV of arbitrary cells is rows or a UserError that names the file."""
    out = io.StringIO()
    csv.writer(out).writerows(table)
    file = tmp_path / "fuzz.csv"
    file.write_bytes(out.getvalue().encode("utf-8", "replace"))
    try:
        assert records.read_file(file, labels=False)
    except UserError as e:
        assert "fuzz.csv" in str(e)


# What a model writes

NAMES = st.sampled_from(["family", *sorted(set().union(*SCHEMA.values())), "extra"])
NUMBERS = st.sampled_from([0, -1, 1, 5, 1e9, 10**30, math.nan, math.inf, 0.5])
WORDS = st.sampled_from([*FAMILIES, "none", "ttl", "lm", "3"])
VALUES = NUMBERS | WORDS | JSON


@given(st.one_of(st.text(max_size=120), st.dictionaries(NAMES, VALUES, max_size=8).map(json.dumps)))
@example('{"family": "TTT", "ttl_steps": 1e308}')
@example("{" * 3000)
@example('{"family": "LORA", "lambda": NaN}')
@example('{"family": ["TTT"]}')
def test_no_proposal_exceeds_the_bounds(text):
    """What a model writes is a strategy inside the action space, or a ValueError: it can ask for no
    more compute."""
    try:
        strategy = strategies.parse_strategy(text, CFG.strategies, FAMILIES)
    except ValueError:
        return
    spec = SCHEMA[strategy.family]
    assert strategy.family in FAMILIES and set(dict(strategy.fields)) == set(spec)
    for name, value in strategy.fields:
        rule = spec[name]
        if "minimum" in rule:
            assert math.isfinite(value) and rule["minimum"] <= value <= rule["maximum"]
        elif "enum" in rule:
            assert value in rule["enum"]


def test_model_output_is_data():
    """Nothing that reads model output can run it."""
    runs_it = r"(?<![.\w])(?:eval|exec|compile|__import__)\(|subprocess|os\.system|pickle"
    for module in (policy, strategies, scoring):
        assert re.findall(runs_it, Path(module.__file__).read_text()) == []


# Files of a run folder


@given(st.binary(max_size=400))
@example(b"")
@example(b"\xff" * 8 + b"{}")
@example((10**15).to_bytes(8, "little") + b"{}")
@example(b"\x80\x04\x95" + b"cos\nsystem\n(S'true'\ntR.")
def test_any_bytes_as_an_adapter(tmp_path, tiny_layout, raw):
    """Bytes that are no safetensors file of the right shapes are refused by name, and never
    unpickled."""
    (tmp_path / "adapter_model.safetensors").write_bytes(raw)
    with pytest.raises(UserError, match=r"adapter_model\.safetensors"):
        lora.load_adapter(tmp_path, tiny_layout)


TENSOR_NAMES = st.text(string.ascii_letters + "._", min_size=1, max_size=12)


@given(st.dictionaries(TENSOR_NAMES, st.integers(1, 5), max_size=4))
def test_any_tensors_as_an_adapter(tmp_path, tiny_layout, sizes):
    """Well-formed tensors of other names or shapes are refused, naming one of them."""
    tensors = {name: torch.zeros(size) for name, size in sizes.items()}
    runtime.save_tensors(tmp_path / "adapter_model.safetensors", tensors)
    with pytest.raises(UserError, match="belongs to another model"):
        lora.load_adapter(tmp_path, tiny_layout)


@given(st.binary(max_size=100))
def test_any_bytes_as_records(tmp_path, raw):
    """Damaged JSON of a run folder is named, whatever it holds."""
    for name, read in (("a.json", runtime.read_json), ("a.jsonl", runtime.read_jsonl)):
        (tmp_path / name).write_bytes(raw)
        try:
            read(tmp_path / name)
        except UserError as e:
            assert name in str(e)


@pytest.fixture(scope="module")
def tiny_layout(tiny_model_dir):
    """The tiny model's layout."""
    model, _ = scoring.load_base(str(tiny_model_dir), "main", torch.float32, "cpu")
    return lora.find_layout(model, 4, 8, 16, MODULES)
