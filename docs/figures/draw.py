"""The README's dot plot, light and dark, from the committed results of three seeds.

    .venv/bin/python docs/figures/draw.py

Reads:  results/seeds.json, of results/pool.py
Writes: docs/figures/results-light.svg, docs/figures/results-dark.svg
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent.parent / "results/seeds.json"

# Rows from top to bottom: the method's id in results.json, and its name in the README.
ROWS = {
    "generator": "generated adapter",
    "no_meta": "20 labels alone",
    "degaml_plus": "generated + 20 labels",
    "union": "union + 20 labels",
}
PANELS = {"id": "in-domain", "ood": "out-of-domain"}

# Ink and dots of the two themes; the background stays transparent, the page shows through.
THEMES = {
    "light": {"ink": "#1f2328", "faint": "#d1d9e0", "dot": "#0072B2"},
    "dark": {"ink": "#f0f6fc", "faint": "#3d444d", "dot": "#56B4E9"},
}
INTERVAL = 1.96  # standard errors on either side of the dot: 95 %


def draw_panel(axes, averages: dict, theme: dict) -> None:
    """One domain: a dot per method, the gain over the base model in points, with its interval."""
    axes.axvline(0, color=theme["ink"], linewidth=1.5)

    for place, method in enumerate(ROWS):
        gain = averages[method]["vs_base"]
        axes.errorbar(
            100 * gain["diff"],
            place,
            xerr=100 * INTERVAL * gain["se"],
            color=theme["dot"],
            marker="o",
            markersize=10,
            linewidth=2.5,
        )


def style_panel(axes, title: str, theme: dict) -> None:
    """Grid, limits and colours, the same in both panels."""
    axes.set_title(title, color=theme["ink"], fontsize=20)
    axes.set_yticks(range(len(ROWS)), list(ROWS.values()))
    axes.set_xticks([-5, 0, 5, 10])
    axes.set_xlim(-6, 11)
    axes.set_ylim(len(ROWS) - 0.5, -0.5)
    axes.tick_params(colors=theme["ink"], labelsize=20, length=0, pad=8)
    axes.grid(axis="x", color=theme["faint"])
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)


def draw(results: dict, theme: dict, path: Path) -> None:
    """Both panels as one SVG of 720 by 290 pixels."""
    figure, panels = plt.subplots(1, 2, sharey=True, figsize=(10, 4.03))
    for axes, (domain, title) in zip(panels, PANELS.items(), strict=True):
        draw_panel(axes, results["averages"][domain], theme)
        style_panel(axes, title, theme)

    figure.supxlabel("points over the base model, 95 % interval", color=theme["ink"], fontsize=20)
    figure.tight_layout(w_pad=2)

    # no date, and a seed for the ids: the same results give the same bytes
    figure.savefig(path, transparent=True, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    results = json.loads(RESULTS.read_text())
    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text, in the reader's own font
    matplotlib.rcParams["svg.hashsalt"] = "degaml"

    for name, theme in THEMES.items():
        path = HERE / f"results-{name}.svg"
        draw(results, theme, path)
        drawn = path.read_text()
        path.write_text(drawn.replace("'DejaVu Sans'", "system-ui, 'DejaVu Sans'"))


if __name__ == "__main__":
    main()
