"""Docstrings as the site takes them: roles of reStructuredText become links and code."""

import re

import griffe

# Classes whose parameters are fields of a class of llm-compressor: no signature shows them here.
MODIFIERS = "liar_ext.integrations.llmcompressor."
ROLE = re.compile(r":(?:func|class|meth|attr|mod|data|obj):`(~?)([\w.]+)`")


def linked(match: re.Match) -> str:
    """Return a link to what a role names, where the site has it, and its name otherwise."""
    short, name = match.groups()
    shown = name.rpartition(".")[2] if short else name
    return f'<autoref identifier="{name}" optional><code>{shown}</code></autoref>'


def as_markdown(text: str) -> str:
    """Return a docstring with Markdown in place of roles, literals and literal blocks."""
    text = ROLE.sub(linked, text)
    return re.sub(r"::\n(?=\n)", ":\n", text)


class Roles(griffe.Extension):
    """Rewrites every docstring before it is read, and the defaults of a recipe's fields."""

    def on_instance(self, *, obj: griffe.Object, **kwargs) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)
            if obj.path.startswith(MODIFIERS):
                quiet = {"warn_unknown_params": False, "warn_missing_types": False}
                obj.docstring.parser_options = {**obj.docstring.parser_options, **quiet}

    def on_attribute_instance(self, *, attr: griffe.Attribute, **kwargs) -> None:
        """Take the default out of an option of a recipe."""
        own = attr.path.startswith("liar_ext.models.recipe_fields.Fields.")
        if own and isinstance(attr.value, griffe.ExprCall):
            attr.value = attr.value.arguments[0]
