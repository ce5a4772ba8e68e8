"""Links the dimensions of tensors, and the numbers of layers and experts, to the sizes in config.json.

A link is a sum of products of sizes, as text: `num_attention_heads*head_dim+2*num_key_value_heads*head_dim`. A factor
may be a whole quotient of two sizes: `hidden_size/num_attention_heads`.

Imports neither torch nor transformers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import prod

from int8convert.planning.model_map.sizes import Sizes, UnknownStructureError, kind_at

_ATTENTION_HEADS = re.compile(r"(num_|n_)?(attention_)?heads?|(encoder|decoder)_attention_heads")
_HIDDEN = re.compile(r"hidden_size|d_model|n_embd|n_embed|embed_dim|emb_dim|model_dim")
_PROOF = 3
"""Number of samples that coincidences do not survive."""


def evaluate(link: str, sizes: Sizes) -> int:
    """Return the value of a link.

    Raises:
        UnknownStructureError: a size is absent, or a quotient is not whole.
    """
    return sum(prod(_factor(factor, sizes) for factor in term.split("*")) for term in link.split("+"))


def _factor(factor: str, sizes: Sizes) -> int:
    if factor.isdigit():
        return int(factor)
    above, _, below = factor.partition("/")
    if above not in sizes or (below and (below not in sizes or sizes[above] % sizes[below])):
        raise UnknownStructureError(factor)
    return sizes[above] // sizes[below] if below else sizes[above]


class Links:
    """Finds the links that give a number in every sample.

    Args:
        samples: the sizes of each sample, which have the same names.
    """

    def __init__(self, samples: Sequence[Sizes]) -> None:
        self._samples = samples
        self._by_kind: dict[str | None, list[str]] = {}
        for path in sorted(set(samples[0]).intersection(*samples)):
            self._by_kind.setdefault(kind_at(path), []).append(path)
        widths = self._of("width", "inner width", "head width", "experts", "state groups", "rank", "state")
        widths += self._of("vocabulary", "positions", "key heads", "heads", "state heads")
        self.quotients = self._quotients()
        head_widths = [*self._of("head width"), *self.quotients]
        per_head = [
            f"{head}*{width}"
            for head in self._of("heads", "key heads", "state heads")
            for width in head_widths
            if _scope(head) == _scope(width) and not width.endswith(f"/{head}")
        ]
        joint = [
            f"{queries}*{width}+2*{keys}*{width}"
            for queries in self._of("heads")
            for keys in self._of("key heads")
            for width in head_widths
            if _scope(queries) == _scope(keys) == _scope(width)
        ]
        shifted = [f"{path}+{n}" for path in self._of("positions") for n in (1, 2)]
        self._terms = self._table([*widths, *self.quotients, *per_head])
        # Twice the width of a head is that of two key heads, too: one sample does not tell which.
        multiplied = (*widths, *per_head) if len(samples) >= _PROOF else self._of("width", "inner width")
        scaled = [f"{n}*{path}" for path in multiplied for n in (2, 3, 4)]
        self._shapes = self._table([*widths, *self.quotients, *per_head, *scaled, *joint, *shifted])
        self._counts = self._table(self._of("depth", "experts"))

    def _of(self, *kinds: str) -> list[str]:
        return [path for kind in kinds for path in self._by_kind.get(kind, ())]

    def _quotients(self) -> list[str]:
        """Return the widths of one head that are whole in every sample. Heads of other kinds divide no hidden state."""
        heads = [path for path in self._of("heads") if _ATTENTION_HEADS.fullmatch(path.rpartition(".")[2])]
        widths = [path for path in self._of("width") if _HIDDEN.fullmatch(path.rpartition(".")[2])]
        pairs = ((width, head) for width in widths for head in heads)
        whole = ((w, h) for w, h in pairs if _scope(w) == _scope(h) and not any(s[w] % s[h] for s in self._samples))
        return [f"{width}/{heads}" for width, heads in whole]

    def _table(self, links: Sequence[str]) -> dict[tuple[int, ...], list[str]]:
        table: dict[tuple[int, ...], list[str]] = {}
        for link in links:
            table.setdefault(tuple(evaluate(link, sizes) for sizes in self._samples), []).append(link)
        return table

    def of_count(self, values: tuple[int, ...]) -> list[str]:
        """Return all links of a number of layers or experts."""
        return self._counts.get(values) or _constant(values)

    def of_shape(self, values: tuple[int, ...]) -> list[str]:
        """Return all links of a dimension.

        In one sample some hold by coincidence. All of them have to hold again, so a coincidence only hides a structure.
        """
        return self._shapes.get(values) or self._sum(values) or _constant(values)

    @staticmethod
    def paths(link: str) -> list[str]:
        """Return the sizes in a link."""
        return [path for path in re.split(r"[+*/]", link) if not path.isdigit()]

    def _sum(self, values: tuple[int, ...]) -> list[str]:
        """Return a sum of two terms, which so few samples as one or two would not prove."""
        if len(self._samples) < _PROOF or len(set(values)) == 1:
            return []
        for first, links in self._terms.items():
            for a in (1, 2, 3, 4):
                rest = tuple(value - a * each for value, each in zip(values, first, strict=True))
                for b in (1, 2, 3, 4):
                    other = self._terms.get(tuple(each // b for each in rest))
                    if other and not any(each % b for each in rest):
                        return [f"{a}*{links[0]}+{b}*{other[0]}"]
        return []


def _scope(path: str) -> str:
    return path.partition("/")[0].rpartition(".")[0]


def _constant(values: tuple[int, ...]) -> list[str]:
    if len(set(values)) != 1:
        raise UnknownStructureError(f"no size gives {values}")
    return [str(values[0])]
