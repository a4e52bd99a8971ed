"""Sphinx settings of the documentation; `make docs` builds it, warnings are errors."""

import csv
import importlib
import inspect
import re
import shutil
from pathlib import Path
from statistics import median

from docutils import nodes
from docutils.statemachine import StringList
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util.docutils import SphinxDirective
from sphinx.util.parsing import nested_parse_to_nodes

import cnf
from cnf.race import CONTESTANTS

HERE = Path(__file__).parent
ROOT = HERE.parent

project = "cnf"
author = "the cnf authors"
copyright = author  # noqa: A001
version = release = cnf.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "myst_nb",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
templates_path: list[str] = []

html_theme = "furo"
html_title = f"cnf {release}"
html_static_path = ["_static"]
html_css_files = ["cnf.css"]
html_math_renderer = "mathml"  # what browsers render themselves: no script from elsewhere
html_theme_options = {"navigation_with_keys": True}
copybutton_exclude = ".linenos, .gp, .go"  # of a console, only what is typed

# Markdown: ::: directives, $math$, links to headings, definition lists.
myst_enable_extensions = ["colon_fence", "dollarmath", "deflist", "attrs_inline"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the notebooks are committed with their outputs

# The API: names as a user imports them, types beside the arguments that they belong to.
default_role = "py:obj"  # `Flow` in a docstring is a link
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False  # what a base class says is said there
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 72
add_module_names = False
toc_object_entries_show_parents = "hide"

# Every link between pages and to the API has to be there. Left out: names of other libraries,
# words in backticks (most are arguments), and the insides of packages, which annotations name.
nitpicky = True
nitpick_ignore_regex = [
    (
        r"py:.*",
        r"(torch|numpy|np|collections|contextlib|os|typing|types|pathlib|nn|abc|matplotlib)\b.*",
    ),
    (r"py:obj", r"(?s)(?!cnf\.[\w.]+$).*"),
    (r"py:.*", r"cnf(\.\w+){3,}"),
    (r"py:class", r"cnf\.registry\.T|Axes|Figure"),
]


def setup(app) -> None:
    app.connect("builder-inited", lambda app: gather())
    app.connect("autodoc-skip-member", of_tuple)
    app.connect("autodoc-process-docstring", plain_text, priority=100)
    app.connect("missing-reference", by_last_name)
    app.add_html_math_renderer("mathml", (inline_math, None), (block_math, None))
    app.add_directive("table-of", TableOf)
    app.add_directive("race-medians", RaceMedians)


def gather() -> None:
    """Copy what the site shows from elsewhere in the repository: notebooks and experiments."""
    shutil.rmtree(HERE / "notebooks", ignore_errors=True)
    shutil.copytree(ROOT / "notebooks", HERE / "notebooks")
    for path in (HERE / "notebooks").glob("*.ipynb"):  # whose links are the repository's
        path.write_text(path.read_text().replace("](../docs/", "](../"))
    shown = shutil.ignore_patterns("*.py", "*.json", "__pycache__")
    shutil.rmtree(HERE / "experiments", ignore_errors=True)
    shutil.copytree(ROOT / "experiments", HERE / "experiments", ignore=shown)
    for path in (HERE / "experiments").glob("*/**/*.md"):
        if path.name != "README.md":  # tables that the READMEs link to
            top = f"---\norphan: true\n---\n\n# All numbers of {path.parent.name}\n\n"
            path.write_text(top + path.read_text())


def of_tuple(app, what, name, obj, skip, options) -> bool | None:
    """Whether to leave out a NamedTuple's field: its class says more than "Alias for field 0"."""
    return True if type(obj).__name__ == "_tuplegetter" else None


MARKUP = re.compile(r"(?<!\\)[*|]|(?<=: \w)\.$")  # the last, of "dim: D.", begins a list A., B., …


def plain_text(app, what, name, obj, options, lines: list[str]) -> None:
    """Docstrings are plain text with backticks: `(*, D)` and log|det J| are no markup."""
    plain, verbatim = [], False  # examples and formulas
    for line in lines:
        begins = line.lstrip().startswith((">>>", ".. math::"))
        verbatim = begins or (verbatim and bool(line.strip()))
        parts = [line] if verbatim else re.split(r"(``.*?``|:math:`.*?`|`.*?`)", line)
        if not verbatim:
            parts[::2] = [MARKUP.sub(r"\\\g<0>", part) for part in parts[::2]]
        plain.append("".join(parts))
        if line.strip() == "Returns:":  # no type stands there, as the annotation has it
            plain.append(" " * (len(line) - len(line.lstrip()) + 4) + "\\ ")
    lines[:] = ["\\ ", *plain] if what in ("attribute", "property", "data") else plain


def by_last_name(app, env, node, contnode):
    """`Flow`, `cnf.Flow` and an annotation's `cnf.flow.Flow` all lead to the same entry."""
    name = node["reftarget"].strip(".~").removesuffix("()")
    first, *inner = name.removeprefix("cnf.").split(".")
    domain = env.domains["py"]
    if node.get("refdomain") != "py" or not first:
        return None
    if name.startswith("cnf.") and first in cnf.__all__:  # `cnf.fit`: where is it documented?
        home = getattr(getattr(cnf, first), "__module__", None) or name
        name = ".".join([*home.split(".")[:2], first, *inner])
    tails = (name, ".".join(name.split(".")[-2:]), name.rpartition(".")[2])
    for tail in tails:
        found = [full for full in domain.objects if f".{full}".endswith(f".{tail}")]
        found = [full for full in found if full.count(".") <= 2 or "." in tail]
        if len(found) == 1:
            return domain.resolve_xref(
                env, node["refdoc"], app.builder, "obj", found[0], node, contnode
            )
    return None


def inline_math(translator, node) -> None:
    translator.body.append(tex2mathml(sized(node.astext())))
    raise nodes.SkipNode


def block_math(translator, node) -> None:
    formula = tex2mathml(sized(node.astext()), as_block=True)
    translator.body.append(f'<div class="math-wrapper">{formula}</div>')
    raise nodes.SkipNode


def sized(formula: str) -> str:
    r"""docutils knows \big( as \bigl( only."""
    return re.sub(r"\\([bB]ig+)(?![a-zA-Z])", r"\\\1l", formula)


class Generated(SphinxDirective):
    """A directive whose content is Markdown that is made when the site is built."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        lines = self.lines(self.arguments[0])
        return nested_parse_to_nodes(self.state, StringList(lines, source=self.arguments[0]))


class TableOf(Generated):
    """A registry as a table: the names that commands and configurations use, and what they are."""

    def lines(self, table: str) -> list[str]:
        module, _, name = table.rpartition(".")
        rows = []
        for key, entry in getattr(importlib.import_module(module), name).items():
            about = getattr(entry, "about", None) or first_sentence(entry)
            about = re.sub(r"([*|])", r"\\\1", about)
            rows.append(f"| `{key}` | {about} |")
        return [f"```{{py:data}} {table}", "", "| name | |", "|---|---|", *rows, "```"]


class RaceMedians(Generated):
    """What a minute of training came to and what it costs: medians of the race's results.csv."""

    def lines(self, contestants: str) -> list[str]:
        with (ROOT / "experiments/toy/results.csv").open() as file:
            results = list(csv.DictReader(file))
        lines = [
            "| | gap (nats) | smallest to largest | steps | drawing (ms) | log_prob (ms) |",
            "|---|---:|---:|---:|---:|---:|",
        ]
        for name in contestants.split():
            own = [row for row in results if row["contestant"] == name]
            gap, steps, drawing, scoring = (
                sorted(float(row[column]) for row in own)
                for column in ("gap", "steps", "ms_sample", "ms_log_prob")
            )
            lines.append(
                f"| {CONTESTANTS[name].title} | {median(gap):.3f} | {gap[0]:.3f} to {gap[-1]:.3f} "
                f"| {median(steps):,.0f} | {median(drawing):,.0f} | {median(scoring):,.0f} |"
            )
        return lines


def first_sentence(entry) -> str:
    entry = getattr(entry, "func", entry)  # of a partial
    made = entry if callable(entry) else type(entry)
    paragraph = (inspect.getdoc(made) or "").split("\n\n")[0]
    return re.split(r"(?<=\.) ", " ".join(paragraph.split()))[0]
