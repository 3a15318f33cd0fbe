"""`vla cache ls|verify|rm`: a dataset root in; printed tables of its VL feature caches, an exit status out."""

from pathlib import Path

import pandas as pd

from vla_lib.core.errors import UserError
from vla_lib.core.run_folder import runs_root
from vla_lib.features.cache import list_bindings, remove, verify


def run(action: str, dataset_root: Path, binding: str) -> int:
    """Carry out one cache command. Returns 0, or 1 where `verify` finds damage. Raises UserError for a missing root or binding."""
    if not dataset_root.is_dir():
        raise UserError(f"There is no dataset root {dataset_root}; give it with --dataset-root.")
    if action == "rm":
        if not binding:
            raise UserError(
                "Name the cache to remove (its id; `vla cache ls` lists them): caches take long to build, none is removed by default."
            )
        print(f"removed {binding}: {remove(dataset_root, binding) / 1e6:.1f} MB freed")
        return 0
    rows = list_bindings(dataset_root, runs_root())
    if action == "ls":
        print(table(rows).to_string(index=False) if rows else f"no cache below {dataset_root}")
        return 0
    damaged = 0
    for name in [binding] if binding else [row["id"] for row in rows]:
        found = verify(dataset_root, name)
        damaged += len(found["bad"])
        print(f"{name}: {found['files']} files, {found['bytes'] / 1e6:.1f} MB, {len(found['bad'])} damaged")
        for sentence in found["bad"]:
            print(f"  {sentence}")
    return 1 if damaged else 0


def table(rows: list[dict]) -> pd.DataFrame:
    """One row a binding, in the words that a person reads."""
    return pd.DataFrame(
        {
            "id": row["id"],
            "model": row.get("model", ""),
            "layer": row.get("layer", ""),
            "pooling": row.get("pooling", ""),
            "MB": round(row["bytes"] / 1e6, 1),
            "age (h)": round(row["age_s"] / 3600, 1),
            "covered": f"{row['covered']} of {row['episodes']}" if "covered" in row else "",
            "used by": ", ".join(row.get("used_by", [])),
            "problem": row["problem"],
        }
        for row in rows
    )
