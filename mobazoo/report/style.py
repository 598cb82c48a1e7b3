"""Colours and layout of the page, light and dark."""

from __future__ import annotations

# Hues are Okabe and Ito's, which people of every colour vision tell apart; each differs between light and dark for
# contrast. The page has them as variables of CSS.
THEMES = {
    "light": {
        "--ink": "#1c2026",
        "--faint": "#c9ced6",
        "--paper": "#ffffff",
        "--series-0": "#0072b2",
        "--series-1": "#c04f00",
        "--series-2": "#00795a",
        "--series-3": "#a3457c",
        "--series-4": "#7a6a00",
        "--series-5": "#444b55",
    },
    "dark": {
        "--ink": "#e6e9ee",
        "--faint": "#3a424d",
        "--paper": "#191d23",
        "--series-0": "#56b4e9",
        "--series-1": "#ff9a4d",
        "--series-2": "#2fc79b",
        "--series-3": "#e39ac6",
        "--series-4": "#f0e442",
        "--series-5": "#b9c1cc",
    },
}
# What an SVG is drawn with before the variable takes its place: colours that nothing else has.
STAND_INS = {name: f"#0102{number:02x}" for number, name in enumerate(THEMES["light"], 3)}
VARIABLES = {colour: name for name, colour in STAND_INS.items()}
# Pictures are pixels: these two are read on white and on black.
CHOSEN, OWN = (0.16, 0.53, 0.84), (0.90, 0.50, 0.00)


def _variables(theme: str) -> str:
    return " ".join(f"{name}: {colour};" for name, colour in THEMES[theme].items())


CSS = (
    f"""
:root {{ color-scheme: light dark; --soft: #5b6470; --back: #f4f5f7; {_variables("light")} }}
@media (prefers-color-scheme: dark) {{ :root {{ --soft: #a0a9b5; --back: #0f1216; {_variables("dark")} }} }}
"""
    """\
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0.5rem 0; }
h2 { font-size: 1.15rem; margin: 0 0 0.5rem; }
p { margin: 0.4rem 0; }
.soft, figcaption { color: var(--soft); font-size: 0.9rem; }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); }
section, header, .grid { margin: 0 0 1rem; }
.grid > section { margin: 0; }
section { background: var(--paper); border: 1px solid var(--faint); border-radius: 0.6rem; padding: 0.9rem;
  min-width: 0; }
figure { margin: 0; }
figure svg { display: block; width: 100%; max-width: 34rem; height: auto; margin: 0 auto; }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
figure image { image-rendering: pixelated; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; }
th, td { text-align: left; vertical-align: top; padding: 0.3rem 0.5rem; border-bottom: 1px solid var(--faint); }
th:first-child, td:first-child { padding-left: 0; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
@media (max-width: 40rem) { main { padding: 0.5rem; } section { padding: 0.7rem; }
  th, td { padding: 0.25rem 0.3rem; font-size: 0.8rem; } }
pre { margin: 0; padding: 0.7rem; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere;
  background: var(--back); border-radius: 0.4rem; font: 0.85rem/1.45 ui-monospace, Menlo, Consolas, monospace; }
code { font: 0.85rem ui-monospace, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
mark { background: none; color: var(--series-1); font-weight: 600; }
details { margin-top: 0.5rem; }
summary { cursor: pointer; color: var(--soft); font-size: 0.9rem; }
"""
)
