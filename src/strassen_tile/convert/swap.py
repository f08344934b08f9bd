"""Swap layers of a model in place, all or none; say what was done, and undo it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import nn

from strassen_tile.convert.influence import Mixing
from strassen_tile.convert.select import Candidate, Filter, place_of
from strassen_tile.convert.survey import Pays, survey
from strassen_tile.convert.trial import Attach, failures
from strassen_tile.errors import ConversionError
from strassen_tile.nn import PaddingMask, STLLinear, STLLinearFP8

Replace = Callable[[nn.Linear], nn.Module | str]  # a replacement, or the reason why there is none
# What to do about rows that may not mix.
WAYS_OUT = (
    "Use STLConfig(mixing='none') (rows apart), mixing='causal' (rows see earlier ones) for a causal model, or name layers in "
    "force_mixing whose rows may see others of their sample all the same"
)


@dataclass
class Conversion:
    """What a conversion did to a model.

    Attributes:
        converted: name → the layer now there.
        skipped: name → why the linear layer of that name was left as it is.
        calls: name → input shapes seen on the example inputs; empty without them.
        padding: the mask that row-mixing layers share; `with conversion.padding(mask): model(…)` for models that do
            not take `attention_mask`; `strassen_tile.padding(model, mask)` does the same, on copies too. None when rows do
            not mix.
    """

    converted: dict[str, nn.Module]
    skipped: dict[str, str]
    calls: dict[str, list[tuple[int, ...]]] = field(default_factory=dict)
    padding: PaddingMask | None = None
    _undo: list[Callable[[], object]] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Put the original layers back. What the new ones learned is dropped, unless they hold the originals' parameters."""
        while self._undo:
            self._undo.pop()()

    def __str__(self) -> str:
        rows = [(name, _describe(layer), "") for name, layer in self.converted.items()]
        rows += [(name, "left as it is", reason) for name, reason in self.skipped.items()]
        widths = [max([len(row[column]) for row in rows] + [5]) for column in (0, 1)]
        head = f"{len(self.converted)} converted, {len(self.skipped)} left as they are"
        lines = [f"{name:<{widths[0]}}  {what:<{widths[1]}}  {why}".rstrip() for name, what, why in rows]
        return "\n".join([head, *lines])


def swap(
    model: nn.Module,
    replace: Replace,
    *,
    example_inputs: object = None,
    filter_fn: Filter | None = None,
    mixing: Mixing | None = None,
    force_mixing: Sequence[str] = (),
    pays: Pays | None = None,
    attach: Attach | None = None,
) -> Conversion:
    """Replace the layers that `replace` has a replacement for, all or none; the engine of `convert` and of its baselines."""
    plan = survey(
        model, example_inputs=example_inputs, filter_fn=filter_fn, mixing=mixing, force_mixing=force_mixing, pays=pays
    )
    skipped = dict(plan.skipped)
    replacements: dict[Candidate, nn.Module] = {}
    for candidate in plan.chosen:
        replacement = replace(candidate.layer)
        if isinstance(replacement, str):
            skipped[candidate.name] = replacement
        else:
            replacements[candidate] = replacement
    if example_inputs is not None:
        for candidate, reason in failures(model, replacements, example_inputs, attach).items():
            skipped[candidate.name] = reason
            del replacements[candidate]
    if not replacements:
        listing = "; ".join(f"{name}: {reason}" for name, reason in skipped.items()) or "it has no nn.Linear"
        way_out = f". {WAYS_OUT}" if plan.dangers else ""
        raise ConversionError(f"nothing to convert in {type(model).__name__}. {listing}{way_out}")
    conversion = Conversion(
        converted={candidate.name: layer for candidate, layer in replacements.items()},
        skipped=skipped,
        calls={name: call.shapes for name, call in (plan.calls or {}).items()},
    )
    conversion._undo.extend(put_in_place(model, replacements))
    conversion._undo.extend(_leave_fast_path(model))
    return conversion


def put_in_place(model: nn.Module, replacements: Mapping[Candidate, nn.Module]) -> list[Callable[[], object]]:
    """Put every replacement where its candidate is, or none of them; returns what puts each candidate back.

    Raises:
        ConversionError: the owner of a layer does not take another one.
    """
    places = [(*place_of(model, name), c.layer, layer) for c, layer in replacements.items() for name in c.names]
    done: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for parent, child, before, layer in places:
            done.append((parent, child, before))
            setattr(parent, child, layer)
    except BaseException as error:
        for owner, child, linear in done:
            owner._modules[child] = linear
        if not isinstance(error, Exception):
            raise
        owner, child, _ = done[-1]
        raise ConversionError(
            f"{type(owner).__name__} does not take another layer as {child!r} ({type(error).__name__}: {error}); leave it "
            "out with filter_fn. Nothing was converted"
        ) from error
    return [partial(_put_back, *place) for place in places]


def _put_back(parent: nn.Module, child: str, before: nn.Module, layer: nn.Module) -> None:
    """The layer that was there, with the dtype, device and mode that the model has been given since."""
    now = next((p for p in layer.parameters() if p.is_floating_point()), None)
    was = next((p for p in before.parameters() if p.is_floating_point()), None)
    if now is not None and was is not None and not was.is_meta and (now.dtype, now.device) != (was.dtype, was.device):
        before.to(now.device, now.dtype)
    parent._modules[child] = before.train(layer.training)


def _leave_fast_path(model: nn.Module) -> list[Callable[[], object]]:
    """PyTorch's encoder reads `linear1.weight` itself in eval mode; keep it from doing so where that is not all there is."""
    undo: list[Callable[[], object]] = []

    def change(module: nn.Module, name: str, value: object) -> None:
        undo.append(partial(setattr, module, name, getattr(module, name)))
        setattr(module, name, value)

    for module in model.modules():
        layers = module.layers if isinstance(module, nn.TransformerEncoder) else [module]
        for layer in layers:
            if isinstance(layer, nn.TransformerEncoderLayer):
                parts: tuple[nn.Module, ...] = (layer.linear1, layer.linear2)
                if any(type(part) is not nn.Linear for part in parts):
                    encoder = isinstance(module, nn.TransformerEncoder)
                    change(module, *(("use_nested_tensor", False) if encoder else ("activation_relu_or_gelu", 0)))
    return undo


def _describe(layer: nn.Module) -> str:
    if isinstance(layer, STLLinear | STLLinearFP8):
        tile, kind = "×".join(map(str, layer.config.pqs)), "STL" if isinstance(layer, STLLinear) else "STL in fp8"
        return f"{kind} {layer.in_features}→{layer.out_features}, tile {tile}, rank {layer.config.rank}"
    return f"{type(layer).__name__} {getattr(layer, 'in_features', '?')}→{getattr(layer, 'out_features', '?')}"
