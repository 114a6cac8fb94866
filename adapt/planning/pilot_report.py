"""Prints the outcome of a pilot for `sidecache plan --pilot`."""

from rich.filesize import decimal
from rich.table import Table

from adapt.planning.pilot import Pilot
from store.console.terminal import Terminal
from store.console.visible import one_line


def print_pilot(pilot: Pilot, title: str) -> None:
    """Print what each preset is worth, and the one that is chosen."""
    methods = list(dict.fromkeys(method for preset in pilot.presets for method in preset.scores))
    table = Table(title=one_line(f"{title}: {pilot.metric} of held-out samples"))
    table.add_column("store.preset")
    for name in ("bytes a sample", *methods, "behind the best"):
        table.add_column(name, justify="right")
    for preset in pilot.presets:
        scores = [f"{preset.scores[method]:.1f}" if method in preset.scores else "–" for method in methods]
        behind = f"{preset.behind:.1f} ± {preset.error:.1f}"
        table.add_row(preset.preset, f"{preset.bytes_per_sample:,}", *scores, behind)
    terminal = Terminal()
    terminal.print(table)
    for preset in pilot.presets:
        if preset.reason:
            terminal.print(f"Note: {preset.preset} is not for this job: {one_line(preset.reason)}", highlight=False)
    terminal.print(_sentence(pilot), highlight=False)


def _sentence(pilot: Pilot) -> str:
    chosen = next(preset for preset in pilot.presets if preset.preset == pilot.chosen)
    size = decimal(1000 * chosen.bytes_per_sample)
    found = "the smallest that is not behind the best beyond the noise" if chosen.suffices else "the least behind"
    return f"store.preset: {pilot.chosen} ({size} a thousand samples), {found} on {pilot.n_samples:,} training samples."
