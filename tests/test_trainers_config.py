"""Options from a YAML file and the command line, and what is refused before anything is loaded."""

from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from conftest import no_kernel

from trainers.config import TrainerConfig
from trainers.generation import Sampling
from trainers.program import parse
from trainers.rlsd import DEFAULTS, RLSDConfig
from trainers.ssd import SSDConfig

pytestmark = [no_kernel, pytest.mark.usefixtures("one_thread")]
CONFIGS = Path(__file__).resolve().parents[1] / "trainers" / "configs"
PROGRAMS = {"rlsd": RLSDConfig, "ssd": SSDConfig}


@pytest.fixture
def read(tmp_path):
    def read(text, *argv, of=RLSDConfig):
        (tmp_path / "options.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return parse(of, ["--testbed", "arithmetic", f"--config={tmp_path}/options.yaml", *argv], "")

    return read


@pytest.fixture
def refused(capsys):
    def refused(call, *arguments, **options):
        """The message with which the program ends."""
        with pytest.raises(SystemExit) as exit:
            call(*arguments, **options)
        assert exit.value.code == 2
        return capsys.readouterr().err.partition("error: ")[::2]

    return refused


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("learning_rate: 1e-4", 1e-4),  # text to PyYAML
        ("learning_rate: 0.5", 0.5),
        ("learning_rate: 1", 1.0),
        ("max_steps: 7", 7),
        ("bf16: true", True),
        ("bf16: yes", True),
        ("scale_rewards: false", False),
        ("report_to: [tensorboard, trackio]", ["tensorboard", "trackio"]),
        ("report_to: trackio", ["trackio"]),
        ("report_to: []", []),
        ("lora_target_modules: []", []),  # not the default
        ("run_name: a café = b", "a café = b"),
        ("run_name: --x", "--x"),
        ("teacher: ema", "ema"),
        ("teacher_sync_steps: 0", 0),
        ("divergence_token_clip: 1e-2", 1e-2),
        ('privileged_template: "H{privileged}|{prompt}"', "H{privileged}|{prompt}"),
    ],
)
def test_a_value_in_the_file_is_the_options_value(read, line, value):
    found, rest = vars(read(line)), vars(RLSDConfig(testbed="arithmetic"))
    name = line.partition(":")[0]
    assert found[name] == value
    assert type(found[name]) is type(value)
    assert {**found, name: None} == {**rest, name: None}


def test_lists_in_the_file(read):
    decodes = ["1.0", "1e-1", "0.8/20/0.95"]
    assert read(f"eval_decodes: [{', '.join(decodes)}]", of=SSDConfig).eval_decodes == decodes


@pytest.mark.parametrize(
    ("decode", "sampling"),
    [("1.6/20/0.8", Sampling(1.6, 20, 0.8)), ("0.9/0/0.8", Sampling(0.9, 0, 0.8)), ("1.0/0/1", Sampling(1.0, 0, 1.0)),
     ("0.9/none/0.8", Sampling(0.9, 0, 0.8)), ("1.1", Sampling(1.1, 0, 1.0)), ("0", Sampling(0.0, 0, 1.0))],
)  # fmt: skip
def test_a_decode_is_read_as_ssds_tables_write_it(decode, sampling):
    assert Sampling.parse(decode) == sampling


@pytest.mark.parametrize("decode", [
    "hot", "1/20", "1/20/0.8/3", "1/twenty/0.8", "", "-1", "nan", "inf", "1/-1/0.8", "1/20/0",
    "1/20/80",
])  # fmt: skip
def test_a_decode_is_a_temperature_and_maybe_filters(read, decode, capsys):
    with pytest.raises(SystemExit):
        read(f"eval_decodes: ['{decode}']", of=SSDConfig)
    assert "a decode is temperature or temperature/top-k/top-p" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "argv", "value"),
    [
        ("max_steps: 7", ["--max_steps=8"], 8),
        ("max_steps: 7", ["--max-steps", "8"], 8),
        ("scale_rewards: false", ["--scale_rewards"], True),
        ("scale_rewards: true", ["--no_scale_rewards"], False),
        ("scale_rewards: true", ["--scale_rewards=false"], False),
        ("report_to: [tensorboard, trackio]", ["--report_to", "trackio"], ["trackio"]),
        ("report_to: [tensorboard]", ["--report_to"], []),
        ("teacher: ema", ["--teacher=live"], "live"),
    ],
)
def test_the_command_line_wins(read, line, argv, value):
    assert getattr(read(line, *argv), line.partition(":")[0]) == value


def test_the_place_of_the_file_on_the_command_line_does_not_matter(tmp_path):
    (tmp_path / "a.yaml").write_text("max_steps: 7\nwarmup_steps: 3")
    argv = ["--max_steps=8", "--testbed=arithmetic"]
    last = parse(RLSDConfig, [*argv, "--config", str(tmp_path / "a.yaml")], "")
    assert last == parse(RLSDConfig, ["--config", str(tmp_path / "a.yaml"), *argv], "")
    assert (last.max_steps, last.warmup_steps) == (8, 3)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("learning_rat: 1", ["'learning_rat'", "did you mean 'learning_rate'?"]),
        ("xyzzy: 1", ["'xyzzy'"]),
        ("1: 2", ["1"]),
        ("config: other.yaml", ["'config'"]),
        ("max_steps: 1.5", ["--max_steps", "int", "1.5"]),
        ("max_steps: true", ["--max_steps", "true"]),
        ("max_steps: [1, 2]", ["2"]),
        ("learning_rate: fast", ["--learning_rate", "float", "fast"]),
        ("bf16: maybe", ["--bf16", "maybe"]),
        ("teacher: alive", ["--teacher", "alive", "live", "frozen", "ema"]),
        ("max_steps:", ["max_steps", "no value"]),
        ("max_steps: {a: 1}", ["max_steps", "no value"]),
        ("- max_steps", ["`name: value`"]),
        ("", ["`name: value`"]),
        ("max_steps: [", ["not YAML"]),
        (b"run_name: caf\xe9", ["not YAML"]),
    ],
)
def test_what_is_wrong_in_the_file_is_blamed_on_it(read, refused, text, named):
    message = "".join(refused(read, text))
    assert all(part in message for part in ["options.yaml", *named])


def test_a_distant_name_is_no_suggestion(read, refused):
    assert "did you mean" not in refused(read, "xyzzy: 1")[1]


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--max_steps=1.5"], ["--max_steps", "1.5"]),
        (["--teacher", "alive"], ["--teacher", "alive", "frozen"]),
        (["--learning_rat=1"], ["--learning_rat"]),
        (["--learning=1"], ["--learning"]),  # no abbreviations: --conf would not read the file
        (["--max_steps=0"], ["max_steps", "0"]),
        (["--num_generations=1"], ["num_generations", "1"]),
    ],
)
def test_what_is_wrong_on_the_command_line_is_not_blamed_on_the_file(read, refused, argv, named):
    before, message = refused(read, "warmup_steps: 3", *argv)
    assert all(part in message for part in named)
    assert "options.yaml" not in before + message


@pytest.mark.parametrize("argv", [["--config", "missing.yaml"], ["--config=missing.yaml"], ["--conf", "missing.yaml"]])
def test_a_missing_file_is_named(refused, argv):
    assert "missing.yaml" in refused(parse, RLSDConfig, ["--testbed=arithmetic", *argv], "")[1]


@pytest.mark.parametrize("config", [TrainerConfig, RLSDConfig, SSDConfig])
def test_help_explains_every_option(config, capsys):
    with pytest.raises(SystemExit) as exit:
        parse(config, ["--help"], "what it does")
    assert exit.value.code == 0
    shown = "".join(capsys.readouterr().out.split())  # lines may break in the middle of a word
    for entry in fields(config):
        assert f"--{entry.name}" in shown
        assert len(entry.metadata["help"]) > 2
        assert "".join(entry.metadata["help"].split()) in shown


@pytest.mark.parametrize("given", [{}, {"model_name_or_path": "m"}, {"train_dataset": "d"}])
@pytest.mark.parametrize("config", [TrainerConfig, RLSDConfig, SSDConfig])
def test_a_model_and_data_or_a_testbed_must_be_given(config, given):
    with pytest.raises(ValueError, match=r"model_name_or_path.*train_dataset.*testbed"):
        config(**given)
    config(model_name_or_path="m", train_dataset="d")
    config(testbed="arithmetic", **given)


@pytest.mark.parametrize(
    ("config", "wrong"),
    [
        *((TrainerConfig, {name: 0}) for name in (
            "max_completion_length", "per_device_train_batch_size", "per_device_generation_batch_size", "max_steps",
            "save_steps", "save_total_limit", "verifier_workers",
        )),
        (TrainerConfig, {"report_to": ["tensorboard", "wandb"]}),
        *((RLSDConfig, {"num_generations": 1, "method": method}) for method in sorted(DEFAULTS) if method != "opsd"),
        *((RLSDConfig, wrong) for wrong in (
            {"temperature": 0.0}, {"rlsd_lambda": 1.5}, {"rlsd_lambda": -0.1}, {"rlsd_lambda": float("nan")},
            {"epsilon_low": -0.1}, {"teacher_ema_rate": 2.0}, {"teacher_sync_steps": -1}, {"leakage_samples": 1},
        )),
        (TrainerConfig, {"adam_beta1": 1.0}),
        (TrainerConfig, {"warmup_steps": -1}),
        (RLSDConfig, {"max_steps": 0}),
        (SSDConfig, {"train_temperature": 0.0}),
        (SSDConfig, {"eval_samples": 4}),
        (SSDConfig, {"max_steps": 0}),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_by_name(config, wrong):
    (name, value), *_ = wrong.items()
    with pytest.raises(ValueError, match=name) as refusal:
        config(testbed="arithmetic", **wrong)
    assert str(value if not isinstance(value, list) else value[-1]) in str(refusal.value)


def test_opsd_needs_no_group():
    assert RLSDConfig(testbed="arithmetic", method="opsd", num_generations=1).num_generations == 1


@pytest.mark.parametrize(("launched", "bf16", "allowed"), [
    ("no", False, True), ("no", True, True), ("bf16", True, True), ("bf16", False, False), ("fp16", True, False),
])  # fmt: skip
def test_accelerates_precision_must_be_the_options(monkeypatch, launched, bf16, allowed):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    if allowed:
        TrainerConfig(testbed="arithmetic", bf16=bf16)
    else:
        with pytest.raises(ValueError, match="--bf16"):
            TrainerConfig(testbed="arithmetic", bf16=bf16)


@pytest.mark.parametrize(
    ("method", "teacher", "sync", "privilege", "divergence"),
    [
        ("rlsd", "frozen", 10, "answer", None),
        ("grpo", "live", None, None, None),
        ("opsd", "frozen", 0, "solution", "forward_kl"),
        ("sdpo", "ema", None, "rollout", "jsd"),
        ("grpo+opsd", "frozen", 0, "solution", "forward_kl"),
    ],
)
def test_a_methods_defaults_are_those_of_its_paper(method, teacher, sync, privilege, divergence):
    config = RLSDConfig(testbed="arithmetic", method=method)
    found = config.teacher, config.teacher_sync_steps, config.privilege, config.divergence
    assert found == (teacher, sync, privilege, divergence)


@pytest.mark.parametrize(
    ("options", "unread"),
    [
        ({}, []),
        (
            {
                "teacher_sync_steps": 5,
                "rlsd_lambda": 0.3,
                "learning_rate": 1.0,
                "privileged_template": "{prompt}{privileged}",
            },
            [],
        ),
        (
            {"method": "grpo", "rlsd_lambda": 0.3, "privilege": "answer", "epsilon_low": 0.1},
            ["rlsd_lambda", "privilege"],
        ),
        ({"method": "grpo", "evidence_from": "old"}, ["evidence_from"]),
        (
            {"method": "opsd", "divergence_top_k": 5, "scale_rewards": False, "opsd_weight": 2.0},
            ["scale_rewards", "opsd_weight"],
        ),
        ({"method": "sdpo", "teacher_sync_steps": 5, "teacher_ema_rate": 0.1}, ["teacher_sync_steps"]),
        ({"method": "grpo+opsd", "opsd_weight": 2.0, "teacher_ema_rate": 0.1}, ["teacher_ema_rate"]),
        ({"divergence": "jsd"}, ["divergence"]),
    ],
)
def test_options_that_nothing_reads_are_known(options, unread):
    assert RLSDConfig(testbed="arithmetic", **options).without_effect() == unread


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_share_prompts_in_equal_blocks(monkeypatch, processes):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    RLSDConfig(testbed="arithmetic", num_prompts=12, num_minibatches=2)
    with pytest.raises(ValueError, match=rf"num_prompts must be a multiple of the {processes} .* of 2, got 11"):
        RLSDConfig(testbed="arithmetic", num_prompts=11, num_minibatches=2)
    if processes > 1:
        with pytest.raises(ValueError, match="train_batch_size"):
            SSDConfig(testbed="stdlib", train_batch_size=6 * processes + 1)


def test_one_process_has_nothing_to_shard(monkeypatch):
    with pytest.raises(ValueError, match="fsdp"):
        TrainerConfig(testbed="arithmetic", fsdp=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    TrainerConfig(testbed="arithmetic", fsdp=True)


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_accelerates_sharding_is_refused(monkeypatch, variable):
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ValueError, match="--fsdp"):
        TrainerConfig(testbed="arithmetic")


@pytest.mark.parametrize("method", sorted(DEFAULTS))
def test_a_given_option_takes_precedence_over_the_methods_default(read, method):
    given = {"teacher": "live", "teacher_sync_steps": 3, "privilege": "feedback", "divergence": "reverse_kl"}
    config = read(f"method: {method}\nteacher: ema\nteacher_sync_steps: 3", "--teacher=live", "--privilege=feedback",
                  "--divergence=reverse_kl")  # fmt: skip
    assert {name: getattr(config, name) for name in given} == given


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configs_are_read(path):
    config = vars(parse(PROGRAMS[path.name.partition("_")[0]], ["--config", str(path)], ""))
    for name, text in yaml.load(path.read_text(), yaml.BaseLoader).items():
        value = config[name]
        number = type(value) in (int, float)
        assert (float(text) == value) if number else (str(text).lower() == str(value).lower()), name


def test_configs_are_shipped():
    assert {path.name.partition("_")[0] for path in CONFIGS.glob("*.yaml")} == set(PROGRAMS)
