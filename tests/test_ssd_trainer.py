"""trainers.ssd with a tiny random model: its three parts, both objectives, resumed and in several processes."""

import json
import shutil

import pytest
import torch
from conftest import no_kernel
from programs import ROOT, close, ended, metrics_of, same_weights, started
from safetensors.torch import load_file
from tiny import VERIFIER, save_model, write_rows
from tiny import rows as tiny_rows

from sdkernels import load_support, truncated_support
from trainers import ssd
from trainers.data import load_examples
from trainers.evaluation import pass_at_k
from trainers.policy import load_model
from trainers.program import parse
from trainers.prompts import Encoder

pytestmark = [no_kernel, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, prompts and a verifier."""
    made = tmp_path_factory.mktemp("ssd")
    save_model(made / "model")
    write_rows(made / "train.jsonl", tiny_rows(20))
    write_rows(made / "eval.jsonl", tiny_rows(5))
    (made / "verifier.py").write_text(VERIFIER)
    return made


def arguments(folder, output, **options):
    options = {
        "model_name_or_path": folder / "model", "train_dataset": folder / "train.jsonl", "output_dir": output,
        "eval_dataset": folder / "eval.jsonl", "verifier": f"{folder}/verifier.py:reward", "verifier_workers": 1,
        "max_completion_length": 6, "learning_rate": 1e-3, "max_steps": 4, "train_batch_size": 20, "chunk_size": 7,
        "stub_length": 0, "terms_steps": 1, "save_steps": 1, "eval_samples": 6,
    } | options  # fmt: skip
    flags = [f"--{name}={value}" for name, value in options.items()]
    return [*flags, "--base_decodes", "0.5/20/0.8", "1", "--eval_decodes", "1"]


def train(folder, output, **options):
    ssd.main(arguments(folder, output, **options))
    return metrics_of(output)


def weights_of(output):
    return (output / "checkpoint-4" / "model.safetensors").read_bytes()


def samples_of(output):
    """The rows that were recorded, and where the recorded supports of each file are."""
    paths = sorted((output / "samples").glob("*.jsonl"))
    return [(list(map(json.loads, path.read_text().splitlines())), path.with_suffix(".safetensors")) for path in paths]


@pytest.mark.parametrize("objective", ["sampled", "expected"])
def test_it_samples_trains_and_evaluates(folder, tmp_path, objective):
    logged = train(folder, tmp_path / "out", objective=objective)
    assert [row["step"] for row in logged] == [1, 2, 3, 4]
    for row in logged:
        parts = [
            row[name] for name in ("support_compression", "within_support_reshaping", "base_alignment", "constant")
        ]
        assert sum(parts) == pytest.approx(row["cross_entropy"], rel=1e-5)
        assert 0 < row["kept_mass"] < 1
        if objective == "expected":
            assert row["loss"] == pytest.approx(row["cross_entropy"], rel=1e-5)
    assert logged[-1]["loss"] < logged[0]["loss"]  # the batch is all samples
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    base, untruncated, student = report["rows"]
    assert [(row["model"], row["decode"]) for row in report["rows"]] == [
        ("base", "0.5/20/0.8"),
        ("base", "1"),
        ("student", "1"),
    ]
    stored = {entry["model"] + entry["decode"]: entry["correct"] for entry in map(json.loads, (
        path.read_text() for path in (tmp_path / "out" / "evaluation").glob("*.json")))}  # fmt: skip
    for row in report["rows"]:
        counts = stored[row["model"] + row["decode"]]
        assert row["pass@5"][0] == pytest.approx(sum(pass_at_k(6, c, 5) for c in counts) / 5)
        hardest = min(range(5), key=stored["difficulty0.5/20/0.8"].__getitem__)
        assert row["hard pass@1"][0] == pytest.approx(counts[hardest] / 6)
    assert student["pass@1 - same base"][0] == pytest.approx(student["pass@1"][0] - untruncated["pass@1"][0])
    best = max(base, untruncated, key=lambda row: row["pass@1"][0])
    assert report["best base decode"] == best["decode"]
    assert student["pass@1 - best base"][0] == pytest.approx(student["pass@1"][0] - best["pass@1"][0])
    assert (tmp_path / "out" / "plot.png").stat().st_size > 10_000


def test_the_recorded_support_is_the_bases_at_the_sampled_tokens(folder, tmp_path):
    config = parse(ssd.SSDConfig, arguments(folder, tmp_path / "out", max_steps=1), "")
    ssd.train(config)
    model, processor = load_model(config)
    encoder = Encoder(processor, config)
    examples = {e.source: e for e in load_examples(config, config.train_dataset, "train")}
    seen = set()
    for (_, *recorded), path in samples_of(tmp_path / "out"):
        found, at = load_support(path), 0
        for row in recorded:
            prompt = encoder(examples[row["source"]]).token_ids
            with torch.no_grad():
                logits = model(torch.tensor([prompt + row["token_ids"]])).logits[0, len(prompt) - 1 : -1]
            wanted = truncated_support(logits, 1.6, top_k=20, top_p=0.8, max_size=64)
            here = slice(at, at := at + len(row["token_ids"]))
            assert torch.equal(found.size[here], wanted.size)
            assert torch.equal(found.token_ids[here].sort().values, wanted.token_ids.sort().values)
            assert torch.allclose(found.log_probs[here], wanted.log_probs, rtol=0, atol=1e-5)
            assert all(token in ids for token, ids in zip(row["token_ids"], wanted.token_ids.tolist(), strict=True))
            seen.add(row["source"])
        assert at == len(found.size)
    assert seen == set(examples)


def test_only_empty_answers_and_stubs_are_dropped(folder, tmp_path):
    train(folder, tmp_path / "all", max_steps=1)
    train(folder, tmp_path / "long", max_steps=1, stub_length=5)
    for (first, *kept), (dropped, *longer) in zip(
        *([rows for rows, _ in samples_of(tmp_path / name)] for name in ("all", "long")), strict=True
    ):
        wanted = [row for row in kept if "\n" in row["response"].strip() or len(row["response"].strip()) >= 5]
        assert (first["dropped"], dropped["dropped"]) == (0, len(kept) - len(wanted))
        assert longer == wanted


def test_so_many_prompts_are_sampled(folder, tmp_path):
    train(folder, tmp_path / "out", num_train_prompts=9, max_steps=1, train_batch_size=3)
    sources = [row["source"] for rows, _ in samples_of(tmp_path / "out") for row in rows[1:]]
    assert [int(source.rsplit(":", 1)[1]) for source in sources] == list(range(1, 10))


@pytest.mark.parametrize("objective", ["sampled", "expected"])
def test_the_micro_batch_and_the_head_do_not_change_the_result(folder, tmp_path, objective):
    whole = train(folder, tmp_path / "a", objective=objective)
    for changed in ({"per_device_train_batch_size": 1}, {"head": "logits"}, {"head": "reference"}):
        close(train(folder, tmp_path / str(changed), objective=objective, **changed), whole, rtol=1e-4)


def test_resumed_at_any_part_it_ends_with_the_same_bits(folder, tmp_path):
    whole = train(folder, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for path in [
        "samples/0000007.jsonl",
        "samples/0000014.jsonl",
        "evaluation/base-1.json",
        "evaluation/student-0.json",
    ]:
        (tmp_path / "cut" / path).unlink()
    for checkpoint in (tmp_path / "cut").glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    assert train(folder, tmp_path / "cut", resume=True) == whole
    assert weights_of(tmp_path / "cut") == weights_of(tmp_path / "whole")
    shutil.rmtree(tmp_path / "cut" / "checkpoint-4")
    assert train(folder, tmp_path / "cut", resume=True) == whole
    assert weights_of(tmp_path / "cut") == weights_of(tmp_path / "whole")
    assert (tmp_path / "cut" / "report.json").read_text() == (tmp_path / "whole" / "report.json").read_text()


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    """Where one process left its results."""
    output = tmp_path_factory.mktemp("alone") / "out"
    train(folder, output, objective="expected", per_device_train_batch_size=4)
    return output


@pytest.mark.parametrize("fsdp", [False, True])
def test_two_processes_match_one(folder, tmp_path, alone, fsdp):
    options = arguments(folder, tmp_path / "out", objective="expected", per_device_train_batch_size=2, fsdp=fsdp)
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    ended(started([*launcher, "trainers.ssd", *options], ROOT))
    close(metrics_of(tmp_path / "out"), metrics_of(alone), rtol=1e-4)
    ours, theirs = (load_file(path / "checkpoint-4" / "model.safetensors") for path in (tmp_path / "out", alone))
    same_weights(ours, theirs)
    texts, expected = ([sorted(row["response"] for rows, _ in samples_of(path) for row in rows[1:])]
                       for path in (tmp_path / "out", alone))  # fmt: skip
    assert texts == expected
