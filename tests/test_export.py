"""The exported folder elsewhere, and strangers' folders here."""

import json
import os
import shlex

import pytest
import torch
from test_own_task import change_json, export, fresh_rows, predict, write_rows

import export as export_room
import lora
import scoring
from config import UserError, load_config
from runtime import Run, read_json, read_jsonl

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Another folder, to which the working directory is moved by `go()`."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    return lambda: monkeypatch.chdir(folder)


def run_of(copy):
    cfg, _ = load_config([f"run={copy}", "stage=export", "task=delta"])
    return Run(copy, cfg)


def logits_of(model, tokenizer):
    ids = tokenizer("Question: why?\nAnswer:", return_tensors="pt")
    with torch.no_grad():
        return model(**ids).logits[0, -1]


def printed(capsys):
    """{tool: command} of the lines that `export` prints."""
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("adapter: "))
    return {line[:16].strip(): line[16:] for line in lines[start + 1 :]}


def test_other_tools_load_it_from_any_folder(copy, elsewhere, capsys):
    """D1: transformers and PEFT find base model and adapter, and compute what we do."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    assert export(copy, "task=delta", "method=generator") == 0
    folder = copy / "export/delta"
    run = run_of(copy)
    lm = scoring.load_lm(run)
    lora.swap_adapter(lm.model, lm.layout, lora.load_adapter(folder, lm.layout))
    ours = logits_of(lm.model, lm.tokenizer)
    lora.clear_adapters(lm.model)
    base = logits_of(lm.model, lm.tokenizer)
    elsewhere()
    for kind in (AutoPeftModelForCausalLM, AutoModelForCausalLM):
        model = kind.from_pretrained(str(folder), dtype=torch.float32)
        theirs = logits_of(model, lm.tokenizer)
        torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=0)
        assert (theirs - base).abs().max() > 1e-3


def test_printed_lines_are_quoted_and_whole(copy, tmp_path, elsewhere, capsys):
    """D3, D2: spaces, commas and signs in a name survive a shell; vLLM gets a rank of its own."""
    out = tmp_path / "my adapter, v=2's"
    assert export(copy, "task=delta", "method=generator", f"output={out}") == 0
    lines = printed(capsys)
    assert {"PEFT", "transformers", "vLLM", "lm-eval", "llama.cpp", "Ollama"} < set(lines)
    elsewhere()
    for tool in ("PEFT", "transformers"):
        python, flag, code = shlex.split(lines[tool])
        assert (python, flag) == ("python", "-c")
        exec(code, {})  # noqa: S102
    vllm = shlex.split(lines["vLLM"])
    assert vllm[vllm.index("--max-lora-rank") + 1] == "8"  # the model's rank is 4
    assert json.loads(vllm[-1])["path"] == str(out)
    harness = shlex.split(lines["lm-eval"])
    assert json.loads(harness[harness.index("--model_args") + 1])["peft"] == str(out)
    converter = shlex.split(lines["GGUF adapter"])
    assert converter[-1] == str(out) and os.path.isdir(converter[3])
    here = shlex.split(lines["here"])
    assert f"adapter={out}" in here and os.path.isfile(here[1])


@pytest.mark.parametrize("rank, legal", [(1, 1), (2, 8), (8, 8), (9, 16), (300, 320), (999, 512)])
def test_a_rank_that_vllm_can_serve(rank, legal):
    """The smallest of its ranks that holds the adapter."""
    assert export_room.vllm_rank(rank) == legal


def test_card_says_what_it_is_and_what_it_is_worth(copy):
    """D5: base model, licence, prompt form with an example, held-out table, verdict, command."""
    assert export(copy, "task=delta") == 0
    card = (copy / "export/delta/README.md").read_text()
    facts = read_json(copy / "export/delta/strategy.json")
    assert card.startswith(f"---\nbase_model: {facts['base_model']}\nlibrary_name: peft\n")
    assert os.path.isabs(facts["base_model"])
    for part in ("licence of the base model", "Question: Row", "verdict: ", "12 held-out rows"):
        assert part in card
    assert "stage=adapt" in card and "vllm serve" in card and "moves the logits by" in card


def test_configuration_is_that_of_peft(copy, tmp_path):
    """What PEFT's own LoraConfig writes, in an order that does not change."""
    from peft import LoraConfig

    assert export(copy, "task=delta") == 0
    folder = copy / "export/delta"
    settings = LoraConfig.from_pretrained(folder)
    settings.save_pretrained(tmp_path)
    ours = read_json(folder / "adapter_config.json")
    theirs = read_json(tmp_path / "adapter_config.json")
    assert ours["target_modules"] == sorted(theirs["target_modules"])
    assert ours == {**theirs, "target_modules": ours["target_modules"]}


def scores(copy, folder, new, answers):
    assert predict(copy, new, answers, f"adapter={folder}") == 0
    return [row["logprobs"] for row in read_jsonl(answers)]


@pytest.mark.parametrize("change", [{"lora_alpha": 32}, {"use_rslora": True}])
def test_scale_follows_the_configuration(copy, tmp_path, change):
    """A4: a folder whose alpha or rsLoRA is changed by hand scores as PEFT scores it."""
    from peft import AutoPeftModelForCausalLM

    new = write_rows(tmp_path / "new.jsonl", fresh_rows(4))
    answers = tmp_path / "answers.jsonl"
    assert export(copy, "task=delta", "method=generator") == 0
    folder = copy / "export/delta"
    before = scores(copy, folder, new, answers)
    change_json(folder / "adapter_config.json", **change)
    after = scores(copy, folder, new, answers)
    assert before != after

    run = run_of(copy)
    changed, _, _, refined = export_room.load_exported(folder, run)
    lm = scoring.load_lm(changed)
    lora.swap_adapter(lm.model, lm.layout, refined.adapters[0])
    theirs = AutoPeftModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    torch.testing.assert_close(
        logits_of(lm.model, lm.tokenizer), logits_of(theirs, lm.tokenizer), atol=1e-4, rtol=0
    )


def strangers(folder, base, **settings):
    """An adapter as PEFT itself makes and saves it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    options = {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "down_proj"]} | settings
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(folder)
    return adapted.eval()


def test_a_strangers_adapter_is_scored(copy, tmp_path):
    """Another rank, alpha and modules than the run's: as PEFT computes it."""
    run = run_of(copy)
    folder = tmp_path / "theirs"
    theirs = strangers(folder, run.cfg.model.name)
    changed, name, options, refined = export_room.load_exported(folder, run)
    assert (name, options) == ("theirs", ())
    lm = scoring.load_lm(changed)
    lora.swap_adapter(lm.model, lm.layout, refined.adapters[0])
    torch.testing.assert_close(
        logits_of(lm.model, lm.tokenizer), logits_of(theirs, lm.tokenizer), atol=1e-4, rtol=0
    )
    new = write_rows(tmp_path / "new.jsonl", fresh_rows(3))
    assert predict(copy, new, tmp_path / "out.jsonl", f"adapter={folder}") == 0


@pytest.mark.parametrize(
    "settings, complaint",
    [
        ({"use_dora": True}, "use_dora is True, which is more than a plain LoRA"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save is"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern is"),
        ({"layers_to_transform": [0]}, "layers_to_transform is"),
    ],
)
def test_more_than_a_plain_lora_is_refused(copy, tmp_path, settings, complaint):
    """By the name of what it has beyond A and B."""
    run = run_of(copy)
    strangers(tmp_path / "theirs", run.cfg.model.name, **settings)
    with pytest.raises(UserError, match=complaint):
        export_room.load_exported(tmp_path / "theirs", run)


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"base_model_name_or_path": "org/another-model"}, "made for the base model org/another-"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"peft_type": None}, "peft_type is None"),
    ],
)
def test_another_base_or_kind_is_refused(copy, tmp_path, capsys, change, complaint):
    """Exit status 2 and one sentence."""
    run = run_of(copy)
    folder = tmp_path / "theirs"
    strangers(folder, run.cfg.model.name)
    change_json(folder / "adapter_config.json", **change)
    new = write_rows(tmp_path / "new.jsonl", fresh_rows(3))
    assert predict(copy, new, tmp_path / "out.jsonl", f"adapter={folder}") == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()
