"""``python tests/soak/plot.py soak.csv docs/soak.png``: plot the resources of the soak run over time."""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from helpers.memory_watch import read_csv


def plot(source: Path, target: Path) -> None:
    samples = read_csv(source)
    figure, (memory, handles, folder) = plt.subplots(3, sharex=True, figsize=(6.4, 4.6), height_ratios=(2, 1, 1))
    for cycle in range(samples[-1].cycle + 1):
        own = [sample for sample in samples if sample.cycle == cycle]
        minutes = [sample.seconds / 60 for sample in own]
        memory.plot(minutes, [sample.anonymous_mib for sample in own], color="C0", linewidth=1)
        for name, colour in (("descriptors", "C1"), ("threads", "C2")):
            label = f"{name} open" if name == "descriptors" else name
            values = [getattr(sample, name) for sample in own]
            handles.plot(minutes, values, color=colour, linewidth=1, label="" if cycle else label)
        folder.plot(minutes, [sample.folder_mib for sample in own], color="C3", linewidth=1)
        for axes in (memory, handles, folder) if cycle else ():
            axes.axvline(minutes[0], color="0.8", linewidth=0.8, zorder=0)
    memory.set(ylabel="anonymous\nmemory, MiB", ylim=(0, None))
    handles.set(ylabel="number", ylim=(0, None))
    handles.legend(loc="lower right", ncols=2, frameon=False, fontsize="small")
    folder.set(ylabel="run folder,\nMiB", ylim=(0, None), xlabel="minutes; vertical lines: SIGTERM and --resume")
    figure.align_ylabels()
    figure.tight_layout()
    figure.savefig(target, dpi=100)


if __name__ == "__main__":
    plot(Path(sys.argv[1]), Path(sys.argv[2]))
