"""Rows of the past: what a causal token mix needs of the rows that a cache of transformers stands for.

A cache holds keys and values, which do not tell what a layer was fed. So the last rows that each layer was fed are kept beside
them, as one more layer of the cache: what happens to a cache (beams that are reordered, samples that are selected or repeated,
a reset) happens to its layers, and a copy of it has a copy of them. A cache that was cropped is noticed by its length, one that
another call has written to since by its keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from strassen_tile.errors import ShapeError

ROLLBACK = 32  # rows by which a cache may be cropped, of those of the last call: what assisted decoding takes back
Key = tuple[str, int]  # of a layer, and how often it had run in the call before


class Kept(NamedTuple):
    """The last rows (B, n, K) that a layer was fed, and how many rows of the sequence there were after them."""

    rows: Tensor
    end: int


class Past:
    """One more layer of a cache, which has rows where others have keys. For all else it looks like the first of them."""

    keys = values = None

    def __init__(self, like: Any) -> None:
        self._like = like
        self.kept: dict[Key, Kept] = {}
        self.written: Kept | None = None  # the last keys (B, n, …) of attention, which depend on all that came before

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._like, name)

    def __repr__(self) -> str:
        return f"Past({len(self.kept)} layers)"

    def update(self, *arguments: Any, **more: Any) -> Any:
        """Never called: attention has layers of its own."""
        raise ShapeError(
            "the cache was filled by a model of fewer layers than the one it is handed to; give each model its own"
        )

    def reset(self) -> None:
        """Forget the sequence."""
        self.kept.clear()
        self.written = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Each sample's rows become those of another."""
        self._each(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these samples stay."""
        self._each(lambda rows: rows[indices.to(rows.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sample comes that often."""
        self._each(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def crop(self, *arguments: Any) -> None:
        """Nothing: the length of the others says it, when rows are next asked for."""

    def offload(self) -> None:
        """Nothing: there are few rows."""

    def prefetch(self) -> None:
        """Nothing, likewise."""

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        self.kept = {key: Kept(change(kept.rows), kept.end) for key, kept in self.kept.items()}
        if self.written is not None:
            self.written = Kept(change(self.written.rows), self.written.end)


def before(cache: object, key: Key, x: Tensor, length: int, wanted: int) -> Tensor | None:
    """The last rows (B, n, K), n ≤ `wanted`, of what that layer was fed ahead of x (B, N, K); None at a sequence's start.

    Args:
        cache: that the call was given.
        length: rows that the cache holds.

    Raises:
        ShapeError: the rows are not there, or are not those of this cache.
    """
    if not length:
        return None
    past = _past_of(cache)
    kept = None if past is None else past.kept.get(key)
    if kept is None:
        raise ShapeError(
            f"a cache holds {length} rows that a layer with a causal token mix has not seen: it was filled by another model, "
            "or in training mode, or under torch.compile. Run the whole sequence (use_cache=False), or fill the cache with "
            "this model in eval mode"
        )
    rows = kept.rows[:, : max(0, kept.rows.shape[1] - max(0, kept.end - length))]
    if kept.end < length or rows.shape[1] < min(wanted, length) or rows.shape[0] != x.shape[0]:
        raise ShapeError(
            f"the cache holds {length} rows of {x.shape[0]} samples, and a causal token mix goes on from {kept.end} of "
            f"{kept.rows.shape[0]}, of which it has kept {kept.rows.shape[1]}: a cache may be cropped by at most the "
            f"{ROLLBACK} last rows of its last call, and is changed by its own methods only"
        )
    return rows[:, rows.shape[1] - min(wanted, rows.shape[1]) :]


def check_written(cache: object, length: int) -> None:
    """Raise ShapeError if the last of the rows that a cache holds was written by another call than those that were kept.

    That is to be seen where attention's keys are all there: not of windows, nor where they are quantised.
    """
    past = _past_of(cache)
    keys = _keys(cache, length)
    if (
        past is None
        or past.written is None
        or keys is None
        or not 0 <= past.written.end - length < past.written.rows.shape[1]
    ):
        return
    ours, now = past.written.rows[:, length - past.written.end - 1], keys[:, -1]
    if ours.shape != now.shape or not bool((ours.to(now.device) == now).all()):  # a synchronisation
        raise ShapeError(
            f"the last of the {length} rows that the cache holds was written by another model, in training mode, or under "
            "torch.compile, after it had been cropped: a causal token mix has not seen what it was fed. Run the whole sequence "
            "(use_cache=False), or fill the cache with this model in eval mode"
        )


def kept_of(whole: Tensor, n: int, length: int, wanted: int) -> Kept:
    """What is to be kept of `whole` (B, …, K), the rows ahead and the n that a layer was fed, of `length` that there were."""
    most = wanted + min(n, ROLLBACK)
    last = whole.detach()
    # A few rows are kept in the memory they are in; of many, not all memory for the sake of the last.
    return Kept(last if whole.shape[1] <= most else last[:, whole.shape[1] - most :].clone(), length)


def remember(cache: object, kept: Mapping[Key, Kept]) -> None:
    """Let `cache` hold them; nothing if it is no cache of transformers'."""
    layers = _layers_of(cache)
    if layers is None or not layers:
        return
    past = _past_of(cache)
    if past is None:
        past = Past(layers[0])
        layers.append(past)
    past.kept.update(kept)
    end = max(one.end for one in kept.values())
    keys = _keys(cache, end)
    past.written = None if keys is None else Kept(keys[:, -(ROLLBACK + 1) :].clone(), end)


def cache_in(output: object) -> object:
    """The cache that a model returned; None if there is none."""
    found = getattr(output, "past_key_values", None)
    candidates = [found, *(output if isinstance(output, tuple) else ())]
    return next((one for one in candidates if one is not None and _layers_of(one) is not None), None)


def _layers_of(cache: object) -> list[Any] | None:
    decoder = getattr(cache, "self_attention_cache", cache)
    layers = getattr(decoder, "layers", None)
    return layers if isinstance(layers, list) and hasattr(decoder, "get_seq_length") else None


def _past_of(cache: object) -> Past | None:
    return next((layer for layer in reversed(_layers_of(cache) or []) if isinstance(layer, Past)), None)


def _keys(cache: object, length: int) -> Tensor | None:
    """The keys (B, length, heads, K) of the last layer that has those of all the rows; None where windows have moved on."""
    for layer in reversed(_layers_of(cache) or []):
        keys = getattr(layer, "keys", None)
        if isinstance(keys, Tensor) and keys.ndim == 4 and keys.shape[2] >= length > 0:
            return keys[:, :, :length].transpose(1, 2)
    return None
