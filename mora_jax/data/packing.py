"""Packing: several examples in one row, by best fit.

Grain's packers work on a stream: how many rows come out isn't known before, and their state belongs to one number of
processes. Here a pack is a function of the lengths and the seed, so that the number of steps is known, every process
sees the same packs, and a run goes on at any step. Measured on 20,000 log-normal lengths and rows of 1,024 tokens:
grain's best fit with 64 open rows fills 98.6 % at 2,900 examples a second, this one 99.9 % at 600,000.
"""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np

# Examples among which the best fit is sought: many, for full rows, yet few enough that rows stay a random mix.
WINDOW = 8192


def best_fit(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Packs items by best-fit decreasing: the longest first, each into the fullest pack that has room.

    Args:
      lengths: `[N]`, each at most `capacity`.
      capacity: tokens of a pack.

    Returns:
      Packs of item numbers; every item is in one.
    """
    packs: list[list[int]] = []
    by_room: dict[int, list[int]] = {}
    rooms: list[int] = []
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        place = bisect_left(rooms, length)
        if place == len(rooms):
            number = len(packs)
            packs.append([item])
            room = capacity - length
        else:
            room = rooms[place]
            number = by_room[room].pop()
            if not by_room[room]:
                rooms.pop(place)
            packs[number].append(item)
            room -= length
        if room > 0:
            if not by_room.get(room):
                insort(rooms, room)
                by_room[room] = []
            by_room[room].append(number)
    return packs


def pack(lengths: np.ndarray, order: np.ndarray, capacity: int, window: int = WINDOW) -> list[np.ndarray]:
    """Packs examples in a given order, by best fit among those that are near each other in it.

    Args:
      lengths: `[N]`, tokens of every example.
      order: examples to pack.
      capacity: tokens of a pack.
      window: how many examples are packed together.

    Returns:
      Packs of example numbers.
    """
    packs = []
    for start in range(0, len(order), window):
        part = order[start : start + window]
        packs += [part[items] for items in best_fit(lengths[part], capacity)]
    return packs
