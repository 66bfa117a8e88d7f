"""Transformers models built from configs: 2 layers, hidden size 32, random weights, no download."""

from __future__ import annotations

from functools import partial

from tests.zoo import transformers_perception, transformers_text
from tests.zoo.entry import Entry
from tests.zoo.transformers_small import build


def entries() -> list[Entry]:
    """Every transformers model of the zoo, in the order of the tables."""
    tables = transformers_text.TABLES + transformers_perception.TABLES
    inputs = transformers_text.INPUTS | transformers_perception.INPUTS
    return [
        Entry(name, family, partial(build, *spec), inputs.get(name, usual))
        for family, table, usual in tables
        for name, spec in table.items()
    ]
