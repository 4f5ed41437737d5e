"""Makes a kit: every item that does not stand, then the parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from realisid_trt.errors import RequestError

from .items import Work
from .plan import ITEMS, Plan
from .store import Store

MOST_MIB, LEAST_MIB = 60, 1


def prepare(plan: Plan, report: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """What was done, as JSON values. The same call again makes only what is missing or out of date.

    Raises RequestError for what cannot be asked, BuildError for an item that cannot be made, DiskError.
    """
    if not LEAST_MIB <= plan.part_mib <= MOST_MIB:
        raise RequestError(f"--part-mib is {plan.part_mib}, expected {LEAST_MIB} to {MOST_MIB}.")
    wanted = plan.items or tuple(ITEMS)
    if unknown := sorted(set(wanted) - set(ITEMS)):
        raise RequestError(f"--items {' '.join(unknown)}: unknown. Known: {', '.join(ITEMS)}.")
    store = Store(plan.folder)
    work, made = Work(plan, store, report), []
    names = [name for name in ITEMS if name in wanted]
    for name in names:
        if work.make(name):
            made.append(name)
        report(f"{name}: {'made' if name in made else 'stands'}")
    parts = store.cut(names, plan.part_mib * 2**20)
    sizes = {part.name: sum(file.stat().st_size for file in part.iterdir()) for part in parts}
    return {"kit": str(plan.folder), "items": names, "made": made, "part_bytes": sizes}
