"""The plots, one module per theme. To add a plot, copy an existing one and list it in `PLOTS`."""

from .courage import fear, race
from .friends import giant_root, newcomer, sharing
from .growing import garden, learning
from .home import broken, present, promise
from .outdoors import hurt_animal, lost_thing
from .plot import Plot

PLOTS: tuple[Plot, ...] = (
    *(lost_thing, hurt_animal, race),
    *(sharing, newcomer, giant_root),
    *(learning, fear, garden),
    *(broken, present, promise),
)

__all__ = ["PLOTS", "Plot"]
