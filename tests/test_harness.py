"""Log-likelihoods beside the real lm-evaluation-harness, where it is installed: `make harness`."""

import json
import shlex

import pytest
import torch
from conftest import run_command

import config
import data
import lora
import scoring
from runtime import Run

pytest.importorskip("lm_eval", reason="make harness installs it")
CFG, _ = config.load_config(["dtype=float32", "device=cpu"])
TASKS = CFG.data.train_tasks + CFG.data.test_tasks


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return Run(tmp_path_factory.mktemp("harness"), CFG, dtype=torch.float32)


@pytest.fixture(scope="module")
def harness():
    """The embedded model as the harness has it, also in float32 on the CPU."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=CFG.model.name, device="cpu", dtype="float32", batch_size=1)


@pytest.mark.parametrize("task", TASKS)
def test_same_requests_same_answers(run, harness, task):
    """Every option's summed log-probability is that of HFLM.loglikelihood within 1e-3."""
    from lm_eval.api.instance import Instance

    assert len(TASKS) == 12
    shortest_first = sorted(data.load_tasks(run)[task].test, key=lambda e: len(e.prompt))
    examples = shortest_first[40:44]
    requests = []
    for example in examples:
        for option in example.options:
            pair = (example.prompt, f" {option}")
            if example.suffix:
                pair = (f"{example.prompt} {option}", example.suffix)
            requests.append(Instance("loglikelihood", {}, pair, 0))
    theirs = [found[0] for found in harness.loglikelihood(requests, disable_tqdm=True)]

    ours = []
    for scores in scoring.score_examples(scoring.load_lm(run), None, examples):
        ours += scores.raw
    assert len(ours) == len(theirs) >= 8
    assert ours == pytest.approx(theirs, rel=0, abs=1e-3)


def test_an_exported_folder_as_its_line_says(copy, capsys):
    """`--model_args` of the printed line, as the harness itself reads it: the adapter's answers."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    assert run_command([f"run={copy}", "stage=export", "task=delta", "method=generator"]) == 0
    lines = capsys.readouterr().out.splitlines()
    [line] = [line for line in lines if line.strip().startswith("lm-eval ")]
    words = shlex.split(line)
    settings = json.loads(words[words.index("--model_args") + 1])
    adapted = HFLM(**settings, device="cpu", dtype="float32", batch_size=1)

    cfg, _ = config.load_config([f"run={copy}", "stage=export", "task=delta"])
    run = Run(copy, cfg)
    lm = scoring.load_lm(run)
    examples = data.load_task(cfg, "delta").test[:4]
    adapter = lora.load_adapter(copy / "export/delta", lm.layout)
    requests = []
    ours = []
    for example, scores in zip(
        examples, scoring.score_examples(lm, adapter, examples), strict=True
    ):
        ours += scores.raw
        for option in example.options:
            requests.append(Instance("loglikelihood", {}, (example.prompt, f" {option}"), 0))
    theirs = [found[0] for found in adapted.loglikelihood(requests, disable_tqdm=True)]
    assert ours == pytest.approx(theirs, rel=0, abs=1e-3)
