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
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from strassen_tile.convert.evidence import Evidence
from strassen_tile.convert.influence import Call, Changes, Row, Watch, without_matrices
from strassen_tile.convert.perturb import Mixing, change, shifted
from strassen_tile.convert.places import Place, batches
from strassen_tile.convert.running import evaluating, widen
from strassen_tile.errors import ConversionError
from strassen_tile.tiling import tile_count

T = TypeVar("T")
_TILES = 3  # looked at closely, of those in which rows differ, for each of two leading indices


@dataclass(frozen=True)
class Leak:
    """Why rows of a layer may not mix.

    Attributes:
        reason: for people.
        between_samples: whether it is another sample that would be seen, which nobody can ask for.
    """

    reason: str
    between_samples: bool


def find_leaks(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    mixing: Mapping[str, Mixing],
    example_inputs: object,
    *,
    forced: Collection[str] = (),
    effort: int = 1,
) -> dict[str, Leak]:
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
    found: dict[str, Leak] = {}
    example_inputs = widen(model, example_inputs)
    originals = {name: p.detach().clone() for name, p in model.named_parameters()}
    with evaluating(model):
        watch = Watch(model, {**without_matrices(model), **layers})
        for inputs, only_samples in batches(model, example_inputs):
            rule = Rule(Evidence(watch, originals, inputs, effort=effort, only_samples=only_samples))
            left = {name: how for name, how in mixing.items() if name not in found}
            for name, how in left.items():
                leak = rule.of_layer(name, how, only_samples=only_samples or name in forced)
                if leak is not None:
                    found[name] = leak
            passed = {name: how for name, how in left.items() if name not in found}
            free = {name: how for name, how in passed.items() if name not in forced}
            found.update(culprits(free, partial(rule.of_all, only_samples=only_samples)))
            passed = {name: how for name, how in passed.items() if name not in found}
            if any(name in forced for name in passed):
                found.update(culprits(passed, partial(rule.of_all, only_samples=True)))
    return found


def culprits(members: Mapping[str, T], leak_of: Callable[[Mapping[str, T]], Leak | None]) -> dict[str, Leak]:
    """The members without which `leak_of` the others is None: those that leak alone, or the last one where none does."""
    found: dict[str, Leak] = {}
    left = dict(members)
    while left and (together := leak_of(left)) is not None:
        alone = {name: leak for name, member in left.items() if (leak := leak_of({name: member})) is not None}
        found.update(alone or {next(reversed(left)): together})
        left = {name: member for name, member in left.items() if name not in found}
    return found


class Rule:
    """The rule, held against one set of evidence."""

    def __init__(self, evidence: Evidence) -> None:
        self.evidence = evidence

    def of_layer(self, name: str, how: Mixing, *, only_samples: bool) -> Leak | None:
        """Why the rows of the layer may not mix; None if they may."""
        calls = [call for call in self.evidence.base.inputs if call.name == name]
        several = [call for call in calls if call in self.evidence.several]
        considered = [p for p in self.evidence.row_places if p in self.evidence.samples or not only_samples]
        if name in self.evidence.varying:
            return Leak(
                "the shape of its input, or whether it is called, depends on values: its rows have no owner", False
            )
        if not several:
            if only_samples or not calls:
                return None
            return Leak("fed one row at a time on the example inputs: nothing shows that its rows may meet", False)
        if not only_samples and not any(
            self.evidence.seen[p].rows[c].any() for p in self.evidence.seen for c in several
        ):
            return Leak(
                "nothing that was changed in the example inputs reaches it, which shows nothing of its rows", False
            )
        for call in several:
            leak = self._of_shared_rows(call) or self._of_call(call, how, considered)
            if leak is not None:
                return leak
        return None

    def of_all(self, mixing: Mapping[str, Mixing], *, only_samples: bool) -> Leak | None:
        """An output that changes, with the rows of these layers mixed, with a place with which it did not change before."""
        evidence = self.evidence
        base = evidence.watch.base(evidence.inputs, mixed=mixing)
        considered = [p for p in evidence.row_places if p in evidence.samples or not only_samples]
        return self.of_runs(considered, lambda inputs: evidence.watch.changes(inputs, base, mixed=mixing).outputs)

    def of_runs(self, considered: Sequence[Place], run: Callable[[object], list[Tensor]]) -> Leak | None:
        """The same of any `run`: inputs with one place changed → which elements of the outputs change."""
        for place in considered:
            try:
                outputs = run(change(self.evidence.inputs, place, 0))
            except ConversionError:
                raise
            except Exception:  # a value that the model does not take, or an input that its layers refuse
                continue
            for at, changed in enumerate(outputs):
                if not self.evidence.depends(place, at, changed):
                    return self.described(at, changed, place)
        return None

    def _of_shared_rows(self, call: Call) -> Leak | None:
        """That rows of one leading index are of different samples: tiles may part them here, and not at another length."""
        seen = self.evidence.seen  # in an order that is the same in every process
        samples = [place for place in seen if place in self.evidence.samples and call in seen[place].rows]
        for one, other in itertools.combinations(samples, 2):
            if one.leaf != other.leaf or one.index[one.dim] == other.index[other.dim]:
                continue
            a, b = seen[one].rows[call], seen[other].rows[call]
            if bool(((a & ~b).any(dim=1) & (b & ~a).any(dim=1)).any()):
                return Leak(f"dimension −2 of its input holds rows of several samples: {one} and {other}", True)
        return None

    def _of_call(self, call: Call, how: Mixing, considered: Sequence[Place]) -> Leak | None:
        rows_of = {p: self.evidence.without_padding(_gained(self.evidence.seen[p].rows[call], how)) for p in considered}
        rows_of = {place: rows for place, rows in rows_of.items() if bool(rows.any())}
        if not rows_of:
            return None
        anywhere = torch.stack(list(rows_of.values())).any(dim=0)  # (lead, rows)
        leads = anywhere.any(dim=1).nonzero().flatten().tolist()
        for lead in dict.fromkeys((leads[0], leads[-1])):
            rows = anywhere[lead].nonzero().flatten().tolist()
            tiles = list(dict.fromkeys(row // how.rows for row in rows))
            tiles = list(dict.fromkeys((tiles[0], tiles[-1], tiles[len(tiles) // 2])))[:_TILES]
            for row in (row for row in rows if row // how.rows in tiles):
                gained = [place for place, new in rows_of.items() if bool(new[lead, row])]
                leak = self._of_row(Row(call, lead, row), gained)
                if leak is not None:
                    return leak
        return None

    def _of_row(self, row: Row, gained: Sequence[Place]) -> Leak | None:
        """Whether something that the row reaches would newly depend on one of the places it gains."""
        reached = self.evidence.reach(row)
        for place in sorted(gained, key=lambda place: place not in self.evidence.samples):
            for at, gets in enumerate(reached.outputs):
                if not self.evidence.depends(place, at, gets):
                    return self.described(at, gets, place)
        if not self.evidence.reaches_several(row):
            return self._not_shown(gained[0], row)
        for call, gets in reached.rows.items():
            for place in gained:
                if call not in self.evidence.seen[place].rows:
                    continue
                blind = self.evidence.without_padding(gets & ~self.evidence.seen[place].rows[call]).nonzero().tolist()
                for lead, index in blind[:1] + blind[-1:]:
                    if not self.evidence.reaches_several(Row(call, lead, index)):
                        return self._not_shown(place, row)
        return None

    def described(self, at: int, changed: Tensor, place: Place) -> Leak:
        """The leak that, of output number `at`, the elements `changed` would depend on the place though some do not."""
        new = changed & ~self.evidence.seen[place].outputs[at]
        index = ", ".join(map(str, new.nonzero()[0].tolist()))
        output = f"output {at}" + (f"[{index}]" if index else "")
        if place in self.evidence.samples and not any(
            bool((o.outputs[at] & new).any()) for o in self._same_sample(place)
        ):
            return Leak(f"dimension −2 of its input holds rows of several samples: {output} would see {place}", True)
        return Leak(f"mixing its rows would make {output} depend on {place}, which it does not", False)

    def _not_shown(self, place: Place, row: Row) -> Leak:
        same = [other.rows[row.call] for other in self._same_sample(place) if row.call in other.rows]
        if place in self.evidence.samples and not any(bool(rows[row.lead, row.row]) for rows in same):
            return Leak(
                f"dimension −2 of its input holds rows of several samples: row {row.row} would see {place}", True
            )
        return Leak(
            f"mixing its rows would let row {row.row} see {place}; nothing in the model shows that it may", False
        )

    def _same_sample(self, place: Place) -> list[Changes]:
        """What depends on the same sample of another input: that sample's own, though it does not depend on this input."""
        samples = self.evidence.samples
        others = [p for p in samples if p.leaf != place.leaf and p.dim == place.dim and p.index[0] == place.index[0]]
        return [self.evidence.seen[other] for other in others if other.dim == 0]


def _gained(changed: Tensor, how: Mixing) -> Tensor:
    """Rows (lead, N) that do not depend on a place, but on whose tile's other rows (causal: earlier ones) some do, or
    neighbours of those.
    """
    leads, rows = changed.shape
    tiles = tile_count(rows, how.rows)
    padded = changed.new_zeros(leads, tiles * how.rows)
    for by in how.offsets:
        padded[:, :rows] |= shifted(changed.unsqueeze(-1), by).squeeze(-1)
    cut = padded.view(leads, tiles, how.rows)
    carried = cut.cummax(dim=-1).values if how.causal else cut.any(dim=-1, keepdim=True).expand_as(cut)
    return carried.reshape(leads, -1)[:, :rows] & ~changed
