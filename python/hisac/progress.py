# SPDX-License-Identifier: Apache-2.0
"""Progress of long work on the standard error stream: a tqdm bar where tqdm is installed, else plain lines."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SILENCE = 2.0  # seconds between plain lines


@contextmanager
def progress(text: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yields `advance(steps)`. Plain: a line at the end, and one every few seconds before."""
    try:
        from tqdm import tqdm
    except ImportError:
        with plain(text, total) as advance:
            yield advance
        return
    with tqdm(total=total, desc=text, file=sys.stderr, dynamic_ncols=True) as bar:
        try:
            yield bar.update
        except BaseException:
            bar.leave = False  # wiped, so that the error stands alone
            raise


@contextmanager
def plain(text: str, total: int) -> Iterator[Callable[[int], None]]:
    start = last = time.perf_counter()
    done = 0

    def advance(steps: int) -> None:
        nonlocal done, last
        done += steps
        now = time.perf_counter()
        if now - last >= SILENCE and done < total:
            last = now
            print(f"{text}: {done:,} of {total:,} after {now - start:.0f} s", file=sys.stderr, flush=True)

    yield advance
    print(f"{text}: {done:,} of {total:,} in {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)


@contextmanager
def fit_progress(levels: int, iterations: int) -> Iterator[Callable[[int, int, float], None]]:
    """Yields the `progress` of `hisac.fit`; a level that stops early jumps to its end."""
    with progress("fit", levels * iterations) as advance:
        done = 0

        def tell(level: int, round_: int, error: float) -> None:
            nonlocal done
            now = level * iterations + round_
            advance(now - done)
            done = now

        yield tell
        advance(levels * iterations - done)
