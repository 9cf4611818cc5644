"""What a bench found, in pictures (PNG, through matplotlib, which may be absent)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import cos, hypot, nan, pi, sin, sqrt
from pathlib import Path
from typing import Any

from gguf_embed.errors import BadOption, OutputFailed
from gguf_embed.lab.quality import Quality
from gguf_embed.lab.report import measure, shown_bytes
from gguf_embed.lab.results import Report, Result

SIZE = (8.0, 5.0)  # inches
DPI = 150
LARGEST = 1600.0  # area of the largest file's disc, in square points
INK, FAINT, FAINTER = "#222222", "#bbbbbb", "#e4e4e4"
STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
MARKERS = "osD^vPX*<>"


def check() -> None:
    """Raises BadOption where there is no matplotlib."""
    try:
        import matplotlib  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise BadOption(
            "plots need matplotlib: pip install 'gguf-embed[plots]', or leave out --plots"
        ) from error


def draw(report: Report, folder: Path) -> tuple[Path, ...]:
    """Write the plots as PNG into `folder`, made if need be: levels.png, dims.png.

    Raises BadOption without matplotlib, OutputFailed where the files cannot be written.
    """
    check()
    import matplotlib
    from matplotlib import figure
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    untyped: Any = matplotlib  # its types name every setting there is
    measured = [r for r in report.results if r.costs is not None]
    pictures = {"levels": draw_levels}
    if len(_dims(measured)) > 1:
        pictures["dims"] = draw_dims
    paths: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with untyped.rc_context(STYLE):
            for name, picture in pictures.items():
                sheet: Any = figure.Figure(figsize=SIZE, dpi=DPI, layout="constrained")
                FigureCanvasAgg(sheet)  # no window, whatever the environment says
                picture(report, measured, sheet)
                paths.append(folder / f"{name}.png")
                sheet.savefig(paths[-1])
    except OSError as error:
        raise OutputFailed(f"{folder}: no plots written: {error.strerror or error}") from error
    return tuple(paths)


def _dims(measured: Sequence[Result]) -> tuple[int, ...]:
    quality = measured[0].quality
    return tuple(quality.by_dim) if quality else ()


def draw_levels(report: Report, measured: Sequence[Result], figure: Any) -> None:
    """Quality (without it, the size) against speed; the area of a disc is the size of the file."""
    axes: Any = figure.subplots()
    largest = max(r.level.n_bytes for r in measured)
    spots: list[_Spot] = []
    for result, colour in zip(measured, _colours(len(measured)), strict=True):
        costs, quality = result.costs, result.quality
        assert costs is not None, "of a level that was measured"
        x = costs.tokens_per_s
        y = result.level.n_bytes / 2**20 if quality is None else quality.by_dim[report.dim]
        area = LARGEST * result.level.n_bytes / largest
        across = (min(costs.tokens_per_s_rounds), max(costs.tokens_per_s_rounds))
        up = _interval(y, quality, measured[0].quality)
        axes.plot(across, (y, y), color=colour, alpha=0.45, linewidth=1)
        axes.plot((x, x), up, color=colour, alpha=0.45, linewidth=1)
        axes.scatter(x, y, s=area, color=colour, alpha=0.75, edgecolor="white", linewidth=1)
        label = f"{result.level.name}\n{shown_bytes(result.level.n_bytes)}"
        spots.append(_Spot(x=x, y=y, x_bar=across, y_bar=up, radius=sqrt(area / pi), label=label))
    axes.set_xlabel("tokens/s (bar: range of the rounds)")
    axes.margins(0.14)  # before a limit is set, which fixes the other one where it is
    if measured[0].quality is None:
        axes.set_ylabel("file size, MiB")
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter("{x:,.0f}")
    else:
        bar = " (bar: 95 % of the difference)" if report.has_qrels else ""
        axes.set_ylabel(f"{measure(report)}{bar}")
    axes.set_title(f"{report.model}: area is file size", loc="left")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(color=FAINTER, linewidth=0.7)
    axes.set_axisbelow(True)
    _label(figure, axes, spots)


def _interval(y: float, quality: Quality | None, reference: Quality | None) -> tuple[float, float]:
    """The 95 % interval of the difference to the reference, around `y`."""
    if quality is None or quality.loss is None or reference is None or reference.ndcg is None:
        return y, y
    half = (quality.loss.high - quality.loss.low) / 2 * reference.ndcg
    return y - half, y + half


def draw_dims(report: Report, measured: Sequence[Result], figure: Any) -> None:
    """Quality against the length of vectors: as it is, and as a share of the reference's."""
    whole, share = figure.subplots(1, 2, sharex=True)
    dims = _dims(measured)
    judged = [(r, r.quality) for r in measured if r.quality is not None]
    reference = judged[0][1].by_dim
    for number, (result, quality) in enumerate(judged):
        style: dict[str, Any] = {
            "color": _colours(len(judged))[number],
            "marker": MARKERS[number % len(MARKERS)],
            "markersize": 5,
            "linewidth": 1.5,
            "label": result.level.name,
        }
        values = [quality.by_dim[dim] for dim in dims]
        whole.plot(dims, values, **style)
        # Points beside each other, without a line: most differences are noise, which has no trend.
        style["linestyle"] = "none"
        beside = 2 ** (0.06 * (number - (len(judged) - 1) / 2))
        percent = [
            100 * (quality.by_dim[dim] / reference[dim] - 1) if reference[dim] else nan
            for dim in dims
        ]
        share.plot([dim * beside for dim in dims], percent, **style)
    if (half := _noise([quality for _, quality in judged])) > 0:
        share.axhspan(-half, half, color=FAINTER, zorder=0)
    for axes in (whole, share):
        axes.set_xscale("log", base=2)
        axes.set_xticks(dims, [f"{dim:,}" for dim in dims])
        axes.minorticks_off()
        axes.set_xlabel("values per vector")
        axes.grid(color=FAINTER, linewidth=0.7)
    whole.set_ylabel(measure(report))
    whole.set_title(report.model, loc="left")
    share.set_ylabel("% (grey: 95 % of noise, at full length)" if half > 0 else "%")
    share.set_title(f"difference to {report.reference} at the same length", loc="left")
    figure.legend(
        *whole.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False
    )


def _noise(judged: Sequence[Quality]) -> float:
    """Half of the widest 95 % interval of a level's difference to the reference, in per cent."""
    halves = [50 * (q.loss.high - q.loss.low) for q in judged if q.loss is not None]
    return max(halves, default=0.0)


def _colours(n: int) -> list[tuple[float, float, float, float]]:
    """From dark for the largest file to bright for the smallest."""
    from matplotlib import colormaps

    colours = colormaps["viridis"]
    return [colours(0.9 * i / max(n - 1, 1)) for i in range(n)]


# ---------------------------------------------------------------------------------------------
# Labels


@dataclass(frozen=True, slots=True, kw_only=True)
class _Spot:
    """A disc, its bars from end to end, and its label; `radius` in points."""

    x: float
    y: float
    x_bar: tuple[float, float]
    y_bar: tuple[float, float]
    radius: float
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A rectangle, in pixels."""

    x: float  # of the middle
    y: float
    width: float
    height: float

    def shared(self, other: Box) -> float:
        """Area that the two have in common."""
        wide, high = (self.width + other.width) / 2, (self.height + other.height) / 2
        return max(
            0.0,
            min(wide - abs(self.x - other.x), self.width, other.width),
        ) * max(0.0, min(high - abs(self.y - other.y), self.height, other.height))


def places(
    discs: Sequence[Box], labels: Sequence[Box], bars: Sequence[Box], frame: Box
) -> list[Box]:
    """Where each label goes: beside its disc, near it, and off bars, other discs and labels.

    Of `labels` only the sizes count. Small discs choose first: beside a large one there is room.
    """
    placed: dict[int, Box] = {}
    for i in sorted(range(len(discs)), key=lambda i: discs[i].width):
        disc, label = discs[i], labels[i]
        area = label.width * label.height

        def cost(box: Box, disc: Box = disc, area: float = area) -> tuple[float, float]:
            hidden = sum(box.shared(other) for other in (*placed.values(), *discs))
            crossed = sum(box.shared(bar) for bar in bars)
            far = hypot(box.x - disc.x, box.y - disc.y)
            # Rounded: computing leaves crumbs of area.
            return round(hidden + area - box.shared(frame), 3), 100 * crossed / area + far / sqrt(
                area
            )

        around = (
            Box(
                x=disc.x + cos(turn * pi / 8) * (disc.width / 2 + gap + label.width / 2),
                y=disc.y + sin(turn * pi / 8) * (disc.height / 2 + gap + label.height / 2),
                width=label.width,
                height=label.height,
            )
            for gap, turn in product((4, 12, 30, 60, 100, 160), range(16))
        )
        placed[i] = min(around, key=cost)
    return [placed[i] for i in range(len(discs))]


def _label(figure: Any, axes: Any, spots: Sequence[_Spot]) -> None:
    """Write the labels where they fit; a line leads to one that is far from its disc."""
    figure.draw_without_rendering()  # the axes have their place only after the layout
    renderer: Any = figure.canvas.get_renderer()
    pixels = figure.dpi / 72  # per point
    style: dict[str, Any] = {"color": INK, "fontsize": 8.5, "ha": "center", "va": "center"}
    discs: list[Box] = []
    bars: list[Box] = []
    labels: list[Box] = []
    texts: list[Any] = []
    for spot in spots:
        text = axes.annotate(
            spot.label, (spot.x, spot.y), (0, 0), textcoords="offset points", zorder=5, **style
        )
        x, y = axes.transData.transform((spot.x, spot.y))
        side = 2 * spot.radius * pixels
        discs.append(Box(x=x, y=y, width=side, height=side))
        left, low = axes.transData.transform((spot.x_bar[0], spot.y_bar[0]))
        right, high = axes.transData.transform((spot.x_bar[1], spot.y_bar[1]))
        thick = 4 * pixels
        bars.append(Box(x=(left + right) / 2, y=y, width=right - left, height=thick))
        bars.append(Box(x=x, y=(low + high) / 2, width=thick, height=high - low))
        labels.append(_box(text.get_window_extent(renderer)))
        texts.append(text)
    placed = places(discs, labels, bars, _box(axes.get_window_extent(renderer)))
    for spot, disc, box, text in zip(spots, discs, placed, texts, strict=True):
        to = ((box.x - disc.x) / pixels, (box.y - disc.y) / pixels)
        text.set_position(to)
        if hypot(*to) > spot.radius + 40:
            line = {"arrowstyle": "-", "color": FAINT, "linewidth": 0.8, "shrinkA": 10}
            axes.annotate(
                "", (spot.x, spot.y), to, textcoords="offset points", arrowprops=line, zorder=4
            )


def _box(extent: Any) -> Box:
    return Box(
        x=(extent.x0 + extent.x1) / 2,
        y=(extent.y0 + extent.y1) / 2,
        width=extent.width,
        height=extent.height,
    )
