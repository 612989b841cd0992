"""Prompts with what verifies them, from a file or a named dataset; a fault is reported with file, line and field."""

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainers.config import TrainerConfig
from trainers.verifiers import load_verifier

Chat = list[dict[str, Any]]  # messages with "role" and "content", the last one of a user


@dataclass(frozen=True)
class Example:
    """One row of a dataset."""

    prompt: str | Chat
    reference: Any  # what the verifier compares with: an answer, or tests; None if there is none
    solutions: tuple[str, ...]  # worked solutions, for privileged prompts
    verifier: str
    images: tuple[Any, ...]  # PIL images or paths
    source: str  # "train.jsonl:17", for messages


def seed_of(*parts: int | str) -> int:
    """A seed that depends on all parts and on nothing else."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest())


def batch_of(examples: Sequence[Example], size: int, step: int, seed: int) -> list[Example]:
    """The examples of the `step`-th step, counted from 1: epochs in random order, one after the other."""
    places = range((step - 1) * size, step * size)
    epochs = {place // len(examples) for place in places}
    orders = {epoch: random.Random(seed_of(seed, "epoch", epoch)).sample(examples, len(examples)) for epoch in epochs}
    return [orders[place // len(examples)][place % len(examples)] for place in places]


def load_examples(config: TrainerConfig, name: str, split: str, *, needs: Sequence[str] = ()) -> list[Example]:
    """All rows of the dataset `name`.

    Args:
        config: Names of columns, the default verifier, the named dataset's configuration.
        name: A .jsonl, .json, .csv or .parquet file, or a name that `datasets.load_dataset` knows.
        split: Which split of a named dataset.
        needs: Fields of `Example` that must not be empty, as "reference" or "solutions".

    Raises:
        ValueError: naming file, line and column of what is wrong.
        FileNotFoundError: naming the file.

    """
    examples = [_example(config, row, source, needs) for row, source in _rows(config, name, split)]
    if not examples:
        raise ValueError(f"{name} has no rows")
    for verifier in sorted({example.verifier for example in examples}):
        load_verifier(verifier)  # an unknown one is an error here, not a reward of 0 later
    return examples


def _rows(config: TrainerConfig, name: str, split: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Rows with where they stand."""
    path = Path(name)
    if path.suffix == ".jsonl":
        with path.open(encoding="utf-8", errors="surrogateescape") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _json_row(line, f"{name}:{number}"), f"{name}:{number}"
        return
    import datasets

    if path.suffix in (".json", ".csv", ".parquet"):
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {name}")
        rows = datasets.load_dataset(path.suffix[1:], data_files=name, split="train")
    else:
        rows = datasets.load_dataset(name, config.dataset_config, split=split)
        name = f"{name}[{split}]"
    for number, row in enumerate(rows, 1):
        yield row, f"{name}:{number}"


def _json_row(line: str, source: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{source}: not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{source}: a line must be one JSON object, got {type(row).__name__}")
    return row


def _example(config: TrainerConfig, row: dict[str, Any], source: str, needs: Sequence[str]) -> Example:
    def column(field: str) -> Any:
        return row.get(getattr(config, f"{field}_column"))

    prompt = column("prompt")
    if prompt is None:
        raise ValueError(
            f"{source}: no column {config.prompt_column!r} (prompt_column); there are {', '.join(map(repr, row))}"
        )
    solutions = column("solutions") or ()
    images = column("images") or ()
    example = Example(
        prompt=_prompt(prompt, f"{source}: {config.prompt_column!r}"),
        reference=column("reference"),
        solutions=(solutions,) if isinstance(solutions, str) else tuple(solutions),
        verifier=column("verifier") or config.verifier,
        images=tuple(images) if isinstance(images, list | tuple) else (images,),
        source=source,
    )
    for field in needs:
        if getattr(example, field) in (None, "", (), []):
            wanted = getattr(config, f"{field}_column")
            raise ValueError(f"{source}: no {wanted!r} ({field}_column), which this run needs")
    if any(not isinstance(solution, str) or not solution.strip() for solution in example.solutions):
        raise ValueError(f"{source}: {config.solutions_column!r} must be text or a list of texts, none of them empty")
    return example


def _prompt(prompt: Any, where: str) -> str | Chat:
    """The prompt, if it is a text or a chat that ends with a user's turn."""
    if isinstance(prompt, str):
        if not prompt.strip():
            raise ValueError(f"{where} is empty")
        return prompt
    if not isinstance(prompt, list) or not prompt:
        raise ValueError(f"{where} must be text or a list of messages, got {type(prompt).__name__}")
    for turn in prompt:
        if not isinstance(turn, dict) or not {"role", "content"} <= set(turn):
            raise ValueError(f"{where}: each message needs 'role' and 'content', got {turn!r}")
    if prompt[-1]["role"] != "user":
        raise ValueError(f"{where} must end with the user's turn, ends with {prompt[-1]['role']!r}")
    if not prompt[-1]["content"]:
        raise ValueError(f"{where}: the user's turn is empty")
    return prompt
