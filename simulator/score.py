"""How near predictions come to what was measured: by source, then the mean over sources.

A source with many rows must not drown the others, so the headline is the mean of the sources' mean
absolute errors. Errors are signed fractions: predicted / measured - 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from simulator.plans import Array

FITS = 0.95  # of a device's memory is what a plan may need: an allocator needs room to move
MOST_OVER = 1.1  # of its device: more than this a row that ran must not be predicted to need


def errors_of(error: Array) -> dict[str, Any]:
    """Mean and median of the absolute errors, their 90th percentile, and the mean error."""
    size = np.abs(error)
    return {
        "rows": len(error),
        "mape": float(np.mean(size)),
        "median": float(np.median(size)),
        "p90": float(np.percentile(size, 90)),
        "bias": float(np.mean(error)),
    }


def summary(predicted: Array, measured: Array, sources: list[str]) -> dict[str, Any]:
    """{macro_mape, rows, sources: {NAME: errors_of}}. Without rows macro_mape is None."""
    error = np.asarray(predicted) / np.asarray(measured) - 1
    names = np.array(sources)
    table = {name: errors_of(error[names == name]) for name in dict.fromkeys(sources)}
    macro = float(np.mean([one["mape"] for one in table.values()])) if table else None
    return {"macro_mape": macro, "rows": len(error), "sources": table}


def feasibility(needed: Array, capacity: Array, failed: Array) -> dict[str, int]:
    """Rows that ran out of memory and were predicted not to fit, and rows that ran although more
    than MOST_OVER of the device was predicted. All arguments are arrays, one entry a row."""
    return {
        "out_of_memory": int(np.sum(failed)),
        "predicted_not_to_fit": int(np.sum(failed & (needed > FITS * capacity))),
        "ran": int(np.sum(~failed)),
        "ran_above_limit": int(np.sum(~failed & (needed > MOST_OVER * capacity))),
    }
