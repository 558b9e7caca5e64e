"""Collection, prompt states, the hyper-convolutional decoder, its training and generation, on tiny models."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import generator
from collect import collect_adapters, load_checkpoints
from config import UserError, load_config
from data import training_tasks
from fastconv import SameConv2d, _GPUConv2d
from generator import (
    HyperConvDecoder,
    HyperConvLayer,
    TokenCode,
    draw_pairs,
    draw_prompts,
    encode_prompts,
    generate_adapter,
    load_generator,
    to_tokens,
    token_weights,
    train_generators,
)
from lora import adapter_hash, average_adapters, load_adapter
from runtime import Run, load_tensors, read_json, save_tensors, seed_for, sha256, write_json
from scoring import load_lm

_READY: dict = {}


class Killed(BaseException):
    """Stands for a process that ends without a chance to tidy up."""


def make_run(args: list[str], *more: str) -> Run:
    cfg, _ = load_config([*args, *more])
    Path(cfg.run).mkdir(parents=True, exist_ok=True)
    return Run(Path(cfg.run), cfg, quiet=True)


@pytest.fixture
def collected(tiny_args, tmp_path, tmp_path_factory) -> list[str]:
    """Arguments of a run folder in which collection is done and prompts are encoded."""
    if "collected" not in _READY:
        folder = tmp_path_factory.mktemp("collected") / "run"
        run = make_run(tiny_args, f"run={folder}")
        collect_adapters(run)
        encode_prompts(run)
        _READY["collected"] = folder
    shutil.copytree(_READY["collected"], tmp_path / "run")
    return tiny_args


def train(args: list[str], *more: str) -> Path:
    run = make_run(args, *more)
    train_generators(run)
    return run.path


def weights_of(folder: Path) -> dict[str, bytes]:
    return {p.parent.name: p.read_bytes() for p in folder.glob("generator/*/generator.safetensors")}


# ---------------------------------------------------------------------------------------------------- decoder


@pytest.mark.parametrize(
    "tokens, total", [([4296, 10, 130], 1113203220), ([4508, 18, 258], 1152535192)]
)
def test_parameter_counts_of_the_papers_flows(tokens, total):
    """The default flow and kernel have exactly the papers' sizes at 0.5B and 1.5B."""
    cfg, _ = load_config([])
    with torch.device("meta"):
        decoder = HyperConvDecoder([*cfg.generator.flow, tokens], cfg.generator.kernel)
    assert cfg.generator.kernel == 9 and len(decoder) == 8
    assert sum(p.numel() for p in decoder.parameters()) == total


def test_decoder_output_shape():
    """A flow ends in its last entry, for any batch size."""
    decoder = HyperConvDecoder([[3, 8, 6], [5, 4, 8], [7, 6, 10]], 3)
    assert decoder(torch.randn(2, 3, 8, 6)).shape == (2, 7, 6, 10)


def slow_conv(x, weight, bias=None):
    """'Same' 2-D convolution of (channels, height, width), position by position."""
    k = weight.shape[-1]
    padded = F.pad(x, [k // 2] * 4)
    out = torch.zeros(weight.shape[0], *x.shape[1:], dtype=x.dtype)
    for i in range(x.shape[1]):
        for j in range(x.shape[2]):
            out[:, i, j] = torch.einsum("oikl,ikl->o", weight, padded[:, i : i + k, j : j + k])
    return out if bias is None else out + bias[:, None, None]


def slow_layer(layer, x):
    """The layer on one (N, L, C) input: channel axes are C then L for W, L then C for H, N at the end."""
    y = torch.stack([(v - v.mean()) / torch.sqrt(v.var(unbiased=False) + 1e-5) for v in x])
    y = y * layer.norm.weight + layer.norm.bias
    w = slow_conv(torch.einsum("nlc->cln", y), layer.w1.weight)  # C -> C' over (L, N)
    w = slow_conv(torch.einsum("cln->lnc", w), layer.w2.weight)  # L -> L' over (N, C')
    h = slow_conv(torch.einsum("nlc->lnc", y), layer.h1.weight)  # L -> L' over (N, C)
    h = torch.tanh(slow_conv(torch.einsum("lnc->cln", h), layer.h2.weight))  # C -> C' over (L', N)
    mixed = (torch.einsum("lnc->nlc", w) + torch.einsum("cln->nlc", h) + layer.bias) / 3
    return slow_conv(mixed, layer.out.weight, layer.out.bias)


def test_layer_equals_a_loop_reference():
    """Axes, order of the two pairs, tanh on H only, bias and the division by three."""
    torch.manual_seed(0)
    layer = HyperConvLayer([3, 5, 4], [2, 6, 7], 3).double()
    nn.init.normal_(layer.norm.weight)
    nn.init.normal_(layer.norm.bias)
    nn.init.normal_(layer.bias)
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    with torch.no_grad():
        want = torch.stack([slow_layer(layer, v) for v in x])
        torch.testing.assert_close(layer(x), want, rtol=1e-9, atol=1e-9)
    biases = {n for n, _ in layer.named_parameters() if n.endswith("bias")}
    assert biases == {"norm.bias", "bias", "out.bias"}, "the four branch convolutions have no bias"


@pytest.mark.parametrize(
    "c_in, c_out, height, width, kernel",
    [(5, 3, 6, 7, 3), (40, 17, 3, 8, 5), (257, 264, 2, 5, 3), (256, 300, 4, 6, 9)],
)
def test_the_gpu_convolution_is_the_convolution(c_in, c_out, height, width, kernel):
    """Values and gradients in float64, with few channels and with many, also where the kernel is larger than the
    input."""
    g = torch.Generator().manual_seed(0)
    x, weight, back = (
        torch.randn(s, generator=g, dtype=torch.float64)
        for s in (
            (2, c_in, height, width),
            (c_out, c_in, kernel, kernel),
            (2, c_out, height, width),
        )
    )
    x.requires_grad_()
    weight.requires_grad_()
    found, want = _GPUConv2d.apply(x, weight), F.conv2d(x, weight, padding=kernel // 2)
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-9)
    for a, b in zip(
        torch.autograd.grad(found, (x, weight), back),
        torch.autograd.grad(want, (x, weight), back),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-9)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_convolution_on_a_gpu_in_both_dtypes():
    """The module with its bias, in float64 and under autocast in bfloat16, equals the CPU's."""
    torch.manual_seed(0)
    conv, x = (
        SameConv2d(260, 256, 5, padding=2).double(),
        torch.randn(2, 260, 6, 7, dtype=torch.float64),
    )
    want = conv(x)
    torch.testing.assert_close(conv.cuda()(x.cuda()).cpu(), want, rtol=1e-9, atol=1e-9)
    with torch.autocast("cuda", torch.bfloat16):
        half = conv.float()(x.float().cuda())
    assert half.dtype == torch.bfloat16 and (half.cpu() - want).norm() < 0.01 * want.norm()


def test_tanh_is_on_branch_h_only():
    """Without W the mixed value lies in [-1, 1] and saturates; without H it grows linearly."""
    torch.manual_seed(0)
    layer = HyperConvLayer([2, 3, 4], [2, 5, 6], 3)
    x = torch.randn(1, 2, 3, 4)
    with torch.no_grad():
        layer.bias.zero_()
        layer.out.bias.zero_()
        layer.out.weight.zero_()
        layer.out.weight[[0, 1], [0, 1], 1, 1] = 3.0  # passes (W + H + b) through unchanged
        keep = layer.w2.weight.clone()
        layer.w2.weight.zero_()
        layer.h2.weight.mul_(100)
        h = layer(x)
        assert h.abs().max() <= 1 + 1e-6 and h.abs().max() > 0.99
        layer.h2.weight.zero_()
        layer.w2.weight.copy_(keep)
        small = layer(x)
        layer.w2.weight.copy_(100 * keep)
        torch.testing.assert_close(layer(x), 100 * small, rtol=1e-4, atol=1e-4)
        assert layer(x).abs().max() > 1


def test_residual_only_between_equal_shapes():
    """x + y when input and output shapes agree, y otherwise."""
    for out, residual in (([2, 3, 4], True), ([2, 3, 5], False), ([1, 3, 4], False)):
        layer = HyperConvLayer([2, 3, 4], out, 3)
        with torch.no_grad():
            layer.out.weight.zero_()
            layer.out.bias.zero_()
            x = torch.randn(1, 2, 3, 4)
            want = x if residual else torch.zeros(1, *out)
            assert torch.equal(layer(x), want), out


def test_decoder_overfits_one_pair():
    """A small decoder memorises one (prompts, tokens) pair: the loss falls more than a hundredfold."""
    torch.manual_seed(0)
    decoder = HyperConvDecoder([[4, 8, 8], [6, 4, 8], [5, 4, 6]], 3)
    x, y = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 4, 6)
    opt = torch.optim.Adam(decoder.parameters(), 3e-3)
    losses = []
    for _ in range(300):
        loss = F.mse_loss(decoder(x), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 100


# ------------------------------------------------------------------------------------------------- collection


def test_tasks_share_one_initialisation(collected):
    """Every task starts from the same A, and the last `save_last` steps are kept."""
    run = make_run(collected)
    manifests = [
        read_json(run.path / f"adapters/{t}/manifest.json") for t in run.cfg.data.train_tasks
    ]
    assert len({m["init_sha"] for m in manifests}) == 1
    for m in manifests:
        assert sorted(m["sha256"]) == [f"step_000{i}.safetensors" for i in (7, 8, 9)]
        assert m["losses"][-1] < m["losses"][0]
        for name, digest in m["sha256"].items():
            assert sha256(run.path / f"adapters/{m['task']}/{name}") == digest


def test_checkpoints_of_two_tasks_differ(collected):
    """The trajectories are the tasks', not one shared one."""
    run = make_run(collected)
    last = [load_checkpoints(run, load_lm(run), t)[-1] for t in run.cfg.data.train_tasks]
    assert len({adapter_hash(a) for a in last}) == len(last)


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_damaged_checkpoint_is_named(collected, damage):
    """A checkpoint that is not what collection wrote is refused by name, with what to do."""
    run = make_run(collected)
    file = run.path / "adapters/beta/step_0008.safetensors"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "altered":
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(bytes(data))
    else:
        file.unlink()
    with pytest.raises(UserError) as e:
        train_generators(run)
    assert (
        str(file) in str(e.value) and "stage=collect" in str(e.value) and "delete" in str(e.value)
    )


def test_collect_names_the_step_of_a_non_finite_loss(tiny_args, monkeypatch):
    """The step, the state saved before it and a way out; afterwards the same command works."""
    run, real, calls = make_run(tiny_args), generator.lm_loss, []

    def poisoned(lm, rows):
        calls.append(1)
        return real(lm, rows) * (float("nan") if len(calls) == 3 else 1)

    monkeypatch.setattr(generator, "lm_loss", poisoned)
    with pytest.raises(UserError, match=r"step 3 .*last finite") as e:
        collect_adapters(run)
    saved = Path(re.search(r"\S+before_failure\.safetensors", str(e.value))[0])
    assert load_adapter(saved, load_lm(run).layout)
    assert not (saved.parent / "DONE.json").exists()
    monkeypatch.undo()
    collect_adapters(run)
    assert not saved.exists() and (saved.parent / "DONE.json").exists()


# ---------------------------------------------------------------------------------------------------- prompts


def test_prompt_batches_are_seeded_and_independent(tiny_args):
    """One key always gives one batch without repeats; other keys, tasks and seeds give others."""
    cfg, _ = load_config(tiny_args)
    first = draw_prompts(cfg, "alpha", 16, "generate", 0)
    assert first.tolist() == draw_prompts(cfg, "alpha", 16, "generate", 0).tolist()
    assert len(set(first.tolist())) == cfg.generator.num_prompts == len(first)
    other, _ = load_config([*tiny_args, "generator.seed=2"])
    for again in (
        draw_prompts(cfg, "alpha", 16, "generate", 1),
        draw_prompts(cfg, "beta", 16, "generate", 0),
        draw_prompts(other, "alpha", 16, "generate", 0),
    ):
        assert again.tolist() != first.tolist()


def test_few_prompts_are_repeated_cyclically(tiny_args):
    """A task with fewer prompts than a batch needs repeats its one shuffled order."""
    cfg, _ = load_config(
        [*tiny_args, "generator.num_prompts=10", "generator.flow=[[10, 16, 32], [8, 8, 8]]"]
    )
    index = draw_prompts(cfg, "alpha", 4, "generate", 0).tolist()
    assert sorted(index[:4]) == [0, 1, 2, 3]
    assert index == (index[:4] * 3)[:10]


def test_encode_prompts_runs_the_encoder_once(collected, monkeypatch):
    """States are cached in the run folder; a second call encodes nothing."""
    run = make_run(collected)
    states = np.load(run.path / "prompts/alpha/states.npy")
    assert states.shape == (16, 16, 32) and states.dtype == np.float16
    pooled = torch.from_numpy(np.load(run.path / "prompts/alpha/pooled.npy"))
    torch.testing.assert_close(pooled.norm(dim=1), torch.ones(16))

    def never(*args, **kwargs):
        raise AssertionError("encoded again")

    monkeypatch.setattr(generator, "encode_texts", never)
    encode_prompts(run)


# --------------------------------------------------------------------------------------------------- training


def test_token_weights_have_mean_one():
    """Weights follow each token's spread over the checkpoints, averaged over tasks, and average to one."""
    unit = torch.tensor([-1.0, 0.0, 1.0])[:, None, None, None]
    targets = {"a": torch.cat([3 * unit, unit], 1), "b": torch.cat([unit, unit], 1)}
    got = token_weights({k: v.expand(3, 2, 4, 5) for k, v in targets.items()})
    assert got.shape == (1, 2, 1, 1)
    torch.testing.assert_close(
        got.flatten(), torch.tensor([1.25, 0.75])
    )  # ((1.5, 0.5) + (1, 1)) / 2


@pytest.mark.parametrize("kind", ["none", "std"])
def test_first_loss_by_hand(collected, kind):
    """The recorded loss is the (weighted) mean squared error of the initial decoder on the first pairs."""
    run = make_run(
        collected,
        f"generator.criterion_weight={kind}",
        "generator.scale_code=dnd",
        "generator.steps=1",
        "generator.noise=0",
        "data.targets=[delta]",
    )
    cfg, layout = run.cfg, load_lm(run).layout
    tokens = {
        t: torch.stack([to_tokens(a, layout) for a in load_checkpoints(run, load_lm(run), t)])
        for t in cfg.data.train_tasks
    }
    code = TokenCode.fit("dnd", layout, torch.cat(list(tokens.values())))
    targets = {t: code.encode(v) for t, v in tokens.items()}
    states = {t: np.load(run.path / f"prompts/{t}/states.npy") for t in targets}
    torch.manual_seed(seed_for(cfg.generator.seed, "generator"))
    decoder = HyperConvDecoder([*cfg.generator.flow, list(code.shape)], cfg.generator.kernel)
    weight, losses = token_weights(targets) if kind == "std" else torch.ones(1), []
    with torch.no_grad():
        for task, index, checkpoint in draw_pairs(cfg, states, targets, 0):
            out = decoder(torch.from_numpy(states[task][index]).float()[None])
            losses.append((weight * (out - targets[task][checkpoint]) ** 2).mean())
    train_generators(run)
    done = read_json(run.path / "generator/none/DONE.json")
    assert done["recon_mse"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-4)
    assert done["parameters"] == sum(p.numel() for p in decoder.parameters())


def test_pairs_are_dealt_evenly(tiny_args):
    """Pairs are dealt over the tasks in turn; a pair of the pool is one fixed batch and checkpoint."""
    cfg, _ = load_config([*tiny_args, "generator.batch_size=6", "generator.pairs_per_task=5"])
    states = {t: np.zeros((16, 1)) for t in ("alpha", "beta", "gamma")}
    targets = dict.fromkeys(states, [0, 1, 2])
    drawn = [p for step in range(40) for p in draw_pairs(cfg, states, targets, step)]
    assert {t: sum(p[0] == t for p in drawn) for t in states} == {
        "alpha": 80,
        "beta": 80,
        "gamma": 80,
    }
    assert len({(t, tuple(i), c) for t, i, c in drawn}) <= 3 * 5
    assert len({(t, tuple(i)) for t, i, _ in drawn}) > 3


def test_generators_are_leave_one_out(collected, tmp_path):
    """A left-out task's checkpoints and prompts leave no trace in its generator, and do in every other."""
    before = weights_of(train(collected))
    assert set(before) == {"none", "alpha", "beta", "gamma"}
    for name in before:
        done = read_json(tmp_path / f"run/generator/{name}/DONE.json")
        assert done["tasks"] == [t for t in ("alpha", "beta", "gamma") if t != name]
    run = make_run(collected)
    folder, manifest = (
        run.path / "adapters/alpha",
        read_json(run.path / "adapters/alpha/manifest.json"),
    )
    for name in manifest["sha256"]:
        adapter = load_adapter(folder / name, load_lm(run).layout)
        save_tensors(folder / name, {k: 2 * v + 0.1 for k, v in adapter.items()})
        manifest["sha256"][name] = sha256(folder / name)
    write_json(folder / "manifest.json", manifest)
    states = np.load(run.path / "prompts/alpha/states.npy")
    np.save(run.path / "prompts/alpha/states.npy", states[::-1] + 1)
    shutil.rmtree(run.path / "generator")
    after = weights_of(train(collected))
    assert after["alpha"] == before["alpha"]
    assert all(after[k] != before[k] for k in ("none", "beta", "gamma"))


def test_training_tasks_never_hold_the_left_out_one(tiny_args):
    """What a leave-one-out model may learn from."""
    cfg, _ = load_config(tiny_args)
    assert training_tasks(cfg, "beta") == ["alpha", "gamma"]
    assert training_tasks(cfg, "none") == ["alpha", "beta", "gamma"]
    assert [data.left_out_for(cfg, t) for t in ("beta", "delta")] == ["beta", "none"]


def test_same_seed_same_bytes(collected, tmp_path):
    """Training is deterministic; another generator seed gives another generator from the same checkpoints."""
    shutil.copytree(tmp_path / "run", tmp_path / "twin")
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    first = weights_of(train(collected))
    assert weights_of(train(collected, f"run={tmp_path / 'twin'}")) == first
    other = weights_of(train(collected, f"run={tmp_path / 'other'}", "generator.seed=2"))
    assert set(other) == set(first) and all(other[k] != first[k] for k in first)


def interrupt(monkeypatch, at: int) -> list[int]:
    """Kill training when it asks for the pairs of step `at`; returns the steps it asked for."""
    real, asked = generator.draw_pairs, []

    def dying(cfg, states, targets, step):
        asked.append(step)
        if step == at:
            raise Killed
        return real(cfg, states, targets, step)

    monkeypatch.setattr(generator, "draw_pairs", dying)
    return asked


def test_killed_training_resumes_bit_equal(collected, tmp_path, monkeypatch):
    """From the last save on, an interrupted training is the uninterrupted one."""
    shutil.copytree(tmp_path / "run", tmp_path / "twin")
    want = weights_of(train(collected, f"run={tmp_path / 'twin'}", "data.targets=[delta]"))
    interrupt(monkeypatch, 5)
    with pytest.raises(Killed):
        train(collected, "data.targets=[delta]")
    assert (tmp_path / "run/generator/none/state.safetensors").exists()
    monkeypatch.undo()
    asked = interrupt(monkeypatch, -1)
    assert weights_of(train(collected, "data.targets=[delta]")) == want
    assert asked[0] == 4, "saved every 2 steps, killed at 5"
    assert not (tmp_path / "run/generator/none/state.safetensors").exists()


def test_half_trained_generator_is_not_mixed_with_another_configuration(
    collected, tmp_path, monkeypatch
):
    """Steps under an old learning rate are never continued under a new one in silence."""
    shutil.copytree(tmp_path / "run", tmp_path / "twin")
    new = ["data.targets=[delta]", "generator.lr=1e-2"]
    fresh = weights_of(train(collected, f"run={tmp_path / 'twin'}", *new))
    interrupt(monkeypatch, 5)
    with pytest.raises(Killed):
        train(collected, "data.targets=[delta]")
    monkeypatch.undo()
    try:
        assert weights_of(train(collected, *new)) == fresh
    except UserError as e:
        assert "generator.lr" in str(e)


def test_non_finite_loss_names_step_and_saved_state(collected, tmp_path, monkeypatch):
    """The state before the bad step is kept, and the same command continues from it to the same bytes."""
    shutil.copytree(tmp_path / "run", tmp_path / "twin")
    want = weights_of(train(collected, f"run={tmp_path / 'twin'}", "data.targets=[delta]"))
    real, calls = HyperConvDecoder.forward, []

    def poisoned(self, x):
        calls.append(1)
        return real(self, x) * (
            float("inf") if len(calls) == 7 else 1
        )  # two micro batches a step: step 4

    monkeypatch.setattr(HyperConvDecoder, "forward", poisoned)
    with pytest.raises(UserError) as e:
        train(collected, "data.targets=[delta]")
    folder = tmp_path / "run/generator/none"
    assert (
        "step 4" in str(e.value) and str(folder) in str(e.value) and "generator.lr" in str(e.value)
    )
    assert re.search(r"last finite \d+\.\d+", str(e.value))
    assert int(generator.load_tensors(folder / "state.safetensors")["step"]) == 3
    assert not (folder / "DONE.json").exists()
    monkeypatch.undo()
    assert weights_of(train(collected, "data.targets=[delta]")) == want


class Salted(str):
    """A name whose hash is chosen, as each process chooses its own for plain text."""

    order: tuple = ()

    def __hash__(self):
        return self.order.index(str(self))

    def __eq__(self, other):
        return str(self) == str(other)


def test_every_rank_is_dealt_generators_in_one_order(collected, monkeypatch):
    """Ranks take units by number from their own list, so it must not depend on how a process hashes text."""
    names, lists, real = ("alpha", "beta", "gamma", "none"), [], data.left_out_for
    monkeypatch.setattr(generator, "left_out_for", lambda cfg, t: Salted(real(cfg, t)))
    monkeypatch.setattr(
        Run, "deal", lambda self, units: lists.append([str(u) for u in units]) or []
    )
    for order in (names, names[::-1], ("gamma", "none", "alpha", "beta")):
        monkeypatch.setattr(Salted, "order", order)
        run = make_run(collected)
        with pytest.raises(UserError, match="DONE.json"):  # dealt to nobody, nothing is trained
            train_generators(run)
    wanted = [u for u in lists if "none" in u]
    assert len(wanted) == 3 and sorted(wanted[0]) == sorted(names)
    assert wanted[0] == wanted[1] == wanted[2]


# ------------------------------------------------------------------------------------------------- generation


def test_generated_adapter_carries_no_gradient(collected):
    """Generation ends the graph, even where gradients are on; the same batch gives the same adapter."""
    run = make_run(collected, "data.targets=[delta]")
    train_generators(run)
    with torch.enable_grad():
        adapter, index = generate_adapter(run, "delta", 0)
    assert not any(v.requires_grad for v in adapter.values())
    assert not any(p.requires_grad for p in load_generator(run, "none").decoder.parameters())
    again, same = generate_adapter(run, "delta", 0)
    assert adapter_hash(again) == adapter_hash(adapter) and same.tolist() == index.tolist()
    other, drawn = generate_adapter(run, "delta", 1)
    assert adapter_hash(other) != adapter_hash(adapter) and drawn.tolist() != index.tolist()
    wrong, _ = generate_adapter(run, "delta", 0, prompts_of="alpha")
    assert adapter_hash(wrong) != adapter_hash(adapter)


def test_zero_prediction_is_the_mean_adapter(collected):
    """With the element code a decoder that predicts zero yields the mean training checkpoint."""
    run = make_run(collected, "data.targets=[alpha]")
    train_generators(run)
    for p in load_generator(run, "alpha").decoder[-1].out.parameters():
        p.zero_()
    adapter, _ = generate_adapter(run, "alpha", 0)
    checkpoints = [a for t in ("beta", "gamma") for a in load_checkpoints(run, load_lm(run), t)]
    mean = average_adapters(checkpoints)
    assert set(adapter) == set(mean)
    for k in mean:
        torch.testing.assert_close(adapter[k], mean[k], rtol=0, atol=1e-6)


def test_untrained_generator_is_asked_for(collected):
    """Adapting before training says which stage is missing."""
    with pytest.raises(UserError, match="stage=generator"):
        generate_adapter(make_run(collected), "delta", 0)


@pytest.mark.parametrize("works", [True, False])
def test_compiled_training_or_a_message(tiny_args, tmp_path, monkeypatch, works):
    """generator.compile goes through torch.compile; where that fails training goes on, says so, and is the same."""
    used = []

    def stand_in(module):  # the real one needs a C++ compiler, which not every machine has
        if not works:
            raise RuntimeError("no compiler found")
        return lambda x: used.append(len(x)) or module(x)

    monkeypatch.setattr(torch, "compile", stand_in)
    states = {}
    for name, more in (("plain", []), ("compiled", ["generator.compile=true"])):
        run = make_run(tiny_args, f"run={tmp_path / name}", "data.targets=[delta]", *more)
        collect_adapters(run)
        train_generators(run)
        states[name] = load_tensors(run.path / "generator/none/generator.safetensors")
        said = (run.path / "log.txt").read_text()
    assert all(torch.equal(v, states["compiled"][k]) for k, v in states["plain"].items())
    assert bool(used) == works and ("going on without it" in said) == (not works)
