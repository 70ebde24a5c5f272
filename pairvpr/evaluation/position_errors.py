"""How far answers are from where the queries were taken. Needs no torch.

Q queries.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

ERROR_RADII_M = (5, 25, 100)


def errors_m(answered_m: NDArray[np.float64], true_m: NDArray[np.float64]) -> NDArray[np.float64]:
    """(Q,) metres from answers (Q, 2) to where the queries were (Q, 2): infinite of an answer whose position is NaN.

    NaN of a query whose own position is not known.
    """
    error_m = np.hypot(*(answered_m - true_m).T)
    error_m[np.isnan(error_m) & ~np.isnan(true_m).any(axis=1)] = np.inf
    return error_m


def position_errors(answered_m: NDArray[np.float64], true_m: NDArray[np.float64]) -> dict[str, Any] | None:
    """Distances in metres from answers (Q, 2) to the queries' positions (Q, 2); None if no query has a position.

    Queries without a known position don't count. An answer without a position is infinitely far away; a median that is
    not finite is None.
    """
    is_known = ~np.isnan(true_m).any(axis=1)
    if not is_known.any():
        return None
    error_m = errors_m(answered_m[is_known], true_m[is_known])
    median_m = float(np.median(error_m))
    return {
        "num_queries": len(error_m),
        "median_m": median_m if np.isfinite(median_m) else None,
        **{f"within_{radius_m}_m": 100 * float((error_m <= radius_m).mean()) for radius_m in ERROR_RADII_M},
    }
