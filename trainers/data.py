"""Prompts with what verifies them, from a file or a named dataset; a fault is reported with file, line and field."""

import csv
import functools
import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainers.config import InputError, TrainerConfig
from trainers.verifiers import BUILT_IN, load_verifier

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

    def has_images(self) -> bool:
        """In the column of images, or in the chat."""
        turns = [turn["content"] for turn in self.prompt] if isinstance(self.prompt, list) else []
        parts = [part for content in turns if isinstance(content, list) for part in content]
        return bool(self.images) or any(part.get("type") == "image" for part in parts if isinstance(part, dict))


def seed_of(*parts: int | str) -> int:
    """A seed that depends on all parts and on nothing else."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest())


def batch_of(examples: Sequence[Example], size: int, step: int, seed: int) -> list[Example]:
    """The examples of the `step`-th step, counted from 1: epochs in random order, one after the other."""
    places = range((step - 1) * size, step * size)
    return [examples[_order(len(examples), seed, place // len(examples))[place % len(examples)]] for place in places]


@functools.lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> list[int]:
    return random.Random(seed_of(seed, "epoch", epoch)).sample(range(count), count)


def load_examples(
    config: TrainerConfig, name: str, split: str, *, needs: Sequence[str] = (), verified: bool = True
) -> list[Example]:
    """All rows of the dataset `name`.

    Args:
        config: Names of columns, the default verifier, the named dataset's configuration.
        name: A .jsonl, .json, .csv or .parquet file, or a name that `datasets.load_dataset` knows.
        split: Which split of a named dataset.
        needs: Fields of `Example` that must not be empty, as "reference" or "solutions".
        verified: Whether responses will be verified; the built-in verifiers need a reference.

    Raises:
        InputError: naming file, line and column of what is wrong.

    """
    examples = [_example(config, row, source, needs, verified) for row, source in _rows(config, name, split)]
    if not examples:
        raise InputError(f"{name} has no rows")
    pictured = [example for example in examples if example.has_images()]
    if config.fsdp and 0 < len(pictured) < len(examples):  # a vision tower is gathered by all processes or by none
        raise InputError(
            f"{name}: with fsdp all rows must have images, or none; {len(pictured)} of {len(examples)} have"
        )
    for verifier, source in {example.verifier: example.source for example in reversed(examples)}.items():
        try:
            load_verifier(verifier)  # an unknown one is an error here, not a reward of 0 later
        except ValueError as error:
            raise InputError(f"{source}: {error}") from error
    return examples


def load_held_out(config: TrainerConfig) -> list[Example]:
    """What the config has for evaluation, if anything."""
    if config.eval_dataset is None:
        return []
    return load_examples(config, config.eval_dataset, config.eval_split)[: config.num_eval_prompts]


def _rows(config: TrainerConfig, name: str, split: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Rows with where they stand."""
    path = Path(name)
    if path.suffix in (".jsonl", ".json", ".csv", ".parquet") and not path.is_file():
        raise InputError(f"there is no file {name}")
    if path.suffix == ".jsonl":
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _json_row(line, f"{name}:{number}"), f"{name}:{number}"
        return
    if path.suffix == ".csv":  # datasets would make numbers of texts, 7 of 007, and nothing of NA
        with path.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines, strict=True)
            try:
                for row in reader:
                    if None in row or None in row.values():
                        cells = "more" if None in row else "fewer"
                        raise InputError(
                            f"{name}:{reader.line_num}: {cells} cells than the {len(reader.fieldnames)} columns"
                        )
                    yield row, f"{name}:{reader.line_num}"
            except (csv.Error, UnicodeDecodeError) as error:
                raise InputError(f"{name}: after line {reader.line_num}: {error}") from error
        return
    import datasets

    try:
        if path.suffix in (".json", ".parquet"):
            rows = datasets.load_dataset(path.suffix[1:], data_files=name, split="train")
        else:
            rows = datasets.load_dataset(name, config.dataset_config, split=split)
            name = f"{name}[{split}]"
    except Exception as error:  # of many kinds, few of which name the file
        raise InputError(f"{name} is empty or cannot be read: {error.__cause__ or error}") from error
    for number, row in enumerate(rows, 1):
        yield row, f"{name}:{number}"


def _json_row(line: bytes, source: str) -> dict[str, Any]:
    try:
        row = json.loads(line.rstrip())
    except json.JSONDecodeError as error:
        raise InputError(f"{source}: not JSON: {error.msg} at column {error.colno}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{source}: not UTF-8: {error.reason} at byte {error.start + 1}") from None
    if not isinstance(row, dict):
        raise InputError(f"{source}: a line must be one JSON object, got {type(row).__name__}")
    return row


def _example(config: TrainerConfig, row: dict[str, Any], source: str, needs: Sequence[str], verified: bool) -> Example:
    def column(field: str) -> Any:
        return row.get(getattr(config, f"{field}_column"))

    if config.prompt_column not in row:
        raise InputError(
            f"{source}: no column {config.prompt_column!r} (prompt_column); there are {', '.join(map(repr, row))}"
        )
    solutions = column("solutions") or ()
    images = column("images") or ()
    example = Example(
        prompt=_prompt(column("prompt"), f"{source}: {config.prompt_column!r}"),
        reference=column("reference"),
        solutions=tuple(solutions) if isinstance(solutions, list | tuple) else (solutions,),
        verifier=str(column("verifier") or config.verifier),
        images=tuple(images) if isinstance(images, list | tuple) else (images,),
        source=source,
    )
    for field in {*needs, *(["reference"] if verified and example.verifier in BUILT_IN else [])}:
        value = getattr(example, field)
        if (value.strip() if isinstance(value, str) else value) in (None, "", (), []):
            wanted = getattr(config, f"{field}_column")
            raise InputError(f"{source}: no {wanted!r} ({field}_column), which this run needs")
    if any(not isinstance(solution, str) or not solution.strip() for solution in example.solutions):
        raise InputError(f"{source}: {config.solutions_column!r} must be text or a list of texts, none of them empty")
    for image in example.images:
        if isinstance(image, str) and "://" not in image and Path(image).suffix and not Path(image).is_file():
            raise InputError(f"{source}: {config.images_column!r}: there is no file {image!r}")
    return example


def _prompt(prompt: Any, where: str) -> str | Chat:
    """The prompt, if it is a text or a chat that ends with a user's turn."""
    if isinstance(prompt, str):
        if not prompt.strip():
            raise InputError(f"{where} is empty")
        return prompt
    if not isinstance(prompt, list) or not prompt:
        raise InputError(f"{where} must be text or a list of messages, got {type(prompt).__name__}")
    for turn in prompt:
        if not isinstance(turn, dict) or not {"role", "content"} <= set(turn):
            raise InputError(f"{where}: each message needs 'role' and 'content', got {turn!r}")
    if prompt[-1]["role"] != "user":
        raise InputError(f"{where} must end with the user's turn, ends with {prompt[-1]['role']!r}")
    content = prompt[-1]["content"]
    if not isinstance(content, str | list) or not (content.strip() if isinstance(content, str) else content):
        raise InputError(f"{where}: the user's turn must be text or a list of parts, and not empty, got {content!r}")
    return prompt
