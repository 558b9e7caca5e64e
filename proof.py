"""Is the base model what this code takes it for? Proved on the model itself, before the hours.

    python degaml.py stage=check config=configs/smollm2.yaml

All scores rest on packed rows: the options of several questions share a forward pass and must not
see each other. Layers that are not attention (Mamba, linear attention, convolutions), windows
shorter than a row, or a head that scales its logits otherwise give numbers that look like scores
and are none. So some questions are scored both as everywhere here, and option by option with
transformers' own attention.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import transformers
from jinja2 import TemplateError

import answers
import data
import lora
import runtime
import scoring
from config import UserError
from data import Example
from lora import Layout
from prefix import read_once
from runtime import Run
from scoring import LM, Row

# Nats per token that two ways to compute the same score may differ, on average over a row's
# options: SmolLM2-135M had 0.12 in bfloat16 on a CPU, 0.39 on an H200, and less than 1e-3 in
# float32. A model that mixes options differs by whole nats.
TOLERANCE = {torch.float32: 0.01, torch.bfloat16: 0.5, torch.float16: 0.2}

REMEDY = "use a decoder whose layers are all full attention"

QUESTIONS = (
    ("Which gas do plants take in from the air?", ("oxygen", "carbon dioxide", "pure nitrogen")),
    ("What is two and two?", ("four", "five or six", "nothing at all")),
    ("Who keeps bees?", ("a beekeeper", "the captain of a ship", "nobody")),
)
SENTENCE = "The old town lies at the river between two hills, and its market opens on Monday. "


def ensure(run: Run) -> None:
    """Prove the base model, unless this run folder's proof.json says it was proved as it is now.

    Rank 0 does; a barrier behind it is the caller's.
    Raises: UserError: as of `prove_model`.
    """
    if run.rank:
        return
    cfg = run.cfg
    lm = scoring.load_lm(run)
    case = {
        "model": cfg.model.model_dump(),
        "architecture": lm.model.config.model_type,
        "format": cfg.data.format,
        "max_tokens": cfg.data.max_tokens,
        "device": str(lm.model.device),
        "dtype": str(lm.model.dtype),
        "versions": [torch.__version__, transformers.__version__],
    }
    file = run.path / "proof.json"
    if file.is_file() and runtime.read_json(file).get("case") == case:
        return
    notes = prove_model(lm)
    runtime.write_json(file, {"case": case, "notes": notes})
    for note in notes:
        run.log(note)


def prove_model(lm: LM) -> list[str]:
    """Refuse a base model that cannot be scored or trained as this code does it.

    Returns: what a user should know of it, a line each.
    Raises: UserError: one sentence that says what differs, by how much, and what to do.
    """
    _check_tokenizer(lm)
    _check_experts(lm)
    notes = _check_template(lm)
    short = []
    behind = []
    for number, (question, options) in enumerate(QUESTIONS):
        text = f"Question: {question}\nAnswer:"
        short.append(scoring.make_row(lm, Example(str(number), text, options, 0)))
        behind.append(scoring.make_row(lm, Example(str(number), SENTENCE + text, options, 0)))
    _compare(lm, short, "options of several questions in one pass")
    _check_window(lm)
    _check_cache(lm, short)
    _compare(lm, behind, "questions behind what they all begin with")
    _compare(lm, [_longest_row(lm, short[0])], f"a question of {lm.max_tokens} tokens")
    _check_products(lm, short)
    _check_gradients(lm, short[:1])
    return [*notes, *_not_adapted(lm)]


def _check_tokenizer(lm):
    """Raises: UserError: it knows tokens that the model has no embedding for."""
    rows = lm.model.get_input_embeddings().weight.shape[0]
    if len(lm.tokenizer) > rows:
        raise UserError(
            f"model.name: the tokenizer has {len(lm.tokenizer)} tokens and the embedding {rows} "
            "rows; they are not of the same model"
        )


def _check_window(lm):
    """Raises: UserError: a layer sees less than a row. The rows' own mask replaces its window."""
    window = getattr(lm.model.config.get_text_config(), "sliding_window", None)
    if window and window <= lm.max_tokens:
        raise UserError(
            f"model.name={lm.model.name_or_path}: its layers see {window} tokens and rows may have "
            f"{lm.max_tokens}; lower data.max_tokens below its window of {window}"
        )


def _check_experts(lm):
    """Raises: UserError: modules beside experts, whose names PEFT takes for those of the experts.

    It would read the exported adapter without them. Source: peft's conversion of MoE models.
    """
    names = {path.rsplit(".", 1)[-1] for path, *_ in lm.layout.modules}
    of_experts = sorted(names & {"gate_proj", "up_proj", "down_proj"})
    weights = lm.model.get_decoder().named_parameters()
    if of_experts and any("experts" in path and weight.dim() == 3 for path, weight in weights):
        raise UserError(
            f"model.modules: other tools take {', '.join(of_experts)} for the experts' weights, "
            "which have no adapter here; leave these names out of model.modules"
        )


def _longest_row(lm, row):
    """A row of as many tokens before its options as `data.max_tokens` allows."""
    sentence = scoring.encode(lm, SENTENCE)
    times = 1 + lm.max_tokens // len(sentence)
    before = (sentence * times)[: max(0, lm.max_tokens - len(row.context))]
    context = (*before, *row.context)
    return Row(context, row.branches, row.starts, row.chars, row.gold)


@torch.no_grad()
def _compare(lm, rows, what):
    """Raises: UserError: packed scores are not those of each option alone."""
    name = lm.model.name_or_path
    try:
        packed = _score_packed(lm, rows)
    except Exception as error:  # whatever a foreign model's own code raises
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:160]
        raise UserError(f"model.name={name}: cannot compute {what} ({reason}); {REMEDY}") from None

    # the mean over a row's options: in 16 bits one unlikely token may be a nat off by rounding
    largest = 0.0
    for row, scores in zip(rows, packed, strict=True):
        gaps = []
        for branch, start, score in zip(row.branches, row.starts, scores.tolist(), strict=True):
            alone = _score_alone(lm, [*row.context, *branch], len(branch) - start)
            gaps.append(abs(score - alone) / (len(branch) - start))
        largest = max(largest, sum(gaps) / len(gaps))
    if largest > TOLERANCE[lm.model.dtype]:
        raise UserError(
            f"model.name={name}: {what} score differently than each option alone, by "
            f"{largest:.2g} nats a token ({_reason(lm)}); {REMEDY}"
        )


def _score_packed(lm, rows):
    """As everywhere here: side by side, and what all rows begin with read once."""
    with read_once(lm, rows) as own:
        hidden, starts = scoring.hidden_states(lm, own)
        return scoring.branch_logprobs(lm, own, hidden, starts)


@torch.no_grad()
def _check_products(lm, rows):
    """Raises: UserError: an adapter with B = 0 changes scores: a layer does more than multiply.

    Quantised layers scale their weights or their inputs, which the adapted product does not.
    """
    bare = torch.cat(_score_packed(lm, rows))
    lora.swap_adapter(lm.model, lm.layout, lora.init_adapter(lm.layout, 0))
    try:
        adapted = torch.cat(_score_packed(lm, rows))
    finally:
        lora.clear_adapters(lm.model)
    tokens = sum(len(branch) for row in rows for branch in row.branches)
    apart = float((adapted - bare).abs().sum()) / tokens
    if not apart <= TOLERANCE[lm.model.dtype]:
        raise UserError(
            f"model.name={lm.model.name_or_path}: an adapter that changes nothing moves scores by "
            f"{apart:.2g} nats a token: its layers do more than multiply; use the same model in "
            "weights that are not quantised"
        )


@torch.no_grad()
def _check_cache(lm, rows):
    """Raises: UserError: behind a padded and cached prompt a token is not what it is alone."""
    device = lm.model.device
    prompts = [row.context for row in rows]
    # of unlike lengths, as in a batch of answers
    prompts[0] = prompts[0][len(prompts[0]) // 2 :]
    ids, mask, positions = answers.pad_left(prompts, device)
    decoder = lm.model.get_decoder()
    out = decoder(ids, attention_mask=mask, position_ids=positions, use_cache=True)

    token = rows[0].branches[0][0]
    out = decoder(
        torch.full((len(rows), 1), token, device=device),
        attention_mask=torch.cat([mask, mask.new_ones(len(rows), 1)], 1),
        position_ids=positions[:, -1:] + 1,
        past_key_values=out.past_key_values,
        use_cache=True,
    )
    cached = scoring.project(lm, out.last_hidden_state[:, -1]).log_softmax(-1)
    for prompt, logprobs in zip(prompts, cached, strict=True):
        likeliest = int(logprobs.argmax())
        alone = _score_alone(lm, [*prompt, token, likeliest], 1)
        apart = abs(float(logprobs[likeliest]) - alone)
        if apart > TOLERANCE[lm.model.dtype]:
            raise UserError(
                f"model.name={lm.model.name_or_path}: written answers differ behind a padded and "
                f"cached prompt, by {apart:.2g} nats a token ({_reason(lm)}); {REMEDY}"
            )


def _check_template(lm):
    """What a user should know of the chat template. Raises: UserError: it cannot be rendered."""
    if lm.form != "letter":
        return []
    try:
        text = scoring.chat_prompt(lm.tokenizer, data.LETTER_SYSTEM, QUESTIONS[0][0])
    except TemplateError as error:
        raise UserError(
            f"model.name={lm.model.name_or_path}: its chat template cannot be rendered ({error}); "
            "use data.format=cloze"
        ) from None
    if "<think>" in text and "</think>" not in text:
        return [
            "the chat template opens <think> and cannot be told not to: a written answer may end "
            "inside; raise evaluate.max_new_tokens, or rely on log-likelihoods"
        ]
    return []


def _score_alone(lm, ids, scored):
    """Log-probability of a sequence's last tokens, by the attention that its authors wrote."""
    ids = torch.tensor([ids], device=lm.model.device)
    before = lm.model.config._attn_implementation
    lm.model.set_attn_implementation("eager")
    try:
        logits = lm.model(input_ids=ids, use_cache=False).logits[0, -scored - 1 : -1]
    finally:
        lm.model.set_attn_implementation(before)
    return -float(F.cross_entropy(logits.float(), ids[0, -scored:], reduction="sum"))


def _layer_kinds(lm):
    kinds = getattr(lm.model.config.get_text_config(), "layer_types", None) or []
    return sorted(set(kinds))


def _reason(lm):
    kinds = _layer_kinds(lm)
    if kinds:
        return f"its layers are of {', '.join(kinds)}"
    return f"its type is {lm.model.config.model_type}"


def _check_gradients(lm, rows):
    """Raises: UserError: a module whose A or B the loss does not depend on; all are named."""
    layout = lm.layout
    adapter = lora.init_adapter(layout, 0)
    for _, _, b, _ in layout.keys():
        adapter[b] = torch.full_like(adapter[b], 0.01)
    views = {}
    for key, tensor in adapter.items():
        views[key] = tensor.to(lm.model.device, lm.model.dtype).requires_grad_()

    lora.swap_adapter(lm.model, layout, views)
    try:
        loss = scoring.lm_loss(lm, rows)
        gradients = torch.autograd.grad(loss, list(views.values()), allow_unused=True)
    finally:
        lora.clear_adapters(lm.model)

    idle = set()
    for key, gradient in zip(views, gradients, strict=True):
        if gradient is None or not bool(gradient.isfinite().all()) or not bool(gradient.any()):
            idle.add(key.removeprefix(lora.PREFIX).rsplit(".lora_", 1)[0])
    if idle:
        raise UserError(
            f"model.modules: no finite gradient reaches {len(idle)} adapted modules, such as "
            f"{min(idle)}; leave their names out of model.modules"
        )


def _not_adapted(lm):
    """Which weights of the decoder's layers have no adapter, counted by name."""
    layout: Layout = lm.layout
    adapted = {path for path, *_ in layout.modules}
    counts = {}
    for path, parameter in lm.model.get_decoder().named_parameters():
        # a matrix of a linear layer has two dimensions, those of all experts together three
        if parameter.dim() < 2 or "layers." not in path:
            continue
        place = path.removesuffix(".weight").removesuffix(".base")
        if any(whole.endswith(place) for whole in adapted):
            continue
        name = place.rsplit(".", 1)[-1]
        if "experts" in place:
            name = f"experts' {name}"
        counts[name] = counts.get(name, 0) + 1
    if not counts:
        return []
    listed = ", ".join(f"{name} ({count})" for name, count in sorted(counts.items()))
    return [f"not adapted, as model.modules does not name them: {listed}"]
