"""Datasets: what is read from each kind of file, what is refused and where, and the order of the steps."""

import json
from collections import Counter

import pytest
from conftest import no_kernel

from trainers.config import InputError, TrainerConfig
from trainers.data import Example, batch_of, load_examples, seed_of

pytestmark = [no_kernel, pytest.mark.usefixtures("one_thread")]
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
ROWS = [
    {"prompt": "1 + 1?", "reference": "2", "solutions": ["two", "it is 2"]},
    {"prompt": "10 / 4?", "reference": "2.50", "solutions": ["2.5"]},
]


def config(**options):
    return TrainerConfig(testbed="arithmetic", **{"verifier": "operator:eq"} | options)


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Writes a file into the working directory and reads it."""
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()

    def load(name, content, needs=(), **options):
        if not isinstance(content, bytes | str):
            content = "".join(json.dumps(row) + "\n" for row in content)
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return load_examples(config(**options), name, "train", needs=needs)

    return load


def test_a_row_becomes_an_example(load, tmp_path):
    (tmp_path / "a.png").touch()
    (first, second) = load("a.jsonl", [{**ROWS[0], "images": "a.png", "other": 1}, {"prompt": CHAT, "solutions": "4"}])
    assert first == Example("1 + 1?", "2", ("two", "it is 2"), "operator:eq", ("a.png",), "a.jsonl:1")
    assert second == Example(CHAT, None, ("4",), "operator:eq", (), "a.jsonl:2")


def test_columns_can_have_other_names(load, tmp_path):
    (tmp_path / "b.png").touch()
    (tmp_path / "c.png").touch()
    row = {"q": "x", "a": 0, "s": ["y"], "i": ["b.png", "c.png"], "v": "python"}
    names = {"prompt_column": "q", "reference_column": "a", "solutions_column": "s", "images_column": "i"}
    (example,) = load("a.jsonl", [row], verifier_column="v", needs=["reference", "solutions"], **names)
    assert example == Example("x", 0, ("y",), "python", ("b.png", "c.png"), "a.jsonl:1")


def user(content):
    return [{"role": "user", "content": content}]


def parquet(rows):
    import io

    import pyarrow
    from pyarrow import parquet

    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


@pytest.mark.parametrize("form", ["rows.json", "lines.json", "rows.parquet"])
def test_other_files_say_what_jsonl_says(load, form):
    rows = [{**ROWS[0], "prompt": CHAT}, {**ROWS[1], "prompt": CHAT[1:]}]
    content = {"rows.json": json.dumps(rows), "lines.json": rows, "rows.parquet": parquet(rows)}[form]
    found = load(form, content)
    assert [example.source for example in found] == [f"{form}:1", f"{form}:2"]
    expected = load("rows.jsonl", rows)
    assert [vars(e) | {"source": ""} for e in found] == [vars(e) | {"source": ""} for e in expected]


def test_a_csv_is_text(load):
    """Numbers keep their digits, and a line is a line of the file."""
    found = load("a.csv", 'prompt,reference,solutions,verifier\n"a, ""b""\nc",007,,\nd,1.50,NA,python\ne,NA,"x\ny",\n')
    assert found == [
        Example('a, "b"\nc', "007", (), "operator:eq", (), "a.csv:3"),
        Example("d", "1.50", ("NA",), "python", (), "a.csv:4"),
        Example("e", "NA", ("x\ny",), "operator:eq", (), "a.csv:6"),
    ]


@pytest.mark.parametrize(("row", "named"), [
    ("What is 1, or 2?,3", "more cells"), ("x", "fewer cells"), ('"never closed,1', "unexpected end"),
    ('"x" y,1', "expected after"),
])  # fmt: skip
def test_a_csv_row_has_a_cell_per_column(load, row, named):
    with pytest.raises(ValueError, match=rf"^a.csv:.*3.*{named}|^a.csv: after line \d: .*{named}"):
        load("a.csv", f"prompt,reference\nfine,1\n{row}\n")


@pytest.mark.parametrize("pictured", [{"images": ["a.png"]}, {"prompt": user([{"type": "image", "image": "a.png"}])}])
def test_sharded_all_rows_have_images_or_none(load, tmp_path, monkeypatch, pictured):
    """A vision tower's weights are gathered by all processes, so none may do without it."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    (tmp_path / "a.png").touch()
    rows = [{"prompt": "x"}, {"prompt": "x"} | pictured]
    assert len(load("a.jsonl", rows)) == 2
    assert len(load("a.jsonl", rows[1:], fsdp=True)) == len(load("a.jsonl", rows[:1], fsdp=True)) == 1
    with pytest.raises(ValueError, match=r"a.jsonl: with fsdp all rows must have images, or none; 1 of 2 have"):
        load("a.jsonl", rows, fsdp=True)


def test_blank_lines_count_but_are_no_rows(load):
    found = load("a.jsonl", '\n  \n{"prompt": "x"}\r\n\r\n{"prompt": "y"}')
    assert [(example.prompt, example.source) for example in found] == [("x", "a.jsonl:3"), ("y", "a.jsonl:5")]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c"])
def test_a_line_ends_with_a_line_feed_only(load, name, separator):
    """Of JSON strings and CSV cells str.splitlines would make two lines; control characters are escaped in JSON."""
    text = f"x{separator}y é 🙂"
    rows = [{"prompt": text}, {"prompt": "z"}]
    as_csv = f'prompt\n"{text}"\nz\n'
    content = as_csv if name == "a.csv" else "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    assert [example.prompt for example in load(name, content)] == [text, "z"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_a_byte_order_mark_is_no_content(load, name):
    content = "prompt\nx\n" if name == "a.csv" else '{"prompt": "x"}\n'
    (example,) = load(name, b"\xef\xbb\xbf" + content.encode())
    assert example.prompt == "x"


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ('{"prompt": "x"', ["not JSON", "column 15"]),
        ('{"prompt": "x"} {}', ["not JSON", "column 17"]),
        (b'{"prompt": "caf\xe9"}', ["not UTF-8", "byte 16"]),
        ("[1]", ["one JSON object", "list"]),
        ('"prompt"', ["one JSON object", "str"]),
        ({"question": "x", "answer": "y"}, ["'prompt'", "prompt_column", "'question', 'answer'"]),
        ({"prompt": None}, ["'prompt'", "NoneType"]),
        ({"prompt": 5}, ["'prompt'", "int"]),
        ({"prompt": ""}, ["'prompt'", "empty"]),
        ({"prompt": " \n"}, ["'prompt'", "empty"]),
        ({"prompt": []}, ["'prompt'"]),
        ({"prompt": ["x"]}, ["'prompt'", "role", "content", "'x'"]),
        ({"prompt": [{"role": "user"}]}, ["'prompt'", "content", "{'role': 'user'}"]),
        ({"prompt": [{"content": "x"}, *user("y")]}, ["'prompt'", "role"]),
        ({"prompt": CHAT[:1]}, ["'prompt'", "user", "'system'"]),
        ({"prompt": [*user("x"), {"role": "assistant", "content": "y"}]}, ["'prompt'", "user", "'assistant'"]),
        ({"prompt": user("")}, ["'prompt'", "empty"]),
        ({"prompt": user(" \n")}, ["'prompt'", "empty"]),
        ({"prompt": user([])}, ["'prompt'", "empty"]),
        ({"prompt": "x", "images": ["no.png"]}, ["'images'", "no file 'no.png'"]),
        ({"prompt": user(None)}, ["'prompt'", "None"]),
        ({"prompt": user(5)}, ["'prompt'", "5"]),
        ({"prompt": "x", "solutions": 5}, ["'solutions'"]),
        ({"prompt": "x", "solutions": {"a": 1}}, ["'solutions'"]),
        ({"prompt": "x", "solutions": ["y", 5]}, ["'solutions'"]),
        ({"prompt": "x", "solutions": ["y", " "]}, ["'solutions'"]),
        ({"prompt": "x", "solutions": ["y", None]}, ["'solutions'"]),
        ({"prompt": "x", "verifier": "exactly"}, ["verifier", "'exactly'", "numeric"]),
        ({"prompt": "x", "verifier": "no.such.module:f"}, ["'no.such.module'"]),
        ({"prompt": "x", "verifier": 5}, ["verifier", "'5'"]),
    ],
)
def test_what_is_wrong_in_a_row_is_said_with_its_place(load, row, named):
    row = row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode()
    with pytest.raises(ValueError, match=r"^a.jsonl:3: ") as refusal:
        load("a.jsonl", b'{"prompt": "fine"}\n\n' + row + b'\n{"prompt": "fine too"}\n')
    assert all(part in str(refusal.value) for part in named)


@pytest.mark.parametrize("empty", [{}, {"reference": None, "solutions": None}, {"reference": "", "solutions": []},
                                   {"reference": "", "solutions": ""}, {"reference": " \n"}])  # fmt: skip
@pytest.mark.parametrize("field", ["reference", "solutions"])
def test_what_a_run_needs_must_be_there(load, field, empty):
    rows = [{"prompt": "x", "reference": "1", "solutions": "s"}, {"prompt": "x", **empty}]
    assert len(load("a.jsonl", rows)) == 2
    with pytest.raises(ValueError, match=rf"^a.jsonl:2: .*'{field}' \({field}_column\)"):
        load("a.jsonl", rows, needs=[field])


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file_is_named(load, name, content):
    with pytest.raises(ValueError, match=name):
        load(name, content)


@pytest.mark.parametrize(("name", "content"), [
    ("a.json", '{"prompt": "x"'), ("a.parquet", "prompt"), ("a.csv", b"prompt\nx\ncaf\xe9\n"), ("b.csv", "prompt\n"),
])  # fmt: skip
def test_a_file_that_cannot_be_read_is_named(load, name, content):
    with pytest.raises(ValueError, match=name):
        load(name, content)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_a_missing_file_is_named(tmp_path, suffix):
    with pytest.raises(InputError, match=f"missing.{suffix}"):
        load_examples(config(), str(tmp_path / f"missing.{suffix}"), "train")


def test_each_row_can_name_its_verifier(load, tmp_path):
    (tmp_path / "own.py").write_text("def f(response, reference):\n    return 1.0\n")
    names = ["python", f"{tmp_path}/own.py:f", None, ""]
    found = load("a.jsonl", [{"prompt": "x", "reference": "1", "verifier": name} for name in names])
    assert [e.verifier for e in found] == ["python", f"{tmp_path}/own.py:f", "operator:eq", "operator:eq"]


@pytest.mark.parametrize("verifier", ["exact", "numeric", "python"])
def test_a_built_in_verifier_needs_a_reference(load, verifier):
    rows = [{"prompt": "x", "reference": "1", "verifier": verifier}, {"prompt": "y", "verifier": verifier}]
    with pytest.raises(ValueError, match=r"a.jsonl:2: no 'reference'"):
        load("a.jsonl", rows)


def test_an_unknown_default_verifier_matters_only_where_it_is_used(load):
    rows = [{"prompt": "x", "verifier": "operator:eq"}, {"prompt": "y"}]
    load("a.jsonl", rows[:1], verifier="unknown")
    with pytest.raises(ValueError, match=r"a.jsonl:2.*'unknown'"):
        load("a.jsonl", rows, verifier="unknown")


def test_a_named_dataset_is_read_by_its_split_and_configuration(monkeypatch):
    import datasets

    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **o: asked.append((a, o)) or ROWS)
    found = load_examples(config(dataset_config="main"), "owner/data", "test")
    assert asked == [(("owner/data", "main"), {"split": "test"})]
    assert [example.source for example in found] == ["owner/data[test]:1", "owner/data[test]:2"]


@pytest.mark.parametrize(("count", "size"), [(12, 4), (10, 4), (7, 7), (3, 8), (1, 3), (5, 23)])
def test_every_example_comes_once_an_epoch(count, size):
    steps = count  # a whole number of epochs: `size` of them
    seen = [example for step in range(1, steps + 1) for example in batch_of(range(count), size, step, seed=3)]
    epochs = [seen[i : i + count] for i in range(0, len(seen), count)]
    assert len(epochs) == size
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)


def test_orders_differ_between_epochs_and_seeds():
    orders = [tuple(batch_of(range(50), 50, step, seed)) for seed in range(4) for step in range(1, 5)]
    assert len(set(orders)) == 16
    firsts = Counter(batch_of(range(4), 1, 1, seed)[0] for seed in range(400))
    assert min(firsts.values()) > 50  # of 100 expected; less by chance: below 1e-8


@pytest.mark.parametrize("size", [1, 4, 13, 20, 50])
def test_the_order_depends_on_seed_and_epoch_only(size):
    """Not on the batch, nor on which steps were asked for before."""
    expected = [example for epoch in range(1, 6) for example in batch_of(range(20), 20, epoch, seed=5)]
    steps = list(range(1, 100 // size + 1))
    found = {step: batch_of(range(20), size, step, seed=5) for step in reversed(steps)}
    assert [example for step in steps for example in found[step]] == expected[: len(steps) * size]


def test_seeds_depend_on_every_part_and_its_place():
    parts = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), ("0",), ("a", "b"), ("ab",), ("a", "b", 0), (-1,), ("a, b",)]
    assert len({seed_of(*part) for part in parts}) == len(parts)
    assert all(0 <= seed_of(*part) < 2**63 for part in parts)  # what generators and vLLM take


def test_seeds_are_those_of_earlier_runs():
    """A change of this number is a change of every run, of those too that are resumed."""
    assert seed_of(0, "epoch", 1) == 33874158023488269
