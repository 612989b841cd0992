"""What a run leaves behind to be looked at: metrics, completions, TensorBoard, trackio."""

import json
import sqlite3

import pytest
from conftest import no_kernel
from programs import ended, started
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import VERIFIER, rows, save_model, write_rows

from trainers.config import TrainerConfig
from trainers.tracking import Tracker, plot, read_metrics, write_lines

pytestmark = [no_kernel, pytest.mark.usefixtures("one_thread")]


def tracker(directory, start=0):
    return Tracker(TrainerConfig(testbed="arithmetic", output_dir=str(directory)), start, shown=["reward"])


def test_metrics_after_the_checkpoint_and_a_line_cut_short_are_dropped(tmp_path):
    with tracker(tmp_path) as tracked:
        for step in range(4):
            tracked.log(step, {"reward": step / 4})
            tracked.completions(step, [{"prompt": "x", "response": "y", "reference": "z", "reward": 1.0}])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1, 2, 3]
    with tracker(tmp_path, start=2) as tracked:
        tracked.log(3, {"reward": 9.0})
    assert [(row["step"], row["reward"]) for row in read_metrics(tmp_path)] == [(0, 0.0), (1, 0.25), (2, 0.5), (3, 9.0)]
    assert sorted(path.name for path in (tmp_path / "completions").iterdir()) == [
        "step-000000.jsonl", "step-000001.jsonl", "step-000002.jsonl"
    ]  # fmt: skip


def test_the_end_of_a_long_response_is_shown(tmp_path, capsys):
    with tracker(tmp_path) as tracked:
        row = {"prompt": "x", "response": "y" * 1000 + " the end", "reference": 7, "reward": 0.123456}
        tracked.completions(5, [row] * 4)
    shown = capsys.readouterr().out
    assert shown.count("0.123") == 3
    assert "completions of step 5" in shown
    assert "the end" in shown.replace("\n", " ")


def test_a_plot_has_a_panel_for_what_was_logged(tmp_path):
    from PIL import Image

    write_lines(tmp_path / "metrics.jsonl", [{"step": i, "a": i, **({"b": 1.0} if i % 2 else {})} for i in range(6)])
    sizes = [Image.open(plot(tmp_path, names, "title")).size for names in (["a", "c"], ["a", "b", "c"])]
    assert sizes[1][0] == pytest.approx(2 * sizes[0][0], rel=0.01)  # the second panel beside the first


def test_tensorboard_and_trackio_hold_what_metrics_jsonl_holds(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    save_model(tmp_path / "model")
    write_rows(tmp_path / "train.jsonl", rows())
    (tmp_path / "verifier.py").write_text(VERIFIER)
    options = {
        "model_name_or_path": tmp_path / "model", "train_dataset": tmp_path / "train.jsonl", "save_steps": 1,
        "output_dir": tmp_path / "out", "verifier": f"{tmp_path}/verifier.py:reward", "verifier_workers": 1,
        "max_completion_length": 6, "num_prompts": 2, "num_generations": 2, "completions_steps": 0, "resume": True,
    }  # fmt: skip
    command = ["trainers.rlsd", *(f"--{name}={value}" for name, value in options.items())]
    for steps in (2, 3):  # the second goes on
        ended(started([*command, f"--max_steps={steps}", "--report_to", "tensorboard", "trackio"], tmp_path))
    logged = read_metrics(tmp_path / "out")
    assert [row["step"] for row in logged] == [1, 2, 3]

    board = EventAccumulator(str(tmp_path / "out" / "tensorboard")).Reload()
    for name in {name for row in logged for name in row} - {"step"}:
        found = {event.step: event.value for event in board.Scalars(name)}
        assert found == pytest.approx({row["step"]: row[name] for row in logged if name in row}, rel=1e-6)

    (database,) = (tmp_path / "trackio").glob("sdkernels*.db")
    stored = sqlite3.connect(database).execute("select run_name, step, metrics from metrics order by step").fetchall()
    assert [(name, {"step": step} | json.loads(metrics)) for name, step, metrics in stored] == [
        ("out", pytest.approx(row)) for row in logged
    ]
