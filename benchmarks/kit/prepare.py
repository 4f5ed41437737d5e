"""Makes a kit: every item that is not up to date, then the parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from export.files import locked
from realisid_trt.errors import RequestError

from .items import ItemMaker
from .plan import ITEMS, Plan
from .store import Store

MAX_PART_MIB, MIN_PART_MIB = 60, 1


def prepare(plan: Plan, report: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Makes the kit. Returns the result as JSON values. The same call again makes only what is missing or out of date.

    Raises RequestError for impossible arguments and while another process prepares the same kit, BuildError for an item
    that cannot be made, DiskError.
    """
    if not MIN_PART_MIB <= plan.part_mib <= MAX_PART_MIB:
        raise RequestError(f"--part-mib is {plan.part_mib}, expected {MIN_PART_MIB} to {MAX_PART_MIB}.")
    wanted = plan.items or tuple(ITEMS)
    if unknown := sorted(set(wanted) - set(ITEMS)):
        raise RequestError(f"--items {' '.join(unknown)}: unknown. Known: {', '.join(ITEMS)}.")
    store = Store(plan.folder)
    maker, made = ItemMaker(plan, store, report), []
    names = [name for name in ITEMS if name in wanted]
    busy = RequestError(f"another process is preparing {plan.folder}. Wait for it, or choose another --prepare KIT.")
    with locked(plan.folder / ".lock", busy):
        for name in names:
            if maker.make(name):
                made.append(name)
            report(f"{name}: {'made' if name in made else 'up to date'}")
        parts = store.cut(names, plan.part_mib * 2**20)
    sizes = {part.name: sum(file.stat().st_size for file in part.iterdir()) for part in parts}
    return {"kit": str(plan.folder), "items": names, "made": made, "part_bytes": sizes}
