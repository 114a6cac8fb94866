"""`visible`, where adapt's modules look for it."""

from store.visible import visible as visible
