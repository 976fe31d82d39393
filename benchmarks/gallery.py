"""Write one self-contained HTML page of a run's most suspect labels, to keep, correct or remove them.

    python -m benchmarks.gallery results/runs/sfa/... --top 200       # gallery.html in the run directory
    python sfa/Train_cifar.py ... --noise_file decisions.csv          # trains on what the page exports

The page shows the training images with the lowest score in the run's label_quality.csv. It needs no network and no server. The
browser keeps the marks. The page exports decisions.csv with one row per training image.
"""

import base64
import hashlib
import io
import json
import math
import sys
from argparse import Namespace
from pathlib import Path

# run by path, the script uses the clone it stands in
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.runs import cli


def make_parser() -> cli.Parser:
    """The command line."""
    parser = cli.Parser(prog="python -m benchmarks.gallery", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="directory of a finished run, with its label_quality.csv")
    parser.add_argument("--top", type=cli.count, default=200, metavar="N", help="images on the page")
    parser.add_argument(
        "--per-class", action="store_true", help="N images of each given class, not of all together"
    )
    parser.add_argument("--data_path", metavar="DIR", help="where the data set is; by default as in the run")
    parser.add_argument(
        "--out", metavar="FILE.html", help="the page; by default gallery.html in the run directory"
    )
    return parser


cli.show_help(__name__, make_parser)  # before imports that take seconds

import numpy as np
import pandas as pd
from PIL import Image

from benchmarks.pages import render
from benchmarks.results import write_text
from common import datasets
from common.datasets.images import DamagedImage, read_image
from common.runs.cli import UserError
from common.runs.figures import naming

QUALITY = "label_quality.csv"
NEEDED = (
    *("index", "path", "given_label", "given_class", "score"),
    *("predicted_label", "predicted_class", "predicted_probability", "ood_score"),
)
SIDE = 96  # pixels of a thumbnail's longer side at most
LINK = 10  # runs --like runs --like runs ...


# reading --------------------------------------------------------------------------------------------------------------


def read_quality(path: Path) -> pd.DataFrame:
    """One row per training image, in the order of the file; numbers that are unknown are NaN. UserError: it is damaged."""
    if not path.is_file():
        raise UserError(f"no {QUALITY} in {path.parent}: name the directory of a finished run")
    with naming(path):
        rows = pd.read_csv(path, dtype=str, keep_default_na=False, encoding_errors="surrogateescape")
        rows = rows[list(NEEDED)].copy()
        for name in ("index", "given_label"):
            rows[name] = rows[name].astype(np.int64)
        for name in ("score", "predicted_label", "predicted_probability", "ood_score"):
            rows[name] = pd.to_numeric(rows[name].replace("", None))
        if not rows["index"].is_unique or (rows[["index", "given_label"]] < 0).any(axis=None):
            raise ValueError("index and given_label are no numbers >= 0 that name each image once")
    if rows.empty:
        raise UserError(f"{path} has no row")
    return rows


def read_arguments(folder: Path) -> dict:
    """args.json of a run; for the baseline, `arguments` are those of the run that it is like. UserError: it is damaged."""
    path = folder / "args.json"
    if not path.is_file():
        raise UserError(f"no args.json in {folder}: name the directory of a run")
    with naming(path):
        content = json.loads(path.read_text(encoding="utf-8"))
        arguments = content["arguments"]
        found = {"paper": content["paper"], "method": content["method"], "arguments": arguments}
        for _ in range(LINK):
            if "like" not in arguments:
                break
            origin = json.loads((Path(arguments["like"]) / "args.json").read_text(encoding="utf-8"))
            arguments = origin["arguments"]
            found |= {"paper": origin["paper"], "arguments": arguments}
    return found


# the order ------------------------------------------------------------------------------------------------------------


def most_suspect(rows: pd.DataFrame, top: int, per_class: bool) -> pd.DataFrame:
    """The `top` rows with the lowest score (of each given class with per_class), lowest first, unknown scores last.

    Of equal scores those come first whose predicted label differs from the given one, the most probable one before others.
    """
    differs = rows["predicted_label"].notna() & (rows["predicted_label"] != rows["given_label"])
    doubt = rows["predicted_probability"].fillna(0).where(differs, -1)
    order = rows.assign(doubt=doubt).sort_values(["score", "doubt", "index"], ascending=[True, False, True])
    shown = order.groupby("given_label").head(top) if per_class else order.head(top)
    return shown.drop(columns="doubt")


def class_names(rows: pd.DataFrame, folder: Path) -> list[str]:
    """The names of all classes by label; the number of a class that has no name."""
    labels = rows[["given_label", "predicted_label"]]
    size = int(labels.max(axis=None)) + 1
    path = folder / "noise.json"
    if path.is_file():  # a class may have no training image
        with naming(path):
            size = max(size, len(json.loads(path.read_text(encoding="utf-8"))["observed_counts"]))
    names = [str(label) for label in range(size)]
    for kind in ("predicted", "given"):
        known = (
            rows.loc[rows[f"{kind}_class"] != "", [f"{kind}_label", f"{kind}_class"]]
            .dropna()
            .drop_duplicates()
        )
        for label, name in known.itertuples(index=False):
            names[int(label)] = name
    return names


# images ---------------------------------------------------------------------------------------------------------------


def data_uri(image: np.ndarray) -> str:
    """A thumbnail of uint8 [H, W, 1 or 3] of at most SIDE pixels: a PNG of a small image, a JPEG of a larger one."""
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    small = max(picture.size) <= SIDE
    if not small:
        picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    picture.save(content, "PNG") if small else picture.save(content, "JPEG", quality=85)
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"


def images_in_memory(run: dict, root: str) -> np.ndarray:
    """All images that a run in memory drew its training images from: uint8 [N, H, W, C], OOD images among them."""
    arguments = run["arguments"]
    if run["paper"] == "manifold_dividemix" and arguments.get("ood_ratio"):
        from manifold_dividemix.dataset import load_open_set  # noqa: PLC0415  (other runs do not need it)

        every = {"data_path": root, "limit_train": None, "noise_file": None, "posterior": None}
        # the labels do not matter here; drawing them could need a posterior
        every |= {"noise_type": "no"}
        return load_open_set(Namespace(**arguments | every)).images
    return datasets.from_arguments(arguments, root).train.images


def image_file(path: str, root: str) -> Path:
    """The file of a path that is absolute, relative to the working directory, or to the folder of the data set."""
    return Path(path) if Path(path).is_file() else Path(root) / path


def thumbnails(shown: pd.DataFrame, run: dict, data_path: str | None) -> tuple[list[str | None], list[str]]:
    """A data URI per row; None, and a note, if the file is missing or damaged. UserError: the data set is missing."""
    arguments, images = run["arguments"], None
    root = data_path or arguments.get("data_path") or arguments.get("data_root") or "./data"
    uris: list[str | None] = []
    notes = []
    for row in shown.itertuples():
        if row.path:
            file = image_file(row.path, root)
            try:
                uris.append(data_uri(read_image(file).permute(1, 2, 0).numpy()))
            except DamagedImage as error:
                uris.append(None)
                notes.append(f"{file} is not shown: {error.reason}")
            except OSError as error:
                uris.append(None)
                notes.append(f"{file} is not shown: {error.strerror}")
            continue
        if images is None:
            images = images_in_memory(run, root)
        if row.index_ >= len(images):
            raise UserError(
                f"{arguments['dataset']} in {root} has {len(images)} training images, {QUALITY} names image {row.index_}: "
                "give the run's data set with --data_path"
            )
        uris.append(data_uri(images[row.index_]))
    return uris, notes


# the page -------------------------------------------------------------------------------------------------------------


def collect(folder: Path, top: int, per_class: bool, data_path: str | None) -> tuple[dict, list[str]]:
    """Everything on the page, as plain data, and notes about images that cannot be shown. UserError: a file is damaged."""
    run, rows = read_arguments(folder), read_quality(folder / QUALITY)
    names = class_names(rows, folder)
    shown = most_suspect(rows, top, per_class)
    uris, notes = thumbnails(shown.rename(columns={"index": "index_"}), run, data_path)
    cards = [
        {
            "place": place,
            "image": uri,
            "predicted": _number(row.predicted_label, int),
            "probability": _number(row.predicted_probability),
            "score": _number(row.score),
            "ood": _number(row.ood_score),
        }
        for (place, row), uri in zip(
            zip(shown.index.tolist(), shown.itertuples(), strict=True), uris, strict=True
        )
    ]
    pairs = rows.dropna(subset="predicted_label").groupby(["given_label", "predicted_label"]).size()
    paths = rows["path"].tolist()
    images, given = rows["index"].tolist(), rows["given_label"].tolist()
    return {
        "run": str(folder),
        "method": run["method"],
        "dataset": run["arguments"]["dataset"],
        "id": hashlib.sha256(json.dumps([images, given, paths]).encode()).hexdigest()[:16],
        "names": names,
        "images": images,
        "given": given,
        "paths": paths if any(paths) else None,
        "cards": cards,
        "pairs": [[given, int(predicted), int(n)] for (given, predicted), n in pairs.items()],
    }, notes


def _number(value: float, kind: type = float) -> float | int | None:
    """A number of six digits; None if it is unknown."""
    return kind(float(f"{value:.6g}")) if math.isfinite(value) else None


def main(argv=None) -> None:
    """Collect and write the page."""
    args = make_parser().parse_args(argv)
    folder = Path(args.run)
    out = Path(args.out) if args.out else folder / "gallery.html"
    if out.suffix.lower() not in (".html", ".htm"):  # so it cannot be one of the files to read
        raise UserError(f"--out {out}: give the page a name that ends in .html")
    data, notes = collect(folder, args.top, args.per_class, args.data_path)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    write_text(render("gallery", data), out, "--out")
    print(f"{out}: {len(data['cards'])} of {len(data['images'])} training images, the most suspect first")


if __name__ == "__main__":
    cli.exit_cleanly(main)
