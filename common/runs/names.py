"""The names of run directories, and which flags they leave out. No torch here: `--help` needs none."""

import hashlib
import re
from argparse import Namespace
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

# flags that may differ in a resumed run, besides paths (`cli.place`): how it is computed; and on_bad_image, as the images left
# out are compared
NOT_COMPARED = ("resume", "device", "workers", "device_ids", "parallel", "gpuid1", "gpuid2", "on_bad_image")
# paths that are not part of a run's name; the labels and images read from them are compared instead
UNSAID = ("out", "data_path", "data_root", "ood_dir", "open_set_cache", "decoded", "posterior")


def run_name(args: Namespace, defaults: dict[str, Any], always: Iterable[str]) -> str:
    """A directory name from the arguments: the `always` flags first, then every flag with another value than its default.

    Of a path the name has the last part.
    """
    left_out = {*NOT_COMPARED, *UNSAID, "_places", "preset", *always} - {"device"}
    changed = [
        flag for flag, value in vars(args).items() if flag not in left_out and value != defaults.get(flag)
    ]
    places = getattr(args, "_places", ())
    named = {flag: getattr(args, flag) for flag in [*always, *changed]}
    if named.get("dataset") == "folder":  # of two folders, two names
        where = getattr(args, "data_path", None) or getattr(args, "data_root", None) or "./data"
        named["dataset"] = f"folder_{Path(where).resolve().name}"
    words = [
        f"{flag}_{Path(value).name if flag in places and value else value}" for flag, value in named.items()
    ]
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", "-".join(words))
    return name if len(name) <= 200 else f"{name[:180]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def run_name_of_files(args: Namespace, defaults: dict[str, Any], always: Sequence[str], classes: str) -> str:
    """The name of a run directory of a script for image files: its data set, then as `run_name`. classes: the flag
    of their number, which a folder sets."""
    if args.dataset != "folder":
        return f"{args.dataset}-{run_name(args, defaults, always)}"
    return run_name(args, defaults | {classes: getattr(args, classes)}, ["dataset", *always])
