"""The Typer app and how it fails: what a user can mend is one line and exit code 2, without a traceback."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

# What the library raises for what a user gave it. Anything else is our own fault and keeps its traceback.
MENDABLE = (ValueError, TypeError, LookupError, ImportError, OSError, RuntimeError)


class Commands(TyperGroup):
    """Typer's group, in the order of definition, with the library's errors told in one line."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except MENDABLE as error:
            if ctx.params.get("debug"):
                raise
            text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
            line = " ".join(text.split()) or type(error).__name__
            Console(stderr=True, soft_wrap=True, highlight=False).print(f"[bold red]error:[/] {escape(line)}")
            raise typer.Exit(2) from error


app = typer.Typer(
    name="attn-plugins", cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False
)


@app.callback()
def main(debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False) -> None:
    """Attention methods as plugins for models that are already loaded."""


def console() -> Console:
    """A console on the present stdout; made per command, so that redirection holds."""
    return Console(highlight=False)
