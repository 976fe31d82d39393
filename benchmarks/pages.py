"""Self-contained HTML pages from the templates beside this module: they need no network and no server."""

import base64
import hashlib

from jinja2 import Environment, StrictUndefined

from benchmarks.cells import ROOT

TEMPLATES = ROOT / "benchmarks"


def render(name: str, data: dict) -> str:
    """The page NAME.html with page.css and NAME.css, page.js and NAME.js, and the data as JSON.

    No text of the data can end its script element or become a tag. Only the script with this hash may run. ValueError: a
    number that is not finite.
    """
    style = _read("page.css") + _read(f"{name}.css")
    script = _read("page.js") + _read(f"{name}.js")
    environment = Environment(undefined=StrictUndefined, autoescape=False, keep_trailing_newline=True)
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    template = environment.from_string(_read(f"{name}.html"))
    return template.render(style=style, script=script, digest=digest, data=data)


def _read(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")
