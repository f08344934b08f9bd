"""What the arguments of a model say of its rows: which are real, and that they are one sequence each.

Rows mix within a tile, and tiles begin at row 0. So padding has to stand on the right, and what is packed into one row of the
batch (documents end to end) would leak from one into the next. While tracing there are no values to look at: then the compiled
graph looks itself, and fails.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from strassen_tile.errors import ShapeError, shape_text

ROWS = ("src_key_padding_mask", "attention_mask")
OTHERS = ("tgt_key_padding_mask", "decoder_attention_mask")  # of a second sequence
PATTERNS = ("mask", "src_mask")  # of torch's encoders: who sees whom
# What a tower makes rows of its own of.
SIGNALS = ("pixel_values", "input_features", "input_values", "pixel_values_videos")
PACKED = (
    "several documents are packed into one row of the batch ({how}): the tiles of a row-mixing layer would let one leak into "
    "the next. Give each a row of its own, padded, or use mixing='none'"
)
_LEFT = "the mask has padding before real rows; pad on the right (tokenizer.padding_side = 'right')"
_SCORES = "attention_mask has negative values: it is 1 for real rows and 0 for padding, not something to add to scores"
_PATTERN = (
    "attention_mask {shape} lets rows see some of the rows before them and not others, nearer or further: a token mix cannot "
    "follow that. Keep those layers dense (filter_fn)"
)
_NAN = "{name} has NaN: it does not say whether those rows are real"
_FOREIGN = {
    "cache_params": "its cache is one of states, where rows of the past are not kept: run whole sequences (use_cache=False)",
    "state": "its state does not hold rows of the past: run whole sequences (use_cache=False)",
    "write_index": "requests that are batched continuously (generate_batch) go on from a paged cache, which is not followed: "
    "use generate",
}  # arguments that hand on a past in a form that is not followed
_POSITIONS = ("position_ids", "seq_idx")
_ROWS_GIVEN = ("input_ids", "inputs_embeds", "position_ids")
_BOUNDARIES = ("cu_seq_lens", "cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "cu_seqlens_q", "cu_seqlens_k")


class Takes(NamedTuple):
    """What a module is told of its rows.

    Attributes:
        positions: name → position of the arguments of its forward.
        own_rows: whether its rows are its own, so that without a mask of its own nothing is padding.
        part: whether it is a part of a model that hands a mask down to it in a form of its own.
    """

    positions: dict[str, int]
    own_rows: bool
    part: bool = False


def takes_of(module: nn.Module, root: bool) -> Takes:
    """What `module` takes, read from the signature of its forward; the rows of a whole model (`root`) are its own."""
    try:
        names = list(inspect.signature(module.forward).parameters)
    except (TypeError, ValueError):  # written in C++, or compiled to TorchScript
        names = []
    told = [*ROWS, *OTHERS, "past_key_values", "position_ids", "seq_idx"]
    own_rows = root or hasattr(module, "get_input_embeddings")
    if (
        "src_key_padding_mask" in names or "tgt_key_padding_mask" in names
    ):  # torch's: attention sees all that is not masked
        told, own_rows = [*told, *PATTERNS], True
    return Takes({name: names.index(name) for name in told if name in names}, own_rows)


def real_rows(mask: Tensor, name: str = "attention_mask", *, anywhere: bool = False) -> Tensor:
    """`mask` (B, N) as True for real rows; the masks of `nn.TransformerEncoder` mark padding instead, by True or −inf.

    Raises:
        ShapeError: another number of dimensions, NaN, or padding ahead of real rows, unless it may be `anywhere`.
    """
    if mask.ndim != 2:
        raise ShapeError(f"a padding mask is (B, N); got {name} {shape_text(mask.shape)}")
    if mask.is_floating_point():
        _require((mask == mask).all(), _NAN.format(name=name))
    if name.endswith("key_padding_mask"):
        real = mask >= 0 if mask.is_floating_point() else mask == 0
    else:
        real = mask != 0
        if mask.is_floating_point():
            _require((mask >= 0).all(), _SCORES)
    if not anywhere:
        _require((real == ((~real).cumsum(1) == 0)).all(), _LEFT)  # of any length, where a program is traced
    return real


def check_past(module_name: str, given: Mapping[str, Any]) -> None:
    """Raise ShapeError if the arguments of a model hand on a past that mixing layers cannot go on from."""
    for name, why in _FOREIGN.items():
        if given.get(name) is not None and (
            name != "state" or "use_cache" in given
        ):  # RWKV's; others call other things so
            raise ShapeError(f"{module_name} has layers that mix rows, and {why}")


def check_one_sequence(arguments: Mapping[str, Any], real: Tensor | None) -> None:
    """Raise ShapeError if the arguments of a model say that a row of its batch holds several documents.

    They say so by `position_ids` that start anew or jump, by boundaries of more than one, or by `seq_idx` that changes.
    """
    for name in _BOUNDARIES:
        ends = arguments.get(name)
        if isinstance(ends, Tensor) and ends.numel() > 2:
            raise ShapeError(PACKED.format(how=f"{name} has {ends.numel() - 1} of them"))
    for name in _POSITIONS:
        goes_on = _goes_on(name, arguments.get(name))
        if goes_on is None:
            continue
        if real is not None and real.shape[1] == goes_on.shape[1] + 1:
            goes_on = goes_on | ~real[:, 1:]
        _require(
            goes_on.all(),
            PACKED.format(how=f"{name} starts anew or jumps" if name == "position_ids" else f"{name} changes"),
        )


def documents_of(arguments: Mapping[str, Any]) -> Tensor | None:
    """Numbers (B, N) of the documents that rows are of, as the arguments of a model say it; None where they name no borders.

    They say so by `seq_idx` that changes, `position_ids` that start anew or jump, or, for a batch of one, boundaries.
    """
    for name in _POSITIONS:
        goes_on = _goes_on(name, arguments.get(name))
        if goes_on is not None and (_is_traced(goes_on) or not bool(goes_on.all())):
            return F.pad((~goes_on).cumsum(1), (1, 0))
    rows = next((arguments[name] for name in _ROWS_GIVEN if isinstance(arguments.get(name), Tensor)), None)
    for name in _BOUNDARIES:
        ends = arguments.get(name)
        if isinstance(ends, Tensor) and rows is not None and ends.numel() > 2:
            return torch.bucketize(torch.arange(rows.shape[1], device=ends.device), ends[1:], right=True)[None]
    return None


def mask_of_layers(mask: object) -> object:
    """Of a dict of masks for layers of several kinds the one that says what is padding: full attention's, else the first.

    None where that hides nothing.
    """
    if not isinstance(mask, Mapping):
        return mask
    given = [one for one in mask.values() if isinstance(one, Tensor)]
    return mask.get("full_attention", given[0] if given else None)


def rows_of_pattern(mask: object, past: int) -> Tensor | None:
    """(B, past + N): the document of each row, from 1 on, and 0 for padding, by a mask (B, 1, N, n) of who sees whom; or None.

    A row that does not see itself is padding, and one that does not see the row before it begins a document. Of the past the
    first row's document has what that sees of it without a gap; the rest counts as padding, since nothing goes on from it.

    Args:
        mask: of a causal model, True or 0 where something is seen.
        past: rows that a cache holds, and that come first among the n.

    Raises:
        ShapeError: rows see others near them in another way than documents do.
    """
    if not isinstance(mask, Tensor) or mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[3] < past + mask.shape[2]:
        return None
    seen = mask[:, 0] != 0
    if mask.is_floating_point():  # added to scores; or 1 and 0
        seen = torch.where((mask > 0).any(), seen, mask[:, 0] == 0)
    own = seen.diagonal(past, 1, 2)
    before = seen[:, 0, :past].flip(-1).long().cumprod(-1).flip(-1)
    if own.shape[1] < 2:
        return torch.cat([before, own.long()], dim=1)
    begins = F.pad(~seen.diagonal(past - 1, 1, 2)[:, -(own.shape[1] - 1) :], (1, 0))
    numbers = torch.where(own, begins.cumsum(1) + 1, 0)
    for by in range(2, min(4, own.shape[1])):
        sees = seen.diagonal(past - by, 1, 2)[:, -(own.shape[1] - by) :]
        alike = (numbers[:, by:] == numbers[:, :-by]) & own[:, by:]
        _require((sees == alike)[own[:, by:]].all(), _PATTERN.format(shape=shape_text(mask.shape)))
    return torch.cat([before, numbers], dim=1)


def numbered(documents: Tensor, real: Tensor | None) -> Tensor:
    """(B, N): the document of each row, from 1 on, and 0 for padding.

    Args:
        documents: numbers (B or 1, n), from 0 on, of the last n rows; those before, which a cache holds, go with the first.
        real: (B, N), if any row is padding.
    """
    numbers = documents.long() + 1
    if real is None:
        return numbers
    if (before := real.shape[1] - numbers.shape[1]) > 0:
        numbers = torch.cat([numbers[:, :1].expand(-1, before), numbers], dim=1)
    return torch.where(real != 0, numbers, 0)


def _goes_on(name: str, values: object) -> Tensor | None:
    """(B, N − 1): whether each row but the first goes on with the document of the one before it; None where nothing says."""
    if not isinstance(values, Tensor) or not 2 <= values.ndim <= 3 or values.shape[-1] < 2:
        return None
    plane = values if values.ndim == 2 else values[0]  # (3, B, N): of time, height and width; time never goes back
    before, after = plane[:, :-1], plane[:, 1:]
    if name == "seq_idx":
        return before == after
    # As transformers has it, whatever is not the next position begins a document; of time, an image's rows share one.
    return after == before + 1 if values.ndim == 2 else before <= after


def check_pattern(mask: Tensor, real: Tensor | None) -> None:
    """Raise ShapeError if a mask (…, N, N) of who sees whom keeps a real row from the one before it: documents side by side."""
    if mask.ndim < 3 or mask.shape[-2] < 2 or mask.shape[-1] < mask.shape[-2]:
        return
    seen = mask > torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else mask != 0
    if mask.is_floating_point():
        seen = torch.where((mask < 0).any(), seen, mask != 0)  # added to scores, or 1 and 0
    previous = seen.diagonal(mask.shape[-1] - mask.shape[-2] - 1, -2, -1)[..., -(mask.shape[-2] - 1) :]
    if real is not None:
        ends = real[:, -previous.shape[-1] :].reshape(-1, *[1] * (previous.ndim - 2), previous.shape[-1])
        previous = previous | ~ends
    _require(previous.all(), PACKED.format(how=f"attention_mask {shape_text(mask.shape)} keeps neighbours apart"))


def check_hides_nothing(mask: Tensor) -> None:
    """Raise ShapeError if a mask of who sees whom hides anything: padding, say, that was told of under another name."""
    seen = mask != 0
    if mask.is_floating_point():  # added to scores, where zeros hide nothing; or 1 and 0
        seen = (mask > torch.finfo(mask.dtype).min / 2) & (seen | ~(mask > 0).any())
    _require(
        seen.all(),
        f"attention_mask {shape_text(mask.shape)} does not say which rows are padding, and hides some: pass one of shape "
        "(B, N), or call the model inside `with strassen_tile.padding(model, mask)`",
    )


def _is_traced(value: Tensor) -> bool:
    # `is_compiling()` is also true while another thread compiles; exporting runs this with tensors of its own kind.
    return torch.compiler.is_dynamo_compiling() or type(value) is not Tensor


def _require(holds: Tensor, message: str) -> None:
    if _is_traced(holds):
        torch._assert_async(holds, message)
    elif not bool(holds):  # a synchronisation
        raise ShapeError(message)
