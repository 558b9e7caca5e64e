"""Every method of the results, in one table: whatever asks "which methods …" asks here.

A method is a row of the tables. It begins from some adapter (its start), a policy may refine that
adapter by a strategy of some family, and certain stages have to run before it can be evaluated.
"""

from __future__ import annotations

from dataclasses import dataclass

LABEL_FREE = ("TTT", "LORA", "TTS", "Latent")  # the papers' strategy families
WITH_LABELS = (*LABEL_FREE, "SFT")  # SFT is ours: it trains on the support labels

# What has to run before an adapter of each start is there. Starts are adapters:
STAGES_OF_START = {
    "none": (),  # the frozen base model
    "plain": ("baselines",),  # A drawn once, B = 0
    "generated": ("collect", "generator", "adapt"),
    "wrong prompts": ("collect", "generator", "adapt"),  # generated from another task's prompts
    "aligned": ("collect", "generator", "align", "adapt"),  # generated, then the Fusion VAE
    "mean": ("collect",),  # of the training tasks' adapters
    "collected": ("collect",),  # the task's own training adapter
    "union": ("baselines",),  # this and the next three have a meta-training of their own
    "maml": ("baselines",),
    "maml, q v o": ("baselines",),
    "abmll": ("baselines",),
    "maml, matched": ("collect", "generator", "adapt", "baselines"),
}
META_TRAINED = ("maml", "maml_qvo", "abmll", "union")  # longest first, as ranks take them


@dataclass(frozen=True)
class Method:
    """One row of the results.

    Attributes:
        id: the name in YAML and in paths.
        label: the name in tables and figures.
        color, marker: of matplotlib; Okabe and Ito's colours, for colour-blind readers too.
        start: the adapter the method begins from.
        families: the strategy families its policy may propose; () where no policy proposes.
        domain: both, or id where only training tasks have it.
    """

    id: str
    label: str
    color: str
    marker: str
    start: str
    families: tuple[str, ...] = ()
    domain: str = "both"

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages that must have run before `evaluate`."""
        policy = ("policy",) if self.families else ()
        return (*STAGES_OF_START[self.start], *policy)


# In the order of the tables. The first nine say "not run" where they have no scores.
TABLE = (
    Method("base", "Base model", "#000000", "o", "none"),
    Method("icl", "Labels in the prompt (icl)", "#7F7F7F", "+", "none"),
    Method("generator", "Generalization (generator)", "#0072B2", "s", "generated"),
    Method("degaml", "Adaptation (DeGAML)", "#D55E00", "D", "generated", LABEL_FREE),
    Method("degaml_plus", "Adaptation, SFT allowed", "#CC79A7", "D", "generated", WITH_LABELS),
    Method("mean", "Mean adapter (control)", "#56B4E9", "v", "mean"),
    Method("wrong_prompts", "Wrong prompts (control)", "#E69F00", "^", "wrong prompts"),
    Method("no_meta", "No Meta-Train LoRA", "#009E73", "P", "plain"),
    Method("full_data", "Full-data LoRA", "#7F7F7F", "*", "collected", domain="id"),
    Method("aligned", "Aligned (+ Fusion VAE)", "#56B4E9", "X", "aligned"),
    Method("tempo", "TEMPO", "#E69F00", "D", "aligned", LABEL_FREE),
    Method("tempo_plus", "TEMPO, SFT allowed", "#CC79A7", "X", "aligned", WITH_LABELS),
    Method("union", "Union Train LoRA", "#009E73", "p", "union"),
    Method("maml", "MAML-en-LLM", "#0072B2", "p", "maml"),
    Method("maml_matched", "MAML-en-LLM, matched update", "#0072B2", "h", "maml, matched"),
    Method("maml_qvo", "MAML-en-LLM (TEMPO, App. H)", "#56B4E9", "8", "maml, q v o"),
    Method("abmll", "ABMLL", "#D55E00", "p", "abmll"),
    Method("degaml_ttt", "DeGAML, TTT only", "#0072B2", "<", "generated", ("TTT",)),
    Method("degaml_lora", "DeGAML, LORA only", "#009E73", ">", "generated", ("LORA",)),
    Method("degaml_tts", "DeGAML, TTS only", "#56B4E9", "d", "generated", ("TTS",)),
    Method("degaml_latent", "DeGAML, Latent only", "#E69F00", "H", "generated", ("Latent",)),
)
METHODS = {method.id: method for method in TABLE}
ALWAYS_SHOWN = tuple(METHODS)[:9]
# by `make families`: degaml with one strategy family each
SINGLE_FAMILY = ("degaml_ttt", "degaml_lora", "degaml_tts", "degaml_latent")
# by `make reproduce-all`
REPRODUCED = tuple(id for id in METHODS if id not in ("tempo_plus", "maml_qvo", *SINGLE_FAMILY))


def _ids_by_start(*starts: str) -> tuple[str, ...]:
    return tuple(method.id for method in TABLE if method.start in starts)


# methods whose policy searches for a strategy
PROPOSING = tuple(method.id for method in TABLE if method.families)
# methods that begin from an adapter moved by the Fusion VAE (TEMPO, stage 2)
ALIGNED = _ids_by_start("aligned")
# methods that need one generator, and often keep one and the same adapter: scored together
GENERATED = _ids_by_start("generated", "wrong prompts", "aligned")
# methods that fine-tune on the support labels without a policy of their own
BASELINES = _ids_by_start("plain", "union", "maml", "maml, matched", "maml, q v o", "abmll")
# by `stage=adapt` on a task of the user's own: what a verdict needs
OWN_TASK = ("base", "icl", "wrong_prompts", "generator", "degaml_plus", "no_meta")
# methods that need not one label of the target
NEEDS_NO_LABELS = ("base", "generator", "mean", "wrong_prompts", "aligned")


def families_of(method: str, wanted: list[str]) -> list[str]:
    """The families a method's policy may propose: its own in `policy.families`, then SFT."""
    own = METHODS[method].families
    chosen = [family for family in wanted if family in own and family != "SFT"]
    return [*chosen, "SFT"] if "SFT" in own else chosen


def sampled_families(method_ids: list[str], wanted: list[str]) -> set[str]:
    """The families of `policy.families`, and SFT where one of the methods may propose it."""
    with_labels = [m for m in method_ids if "SFT" in METHODS[m].families]
    return {*wanted, "SFT"} if with_labels else set(wanted)


def idle_stages(method_ids: list[str]) -> set[str]:
    """The stages before `evaluate` whose results none of these methods uses."""
    everything = {"collect", "generator", "align", "policy", "adapt", "baselines"}
    needed = {stage for m in method_ids for stage in METHODS[m].stages}
    return everything - needed
