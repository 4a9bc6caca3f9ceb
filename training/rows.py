"""Rows: what one segment is to the LLM, the same in training as it is served.

A row is a prefix, then for every chunk its queries and the words that may leave in it (DESIGN 2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparqle_stream.config import QUERY_MS

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True)
class Row:
    """One segment as the LLM sees it. `kinds`: 'q' with a query index or 't' with a token id."""

    items: list[tuple[str, int]]
    text_at: list[int]  # positions whose next token is text ...
    text_ids: list[int]  # ... and which
    stop_at: list[int]  # positions at which the stop head decides ...
    stop: list[float]  # ... 1 to stop, 0 to write on


def interleave(
    words: list[tuple[list[int], int]],
    n_queries: int,
    chunk_queries: int,
    delay_ms: int,
    prefix: list[int],
    first_chunk: int = 0,
    n_again: int = 0,
) -> Row:
    """Words (token ids, end in ms) and queries -> the row that training and serving share.

    A word belongs to the first chunk whose end is `delay_ms` or more after the word's end; what
    is still open after the last chunk is not taught. A row that begins at `first_chunk` is a
    segment after a seam: it hears the last `n_again` queries before it once more, because words
    that they hold are still to be written.
    """
    row = Row([("t", i) for i in prefix], [], [], [], [])
    seam = first_chunk * chunk_queries
    row.items += [("q", i) for i in range(max(0, seam - n_again), seam)]
    pending = list(words)
    for chunk in range(-(-n_queries // chunk_queries)):
        first = chunk * chunk_queries
        end_ms = min(first + chunk_queries, n_queries) * QUERY_MS
        due = []
        while pending and pending[0][1] + delay_ms <= end_ms:
            due += pending.pop(0)[0]
        if chunk < first_chunk:
            continue
        row.items += [("q", i) for i in range(first, min(first + chunk_queries, n_queries))]
        for token in due:
            row.stop_at.append(len(row.items) - 1)
            row.stop.append(0.0)
            row.text_at.append(len(row.items) - 1)
            row.text_ids.append(token)
            row.items.append(("t", token))
        row.stop_at.append(len(row.items) - 1)
        row.stop.append(1.0)
    return row


def merged(queries: Tensor, rows: list[Row], n: int) -> tuple[Tensor, list[Row]]:
    """Queries (B, Q, E), rows -> every `n` queries summed to one (B, Q / n, E), which stands where
    the last of them stood.

    Sums, because what CTC heard is in them once for each piece.
    """
    if n == 1:
        return queries, rows
    b, q, e = queries.shape
    return queries.view(b, q // n, n, e).sum(dim=2), [_merged_row(row, n) for row in rows]


def _merged_row(row: Row, n: int) -> Row:
    items: list[tuple[str, int]] = []
    place = []  # of every old item: where the last kept one up to it lies
    for kind, value in row.items:
        if kind == "t":
            items.append((kind, value))
        elif value % n == n - 1:
            items.append((kind, value // n))
        place.append(len(items) - 1)
    moved = [place[at] for at in row.text_at], [place[at] for at in row.stop_at]
    return Row(items, moved[0], row.text_ids, moved[1], row.stop)
