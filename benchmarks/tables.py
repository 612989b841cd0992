"""The tables of README.md and docs/performance.md, made from benchmarks/results.

``python -m benchmarks.tables`` rewrites what stands between the markers ``<!-- table: NAME -->`` and ``<!-- end -->``
of those documents. A test compares them with the results. A peer that is off by more than the tolerance says how far.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parent.parent
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "performance.md")
VOCAB = "V = 151,936"
OURS = ("sdkernels", "sdkernels linear")
IN_PLACE = "sdkernels, in place"
EAGER, COMPILED = "eager PyTorch", ("torch.compile", "torch.compile of it")
HEADLINES = {  # what README shows: the file of results, and the operation
    "`rlsd_loss`": ("rlsd_loss", "rlsd_loss, forward + backward"),
    "`ssd_loss`, top_k=20, top_p=0.8": ("ssd_loss", "ssd_loss, forward + backward, top_k=20 top_p=0.8 T=1.6"),
    "`opsd_loss`, JSD": ("opsd_loss", "opsd_loss, forward + backward, jsd beta=0.5"),
    "`truncated_log_softmax`, top_p=0.95": (
        "truncation",
        "truncated_log_softmax, forward + backward, top_p=0.95 T=1.0",
    ),
}

Row = dict


def load(name: str) -> dict:
    """What a benchmark measured on the CPU."""
    return json.loads((RESULTS / f"{name}_cpu.json").read_text())


def measured(name: str, dtype: str) -> tuple[int, dict[str, list[Row]]]:
    """The tokens of a benchmark on logits at V = 151,936 in a dtype, and its measurements by operation."""
    for section, rows in load(name)["measurements"].items():
        if VOCAB in section and section.endswith(f" {dtype}"):
            by_op: dict[str, list[Row]] = {}
            for row in rows:
                by_op.setdefault(row["op"], []).append(row)
            return int(re.search(r"([\d,]+) tokens", section)[1].replace(",", "")), by_op
    raise KeyError(f"{name}: no {dtype} rows at {VOCAB}")


def fastest(rows: Sequence[Row], among: Callable[[str], bool]) -> Row | None:
    """The fastest right measurement whose name is among those asked for."""
    timed = [row for row in rows if row["seconds"] and among(row["name"])]
    return min(timed, key=lambda row: row["seconds"][0], default=None)


def time(row: Row | None, named: bool = False) -> str:
    """A median, with how many times our tolerance its error is, and on request the name of what took it."""
    if row is None:
        return ""
    milliseconds = row["seconds"][0] * 1e3
    text = f"{milliseconds:.1f} ms" if milliseconds < 20 else f"{milliseconds:,.0f} ms"
    error = max(row["errors"].values())
    notes = ([row["name"]] if named else []) + ([f"{error:,.0f}x off"] if error > 1 else [])
    return f"{text} ({', '.join(notes)})" if notes else text


def memory(row: Row) -> str:
    """Peak beyond the inputs."""
    return f"{row['peak_bytes'] / 1e6:,.0f} MB"


def peers(rows: Sequence[Row]) -> tuple[Row | None, Row | None, Row | None]:
    """Eager PyTorch, the best of torch.compile, and the best of all others but ours."""
    known = (*OURS, IN_PLACE, EAGER, *COMPILED, "logits version")
    return (
        fastest(rows, lambda name: name == EAGER),
        fastest(rows, lambda name: name in COMPILED),
        fastest(rows, lambda name: name not in known),
    )


def headlines() -> Iterator[Sequence[str]]:
    """One loss of each method, forward and backward in float32."""
    yield ("forward and backward, float32", "tokens", "sdkernels", EAGER, "best torch.compile", "best other",
           "memory", "eager's")  # fmt: skip
    for label, (name, op) in HEADLINES.items():
        tokens, by_op = measured(name, "float32")
        yield headline(label, tokens, by_op[op])
    hidden, tokens = 256, 512
    rows = [
        row
        for row in load("linear")["measurements"]
        if row["op"] == "rlsd_loss" and (row["tokens"], row["hidden"]) == (tokens, hidden)
    ]
    yield headline(f"`linear_rlsd_loss`, H = {hidden}", tokens, rows)


def headline(label: str, tokens: int, rows: Sequence[Row]) -> Sequence[str]:
    """A row of that table."""
    ours = fastest(rows, lambda name: name in OURS)
    eager, compiled, other = peers(rows)
    times = (time(ours), time(eager), time(compiled), time(other, named=True))
    return (label, f"{tokens:,}", *times, memory(ours), memory(eager))


def everything(name: str, dtype: str) -> Iterator[Sequence[str]]:
    """All operations of a benchmark."""
    tokens, by_op = measured(name, dtype)
    yield (f"{tokens} tokens, {dtype}", "sdkernels", "of a copy", "memory", EAGER, "best torch.compile", "best other")
    for op, rows in by_op.items():
        for ours in (fastest(rows, lambda name: name == IN_PLACE), fastest(rows, lambda name: name in OURS)):
            if ours is None:
                continue
            eager, compiled, other = peers(rows)
            label = op + (", in place" if ours["name"] == IN_PLACE else "")
            share = f"{100 * ours['copy_share']:.0f}%"
            theirs = (time(eager), time(compiled), time(other, named=True))
            yield (label, time(ours), share, memory(ours), *theirs)


def from_hidden() -> Iterator[Sequence[str]]:
    """RLSD from hidden states, over tokens."""
    yield ("RLSD, H = 256, float32", "`linear_rlsd_loss`", "a matmul and `rlsd_loss`", EAGER, "TRL's fused head")
    by_tokens: dict[int, dict[str, str]] = {}
    for row in load("linear")["measurements"]:
        if row["op"] == "rlsd_loss" and row["seconds"]:
            by_tokens.setdefault(row["tokens"], {})[row["name"]] = f"{row['seconds'][0]:.2f} s, {memory(row)}"
    for tokens, cells in by_tokens.items():
        columns = ("sdkernels linear", "logits version", EAGER, "TRL fused head")
        yield (f"{tokens:,} tokens", *(cells[name] for name in columns))


TABLES = {
    "headlines": headlines,
    "from hidden states": from_hidden,
    **{
        f"{name}, {dtype}": lambda name=name, dtype=dtype: everything(name, dtype)
        for name in ("rlsd_loss", "ssd_loss", "opsd_loss", "truncation")
        for dtype in ("float32", "bfloat16")
    },
}


def markdown(rows: Iterator[Sequence[str]]) -> str:
    """Rows as a table, the first of them its head."""
    head, *body = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join([head, "|---" * (head.count("|") - 1) + "|", *body])


def replaced(text: str, name: str, table: str) -> str:
    """A document with the table of that name written anew."""
    pattern = rf"(<!-- table: {re.escape(name)} -->\n).*?(<!-- end -->)"
    return re.sub(pattern, lambda match: f"{match[1]}\n{table}\n\n{match[2]}", text, flags=re.DOTALL)


def rewritten(text: str) -> str:
    """A document with all its tables of results written anew."""
    for name, rows in TABLES.items():
        text = replaced(text, name, markdown(rows()))
    return text


def main() -> None:
    """Write all."""
    for path in DOCUMENTS:
        path.write_text(rewritten(path.read_text()))


if __name__ == "__main__":
    main()
