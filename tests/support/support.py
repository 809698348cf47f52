# SPDX-License-Identifier: Apache-2.0
"""What tests of compiled operations share: the ways into the core, and the same bits whatever the threads."""

import numpy as np
import pytest

import hisac
from hisac import reference, testing
from hisac.reference import bounds

try:
    import torch
except ImportError:
    torch = None


def said(function, kind, text):
    """The error that a call raises is of this kind itself, and says exactly this."""
    with pytest.raises(kind) as error:
        function()
    assert type(error.value) is kind
    assert str(error.value) == text


def grouped(args):
    """Arguments of a verb, with the fields of Histories among them as the histories."""
    fields = {name: a for name, a in args.items() if name in hisac.Histories._fields}
    return {"histories": hisac.Histories(**fields)} | {name: a for name, a in args.items() if name not in fields}


def by_field(verb):
    """A verb that takes the fields of its histories as arguments of their own."""
    return lambda *args, **named: verb(*args, **grouped(named))


def kinds(p):
    """The ways into the core that hold the problem's values: (convert, dtype of its results)."""
    if p.dtype != "bfloat16":
        yield lambda args: args, p.dtype
    if torch is not None:
        yield lambda args: testing.to_torch(args, p.dtype), p.dtype


def flat(result):
    """The arrays of a result as raw bytes."""
    if isinstance(result, tuple):
        return [b for a in result for b in flat(a)]
    return [b"" if result is None else np.ascontiguousarray(bounds.as_numpy(result)).tobytes()]


def with_threads(call):
    """call() with 1, 2 and 7 threads, and once more: the same bits; returns the result."""
    threads, results = hisac.get_num_threads(), []
    try:
        for n in (1, 2, 7, 1):
            hisac.set_num_threads(n)
            results.append(call())
    finally:
        hisac.set_num_threads(threads)
    assert all(flat(r) == flat(results[0]) for r in results[1:])
    return results[0]


def checked_gradients(p, verb, args, backward_args):
    """The gradients of a verb meet the definition, whatever the threads -> (convert, arguments, gradients) of each kind
    of arrays. backward_args(result of the verb) are the arguments of its backward."""
    backward, found = getattr(hisac, f"{verb}_backward"), []
    for convert, _ in kinds(p):
        given = backward_args(getattr(hisac, verb)(**convert(args)))
        mine = with_threads(lambda: backward(**convert(given)))  # noqa: B023
        exact = p.by_reference(given)
        testing.assert_gradients_close(mine, getattr(reference, f"{verb}_backward")(**exact), exact)
        found.append((convert, given, mine))
    return found


def check_backward(p):
    """The gradients of `route`."""
    checked_gradients(p, "route", p.route_args(), p.backward_args)


def check_one_by_one(p):
    """`route` of one user alone has the bits of the batch."""
    args, out = p.route_args(), hisac.route(**p.route_args())
    offsets = p.histories.offsets
    starts, ends = offsets if isinstance(offsets, tuple) else (offsets[:-1], offsets[1:])
    for b in range(len(starts)):
        alone = p.histories._replace(offsets=(starts[b : b + 1], ends[b : b + 1]))
        one = {"histories": alone, "agents": p.prototypes[b : b + 1]}
        one |= {"count": None if p.count is None else p.count[b : b + 1]}
        assert flat(hisac.route(**args | one)) == flat(tuple(None if a is None else a[b : b + 1] for a in out))
