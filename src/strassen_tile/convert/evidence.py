"""The evidence that runs of a model on one set of inputs give: what depends on which place, and what a row reaches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from strassen_tile.convert.influence import Changes, Row, Watch
from strassen_tile.convert.perturb import change
from strassen_tile.convert.places import Place, in_padding, places, real_rows
from strassen_tile.errors import ConversionError

# An element that never changed with a place is held not to depend on it after so many draws of parameters and perturbations,
# or after so many in a row that showed nothing new.
_DRAWS, _WITHOUT_GAIN = 40, 8
_ATTEMPTS = 4  # to find a value that the model takes


class Evidence:
    """What was seen on one set of inputs. More is looked for as it is asked.

    Attributes:
        watch: what runs the model.
        inputs: on which it was run.
        base: a run on them.
        seen: place → what depends on it, over all draws of parameters.
        samples: the places that stand for samples.
        several: the calls where a leading index has several rows; what is pooled, or a batch of rows, is no place to meet.
        varying: the names of modules whose calls are not alike in all runs.

    Args:
        originals: the parameters before any noise.
        effort: how many times as many places as usual are tried.
        only_samples: whether only samples are changed, not positions.
        only_padding: whether only positions are changed that the inputs' mask calls padding.
    """

    def __init__(
        self,
        watch: Watch,
        originals: Mapping[str, Tensor],
        inputs: object,
        *,
        effort: int,
        only_samples: bool,
        only_padding: bool = False,
    ) -> None:
        self.watch, self.inputs, self.originals = watch, inputs, originals
        self._padding = [~real for real in real_rows(watch.model, inputs)]
        chosen = [p for p in places(watch.model, inputs, effort=effort) if p.dim == 0 or not only_samples]
        self.padding_places = {place for place in chosen if in_padding(watch.model, inputs, place)}
        chosen = [place for place in chosen if place in self.padding_places] if only_padding else chosen
        self.seen: dict[Place, Changes] = {}
        self._reached: dict[Row, Changes] = {}
        self._settled: set[Place] = set()
        # The first draw comes last: it is the one that the model keeps, and that later questions are asked of.
        for seed in (0,) if only_samples or not chosen else (1, 0):
            self.base = self.watch.perturbed_base(self.inputs, self.originals, seed)
            for place in chosen:
                self._note(place, seed)
        self.varying = {name for changes in self.seen.values() for name in changes.varying}
        self.samples = _sample_places(self.seen)
        self.several = {call for call, x in self.base.inputs.items() if x.shape[1] > 1 and call not in self.base.flat}

    @property
    def row_places(self) -> list[Place]:
        """The places by which rows are judged: what the inputs' mask calls padding is zeroed before it reaches other rows."""
        return [place for place in self.seen if place not in self.padding_places]

    def depends(self, place: Place, at: int, elements: Tensor) -> bool:
        """Whether all these elements (a bool tensor) of output number `at` depend on the place. A unit that is off, or a
        maximum, may hide that they do: where it seems that they do not, other parameters and perturbations are tried.
        """
        if place not in self._settled and self._missing(place, at, elements):
            without_gain = 0
            for seed in range(2, _DRAWS):
                before = self._missing(place, at, elements)
                self.base = self.watch.perturbed_base(self.inputs, self.originals, seed)
                self._note(place, seed)
                left = self._missing(place, at, elements)
                without_gain = without_gain + 1 if left == before else 0
                if not left:
                    break
                if without_gain == _WITHOUT_GAIN:
                    self._settled.add(place)
                    break
            self.base = self.watch.perturbed_base(self.inputs, self.originals, 0)
        return not self._missing(place, at, elements)

    def reach(self, row: Row) -> Changes:
        """What changes when the layer's output is disturbed at that row."""
        if row not in self._reached:
            self._reached[row] = self.watch.changes(self.inputs, self.base, disturbed=row)
        return self._reached[row]

    def reaches_several(self, row: Row) -> bool:
        """Whether a row reaches rows of a later layer, or elements of an output, where there still are several."""
        reached = self.reach(row)
        return any(call in self.several and bool(r.any()) for call, r in reached.rows.items()) or any(
            bool(o.any()) for o in reached.outputs if o.ndim >= 3 and o.shape[-2] > 1
        )

    def without_padding(self, rows: Tensor) -> Tensor:
        """Of these rows (lead, N), those that the inputs' mask does not call padding: the others are zeroed (`PaddingMask`)."""
        for padding in self._padding:
            if padding.shape == rows.shape:
                rows = rows & ~padding.to(rows.device)
        return rows

    def _note(self, place: Place, seed: int) -> None:
        """Add what changes with the place, under the parameters it has now, to what is known of it.

        A value that the model does not take (an index out of range, a check of its own) shows nothing; others are tried.
        """
        for attempt in range(_ATTEMPTS):
            try:
                now = self.watch.changes(change(self.inputs, place, seed + attempt * _DRAWS), self.base)
            except ConversionError:
                raise
            except Exception:  # whatever a model raises for values that it does not take
                continue
            self.seen[place] = self.seen[place].joined(now) if place in self.seen else now
            return

    def _missing(self, place: Place, at: int, elements: Tensor) -> int:
        return int((elements & ~self.seen[place].outputs[at]).sum())


def _sample_places(seen: Mapping[Place, Changes]) -> set[Place]:
    """The places that stand for samples: of each input, those along the first dimension whose places never meet in a row.

    Where they meet along every one (a batch statistic in passing), those along the first: samples come first as a rule, and
    what is taken for one is only guarded the more.
    """
    found: set[Place] = set()
    for leaf in {place.leaf for place in seen}:
        mine = [place for place in seen if place.leaf == leaf and place.dim < len(place.index)]
        for dim in sorted({place.dim for place in mine}):
            along = [place for place in mine if place.dim == dim]
            apart = {place.index[dim]: seen[place] for place in reversed(along)}
            if len(apart) < 2 or not _meet(list(apart.values())):
                found.update(along if len(apart) > 1 else ())
                break
        else:
            found.update(place for place in mine if place.dim == 0)
    return found


def _meet(changes: Sequence[Changes]) -> bool:
    """Whether some row depends on two of the places."""
    shared = set.intersection(*(set(c.rows) for c in changes))
    return any(bool((torch.stack([c.rows[call] for c in changes]).sum(dim=0) > 1).any()) for call in shared)
