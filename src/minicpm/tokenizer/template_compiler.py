"""How a chat template becomes Python: literals as trusted text, and checks around loops and nested values.

The generated code calls back into its environment (`sandbox.py`): `trust`, `join_values`, `bounded_items`, `held`,
`weighed`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import TemplateSyntaxError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.visitor import NodeTransformer


class Guard(NodeTransformer):
    """Puts a check around what a template loops over and what it nests."""

    def visit_For(self, node: nodes.For, *args: Any, **kwargs: Any) -> nodes.Node:
        """A loop over paid-for items."""
        self.generic_visit(node)
        node.iter = _guarded("bounded_items", node.iter)
        return node

    def visit_Getitem(self, node: nodes.Getitem, *args: Any, **kwargs: Any) -> nodes.Node:
        """A slice is a new text or list, which is paid for."""
        self.generic_visit(node)
        return _guarded("held", node) if isinstance(node.arg, nodes.Slice) else node

    def _display(self, node: Any, *args: Any, **kwargs: Any) -> nodes.Node:
        self.generic_visit(node)
        stored = getattr(node, "ctx", "load") != "load"
        flat = all(isinstance(child, nodes.Const) for child in node.iter_child_nodes())
        return node if stored or flat else _guarded("weighed", node)

    visit_List = visit_Tuple = visit_Dict = _display

    def _refuse(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        raise TemplateSyntaxError("a chat template cannot load other templates", node.lineno)

    visit_Include = visit_Import = visit_FromImport = visit_Extends = _refuse


def _guarded(name: str, inner: nodes.Node) -> nodes.Expr:
    # Sub-nodes made here need what a parsed node has: a line, and the environment that compiles them.
    function = nodes.EnvironmentAttribute(name, lineno=inner.lineno, environment=inner.environment)
    return nodes.Call(function, [inner], [], None, None, lineno=inner.lineno, environment=inner.environment)


class TracingGenerator(CodeGenerator):
    """Compiles literals to trusted text, and joins text so that trust is carried over."""

    def visit_Const(self, node: nodes.Const, frame: Frame) -> None:
        """A literal: trusted if it is text."""
        value = node.as_const(frame.eval_ctx)
        if isinstance(value, str):
            self.write(f"environment.trust({value!r})")
        else:
            super().visit_Const(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        """The operator `~`."""
        self.write("environment.join_values((")
        for child in node.nodes:
            self.visit(child, frame)
            self.write(", ")
        self.write("))")

    def _output_const_repr(self, group: Iterable[Any]) -> str:
        return f"environment.trust({''.join(group)!r})"


class GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}`, with which some templates mark the assistant's text: its body."""

    tags = {"generation"}  # noqa: RUF012 -- the base class declares it as an instance attribute

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The body, as if the tags were not there."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
