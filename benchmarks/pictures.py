"""Draws what the benchmarks found, from benchmarks/results/*.json to docs/pictures/*.svg.

    python benchmarks/pictures.py [--results DIRECTORY] [--into DIRECTORY]

Plain SVG without a library: each picture has its own colours for a light and a dark page (prefers-color-scheme).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Callable

import findings
from findings import Finding

CHECKOUT = Path(__file__).resolve().parent.parent
WIDTH = 760.0
_LINE_HEIGHT = 1.35
# Told apart also without colour vision (Okabe and Ito), the same on light and on dark ground.
_STYLE = """
text { font: 13px system-ui, -apple-system, "Segoe UI", "Noto Sans", sans-serif; fill: #1f2328 }
.title { font-size: 16px; font-weight: 600 }
.note { font-size: 12px; fill: #59636e }
.value { font-weight: 600 }
.inside { fill: #fff; font-weight: 600 }
.axis { stroke: #59636e; stroke-width: 1; fill: none }
.grid { stroke: #d1d9e0; stroke-width: 1; fill: none }
.else { fill: #c4ccd4 }
.open { fill: #c8102e } .closed { fill: none; stroke: #1a7f37; stroke-width: 1.5 } .plain { fill: #6e7781 }
.line { fill: none; stroke-width: 2.5; stroke-linejoin: round }
.dashed { stroke-dasharray: 5 4 }
.c0 { fill: #0072b2 } .c1 { fill: #d55e00 } .c2 { fill: #009e73 } .c3 { fill: #cc79a7 }
.c4 { fill: #8c6d00 } .c5 { fill: #56b4e9 } .c6 { fill: #6e7781 } .c7 { fill: #7a5195 } .c8 { fill: #a05a2c }
.s0 { stroke: #0072b2 } .s1 { stroke: #d55e00 } .s2 { stroke: #009e73 } .s3 { stroke: #cc79a7 }
.s4 { stroke: #8c6d00 } .s5 { stroke: #56b4e9 } .s6 { stroke: #6e7781 }
@media (prefers-color-scheme: dark) {
text { fill: #f0f6fc } .note { fill: #9198a1 } .inside { fill: #fff }
.axis { stroke: #9198a1 } .grid { stroke: #30363d } .else { fill: #444c56 }
.open { fill: #e5484d } .closed { stroke: #3fb950 } .plain { fill: #8b949e }
.c0 { fill: #3a95d0 } .c4 { fill: #b8931a } .c7 { fill: #a97fc4 } .c8 { fill: #c98a5b }
.s0 { stroke: #3a95d0 } .s4 { stroke: #b8931a }
}
"""

Results = dict[str, Finding]
Place = Callable[[float], float]


@dataclass
class Drawing:
    """One SVG picture, from the top left corner. title: what it shows, also for those who cannot see it."""

    title: str
    height: float
    _parts: list[str] = field(default_factory=list)

    def text(self, x: float, y: float, words: str, *, kind: str = "", anchor: str = "start") -> None:
        self._parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(words)}</text>'
        )

    def box(self, x: float, y: float, width: float, height: float, kind: str) -> None:
        place = f'x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.0):.1f}" height="{height:.1f}"'
        self._parts.append(f'<rect {place} rx="2" class="{kind}"/>')

    def path(self, points: Iterable[tuple[float, float]], kind: str) -> None:
        listed = " L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        self._parts.append(f'<path d="M{listed}" class="{kind}"/>')

    def dot(self, x: float, y: float, kind: str) -> None:
        self._parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" class="{kind}"/>')

    def svg(self) -> str:
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:.0f} {self.height:.0f}" role="img">'
        title = f"<title>{escape(self.title)}</title>"
        return "\n".join([head, title, f"<style>{_STYLE}</style>", *self._parts, "</svg>", ""])


def exposure(results: Results) -> Drawing:
    """Each port a square, filled where the stranger could connect."""
    ways = ["torchrun", "one-port script", "securerun"]
    labels = {"one-port script": "torchrun + one-port script"}
    drawing = Drawing("Ports of a two-node job that a stranger can connect to", 60 + 76 * len(ways))
    drawing.text(0, 18, drawing.title, kind="title")
    drawing.text(
        0,
        38,
        "each square is a port that the nodes listen on; full: a stranger's connection was accepted, empty: none was",
        kind="note",
    )
    for row, way in enumerate(ways):
        top = 58 + 76 * row
        drawing.text(0, top + 25, labels.get(way, way), kind="value")
        for line, family in enumerate(("IPv4", "IPv6")):
            reached = int(results[f"exposure.{way}.stranger.{family}"].median)
            seen = int(results[f"exposure.{way}.stranger.{family}.seen"].median)
            y = top + 30 * line
            drawing.text(196, y + 15, family, kind="note")
            for port in range(seen):
                drawing.box(236 + 21 * port, y, 17, 20, "open" if port < reached else "closed")
            drawing.text(WIDTH, y + 15, f"{reached} of {seen} open", kind="value", anchor="end")
    return drawing


def launch(results: Results) -> Drawing:
    """The steps of both launchers, one after the other, on one time scale."""
    launchers = ["torchrun", "securerun"]
    steps = {
        launcher: {
            name.rpartition(".")[2]: found.median
            for name, found in results.items()
            if name.startswith(f"launch.steps.{launcher}.")
        }
        for launcher in launchers
    }
    order = [
        *("start Python", "load securerun", "start the guard", "import torch", "parse", "policy", "preflight"),
        *("wait for the guard", "policy to layers", "torch runs the job", "farewell", "all else", "exit"),
    ]
    colours = dict(zip(order, ("c5", "c8", "c1", "plain", "c2", "c4", "c3", "c8", "c1", "c0", "c2", "else", "c7")))
    longest = max(sum(taken.values()) for taken in steps.values())
    scale = (WIDTH - 150) / longest
    drawing = Drawing("Where the time of a launch goes (one node, two workers that do nothing)", 330)
    drawing.text(0, 18, drawing.title, kind="title")
    for row, launcher in enumerate(launchers):
        x, y = 90.0, 36.0 + 48 * row
        drawing.text(0, y + 23, launcher, kind="value")
        for step in order:
            taken = steps[launcher].get(step, 0.0)
            drawing.box(x, y, taken * scale - 1, 34, colours[step])
            if taken * scale > 74:
                drawing.text(
                    x + taken * scale / 2,
                    y + 22,
                    f"{step.replace('torch runs the job', 'run')} {taken:.2f}",
                    kind="inside",
                    anchor="middle",
                )
            x += max(taken, 0.0) * scale
        drawing.text(x + 6, y + 22, f"{sum(steps[launcher].values()):.2f} s", kind="value")
    for number, step in enumerate(order):
        column, row = divmod(number, 5)
        x, y = 252.0 * column, 156.0 + 30 * row
        drawing.box(x, y - 11, 14, 14, colours[step])
        drawing.text(x + 20, y, step)
        times = "  ·  ".join(_milliseconds(steps[launcher].get(step)) for launcher in launchers)
        drawing.text(x + 240, y, times, kind="note", anchor="end")
    drawing.text(0, 318, "milliseconds: torchrun · securerun", kind="note")
    return drawing


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.1f}" if seconds < 0.01 else f"{1000 * seconds:.0f}"


@dataclass(frozen=True, order=True)
class Series:
    """One line of a chart. name: what stands beside it; dashed: what it is compared to."""

    name: str
    points: tuple[tuple[float, float], ...]
    dashed: bool = False


def install(results: Results) -> Drawing:
    """Install time over the number of peers, on logarithmic scales."""
    names = ["shield", "nftables", "iptables", "legacy", "nft -f", "iptables-restore", "one iptables call a rule"]
    series = [Series(_layer_label(name), tuple(_install_points(results, name)), name in names[4:]) for name in names]
    return _chart(
        "Installing a policy of random peers, by layer",
        "milliseconds, with everything that is read back; dashed: the usual commands",
        [one for one in series if one.points],
    )


def _layer_label(name: str) -> str:
    return name if " " in name or "-" in name else f"securerun, {name}"


def _install_points(results: Results, layer: str) -> Iterator[tuple[float, float]]:
    for count in (1, 100, 10_000, 100_000):
        found = results.get(f"layers.{layer}.random.install.{count}")
        if found is not None:
            yield count, found.median


def connect(results: Results) -> Drawing:
    """Connect latency as bars above a common ground, with the middle half of the samples."""
    layers = [("none", "no layer"), ("control", "no layer, again")]
    for layer in ("shield", "nftables", "iptables", "legacy"):
        layers += [(f"{layer}.{count}", f"{layer}, {count:,} peer{'s' * (count > 1)}") for count in (1, 10_000)]
    found = {name: results[f"connect.latency.{name}"] for name, _ in layers}
    most = max(one.spread[1] for one in found.values()) * 1.05
    scale = (WIDTH - 330) / most
    drawing = Drawing("What a connection costs a peer", 66 + 26 * len(layers))
    drawing.text(0, 18, drawing.title, kind="title")
    drawing.text(
        0, 38, "microseconds of connect(), median and middle half, hosts on one bridge; ratio to no layer", kind="note"
    )
    for row, (name, label) in enumerate(layers):
        one, y = found[name], 52.0 + 26 * row
        colour = "plain" if row < 2 else f"c{(row - 2) // 2}"
        drawing.text(0, y + 14, label)
        drawing.box(170, y, one.median * scale, 18, colour)
        low, high = (170 + value * scale for value in one.spread)
        drawing.path([(low, y + 9), (high, y + 9)], "axis")
        for end in (low, high):
            drawing.path([(end, y + 5), (end, y + 13)], "axis")
        ratio = "" if one.ratio is None else f"\N{MULTIPLICATION SIGN} {one.ratio:.3f}"
        drawing.text(WIDTH - 80, y + 14, f"{one.median:.1f} µs", kind="value", anchor="end")
        drawing.text(WIDTH, y + 14, ratio, kind="note", anchor="end")
    return drawing


def _chart(title: str, note: str, series: Sequence[Series]) -> Drawing:
    """Lines on two logarithmic scales, each named at its end."""
    drawing = Drawing(title, 420)
    drawing.text(0, 18, title, kind="title")
    drawing.text(0, 38, note, kind="note")
    left, right, top, bottom = 62.0, WIDTH - 190, 60.0, 372.0
    xs = [x for one in series for x, _ in one.points]
    ys = [y for one in series for _, y in one.points]
    place_x = _logarithmic(min(xs), max(xs), left, right)
    lowest, highest = 10 ** math.floor(math.log10(min(ys))), 10 ** math.ceil(math.log10(max(ys)))
    place_y = _logarithmic(lowest, highest, bottom, top)
    for value in _powers(lowest, highest):
        drawing.path([(left, place_y(value)), (right, place_y(value))], "grid")
        drawing.text(left - 8, place_y(value) + 4, f"{value:,g}", kind="note", anchor="end")
    for value in _powers(min(xs), max(xs)):
        drawing.path([(place_x(value), bottom), (place_x(value), bottom + 5)], "axis")
        drawing.text(place_x(value), bottom + 20, f"{value:,g}", kind="note", anchor="middle")
    drawing.text((left + right) / 2, bottom + 40, "peers", kind="note", anchor="middle")
    drawing.path([(left, bottom), (right, bottom)], "axis")
    for number, one in enumerate(series):
        points = [(place_x(x), place_y(y)) for x, y in one.points]
        drawing.path(points, f"line s{number % 7}{' dashed' if one.dashed else ''}")
        for x, y in points:
            drawing.dot(x, y, f"c{number % 7}")
    _name_lines(drawing, series, place_x, place_y, right)
    return drawing


def _name_lines(drawing: Drawing, series: Sequence[Series], place_x: Place, place_y: Place, right: float) -> None:
    """Names at the lines' ends; of those that end at the right, none over another."""
    free = 0.0
    for y, x, number, one in sorted(_end_of(one, number, place_x, place_y) for number, one in enumerate(series)):
        if x < right - 1:  # above its end: other lines go on there
            drawing.text(x + 4, y - 10, one.name, kind=f"c{number % 7}", anchor="end")
            continue
        y = max(y, free)
        free = y + 13 * _LINE_HEIGHT
        drawing.text(x + 10, y + 4, one.name, kind=f"c{number % 7}")


def _end_of(one: Series, number: int, place_x: Place, place_y: Place) -> tuple[float, float, int, Series]:
    x, y = one.points[-1]
    return place_y(y), place_x(x), number, one


def _logarithmic(least: float, most: float, begin: float, end: float) -> Place:
    span = math.log10(most) - math.log10(least)
    return lambda value: begin + (end - begin) * (math.log10(value) - math.log10(least)) / span


def _powers(least: float, most: float) -> Iterator[float]:
    power = math.floor(math.log10(least))
    while 10.0**power <= most * 1.0001:
        if 10.0**power >= least * 0.9999:
            yield 10.0**power
        power += 1


# What each picture is drawn from: the results of one benchmark.
PICTURES: dict[str, tuple[str, Callable[[Results], Drawing]]] = {
    "exposure": ("exposure", exposure),
    "connect": ("connect", connect),
    "install": ("layers", install),
    "launch": ("launch", launch),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=CHECKOUT / "benchmarks/results")
    parser.add_argument("--into", type=Path, default=CHECKOUT / "docs/pictures")
    options = parser.parse_args()
    options.into.mkdir(parents=True, exist_ok=True)
    for name, (benchmark, draw) in PICTURES.items():
        source = options.results / f"{benchmark}.json"
        if not source.exists():
            findings.progress(f"{name}: there is no {source}; scripts/bench.sh {benchmark} makes it")
            continue
        (options.into / f"{name}.svg").write_text(draw(findings.read(source)).svg())


if __name__ == "__main__":
    main()
