"""One palette for matplotlib, plotly and the pages. It loads nothing, so that a command may start at once."""

# Okabe & Ito (2008), distinct with any colour vision; without their yellow and black, each lost on one ground.
SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#777777")
DARK_SERIES = ("#4FA8E0", "#F58549", "#2BC79B", "#E39CC5", "#8FD0F5", "#F2BC4B", "#AAAAAA")
KRONOS, VOLATILITY, LAST_VALUE = SERIES[:3]
# Of the page, by the name of its CSS variable.
LIGHT = {
    **{"ground": "#FFFFFF", "raised": "#F6F7F8", "ink": "#222222", "quiet": "#666666", "line": "#E0E2E5"},
    **{"warn": "#FFF1D6", "warn-ink": "#6B4100", "warn-line": "#E69F00", "accent": SERIES[0]},
}
DARK = {
    **{"ground": "#16181C", "raised": "#1E2126", "ink": "#E8E8E8", "quiet": "#A6ABB3", "line": "#34383F"},
    **{"warn": "#352A14", "warn-ink": "#FFD999", "warn-line": "#B37C00", "accent": DARK_SERIES[0]},
}
INK, QUIET, GRID = LIGHT["ink"], LIGHT["quiet"], LIGHT["line"]
