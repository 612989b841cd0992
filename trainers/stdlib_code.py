"""The code testbed for SSD: the standard library's own short functions, to be finished, with a linter as verifier.

A prompt is the first lines of a function that leave a parameter or variable to be used; the model writes the rest, and
EOS. The verifier (`trainers.code_verifier`) runs nothing: it asks for one function that parses, compiles, and has no
fault that can be seen. Syntax is then a place for one token, a lock in the paper's words; choosing a name is a fork.

Sources are normalised by `ast.unparse`, without docstrings, annotations, decorators and long strings. Only functions
whose names are all defined are kept. A line break with the indentation after it is one token, `<level>`; EOS starts,
ends and pads. The hash of its first line puts a function into pre-training, prompts or evaluation, so that no signature
is in two parts. From its second epoch on pre-training sees most functions with parameters and variables renamed, so
that the model copies names rather than recite them.
"""

import ast
import hashlib
import json
import random
import re
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from trainers.code_verifier import must_be_used, parameters, verify
from trainers.muon import Muon
from trainers.processes import device
from trainers.testbeds import IGNORED, pretrain

EOS = "<eos>"
MAX_LEVEL, MAX_CHARACTERS, MAX_STRING, MAX_TOKENS = 8, 500, 12, 112  # of a function
MAX_PENDING, MAX_REFERENCE = 2, 32  # names that a held-out prompt leaves to be used, tokens of the library's own answer
PARTS = {"eval": 32, "prompts": 72, "pretrain": 256}  # where each part's hash values end
EXCLUDED = {"test", "tests", "site-packages", "idlelib", "lib2to3", "ensurepip", "turtledemo", "tkinter", "encodings"}
VOCABULARY, BATCH_TOKENS, EPOCHS, RENAMED_SHARE = 2048, 1024, 6, 0.67
LEARNING_RATE, WARMUP_STEPS = 0.02, 40
OPTIONS: dict[str, str] = {}


class Problem(NamedTuple):
    """The first lines of a function, without the last line break, and how the standard library goes on."""

    prompt: str
    answer: str


class _Normalise(ast.NodeTransformer):
    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        if ast.get_docstring(node, clean=False) is not None and len(node.body) > 1:
            node.body = node.body[1:]
        node.decorator_list, node.returns = [], None
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        long = isinstance(node.value, str | bytes) and len(node.value) > MAX_STRING
        return ast.Constant("..." if isinstance(node.value, str) else b"...") if long else node


def read_functions(root: Path) -> list[str]:
    """Normalised texts of the short functions below `root` in which the verifier finds no undefined name."""
    found: dict[str, None] = {}
    for path in sorted(root.rglob("*.py")):
        if EXCLUDED & set(path.relative_to(root).parts):
            continue
        try:
            with warnings.catch_warnings(action="ignore"):
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                text = ast.unparse(ast.fix_missing_locations(_Normalise().visit(node)))
                if len(text) <= MAX_CHARACTERS and text.isascii() and not re.search(rf"<(\d|eos)>|\n {{{36},}}", text):
                    found[text] = None
    undefined = ("undefined", "syntax", "no such")
    return [text for text in found if not verify(text, "").feedback.startswith(undefined)]


def split(texts: Sequence[str]) -> dict[str, list[str]]:
    """The texts by part."""
    parts: dict[str, list[str]] = {name: [] for name in PARTS}
    for text in texts:
        value = hashlib.sha256(text.split("\n")[0].encode()).digest()[0]
        parts[next(part for part, end in PARTS.items() if value < end)].append(text)
    return parts


def build_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte-pair encoding trained on the texts, line breaks with indentation as single tokens."""
    levels = range(MAX_LEVEL, -1, -1)  # the deepest first
    breaks = {f"<{level}>": "\n" + "    " * level for level in levels}
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex(f"{text}(?! )"), token) for token, text in breaks.items()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[ .]?\w+| ?[^\w\s.]+|\.+| "), "isolated")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Fuse(), *(decoders.Replace(token, text) for token, text in breaks.items())]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(breaks),
        special_tokens=[EOS],
        initial_alphabet=[chr(code) for code in range(32, 127)],
        show_progress=False,
    )
    tokenizer.train_from_iterator([re.sub(r"\n *", " ", text) for text in texts], trainer)
    tokenizer.add_tokens([AddedToken(token, normalized=True, special=False) for token in breaks])
    tokenizer.post_processor = processors.TemplateProcessing(f"{EOS} $A", special_tokens=[(EOS, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS)


def cuts(text: str) -> Iterator[Problem]:
    """Every beginning of a function that leaves one or two names to be used."""
    lines, function = text.split("\n"), ast.parse(text).body[0]
    assert isinstance(function, ast.FunctionDef)
    for cut in range(1, len(lines)):
        names = [n for n in ast.walk(function) if isinstance(n, ast.Name) and n.lineno <= cut]
        bound = {n.id for n in names if isinstance(n.ctx, ast.Store)} | set(parameters(function.args))
        read = {n.id for n in names if not isinstance(n.ctx, ast.Store)}
        if 1 <= len({name for name in bound - read if must_be_used(name)}) <= MAX_PENDING:
            prompt = "\n".join(lines[:cut])
            yield Problem(prompt, text[len(prompt) :])


def held_out(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> list[Problem]:
    """One problem per function of which the verifier accepts some continuation of the standard library's, shuffled."""
    chosen = []
    for text in texts:
        short = [p for p in cuts(text) if len(tokenizer.encode(p.answer)) <= MAX_REFERENCE]
        solved = [p for p in short if verify(p.answer, p.prompt).reward]
        chosen += rng.sample(solved, min(1, len(solved)))
    return rng.sample(chosen, len(chosen))


def rename(text: str, pool: Sequence[str], rng: random.Random) -> str:
    """The function with its parameters and variables renamed to names drawn from `pool`."""
    function, new = ast.parse(text).body[0], {}
    taken = {n.id for n in ast.walk(function) if isinstance(n, ast.Name)}
    for name in variables(text):
        new[name] = next((c for c in rng.choices(pool, k=20) if c not in taken), name)
        taken.add(new[name])
    fields: dict[type, str] = {ast.Name: "id", ast.arg: "arg", ast.ExceptHandler: "name"}
    for node in ast.walk(function):
        if field := fields.get(type(node)):
            setattr(node, field, new.get(getattr(node, field), getattr(node, field)))
    return ast.unparse(function)


def variables(text: str) -> list[str]:
    """The parameters and variables of a function that can be renamed within it."""
    function = ast.parse(text).body[0]
    assert isinstance(function, ast.FunctionDef)
    names, fixed = set(parameters(function.args)), {"self", "cls"}
    for node in ast.walk(function):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            names.add(node.name)
        elif isinstance(node, ast.Global | ast.Nonlocal):
            fixed.update(node.names)
        elif isinstance(node, ast.FunctionDef | ast.Lambda) and node is not function:
            fixed.update(parameters(node.args))
        elif isinstance(node, ast.alias):
            fixed.add((node.asname or node.name).split(".")[0])
    return sorted(names - fixed)


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    """A randomly initialised Qwen3 of 706,000 parameters, embeddings tied."""
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=3,
            num_attention_heads=2, num_key_value_heads=1, head_dim=64, max_position_embeddings=256,
            tie_word_embeddings=True, bos_token_id=None, eos_token_id=0, pad_token_id=0,
        )
    )  # fmt: skip


def plan(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> list[tuple[Tensor, Tensor]]:
    """Token ids and labels of all epochs: rows of similar length together, about `BATCH_TOKENS` to a batch."""
    pool = [name for text in texts for name in variables(text)]
    made: list[tuple[Tensor, Tensor]] = []
    for epoch in range(EPOCHS):
        seen = [rename(t, pool, rng) if epoch and rng.random() < RENAMED_SHARE else t for t in texts]
        rows = [torch.tensor([*row[: MAX_TOKENS + 1], 0]) for row in tokenizer(seen)["input_ids"]]
        batches: list[list[Tensor]] = [[]]
        for row in sorted(rng.sample(rows, len(rows)), key=len):
            if (len(batches[-1]) + 1) * len(row) > BATCH_TOKENS:
                batches.append([])
            batches[-1].append(row)
        for batch in rng.sample(batches, len(batches)):
            made.append((pad_sequence(batch, True, 0), pad_sequence(batch, True, IGNORED)))
    return made


def make(directory: Path, seed: int = 0) -> None:
    """Train the base, and write it with its prompts and the held-out problems."""
    rng = random.Random(seed)
    parts = split(read_functions(Path(sysconfig.get_paths()["stdlib"])))
    tokenizer = build_tokenizer(parts["pretrain"])
    parts = {name: [t for t in texts if len(tokenizer.encode(t)) <= MAX_TOKENS] for name, texts in parts.items()}
    model = build_model(tokenizer, seed).to(device())
    batches = plan(parts["pretrain"], tokenizer, rng)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [
        Muon(matrices, LEARNING_RATE),
        torch.optim.AdamW(others, LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    columns = TextColumn("stdlib testbed"), BarColumn(), TextColumn("{task.fields[state]}"), TimeElapsedColumn()
    with Progress(*columns, console=Console()) as progress:
        task = progress.add_task("", total=len(batches), state="")

        def show(step: int, loss: float) -> bool:
            progress.update(task, completed=step, state=f"loss {loss:.3f}")
            return False

        def factor(step: int) -> float:
            return min(1.0, step / WARMUP_STEPS) * (1 - (step - 1) / len(batches))

        pretrain(model, batches, optimizers, factor, show)
    model.save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    prompts = [problem.prompt for text in parts["prompts"] for problem in cuts(text)]
    problems = held_out(parts["eval"], tokenizer, rng)
    for name, texts in (("train", rng.sample(prompts, len(prompts))), ("eval", [p.prompt for p in problems])):
        rows = ({"prompt": text, "reference": text, "verifier": "trainers.code_verifier:verify"} for text in texts)
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
