"""Configuration: layering, numbers as people write them, and faults reported all at once."""

import subprocess
import sys

import pytest
import yaml

import config
import degaml
import lora
from config import DEFAULT, ROOT, Config, UserError, load_config

NOT_PRESETS = {"default", "contexts", "models"}
PRESETS = sorted(p for p in (ROOT / "configs").glob("*.yaml") if p.stem not in NOT_PRESETS)
DIMS = {
    "assets/models/smollm2-135m-instruct": [576, 192, 1536],
    "Qwen/Qwen2.5-0.5B-Instruct": [896, 128, 4864],
    "Qwen/Qwen2.5-1.5B-Instruct": [1536, 256, 8960],
}


def faults(*words: str) -> list[str]:
    with pytest.raises(UserError) as e:
        load_config(list(words))
    return str(e.value).splitlines()


def test_all_faults_at_once_golden(tmp_path):
    """Every unknown key, wrong type and value out of range is named once, with its origin and the
    nearest key."""
    preset = tmp_path / "my.yaml"
    preset.write_text(
        "modle:\n  name: x\nevaluate:\n  metric: accuracy\ncollect:\n  batch_size: 0\n"
    )
    given = [
        "generator.stepz=10",
        "colect.save_lst=2",
        "seed=1.5",
        "overwrite=1",
        "generator.lr=fast",
    ]
    assert faults(f"config={preset}", *given) == [
        "8 fault(s) in the configuration:",
        f"  modle.name ({preset}): unknown key; did you mean `model.name`?",
        "  generator.stepz (command line): unknown key; did you mean `generator.steps`?",
        "  colect.save_lst (command line): unknown key; did you mean `collect.save_last`?",
        "  seed (command line): got 1.5; Input should be a valid integer, got a number with a "
        "fractional part",
        "  overwrite (command line): got 1; Input should be a valid boolean",
        f"  collect.batch_size ({preset}): got 0; Input should be greater than or equal to 1",
        "  generator.lr (command line): got 'fast'; Input should be a valid number, unable to "
        "parse string as a number",
        f"  evaluate.metric ({preset}): got 'accuracy'; Input should be 'norm', 'raw', 'strict' or "
        "'lenient'",
    ]


def test_even_kernel_is_named_with_an_odd_one():
    """An even kernel is reported under its own key, shortly, even beside another fault of its
    section."""
    lines = faults("generator.kernel=4", "generator.steps=0")
    start = "  generator.kernel (command line): got 4;"
    (kernel,) = [line for line in lines if line.startswith(start)]
    assert "odd" in kernel and "try 5" in kernel and len(kernel) < 150
    assert any(line.startswith("  generator.steps (command line): got 0;") for line in lines)


@pytest.mark.parametrize(
    "word, start",
    [
        ("seed=many", "seed (command line): got 'many'; "),
        ("data.train_tasks=arc_e", "data.train_tasks (command line): "),
        ("generator.lr=2", "generator.lr (command line): got 2; "),
        ("generator.lr=0", "generator.lr (command line): got 0;"),
        ("collect.pretrain_lr=-1e-4", "collect.pretrain_lr (command line): got -0.0001; "),
        ("data.num_test=0", "data.num_test (command line): got 0; "),
        ("name=", "name (command line): got None; "),
        ("policy.families=[TTT, TTL]", "policy.families.1 (command line): got ['TTT', 'TTL']; "),
        ("evaluate.methods=[base, b]", "evaluate.methods.1 (command line): got ['base', 'b']; "),
        ("generator.flow=[[128, 384]]", "generator.flow.0 (command line): got [[128, 384]]; "),
        ("device=gpu", "device (command line): got 'gpu'; "),
        ("data=5", "data (command line): unknown key; "),
        ("generator.lr={a: 1}", "generator.lr (command line): got {'a': 1}; "),
        ("data.columns={t: {gold: a, choices: b}}", "data.columns.t.question (command line): "),
    ],
)
def test_wrong_type_or_range_names_key_and_value(word, start):
    """One bad value gives one fault that starts with key, origin and what was got."""
    lines = faults(word)
    assert lines[0] == "1 fault(s) in the configuration:" and len(lines) == 2
    assert lines[1].startswith("  " + start)


@pytest.mark.parametrize("word", ["generator.steps=true", "seed=false", "generator.lr=true"])
def test_a_boolean_is_no_number(word):
    """true where a number belongs is a wrong type, not a silent 1."""
    key = word.split("=")[0]
    assert faults(word)[1].startswith(f"  {key} (command line): got ")


@pytest.mark.parametrize(
    "word, start",
    [
        (
            "collect.save_last=500",
            "collect.save_last (command line): got 500; training has 125 steps: at most 125",
        ),
        ("policy.folds=30", "policy.folds (command line): got 30 folds of 20 support examples"),
        ("data.targets=[foo]", "data.targets (command line): ['foo'] are in neither"),
        ("data.test_tasks=[arc_e]", "data.test_tasks (command line): ['arc_e'] are listed twice"),
        (
            "generator.num_prompts=64",
            "generator.flow (configs/default.yaml): its first entry must be",
        ),
        (
            "policy.min_per_family=9",
            "policy.min_per_family (command line): 9 x 5 families exceed policy.proposals = 20: "
            "at most 4",
        ),
        (
            "evaluate.metric=strict",
            "evaluate.metric (command line): strict needs generated answers",
        ),
        (
            "data.train_tasks=[arc_e, arc_c]",
            "data.train_tasks (command line): leave-one-out needs at least 3 tasks",
        ),
    ],
)
def test_faults_across_two_keys(word, start):
    """Values that are legal alone but not together are refused with the limit they break."""
    assert faults(word)[1].startswith("  " + start)


@pytest.mark.parametrize(
    "words, start",
    [
        (
            ["policy.steps=2", "policy.families=[TTS, Latent]", "policy.min_per_family=0"],
            "policy.steps (command line): 2 steps, but none of ['TTS', 'Latent'] can be chained",
        ),
        (
            ["evaluate.methods=[maml_qvo]", "baselines.maml.modules=[q_proj, foo_proj]"],
            "baselines.maml.modules (command line): ['foo_proj'] not adapted in this run; "
            "model.modules has [",
        ),
    ],
)
def test_faults_across_sections(words, start):
    """A chain that no family continues, a baseline of modules that have no adapter."""
    assert faults(*words)[1].startswith("  " + start)


def test_cross_checks_join_the_other_faults():
    """A fault across two keys is not held back until the unknown keys are mended."""
    lines = "\n".join(faults("policy.folds=30", "generator.stepz=10"))
    assert "policy.folds" in lines and "generator.stepz" in lines


@pytest.mark.parametrize(
    "text, value",
    [
        ("3e-5", 3e-5),
        ("1e3", 1000.0),
        ("1E3", 1000.0),
        ("-2.5e+1", -25.0),
        (".5", 0.5),
        ("7", 7),
        ("1e-3x", "1e-3x"),
        ("'3e-5'", "3e-5"),
    ],
)
def test_numbers_in_scientific_notation(text, value):
    """3e-5 and 1e3 are numbers, unlike in YAML 1.1; quoted or trailing text is not."""
    got = config.parse_yaml(f"a: {text}", "here")["a"]
    assert got == value and type(got) is type(value)


def test_scientific_notation_in_file_and_on_the_command_line(tmp_path):
    """Both places accept 3e-5 for a rate and 1e3 for a count."""
    preset = tmp_path / "p.yaml"
    preset.write_text("generator:\n  lr: 3e-4\n  steps: 1e3\n")
    g = load_config([f"config={preset}"])[0].generator
    assert (g.lr, g.steps) == (3e-4, 1000) and isinstance(g.steps, int)
    g = load_config([f"config={preset}", "generator.lr=3e-5", "generator.steps=2e3"])[0].generator
    assert (g.lr, g.steps) == (3e-5, 2000)


def test_order_default_preset_command_line(tmp_path):
    """default < config= < key=value, whatever the order of the words; `differences` lists just what
    changed."""
    preset = tmp_path / "p.yaml"
    preset.write_text("seed: 5\nname: mine\n")
    cfg, stage = load_config(["seed=6", f"config={preset}", "stage=collect"])
    assert (cfg.seed, cfg.name, stage) == (6, "mine", "collect")
    assert config.differences(cfg) == {"seed": 6, "name": "mine"}
    assert load_config([])[1] == "all"


def test_split_at_the_first_equals_sign():
    """A value may hold `=`."""
    assert load_config(["name=a=b=c"])[0].name == "a=b=c"


@pytest.mark.parametrize("text, value", [("true", True), ("false", False), ("True", True)])
def test_boolean_keys_take_booleans(text, value):
    """As YAML writes them."""
    assert load_config([f"overwrite={text}"])[0].overwrite is value


@pytest.mark.parametrize("text", ["1", "0", "'true'", "maybe", ""])
def test_boolean_keys_take_nothing_else(text):
    """No text or number turns into a truth value."""
    assert faults(f"overwrite={text}")[1].startswith("  overwrite (command line): got ")


def test_every_preset_validates():
    """Eight presets exist, each is legal, and its token width divides every dimension of its
    model."""
    assert len(PRESETS) == 8
    for path in PRESETS:
        cfg, _ = load_config([f"config={path}"])
        assert cfg.name == path.stem and cfg.run == f"runs/{path.stem}"
        lora.check_width(cfg.model.token_width, DIMS[cfg.model.name])


def leaves(section, prefix=""):
    for name, field in section.model_fields.items():
        if hasattr(field.annotation, "model_fields"):
            yield from leaves(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


def test_default_holds_every_key_of_the_schema():
    """configs/default.yaml and the schema name the same keys."""
    assert sorted(config.flatten(yaml.safe_load(DEFAULT.read_text()))) == sorted(leaves(Config))


def test_default_explains_every_key():
    """Each key of configs/default.yaml has a comment."""
    text = DEFAULT.read_text().replace(",\n", ",")  # a list of two lines
    for line in text.splitlines():
        assert "#" in line or line.endswith(":") or not line


@pytest.mark.parametrize(
    "width, dims, legal",
    [
        (128, [576, 192, 1536], "[8, 12, 16, 24, 32, 48, 64, 96, 192]"),
        (192, [896, 128, 4864], "[8, 16, 32, 64, 128]"),
        (5, [12, 18], "[6]"),
    ],
)
def test_token_width_names_the_legal_ones(width, dims, legal):
    """A width that divides not every dimension is refused with all that do."""
    with pytest.raises(UserError, match=f"model.token_width.*{width} does not divide") as e:
        lora.check_width(width, dims)
    assert str(e.value).endswith(f"legal: {legal}")


def test_token_width_that_divides_is_accepted():
    """The presets' widths and width 1 pass."""
    lora.check_width(192, [576, 192, 1536])
    lora.check_width(1, [7, 11])


def test_files_that_are_no_configuration(tmp_path):
    """A missing preset lists the presets there are; broken YAML names file and line; a list is
    refused."""
    message = faults(f"config={tmp_path / 'nope.yaml'}")[0]
    assert "no such file" in message and "configs/smollm2.yaml" in message
    assert "contexts" not in message
    bad = tmp_path / "bad.yaml"
    bad.write_text("seed: 1\nname: [a\n")
    message = faults(f"config={bad}")[0]
    assert message.startswith(f"{bad}:") and "not valid YAML" in message
    bad.write_text("- a\n- b\n")
    assert faults(f"config={bad}") == [f"{bad}: expected `key: value` lines, got list"]


@pytest.mark.parametrize(
    "argv",
    [
        ["stage=nonsense"],
        ["--stage", "all"],
        ["generator.lr"],
        ["generator.lrr=1"],
        ["stage=collect", "seed=x"],
        ["config=missing.yaml"],
        ["name=[a"],
    ],
)
def test_main_turns_mistakes_into_one_error_line(argv, capsys, tmp_path):
    """A user's mistake: status 2, one `error:` on stderr, no traceback, nothing on stdout, no run
    folder."""
    assert degaml.main([*argv, f"run={tmp_path / 'run'}"]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("error:") == 1
    assert "Traceback" not in err and out == ""
    assert not (tmp_path / "run").exists()
    if argv == ["stage=nonsense"]:
        assert "legal: all, prepare, collect, generator, align" in err


def test_help_names_every_stage(capsys):
    """--help lists all stages and returns 0."""
    assert degaml.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in degaml.STAGES)
    assert set(degaml.PIPELINE) <= set(degaml.STAGES)


def test_looking_leaves_no_trained_run_behind(tmp_path, tiny_args, capsys):
    """stage=config and stage=check print; neither makes nor redescribes a run folder's
    configuration."""
    record = tmp_path / "run/config.yaml"
    for stage in ("config", "check"):
        assert degaml.main([*tiny_args, f"stage={stage}"]) == 0
    assert not record.exists() and not (tmp_path / "run/command.txt").exists()
    record.write_text("seed: 5\n")
    assert degaml.main([*tiny_args, "stage=config", "generator.lr=0.5"]) == 0
    assert record.read_text() == "seed: 5\n"


@pytest.mark.parametrize(
    "word, complaint",
    [
        ("generator.encoder=nowhere", "generator.encoder=nowhere: cannot be loaded"),
        ("generator.flow=[[4, 16, 48], [8, 8, 16]]", "ends in 48, the width of"),
        (
            "strategies.proposal_grid={SFT.steps: [5]}",
            "'SFT.steps' is no field of a strategy",
        ),
        ("strategies.proposal_grid={TTT.ttl_steps: [5000]}", "TTT.ttl_steps is 5000"),
        ("strategies.proposal_grid={TTS.method: [best]}", "TTS.method is 'best'"),
    ],
)
def test_check_looks_before_the_hours(tiny_args, capsys, word, complaint):
    """The encoder before collection, and a grid of values that no proposal may have before any is
    sampled."""
    assert degaml.main([*tiny_args, "stage=check", word]) == 2
    assert complaint in capsys.readouterr().err


def test_sft_counts_among_the_families(tiny_args):
    """degaml_plus samples SFT besides the listed families: each needs its minimum."""
    with pytest.raises(UserError, match="1 x 5 families exceed policy.proposals = 4"):
        load_config([*tiny_args, "policy.proposals=4"])
    load_config([*tiny_args, "policy.proposals=4", "evaluate.methods=[generator, degaml]"])


def test_helpers_do_not_import_the_entry_file():
    """Under torchrun the entry file is `__main__`: a module that imports it would load it again."""
    for path in ROOT.glob("*.py"):
        if path.name != "degaml.py":
            text = path.read_text()
            assert "import degaml" not in text and "from degaml" not in text, path
    assert "degaml" in sys.modules


def test_a_reader_that_goes_away_ends_it_silently():
    """`stage=config | head`: no traceback."""
    words = [sys.executable, "degaml.py", "stage=config", "dtype=float32", "run=runs/test-pipe"]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, cwd=config.ROOT, stdout=pipe, stderr=pipe, text=True) as process:
        process.stdout.close()
        assert process.wait(120) == 141
        assert "Traceback" not in process.stderr.read()
