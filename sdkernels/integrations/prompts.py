"""The privileged prompt, which only a teacher reads."""

from __future__ import annotations

import re
from typing import Any

PRIVILEGED_TEMPLATE = (
    "{prompt}\n\nThe correct final answer is: {privileged}\n\nWork out your own solution that leads to it."
)


def privileged_prompt(prompt: Any, privileged: str, template: str = PRIVILEGED_TEMPLATE) -> Any:
    """The prompt with privileged information put into its last turn.

    Args:
        prompt: Text, or a chat, whose last message is the user's; of a message of several parts the last text is
            filled in, and images stay where they are.
        privileged: What the student does not read.
        template: How it reads, with {prompt} and {privileged}.

    Raises:
        ValueError: the template lacks one of the two, or the last message has no text.

    """
    if not ("{prompt}" in template and "{privileged}" in template):
        raise ValueError(f"the template must hold {{prompt}} and {{privileged}}, got {template!r}")

    def fill(text: str) -> str:  # at once: braces in the texts themselves stay
        texts = {"prompt": text, "privileged": privileged}
        return re.sub(r"{(prompt|privileged)}", lambda name: texts[name[1]], template)

    if isinstance(prompt, str):
        return fill(prompt)
    content = prompt[-1]["content"]
    if isinstance(content, str):
        return [*prompt[:-1], {**prompt[-1], "content": fill(content)}]
    last = max((i for i, part in enumerate(content) if part.get("type") == "text"), default=None)
    if last is None:
        raise ValueError("the user's turn has no text to put privileged information into")
    parts = [{**part, "text": fill(part["text"])} if i == last else part for i, part in enumerate(content)]
    return [*prompt[:-1], {**prompt[-1], "content": parts}]
