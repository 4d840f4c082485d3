"""`PackingCollator`: packs documents into rows of at most N tokens and emits their boundaries for the kernels."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Literal

from axattn.documents.examples import IGNORE_INDEX, Document, documents_of
from axattn.documents.packed_rows import LINEAR_COST, balanced_rows, document_work, first_fit_decreasing
from axattn.documents.prefix_groups import common, prefix_groups
from axattn.errors import InvalidConfigError, InvalidInputError

TooLong = Literal["split", "error"]
Balance = Literal["flops"]


@dataclass(slots=True)
class PackingStats:
    """Counts of what a collator has packed so far in its process.

    Attributes:
        documents: documents received.
        tokens: their tokens; each is in exactly one row. Of a collator with a `rank`: those of its own rows.
        rows: rows made.
        padding: padding tokens added.
        splits: how often a document was cut to fit a row.
    """

    documents: int = 0
    tokens: int = 0
    rows: int = 0
    padding: int = 0
    splits: int = 0

    @property
    def fill(self) -> float:
        """Real tokens over all tokens, from 0 to 1."""
        total = self.tokens + self.padding
        return self.tokens / total if total else 1.0


class PackingCollator:
    """A ``data_collator`` for Transformers' Trainer and TRL that packs documents without leaking.

    A batch holds ``input_ids``, ``position_ids`` (from `first_position` in every document), ``labels`` (no loss across
    a boundary: the first token of a document is not a target), and ``cu_seq_lens_q/k``, ``max_length_q/k`` over the
    flattened tokens. Padding at the end of a row is a separate document without loss; there is no attention mask unless
    `return_mask` is set.

    Args:
        max_length: tokens in a row. None puts all documents of a batch into one row.
        pad_token_id: token that fills rows; None only if no row is filled (no `max_length`).
        too_long: what happens to a document longer than `max_length`: ``"split"`` cuts it into separate documents,
            ``"error"`` refuses it.
        pad_rows: fill every row to `max_length`, not only to the longest (fixed shapes for compiled models).
        pad_to_multiple_of: row lengths are a multiple of this.
        return_lengths: emit ``cu_seq_lens_*`` and ``max_length_*``; turn off for models whose forward does not take
            them (documents are then found in ``position_ids``).
        first_position: position of a document's first token: 0, but ``padding_idx + 1`` (2) for models of the RoBERTa
            family, which count from there.
        return_mask: emit an ``attention_mask`` too, 0 for padding at the end of a row. Without it the load balancing
            loss of a mixture of experts (``output_router_logits=True``) counts padding. Flash names refuse a mask with
            padding.
        group_by_prefix: put documents of a batch that begin alike (completions of a prompt) into one row, as far as
            they fit, for models with ``share_prefixes=True``.
        balance: ``"flops"`` makes rows of equal work, not as few rows as possible: L² for attention in a document of L
            tokens, and `linear_cost` for each of its tokens. What `group_by_prefix` puts together stays together, and
            what its documents share counts once.
        ranks: data-parallel ranks that share a batch, for ``balance="flops"``: each gets equally many rows, of equal
            work. Give the collator of every rank the same examples: those of all ranks.
        rank: the rank whose rows a batch holds. None: the rows of all ranks, those of rank 0 first, equally many of
            each (with rows of padding if there are fewer documents than rows), to be split into equal parts, as
            accelerate's ``dispatch_batches`` and ``split_batches`` do. With ``return_lengths=False`` only: lengths
            would be split wrongly.
        linear_cost: FLOPs of a token outside of attention, where a document's attention takes L²: 12 * hidden size
            (`axattn.documents.packed_rows.document_work`).

    Attributes:
        stats: `PackingStats` so far.

    Raises:
        InvalidConfigError: an argument that can't be used.
        InvalidInputError: on a call: an empty batch, an empty document, features of different lengths or that are not
            flat lists of integers, a document that is too long, fewer documents (or groups) than ranks.
    """

    def __init__(
        self,
        max_length: int | None = None,
        *,
        pad_token_id: int | None = 0,
        too_long: TooLong = "split",
        pad_rows: bool = False,
        pad_to_multiple_of: int | None = None,
        return_lengths: bool = True,
        first_position: int = 0,
        return_mask: bool = False,
        group_by_prefix: bool = False,
        balance: Balance | None = None,
        ranks: int = 1,
        rank: int | None = None,
        linear_cost: int = LINEAR_COST,
    ) -> None:
        for name, value in (("max_length", max_length), ("pad_to_multiple_of", pad_to_multiple_of)):
            if value is not None and not _is_whole(value):
                raise InvalidConfigError(f"{name}={value!r} is not a whole number", advice="Give tokens, or None.")
        if max_length is not None and max_length < 2:
            text = f"max_length={max_length}: a row needs at least two tokens to have one target"
            raise InvalidConfigError(text)
        if too_long not in ("split", "error"):
            raise InvalidConfigError(f'too_long={too_long!r} is neither "split" nor "error"')
        if pad_to_multiple_of is not None and pad_to_multiple_of < 0:
            raise InvalidConfigError(f"pad_to_multiple_of={pad_to_multiple_of} is negative")
        if pad_to_multiple_of and max_length is not None and max_length % pad_to_multiple_of:
            raise InvalidConfigError(
                f"max_length={max_length} is not a multiple of pad_to_multiple_of={pad_to_multiple_of}"
            )
        if pad_rows and max_length is None:
            raise InvalidConfigError("pad_rows=True needs a max_length")
        if not _is_whole(first_position) or first_position < 0:
            kind = "negative" if _is_whole(first_position) else "not a position"
            raise InvalidConfigError(f"first_position={first_position!r} is {kind}", advice="0, or padding_idx + 1.")
        filler = 0 if pad_token_id is None else pad_token_id
        _require_balance(balance, ranks, rank, linear_cost)
        if balance and group_by_prefix and max_length is None:
            text = f'group_by_prefix=True with balance="{balance}" needs a max_length: groups have no limit without'
            raise InvalidConfigError(text)
        whole = ranks > 1 and rank is None
        if whole and return_lengths:
            text = f"ranks={ranks} without a rank makes rows of all ranks, and their lengths can't be split"
            raise InvalidConfigError(text, advice="Give a rank, or return_lengths=False.")
        needed = max_length is not None or bool(pad_to_multiple_of) or whole
        if (pad_token_id is None and needed) or not _is_whole(filler) or filler < 0:
            advice = "A tokenizer without one: pad_token_id=tokenizer.eos_token_id; padding has no loss."
            raise InvalidConfigError(f"pad_token_id={pad_token_id!r} is no token", advice=advice)
        self.max_length = max_length
        self.pad_token_id = filler
        self.too_long = too_long
        self.pad_rows = pad_rows
        self.pad_to_multiple_of = pad_to_multiple_of
        self.return_lengths = return_lengths
        self.first_position = first_position
        self.return_mask = return_mask
        self.group_by_prefix = group_by_prefix
        self.balance = balance
        self.ranks = ranks
        self.rank = rank
        self.linear_cost = linear_cost
        self.stats = PackingStats()

    def __call__(self, features: Sequence[Mapping[str, Any]], return_tensors: str | None = None) -> dict[str, Any]:
        """Pack a batch.

        Args:
            features: one mapping per example: ``input_ids`` and any other per-token lists. ``attention_mask`` zeros are
                removed; ``position_ids``, ``seq_lengths`` or document ids in the ``attention_mask`` that mark several
                documents in an example are honoured; ``completion_mask`` and ``assistant_masks`` turn into labels.
            return_tensors: ``"pt"`` or None.

        Returns:
            Tensors as described for the class, rows first: ``[rows, row length]``.
        """
        if return_tensors not in (None, "pt"):
            raise InvalidConfigError(f'return_tensors={return_tensors!r}: PackingCollator makes "pt" tensors only')
        if not isinstance(features, Sequence) or isinstance(features, str | bytes):
            text = f"the batch is a {type(features).__name__}, not a list of examples"
            raise InvalidInputError(text, advice='Give [{"input_ids": [...]}, ...].')
        if not features:
            raise InvalidInputError("the batch is empty", advice="Give PackingCollator at least one example.")
        documents = [document for at, feature in enumerate(features) for document in documents_of(feature, at)]
        keys = {frozenset(document.features) for document in documents}
        if len(keys) > 1:
            names = sorted({name for key in keys for name in key} - frozenset.intersection(*keys))
            raise InvalidInputError(f"only some examples of the batch have {', '.join(names)}")
        self.stats.documents += len(documents)
        pieces = self._cut(documents)
        return self._batch([[pieces[i] for i in row] for row in self._rows(pieces)])

    def _rows(self, pieces: list[Document]) -> list[list[int]]:
        if self.balance:
            return self._balanced_rows(pieces)
        if self.max_length is None:
            return [list(range(len(pieces)))]
        if not self.group_by_prefix:
            return first_fit_decreasing([len(piece) for piece in pieces], self.max_length)
        groups = prefix_groups([piece.features["input_ids"] for piece in pieces], self.max_length)
        sizes = [sum(len(pieces[i]) for i in group) for group in groups]
        rows = first_fit_decreasing(sizes, self.max_length)
        return sorted(sorted(i for number in row for i in groups[number]) for row in rows)

    def _balanced_rows(self, pieces: list[Document]) -> list[list[int]]:
        ids = [piece.features["input_ids"] for piece in pieces]
        groups = [[number] for number in range(len(pieces))]
        if self.group_by_prefix and self.max_length is not None:
            groups = prefix_groups(ids, self.max_length)
        if len(groups) < self.ranks:
            kind = "groups that begin alike" if self.group_by_prefix else "documents"
            text = f"the batch has {len(groups)} {kind} for {self.ranks} ranks"
            advice = "Give each rank the examples of all ranks; drop_last=True drops a last batch that is too small."
            raise InvalidInputError(text, advice=advice)
        shared = [0] * len(pieces)
        for group in groups:
            for one, other in pairwise(group):
                shared[other] = common(ids[one], ids[other])
        lengths = [sum(len(ids[i]) for i in group) for group in groups]
        work = [sum(document_work(len(ids[i]), self.linear_cost, shared[i]) for i in group) for group in groups]
        shares = [
            [sorted(i for number in row for i in groups[number]) for row in share]
            for share in balanced_rows(lengths, work, self.max_length, self.ranks)
        ]
        if self.rank is not None:
            return shares[self.rank]
        most = max(map(len, shares))
        return [row for share in shares for row in [*share, *[[]] * (most - len(share))]]

    def _cut(self, documents: list[Document]) -> list[Document]:
        limit = self.max_length
        if limit is None:
            return documents
        pieces: list[Document] = []
        for document in documents:
            if len(document) <= limit:
                pieces.append(document)
                continue
            if self.too_long == "error":
                raise InvalidInputError(
                    f"a document has {len(document)} tokens, a row holds {limit}",
                    advice='Raise max_length, or pass too_long="split".',
                )
            pieces += [document.piece(a, a + limit) for a in range(0, len(document), limit)]
            self.stats.splits += -(-len(document) // limit) - 1
        return pieces

    def _batch(self, rows: list[list[Document]]) -> dict[str, Any]:
        import torch

        used = [sum(len(document) for document in row) for row in rows]
        size = self.max_length if self.pad_rows and self.max_length is not None else max(used)
        if self.pad_to_multiple_of:
            size = -(-size // self.pad_to_multiple_of) * self.pad_to_multiple_of
        columns: dict[str, list[list[int]]] = {key: [] for key in (*rows[0][0].features, "position_ids")}
        lengths: list[int] = []
        for row, real in zip(rows, used, strict=True):
            padding = size - real
            parts = [len(document) for document in row] + ([padding] if padding else [])
            lengths += parts
            columns["position_ids"].append([self.first_position + i for part in parts for i in range(part)])
            for key in rows[0][0].features:
                fill = {"input_ids": self.pad_token_id, "labels": IGNORE_INDEX}.get(key, 0)
                columns[key].append([v for document in row for v in document.features[key]] + [fill] * padding)
        self.stats.rows += len(rows)
        self.stats.tokens += sum(used)
        self.stats.padding += size * len(rows) - sum(used)
        batch: dict[str, Any] = {key: torch.tensor(values, dtype=torch.long) for key, values in columns.items()}
        if self.return_mask:
            batch["attention_mask"] = torch.tensor([[1] * real + [0] * (size - real) for real in used])
        if self.return_lengths:
            cumulative = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
            batch["cu_seq_lens_q"] = batch["cu_seq_lens_k"] = cumulative
            batch["max_length_q"] = batch["max_length_k"] = max(lengths)
        return batch


def _require_balance(balance: Any, ranks: Any, rank: Any, linear_cost: Any) -> None:
    if balance not in (None, "flops"):
        raise InvalidConfigError(f'balance={balance!r} is neither "flops" nor None')
    if not _is_whole(ranks) or ranks < 1:
        raise InvalidConfigError(f"ranks={ranks!r} is not a number of ranks", advice="Give 1 or more.")
    if rank is not None and (not _is_whole(rank) or not 0 <= rank < ranks):
        text = f"rank={rank!r} is none of the {ranks} ranks"
        raise InvalidConfigError(text, advice=f"Give 0 to {ranks - 1}, or None.")
    if balance is None and ranks > 1:
        raise InvalidConfigError(f"ranks={ranks} does nothing without a balance", advice='Give balance="flops".')
    if not _is_whole(linear_cost) or linear_cost < 0:
        text = f"linear_cost={linear_cost!r} is not a whole number of at least 0"
        raise InvalidConfigError(text, advice="Give 12 * model.config.hidden_size.")


def _is_whole(value: Any) -> bool:
    """Whether `value` is an integer of Python, numpy or torch, and not a bool."""
    try:
        operator.index(value)
    except TypeError:
        return False
    return not isinstance(value, bool)
