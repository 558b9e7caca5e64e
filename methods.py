"""Every method of the results, in one table: whatever asks "which methods …" asks here.

A method is a row of the tables. It begins from some adapter (its start), may refine it by a strategy of some family,
and needs certain stages to have run.
"""

from __future__ import annotations

from dataclasses import dataclass

LABEL_FREE = ("TTT", "LORA", "TTS", "Latent")  # the papers' strategy families
ALL_FAMILIES = (*LABEL_FREE, "SFT")  # SFT is ours: it trains on the support labels


@dataclass(frozen=True)
class Method:
    """One row of the results.

    Attributes:
        id: the name in YAML and in paths.
        label: the name in tables and figures.
        color, marker: of matplotlib; colours are Okabe and Ito's, safe for colour-blind readers.
        start: the adapter the method begins from: nothing | plain (B = 0) | generated | aligned | wrong prompts |
            mean | collected | union | maml | abmll.
        families: the strategy families its policy may propose; () where no policy proposes.
        stages: the stages that make what it needs before `evaluate`.
        domain: both, or id where only training tasks have it.
    """

    id: str
    label: str
    color: str
    marker: str
    start: str
    families: tuple[str, ...] = ()
    stages: tuple[str, ...] = ()
    domain: str = "both"


# what the generated adapter, and everything that begins from it, needs
_GENERATED = ("collect", "generator", "adapt")
_ALIGNED = ("collect", "generator", "align", "adapt")

# In the order of the tables. The first eight rows say "not run" where they have no scores; others are left out.
TABLE = (
    Method("base", "Base model", "#000000", "o", "nothing"),
    Method("generator", "Generalization (generator)", "#0072B2", "s", "generated", (), _GENERATED),
    Method("degaml", "Adaptation (DeGAML)", "#D55E00", "D", "generated", LABEL_FREE, _GENERATED),
    Method(
        "degaml_plus",
        "Adaptation, SFT allowed",
        "#CC79A7",
        "D",
        "generated",
        ALL_FAMILIES,
        _GENERATED,
    ),
    Method("mean", "Mean adapter (control)", "#56B4E9", "v", "mean", (), ("collect",)),
    Method(
        "wrong_prompts", "Wrong prompts (control)", "#E69F00", "^", "wrong prompts", (), _GENERATED
    ),
    Method("no_meta", "No Meta-Train LoRA", "#009E73", "P", "plain", (), ("baselines",)),
    Method("full_data", "Full-data LoRA", "#7F7F7F", "*", "collected", (), ("collect",), "id"),
    Method("aligned", "Aligned (+ Fusion VAE)", "#56B4E9", "X", "aligned", (), _ALIGNED),
    Method("tempo", "TEMPO", "#E69F00", "D", "aligned", LABEL_FREE, _ALIGNED),
    Method("tempo_plus", "TEMPO, SFT allowed", "#CC79A7", "X", "aligned", ALL_FAMILIES, _ALIGNED),
    Method("union", "Union Train LoRA", "#009E73", "p", "union", (), ("baselines",)),
    Method("maml", "MAML-en-LLM", "#0072B2", "p", "maml", (), ("baselines",)),
    Method(
        "maml_matched",
        "MAML-en-LLM, matched update norm",
        "#0072B2",
        "h",
        "maml",
        (),
        (*_GENERATED, "baselines"),
    ),
    Method("abmll", "ABMLL", "#D55E00", "p", "abmll", (), ("baselines",)),
)
METHODS = {method.id: method for method in TABLE}
ALWAYS_SHOWN = tuple(METHODS)[:8]

# methods whose policy searches for a strategy
PROPOSING = tuple(m.id for m in TABLE if m.families)
# methods that begin from an adapter moved by the Fusion VAE (TEMPO, stage 2)
ALIGNED = tuple(m.id for m in TABLE if m.start == "aligned")
# methods that need one generator, and often keep one and the same adapter: scored together
GENERATED = tuple(m.id for m in TABLE if m.start in ("generated", "aligned", "wrong prompts"))
# the names of starts that have a meta-training of their own, longest first
META_TRAINED = ("maml", "abmll", "union")
# methods that fine-tune on the support labels from a start without a generator
BASELINES = tuple(m.id for m in TABLE if m.start in ("plain", *META_TRAINED))
# methods that can do without a single label of the target
LABEL_FREE_METHODS = tuple(
    m.id
    for m in TABLE
    if m.start in ("nothing", "generated", "aligned", "wrong prompts", "mean") and not m.families
)


def families_of(method: str, wanted: list[str]) -> list[str]:
    """The strategy families a method may propose: its own, as far as `policy.families` lists them; SFT always."""
    own = METHODS[method].families
    chosen = [family for family in wanted if family in own and family != "SFT"]
    return [*chosen, "SFT"] if "SFT" in own else chosen


def sampled_families(method_ids: list[str], wanted: list[str]) -> set[str]:
    """The families that at least one of some methods may propose, and those of `policy.families`."""
    searching = [m for m in method_ids if "SFT" in METHODS[m].families]
    return {*wanted, "SFT"} if searching else set(wanted)


def idle_stages(method_ids: list[str]) -> set[str]:
    """The stages before `evaluate` whose results none of these methods uses."""
    needed = {stage for m in method_ids for stage in METHODS[m].stages}
    return {"collect", "generator", "align", "policy", "adapt", "baselines"} - needed
