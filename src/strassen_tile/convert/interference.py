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

from strassen_tile.convert.evidence import Evidence
from strassen_tile.convert.influence import Call, Changes, Mixing, Row, Watch
from strassen_tile.convert.places import Place, change
from strassen_tile.convert.running import evaluating
from strassen_tile.convert.settings import passing, settings, widened
from strassen_tile.errors import ConversionError
from strassen_tile.tiling import tile_count

_TILES = 3  # looked at closely, of those in which rows differ, for each of two leading indices


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
            rule = Rule(Evidence(watch, originals, inputs, effort=effort, only_samples=only_samples))
            left = {name: how for name, how in mixing.items() if name not in found}
            for name, how in left.items():
                hazard = rule.of_layer(name, how, only_samples=only_samples or name in forced)
                if hazard is not None:
                    found[name] = hazard
            passed = {name: how for name, how in left.items() if name not in found}
            found.update(
                rule.surprises({n: how for n, how in passed.items() if n not in forced}, only_samples=only_samples)
            )
            passed = {name: how for name, how in passed.items() if name not in found}
            if any(name in forced for name in passed):
                found.update(rule.surprises(passed, only_samples=True))
    return found


class Rule:
    """The rule, held against one set of evidence."""

    def __init__(self, evidence: Evidence) -> None:
        self.evidence = evidence

    def of_layer(self, name: str, how: Mixing, *, only_samples: bool) -> Hazard | None:
        """Why the rows of the layer may not mix; None if they may."""
        calls = [call for call in self.evidence.base.inputs if call.name == name]
        several = [call for call in calls if call in self.evidence.several]
        considered = [p for p in self.evidence.rows_seen if p in self.evidence.samples or not only_samples]
        if name in self.evidence.uneven:
            return Hazard(
                "the shape of its input, or whether it is called, depends on values: its rows have no owner", False
            )
        if not several:
            return (
                None
                if only_samples or not calls
                else Hazard("fed one row at a time on the example inputs: nothing shows that its rows may meet", False)
            )
        if not only_samples and not any(
            self.evidence.seen[p].rows[c].any() for p in self.evidence.seen for c in several
        ):
            return Hazard(
                "nothing that was changed in the example inputs reaches it, which shows nothing of its rows", False
            )
        for call in several:
            hazard = self._of_shared_rows(call) or self._of_call(call, how, considered)
            if hazard is not None:
                return hazard
        return None

    def surprises(self, mixing: Mapping[str, Mixing], *, only_samples: bool) -> dict[str, Hazard]:
        """Layers, of those that passed, with which outputs do change with places that did not change them before."""
        found: dict[str, Hazard] = {}
        left = dict(mixing)
        while left:
            seen = self._surprise(left, only_samples)
            if seen is None:
                break
            alone = {
                name: why for name in left if (why := self._surprise({name: left[name]}, only_samples)) is not None
            }
            for name, hazard in (alone or {next(reversed(left)): seen}).items():
                found[name] = hazard
                del left[name]
        return found

    def _surprise(self, mixing: Mapping[str, Mixing], only_samples: bool) -> Hazard | None:
        evidence = self.evidence
        base = evidence.watch.base(evidence.inputs, mixed=mixing)
        for place in evidence.rows_seen:
            if only_samples and place not in evidence.samples:
                continue
            try:
                now = evidence.watch.changes(change(evidence.inputs, place, 0), base, mixed=mixing)
            except ConversionError:
                raise
            except Exception:  # a value that the model does not take
                continue
            for at, changed in enumerate(now.outputs):
                if not evidence.depends(place, at, changed):
                    return self.described(at, changed, place)
        return None

    def _of_shared_rows(self, call: Call) -> Hazard | None:
        """That rows of one leading index are of different samples: tiles may part them here, and not at another length."""
        samples = [place for place in self.evidence.samples if call in self.evidence.seen[place].rows]
        for one, other in itertools.combinations(samples, 2):
            if one.leaf != other.leaf or one.index[one.dim] == other.index[other.dim]:
                continue
            a, b = self.evidence.seen[one].rows[call], self.evidence.seen[other].rows[call]
            if bool(((a & ~b).any(dim=1) & (b & ~a).any(dim=1)).any()):
                return Hazard(f"dimension −2 of its input holds rows of several samples: {one} and {other}", True)
        return None

    def _of_call(self, call: Call, how: Mixing, considered: Sequence[Place]) -> Hazard | None:
        fresh = {p: self.evidence.without_padding(_fresh(self.evidence.seen[p].rows[call], how)) for p in considered}
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
                hazard = self._of_row(Row(call, lead, row), gained)
                if hazard is not None:
                    return hazard
        return None

    def _of_row(self, row: Row, gained: Sequence[Place]) -> Hazard | None:
        """Whether something that the row reaches would newly depend on one of the places it gains."""
        reached = self.evidence.reach(row)
        for place in sorted(gained, key=lambda place: place not in self.evidence.samples):
            for at, gets in enumerate(reached.outputs):
                if not self.evidence.depends(place, at, gets):
                    return self.described(at, gets, place)
        if not self.evidence.leads_on(row):
            return self._unshown(gained[0], row)
        for call, gets in reached.rows.items():
            for place in gained:
                if call not in self.evidence.seen[place].rows:
                    continue
                blind = self.evidence.without_padding(gets & ~self.evidence.seen[place].rows[call]).nonzero().tolist()
                for lead, index in blind[:1] + blind[-1:]:
                    if not self.evidence.leads_on(Row(call, lead, index)):
                        return self._unshown(place, row)
        return None

    def described(self, at: int, changed: Tensor, place: Place) -> Hazard:
        """The hazard that, of output number `at`, the elements `changed` would depend on the place though some do not."""
        new = changed & ~self.evidence.seen[place].outputs[at]
        index = ", ".join(map(str, new.nonzero()[0].tolist()))
        output = f"output {at}" + (f"[{index}]" if index else "")
        if place in self.evidence.samples and not any(
            bool((o.outputs[at] & new).any()) for o in self._same_sample(place)
        ):
            return Hazard(f"dimension −2 of its input holds rows of several samples: {output} would see {place}", True)
        return Hazard(f"mixing its rows would make {output} depend on {place}, which it does not", False)

    def _unshown(self, place: Place, row: Row) -> Hazard:
        same = [other.rows[row.call] for other in self._same_sample(place) if row.call in other.rows]
        if place in self.evidence.samples and not any(bool(rows[row.lead, row.row]) for rows in same):
            return Hazard(
                f"dimension −2 of its input holds rows of several samples: row {row.row} would see {place}", True
            )
        return Hazard(
            f"mixing its rows would let row {row.row} see {place}; nothing in the model shows that it may", False
        )

    def _same_sample(self, place: Place) -> list[Changes]:
        """What depends on the same sample of another input: that sample's own, though it does not depend on this input."""
        samples = self.evidence.samples
        others = [p for p in samples if p.leaf != place.leaf and p.dim == place.dim and p.index[0] == place.index[0]]
        return [self.evidence.seen[other] for other in others if other.dim == 0]


def _fresh(changed: Tensor, how: Mixing) -> Tensor:
    """Rows (lead, N) that do not depend on a place, but on whose tile's other rows (causal: earlier ones) some do."""
    leads, rows = changed.shape
    tiles = tile_count(rows, how.rows)
    padded = changed.new_zeros(leads, tiles * how.rows)
    padded[:, :rows] = changed
    cut = padded.view(leads, tiles, how.rows)
    carried = cut.cummax(dim=-1).values if how.causal else cut.any(dim=-1, keepdim=True).expand_as(cut)
    return (carried & ~cut).reshape(leads, -1)[:, :rows]
