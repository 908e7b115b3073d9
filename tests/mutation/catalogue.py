"""All faults of the suite."""

from __future__ import annotations

from tests.mutation import building, hosts, layers, low, operators, quantized, selection, stored, surroundings
from tests.mutation.fault import Fault

GRAPHS: list[Fault] = [*layers.FAULTS, *selection.FAULTS, *surroundings.FAULTS, *operators.FAULTS]
STORED: list[Fault] = [*stored.FAULTS, *building.FAULTS]
LOW: list[Fault] = [*low.FAULTS, *quantized.FAULTS, *hosts.FAULTS]
FAULTS: list[Fault] = [*GRAPHS, *STORED, *LOW]
