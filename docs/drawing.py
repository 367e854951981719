"""A graph without cycles as an SVG in layers, which needs no script in the page and takes the colours of its text."""

from html import escape
from itertools import pairwise

Node = tuple[str, int]  # a name and its column; a long arrow has a point in each column that it passes
WIDTH, HEIGHT, ACROSS, DOWN = 108, 26, 130, 38  # of a box; distances of columns and rows


def draw(graph: dict[str, set[str]], title: str) -> str:
    """The nodes in columns, so that every arrow points to the right."""
    column = columns(graph)
    layers, arrows = _layers(graph, column)
    place = {node: (node[1] * ACROSS, _row(node, layers) * DOWN) for layer in layers for node in layer}
    wide = (len(layers) - 1) * ACROSS + WIDTH
    high = max(y for _, y in place.values()) + HEIGHT
    shapes = [f'<path d="{_curve([place[point] for point in arrow])}" marker-end="url(#arrow)"/>' for arrow in arrows]
    for (name, at), (x, y) in place.items():
        if column.get(name) == at:
            shapes.append(f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="4"/>')
            middle = f'x="{x + WIDTH / 2:g}" y="{y + HEIGHT / 2 + 4:g}"'
            shapes.append(f'<text {middle} text-anchor="middle" font-size="13">{escape(name)}</text>')
    marker = '<marker id="arrow" viewBox="0 0 6 6" refX="6" refY="3" markerWidth="7" markerHeight="7" orient="auto">'
    head = f'<svg role="img" aria-label="{escape(title)}" width="{wide + 2}" height="{high + 2}"'
    head += f' viewBox="-1 -1 {wide + 2} {high + 2}" xmlns="http://www.w3.org/2000/svg">'
    return "\n".join([head, f'<defs>{marker}<path d="M0 0L6 3L0 6z"/></marker></defs>', *shapes, "</svg>"])


def columns(graph: dict[str, set[str]]) -> dict[str, int]:
    """The column of each node: right of all nodes that point to it, by the longest path to a node without arrows."""
    depth: dict[str, int] = {}

    def measure(node: str) -> int:
        if node not in depth:
            depth[node] = 1 + max((measure(target) for target in graph[node]), default=-1)
        return depth[node]

    deepest = max(map(measure, graph))
    return {node: deepest - depth[node] for node in graph}


def _layers(graph: dict[str, set[str]], column: dict[str, int]) -> tuple[list[list[Node]], list[list[Node]]]:
    """Nodes by column, ordered to cross few arrows, and the points of each arrow."""
    layers: list[list[Node]] = [[] for _ in range(max(column.values()) + 1)]
    for name, at in sorted(column.items()):
        layers[at].append((name, at))
    arrows = []
    for source in sorted(graph):
        for target in sorted(graph[source]):
            between = [(f"{source} {target}", at) for at in range(column[source] + 1, column[target])]
            for point in between:
                layers[point[1]].append(point)
            arrows.append([(source, column[source]), *between, (target, column[target])])
    steps = [step for arrow in arrows for step in pairwise(arrow)]
    near: dict[Node, list[Node]] = {}
    for a, b in steps:
        near.setdefault(a, []).append(b)
        near.setdefault(b, []).append(a)
    for sweep in range(24):  # each column by the mean place of its neighbours, to the right and back
        for at in range(len(layers)) if sweep % 2 == 0 else reversed(range(len(layers))):
            side = at - 1 if sweep % 2 == 0 else at + 1
            rows = {node: _row(node, layers) for layer in layers for node in layer}
            means = {}
            for node in layers[at]:
                places = [rows[other] for other in near.get(node, []) if other[1] == side]
                means[node] = sum(places) / len(places) if places else rows[node]
            layers[at].sort(key=means.__getitem__)
    return layers, arrows


def _row(node: Node, layers: list[list[Node]]) -> float:
    """Place of a node in its column; columns are centred."""
    layer = layers[node[1]]
    return layer.index(node) + (max(map(len, layers)) - len(layer)) / 2


def _curve(points: list[tuple[float, float]]) -> str:
    """A line from the right border of the first box to the left border of the last, level at each point."""
    x, y = points[0][0] + WIDTH, points[0][1] + HEIGHT / 2
    words = [f"M{x:g} {y:g}"]
    for i, (left, top) in enumerate(points[1:], 1):
        middle = top + HEIGHT / 2
        half = (left - x) / 2
        words.append(f"C{x + half:g} {y:g} {left - half:g} {middle:g} {left:g} {middle:g}")
        x, y = left, middle
        if i < len(points) - 1:
            x = left + WIDTH
            words.append(f"H{x:g}")
    return "".join(words)
