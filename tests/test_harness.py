"""Log-likelihoods beside the real lm-evaluation-harness, where it is installed: `make harness`."""

import pytest
import torch

from config import load_config
from data import load_tasks
from runtime import Run
from scoring import load_lm, score_examples

lm_eval = pytest.importorskip("lm_eval", reason="make harness installs it")


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """(our model, the harness' model, tasks) of the embedded preset, both in float32 on the CPU."""
    from lm_eval.models.huggingface import HFLM

    cfg, _ = load_config(["dtype=float32", "device=cpu"])
    run = Run(tmp_path_factory.mktemp("harness"), cfg, dtype=torch.float32)
    return (
        load_lm(run),
        HFLM(pretrained=cfg.model.name, device="cpu", dtype="float32", batch_size=1),
        load_tasks(run),
    )


@pytest.mark.parametrize(
    "task",
    [
        "arc_c",
        "arc_e",
        "hellaswag",
        "boolq",
        "piqa",
        "winogrande",
        "gsm8k",
        "math",
        "divlogic",
        "socialiqa",
        "codemmlu",
        "jama",
    ],
)
def test_same_requests_same_answers(sides, task):
    """Every option's summed log-probability is that of HFLM.loglikelihood within 1e-3."""
    from lm_eval.api.instance import Instance

    lm, harness, tasks = sides
    examples = sorted(tasks[task].test, key=lambda e: len(e.prompt))[40:44]
    pairs = [
        (f"{e.prompt} {o}", e.suffix) if e.suffix else (e.prompt, " " + o)
        for e in examples
        for o in e.options
    ]
    requests = [Instance(request_type="loglikelihood", doc={}, arguments=p, idx=0) for p in pairs]
    theirs = [x[0] for x in harness.loglikelihood(requests, disable_tqdm=True)]
    ours = [x for s in score_examples(lm, None, examples) for x in s.raw]
    assert len(ours) == len(theirs) >= 8
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-3
