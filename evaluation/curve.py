"""The plot of evaluate.py --curve."""

import matplotlib.pyplot as plt

from common.disk import atomically


def plot_curve(points, protocol, path):
    """FID against CLIP score, a point for each truncation."""
    figure, panel = plt.subplots(figsize=(6.4, 5.4))
    scores, fids = ([point[name] for point in points] for name in ("CLIP score", "FID"))
    panel.plot(scores, fids, "o-")
    for point in points:
        place = point["CLIP score"], point["FID"]
        panel.annotate(f"ψ {point['ψ']}", place, xytext=(6, 5), textcoords="offset points", fontsize=8)
    panel.set_xlabel(f"CLIP score, {protocol['CLIP score by'].split(',')[0]}", fontsize=8)
    panel.set_ylabel(f"FID, {protocol['features by'].split(',')[0]}", fontsize=8)
    panel.set_title(f"{protocol['generator']}\n{protocol['data']}, {protocol['images']}", fontsize=8)
    panel.margins(x=0.12)
    figure.tight_layout()
    atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
