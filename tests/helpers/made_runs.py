"""Write made-up finished runs, and parse the HTML page of a report."""

import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import numpy as np

from ltat_fast.config import Config, to_json
from ltat_fast.data.longtail import class_groups
from ltat_fast.methods import METHODS

VOID = {"meta", "link", "img", "br", "hr", "input"}


def write_run(
    folder: Path,
    *,
    counts=(114, 88, 68, 52, 40, 31, 24, 19, 14, 11),
    attacks=("clean", "pgd20", "autoattack"),
    which=("best", "last"),
    extra: dict | None = None,
    epochs: int = 4,
    **config,
) -> Path:
    """Write a run with random accuracies that depend on method and seed. extra: more entries for each checkpoint."""
    folder.mkdir(parents=True)
    config = Config(out=folder, **{"method": "ltat", "eps": "0.1", "select_on": "test", **config})
    write(folder / "config.json", to_json(config, METHODS[config.method]()))
    packages = {"torch": "2.13.0", "pyautoattack": "0.2.0"}
    environment = {"command": f"/x/y/ltat_fast/train.py --out {folder} --seed {config.seed}", "python": "3.11.7"}
    environment |= {"packages": packages, "index_hash": "6421ce678a366f48", "class_counts": list(counts), "git": "abc1"}
    write(folder / "env.json", environment)
    rng = np.random.default_rng([config.seed, *map(ord, config.method)])
    write(folder / "eval.json", {w: {a: accuracies(rng, counts) for a in attacks} | (extra or {}) for w in which})
    records = [
        {"epoch": e + 1, "loss": 2 / (e + 1) + rng.random(), "lr": 0.1}
        | ({f"test_{k}": rng.random() * 100 for k in ("clean", "pgd20", "tail_clean", "tail_pgd20")} if e % 2 else {})
        for e in range(epochs)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def write_known_run(
    folder, clean=50.0, *, method="ltat", attacks=("clean", "pgd20", "autoattack"), which=("best", "last"), **config
):
    """Write a run whose accuracies have known distances from ``clean``, so that means can be computed by hand."""
    folder.mkdir(parents=True)
    config = Config(method=method, out=folder, **{"select_on": "test", **config})
    write(folder / "config.json", to_json(config, METHODS[method]()))
    offsets = {"clean": 0.0, "pgd20": 20.0, "autoattack": 25.0}
    results = {
        w: {
            a: {"all": clean - offsets[a] - (w == "last"), "tail": clean - offsets[a] - 5, "images": 600}
            for a in attacks
        }
        for w in which
    }
    write(folder / "eval.json", results)
    return folder


def accuracies(rng, counts) -> dict:
    per_class = (100 * rng.random(len(counts))).tolist()
    groups = {name: float(np.mean([per_class[c] for c in cs])) for name, cs in class_groups(list(counts)).items() if cs}
    groups = {"all": float(np.mean(per_class))} | groups
    return groups | {"per_class": per_class, "images": 600, "weights": "ab", "eps": "0.1", "correct": "0f" * 75}


def write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content))


def read(path: Path) -> dict:
    return json.loads(path.read_text())


@dataclass
class Element:
    tag: str
    attributes: dict[str, str | None]
    children: list = field(default_factory=list)

    def __iter__(self):
        yield self
        for child in self.children:
            if isinstance(child, Element):
                yield from child

    def find(self, tag: str, kind: str | None = None) -> list["Element"]:
        """All elements with this tag, and with this class if one is given."""
        return [e for e in self if e.tag == tag and (kind is None or kind in (e.attributes.get("class") or "").split())]

    @property
    def text(self) -> str:
        parts = [child.text if isinstance(child, Element) else child for child in self.children]
        return " ".join("".join(parts).split())


class Parser(HTMLParser):
    """Builds a tree of elements; asserts that elements are closed in the right order."""

    def __init__(self):
        super().__init__()
        self.open = [Element("page", {})]

    def handle_starttag(self, tag, attributes):
        element = Element(tag, dict(attributes))
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attributes):
        self.open[-1].children.append(Element(tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop().tag == tag

    def handle_data(self, data):
        self.open[-1].children.append(data)


def parse(page: str) -> Element:
    parser = Parser()
    parser.feed(page)
    parser.close()
    assert len(parser.open) == 1, f"{parser.open[-1].tag} is not closed"
    return parser.open[0]


def rows(table: Element) -> list[list[str]]:
    """The texts of a table, line by line."""
    return [[cell.text for cell in row if cell.tag in ("td", "th")] for row in table.find("tr")]
