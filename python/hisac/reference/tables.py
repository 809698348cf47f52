# SPDX-License-Identifier: Apache-2.0
"""Tables and ids: the rows that behaviours have, and the gradient of a table from those of its rows."""

import numpy as np

from ..types import Array, Histories


def gather(histories: Histories) -> Histories:
    """The same histories without ids and scale: x [T, D], v [T, V], codes [T, L], bias [T].

    int8 rows times their scale are rounded to float32. A behaviour whose id is outside its table gets a bias of NaN,
    so it is not routed; outside x and codes it gets codes of -1, so it does not vote; outside v a row of NaN, so it is
    not counted as missing.
    """
    x, v, offsets, codes, x_ids, v_ids, x_scale, bias, spread, weights = histories[:-2]
    if x is not None and x.dtype == np.int8:
        scale = np.reshape(np.float32(1.0 if x_scale is None else x_scale), (-1, 1))
        with np.errstate(over="ignore", invalid="ignore"):
            x = x.astype(np.float32) * scale
    dense = []
    for table, ids, nothing in ((x, x_ids, np.nan), (codes, x_ids, -1), (v, v_ids, np.nan)):
        if ids is not None and table is not None:
            inside = (ids >= 0) & (ids < len(table))
            rows = np.full((len(ids), table.shape[1]), nothing)
            rows[inside] = table[ids[inside]]
            table, bias = rows, np.where(inside, 0.0 if bias is None else bias, np.nan)
        dense.append(table)
    x, codes, v = dense
    return Histories(x, v, offsets, codes, bias=bias, spread=spread, weights=weights)


def of_table(d: Array, table: Array, ids: Array, rows: Array) -> Array:
    """The gradient of x or v, of d [T, ..], that of each behaviour's row: with ids the sums by row of the table, of the
    rows listed where there are any, zeros for one outside."""
    if ids is None or table is None:
        return d
    total = np.zeros((len(table) + 1, *d.shape[1:]))  # the last: of no row
    inside = (ids >= 0) & (ids < len(table))
    np.add.at(total, ids[inside], d[inside])
    rows = np.arange(len(table)) if rows is None else np.asarray(rows)
    return total[np.where((rows >= 0) & (rows < len(table)), rows, len(table))]
