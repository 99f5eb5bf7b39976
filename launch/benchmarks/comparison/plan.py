"""Which cells there are, in which order they run, and which learning rate the finished ones choose."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from comparison.cells import Cell, CellStore, folder_mark
from comparison.methods import Method, Size
from comparison.settings import Settings
from comparison.tasks import Data

Sizes = dict[tuple[str, float], Size]
WHOLE = 1.0  # the budget of methods that have none


class Choice(NamedTuple):
    """A method's learning rate.

    Attributes:
        rate: the one with the lowest validation loss.
        edge: ``lowest`` or ``highest`` where it lies at an end of its grid: the best may lie beyond; else None.
        losses: rate -> validation loss; None where training diverged or the cell failed. Empty: nothing was tuned.
    """

    rate: float
    edge: str | None
    losses: dict[float, float | None]


class Slot(NamedTuple):
    """A line of the table for one seed: a cell that trains and one that tests, once the learning rate is known."""

    method: Method
    budget: float
    seed: int


class Tuning(NamedTuple):
    """Where a learning rate is chosen, and from which grid: its name in ``Settings.rates``, and the rates."""

    slot: Slot
    name: str
    grid: tuple[float, ...]


@dataclass(frozen=True)
class Plan:
    """The grid of cells.

    Attributes:
        settings: what is compared.
        model: folder or hub name.
        task: its name.
        data: its files.
        sizes: (method, budget) -> what it trains.
        store: what is finished.
    """

    settings: Settings
    model: str
    task: str
    data: Data
    sizes: Sizes
    store: CellStore

    # -- cells -------------------------------------------------------------------------------------------------

    def budgets(self, method: Method) -> tuple[float, ...]:
        """A method's budgets."""
        return self.settings.budgets if method.has_budget else (WHOLE,)

    def reachable(self, method: Method) -> list[float]:
        """Those of its budgets that it can have."""
        return [budget for budget in self.budgets(method) if self.sizes[method.name, budget].problem is None]

    def seeds(self, method: Method) -> tuple[int, ...]:
        """The base as it is knows no seed."""
        return self.settings.seeds if method.family != "base" else self.settings.seeds[:1]

    def slots(self) -> list[Slot]:
        """Seed by seed, so that an unfinished table compares all methods already."""
        return [
            Slot(method, budget, seed)
            for seed in self.settings.seeds
            for budget in (WHOLE, *self.settings.budgets)
            for method in self.settings.methods
            if budget in self.reachable(method) and seed in self.seeds(method)
        ]

    def training(self, slot: Slot, rate: float) -> Cell:
        """The cell that trains."""
        method, settings = slot.method, self.settings
        size = self.sizes[method.name, slot.budget]
        names = ("steps", "batch_size", "max_seq_length", "prompt_style", "dtype", "eval_batch_size")
        request: dict[str, Any] = {name: getattr(settings, name) for name in names}
        request |= {"model": folder_mark(self.model), "method": method.name, "rate": rate, "seed": slot.seed}
        request["data"] = {split: self.data.digests[split] for split in ("train", "validation")}
        if method.has_budget:
            request |= {"targets": list(settings.targets), "amount": size.amount}
        if method.family == "smt":
            own = ("block_size", "selection_steps", "strategy")
            request |= {name: getattr(settings, name) for name in own}
        label = f"{method.name}{f' {slot.budget:.3g}' if method.has_budget else ''} seed {slot.seed}"
        paths = {"model": self.model} | {split: str(self.data.files[split]) for split in ("train", "validation")}
        cell = Cell("train", f"train {label} rate {rate:.3g}", method.name, request, paths)
        paths["artefact"] = str(self.store.artefact(cell))  # it bears the cell's name, on which paths have no bearing
        return cell

    def testing(self, slot: Slot, trained: Cell) -> Cell:
        """The cell that tests what ``trained`` has saved; it alone knows the test set."""
        settings = self.settings
        names = ("test_items", "max_new_tokens", "max_seq_length", "prompt_style", "dtype", "eval_batch_size")
        request = {"trained": trained.key, "method": slot.method.name} | {n: getattr(settings, n) for n in names}
        request["data"] = {split: self.data.digests[split] for split in ("held_out", "test")}
        paths = {split: str(self.data.files[split]) for split in ("held_out", "test")}
        paths |= {"model": self.model, "artefact": trained.paths["artefact"]}
        return Cell("test", f"test {trained.label.removeprefix('train ')}", slot.method.name, request, paths)

    # -- learning rates ----------------------------------------------------------------------------------------

    def tuner(self, method: Method, budget: float) -> Method:
        """Whose learning rate a method takes: its own, or under ``family`` the first score's that has the same grid."""
        grid = self.settings.grid_name(method, budget)
        if self.settings.tune != "family" or grid.partition("@")[0] != "smt":
            return method
        same = [each for each in self.settings.methods if self.settings.grid_name(each, budget) == grid]
        # A grid for one budget is tuned at that budget, any other wherever its first method can train.
        return next(each for each in same if (budget in self.reachable(each) if "@" in grid else self.reachable(each)))

    def tuning(self, method: Method, budget: float) -> Tuning:
        """At ``budget`` if there is a grid for it, else at the middle budget, or the largest below it within reach."""
        tuner = self.tuner(method, budget)
        if tuner != method:
            return self.tuning(tuner, budget)
        name, where = self.settings.grid_name(method, budget), budget
        if "@" not in name:
            reachable = self.reachable(method)
            below = [each for each in reachable if each <= self.settings.tuning_budget]
            where = max(below) if below else reachable[0]
        return Tuning(Slot(method, where, self.settings.seeds[0]), name, self.settings.rates[name])

    def tunings(self) -> list[Tuning]:
        """All that there are; none where there is nothing to choose or to train."""
        found = [self.tuning(method, budget) for method in self.settings.methods for budget in self.reachable(method)]
        return [tuning for tuning in dict.fromkeys(found) if len(tuning.grid) > 1]

    def tries(self, tuning: Tuning) -> dict[float, Cell]:
        """Rate -> the cell that tries it."""
        return {rate: self.training(tuning.slot, rate) for rate in tuning.grid}

    def choice(self, method: Method, budget: float) -> Choice | None:
        """The rate for a method at a budget within its reach; None while cells are missing, or where no rate works."""
        return self.choice_of(self.tuning(method, budget))

    def choice_of(self, tuning: Tuning) -> Choice | None:
        """The rate with the lowest validation loss; None while cells are missing, or where no rate works."""
        if len(tuning.grid) == 1:
            return Choice(tuning.grid[0], None, {})
        losses: dict[float, float | None] = {}
        for rate, cell in self.tries(tuning).items():
            figures = self.store.result(cell)
            if figures is None and self.store.failure(cell) is None:
                return None
            losses[rate] = figures["validation_loss"] if figures is not None else None
        finite = {rate: loss for rate, loss in losses.items() if loss is not None}
        if not finite:
            return None
        best = min(finite, key=lambda rate: finite[rate])
        edge = "lowest" if best == min(losses) else "highest" if best == max(losses) else None
        return Choice(best, edge, losses)

    # -- order -------------------------------------------------------------------------------------------------

    def missing(self) -> Iterator[Cell]:
        """The cells that could run now and neither have figures nor failed, in order. Later ones may follow."""
        for tuning in self.tunings():
            for cell in self.tries(tuning).values():
                if self._is_open(cell):
                    yield cell
        for slot in self.slots():
            choice = self.choice(slot.method, slot.budget)
            if choice is None:
                continue
            trained = self.training(slot, choice.rate)
            tested = self.testing(slot, trained)
            if self._is_open(trained):
                yield trained
            elif self._is_open(tested) and self.store.failure(trained) is None and not self._diverged(trained):
                # What was trained is gone after its test; a test of another kind needs it anew.
                yield tested if Path(trained.paths["artefact"]).is_dir() else trained

    def _is_open(self, cell: Cell) -> bool:
        return self.store.result(cell) is None and self.store.failure(cell) is None

    def _diverged(self, trained: Cell) -> bool:
        figures = self.store.result(trained)
        return figures is not None and figures["validation_loss"] is None

    def count(self) -> dict[str, int]:
        """Kind of cell -> how many there are in all, finished or not; what was tuned isn't trained twice."""
        slots = self.slots()
        tries = {cell.key for tuning in self.tunings() for cell in self.tries(tuning).values()}
        others = [slot for slot in slots if not self._is_tried(slot, tries)]
        return {"train": len(tries) + len(others), "test": len(slots)}

    def _is_tried(self, slot: Slot, tries: set[str]) -> bool:
        """Whether the cell that trains a slot is one of the tries, whichever rate they choose."""
        tuning = self.tuning(slot.method, slot.budget)
        if len(tuning.grid) == 1:
            return self.training(slot, tuning.grid[0]).key in tries
        return tuning.slot == slot

    def known(self) -> list[Cell]:
        """All cells whose learning rate is known by now, in the order in which they run."""
        cells = {cell.key: cell for tuning in self.tunings() for cell in self.tries(tuning).values()}
        for slot in self.slots():
            if (choice := self.choice(slot.method, slot.budget)) is not None:
                trained = self.training(slot, choice.rate)
                tested = self.testing(slot, trained)
                cells |= {trained.key: cells.get(trained.key, trained), tested.key: tested}
        return list(cells.values())

    def finished(self) -> list[tuple[Cell, dict[str, Any]]]:
        """Those of them that have figures."""
        return [(cell, figures) for cell in self.known() if (figures := self.store.result(cell)) is not None]

    def needed_artefacts(self) -> set[str]:
        """Keys of the trained cells that a test waits for, or may: the best of each tuning's tries so far."""
        needed = set()
        for tuning in self.tunings():
            if self.choice_of(tuning) is None:
                found = [(cell.key, self.store.result(cell)) for cell in self.tries(tuning).values()]
                losses = {key: r["validation_loss"] for key, r in found if r and r["validation_loss"] is not None}
                needed |= {min(losses, key=lambda key: losses[key])} if losses else set()
        for slot in self.slots():
            if (choice := self.choice(slot.method, slot.budget)) is not None:
                trained = self.training(slot, choice.rate)
                if self.store.result(self.testing(slot, trained)) is None:
                    needed.add(trained.key)
        return needed


def check_batches(plan: Plan) -> None:
    """All methods of a seed must have seen the same batches in the same order.

    Raises:
        RuntimeError: they haven't: the figures can't be compared.
    """
    seen: dict[int, tuple[str, str]] = {}
    for cell, figures in plan.finished():
        if cell.kind == "train" and figures["batches"]:
            label, digest = seen.setdefault(cell.request["seed"], (cell.label, figures["batches"]))
            if digest != figures["batches"]:
                raise RuntimeError(f"{cell.label} saw other batches than {label}")


def mean_seconds(plan: Plan) -> dict[tuple[str, str], float]:
    """(kind, method) -> mean seconds of finished cells; (kind, "") over all methods."""
    found: dict[tuple[str, str], list[float]] = {}
    for cell, figures in plan.finished():
        for name in (cell.method, ""):
            found.setdefault((cell.kind, name), []).append(figures["seconds"])
    return {key: math.fsum(values) / len(values) for key, values in found.items()}
