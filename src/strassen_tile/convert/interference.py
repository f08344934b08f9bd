"""Whether rows of a layer may mix: only where that creates no dependence that the model does not have.

Converted, a layer lets row i of its output carry whatever row j of its tile carries. By perturbation the sets dep(·) of input
places that a row of a layer's input, or an element of the model's output, depends on are found; by disturbing row i of the
layer's output, what it reaches. Mixing j into i is harmless if

  (1) dep(row j) ⊆ dep(row i): everything that row i reaches carries it already; or
  (2) every output element that row i reaches depends on dep(row j) already, and every row of a layer that it reaches does too,
      or leads on to rows, or elements of an output, that still are several: the model lets them meet further on, by every path.
      What is pooled (a vector a sample, a loss, the last row alone) is no such place: it hides whether rows were kept apart.

Every pair of rows in a tile must pass, in every call of the layer. Then the model is run once more with the rows of all chosen
layers mixed: no output element may change with a place that did not change it before. docs/guarantees.md says what this shows
and what not.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from strassen_tile.convert.influence import (
    SHAKES,
    Call,
    Changes,
    Mixing,
    Record,
    Row,
    Watch,
    differences,
    finite,
    shake,
)
from strassen_tile.convert.places import Place, change, leaves, places, real_rows, repeated
from strassen_tile.convert.running import evaluating, mapped, run
from strassen_tile.tiling import tile_count

_TILES = 3  # looked at closely, of those in which rows differ, for each of two leading indices
_SAMPLES = 24  # of the enlarged batch: a multiple of any small group
# Draws of parameters and perturbations, at most and without anything new, before an element that never changed with a place is
# held not to depend on it.
_DRAWS, _IN_VAIN = 40, 8


@dataclass(frozen=True)
class Hazard:
    """Why rows of a layer may not mix.

    Attributes:
        reason: for people.
        between_samples: whether it is another sample that would be seen, which nobody can ask for.
    """

    reason: str
    between_samples: bool


def hazards(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    mixing: Mapping[str, Mixing],
    example_inputs: object,
    *,
    forced: Sequence[str] = (),
    effort: int = 1,
) -> dict[str, Hazard]:
    """The layers among `mixing` whose rows may not mix, with why.

    Args:
        model: a copy; its parameters are changed.
        layers: all linear layers by name, those that stay dense too: they show which rows meet.
        mixing: the layers whose rows would mix.
        example_inputs: what the model is run on, at several batch sizes.
        forced: layers whose rows may see other rows of their sample though the model did not let them.
        effort: how many times as many places as usual are tried.

    Raises:
        ConversionError: the model's outputs cannot be compared from run to run.
    """
    found: dict[str, Hazard] = {}
    example_inputs = widened(model, example_inputs)
    originals = {name: p.detach().clone() for name, p in model.named_parameters()}
    with evaluating(model):
        watch = Watch(model, {**passing(model), **layers})
        for inputs, only_samples in settings(watch, example_inputs):
            trial = Trial(watch, originals, inputs, effort=effort, only_samples=only_samples)
            left = {name: how for name, how in mixing.items() if name not in found}
            for name, how in left.items():
                hazard = trial.hazard(name, how, only_samples=only_samples or name in forced)
                if hazard is not None:
                    found[name] = hazard
            found.update(trial.surprises({n: how for n, how in left.items() if n not in found}, forced))
    return found


def passing(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that hand on what they are fed in its shape (norms, activations, dropout): rows are seen there too."""
    return {
        name: module
        for name, module in model.named_modules()
        if not module._modules and all(p.ndim < 2 for p in module._parameters.values() if p is not None) and name
    }


class Trial:
    """The evidence from one set of inputs.

    Attributes:
        seen: place → what depends on it, over all shakes.
        samples: the places that stand for samples.
    """

    def __init__(
        self,
        watch: Watch,
        originals: Mapping[str, Tensor],
        inputs: object,
        *,
        effort: int,
        only_samples: bool,
        padded: bool = False,
    ) -> None:
        self.watch, self.inputs, self.originals = watch, inputs, originals
        self.padding = [~real for real in real_rows(watch.model, inputs)]
        chosen = places(watch.model, inputs, effort=effort, padded=padded)
        chosen = [place for place in chosen if place.dim == 0] if only_samples else chosen
        self.seen: dict[Place, Changes] = {}
        self._reached: dict[Row, Changes] = {}
        self._settled: set[Place] = set()
        for seed in reversed(range(1 if only_samples else 2)):  # what is asked later is asked of the first shake
            self.base, self.noise = self._start(seed)
            for place in chosen:
                self._look(place, seed)
        self.uneven = {name for changes in self.seen.values() for name in changes.uneven}
        self.samples = _sample_places(self.seen)
        # Calls with several rows to a leading index; what is pooled, or a batch of rows, is no place where rows meet.
        self.several = {call for call, x in self.base.inputs.items() if x.shape[1] > 1 and call not in self.base.flat}

    def hazard(self, name: str, how: Mixing, *, only_samples: bool) -> Hazard | None:
        """Why the rows of the layer may not mix; None if they may."""
        calls = [call for call in self.base.inputs if call.name == name]
        several = [call for call in calls if call in self.several]
        considered = [place for place in self.seen if place in self.samples or not only_samples]
        if name in self.uneven:
            return Hazard(
                "the shape of its input, or whether it is called, depends on values: its rows have no owner", False
            )
        if not several:
            return (
                None
                if only_samples or not calls
                else Hazard("fed one row at a time on the example inputs: nothing shows that its rows may meet", False)
            )
        if not only_samples and not any(self.seen[p].rows[c].any() for p in self.seen for c in several):
            return Hazard(
                "nothing that was changed in the example inputs reaches it, which shows nothing of its rows", False
            )
        for call in several:
            hazard = self._shared_rows(call) or self._hazard_of_call(call, how, considered)
            if hazard is not None:
                return hazard
        return None

    def surprises(self, mixing: Mapping[str, Mixing], forced: Sequence[str]) -> dict[str, Hazard]:
        """Layers, of those that passed, with which outputs do change with places that did not change them before."""
        found: dict[str, Hazard] = {}
        left = dict(mixing)
        while left:
            seen = self._surprise(left, forced)
            if seen is None:
                break
            alone = {name: why for name in left if (why := self._surprise({name: left[name]}, forced)) is not None}
            for name, hazard in (alone or {next(reversed(left)): seen}).items():
                found[name] = hazard
                del left[name]
        return found

    def _surprise(self, mixing: Mapping[str, Mixing], forced: Sequence[str]) -> Hazard | None:
        base = self.watch.record(self.inputs, mixed=mixing)
        noise = self.watch.record(self.inputs, mixed=mixing)
        for place in list(self.seen):
            if place not in self.samples and any(name in forced for name in mixing):
                continue
            now = differences(base, self.watch.record(change(self.inputs, place, 0), mixed=mixing), noise)
            for at, changed in enumerate(now.outputs):
                if not self.depends(place, at, changed):
                    return self.described(at, changed, place)
        return None

    def _shared_rows(self, call: Call) -> Hazard | None:
        """That rows of one leading index are of different samples: tiles may part them here, and not at another length."""
        samples = [place for place in self.samples if call in self.seen[place].rows]
        for one, other in itertools.combinations(samples, 2):
            if one.leaf != other.leaf or one.index[one.dim] == other.index[other.dim]:
                continue
            a, b = self.seen[one].rows[call], self.seen[other].rows[call]
            if bool(((a & ~b).any(dim=1) & (b & ~a).any(dim=1)).any()):
                return Hazard(f"dimension −2 of its input holds rows of several samples: {one} and {other}", True)
        return None

    def _hazard_of_call(self, call: Call, how: Mixing, considered: Sequence[Place]) -> Hazard | None:
        fresh = {p: self._without_padding(_fresh(self.seen[p].rows[call], how)) for p in considered}
        fresh = {place: new for place, new in fresh.items() if bool(new.any())}
        if not fresh:
            return None
        anywhere = torch.stack(list(fresh.values())).any(dim=0)  # (lead, rows)
        leads = anywhere.any(dim=1).nonzero().flatten().tolist()
        for lead in dict.fromkeys((leads[0], leads[-1])):
            rows = anywhere[lead].nonzero().flatten().tolist()
            tiles = list(dict.fromkeys(row // how.rows for row in rows))
            tiles = list(dict.fromkeys((tiles[0], tiles[-1], tiles[len(tiles) // 2])))[:_TILES]
            for row in (row for row in rows if row // how.rows in tiles):
                gained = [place for place, new in fresh.items() if bool(new[lead, row])]
                hazard = self._hazard_of_row(Row(call, lead, row), gained)
                if hazard is not None:
                    return hazard
        return None

    def _hazard_of_row(self, row: Row, gained: Sequence[Place]) -> Hazard | None:
        """Whether something that the row reaches would newly depend on one of the places it gains."""
        reached = self._reach(row)
        for place in sorted(gained, key=lambda place: place not in self.samples):
            for at, gets in enumerate(reached.outputs):
                if not self.depends(place, at, gets):
                    return self.described(at, gets, place)
        if not self._leads_on(row):
            return self._unshown(gained[0], row)
        for call, gets in reached.rows.items():
            for place in gained:
                if call not in self.seen[place].rows:
                    continue
                blind = self._without_padding(gets & ~self.seen[place].rows[call]).nonzero().tolist()
                for lead, index in blind[:1] + blind[-1:]:
                    if not self._leads_on(Row(call, lead, index)):
                        return self._unshown(place, row)
        return None

    def _without_padding(self, rows: Tensor) -> Tensor:
        """Of these rows (lead, N), those that the inputs' mask does not call padding: the others are zeroed (`PaddingMask`)."""
        for padding in self.padding:
            if padding.shape == rows.shape:
                rows = rows & ~padding.to(rows.device)
        return rows

    def _leads_on(self, row: Row) -> bool:
        """Whether a row reaches rows of a later layer, or elements of an output, where there still are several."""
        reached = self._reach(row)
        return any(call in self.several and bool(r.any()) for call, r in reached.rows.items()) or any(
            bool(o.any()) for o in reached.outputs if o.ndim >= 3 and o.shape[-2] > 1
        )

    def _reach(self, row: Row) -> Changes:
        if row not in self._reached:
            self._reached[row] = differences(self.base, self.watch.record(self.inputs, disturbed=row), self.noise)
        return self._reached[row]

    def described(self, at: int, changed: Tensor, place: Place) -> Hazard:
        """The hazard that, of output number `at`, the elements `changed` would depend on the place though some do not."""
        new = changed & ~self.seen[place].outputs[at]
        index = ", ".join(map(str, new.nonzero()[0].tolist()))
        output = f"output {at}" + (f"[{index}]" if index else "")
        if place in self.samples:
            return Hazard(f"dimension −2 of its input holds rows of several samples: {output} would see {place}", True)
        return Hazard(f"mixing its rows would make {output} depend on {place}, which it does not", False)

    def _unshown(self, place: Place, row: Row) -> Hazard:
        if place in self.samples:
            return Hazard(
                f"dimension −2 of its input holds rows of several samples: row {row.row} would see {place}", True
            )
        return Hazard(
            f"mixing its rows would let row {row.row} see {place}; nothing in the model shows that it may", False
        )

    def _look(self, place: Place, seed: int) -> None:
        """Add what changes with the place, under the parameters of now, to what is known of it."""
        now = differences(self.base, self.watch.record(change(self.inputs, place, seed)), self.noise)
        self.seen[place] = self.seen[place].joined(now) if place in self.seen else now

    def depends(self, place: Place, at: int, elements: Tensor) -> bool:
        """Whether all these elements (a bool tensor) of output number `at` depend on the place. A unit that is off, or a
        maximum, may hide that they do: where it seems that they do not, other parameters and perturbations are tried.
        """
        if place not in self._settled and self._missing(place, at, elements):
            base, noise, in_vain = self.base, self.noise, 0
            for seed in range(2, _DRAWS):
                before = self._missing(place, at, elements)
                self.base, self.noise = self._start(seed)
                self._look(place, seed)
                left = self._missing(place, at, elements)
                in_vain = in_vain + 1 if left == before else 0
                if not left:
                    break
                if in_vain == _IN_VAIN:
                    self._settled.add(place)
                    break
            self._start(0)
            self.base, self.noise = base, noise
        return not self._missing(place, at, elements)

    def _missing(self, place: Place, at: int, elements: Tensor) -> int:
        return int((elements & ~self.seen[place].outputs[at]).sum())

    def _start(self, seed: int) -> tuple[Record, Record]:
        for strength in SHAKES if seed < 2 else (2.0, *SHAKES):
            shake(self.watch.model, self.originals, strength, seed)
            base = self.watch.record(self.inputs)
            if finite(base):
                break
        return base, self.watch.record(self.inputs)


def _fresh(changed: Tensor, how: Mixing) -> Tensor:
    """Rows (lead, N) that do not depend on a place, but on whose tile's other rows (causal: earlier ones) some do."""
    leads, rows = changed.shape
    tiles = tile_count(rows, how.rows)
    padded = changed.new_zeros(leads, tiles * how.rows)
    padded[:, :rows] = changed
    cut = padded.view(leads, tiles, how.rows)
    carried = cut.cummax(dim=-1).values if how.causal else cut.any(dim=-1, keepdim=True).expand_as(cut)
    return (carried & ~cut).reshape(leads, -1)[:, :rows]


def _sample_places(seen: Mapping[Place, Changes]) -> set[Place]:
    """The places that stand for samples: of each input, those along the first dimension whose places never meet in a row."""
    found: set[Place] = set()
    for leaf in {place.leaf for place in seen}:
        for dim in sorted({place.dim for place in seen if place.leaf == leaf}):
            along = [place for place in seen if (place.leaf, place.dim) == (leaf, dim)]
            apart = {place.index[dim]: seen[place] for place in reversed(along)}
            if len(apart) < 2 or not _meet(list(apart.values())):
                found.update(along if len(apart) > 1 else ())
                break
    return found


def _meet(changes: Sequence[Changes]) -> bool:
    """Whether some row depends on two of the places."""
    shared = set.intersection(*(set(c.rows) for c in changes))
    return any(bool((torch.stack([c.rows[call] for c in changes]).sum(dim=0) > 1).any()) for call in shared)


def settings(watch: Watch, example_inputs: object) -> list[tuple[object, bool]]:
    """The inputs to try, and whether only samples matter: as given (one sample twice), and many samples."""
    sized = [t for _, t in leaves(example_inputs) if t.ndim]
    found: list[tuple[object, bool]] = []
    doubled = None
    if sized and all(t.shape[0] == 1 for t in sized if t.ndim >= min(2, max(u.ndim for u in sized))):
        doubled = _runs(watch, repeated(example_inputs, 2))
    many = _runs(watch, repeated(example_inputs, _SAMPLES))
    found.append((example_inputs if doubled is None else doubled, False))
    return found if many is None else [*found, (many, True)]


def _runs(watch: Watch, inputs: object) -> object | None:
    try:
        if inputs is not None:
            watch.record(inputs)
    except Exception:  # a model may refuse other batch sizes in any way; then there are no such batches
        return None
    return inputs


def widened(model: nn.Module, example_inputs: object) -> object:
    """The inputs, and the model in place, in float64 or float32 where it runs in that: few bits would hide what is small."""
    as_given = [(p, p.data) for p in (*model.parameters(), *model.buffers())]

    def cast(dtype: torch.dtype) -> object:
        return mapped(example_inputs, lambda t: t.to(dtype) if t.is_floating_point() else t, lambda other: other)

    for dtype in (torch.float64, torch.float32):
        model.to(dtype)
        wide = cast(dtype)
        try:
            with evaluating(model):
                run(model, wide)
        except (RuntimeError, TypeError, ValueError):  # the model asks for its own dtype somewhere
            continue
        return wide
    for tensor, data in as_given:
        tensor.data = data
    return example_inputs
