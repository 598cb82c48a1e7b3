"""Puts the verbs together, and ends a run the way a shell expects."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType
from typing import Annotated, Any, cast

import typer
from typer.core import TyperGroup

from mobazoo._version import __version__
from mobazoo.cli import verbs
from mobazoo.errors import MobazooError, Stopped

USER_ERROR, INTERRUPTED, BROKEN_PIPE, TERMINATED = 2, 130, 141, 143
# What all errors in words of a command line are: click's UsageError, which some releases of typer have inside.
_USAGE = cast(Any, typer.BadParameter).__mro__[1]


class OneLine(TyperGroup):
    """A command line that says what is wrong with its words as verbs say theirs, without a box."""

    def main(self, *args: Any, **options: Any) -> Any:
        """Runs it and leaves with its exit code."""
        try:
            code = super().main(*args, **{**options, "standalone_mode": False})
        except _USAGE as error:
            if said := " ".join(error.format_message().split()).rstrip("."):  # nothing where help was printed instead
                where = error.ctx.command_path if error.ctx is not None else "mobazoo"
                hint = "" if said.endswith("?") else f"; `{where} --help` says what there is"
                typer.echo(f"error: {said}{hint}", err=True)
            code = USER_ERROR
        sys.exit(code)


def discover() -> dict[str, ModuleType]:
    """Every module in ``mobazoo/cli/verbs``, in the order of the help: by its ``PLACE``, a panel and a rank."""
    modules = [import_module(f"{verbs.__name__}.{name}") for _, name, _ in iter_modules(verbs.__path__)]
    return {name_of(module): module for module in sorted(modules, key=lambda module: module.PLACE)}


def name_of(module: ModuleType) -> str:
    """The verb's word: the module's name, without the ``_`` that keeps it off a builtin."""
    return module.__name__.rpartition(".")[2].rstrip("_")


def version(asked: bool) -> None:
    """Prints the version and leaves."""
    if asked:
        typer.echo(f"mobazoo {__version__}")
        raise typer.Exit


def mobazoo(
    context: typer.Context,
    _: Annotated[bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Mixture of Block Attention: look at models, convert checkpoints, run recipes.

    A recipe is a YAML file or the name of one that is shipped; key=value after it changes it for this run.
    """
    context.obj = discover()


def build() -> typer.Typer:
    """The whole command line."""
    built = typer.Typer(
        cls=OneLine,
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
    )
    built.callback(epilog="Example: mobazoo show llama3.1-8b")(mobazoo)
    for name, module in discover().items():
        settings = getattr(module, "CONTEXT", None)
        built.command(
            name, epilog=module.EXAMPLES, rich_help_panel=module.PLACE[0].partition(" ")[2], context_settings=settings
        )(guarded(module.main))
    return built


def guarded(verb: Callable[..., None]) -> Callable[..., None]:
    """A verb whose user errors are one line, and which leaves quietly when it is interrupted or nobody reads on."""

    @functools.wraps(verb)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            verb(*args, **kwargs)
            sys.stdout.flush()
        except Stopped as stopped:
            typer.echo(str(stopped), err=True)
            raise typer.Exit(TERMINATED) from None
        except MobazooError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(USER_ERROR) from None
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            raise typer.Exit(BROKEN_PIPE) from None

    return run


app = build()


def main() -> None:
    """The entry point."""
    code: Any = INTERRUPTED
    try:
        app(prog_name="mobazoo")
    except SystemExit as left:
        code = left.code
    except KeyboardInterrupt:
        pass
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter flushes again on its way out and would report the reader that has gone.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = code or BROKEN_PIPE
    sys.exit(code)
