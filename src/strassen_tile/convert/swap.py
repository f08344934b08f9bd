"""The engine of `convert` and of its baselines: select layers, try their replacements, put them in place; report, undo."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from functools import partial

from torch import nn

from strassen_tile.convert.layers import candidates
from strassen_tile.convert.leaks import Leak
from strassen_tile.convert.perturb import Mixing
from strassen_tile.convert.replace import replace_modules
from strassen_tile.convert.running import generators_kept
from strassen_tile.convert.select import Filter, Pays, select
from strassen_tile.convert.trial import Attach, failures
from strassen_tile.errors import ConversionError
from strassen_tile.nn import PaddingMask, STLLinear, STLLinearFP8

Replace = Callable[[nn.Linear], nn.Module | str]  # a replacement, or the reason why there is none
_listeners: list[Callable[[nn.Module, Mapping[str, str]], None]] = []
_SHOWN = 12  # of the names of layers that share a reason


@dataclass
class Conversion:
    """What a conversion did to a model, or would do to it.

    Attributes:
        converted: name → the layer now there; of a dry run the layer that would be there, on the meta device.
        skipped: name → why the linear layer of that name was left as it was.
        calls: name → input shapes seen on the example inputs; empty without them.
        padding: the mask that row-mixing layers share; `with conversion.padding(mask): model(…)` for models that do
            not take `attention_mask`; `strassen_tile.padding(model, mask)` does the same, on copies too. None when rows do
            not mix.
        dry_run: whether the model was left as it was.
    """

    converted: dict[str, nn.Module]
    skipped: dict[str, str]
    calls: dict[str, list[tuple[int, ...]]] = field(default_factory=dict)
    padding: PaddingMask | None = None
    dry_run: bool = False
    _undo: list[Callable[[], object]] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Put the original layers back. What the new ones learned is dropped, unless they hold the originals' parameters.

        Raises:
            ConversionError: something else, of `quantize_fp8` say, has taken the place of one: undo that first.
        """
        for action in self._undo:  # layers first: where that is refused, their mask stays too
            action()
        self._undo.clear()

    def __str__(self) -> str:
        among = [*self.converted, *self.skipped]
        described = {name: _described(layer) for name, layer in self.converted.items()}
        rows = [(label, what, "") for label, what in grouped(described, among)]
        rows += [(label, "left as it is", reason) for label, reason in grouped(self.skipped, among)]
        widths = [max([len(row[column]) for row in rows] + [5]) for column in (0, 1)]
        head = f"{len(self.converted)} converted, {len(self.skipped)} left as they are"
        if self.dry_run:
            head = f"dry run, nothing was changed: {len(self.converted)} to convert, {len(self.skipped)} to leave"
        lines = [f"{name:<{widths[0]}}  {what:<{widths[1]}}  {why}".rstrip() for name, what, why in rows]
        return "\n".join([head, *lines])


def swap(
    model: nn.Module,
    replace: Replace,
    *,
    example_inputs: object = None,
    filter_fn: Filter | None = None,
    mixing: Mixing | Mapping[str, Mixing] | None = None,
    excluded: Mapping[str, str] | None = None,
    force_mixing: Sequence[str] = (),
    pays: Pays | None = None,
    attach: Attach | None = None,
    dry_run: bool = False,
) -> Conversion:
    """Replace the layers that `replace` has a replacement for, all or none.

    Args:
        mixing: how the rows of the replacements mix: of all, or by name; None where rows stay apart.
        attach: puts on the model what row-mixing replacements need besides; tried with them, and called by the caller.
        dry_run: leave the model as it is, and report what would be done.

    The others are those of `select`.

    Raises:
        ConversionError: nothing was converted, or rows would mix and there are no example_inputs. The model is then as it was.
    """
    if not isinstance(mixing, Mapping):
        mixing = {} if mixing is None else dict.fromkeys([c.name for c in candidates(model)], mixing)
    selection = select(
        model,
        example_inputs=example_inputs,
        filter_fn=filter_fn,
        mixing=mixing,
        excluded=excluded,
        force_mixing=force_mixing,
        pays=pays,
    )
    skipped, replacements = dict(selection.skipped), dict[str, nn.Module]()
    mixed = [mixing[candidate.name] for candidate in selection.chosen if candidate.name in mixing]
    if mixed and example_inputs is None:
        raise ConversionError(_no_evidence(model, mixed[0]))
    with generators_kept(model) if dry_run else nullcontext():
        for candidate in selection.chosen:
            made = replace(candidate.layer)
            if isinstance(made, str):
                skipped[candidate.name] = made
            else:
                replacements[candidate.name] = made
    if example_inputs is not None:
        failed = failures(model, replacements, example_inputs, attach if mixed else None)
        skipped.update(failed)
        replacements = {name: layer for name, layer in replacements.items() if name not in failed}
    if not replacements and not dry_run:
        listing = "; ".join(f"{label}: {reason}" for label, reason in grouped(skipped)) or "it has no nn.Linear"
        raise ConversionError(
            f"nothing to convert in {type(model).__name__}. {listing}{_alternatives(list(selection.leaks.values()))}"
        )
    calls = {name: call.shapes for name, call in (selection.calls or {}).items()}
    if dry_run:
        return Conversion({n: _on_meta(layer) for n, layer in replacements.items()}, skipped, calls, dry_run=True)
    undo: list[Callable[[], object]] = [replace_modules(model, replacements), partial(changed, model)]
    conversion = Conversion(replacements, skipped, calls, _undo=undo)
    changed(model, skipped)
    return conversion


def on_change(listener: Callable[[nn.Module, Mapping[str, str]], None]) -> None:
    """Have `listener(model, skipped)` called when layers of a model were replaced or put back."""
    _listeners.append(listener)


def changed(model: nn.Module, skipped: Mapping[str, str] | None = None) -> None:
    """Say that layers of `model` were replaced, or put back."""
    for listener in _listeners:
        listener(model, skipped or {})


def grouped(texts: Mapping[str, str], among: Collection[str] = ()) -> list[tuple[str, str]]:
    """(label, text) of names that share a text, in order: a name, or "12 layers (layers.*.up, layers.0-4.down, …)".

    A star stands for all numbers there are, among these names and those in `among`.
    """
    names: dict[str, list[str]] = {}
    for name, text in texts.items():
        names.setdefault(text, []).append(name)
    everything = Counter(map(_pattern, {*texts, *among}))
    return [(_label(together, everything), text) for text, together in names.items()]


def _pattern(name: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def _label(names: Sequence[str], everything: Mapping[str, int]) -> str:
    if len(names) == 1:
        return names[0]
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(_pattern(name), []).append(name)
    shown: list[str] = []
    for pattern, same in alike.items():
        if len(same) == 1 or not pattern.strip("*."):
            shown += same
        elif len(same) == everything[pattern]:
            shown.append(pattern)
        elif pattern.split(".").count("*") == 1:
            at = pattern.split(".").index("*")
            shown.append(pattern.replace("*", _ranges([int(name.split(".")[at]) for name in same])))
        else:
            shown += same
    return f"{len(names)} layers ({', '.join(shown[:_SHOWN])}{', …' if len(shown) > _SHOWN else ''})"


def _ranges(numbers: Sequence[int]) -> str:
    """0-3,7 of 0, 1, 2, 3, 7."""
    ordered = sorted(numbers)
    starts = [n for n in ordered if n - 1 not in ordered]
    ends = [n for n in ordered if n + 1 not in ordered]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def _on_meta(layer: nn.Module) -> nn.Module:
    """A copy of the layer without its numbers."""
    memo: dict[int, object] = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in layer.parameters()}
    return copy.deepcopy(layer, memo | {id(b): b.to("meta") for b in layer.buffers()})


def _described(layer: nn.Module) -> str:
    if not isinstance(layer, STLLinear | STLLinearFP8):
        return f"{type(layer).__name__} {getattr(layer, 'in_features', '?')}→{getattr(layer, 'out_features', '?')}"
    config, kind = layer.config, "STL" if isinstance(layer, STLLinear) else "STL in fp8"
    others = [f for f in fields(config) if f.name not in ("tile", "rank") and getattr(config, f.name) != f.default]
    return (
        f"{kind} {layer.in_features}→{layer.out_features}, tile {'×'.join(map(str, config.pqs))}, rank {config.rank}"
        + "".join(f", {f.name}={getattr(config, f.name)!r}" for f in others)
    )


def _no_evidence(model: nn.Module, how: Mixing) -> str:
    brings = getattr(model, "dummy_inputs", None) is not None
    what = f"the {how.rows} rows of a tile" if how.rows > 1 else "neighbouring rows"
    return (
        f"this would mix {what}, and only a run shows where that lets no row see what it must not (later "
        "tokens, other samples): pass example_inputs, what the model is called with, best two samples or more"
        + (" (this model brings some: example_inputs=model.dummy_inputs)" if brings else "")
        + ". STLConfig(mixing='none'), without token_mix, keeps rows apart and needs none"
    )


def _alternatives(leaks: Sequence[Leak]) -> str:
    """What to do about rows that may not mix."""
    ways = [
        "mixing='none' keeps rows apart",
        "mixing='causal' and token_mix='causal', for a causal model, let rows see earlier ones only",
    ]
    if any(leak.between_samples for leak in leaks):
        ways.insert(0, "where rows are samples, bring the batch to the front (batch_first=True, or transpose)")
    if not all(leak.between_samples for leak in leaks):
        ways.append("force_mixing names layers whose rows may see others of their sample all the same")
    return f". What to do: {'; '.join(ways)}" if leaks else ""
