"""How a text begins and ends for a model: what stands before it, what stands for an empty one, which ids end it.

Prepared data say it in their manifest, a model of Hugging Face's in its files (nanostack.text.tokenizer_json), and every
checkpoint of ours carries it: a model that has seen a token before every text must see it before every prompt.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Bounds:
    """Token ids. What a tokenizer does without being told is `Bounds()`."""

    start: list[int] | None = None
    """They stand before every text; none where the list is empty. None: those that the tokenizer's own template puts there."""
    prefix: int | None = None
    """It stands for an empty text, as lm-eval has it. None: the first of `start`, else end-of-text."""
    ends: list[int] = field(default_factory=list)
    """Each of them ends a text, beside the tokenizer's end-of-text."""

    @classmethod
    def of_data(cls, manifest: Mapping[str, Any]) -> "Bounds":
        """Those of prepared data. Manifests that say nothing of a start were written when there was none."""
        entry = manifest["tokenizer"]
        return cls(list(entry.get("start", [])), ends=[entry["eot"]])

    def trained_on(self, data: "Bounds") -> "Bounds":
        """Those of a model with these bounds that trains on: the data's, and what the model had beside them.

        What it had means nothing where the data end with another token, since their tokenizer is then another.
        """
        if not set(data.ends) <= set(self.ends):
            return data
        prefix = self.prefix if self.start == data.start else data.prefix
        return Bounds(data.start, prefix, sorted({*self.ends, *data.ends}))

    def unlike(self, data: "Bounds") -> str | None:
        """How the start of a model's texts differs from that of data, for a note; None where it does not, or is not known."""
        if self.start in (None, data.start):
            return None
        ours, theirs = (f"tokens {start}" if start else "none" for start in (self.start, data.start))
        return f"{ours} stood before every text that the model has seen, and {theirs} before these: prepare them anew (--bos)"
