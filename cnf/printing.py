"""Text for the `repr` of flows and their parts, within the width of a terminal."""

import re
import textwrap
from collections.abc import Sequence

from torch import nn

WIDTH = 79
NO_BREAK = re.compile(r" (?=[\d×])|(?<=×) ")  # spaces at which a line is not broken


def named(part: object, *about: str) -> str:
    """The text Type(about, …), wrapped.

    Args:
        part: The object.
        about: What to say of it; empty texts are omitted.
    """
    return wrapped(f"{type(part).__name__}({joined(*about)})")


def joined(*about: str) -> str:
    """The texts that are not empty, separated by commas."""
    return ", ".join(text for text in about if text)


def wrapped(text: str, indent: str = "") -> str:
    """Wrap a text to lines of at most `WIDTH` characters.

    Args:
        text: The text.
        indent: Indentation of the first line; the others have four spaces more.
    """
    text = NO_BREAK.sub("\0", " ".join(text.split()))
    lines = textwrap.fill(
        text, WIDTH, initial_indent=indent, subsequent_indent=f"{indent}    ",
        break_on_hyphens=False, break_long_words=False,
    )  # fmt: skip
    return lines.replace("\0", " ")


def grouped(parts: Sequence[object]) -> str:
    """The texts of parts, separated by commas, with repetitions as counts.

    >>> grouped(["a", "b", "a", "b", "a", "c", "c"])
    '2 × (a, b), a, 2 × c'
    """
    texts, found = [str(part) for part in parts], []
    while texts:
        sizes = range(1, len(texts) // 2 + 1)
        size = max(sizes, key=lambda size: (_repeats(texts, size) - 1) * size, default=1)
        group, count = ", ".join(texts[:size]), _repeats(texts, size)
        if count == 1:
            size, group = 1, texts[0]
        elif size > 1:
            group = f"({group})"
        found.append(group if count == 1 else f"{count} × {group}")
        texts = texts[count * size :]
    return ", ".join(found)


def _repeats(texts: Sequence[str], size: int) -> int:
    """How often the first `size` texts are repeated in a row."""
    count = 1
    while texts[count * size : (count + 1) * size] == texts[:size]:
        count += 1
    return count


def shaped(shape: Sequence[int] | None, context_dim: int = 0) -> str:
    """The size of a vector or the shape of an image, and the size of the context.

    Args:
        shape: Shape of an event.
        context_dim: Size of the context; 0 is omitted.
    """
    size = str(tuple(shape)) if shape and len(shape) > 1 else "".join(map(str, shape or ()))
    return joined(size, f"context {context_dim}" if context_dim else "")


def weights_of(module: nn.Module) -> str:
    """The number of trainable parameters of a module, as text."""
    count = sum(weight.numel() for weight in module.parameters())
    return f"{count:,} weight{'' if count == 1 else 's'}"
