"""Documents about places, for libraries."""

from __future__ import annotations

from extemb_core import Document

PLACES = ("harbour", "bridge", "mill", "tower", "market", "station")


def document(place, year=1820, **metadata):
    text = f"The {place} was built in {year}. " + "It rained on the hills and the river rose. " * 3
    return Document(text, title=place.title(), metadata={"source": f"{place}.txt", **metadata})
