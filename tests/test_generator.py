"""Prompt states, the hyper-convolutional decoder, its training and generation, on tiny models."""

import contextlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import MADE, make_run
from torch import nn

import collect
import conditions
import config
import data
import generator
import lora
import runtime
import scoring
from config import UserError
from generator import HyperConvDecoder, HyperConvLayer
from runtime import Run

DELTA = "data.targets=[delta]"  # one generator alone, of all tasks


@pytest.fixture
def twin(collected, tmp_path) -> str:
    """Word that names a copy of that folder."""
    shutil.copytree(tmp_path / "run", tmp_path / "twin")
    return f"run={tmp_path / 'twin'}"


def train(words: list[str], *more: str) -> dict[str, bytes]:
    """{left-out set: the bytes of its generator}."""
    run = make_run(words, *more)
    generator.train_generators(run)
    found = {}
    for path in run.path.glob("generator/*/generator.safetensors"):
        found[path.parent.name] = path.read_bytes()
    return found


class Killed(BaseException):
    """Stands for a process that ends without a chance to tidy up."""


@contextlib.contextmanager
def killed_at(step: int):
    """Kill training when it asks for the pairs of a step; yields the steps it asked for."""
    real = generator.draw_pairs
    asked = []

    def draw_pairs(cfg, states, targets, at):
        asked.append(at)
        if at == step:
            raise Killed
        return real(cfg, states, targets, at)

    generator.draw_pairs = draw_pairs
    try:
        with contextlib.suppress(Killed):
            yield asked
    finally:
        generator.draw_pairs = real


def pooled_by_its_first_token(encoder: Path, folder: Path) -> str:
    """A whole sentence-transformers model, which by itself reads eight tokens at most."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    transformer = SentenceTransformer(str(encoder))[0]
    transformer.max_seq_length = 8
    SentenceTransformer(modules=[transformer, Pooling(32, "cls")]).save(str(folder))
    return str(folder)


def in_hub_cache(encoder: Path, cache: Path) -> str:
    """The hub id of an encoder that was downloaded before."""
    folder = cache / "models--some--encoder"
    shutil.copytree(encoder, folder / "snapshots/abc")
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("abc")
    return "some/encoder"


@pytest.mark.parametrize("place", [None, pooled_by_its_first_token, in_hub_cache])
def test_encoder_states(tiny_args, tiny_encoder_dir, tmp_path, monkeypatch, capfd, place):
    """Bit for bit the last hidden layer of transformers, at all L positions, and its own mean."""
    from huggingface_hub import constants
    from transformers import AutoModel, AutoTokenizer

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "made"))
    name = place(tiny_encoder_dir, tmp_path / "made") if place else str(tiny_encoder_dir)
    run = make_run(tiny_args, f"generator.encoder={name}")
    texts = ["Is the river near the stone?", "candle", "which word follows the copper? " * 9]
    capfd.readouterr()
    states, pooled = conditions.encode_texts(run, texts)
    assert capfd.readouterr() == ("", ""), "no progress bar, no warning"

    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder_dir)
    model = AutoModel.from_pretrained(tiny_encoder_dir).eval()
    padding = {"padding": "max_length", "truncation": True, "max_length": 16}
    tokens = tokenizer(texts, return_tensors="pt", **padding)
    with torch.no_grad():
        hidden = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None]
    mean = (hidden * mask).sum(1) / mask.sum(1)
    assert torch.equal(states, hidden.half())
    assert torch.equal(pooled, F.normalize(mean, dim=-1))


def test_embeddings_of_a_half_precision_encoder_are_float32(tiny_encoder_dir, tiny_args, tmp_path):
    """An encoder that is stored in float16 is loaded in it, and a GPU takes no distances in it."""
    from transformers import AutoModel

    folder = tmp_path / "half"
    shutil.copytree(tiny_encoder_dir, folder)
    AutoModel.from_pretrained(tiny_encoder_dir).half().save_pretrained(folder)
    texts = ["Is the river near the stone?", "candle"]
    _, pooled = conditions.encode_texts(make_run(tiny_args, f"generator.encoder={folder}"), texts)
    _, exact = conditions.encode_texts(make_run(tiny_args), texts)
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled, exact, rtol=0, atol=2e-3)


def test_prompts_are_encoded_once(collected, monkeypatch):
    """States are cached in the run folder; a second call encodes nothing."""
    run = make_run(collected)
    states = conditions.load_states(run, "alpha")
    assert states.shape == (16, 16, 32) and states.dtype == np.float16
    norms = conditions.load_pooled(run, "alpha").norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(16))

    monkeypatch.setattr(conditions, "encode_texts", None)
    conditions.encode_prompts(run)


def test_prompt_batches_are_seeded_and_independent(tiny_args):
    """One key always gives one batch without repeats; other keys, tasks and seeds give others."""
    cfg, _ = config.load_config(tiny_args)
    other, _ = config.load_config([*tiny_args, "generator.seed=2"])

    def draw(cfg, task, batch):
        return conditions.draw_prompts(cfg, task, 16, "generate", batch).tolist()

    first = draw(cfg, "alpha", 0)
    assert first == draw(cfg, "alpha", 0)
    assert len(set(first)) == cfg.generator.num_prompts == len(first)
    for again in (draw(cfg, "alpha", 1), draw(cfg, "beta", 0), draw(other, "alpha", 0)):
        assert again != first


def test_few_prompts_are_repeated_cyclically(tiny_args):
    """A task with fewer prompts than a batch needs repeats its one shuffled order."""
    flow = "generator.flow=[[10, 16, 32], [8, 8, 8]]"
    cfg, _ = config.load_config([*tiny_args, "generator.num_prompts=10", flow])
    index = conditions.draw_prompts(cfg, "alpha", 4, "generate", 0).tolist()
    assert sorted(index[:4]) == [0, 1, 2, 3]
    assert index == (index[:4] * 3)[:10]


@pytest.mark.parametrize(
    "tokens, total", [([4296, 10, 130], 1113203220), ([4508, 18, 258], 1152535192)]
)
def test_parameter_counts_of_the_papers_flows(tokens, total):
    """The default flow and kernel have exactly the papers' sizes at 0.5B and 1.5B."""
    cfg, _ = config.load_config([])
    with torch.device("meta"):
        decoder = HyperConvDecoder([*cfg.generator.flow, tokens], cfg.generator.kernel)
    assert cfg.generator.kernel == 9 and len(decoder) == 8
    assert sum(weight.numel() for weight in decoder.parameters()) == total


def test_decoder_output_shape():
    """A flow ends in its last entry, for any batch size."""
    decoder = HyperConvDecoder([[3, 8, 6], [5, 4, 8], [7, 6, 10]], 3)
    assert decoder(torch.randn(2, 3, 8, 6)).shape == (2, 7, 6, 10)


def slow_conv(x, weight):
    """'Same' 2-D convolution of (channels, height, width), position by position."""
    k = weight.shape[-1]
    padded = F.pad(x, [k // 2] * 4)
    _, height, width = x.shape
    out = torch.zeros(len(weight), height, width, dtype=x.dtype)
    for i in range(height):
        for j in range(width):
            window = padded[:, i : i + k, j : j + k]
            out[:, i, j] = torch.einsum("oikl,ikl->o", weight, window)
    return out


def slow_layer(layer, x):
    """The layer on one (N, L, C) input: channel axes are C then L for W, L then C for H, then N."""
    mean = x.mean((1, 2), keepdim=True)
    var = x.var((1, 2), keepdim=True, unbiased=False)
    y = (x - mean) / torch.sqrt(var + 1e-5)
    y = y * layer.norm.weight + layer.norm.bias
    w = slow_conv(torch.einsum("nlc->cln", y), layer.w1.weight)  # C -> C' over (L, N)
    w = slow_conv(torch.einsum("cln->lnc", w), layer.w2.weight)  # L -> L' over (N, C')
    h = slow_conv(torch.einsum("nlc->lnc", y), layer.h1.weight)  # L -> L' over (N, C)
    h = slow_conv(torch.einsum("lnc->cln", h), layer.h2.weight)  # C -> C' over (L', N)
    w = torch.einsum("lnc->nlc", w)
    h = torch.einsum("cln->nlc", torch.tanh(h))
    mixed = (w + h + layer.bias) / 3
    return slow_conv(mixed, layer.out.weight) + layer.out.bias[:, None, None]


def test_layer_equals_a_loop_reference():
    """Axes, order of the two pairs, tanh on H only, bias and the division by three."""
    torch.manual_seed(0)
    layer = HyperConvLayer([3, 5, 4], [2, 6, 7], 3).double()
    for weight in (layer.norm.weight, layer.norm.bias, layer.bias):
        nn.init.normal_(weight)
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    with torch.no_grad():
        want = torch.stack([slow_layer(layer, each) for each in x])
        torch.testing.assert_close(layer(x), want, rtol=1e-9, atol=1e-9)
    biases = {name for name, _ in layer.named_parameters() if name.endswith("bias")}
    assert biases == {"norm.bias", "bias", "out.bias"}, "the four branch convolutions have no bias"


@torch.no_grad()
def test_tanh_is_on_branch_h_only():
    """Without W the mixed value lies in [-1, 1] and saturates; without H it grows linearly."""
    torch.manual_seed(0)
    layer = HyperConvLayer([2, 3, 4], [2, 5, 6], 3)
    x = torch.randn(1, 2, 3, 4)
    layer.bias.zero_()
    layer.out.bias.zero_()
    layer.out.weight.zero_()
    layer.out.weight[[0, 1], [0, 1], 1, 1] = 3.0  # passes (W + H + b) through unchanged

    keep = layer.w2.weight.clone()
    layer.w2.weight.zero_()
    layer.h2.weight.mul_(100)
    assert 0.99 < layer(x).abs().max() <= 1 + 1e-6

    layer.h2.weight.zero_()
    layer.w2.weight.copy_(keep)
    small = layer(x)
    layer.w2.weight.copy_(100 * keep)
    torch.testing.assert_close(layer(x), 100 * small, rtol=1e-4, atol=1e-4)
    assert layer(x).abs().max() > 1


@torch.no_grad()
@pytest.mark.parametrize(
    "out, residual", [([2, 3, 4], True), ([2, 3, 5], False), ([1, 3, 4], False)]
)
def test_residual_only_between_equal_shapes(out, residual):
    """x + y when input and output shapes agree, y otherwise."""
    layer = HyperConvLayer([2, 3, 4], out, 3)
    layer.out.weight.zero_()
    layer.out.bias.zero_()
    x = torch.randn(1, 2, 3, 4)
    want = x if residual else torch.zeros(1, *out)
    assert torch.equal(layer(x), want)


def test_decoder_overfits_one_pair():
    """A small decoder memorises one (prompts, tokens) pair: the loss falls over a hundredfold."""
    torch.manual_seed(0)
    decoder = HyperConvDecoder([[4, 8, 8], [6, 4, 8], [5, 4, 6]], 3)
    x = torch.randn(1, 4, 8, 8)
    y = torch.randn(1, 5, 4, 6)
    optimizer = torch.optim.Adam(decoder.parameters(), 3e-3)
    losses = []
    for _ in range(300):
        loss = F.mse_loss(decoder(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 100


def test_token_weights_have_mean_one():
    """Weights follow each token's spread over the checkpoints, averaged over tasks."""
    unit = torch.tensor([-1.0, 0.0, 1.0])[:, None, None, None].expand(3, 1, 4, 5)
    targets = {"a": torch.cat([3 * unit, unit], 1), "b": torch.cat([unit, unit], 1)}
    found = generator.token_weights(targets)
    assert found.shape == (1, 2, 1, 1)
    want = torch.tensor([1.25, 0.75])  # ((1.5, 0.5) + (1, 1)) / 2
    torch.testing.assert_close(found.flatten(), want)


@pytest.mark.parametrize("kind", ["none", "std"])
def test_first_loss_by_hand(collected, kind):
    """The recorded loss is the (weighted) error of the initial decoder on the first pairs."""
    more = ["generator.scale_code=dnd", "generator.steps=1", "generator.noise=0"]
    run = make_run(collected, DELTA, f"generator.criterion_weight={kind}", *more)
    g = run.cfg.generator
    lm = scoring.load_lm(run)
    code = generator.TokenCode("dnd", lm.layout, {})
    targets = {}
    states = {}
    for task in run.cfg.data.train_tasks:
        checkpoints = list(collect.load_checkpoints(run, lm, task))
        tokens = [generator.to_tokens(adapter, lm.layout) for adapter in checkpoints]
        targets[task] = code.encode(torch.stack(tokens))
        states[task] = torch.from_numpy(np.load(run.path / f"prompts/{task}/states.npy"))

    torch.manual_seed(runtime.seed_for(g.seed, "generator"))
    decoder = HyperConvDecoder([*g.flow, code.shape], g.kernel)
    weight = generator.token_weights(targets) if kind == "std" else torch.ones(1)
    losses = []
    for task, index, checkpoint in generator.draw_pairs(run.cfg, states, targets, 0):
        out = decoder(states[task][index].float()[None])
        error = (out - targets[task][checkpoint]) ** 2
        losses.append((weight * error).mean().item())
    generator.train_generators(run)
    done = runtime.read_json(run.path / "generator/all/DONE.json")
    assert done["recon_mse"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert done["parameters"] == sum(p.numel() for p in decoder.parameters())


def test_pairs_are_dealt_evenly(tiny_args):
    """Over the tasks in turn; a pair of the pool is one fixed batch and checkpoint."""
    more = ["generator.batch_size=6", "generator.pairs_per_task=5"]
    cfg, _ = config.load_config([*tiny_args, *more])
    states = dict.fromkeys(("alpha", "beta", "gamma"), np.zeros((16, 1)))
    targets = dict.fromkeys(states, [0, 1, 2])
    of_task = dict.fromkeys(states, 0)
    pool = set()
    for step in range(40):
        for task, index, checkpoint in generator.draw_pairs(cfg, states, targets, step):
            of_task[task] += 1
            pool.add((task, tuple(index), checkpoint))
    assert of_task == {"alpha": 80, "beta": 80, "gamma": 80}
    assert len(pool) <= 3 * 5
    assert len({(task, index) for task, index, _ in pool}) > 3


def test_generators_are_leave_one_out(collected, tmp_path):
    """A left-out task's checkpoints and prompts leave no trace in its generator, but in others."""
    before = train(collected)
    assert set(before) == {"all", "alpha", "beta", "gamma"}
    for name in before:
        done = runtime.read_json(tmp_path / f"run/generator/{name}/DONE.json")
        assert done["tasks"] == [task for task in ("alpha", "beta", "gamma") if task != name]

    run = make_run(collected)
    folder = run.path / "adapters/alpha"
    manifest = runtime.read_json(folder / "manifest.json")
    for name in manifest["sha256"]:
        adapter = lora.load_adapter(folder / name, scoring.load_lm(run).layout)
        changed = {key: 2 * matrix + 0.1 for key, matrix in adapter.items()}
        runtime.save_tensors(folder / name, changed)
        manifest["sha256"][name] = runtime.sha256(folder / name)
    runtime.write_json(folder / "manifest.json", manifest)
    states = np.load(run.path / "prompts/alpha/states.npy")
    np.save(run.path / "prompts/alpha/states.npy", states[::-1] + 1)
    shutil.rmtree(run.path / "generator")

    after = train(collected)
    assert [name for name in after if after[name] == before[name]] == ["alpha"]


def test_training_tasks_never_hold_the_left_out_one(tiny_args):
    """What a leave-one-out model may learn from."""
    cfg, _ = config.load_config(tiny_args)
    assert data.training_tasks(cfg, "beta") == ["alpha", "gamma"]
    assert data.training_tasks(cfg, "all") == ["alpha", "beta", "gamma"]
    assert data.left_out_for(cfg, "beta") == "beta"
    assert data.left_out_for(cfg, "delta") == "all"


def test_same_seed_same_bytes(collected, twin, tmp_path):
    """Training is deterministic; another generator seed gives another generator."""
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    first = train(collected)
    assert train(collected, twin) == first
    other = train(collected, f"run={tmp_path / 'other'}", "generator.seed=2")
    assert set(other) == set(first)
    assert all(other[name] != first[name] for name in first)


def test_killed_training_resumes_bit_equal(collected, twin, tmp_path):
    """From the last save on, an interrupted training is the uninterrupted one."""
    want = train(collected, twin, DELTA)
    state = tmp_path / "run/generator/all/state.safetensors"
    with killed_at(5):
        train(collected, DELTA)
    assert state.exists()
    with killed_at(-1) as asked:
        assert train(collected, DELTA) == want
    assert asked[0] == 4, "saved every 2 steps, killed at 5"
    assert not state.exists()


def test_half_trained_generator_is_not_mixed_with_another_configuration(collected, twin):
    """Steps under an old learning rate are never continued under a new one."""
    new = [DELTA, "generator.lr=1e-2"]
    fresh = train(collected, twin, *new)
    with killed_at(5):
        train(collected, DELTA)
    assert train(collected, *new) == fresh


def test_non_finite_loss_names_step_and_saved_state(collected, twin, tmp_path, monkeypatch):
    """The state before the bad step is kept; the same command continues from it to equal bytes."""
    want = train(collected, twin, DELTA)
    real = HyperConvDecoder.forward
    calls = []

    def poisoned(self, x):
        calls.append(1)
        bad = len(calls) == 7  # two micro-batches a step: in step 4
        return real(self, x) * (float("inf") if bad else 1)

    monkeypatch.setattr(HyperConvDecoder, "forward", poisoned)
    with pytest.raises(UserError, match=r"step 4 .*last finite \d+\.\d+.*generator\.lr") as error:
        train(collected, DELTA)
    folder = tmp_path / "run/generator/all"
    assert str(folder) in str(error.value)
    state = runtime.load_tensors(folder / "state.safetensors")
    assert int(state["step"]) == 3
    assert not (folder / "DONE.json").exists()
    monkeypatch.undo()
    assert train(collected, DELTA) == want


class Salted(str):
    """A name whose hash is chosen, as each process chooses its own for plain text."""

    order: tuple = ()

    def __hash__(self):
        return self.order.index(str(self))

    def __eq__(self, other):
        return str(self) == str(other)


def test_every_rank_is_dealt_generators_in_one_order(collected, monkeypatch):
    """Ranks take units by number, so their order must not depend on how a process hashes text."""
    names = ("alpha", "beta", "gamma", "all")
    real = data.left_out_for
    wanted = []

    def deal(run, units):
        if "all" in units:
            wanted.append([str(unit) for unit in units])
        return []

    monkeypatch.setattr(data, "left_out_for", lambda cfg, task: Salted(real(cfg, task)))
    monkeypatch.setattr(Run, "deal", deal)
    for order in (names, names[::-1], ("gamma", "all", "alpha", "beta")):
        monkeypatch.setattr(Salted, "order", order)
        with pytest.raises(UserError, match=r"DONE\.json"):  # dealt to nobody, none is trained
            train(collected)
    assert len(wanted) == 3 and sorted(wanted[0]) == sorted(names)
    assert wanted[0] == wanted[1] == wanted[2]


def one_of_two_ranks(rank: int, store: str, jobs: list[tuple[list[str], int]]) -> None:
    """Train by two ranks, job by job: words of a run folder, and the step to be killed at."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for words, step in jobs:
        cfg, _ = config.load_config([*words, DELTA, "data_parallel=true"])
        with killed_at(step):
            generator.train_generators(Run(Path(cfg.run), cfg, rank, 2, quiet=True))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # without a clean-up in which a library's thread aborts the rank now and then


@pytest.fixture
def two_ranks(collected, tmp_path_factory) -> dict[str, Path]:
    """Folders in which two ranks have trained one generator together.

    By pairs in a micro-batch: 1: the ranks take two and one. 2: one each. 3: cut into two and one.
    `killed`: both killed at step 5. `resumed`: after one rank had been killed at step 5. `redone`:
    over another configuration's generator.
    """
    if "two_ranks" not in MADE:
        folders = {}
        for name in ("1", "2", "3", "killed", "resumed", "redone"):
            folders[name] = tmp_path_factory.mktemp("ranks") / "run"
            shutil.copytree(MADE["collected"], folders[name])
        words = {name: [*collected, f"run={folder}"] for name, folder in folders.items()}
        with killed_at(5):
            train(words["resumed"], DELTA)
        train(words["redone"], DELTA, "generator.lr=1e-2")
        jobs = [([*words[size], f"generator.micro_batch={size}"], -1) for size in "123"]
        jobs += [(words["killed"], 5), (words["resumed"], -1)]
        jobs.append(([*words["redone"], "overwrite=true"], -1))
        store = str(tmp_path_factory.mktemp("store") / "store")
        torch.multiprocessing.spawn(one_of_two_ranks, (store, jobs), nprocs=2)
        MADE["two_ranks"] = folders
    return MADE["two_ranks"]


def assert_equal_but_for_rounding(one: Path, two: Path) -> None:
    """The same weights, and the same loss of the last step."""
    a, b = (runtime.load_tensors(run / "generator/all/generator.safetensors") for run in (one, two))
    assert a.keys() == b.keys()
    for name in a:
        # A layer's bias is taken out by the next one's norm. Its gradient is zero but for rounding,
        # and AdamW steps on the rounding.
        if name != "decoder.0.out.bias":
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-5)
    a, b = (runtime.read_json(run / "generator/all/DONE.json") for run in (one, two))
    assert b["recon_mse"] == pytest.approx(a["recon_mse"], rel=1e-6)


@pytest.mark.parametrize("size, alone", [("1", 1), ("2", 2), ("3", 2)])
def test_two_ranks_train_the_generator_of_one(collected, two_ranks, tmp_path, size, alone):
    """However the micro-batches fall to the ranks; too few of them are cut smaller."""
    train(collected, DELTA, f"generator.micro_batch={alone}")
    assert_equal_but_for_rounding(tmp_path / "run", two_ranks[size])
    done = runtime.read_json(two_ranks[size] / "generator/all/DONE.json")
    assert done["ranks"] == 2


def test_the_number_of_ranks_may_change_at_a_save(collected, two_ranks, tmp_path):
    """One rank goes on from the state of two, and two from the state of one."""
    train(collected, DELTA)
    assert_equal_but_for_rounding(tmp_path / "run", two_ranks["resumed"])

    shutil.copytree(two_ranks["killed"], tmp_path / "killed")
    state = runtime.load_tensors(tmp_path / "killed/generator/all/state.safetensors")
    weights = [name for name in state if name.startswith("p.")]
    for moment in ("m.", "v."):
        assert sum(name.startswith(moment) for name in state) == len(weights)
    with killed_at(-1) as asked:
        train(collected, DELTA, f"run={tmp_path / 'killed'}")
    assert asked[0] == 4
    assert_equal_but_for_rounding(tmp_path / "run", tmp_path / "killed")


def test_ranks_redo_a_generator_together(collected, two_ranks, tmp_path):
    """With `overwrite`, rank 0 clears the folder before the others ask whether it is finished."""
    train(collected, DELTA)
    assert_equal_but_for_rounding(tmp_path / "run", two_ranks["redone"])


def test_generated_adapter_carries_no_gradient(collected):
    """Generation ends the graph, even where gradients are on; one batch gives one adapter."""
    run = make_run(collected, DELTA)
    generator.train_generators(run)

    def generate(batch, **more):
        adapter, index = generator.generate_adapter(run, "delta", batch, **more)
        assert not any(matrix.requires_grad for matrix in adapter.values())
        return lora.adapter_hash(adapter), index.tolist()

    with torch.enable_grad():
        first, index = generate(0)
    decoder = generator.load_generator(run, "all").decoder
    assert not any(weight.requires_grad for weight in decoder.parameters())
    assert generate(0) == (first, index)
    other, drawn = generate(1)
    assert other != first and drawn != index
    wrong, _ = generate(0, prompts_of="alpha")
    assert wrong != first


def test_zero_prediction_is_the_mean_adapter(collected):
    """With the element code a decoder that predicts zero yields the mean training checkpoint."""
    run = make_run(collected, "data.targets=[alpha]")
    generator.train_generators(run)
    for weight in generator.load_generator(run, "alpha").decoder[-1].out.parameters():
        weight.zero_()
    adapter, _ = generator.generate_adapter(run, "alpha", 0)

    lm = scoring.load_lm(run)
    checkpoints = []
    for task in ("beta", "gamma"):
        checkpoints += collect.load_checkpoints(run, lm, task)
    mean = lora.average_adapters(checkpoints)
    torch.testing.assert_close(adapter, mean, rtol=0, atol=1e-6)


def test_untrained_generator_is_asked_for(collected):
    """Adapting before training says which stage is missing."""
    with pytest.raises(UserError, match="stage=generator"):
        generator.generate_adapter(make_run(collected), "delta", 0)


def test_only_the_target_is_conditioned_on_test_prompts(tiny_args, monkeypatch):
    """Models learn from prompts of a training task's train split, whatever a target has."""
    run = make_run(tiny_args, "data.prompts_from=test")
    conditions.encode_prompts(run)
    task = data.load_tasks(run)["beta"]
    inputs = {split: {e.text for e in getattr(task, split)} for split in ("train", "test")}
    sets = {"beta": inputs["test"], "beta.train": inputs["train"]}
    for name, wanted in sets.items():
        assert set(conditions.task_texts(run, name)) <= wanted
        assert len(conditions.load_states(run, name)) == len(conditions.task_texts(run, name))

    # learnt from where it is not left out; a target where it is, or out of domain
    cfg = run.cfg
    assert conditions.prompt_set(cfg, "beta", "alpha") == "beta.train"
    assert conditions.prompt_set(cfg, "beta", "beta") == "beta"
    assert conditions.prompt_set(cfg, "delta", "all") == "delta"
    inductive = make_run(tiny_args).cfg
    assert conditions.prompt_set(inductive, "beta", "alpha") == "beta"

    # and so are the lessons of a generator
    layout = scoring.load_lm(run).layout
    adapters = [lora.init_adapter(layout, seed) for seed in (0, 1)]
    monkeypatch.setattr(collect, "checkpoint_names", lambda run, task: ["step_0001", "step_0002"])
    monkeypatch.setattr(collect, "load_checkpoints", lambda run, lm, task: iter(adapters))
    _, lessons = generator._prepare_lessons(run, "alpha", ["beta"], run.path / "targets", 1)
    assert np.array_equal(lessons.states["beta"], conditions.load_states(run, "beta.train"))


@pytest.mark.parametrize("condition", ["input", "prompt"])
def test_the_condition_may_be_the_question_alone(tiny_args, condition):
    """input: with system line and chat markup; prompt: without. Routing compares like with like."""
    run = make_run(tiny_args, "data.format=letter", f"generator.condition={condition}")
    example = data.load_tasks(run)["alpha"].test[0]
    text = conditions.condition_text(run, example)
    whole = scoring.input_text(scoring.load_lm(run), example)
    assert example.text in whole
    assert (text == whole) == (condition == "input")
    assert (data.LETTER_SYSTEM in text) == (condition == "input")
    conditions.encode_prompts(run)
    prompts = data.load_tasks(run)["alpha"].prompts
    _, pooled = conditions.encode_texts(
        run, [conditions.condition_text(run, data.Example("", prompt, ("",))) for prompt in prompts]
    )
    torch.testing.assert_close(conditions.load_pooled(run, "alpha"), pooled)


def test_targets_are_mapped_files(collected):
    """No checkpoint is held: values are read from a file that every rank of a node maps."""
    run = make_run(collected, DELTA, "generator.scale_code=dnd")
    conditions.encode_prompts(run)
    folder = run.path / "targets"
    code, lessons = generator._prepare_lessons(run, "all", ["alpha", "beta"], folder, 1)
    lm = scoring.load_lm(run)
    for task, targets in lessons.targets.items():
        adapters = collect.load_checkpoints(run, lm, task)
        tokens = torch.stack([generator.to_tokens(adapter, lm.layout) for adapter in adapters])
        torch.testing.assert_close(targets, code.encode(tokens), rtol=0, atol=0)
    assert f"{folder}/alpha.npy" in Path("/proc/self/maps").read_text()
    generator.train_generators(run)
    assert not list(run.path.glob("generator/*/targets")), "and they go when it is trained"


def test_the_decoder_writes_float32_under_autocast():
    """A bfloat16 output would round a token's scale by up to its own size: sd 1e-4, code dnd."""
    decoder = HyperConvDecoder([[2, 4, 6], [3, 4, 6], [5, 6, 8]], 3)
    with torch.autocast("cpu", torch.bfloat16):
        out = decoder(torch.randn(1, 2, 4, 6))
        inner = decoder[0](torch.randn(1, 2, 4, 6))
    assert out.dtype == torch.float32
    assert inner.dtype == torch.bfloat16
    # to what it writes nothing is lost
    exact = decoder[-1].out
    with torch.autocast("cpu", torch.bfloat16):
        y = torch.randn(1, 3, 6, 8)
        written = exact(y)
    torch.testing.assert_close(written, exact(y), rtol=1e-6, atol=1e-7)
