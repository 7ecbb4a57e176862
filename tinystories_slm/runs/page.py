"""Templates of self-contained HTML pages; `base.html.jinja` has their head and their style sheet."""

from functools import cache

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, Template

_PACKAGE = "tinystories_slm.runs"


@cache
def load_template(name: str, package: str = _PACKAGE) -> Template:
    """Return the template `name` of `package`, which may extend and import those of this package."""
    packages = dict.fromkeys((package, _PACKAGE))
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package, ".") for package in packages]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)
