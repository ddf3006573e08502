"""The figure of what changes between one Dreamer and a team with one world model."""

from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

HEADS = ("", "Dreamer: one agent", r"here: $N$ agents, one world model")
ROWS = (  # what, for one agent, for a team
    (
        "posterior",
        r"$s_t \sim q\,(s_t \mid s_{t-1},\ a_{t-1},\ o_t)$",
        r"$s_t \sim q\,(s_t \mid s_{t-1},\ a^{1 \ldots N}_{t-1},\ o^{1 \ldots N}_t)$",
    ),
    (
        "prior",
        r"$s_t \sim p\,(s_t \mid s_{t-1},\ a_{t-1})$",
        r"$s_t \sim p\,(s_t \mid s_{t-1},\ a^{1 \ldots N}_{t-1})$",
    ),
    (
        "observation",
        r"$o_t \sim p\,(o_t \mid s_t)$",
        r"$o^i_t \sim p\,(o^i_t \mid s_t)$",
    ),
    (
        "reward",
        r"$r_t \sim p\,(r_t \mid s_t)$",
        r"$r^i_t \sim p\,(r^i_t \mid s_{t-1},\ a^{1 \ldots N}_{t-1})$",
    ),
    (
        "continue",
        r"$c_t \sim p\,(c_t \mid s_t)$",
        r"$c_t \sim p\,(c_t \mid s_{t-1},\ a^{1 \ldots N}_{t-1})$",
    ),
    (
        "actor",
        r"$a_t \sim \pi\,(a_t \mid s_t)$",
        r"$a^i_t \sim \pi_i\,(a^i_t \mid s_t)$",
    ),
    (
        "critic",
        r"$v\,(s_t)$",
        r"$v^i\,(s_t)$",
    ),
)
LEFT = (0.25, 1.75, 5.15)  # where the columns begin, in inches
WIDTH, LINE, CHANGED = 8.8, 0.52, "#fff0d9"


def draw_equations(path: Path) -> None:
    """Draw the table of equations; the team's are coloured where they differ."""
    height = LINE * (len(ROWS) + 1.2)
    with rc_context({"mathtext.fontset": "cm", "font.size": 12}):
        figure = Figure(figsize=(WIDTH, height))
        axis = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(height, 0))
        axis.axis("off")
        for x, text in zip(LEFT, HEADS, strict=True):
            axis.text(x, 0.6 * LINE, text, va="center", weight="bold")
        axis.plot((LEFT[0], WIDTH - LEFT[0]), (LINE, LINE), color="#bbbbbb", linewidth=1)
        for row, (what, alone, team) in enumerate(ROWS):
            y = LINE * (row + 1.6)
            if team != alone:
                corner, size = (LEFT[2] - 0.12, y - 0.42 * LINE), (3.52, 0.84 * LINE)
                style = {"boxstyle": "round,pad=0,rounding_size=0.08", "linewidth": 0}
                axis.add_patch(FancyBboxPatch(corner, *size, facecolor=CHANGED, **style))
            axis.text(LEFT[0], y, what, va="center", color="#555555")
            axis.text(LEFT[1], y, alone, va="center", size=15)
            axis.text(LEFT[2], y, team, va="center", size=15)
        figure.savefig(path, dpi=150, metadata={"Software": None})
